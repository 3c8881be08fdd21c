package disk

import (
	"fmt"
	"log/slog"
	"time"

	"github.com/holdfast-storage/holdfast"
)

// FormatVersion is the version of the disk format that this program writes
// (FORMAT.md); it reads no other.
const FormatVersion = formatVersion

// FormatOptions says what Format makes.
type FormatOptions struct {
	Cluster holdfast.ClusterID // required
	Node    holdfast.NodeID    // required
	Disk    holdfast.DiskID    // zero: a new random id

	// Size is the image file's size in bytes, for a path that does not exist
	// or is shorter. Zero: the size of what is there. Ignored on block devices.
	Size int64
	// WALSize in bytes, at least MinWALSize. Zero: 1/16 of the disk, at least
	// 256 MiB and at most 2 GiB, but never more than 1/4 of the disk.
	WALSize int64
	// Force overwrites what Format would refuse to touch, but what InUse names.
	Force bool
	// InUse says who uses the target now ("it is mounted at /srv"), or "" if
	// nobody is seen to. May be nil.
	InUse func(path string) (what string, err error)
	// Probe says what a non-blank target holds ("ext4 file system"), or "" if
	// it knows nothing of it. May be nil.
	Probe func(path string) (what string, err error)

	slotSize int64 // of the WAL files; zero: as the format says. For tests.
}

// Options says how Open opens.
type Options struct {
	// Logger; nil discards.
	Logger *slog.Logger
	// Cluster and Node, unless zero, are whose disk this must be: another's is
	// refused (ErrRefused) before a byte of it is written.
	Cluster holdfast.ClusterID
	Node    holdfast.NodeID
	// OnFail is called once, from its own goroutine, when the disk fails (R12)
	// after Open has returned it. May be nil.
	OnFail func(err error)
	// ApplyEvery is how often committed entries are applied when nothing forces
	// it earlier. Zero: DefaultApplyEvery. Negative: only when forced, by a WAL
	// that fills, Apply, Checkpoint or Close.
	ApplyEvery time.Duration

	// MayGrow says why no more of the host's space may be taken for new chunks, or nil;
	// what needs none goes on. With ahead nothing needs them yet, or can do without. It
	// must not block. May be nil.
	MayGrow func(ahead bool) error
	// MapCache bounds the leaves of maps held in memory, in bytes. Zero:
	// DefaultMapCache; at least MinMapCache. What exceeds it is read again when it
	// is needed.
	MapCache int64

	foreground  bool // no background goroutine. For tests.
	cacheLeaves int  // instead of MapCache. For tests.
	checking    bool // nothing is written; see Check

	releaseLeaves int // instead of releaseAtOnce; negative: none. For tests.
}

// Sizes and times.
const (
	// MinWALSize is the smallest WAL: four files that each hold a few
	// operations of the largest size.
	MinWALSize = 16 << 20
	// DefaultMapCache holds the map of 18 GiB: as much is read and written at random
	// without a page of the map being read.
	DefaultMapCache = 32 << 20
	// MinMapCache leaves room for what some hundred reads need at a time.
	MinMapCache = 4 << 20
	// DefaultApplyEvery is short against a takeover and long against a burst.
	DefaultApplyEvery = 500 * time.Millisecond
)

// Processors is how many goroutines a program that serves disks should let run at once
// (runtime.GOMAXPROCS) on n processors. One that is in a read, a write or a sync of a
// file counts as running until the scheduler's monitor has seen it there, so with n all
// others wait while n wait for the device: 32 readers of what is not cached got a third
// of what it gives, with a p99 of 30 ms in place of 1.3.
func Processors(n int) int { return 4 * n }

// Stat is what is known of an open disk. Sizes are in bytes.
type Stat struct {
	Cluster   holdfast.ClusterID
	Node      holdfast.NodeID
	Disk      holdfast.DiskID
	OpenCount holdfast.OpenCount // after this Open raised it, durably
	Size      int64              // of the whole disk
	Capacity  int64              // of the chunks, mapped or not
	Used      int64              // of the chunks that hold data, map or logged writes, or wait to be freed
	Reserved  int64              // of the chunks that logged entries will need
	// Reclaimable is what of Used comes free with the next checkpoints: what was
	// trimmed, overwritten anew or deleted, and is applied.
	Reclaimable int64
	Map         int64 // what of Used holds the map
	// Allocated is what chunks take of the file system below: Used, and free ones
	// that space was set aside for (at most 64 MiB ahead of need, what Reserved and the
	// map's next checkpoint need, and while large writes stream as much as they took
	// between two checkpoints). An image takes the superblocks besides, and for a moment
	// after it was opened what an earlier life set aside. On a device it is the Capacity.
	Allocated int64
	WALSize   int64
	WALUsed   int64 // with what logged writes hold in chunks
	Replicas  int
	Repair    RepairStat
	// MarkedFailed: an I/O error was seen in an earlier life; nothing on this
	// disk is ever intact again.
	MarkedFailed bool
	// ReadOnly says why nothing of this disk may be changed, ErrUnsupported, or is
	// nil. OpenCount is then that of the last open that could write.
	ReadOnly error
	// Failed is the error that ended the disk's work in this life (R12), or nil,
	// also of a disk that was closed.
	Failed error
}

// ReplicaDesc names a replica and says how large its segment is.
type ReplicaDesc struct {
	Segment holdfast.SegmentID
	Replica holdfast.ReplicaID
	Lineage holdfast.LineageID
	Size    int64 // bytes, a multiple of BlockSize
}

// OpType is what an entry does to its range.
type OpType uint8

// The types of entries.
const (
	OpWrite OpType = 1 // the range takes the payload
	OpZero  OpType = 2 // the range reads as zeroes
	OpTrim  OpType = 3 // the range reads as zeroes and its space is given back
)

// String returns the type's name.
func (t OpType) String() string {
	switch t {
	case OpWrite:
		return "write"
	case OpZero:
		return "zero"
	case OpTrim:
		return "trim"
	}
	return fmt.Sprintf("type %d", uint8(t))
}

// Entry is one sequenced mutation of a segment. Offset and Length are in bytes
// within the segment, multiples of holdfast.BlockSize, Length above zero.
type Entry struct {
	Epoch  holdfast.Epoch // of the writer that sequenced it
	Seq    holdfast.Seq
	Commit holdfast.Seq // what the writer knew to be committed
	Type   OpType
	Offset int64
	Length int64 // of a write at most holdfast.MaxOpSize
	// CRC holds the crc32c (Castagnoli) of each block of a write; empty otherwise.
	CRC []uint32
	// Payload is Length bytes for a write; empty otherwise.
	Payload []byte
}

// EpochStart says that the log's entries from First on, up to the next
// EpochStart, are of Epoch.
type EpochStart struct {
	Epoch holdfast.Epoch
	First holdfast.Seq
}

// Range is a range of bytes of a segment.
type Range struct{ Offset, Length int64 }

// Status is what a replica knows of itself.
type Status struct {
	ReplicaDesc
	Fence holdfast.Epoch // the highest fence accepted, durable
	Tail  holdfast.Seq   // last entry received
	Dur   holdfast.Seq   // last entry durable
	// First is the oldest entry that Entries can still return; Tail+1 if none.
	First holdfast.Seq
	// Commit is the highest commit this replica was told of. It may lie above
	// Tail on a replica that is being filled.
	Commit holdfast.Seq
	// Applied: the chunks hold the segment as of this entry.
	Applied holdfast.Seq
	// Floor: the log cannot be truncated below this entry, since later bytes may be in chunks.
	Floor holdfast.Seq
	// Checkpoint is the applied entry of the last durable checkpoint: an
	// InstallChunk as of an earlier one is refused.
	Checkpoint holdfast.Seq
	// EpochTails lists the epochs of the log, ascending, the oldest at most
	// MaxEpochTails back.
	EpochTails []EpochStart
	// Intact: everything this replica ever acknowledged as received is still
	// there (protocol, section 4).
	Intact      bool
	IntactEpoch holdfast.Epoch // of the last DeclareIntact
	HintEpoch   holdfast.Epoch // highest (epoch, ISR version) it was told
	HintISR     holdfast.ISRVersion
	Used        int64 // bytes of mapped chunks
	// Damaged says why this replica cannot be trusted: part of its durable log,
	// or of its map is unreadable. Nil if sound. All but Fence, Sync, SetHint and
	// Rebase return this error; it is to begin anew, by Rebase, and be filled from
	// a peer.
	Damaged error
	// BadRanges are ranges whose logged bytes were lost to corruption: they
	// read as ErrIntegrity until overwritten. BadEntry is the first entry that
	// was found so when the disk was opened, applied since or not; 0 once the
	// entry was cut or the log dropped, or the replica was declared intact.
	BadRanges []Range
	BadEntry  holdfast.Seq
	Bad       int64 // blocks found bad, or lost, and not yet good again
	Poison    int64 // blocks in chunks that are lost until overwritten
}

// MaxEpochTails bounds Status.EpochTails, as raft bounds a segment's history.
const MaxEpochTails = 1000

// BlockState is what is known of one block of a chunk.
type BlockState uint8

// The states of a block.
const (
	BlockZero   BlockState = 0 // reads as zeroes; holds no bytes
	BlockData   BlockState = 1 // holds bytes with a checksum
	BlockPoison BlockState = 2 // its bytes are lost: reads fail with ErrIntegrity until overwritten
	BlockBad    BlockState = 3 // it should hold bytes with the given checksum, and they do not match; only in what ReadChunk returns
)

// ChunkRef names one chunk that ever held data.
type ChunkRef struct {
	Index   int64        // offset in the segment divided by holdfast.ChunkSize
	LastSeq holdfast.Seq // of the last applied entry that touched it
	Mapped  bool         // false: all its blocks read as zeroes
}

// Chunk is one chunk as of an applied entry.
type Chunk struct {
	Index int64
	// Data is holdfast.ChunkSize bytes, zero where the block's state is not
	// BlockData; nil if no block is.
	Data    []byte
	CRC     [holdfast.BlocksPerChunk]uint32 // crc32c of each block of state BlockData or BlockBad, else 0
	State   [holdfast.BlocksPerChunk]BlockState
	LastSeq holdfast.Seq // as in ChunkRef
	AsOf    holdfast.Seq // the applied entry at which the chunk had these bytes
}

// FenceError refuses a fence that is not above the present one.
type FenceError struct{ Present, Asked holdfast.Epoch }

// Error says which.
func (e *FenceError) Error() string {
	return fmt.Sprintf("fence at epoch %d refused: epoch %d was fenced already", e.Asked, e.Present)
}

// Is matches holdfast.ErrFenced.
func (e *FenceError) Is(target error) bool { return target == holdfast.ErrFenced }

// GapError says that the log does not hold the wanted entry: Entries was asked
// below First, or Append was given something else than the next entry.
type GapError struct {
	Wanted holdfast.Seq // the entry asked for or given
	First  holdfast.Seq // the oldest entry held (Tail+1 if none)
	Tail   holdfast.Seq // the last entry held
}

// Error says which.
func (e *GapError) Error() string {
	return fmt.Sprintf("entry %d does not fit a log of entries %d to %d", e.Wanted, e.First, e.Tail)
}

// Is matches holdfast.ErrInvalid.
func (e *GapError) Is(target error) bool { return target == holdfast.ErrInvalid }
