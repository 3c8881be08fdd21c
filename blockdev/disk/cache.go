package disk

import (
	"sync"
	"sync/atomic"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// leafBytes is what a leaf takes in memory, with its place in maps and ring.
const leafBytes = 4400

// minClean leaves stay beside those that cannot be dropped: a read that goes over the
// end of a leaf needs two at a time.
const minClean = 2

// mapCache bounds the leaves in memory, of all replicas of a disk: those that
// were not used for a while are dropped, and changed ones are written to new
// places as soon as they are half of what may be held (Replica.spill).
type mapCache struct {
	limit int
	dirty atomic.Int64 // leaves that differ from their pages

	mu   sync.Mutex
	ring []*leaf
	hand int
}

// touch notes that the leaf was used.
func (l *leaf) touch() {
	if !l.used.Load() {
		l.used.Store(true)
	}
}

// add takes a leaf that is in its tree.
func (c *mapCache) add(l *leaf) {
	c.mu.Lock()
	defer c.mu.Unlock()
	l.touch()
	if !l.cached {
		l.cached = true
		c.ring = append(c.ring, l)
	}
}

// trim drops leaves beyond the limit that were not used since the hand last
// passed them. No lock may be held.
func (c *mapCache) trim() {
	for {
		l := c.victim()
		if l == nil {
			return
		}
		r := l.owner
		r.mu.Lock()
		switch {
		case r.tree.leaves[l.index] != l: // dropped before, or of a map that is gone
		case l.dirty.Load():
			c.add(l)
		default:
			delete(r.tree.leaves, l.index)
		}
		r.mu.Unlock()
	}
}

// victim takes a leaf out of the ring, nil if none need be or all are in use.
func (c *mapCache) victim() *leaf {
	c.mu.Lock()
	defer c.mu.Unlock()
	for range 2 * len(c.ring) {
		if len(c.ring) <= max(c.limit, int(c.dirty.Load())+minClean) {
			return nil
		}
		c.hand %= len(c.ring)
		l := c.ring[c.hand]
		if l.dirty.Load() || l.used.Swap(false) {
			c.hand++
			continue
		}
		last := len(c.ring) - 1
		c.ring[c.hand], c.ring[last] = c.ring[last], nil
		c.ring = c.ring[:last]
		l.cached = false
		return l
	}
	return nil
}

// leaf returns a leaf, read if it is not in memory, a new one if there never
// was one. Only who holds applying and gate may change it, by tree.set. A page
// that cannot be read, or is not what the page above it says, damages the replica.
func (r *Replica) leaf(index int64) (*leaf, error) {
	key := pageKey{0, index}
	for {
		r.mu.RLock()
		l, ref := r.tree.leaves[index], r.tree.ref(key)
		if l == nil && ref.page < 0 {
			l = r.tree.newLeaf(r, index)
		}
		r.mu.RUnlock()
		if l != nil {
			l.touch()
			return l, nil
		}
		l, err := r.readLeaf(index, ref)
		r.mu.Lock()
		now := r.tree.leaves[index]
		moved := r.tree.ref(key) != ref // changed, written and dropped again while it was read
		if now == nil && !moved && err == nil {
			r.tree.leaves[index] = l
			now = l
		}
		if now == nil && !moved && r.d.failed() == nil && !r.deleted {
			r.damage("%w", err)
			err = r.damaged
		}
		r.mu.Unlock()
		switch {
		case now != nil:
			r.d.cache.add(now)
			r.d.cache.trim()
			return now, nil
		case !moved:
			return nil, err
		}
	}
}

// readLeaf reads a leaf of a page, from the medium if what the page cache has
// does not match.
func (r *Replica) readLeaf(index int64, ref pageRef) (*leaf, error) {
	var err error
	for _, direct := range [...]bool{r.d.opts.checking, true} {
		var b []byte
		if b, err = r.d.readPage(ref.page, direct); err != nil {
			continue
		}
		l := &leaf{owner: r, index: index}
		if checkPage(b, r.desc.Replica, 0, index, ref.crc, r.d.seed) && l.decode(b, r.d.alloc.chunks) {
			return l, nil
		}
		err = holdfast.Errorf(holdfast.ErrIntegrity, "map page %d does not match its parent's checksum", ref.page)
	}
	return nil, err
}

// readPage reads a page of a map, from the medium if need be.
func (d *Disk) readPage(page int64, direct bool) ([]byte, error) {
	b := vfs.AlignedBuffer(pageSize)
	read := d.main.ReadAt
	if direct {
		read = d.main.ReadDirectAt
	}
	if _, err := read(b, d.pageOffset(page)); err != nil {
		return nil, holdfast.Errorf(holdfast.ErrIO, "read map page %d: %w", page, err)
	}
	return b, nil
}

// lookupChunk returns a chunk's entry, which may be of a moment ago unless the
// caller holds applying.
func (r *Replica) lookupChunk(chunk int64) (chunkEntry, error) {
	l, err := r.leaf(chunk / leafEntries)
	if err != nil {
		return chunkEntry{}, err
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	return l.entries[chunk%leafEntries], nil
}

// eachLeaf calls f for the leaves of the chunks in [from, to) that an entry above
// seq may have touched (0: all), ascending, which it reads one by one.
func (r *Replica) eachLeaf(seq holdfast.Seq, from, to int64, f func(l *leaf) error) error {
	to = min(to, (r.desc.Size+chunkSize-1)/chunkSize)
	next, end := from/leafEntries, (to+leafEntries-1)/leafEntries
	for {
		r.mu.RLock()
		some := r.tree.exists(seq, next, end, 64)
		r.mu.RUnlock()
		for _, index := range some {
			l, err := r.leaf(index)
			if err == nil {
				err = f(l)
			}
			if err != nil {
				return err
			}
			next = index + 1
		}
		if len(some) == 0 {
			return nil
		}
	}
}

// spill writes changed leaves to new places once they fill half of the cache,
// so that they can be dropped. Their pages become part of the map with the next
// checkpoint. The caller holds gate and applying.
func (r *Replica) spill() error {
	c := r.d.cache
	if c.dirty.Load() <= int64(c.limit/2) {
		return nil
	}
	w := &pageWriter{d: r.d}
	saved, err := r.saveLeaves(w)
	if ferr := w.flush(); ferr != nil {
		return r.d.fail(ferr)
	}
	r.cleaned(saved)
	c.trim()
	if err != nil && holdfast.KindOf(err) != holdfast.ErrNoSpace {
		return r.d.fail(err)
	}
	if c.dirty.Load() > int64(c.limit/2) { // those of other replicas, or the host is full
		select {
		case r.d.kick <- struct{}{}:
		default:
		}
	}
	return nil
}

// full says whether changed leaves want a checkpoint.
func (c *mapCache) full() bool { return c.dirty.Load() > int64(c.limit/2) }
