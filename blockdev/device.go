package blockdev

import "context"

// Device is a block device. All methods may be called concurrently; requests
// in flight at the same time may take effect in any order, as in NBD (proto.md,
// "Ordering of messages and writes"). Offsets and lengths are in bytes and may
// have any alignment to the logical block size; a request that leaves
// [0, Size()) is an ErrInvalid error and has no effect.
//
// Buffers belong to the caller again when the method returns; a Device never
// keeps one.
//
// Errors carry a root kind: ErrNoSpace, ErrFenced, ErrIO, ErrIntegrity,
// ErrInvalid, ErrTimeout, ErrUnavailable.
type Device interface {
	// Size is the device's size in bytes. It may grow, never shrink.
	Size() int64
	// Blocks returns the logical and the physical block size in bytes.
	Blocks() (logical, physical int)

	// ReadAt fills p from offset off. It returns only bytes whose checksum
	// held.
	ReadAt(ctx context.Context, p []byte, off int64) error
	// WriteAt writes p at offset off. On return a later read sees it and it
	// survives the death of any one process or host as the volume's ack mode
	// says; with fua it is durable on every in-sync replica.
	WriteAt(ctx context.Context, p []byte, off int64, fua bool) error
	// Flush returns when every write, trim and zeroing that had returned before
	// Flush was called is durable on every in-sync replica.
	Flush(ctx context.Context) error
	// Trim gives [off, off+n) back. Whole blocks in it read as zeroes
	// afterwards; parts of blocks at the edges are left as they were.
	Trim(ctx context.Context, off, n int64, fua bool) error
	// WriteZeroes makes [off, off+n) read as zeroes, edges included. With
	// noHole the space stays allocated where the device can.
	WriteZeroes(ctx context.Context, off, n int64, noHole, fua bool) error
}
