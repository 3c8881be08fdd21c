package disk

import (
	"context"
	"errors"
	"fmt"
	iofs "io/fs"
	"path/filepath"
	"syscall"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// walDirSuffix makes the directory of an image's WAL files from its path.
const walDirSuffix = ".wal"

// fillStep is the size of the writes that fill WAL files with zeroes: larger
// ones would leave large folios in the page cache, which make every later
// 4 KiB write slower.
const fillStep = 64 << 10

// blankCheck is how much of a target's beginning and end must be zero for it
// to count as blank: where partition tables, file systems, LVM and md put
// their marks.
const blankCheck = 4 << 20

// Format makes a disk of path: an image file, created if it is not there, with
// its WAL files in the directory path.wal beside it, or a block device. On
// return everything is durable. It refuses (ErrRefused) a target that is not
// blank, unless forced (ErrExists if it is a disk of this very node), one that is
// in use, forced or not, and an image larger than its file system can hold;
// ErrInvalid sizes; it fails with ErrIO.
func Format(ctx context.Context, fs vfs.FS, path string, o FormatOptions) error {
	if o.Cluster.IsZero() || o.Node.IsZero() {
		return holdfast.Errorf(holdfast.ErrInvalid, "format %s: the cluster's and the node's id are required", path)
	}
	if o.Disk.IsZero() {
		o.Disk = holdfast.NewID[holdfast.DiskID]()
	}
	st, err := fs.Stat(path)
	isNew := errors.Is(err, iofs.ErrNotExist)
	switch {
	case err != nil && !isNew:
		return holdfast.Errorf(holdfast.ErrIO, "format %s: %w", path, err)
	case !isNew && st.Kind != vfs.KindRegular && st.Kind != vfs.KindBlockDevice:
		return holdfast.Errorf(holdfast.ErrInvalid, "format %s: neither a file nor a block device", path)
	}
	if o.InUse != nil && !isNew {
		what, err := o.InUse(path)
		if err != nil {
			return holdfast.Errorf(holdfast.ErrRefused, "find out who uses %s: %w", path, err)
		}
		if what != "" {
			return holdfast.Errorf(holdfast.ErrRefused, "%s is in use: %s", path, what).WithRemedy("end that first, or pick another disk; no force overrides it")
		}
	}
	device := st.Kind == vfs.KindBlockDevice
	size := st.Size
	if !device {
		size = max(size, o.Size)
	}
	super, err := plan(size, device, &o)
	if err != nil {
		return holdfast.Errorf(holdfast.KindOf(err), "format %s: %w", path, err)
	}
	flags := vfs.Create
	if isNew || device {
		flags |= vfs.Exclusive
	}
	if device {
		flags &^= vfs.Create
	}
	f, err := fs.OpenFile(path, flags)
	if err != nil {
		return holdfast.Errorf(holdfast.ErrRefused, "format %s: %w", path, err)
	}
	err = format(ctx, fs, f, path, super, st.Size, device, &o)
	if cerr := f.Close(); err == nil && cerr != nil {
		err = holdfast.Errorf(holdfast.ErrIO, "format %s: %w", path, cerr)
	}
	if isNew && holdfast.KindOf(err) == holdfast.ErrRefused {
		_ = fs.Remove(path) // nothing half done: it was made here, and holds nothing
	}
	return err
}

// plan lays a disk of a size out.
func plan(size int64, device bool, o *FormatOptions) (*superblock, error) {
	walSize, slotSize := o.WALSize, o.slotSize
	if walSize == 0 {
		walSize = max(256<<20, min(2<<30, size/16))
		walSize = max(MinWALSize, min(walSize, size/4))
	}
	if slotSize == 0 {
		if walSize < MinWALSize {
			return nil, holdfast.Errorf(holdfast.ErrInvalid, "a WAL of %d bytes is too small: the least is %d", walSize, int64(MinWALSize))
		}
		slotSize = min(maxSlotSize, walSize/4) &^ (fillStep - 1)
	}
	slots := walSize / slotSize
	s := &superblock{
		version: formatVersion,
		cluster: o.Cluster, disk: o.Disk, node: o.Node,
		size: size, slotSize: slotSize, slots: uint32(slots), dataOffset: headerArea,
	}
	if device {
		s.walOffset = headerArea
		s.dataOffset = headerArea + slots*slotSize
	}
	s.chunks = min(maxChunks, (size-s.dataOffset)/holdfast.ChunkSize)
	if slots > maxSlots || s.chunks < 2*spareChunks(s.chunks) {
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "%d bytes are too small for a disk with a WAL of %d bytes", size, walSize).
			WithRemedy("give the disk at least 64 MiB and the WAL at most a quarter of it")
	}
	return s, nil
}

func format(ctx context.Context, fs vfs.FS, f vfs.File, path string, s *superblock, had int64, device bool, o *FormatOptions) error {
	wrap := func(err error) error {
		return holdfast.Errorf(holdfast.ErrIO, "format %s: %w", path, err)
	}
	if err := f.Lock(); err != nil {
		return holdfast.Errorf(holdfast.ErrRefused, "format %s: %w", path, err)
	}
	if !o.Force {
		if err := refuse(fs, f, path, had, device, o); err != nil {
			return err
		}
	}
	if !device {
		if err := extend(f, path, had, s.size); err != nil {
			return err
		}
	}
	// What was here is gone from now on, whatever happens next.
	zero := vfs.AlignedBuffer(superSize)
	for _, off := range []int64{superA, superB} {
		if had > off {
			if _, err := f.WriteAt(zero, off); err != nil {
				return wrap(err)
			}
		}
	}
	if err := f.Sync(); err != nil {
		return wrap(err)
	}
	if device {
		if err := fill(ctx, f, s.walOffset, int64(s.slots)*s.slotSize); err != nil {
			return wrap(err)
		}
	} else {
		if err := makeWAL(ctx, fs, path, s); err != nil {
			return wrap(err)
		}
	}
	if err := writeSuperblock(f, s); err != nil {
		return wrap(err)
	}
	if !device {
		if err := fs.SyncDir(filepath.Dir(path)); err != nil {
			return wrap(err)
		}
	}
	return nil
}

// extend makes an image as long as it is to be. It is changed no further than
// that: a file system that cannot hold so long a file must not cost what is there.
func extend(f vfs.File, path string, had, size int64) error {
	if err := f.NoCopyOnWrite(); errors.Is(err, vfs.ErrCopyOnWrite) {
		return holdfast.Errorf(holdfast.ErrRefused, "%s lies on btrfs and would be copied at every write: %w", path, err).
			WithRemedy("remove the file: it is made anew as it must be, or give a device")
	} else if err != nil {
		return holdfast.Errorf(holdfast.ErrIO, "format %s: %w", path, err)
	}
	err := f.Truncate(size)
	if err == nil {
		return nil
	}
	if !errors.Is(err, syscall.EFBIG) && !errors.Is(err, syscall.EINVAL) {
		return holdfast.Errorf(holdfast.ErrIO, "format %s: %w", path, err)
	}
	most := longest(f, had, size)
	if err := f.Truncate(had); err != nil {
		return holdfast.Errorf(holdfast.ErrIO, "format %s: %w", path, err)
	}
	return holdfast.Errorf(holdfast.ErrRefused, "%s is to have %s (%d bytes), and its file system holds no file larger than %s (%d bytes)",
		path, holdfast.FormatSize(size), size, holdfast.FormatSize(most), most).
		WithRemedy("give a size of at most %d bytes, several images, another file system or a device", most&^(holdfast.ChunkSize-1))
}

// longest finds how long a file may be, by trying: at least have, less than size.
func longest(f vfs.File, have, size int64) int64 {
	for have+1 < size {
		if mid := have + (size-have)/2; f.Truncate(mid) == nil {
			have = mid
		} else {
			size = mid
		}
	}
	return have
}

// refuse looks for anything that somebody may still want.
func refuse(fs vfs.FS, f vfs.File, path string, had int64, device bool, o *FormatOptions) error {
	no := func(what string) error {
		return holdfast.Errorf(holdfast.ErrRefused, "%s is not blank: %s", path, what).
			WithRemedy("pick another disk, or force it if nobody needs what is there")
	}
	if had >= superB+superSize {
		s, err := readSuperblock(f)
		switch {
		case err == nil && s.cluster != o.Cluster:
			return no(fmt.Sprintf("it is disk %v of another cluster, %v", s.disk, s.cluster))
		case err == nil && s.node == o.Node:
			return holdfast.Errorf(holdfast.ErrExists, "%s is disk %v of this node already", path, s.disk)
		case err == nil:
			return no(fmt.Sprintf("it is disk %v of this cluster", s.disk))
		case holdfast.KindOf(err) == holdfast.ErrUnsupported:
			return no(err.Error())
		}
	}
	if o.Probe != nil && had > 0 {
		what, err := o.Probe(path)
		if err != nil {
			return holdfast.Errorf(holdfast.ErrRefused, "find out what %s holds: %w", path, err)
		}
		if what != "" {
			return no("it holds " + what)
		}
	}
	b := make([]byte, fillStep)
	for _, part := range [][2]int64{{0, min(had, blankCheck)}, {max(0, had-blankCheck), had}} {
		for off := part[0]; off < part[1]; off += int64(len(b)) {
			n := min(int64(len(b)), part[1]-off)
			if _, err := f.ReadAt(b[:n], off); err != nil {
				return holdfast.Errorf(holdfast.ErrIO, "read %s: %w", path, err)
			}
			for i, c := range b[:n] {
				if c != 0 {
					return no(fmt.Sprintf("there are bytes at offset %d", off+int64(i)))
				}
			}
		}
	}
	if !device {
		names, err := fs.ReadDir(path + walDirSuffix)
		if err != nil && !errors.Is(err, iofs.ErrNotExist) {
			return holdfast.Errorf(holdfast.ErrIO, "read %s: %w", path+walDirSuffix, err)
		}
		if len(names) > 0 {
			return no("there are log files in " + path + walDirSuffix)
		}
	}
	return nil
}

// walName is the path of one WAL file of an image.
func walName(path string, i int) string {
	return filepath.Join(path+walDirSuffix, fmt.Sprintf("%05d", i))
}

// makeWAL makes the WAL files of an image, written with zeroes once so that no
// later fdatasync has to allocate.
func makeWAL(ctx context.Context, fs vfs.FS, path string, s *superblock) error {
	dir := path + walDirSuffix
	if err := fs.Mkdir(dir); err != nil {
		return err
	}
	for i := range int(s.slots) {
		f, err := fs.OpenFile(walName(path, i), vfs.Create)
		if err != nil {
			return err
		}
		if had, serr := f.Size(); serr == nil && had > 0 {
			err = f.Truncate(0) // forced: the file of another disk
		}
		if err == nil {
			err = f.NoCopyOnWrite()
		}
		if err == nil {
			err = f.Truncate(s.slotSize)
		}
		if err == nil {
			err = fill(ctx, f, 0, s.slotSize)
		}
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			return err
		}
	}
	return fs.SyncDir(dir)
}

// fill writes zeroes and makes them durable.
func fill(ctx context.Context, f vfs.File, off, n int64) error {
	if err := f.Allocate(off, n); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	zero := vfs.AlignedBuffer(fillStep)
	for end := off + n; off < end; off += fillStep {
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, err := f.WriteAt(zero[:min(fillStep, end-off)], off); err != nil {
			return err
		}
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return f.DropCache()
}

// Identify reads which disk the formatted file or device at path is.
func Identify(fs vfs.FS, path string) (holdfast.DiskID, error) {
	f, err := fs.OpenFile(path, vfs.ReadOnly)
	if err != nil {
		return holdfast.DiskID{}, holdfast.Errorf(holdfast.ErrNotFound, "%w", err)
	}
	defer f.Close() //nolint:errcheck // opened for reading
	s, err := readSuperblock(f)
	if err != nil {
		return holdfast.DiskID{}, holdfast.Errorf(holdfast.KindOf(err), "%s: %w", path, err)
	}
	return s.disk, nil
}

// Erase makes what was a disk unknown: both superblocks are overwritten, durably,
// so that nothing opens it again. Its space is not given back; of an image, the
// file and the directory of its log can be removed. It must not be open.
func Erase(fs vfs.FS, path string, id holdfast.DiskID) error {
	st, err := fs.Stat(path)
	if errors.Is(err, iofs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return holdfast.Errorf(holdfast.ErrIO, "erase %s: %w", path, err)
	}
	flags := vfs.Flag(0)
	if st.Kind == vfs.KindBlockDevice {
		flags = vfs.Exclusive
	}
	f, err := fs.OpenFile(path, flags)
	if err != nil {
		return holdfast.Errorf(holdfast.ErrRefused, "erase %s: %w", path, err)
	}
	err = erase(f, path, id)
	if cerr := f.Close(); err == nil && cerr != nil {
		err = holdfast.Errorf(holdfast.ErrIO, "erase %s: %w", path, cerr)
	}
	return err
}

func erase(f vfs.File, path string, id holdfast.DiskID) error {
	if err := f.Lock(); err != nil {
		return holdfast.Errorf(holdfast.ErrRefused, "erase %s: %w", path, err)
	}
	s, err := readSuperblock(f)
	if err != nil || s.disk != id { // no disk, or another one by now: not ours to touch
		return holdfast.Errorf(holdfast.ErrRefused, "erase %s: it is not disk %v any more", path, id)
	}
	zero := vfs.AlignedBuffer(superSize)
	for _, off := range []int64{superA, superB} {
		if _, err := f.WriteAt(zero, off); err != nil {
			return holdfast.Errorf(holdfast.ErrIO, "erase %s: %w", path, err)
		}
	}
	if err := f.Sync(); err != nil {
		return holdfast.Errorf(holdfast.ErrIO, "erase %s: %w", path, err)
	}
	return nil
}
