package disk

import (
	"errors"
	"syscall"

	"github.com/holdfast-storage/holdfast"
)

// An image file is sparse, and the file system that it lies on may be full. A
// chunk is given out only once it has space there, so that no write of a logged
// entry, and no page of the map, meets ENOSPC: that would be an error of the
// disk (R12). Space is taken ahead in steps; an Append or InstallChunk that
// needs a chunk that cannot be had is refused before anything is logged.
//
// Which free chunks have space is not stored: at open none counts as having it,
// and what logged entries and the map need is taken again.

// growStep is how much space is taken at once: enough that it is seldom, and
// little against what a host may be asked to hold ready for one disk.
const growStep = 64 << 20

// stepChunks is growStep in chunks, less on a small disk.
func (d *Disk) stepChunks() int64 {
	return max(16, min(growStep/chunkSize, d.alloc.chunks/16))
}

// grow takes space for n more promised chunks that add pages to the map.
// ErrNoSpace if the host has none left. It holds no lock of the disk but
// growing, and does I/O.
func (d *Disk) grow(n, pages int64) error {
	d.growing.Lock()
	defer d.growing.Unlock()
	if d.alloc.short(n, pages) > 0 {
		if err := d.mayGrow(false); err != nil {
			return err
		}
	}
	err := d.growLocked(n, pages)
	if holdfast.KindOf(err) != holdfast.ErrNoSpace {
		return err
	}
	d.hostFull = true
	if d.swept {
		return err
	}
	// Free chunks may still hold what an earlier run took, or a punch left. It
	// is found by asking for each: what is there already needs nothing new.
	// The rest goes back, and what is needed is taken of it.
	d.swept = true
	if err := d.seek(n, pages); err != nil {
		return err
	}
	if err := d.sweep(); err != nil {
		return err
	}
	return d.growLocked(n, pages)
}

// mayGrow returns why the host's space must be spared, or nil. What the log holds
// when a disk is opened must find its place all the same.
func (d *Disk) mayGrow(ahead bool) error {
	if d.opts.MayGrow == nil || !d.opened.Load() {
		return nil
	}
	if err := d.opts.MayGrow(ahead); err != nil {
		return holdfast.Errorf(holdfast.ErrNoSpace, "no more space is taken for the disk: %w", err)
	}
	return nil
}

// seekChunks is how many chunks seek asks for at once.
const seekChunks = 4

// seek looks for free chunks that have space from an earlier life.
func (d *Disk) seek(n, pages int64) error {
	for from := int64(0); d.alloc.short(n, pages) > 0; {
		c, count := d.alloc.bareFrom(from, seekChunks)
		if count == 0 {
			return nil
		}
		from = c + count
		for i := c; i < c+count; i++ {
			err := d.main.Allocate(d.chunkOffset(uint32(i)), chunkSize)
			switch {
			case err == nil:
				d.alloc.back(i, 1)
			case !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, syscall.EDQUOT):
				return d.fail(holdfast.Errorf(holdfast.ErrIO, "take space for chunks: %w", err))
			}
		}
	}
	return nil
}

func (d *Disk) growLocked(n, pages int64) error {
	step := d.stepChunks()
	for {
		short := d.alloc.short(n, pages)
		if short == 0 {
			return nil
		}
		if err := d.failed(); err != nil {
			return err
		}
		step = max(1, step)
		from, count := d.alloc.bare(min(max(short, step), growStep/chunkSize))
		if count == 0 {
			return holdfast.Errorf(holdfast.ErrNoSpace, "the disk is full")
		}
		off, length := d.chunkOffset(uint32(from)), count*chunkSize
		err := d.main.Allocate(off, length)
		switch {
		case err == nil:
			d.alloc.back(from, count)
		case errors.Is(err, errors.ErrUnsupported):
			d.log.Warn("the file system cannot set space aside: if it runs full, the disk fails", "disk", d.super.disk.String(), "path", d.path)
			d.alloc.solid()
		case errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT):
			// What it may have taken of the run goes back, and a smaller one may do.
			if err := d.main.PunchHole(off, length); err != nil && !errors.Is(err, errors.ErrUnsupported) && !errors.Is(err, syscall.ENOSPC) {
				return d.fail(holdfast.Errorf(holdfast.ErrIO, "give space back: %w", err))
			}
			if count <= short && count == 1 || count <= short && step == 1 {
				return holdfast.Errorf(holdfast.ErrNoSpace, "the file system of %s is full", d.path).
					WithRemedy("make room on it; what needs no new space goes on")
			}
			step = min(step, count) / 4
			if step == 0 {
				step = 1
			}
		default:
			return d.fail(holdfast.Errorf(holdfast.ErrIO, "take space for chunks: %w", err))
		}
	}
}

// ground makes an image's chunks wait for space below, and takes it for what is
// logged and for the map. n is how many more chunks recovery will need.
func (d *Disk) ground(n int64) error {
	if d.super.walOffset != 0 {
		return nil // a device has all its space
	}
	d.alloc.thin()
	err := d.grow(n, 0)
	if holdfast.KindOf(err) == holdfast.ErrNoSpace && (n == 0 || d.alloc.fits(n)) {
		d.log.Warn("no space for what is logged", "disk", d.super.disk.String(), "path", d.path, "error", err)
		return nil // it is applied once there is; what recovery needs at once it takes of what is kept for the map
	}
	return err
}

// sweep gives back the space of all free chunks that do not count as having it.
// No chunk can be given out meanwhile that had none.
func (d *Disk) sweep() (err error) {
	for from := int64(0); from < d.alloc.chunks && err == nil; {
		from, err = d.sweepFrom(from)
	}
	return err
}

// sweepFrom does the first run of them from a chunk on, and returns where to go on. The
// caller holds growing.
func (d *Disk) sweepFrom(from int64) (next int64, err error) {
	c, count := d.alloc.bareFrom(from, maxPunch/chunkSize)
	if count == 0 {
		return d.alloc.chunks, nil
	}
	err = d.main.PunchHole(d.chunkOffset(uint32(c)), count*chunkSize)
	if errors.Is(err, errors.ErrUnsupported) || errors.Is(err, syscall.ENOSPC) {
		return d.alloc.chunks, nil
	}
	if err != nil {
		return 0, d.fail(holdfast.Errorf(holdfast.ErrIO, "give space back: %w", err))
	}
	return c + count, nil
}

// sweepAfterOpen does the same for what a process that was killed left behind, and lets
// others between: until then it is space of an image that nothing accounts for.
func (d *Disk) sweepAfterOpen() {
	for from := int64(0); from < d.alloc.chunks; {
		select {
		case <-d.stop:
			return
		default:
		}
		d.growing.Lock()
		next, err := d.sweepFrom(from)
		if d.swept = d.swept || err == nil && next >= d.alloc.chunks; d.swept {
			next = d.alloc.chunks
		}
		d.growing.Unlock()
		if err != nil {
			return // the disk has failed
		}
		from = next
	}
}

// Reserve raises this replica's credit to want bytes of new chunks, taking
// space below an image for them if need be, and returns the credit held, which
// may be less: ErrNoSpace tells that there was not enough. Append and
// InstallChunk take new chunks out of the credit first, so that a writer who
// never has more out than its credit is never refused for want of a chunk. A
// want below the credit gives the rest back; 0 gives all back. Credit is
// rounded up to chunks, lives in memory alone, and ends with the disk's life.
func (r *Replica) Reserve(want int64) (granted int64, err error) {
	if want < 0 {
		return 0, holdfast.Errorf(holdfast.ErrInvalid, "reserve %d bytes for replica %v", want, r.desc.Replica)
	}
	if r.d.readOnly != nil {
		return 0, r.d.readOnly
	}
	r.order.Lock()
	defer r.order.Unlock()
	chunks := (min(want, r.d.alloc.chunks*chunkSize) + chunkSize - 1) / chunkSize
	for {
		r.mu.Lock()
		if err = r.usable(); err != nil {
			r.mu.Unlock()
			return 0, err
		}
		pages := r.creditPages()
		more := chunks - r.credit.Load()
		if more <= 0 {
			r.d.alloc.release(-more)
			r.d.alloc.needs(more * pages)
			r.credit.Store(chunks)
		} else if err = r.d.alloc.reserve(more, more*pages); err == nil {
			r.credit.Store(chunks)
		}
		granted = r.credit.Load() * chunkSize
		r.mu.Unlock()
		if err == errBare {
			err = r.d.grow(more, more*pages)
			if err == nil {
				continue
			}
		}
		if holdfast.KindOf(err) == holdfast.ErrNoSpace && chunks-granted/chunkSize > 1 {
			// Half of what is missing may still be there.
			chunks = granted/chunkSize + (chunks-granted/chunkSize)/2
			continue
		}
		if err == nil && granted < want {
			err = holdfast.Errorf(holdfast.ErrNoSpace, "reserve %d bytes for replica %v: %d granted", want, r.desc.Replica, granted)
		}
		return granted, err
	}
}

// creditPages is how many map pages each chunk of credit may add. Under mu.
func (r *Replica) creditPages() int64 { return int64(1 + len(r.tree.levels)) }
