package coordinator

import (
	"time"

	"github.com/holdfast-storage/holdfast"
)

// entry is one mutation in the replay window.
type entry struct {
	id             OpID
	offset, length int64
	at             time.Duration // when it was sequenced, for the op age limit
	fua            bool
	answered       bool  // completed, by failing, while it was held
	charged        int64 // chunks that all entries up to this one may map
}

// entryOverhead is what one operation costs in the window beside its payload,
// so that trims and zeroes do not count as nothing.
const entryOverhead = 256

func windowCost(kind OpKind, length int64) int64 {
	if kind == OpWrite {
		return length + entryOverhead
	}
	return entryOverhead
}

// window is the replay window: every operation from first to last, kept until
// it is durable on every ackset member. A ring; slots are reused.
type window struct {
	ring  []entry
	cost  []int64
	first holdfast.Seq // first kept; last+1 when empty
	last  holdfast.Seq
	bytes int64

	charged  int64 // chunks that all entries of this epoch may map
	released int64 // and those up to first-1
}

func (w *window) reset(after holdfast.Seq) {
	w.first, w.last, w.bytes = after+1, after, 0
}

func (w *window) len() int                  { return int(w.last + 1 - w.first) }
func (w *window) at(s holdfast.Seq) *entry  { return &w.ring[int(s)&(len(w.ring)-1)] }
func (w *window) costAt(s holdfast.Seq) int { return int(s) & (len(w.cost) - 1) }

// push adds the operation with the next seq. Room was checked by the caller.
func (w *window) push(e entry, cost, chunks int64) holdfast.Seq {
	if w.len() == len(w.ring) {
		w.grow()
	}
	w.last++
	w.charged += chunks
	e.charged = w.charged
	*w.at(w.last) = e
	w.cost[w.costAt(w.last)] = cost
	w.bytes += cost
	return w.last
}

// grow doubles the ring; its size stays a power of two.
func (w *window) grow() {
	n := max(64, 2*len(w.ring))
	ring, cost := make([]entry, n), make([]int64, n)
	for s := w.first; s <= w.last; s++ {
		ring[int(s)&(n-1)] = *w.at(s)
		cost[int(s)&(n-1)] = w.cost[w.costAt(s)]
	}
	w.ring, w.cost = ring, cost
}

// release drops everything up to s and says whether that was anything.
func (w *window) release(s holdfast.Seq) bool {
	if s < w.first {
		return false
	}
	for w.first <= s && w.first <= w.last {
		w.bytes -= w.cost[w.costAt(w.first)]
		w.released = w.at(w.first).charged
		*w.at(w.first) = entry{}
		w.first++
	}
	return true
}

// chargedTo returns how many chunks the entries up to s may map; for one that was
// released, those up to the last released.
func (w *window) chargedTo(s holdfast.Seq) int64 {
	switch {
	case s < w.first:
		return w.released
	case s > w.last:
		return w.charged
	}
	return w.at(s).charged
}

// overlap returns the highest seq above after whose range meets the given one,
// or 0.
func (w *window) overlap(after holdfast.Seq, offset, length int64) holdfast.Seq {
	for s := w.last; s > after && s >= w.first; s-- {
		e := w.at(s)
		if e.offset < offset+length && offset < e.offset+e.length {
			return s
		}
	}
	return 0
}
