package keeper

import (
	"context"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
)

// fileDevice is a Device in a sparse file, with its counts in a second one, so
// that both outlive the daemon.
type fileDevice struct {
	f      *os.File
	size   int64
	counts []byte // mapped: flushes, trims, failing, slow (microseconds)

	mu sync.Mutex
}

const (
	countFlushes = iota * 8
	countTrims
	switchFail // 1: ErrIO, 2: ErrNoSpace for writes
	delayMicros
)

func openFileDevice(dir, name string, size int64) (*fileDevice, error) {
	f, err := os.OpenFile(filepath.Join(dir, name+".img"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := f.Truncate(size); err != nil {
		return nil, err
	}
	counts, err := mapCounts(dir, name)
	return &fileDevice{f: f, size: size, counts: counts}, err
}

func mapCounts(dir, name string) ([]byte, error) {
	c, err := os.OpenFile(filepath.Join(dir, name+".counts"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if err := c.Truncate(4096); err != nil {
		return nil, err
	}
	return unix.Mmap(int(c.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
}

func (d *fileDevice) add(at int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	binary.NativeEndian.PutUint64(d.counts[at:], binary.NativeEndian.Uint64(d.counts[at:])+1)
}

func (d *fileDevice) enter(write bool) error {
	if us := binary.NativeEndian.Uint64(d.counts[delayMicros:]); us > 0 {
		time.Sleep(time.Duration(us) * time.Microsecond)
	}
	switch binary.NativeEndian.Uint64(d.counts[switchFail:]) {
	case 1:
		return holdfast.Errorf(holdfast.ErrIO, "told to fail")
	case 2:
		if write {
			return holdfast.Errorf(holdfast.ErrNoSpace, "told to be full")
		}
	}
	return nil
}

func (d *fileDevice) Size() int64                     { return d.size }
func (d *fileDevice) Blocks() (logical, physical int) { return 512, 4096 }

func (d *fileDevice) ReadAt(_ context.Context, p []byte, off int64) error {
	if err := d.enter(false); err != nil {
		return err
	}
	_, err := d.f.ReadAt(p, off)
	return err
}

func (d *fileDevice) WriteAt(_ context.Context, p []byte, off int64, _ bool) error {
	if err := d.enter(true); err != nil {
		return err
	}
	_, err := d.f.WriteAt(p, off)
	return err
}

func (d *fileDevice) Flush(context.Context) error {
	d.add(countFlushes)
	return d.enter(true)
}

func (d *fileDevice) Trim(_ context.Context, off, n int64, _ bool) error {
	d.add(countTrims)
	const block = holdfast.BlockSize
	first, last := (off+block-1)/block*block, (off+n)/block*block
	if first >= last {
		return d.enter(true)
	}
	return d.punch(first, last-first)
}

func (d *fileDevice) WriteZeroes(_ context.Context, off, n int64, _, _ bool) error {
	return d.punch(off, n)
}

func (d *fileDevice) punch(off, n int64) error {
	if err := d.enter(true); err != nil {
		return err
	}
	for { // the scheduler's own signals may end it
		err := unix.Fallocate(int(d.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
