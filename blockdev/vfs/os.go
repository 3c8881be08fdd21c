package vfs

import (
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"os"
	"strings"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// OS is the operating system's files.
type OS struct{}

// OpenFile implements FS.
func (OS) OpenFile(path string, flags Flag) (File, error) {
	mode := os.O_RDWR
	if flags&ReadOnly != 0 {
		mode = os.O_RDONLY
	}
	if flags&Create != 0 {
		mode |= os.O_CREATE
	}
	if flags&Exclusive != 0 {
		mode |= os.O_EXCL
	}
	if flags&Direct != 0 {
		f, err := os.OpenFile(path, mode|unix.O_DIRECT, 0o600)
		if err == nil {
			return &osFile{f: f, path: path, direct: true}, nil
		}
		if !errors.Is(err, unix.EINVAL) {
			return nil, err
		}
	}
	f, err := os.OpenFile(path, mode, 0o600)
	if err != nil {
		return nil, err
	}
	return &osFile{f: f, path: path}, nil
}

// Stat implements FS.
func (OS) Stat(path string) (Stat, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return Stat{}, err
	}
	defer f.Close() //nolint:errcheck // opened for reading
	return statOf(f)
}

// Mkdir implements FS.
func (OS) Mkdir(path string) error {
	err := os.Mkdir(path, 0o700)
	if errors.Is(err, iofs.ErrExist) {
		if st, serr := os.Stat(path); serr == nil && st.IsDir() {
			return nil
		}
	}
	return err
}

// ReadDir implements FS.
func (OS) ReadDir(path string) ([]string, error) {
	entries, err := os.ReadDir(path)
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, err
}

// Remove implements FS.
func (OS) Remove(path string) error { return os.Remove(path) }

// SyncDir implements FS.
func (OS) SyncDir(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	err = f.Sync()
	if errors.Is(err, unix.EINVAL) { // file systems without directory sync say so
		err = nil
	}
	return errors.Join(err, f.Close())
}

// BootID implements FS.
func (OS) BootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

// osFile is a File of the operating system.
type osFile struct {
	f      *os.File
	path   string
	direct bool

	once    sync.Once // opens the handle of ReadDirectAt
	forRead *os.File  // nil: this file system has no O_DIRECT
}

func (f *osFile) ReadAt(p []byte, off int64) (int, error) {
	n, err := f.f.ReadAt(p, off)
	if err == io.EOF && n > 0 && n < len(p) {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

func (f *osFile) ReadDirectAt(p []byte, off int64) (int, error) {
	f.once.Do(func() {
		// Through /proc, so that it is this inode whatever the path leads to now.
		h, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.f.Fd()), os.O_RDONLY|unix.O_DIRECT, 0)
		if err == nil {
			f.forRead = h
		}
	})
	if f.forRead == nil {
		return f.ReadAt(p, off)
	}
	n, err := f.forRead.ReadAt(p, off)
	if errors.Is(err, unix.EINVAL) { // O_DIRECT accepted at open, refused at read
		return f.ReadAt(p, off)
	}
	if err == io.EOF && n > 0 && n < len(p) {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

func (f *osFile) WriteAt(p []byte, off int64) (int, error) {
	n, err := f.f.WriteAt(p, off)
	if !f.direct || n > 0 || !errors.Is(err, unix.EINVAL) {
		return n, err
	}
	// O_DIRECT accepted at open, refused at write: nothing was written.
	h, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.f.Fd()), os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	n, err = h.WriteAt(p, off)
	return n, errors.Join(err, h.Close())
}

// maxIovecs is IOV_MAX of Linux.
const maxIovecs = 1024

func (f *osFile) WritevAt(bufs [][]byte, off int64) error {
	fd := int(f.f.Fd())
	for len(bufs) > 0 {
		n, err := unix.Pwritev(fd, bufs[:min(len(bufs), maxIovecs)], off)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) {
			continue
		}
		if err != nil {
			return &iofs.PathError{Op: "pwritev", Path: f.path, Err: err}
		}
		if n == 0 {
			return &iofs.PathError{Op: "pwritev", Path: f.path, Err: io.ErrShortWrite}
		}
		off += int64(n)
		for len(bufs) > 0 && n >= len(bufs[0]) {
			n -= len(bufs[0])
			bufs = bufs[1:]
		}
		if n > 0 { // a partial write; finish this buffer alone, the caller's slice stays as it is
			if _, err := f.f.WriteAt(bufs[0][n:], off); err != nil {
				return err
			}
			off += int64(len(bufs[0]) - n)
			bufs = bufs[1:]
		}
	}
	return nil
}

func (f *osFile) Sync() error {
	for {
		err := unix.Fdatasync(int(f.f.Fd()))
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EINTR) {
			return &iofs.PathError{Op: "fdatasync", Path: f.path, Err: err}
		}
	}
}

func (f *osFile) Truncate(size int64) error { return f.f.Truncate(size) }

func (f *osFile) Size() (int64, error) {
	st, err := statOf(f.f)
	return st.Size, err
}

func (f *osFile) Allocate(off, n int64) error {
	return f.fallocate("fallocate", unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func (f *osFile) PunchHole(off, n int64) error {
	err := f.fallocate("punch hole", unix.FALLOC_FL_KEEP_SIZE|unix.FALLOC_FL_PUNCH_HOLE, off, n)
	if errors.Is(err, errors.ErrUnsupported) && f.discard(off, n) == nil {
		return nil // a device that cannot zero, but discard
	}
	return err
}

// discard is the ioctl BLKDISCARD, which only block devices know.
func (f *osFile) discard(off, n int64) error {
	what := [2]uint64{uint64(off), uint64(n)}
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.f.Fd(), unix.BLKDISCARD, uintptr(unsafe.Pointer(&what)))
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
		default:
			return &iofs.PathError{Op: "discard", Path: f.path, Err: errno}
		}
	}
}

func (f *osFile) fallocate(op string, mode uint32, off, n int64) error {
	for {
		err := unix.Fallocate(int(f.f.Fd()), mode, off, n)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, unix.EINTR):
		default: // EOPNOTSUPP and ENOSYS match errors.ErrUnsupported
			return &iofs.PathError{Op: op, Path: f.path, Err: err}
		}
	}
}

func (f *osFile) DropCache() error {
	return unix.Fadvise(int(f.f.Fd()), 0, 0, unix.FADV_DONTNEED)
}

func (f *osFile) AdviseRandom() error {
	return unix.Fadvise(int(f.f.Fd()), 0, 0, unix.FADV_RANDOM)
}

func (f *osFile) NoCopyOnWrite() error {
	var st unix.Stat_t
	var sfs unix.Statfs_t
	fd := int(f.f.Fd())
	if err := errors.Join(unix.Fstat(fd, &st), unix.Fstatfs(fd, &sfs)); err != nil {
		return &iofs.PathError{Op: "stat", Path: f.path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || sfs.Type != unix.BTRFS_SUPER_MAGIC {
		return nil
	}
	flags, err := unix.IoctlGetInt(fd, unix.FS_IOC_GETFLAGS)
	if err != nil {
		return &iofs.PathError{Op: "get flags", Path: f.path, Err: err}
	}
	switch set, err := inPlace(flags, st.Size); {
	case err != nil:
		return &iofs.PathError{Op: "set flags", Path: f.path, Err: err}
	case set == flags:
		return nil
	default:
		if err := unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, set); err != nil {
			return &iofs.PathError{Op: "set flags", Path: f.path, Err: err}
		}
		return nil
	}
}

// Inode flags of linux/fs.h.
const (
	flagCompressed = 0x00000004 // FS_COMPR_FL
	flagNoCOW      = 0x00800000 // FS_NOCOW_FL
)

// inPlace are the inode flags of a file on btrfs that is written in place.
func inPlace(flags int, size int64) (int, error) {
	if flags&flagNoCOW == 0 && size > 0 {
		return flags, ErrCopyOnWrite
	}
	return flags&^flagCompressed | flagNoCOW, nil // the two exclude each other
}

func (f *osFile) Lock() error {
	for {
		err := unix.Flock(int(f.f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EWOULDBLOCK):
			return &iofs.PathError{Op: "flock", Path: f.path, Err: ErrLocked}
		default:
			return &iofs.PathError{Op: "flock", Path: f.path, Err: err}
		}
	}
}

func (f *osFile) Stat() (Stat, error) { return statOf(f.f) }

func (f *osFile) Close() error {
	var err error
	if f.forRead != nil {
		err = f.forRead.Close()
	}
	return errors.Join(err, f.f.Close())
}

// statOf describes an open file.
func statOf(f *os.File) (Stat, error) {
	var st unix.Stat_t
	fd := int(f.Fd())
	if err := unix.Fstat(fd, &st); err != nil {
		return Stat{}, &iofs.PathError{Op: "fstat", Path: f.Name(), Err: err}
	}
	s := Stat{Size: st.Size, Identity: fmt.Sprintf("inode %d:%d", st.Dev, st.Ino)}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		s.Kind = KindRegular
	case unix.S_IFDIR:
		s.Kind = KindDirectory
	case unix.S_IFBLK:
		s.Kind, s.KeepsPages = KindBlockDevice, true
		s.Identity = fmt.Sprintf("device %d", st.Rdev)
		if seq, err := unix.IoctlGetInt(fd, unix.BLKGETDISKSEQ); err == nil {
			s.Identity = fmt.Sprintf("device %d diskseq %d", st.Rdev, seq)
		}
		end, err := unix.Seek(fd, 0, io.SeekEnd)
		if err != nil {
			return Stat{}, &iofs.PathError{Op: "seek", Path: f.Name(), Err: err}
		}
		s.Size = end
		return s, nil
	}
	var sfs unix.Statfs_t
	if err := unix.Fstatfs(fd, &sfs); err != nil {
		return Stat{}, &iofs.PathError{Op: "fstatfs", Path: f.Name(), Err: err}
	}
	switch sfs.Type {
	case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, unix.TMPFS_MAGIC:
		s.KeepsPages = true
	}
	return s, nil
}
