package main

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"

	"github.com/holdfast-storage/holdfast"
)

// cell is the medium of a disk with a volatile cache, in memory: a
// blockdev.Device that keeps what was not flushed apart, and loses some of it
// when its power is cut. All methods may be called concurrently.
type cell struct {
	size int64

	mu    sync.Mutex
	pages map[int64]*page // by number; those not there are zero
	fresh map[int64]bool  // pages with versions that were not flushed
	out   *outage         // nil: it works
}

// outage is a time in which requests wait, until it is over for them: then they
// fail or go on.
type outage struct {
	over chan struct{}
	fail bool // read once over is closed
}

// page is one 4 KiB page: its last version is what reads see. The first is on the
// medium, the others are in the cache.
type page struct{ versions []*[pageSize]byte }

// pageSize is the unit of the cache, sectorSize that of the medium: a page may be
// torn between sectors.
const (
	pageSize   = 4096
	sectorSize = 512
)

// maxVersions bounds what is kept of a page that is written over and over without
// a flush; older versions are as good as lost.
const maxVersions = 8

var zeroPage [pageSize]byte

func newCell(size int64) *cell {
	return &cell{size: size, pages: map[int64]*page{}, fresh: map[int64]bool{}}
}

// enter waits for the end of an outage, and fails if that is what it ends with.
func (c *cell) enter(ctx context.Context) error {
	for {
		c.mu.Lock()
		out := c.out
		c.mu.Unlock()
		if out == nil {
			return nil
		}
		select {
		case <-out.over:
		case <-ctx.Done():
			return holdfast.Errorf(holdfast.ErrTimeout, "the disk does not answer: %w", ctx.Err())
		}
		if out.fail {
			return holdfast.Errorf(holdfast.ErrIO, "the disk is out")
		}
	}
}

// Size implements blockdev.Device.
func (c *cell) Size() int64 { return c.size }

// Blocks implements blockdev.Device.
func (c *cell) Blocks() (logical, physical int) { return sectorSize, pageSize }

// ReadAt implements blockdev.Device.
func (c *cell) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := c.enter(ctx); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.each(off, int64(len(p)), func(number, from, at, n int64) {
		copy(p[at:at+n], c.newest(number)[from:])
	})
}

// newest is what a page holds; the caller does not change it.
func (c *cell) newest(number int64) *[pageSize]byte {
	if pg := c.pages[number]; pg != nil {
		return pg.versions[len(pg.versions)-1]
	}
	return &zeroPage
}

// WriteAt implements blockdev.Device.
func (c *cell) WriteAt(ctx context.Context, p []byte, off int64, fua bool) error {
	return c.change(ctx, off, int64(len(p)), fua, func(page []byte, at, n int64) { copy(page, p[at:at+n]) })
}

// Trim implements blockdev.Device.
func (c *cell) Trim(ctx context.Context, off, n int64, fua bool) error {
	if off < 0 || n < 0 || off > c.size-n {
		return outside(off, n, c.size)
	}
	first, end := (off+pageSize-1)/pageSize*pageSize, (off+n)/pageSize*pageSize // whole pages
	return c.WriteZeroes(ctx, first, max(0, end-first), false, fua)
}

// WriteZeroes implements blockdev.Device.
func (c *cell) WriteZeroes(ctx context.Context, off, n int64, _, fua bool) error {
	return c.change(ctx, off, n, fua, func(page []byte, _, _ int64) { clear(page) })
}

// change makes a new version of each page of a range.
func (c *cell) change(ctx context.Context, off, n int64, fua bool, set func(part []byte, at, n int64)) error {
	if err := c.enter(ctx); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	err := c.each(off, n, func(number, from, at, n int64) {
		next := *c.newest(number)
		set(next[from:from+n], at, n)
		pg := c.pages[number]
		if pg == nil {
			pg = &page{versions: []*[pageSize]byte{&zeroPage}}
			c.pages[number] = pg
		}
		if len(pg.versions) == maxVersions {
			pg.versions = slices.Delete(pg.versions, 1, 2)
		}
		pg.versions = append(pg.versions, &next)
		c.fresh[number] = true
		if fua {
			c.settle(number)
		}
	})
	return err
}

// each calls f for each part of a range that lies in one page: the page's number,
// where the part begins in it and in the range, and its length.
func (c *cell) each(off, n int64, f func(number, from, at, n int64)) error {
	if off < 0 || n < 0 || off > c.size-n {
		return outside(off, n, c.size)
	}
	for at := int64(0); at < n; {
		number, from := (off+at)/pageSize, (off+at)%pageSize
		part := min(pageSize-from, n-at)
		f(number, from, at, part)
		at += part
	}
	return nil
}

func outside(off, n, size int64) error {
	return holdfast.Errorf(holdfast.ErrInvalid, "[%d,+%d) leaves a device of %d bytes", off, n, size)
}

// Flush implements blockdev.Device.
func (c *cell) Flush(ctx context.Context) error {
	if err := c.enter(ctx); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for number := range c.fresh {
		c.settle(number)
	}
	return nil
}

// settle brings the newest version of a page to the medium; the caller has the lock.
func (c *cell) settle(number int64) {
	pg := c.pages[number]
	pg.versions = []*[pageSize]byte{pg.versions[len(pg.versions)-1]} // not a part of the old list: that keeps the others alive
	if *pg.versions[0] == zeroPage {
		delete(c.pages, number)
	}
	delete(c.fresh, number)
}

// hang lets requests wait from now on: the disk does not answer, or its power is
// gone.
func (c *cell) hang() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.out == nil {
		c.out = &outage{over: make(chan struct{})}
	}
}

// fail fails the requests that wait, and all to come until resume or restore.
func (c *cell) fail() {
	c.hang()
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.out.fail {
		c.out.fail = true
		close(c.out.over)
	}
}

// resume ends an outage in which nothing was lost: requests that wait go on.
func (c *cell) resume() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.out != nil && !c.out.fail {
		close(c.out.over)
	}
	c.out = nil
}

// restore gives power again: of each page that was not flushed the medium has
// the old version, the newest, one between, or sectors of two of them. It
// returns how many pages were not flushed, and how many of them are not what was
// written last.
func (c *cell) restore(rng *rand.Rand) (unsynced, lost int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	numbers := make([]int64, 0, len(c.fresh))
	for number := range c.fresh {
		numbers = append(numbers, number)
	}
	slices.Sort(numbers) // so that the seed decides
	for _, number := range numbers {
		pg := c.pages[number]
		kept := *pg.versions[rng.IntN(len(pg.versions))]
		if rng.IntN(8) == 0 {
			torn := sectorSize * (1 + rng.IntN(pageSize/sectorSize-1))
			copy(kept[torn:], pg.versions[rng.IntN(len(pg.versions))][torn:])
		}
		unsynced++
		if kept != *c.newest(number) {
			lost++
		}
		pg.versions = append(pg.versions, &kept)
		c.settle(number)
	}
	c.out = nil
	return unsynced, lost
}
