package disk

import (
	"math"
	"slices"
	"time"

	"github.com/holdfast-storage/holdfast"
)

// The map of a replica that is deleted, or begins anew, says which chunks are free
// now; and only its leaves do, of which there are 266,000 in a tebibyte. Nobody may
// wait until they are read. So the map is taken away as a whole and stays part of the
// disk as a released map: every checkpoint writes what is left of it, beside the maps
// of replicas, and after a crash the work goes on where the last checkpoint has it. A
// leaf is read while no lock is held but releasing; then, behind the gate, its chunks
// and its page wait for the next checkpoint, and the map does not refer to it any more.
// So a checkpoint has all of this or nothing, and no chunk is free and mapped.
//
// A long trim or zero works in the same way. A leaf that it covers, and that is not in
// memory, is moved to a released map unread; the page above says that it is zero, and
// as of which entry. So it is applied at once, and does not keep the log.
//
// A released map is a Replica that is deleted: it has a map, and nothing else.

const (
	// releaseAtOnce leaves, 600 MiB of data, are given back before DeleteReplica or
	// Rebase returns, or by a writer that finds the disk full: some seconds at most.
	releaseAtOnce = 256
	// releaseBatch leaves, 1 GiB of data, are given back before a checkpoint lets their
	// chunks be used again. It bounds what a checkpoint has to punch.
	releaseBatch = 420
	// shedLeast leaves, 150 MiB of data, are rather read by who trims them.
	shedLeast = 64
	// maxReleased bounds the released maps that trims make.
	maxReleased = 1024
)

// release gives the chunks and pages of a map back that is no replica's any more: of
// leaves in memory now, of the others in the background. The caller holds gate and
// applying, or recovers; no mu may be held.
func (r *Replica) release(t *tree) {
	d := r.d
	left := newReplica(d, r.desc)
	left.tree, left.deleted, left.uncounted = t, true, r.uncounted
	for _, index := range t.exists(0, 0, r.leafCount(), math.MaxInt) {
		if l := t.leaves[index]; l != nil || t.isZero(index) {
			left.free(index, l)
		}
	}
	if len(t.levels[0]) == 0 {
		left.tellLost()
		return
	}
	d.addReleased(left)
}

// shed moves the leaves that a long trim or zero covers wholly to a released map, those
// that are not in memory and that no logged write counts on, and returns the others that
// there are in its range. The caller holds gate and applying.
func (r *Replica) shed(e *logEntry) (rest []int64) {
	d, end := r.d, e.off+e.length
	const leafSize = leafEntries * chunkSize
	lo, hi := (e.off+leafSize-1)/leafSize, end/leafSize
	if end == r.desc.Size {
		hi = r.leafCount()
	}
	least := shedLeast
	if d.opts.releaseLeaves < 0 {
		least = 0
	}
	left := newReplica(d, r.desc)
	left.deleted, left.of = true, r
	tooMany := len(d.releasedMaps()) >= maxReleased
	r.mu.Lock()
	pending, unread := r.pendingLeaves(e.seq), 0
	all := r.tree.exists(0, e.off/leafSize, (end-1)/leafSize+1, math.MaxInt)
	whole := func(index int64) bool {
		return index >= lo && index < hi && r.tree.leaves[index] == nil && !pending[index]
	}
	for _, index := range all {
		if whole(index) && !r.tree.isZero(index) {
			unread++
		}
	}
	for _, index := range all {
		switch {
		case !whole(index):
			rest = append(rest, index)
		case r.tree.zeroAgain(index, e.seq):
		case unread <= least || tooMany:
			rest = append(rest, index)
		default:
			r.tree.shed(index, e.seq, left.tree)
		}
	}
	if len(left.tree.levels[0]) > 0 {
		gone := func(chunk int64) bool { return r.tree.isZero(chunk / leafEntries) }
		for c := range r.flips {
			if gone(c) {
				r.leftFlip(c, &chunkEntry{typ: chunkZero})
			}
		}
		r.bad.forget(gone)
	}
	r.mu.Unlock()
	if len(left.tree.levels[0]) > 0 {
		d.addReleased(left)
	}
	return rest
}

// pendingLeaves returns the leaves of chunks that logged writes above seq, or such as
// are being logged, count on being mapped. Under mu.
func (r *Replica) pendingLeaves(seq holdfast.Seq) map[int64]bool {
	pending := map[int64]bool{}
	for c := range r.index.chunks {
		if !pending[c/leafEntries] && r.index.writtenAbove(c, seq) {
			pending[c/leafEntries] = true
		}
	}
	for i := range r.inflight {
		if e := &r.inflight[i]; e.Type == OpWrite {
			for c := e.Offset / chunkSize; c <= (e.Offset+e.Length-1)/chunkSize; c++ {
				pending[c/leafEntries] = true
			}
		}
	}
	return pending
}

// addReleased makes a map part of the disk. Those of its interior pages that have no
// place yet are counted as needed. The caller holds gate, or recovers.
func (d *Disk) addReleased(left *Replica) {
	t := left.tree
	for i := range t.levels[0] {
		for level := range t.levels {
			p := pageKey{level + 1, i}
			if _, ok := left.newPages[p]; !ok && t.ref(p).page < 0 {
				left.newPages[p] = struct{}{}
			}
			i /= nodeEntries
		}
	}
	d.alloc.needs(int64(len(left.newPages)))
	d.mu.Lock()
	defer d.mu.Unlock()
	d.released = append(d.released, left)
}

// releasedMaps returns the maps that are being released.
func (d *Disk) releasedMaps() []*Replica {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return slices.Clone(d.released)
}

// free gives back what a leaf of a released map refers to, and its page. Chunks of one
// that cannot be read, nil, stay taken until the disk is opened the next time, when all
// others are asked. The caller holds gate, or recovers.
func (r *Replica) free(index int64, l *leaf) {
	d := r.d
	if l != nil && r.of != nil {
		r.of.mu.Lock()
		for i := range l.entries {
			if e := &l.entries[i]; e.typ == chunkMapped {
				r.of.unkeep(e.phys)
			}
		}
		r.of.mu.Unlock()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	_, not := r.uncounted[index] // its chunks may be others' by now
	if not || l == nil && r.tree.ref(pageKey{0, index}).page >= 0 {
		r.lostLeaves++
		d.space.stale.Store(true)
	}
	if l != nil && l.dirty.CompareAndSwap(true, false) {
		d.cache.dirty.Add(-1)
	}
	for i := 0; l != nil && !not && i < len(l.entries); i++ {
		if e := &l.entries[i]; e.typ == chunkMapped {
			d.space.move(e, &chunkEntry{})
			d.alloc.later(e.phys)
		}
	}
	r.tree.drop(index, d.alloc.laterPage)
}

// tellLost logs that leaves could not be read.
func (r *Replica) tellLost() {
	if r.lostLeaves > 0 {
		r.d.log.Error("chunks of a map stay taken until the disk is opened again: its pages are unreadable",
			"replica", r.desc.Replica.String(), "pages", r.lostLeaves)
	}
}

// releaseLeaf gives the next leaf of the first released map back, and reports whether
// there was one. The caller holds releasing.
func (d *Disk) releaseLeaf() bool {
	d.mu.RLock()
	var r *Replica
	if len(d.released) > 0 {
		r = d.released[0]
	}
	d.mu.RUnlock()
	if r == nil || d.readOnly != nil || d.failed() != nil {
		return false
	}
	r.mu.RLock()
	some := r.tree.exists(0, r.nextLeaf, r.leafCount(), 1)
	var l *leaf
	var ref pageRef
	if len(some) > 0 {
		l, ref = r.tree.leaves[some[0]], r.tree.ref(pageKey{0, some[0]})
	}
	r.mu.RUnlock()
	if len(some) == 0 {
		d.gate.RLock() // no checkpoint counts its pages now
		defer d.gate.RUnlock()
		r.tellLost()
		d.mu.Lock()
		d.released[0] = nil // else the array keeps it
		d.released = d.released[1:]
		d.mu.Unlock()
		d.alloc.needs(-int64(len(r.newPages)))
		return true
	}
	index := some[0]
	if l == nil && ref.page >= 0 {
		var err error
		if l, err = r.readLeaf(index, ref); err != nil && d.failed() != nil {
			return false
		}
	}
	d.gate.RLock()
	defer d.gate.RUnlock()
	r.free(index, l)
	r.nextLeaf = index + 1
	return true
}

// leafCount is how many leaves a replica of its size can have.
func (r *Replica) leafCount() int64 { return (r.desc.Size-1)/chunkSize/leafEntries + 1 }

// releaseSome gives up to n leaves back. The caller holds releasing.
func (d *Disk) releaseSome(n int) {
	for range n {
		if !d.releaseLeaf() {
			return
		}
	}
}

// releaseSoon gives back at once what is little, unless another is at it, and leaves the
// rest to the background. The caller holds no lock.
func (d *Disk) releaseSoon() {
	n := d.opts.releaseLeaves
	if n == 0 {
		n = releaseAtOnce
	}
	if d.releasing.TryLock() {
		d.releaseSome(max(0, n))
		d.releasing.Unlock()
	}
	d.wakeReleaser()
}

func (d *Disk) wakeReleaser() {
	if len(d.releasedMaps()) > 0 {
		select {
		case d.shed <- struct{}{}:
		default: // it is awake already
		}
	}
}

// releaser gives released maps back until Close.
func (d *Disk) releaser() {
	for {
		select {
		case <-d.stop:
			return
		case <-d.shed:
		}
		for d.releaseMore() {
		}
	}
}

// releaseMore gives some leaves back and writes a checkpoint, so that their chunks can
// be used, and reports whether it is worth going on. It rests for as long as each took,
// for others use the disk. In a log of which only the reserve is left it does nothing:
// that is for what makes room there.
func (d *Disk) releaseMore() bool {
	if _, tight := d.wal.oldest(); tight {
		return false
	}
	n := 0
	for rest := time.Duration(0); n < releaseBatch; n++ {
		select {
		case <-d.stop:
			return false
		case <-time.After(rest):
		}
		began := time.Now()
		d.releasing.Lock()
		more := d.releaseLeaf()
		d.releasing.Unlock()
		if !more {
			break
		}
		rest = time.Since(began)
	}
	if n == 0 {
		return false
	}
	if err := d.checkpoint(nil, true); err != nil {
		if d.failed() == nil {
			d.log.Warn("space of deleted replicas is not free yet", "disk", d.super.disk.String(), "error", err)
		}
		return false
	}
	return true
}

// squeeze makes chunks free for a writer that finds none. held is the replica whose
// order it holds, if any. It waits for a leaf that another reads: what that frees may be
// all that there is.
func (d *Disk) squeeze(held *Replica) error {
	d.releasing.Lock()
	d.releaseSome(releaseAtOnce)
	d.releasing.Unlock()
	if !d.awaits() {
		return nil // a checkpoint would only use the log up
	}
	return d.checkpoint(held, true)
}
