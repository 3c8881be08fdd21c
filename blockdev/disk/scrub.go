package disk

import (
	"context"
	"errors"
	"math/bits"
	"time"

	"github.com/holdfast-storage/holdfast"
)

// DefaultScrubRate is what a scrub reads of a disk a second, in bytes: a disk of
// 10 TiB in two days, and a small part of what even a turning one can do.
const DefaultScrubRate = 64 << 20

// MinScrubRate is the least rate that a scrub can be told, in bytes a second.
const MinScrubRate = 1 << 20

// scrubBatch is how many chunks a scrub lists at a time.
const scrubBatch = 512

// ScrubOptions say how a scrub goes.
type ScrubOptions struct {
	// Rate is the most that is read a second, in bytes. Zero: DefaultScrubRate.
	Rate int64
	// Progress is called now and then, from the scrub's own goroutine. May be nil.
	Progress func(ScrubReport)
}

// ScrubReport is what a scrub has read and found so far.
type ScrubReport struct {
	Total int64 // bytes of mapped chunks when it began
	Read  int64 // bytes of chunks compared
	Bad   int64 // blocks that did not match their checksums, or could not be read
	Lost  int64 // blocks known to be lost: no in-sync replica had them
}

// Scrub reads every mapped chunk of every replica past the page cache and compares
// it with its checksums, until all are read or ctx ends. What does not match is
// remembered as whatever a read finds is (Replica.Bad), so that the writer mends it
// from another in-sync replica; nothing is written here. At most 1024 chunks of a
// replica are remembered at a time: of more, the next scrub tells.
//
// It gives way: it has one read under way, never more than the rate, and rests for
// as long as a read took. An error is ctx's (ErrTimeout), or the disk's failure.
func (d *Disk) Scrub(ctx context.Context, o ScrubOptions) (ScrubReport, error) {
	if o.Rate == 0 {
		o.Rate = DefaultScrubRate
	}
	var report ScrubReport
	if o.Rate < MinScrubRate {
		return report, holdfast.Errorf(holdfast.ErrInvalid, "scrub at %d bytes a second: the least is %d", o.Rate, MinScrubRate)
	}
	replicas := d.Replicas()
	for _, r := range replicas {
		report.Total += r.Status().Used
	}
	buf := d.buffer()
	defer d.buffers.Put(buf)
	pace := pacer{rate: o.Rate, next: time.Now()}
	for _, r := range replicas {
		err := r.scrub(ctx, *buf, &pace, func(bad, lost uint16) {
			report.Read += chunkSize
			report.Bad += int64(bits.OnesCount16(bad))
			report.Lost += int64(bits.OnesCount16(lost))
			if o.Progress != nil {
				o.Progress(report)
			}
		})
		switch {
		case err == nil:
		case ctx.Err() != nil:
			return report, holdfast.Errorf(holdfast.ErrTimeout, "scrub disk %v: %w", d.super.disk, ctx.Err())
		case d.failed() != nil:
			return report, d.failed()
		case errors.Is(err, holdfast.ErrNotFound), r.Status().Damaged != nil:
			// Deleted meanwhile, or to be rebuilt anyway: there is nothing to compare.
		default:
			return report, err
		}
	}
	return report, nil
}

// scrub compares the chunks of one replica.
func (r *Replica) scrub(ctx context.Context, buf []byte, pace *pacer, seen func(bad, lost uint16)) error {
	for after := int64(-1); ; {
		refs, err := r.Chunks(0, after, scrubBatch)
		if err != nil || len(refs) == 0 {
			return err
		}
		for _, ref := range refs {
			after = ref.Index
			if !ref.Mapped {
				continue
			}
			if err := pace.wait(ctx); err != nil {
				return err
			}
			began := time.Now()
			bad, lost, mapped, err := r.scrubChunk(ref.Index, buf)
			if err != nil {
				return err
			}
			if mapped {
				pace.took(time.Since(began))
				seen(bad, lost)
			}
		}
	}
}

// scrubChunk compares one chunk with its checksums, and remembers what is bad.
// mapped is false if it is not mapped any more.
func (r *Replica) scrubChunk(index int64, buf []byte) (bad, lost uint16, mapped bool, err error) {
	r.applying.Lock()
	defer r.applying.Unlock()
	r.mu.RLock()
	err = r.usable()
	r.mu.RUnlock()
	if err != nil {
		return 0, 0, false, err
	}
	e, err := r.lookupChunk(index)
	if err != nil || e.typ != chunkMapped {
		return 0, 0, false, err
	}
	good, err := r.readOwn(buf, &e)
	for i := range int64(blocksPerChunk) {
		if e.state(i) == BlockPoison {
			lost |= 1 << i
		}
	}
	if err == nil && ^good&^lost != 0 { // once more: what is right the second time is there
		var again uint16
		again, err = r.readOwn(buf, &e)
		good |= again
	}
	if err != nil {
		return 0, 0, false, err
	}
	bad = ^good &^ lost
	if bad|lost != 0 {
		r.found(index, bad|lost)
	}
	return bad, lost, true, nil
}

// pacer keeps reads of chunks at a rate.
type pacer struct {
	rate int64     // bytes a second
	next time.Time // no read before
}

// wait waits for its turn.
func (p *pacer) wait(ctx context.Context) error {
	rest := time.Until(p.next)
	if rest <= 0 {
		return ctx.Err()
	}
	timer := time.NewTimer(rest)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// took says how long a read took: the next comes no sooner than the rate allows,
// and after as long a rest, so that at least half of a busy disk is others'.
func (p *pacer) took(d time.Duration) {
	now := time.Now()
	p.next = p.next.Add(time.Duration(float64(chunkSize) / float64(p.rate) * float64(time.Second)))
	if rested := now.Add(d); p.next.Before(rested) {
		p.next = rested
	}
}
