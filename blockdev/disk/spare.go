package disk

import (
	"slices"
	"time"
)

// A large write over what was there takes a fresh chunk, and the old one is free with a
// checkpoint. Its space given back just then would be taken again a moment later, and
// both cost more than the write itself. So of the chunks that a checkpoint frees an
// image keeps the space of as many as large writes lately took between two: spares.
// They are as free as others that have space, and go back when large writes become
// fewer, when they have stopped for a moment, and at once when the host's space must
// be spared. A device has all its space, and only hears what is not needed.
type spares struct {
	chunks []uint32 // each of them was a spare; those that are still free are
	taken  int64    // chunks that large writes took, ever
	mark   int64    // what it was at the last checkpoint
	before int64    // how many it became more between the two before
}

// sparesIdle is how long large writes must have stopped until spares go back.
const sparesIdle = 2 * time.Second

// sparesAtOnce is how many go back before others can take space.
const sparesAtOnce = 256

// sparesWanted ends the time between two checkpoints, and returns how many spares there
// should be.
func (d *Disk) sparesWanted() int64 {
	d.growing.Lock()
	low := d.hostFull || d.mayGrow(true) != nil
	d.growing.Unlock()
	a := d.alloc
	a.mu.Lock()
	defer a.mu.Unlock()
	s := &a.spares
	now := s.taken - s.mark
	want := max(now, s.before)
	s.mark, s.before = s.taken, now
	a.stillSpare()
	if low || a.backed == nil {
		return 0
	}
	return want
}

// stillSpare forgets the spares that somebody took, and returns the others. Under mu.
func (a *allocator) stillSpare() []uint32 {
	left := a.spares.chunks[:0]
	for _, c := range a.spares.chunks {
		if a.backed != nil && ^a.used[c/64]&a.backed[c/64]&(1<<(c%64)) != 0 {
			left = append(left, c)
		}
	}
	a.spares.chunks = left
	return left
}

// split returns which of the chunks about to be freed go back, and which become spares
// so that there are as many as wanted.
func (a *allocator) split(chunks []uint32, want int64) (back, kept []uint32) {
	a.mu.Lock()
	defer a.mu.Unlock()
	slices.Sort(chunks) // in runs
	n := min(max(0, want-int64(len(a.spares.chunks))), int64(len(chunks)))
	return chunks[n:], chunks[:n:n]
}

// addSpares makes chunks spares, now that they are free.
func (a *allocator) addSpares(chunks []uint32) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.spares.chunks = append(a.spares.chunks, chunks...)
}

// dropSpares gives the space of all spares back but so many.
func (d *Disk) dropSpares(keep int64) {
	for d.failed() == nil {
		d.growing.Lock()
		some := d.alloc.bareSpares(keep)
		for _, c := range d.punch(some) {
			d.alloc.back(int64(c), 1)
		}
		d.growing.Unlock()
		if len(some) == 0 {
			return
		}
	}
}

// bareSpares takes some of the spares above so many, which count as without space from
// now on. Nothing that was promised is left without. The caller holds growing, so that
// nobody gives them space anew before they have lost it.
func (a *allocator) bareSpares(keep int64) []uint32 {
	a.mu.Lock()
	defer a.mu.Unlock()
	all := a.stillSpare()
	n := min(int64(len(all))-keep, a.ready-a.reserved-a.kept(), sparesAtOnce)
	if n <= 0 {
		return nil
	}
	some := all[int64(len(all))-n:]
	for _, c := range some {
		a.backed[c/64] &^= 1 << (c % 64)
		a.ready--
	}
	a.spares.chunks = all[:int64(len(all))-n]
	return slices.Clone(some)
}

// sparesWatch says when large writes have stopped.
type sparesWatch struct {
	taken int64
	since time.Time
}

// idle returns whether there are spares, and no large write took any for long enough.
func (w *sparesWatch) idle(a *allocator, now time.Time) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := &a.spares
	if s.taken != w.taken || len(s.chunks) == 0 {
		w.taken, w.since = s.taken, now
		return false
	}
	return now.Sub(w.since) >= sparesIdle
}
