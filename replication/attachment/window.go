package attachment

import (
	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/replication/wire"
)

// windowEntry is one sequenced mutation with its payload.
type windowEntry struct {
	entry  wire.Entry
	buffer *wire.Buffer // nil without payload
	cost   int64        // taken from the node's memory
}

// window is the replay window: a ring of what may have to be sent again. The
// core says when an entry enters and when it leaves.
type window struct {
	ring  []windowEntry
	first holdfast.Seq // of the oldest; meaningless while n is 0
	n     int
	bytes int64
}

// push adds the entry behind the last one.
func (w *window) push(e windowEntry) {
	if w.n == len(w.ring) {
		ring := make([]windowEntry, max(64, 2*len(w.ring)))
		for i := range w.n {
			seq := w.first + holdfast.Seq(i)
			ring[int(seq)&(len(ring)-1)] = w.ring[int(seq)&(len(w.ring)-1)]
		}
		w.ring = ring
	}
	if w.n == 0 {
		w.first = e.entry.Seq
	}
	w.ring[int(e.entry.Seq)&(len(w.ring)-1)] = e
	w.n++
	w.bytes += e.cost
}

// at returns the entry of a seq, or nil.
func (w *window) at(seq holdfast.Seq) *windowEntry {
	if w.n == 0 || seq < w.first || seq >= w.first+holdfast.Seq(w.n) {
		return nil
	}
	return &w.ring[int(seq)&(len(w.ring)-1)]
}

// last returns the seq of the newest entry; zero without one.
func (w *window) last() holdfast.Seq {
	if w.n == 0 {
		return 0
	}
	return w.first + holdfast.Seq(w.n) - 1
}

// release drops the entries up to a seq and returns what they cost.
func (w *window) release(upTo holdfast.Seq) (cost int64) {
	for w.n > 0 && w.first <= upTo {
		e := &w.ring[int(w.first)&(len(w.ring)-1)]
		cost += e.cost
		e.buffer.Release()
		*e = windowEntry{}
		w.first++
		w.n--
	}
	w.bytes -= cost
	return cost
}
