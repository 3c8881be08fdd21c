package vfs

import "unsafe"

// PageSize is the unit in which the operating system writes files back, and
// the alignment of direct reads and writes.
const PageSize = 4096

// Flag says how OpenFile opens.
type Flag uint

// The flags of OpenFile. Files are always opened for reading and writing.
const (
	// Create makes the file if it is not there.
	Create Flag = 1 << iota
	// Exclusive, with Create, fails with an fs.ErrExist error if the file is
	// there; on a block device it asks the kernel for exclusive use (O_EXCL),
	// which fails while a file system on it is mounted.
	Exclusive
	// Direct makes writes bypass the page cache where the file system can
	// (O_DIRECT). Offsets, lengths and buffers must then be multiples of
	// PageSize (AlignedBuffer).
	Direct
	// ReadOnly opens for reading alone.
	ReadOnly
)

// Kind is what a path leads to.
type Kind int

// The kinds of files that matter here.
const (
	KindOther Kind = iota
	KindRegular
	KindBlockDevice
	KindDirectory
)

// Stat describes a file.
type Stat struct {
	Kind Kind
	Size int64 // bytes; of a block device the device's size
	// Identity names this very inode or device while the machine runs
	// (st_dev and st_ino, or BLKGETDISKSEQ): a copy of the file, or another
	// device under the same name, has another identity.
	Identity string
	// KeepsPages reports whether the page cache of this kernel alone holds
	// what was written and not yet synced: true of ext4, xfs, btrfs, tmpfs and
	// block devices; false of FUSE, NFS, 9p and whatever is unknown. Only
	// there does a write(2) survive the death of any process (protocol,
	// section 4, "intact").
	KeepsPages bool
}

// FS opens files. All methods may be called concurrently. Errors match
// errors.Is with the io/fs errors and syscall errnos of the real thing.
type FS interface {
	// OpenFile opens a regular file or a block device.
	OpenFile(path string, flags Flag) (File, error)
	// Stat describes what path leads to, following symbolic links.
	Stat(path string) (Stat, error)
	// Mkdir makes one directory; one that exists is no error.
	Mkdir(path string) error
	// ReadDir returns the names in a directory, sorted.
	ReadDir(path string) ([]string, error)
	// Remove removes a file or an empty directory.
	Remove(path string) error
	// SyncDir makes the creation and removal of a directory's entries durable.
	SyncDir(path string) error
	// BootID returns an id that changes whenever the kernel starts anew
	// (/proc/sys/kernel/random/boot_id).
	BootID() (string, error)
}

// File is an open file or block device. All methods may be called
// concurrently. Buffers belong to the caller again on return.
type File interface {
	// ReadAt fills p from offset off; a short read is an error (io.EOF or
	// io.ErrUnexpectedEOF at the end of the file).
	ReadAt(p []byte, off int64) (int, error)
	// ReadDirectAt is ReadAt from the medium rather than the page cache, where
	// the file system can (O_DIRECT); else it is ReadAt. p, len(p) and off must
	// be multiples of PageSize (AlignedBuffer).
	ReadDirectAt(p []byte, off int64) (int, error)
	// WriteAt writes all of p at offset off.
	WriteAt(p []byte, off int64) (int, error)
	// WritevAt writes the buffers one after the other at offset off, with as
	// few system calls as the kernel allows (pwritev).
	WritevAt(bufs [][]byte, off int64) error
	// Sync makes everything written so far durable (fdatasync).
	Sync() error
	// Truncate sets the file's size; new bytes read as zeroes.
	Truncate(size int64) error
	// Size returns the size in bytes, also of a block device.
	Size() (int64, error)
	// Allocate gives [off, off+n) space without changing what it reads as or
	// the size; errors.ErrUnsupported where the file system cannot.
	Allocate(off, n int64) error
	// PunchHole gives the space of [off, off+n) back; it reads as zeroes
	// afterwards, or as anything on a device that can discard and not zero.
	// errors.ErrUnsupported where the file system or the device cannot.
	PunchHole(off, n int64) error
	// DropCache asks the kernel to forget the file's clean pages.
	DropCache() error
	// AdviseRandom asks the kernel for no readahead of its own.
	AdviseRandom() error
	// NoCopyOnWrite has the file system write in place from now on: on btrfs,
	// where every overwrite of an image would else be a new extent, and of a
	// file that is empty still. Elsewhere, and of a block device, it does
	// nothing. ErrCopyOnWrite if the file is not empty and is not so already.
	NoCopyOnWrite() error
	// Lock takes the file's exclusive lock (flock) without waiting; it is held
	// until Close or the death of the process. ErrLocked if another has it.
	Lock() error
	// Stat describes the open file.
	Stat() (Stat, error)
	// Close closes the file. Only after every other call has returned.
	Close() error
}

// AlignedBuffer returns n zero bytes at an address that is a multiple of
// PageSize, as direct reads and writes need.
func AlignedBuffer(n int) []byte {
	b := make([]byte, n+PageSize)
	skip := int(-uintptr(unsafe.Pointer(unsafe.SliceData(b))) & (PageSize - 1))
	return b[skip : skip+n : skip+n]
}

// Aligned reports whether a buffer is where direct reads and writes need it.
func Aligned(p []byte) bool {
	return uintptr(unsafe.Pointer(unsafe.SliceData(p)))&(PageSize-1) == 0
}
