package disk

import (
	"cmp"
	"encoding/binary"
	"hash/crc32"
	"math/bits"
	"slices"
	"sync/atomic"

	"github.com/holdfast-storage/holdfast"
)

// The map of one replica is a tree of 4 KiB pages, written copy-on-write: a
// leaf holds the entries of 39 consecutive chunks, an interior page refers to
// 126 pages of the level below, and whoever refers to a page holds its crc.
// Pages without content do not exist, so an empty replica has no page at all.
// There is at least one interior level.
//
// Interior pages are in memory, leaves only as they are needed (cache.go): what
// must be known of every chunk at any time, whether it has a place and where
// poison is, stands in the page above the leaf.
//
// A page, little-endian:
//
//	 0  4  magic "HFMP"
//	 4  4  crc32c, seeded with the disk id, of bytes 8 to 4096
//	 8 16  replica
//	24  4  level: 0 leaf, 1.. interior, 0xfffe space, 0xffff directory
//	28  4  bytes used after the head (directory), else zero
//	32  8  index of the page in its level
//	40     content
//
// Leaf entry, 104 bytes:
//
//	 0  4  phys: the chunk on the disk
//	 4  4  born: snapshot generation (0 in version 1)
//	 8  8  lastSeq: last applied entry that touched the chunk
//	16  8  asOf: entries up to this one are in an installed chunk and are not
//	       applied to it again; 0 for a chunk that was never installed
//	24 64  crc32c[16]
//	88  8  state[16], 4 bits each, block 0 in the low bits
//	96  1  type: 0 absent, 1 mapped, 2 all zero (unmapped, but with a lastSeq)
//	97  7  zero
//
// Interior entry, 32 bytes; those from 12 on are zero above level 1:
//
//	 0  8  page number (-1: none)
//	 8  4  crc
//	12  4  blocks of the leaf that are poison
//	16  8  highest lastSeq in the leaf
//	24  8  chunks of the leaf that are mapped: one bit each, the first in bit 0
//
// A leaf of which no page is there but a lastSeq is zero: all its chunks are, and that
// entry was the last to touch any of them.
const (
	pageSize      = 4096
	pageHead      = 40
	leafEntry     = 104
	leafEntries   = (pageSize - pageHead) / leafEntry // 39
	nodeEntry     = 32
	nodeEntries   = (pageSize - pageHead) / nodeEntry // 126
	pageMagic     = 0x504d4648                        // "HFMP"
	levelDir      = 0xffff
	maxTreeHeight = 8
	// maxSegment keeps every index far from overflow: 256 TiB.
	maxSegment = 256 << 40
)

// The types of leaf entries.
const (
	chunkAbsent = 0
	chunkMapped = 1
	chunkZero   = 2
)

// chunkEntry is a leaf entry in memory.
type chunkEntry struct {
	lastSeq holdfast.Seq
	asOf    holdfast.Seq
	phys    uint32
	born    uint32
	crc     [blocksPerChunk]uint32
	states  uint64
	typ     uint8
}

func (e *chunkEntry) state(i int64) BlockState { return BlockState(e.states >> (4 * i) & 15) }

func (e *chunkEntry) setState(i int64, s BlockState) {
	e.states = e.states&^(15<<(4*i)) | uint64(s)<<(4*i)
}

// poisoned counts the blocks that are poison.
func (e *chunkEntry) poisoned() int64 {
	const second = 0x2222222222222222 // of the bits of each state, BlockPoison's
	return int64(bits.OnesCount64(e.states & second))
}

// pageRef is how a page is referred to.
type pageRef struct {
	page int64 // -1: none
	crc  uint32
	gen  uint32 // in memory: of the checkpoint that it is written for; see Disk.mapGen
}

var noPage = pageRef{page: -1}

// leaf is one page of entries in memory.
type leaf struct {
	owner   *Replica
	index   int64
	entries [leafEntries]chunkEntry
	dirty   atomic.Bool // it differs from its page; changed under owner.mu
	used    atomic.Bool // since the cache last looked at it
	cached  bool        // guarded by the cache
}

// childRef is what an interior page says of a page below it.
type childRef struct {
	pageRef
	poison  uint32 // of level 1 alone, like the rest
	lastSeq holdfast.Seq
	mapped  uint64
}

type node struct {
	refs  [nodeEntries]childRef
	dirty bool
}

// tree is the map of one replica: its interior pages, and those leaves that are
// in memory. It is read under the replica's mu; it is changed under mu by who
// holds gate too, so that a checkpoint, which holds gate alone, may read all but
// leaves without mu.
type tree struct {
	replica holdfast.ReplicaID
	leaves  map[int64]*leaf
	levels  []map[int64]*node // levels[0] refers to leaves
	root    pageRef
	chunks  int64 // of the segment
	mapped  int64 // of them, those of type chunkMapped
	poison  int64 // blocks that are poison
}

func newTree(id holdfast.ReplicaID, size int64) *tree {
	t := &tree{replica: id, leaves: map[int64]*leaf{}, root: noPage, chunks: (size + chunkSize - 1) / chunkSize}
	pages := (t.chunks + leafEntries - 1) / leafEntries
	for {
		t.levels = append(t.levels, map[int64]*node{})
		if pages = (pages + nodeEntries - 1) / nodeEntries; pages <= 1 {
			return t
		}
	}
}

// child returns what is known of a leaf, nil if there never was one.
func (t *tree) child(index int64) *childRef {
	if n := t.levels[0][index/nodeEntries]; n != nil {
		return &n.refs[index%nodeEntries]
	}
	return nil
}

// ref returns where a page was last written.
func (t *tree) ref(p pageKey) pageRef {
	if p.level == len(t.levels) {
		return t.root
	}
	if n := t.levels[p.level][p.index/nodeEntries]; n != nil {
		return n.refs[p.index%nodeEntries].pageRef
	}
	return noPage
}

// isMapped says whether a chunk has a place, without its leaf.
func (t *tree) isMapped(chunk int64) bool {
	c := t.child(chunk / leafEntries)
	return c != nil && c.mapped&(1<<(chunk%leafEntries)) != 0
}

// get returns a chunk's entry; of a chunk never written, the zero entry. It is
// false if the leaf must be read first; see Replica.leaf.
func (t *tree) get(chunk int64) (e chunkEntry, ok bool) {
	i := chunk / leafEntries
	if l := t.leaves[i]; l != nil {
		l.touch()
		return l.entries[chunk%leafEntries], true
	}
	c := t.child(i)
	switch {
	case c == nil:
		return chunkEntry{}, true
	case c.page >= 0:
		return chunkEntry{}, false
	case c.lastSeq > 0:
		e = chunkEntry{typ: chunkZero, lastSeq: c.lastSeq}
	}
	return e, true
}

// isZero says whether a leaf has no page since all its chunks read as zeroes.
func (t *tree) isZero(index int64) bool {
	c := t.child(index)
	return c != nil && c.page < 0 && c.lastSeq > 0 && t.leaves[index] == nil
}

// newLeaf returns a leaf that has no page.
func (t *tree) newLeaf(owner *Replica, index int64) *leaf {
	l := &leaf{owner: owner, index: index}
	if t.isZero(index) {
		for i := range min(leafEntries, t.chunks-index*leafEntries) {
			l.entries[i] = chunkEntry{typ: chunkZero, lastSeq: t.child(index).lastSeq}
		}
	}
	return l
}

// zeroAgain notes in the page above it that an entry zeroed chunks of a leaf that is
// zero: it needs no page for that. False if it is not such a leaf.
func (t *tree) zeroAgain(index int64, seq holdfast.Seq) bool {
	if !t.isZero(index) {
		return false
	}
	c := t.child(index)
	c.lastSeq = max(c.lastSeq, seq)
	t.levels[0][index/nodeEntries].dirty = true
	return true
}

// shed moves a leaf that is not in memory to another map, unread. What is left is a
// leaf that is zero as of the entry.
func (t *tree) shed(index int64, seq holdfast.Seq, to *tree) {
	c := t.child(index)
	to.refer(pageKey{0, index}, c.pageRef)
	*to.child(index) = *c
	n := int64(bits.OnesCount64(c.mapped))
	t.mapped, to.mapped = t.mapped-n, to.mapped+n
	t.poison, to.poison = t.poison-int64(c.poison), to.poison+int64(c.poison)
	*c = childRef{pageRef: noPage, lastSeq: max(c.lastSeq, seq)}
	t.levels[0][index/nodeEntries].dirty = true
}

// set replaces a chunk's entry in its leaf, which Replica.leaf returned.
func (t *tree) set(l *leaf, chunk int64, e chunkEntry) {
	if t.leaves[l.index] != l { // it is new, or was dropped meanwhile, unchanged
		t.leaves[l.index] = l
		l.owner.d.cache.add(l)
	}
	n := t.levels[0][l.index/nodeEntries]
	if n == nil {
		n = newNode()
		t.levels[0][l.index/nodeEntries] = n
	}
	c := &n.refs[l.index%nodeEntries]
	bit := uint64(1) << (chunk % leafEntries)
	old := &l.entries[chunk%leafEntries]
	if old.typ == chunkMapped {
		t.mapped--
		c.mapped &^= bit
	}
	if e.typ == chunkMapped {
		t.mapped++
		c.mapped |= bit
	}
	l.owner.d.space.move(old, &e)
	change := e.poisoned() - old.poisoned()
	t.poison += change
	c.poison = uint32(int64(c.poison) + change)
	c.lastSeq = max(c.lastSeq, e.lastSeq)
	*old = e
	if l.dirty.CompareAndSwap(false, true) {
		l.owner.d.cache.dirty.Add(1)
	}
}

// path calls f for each page, by level and index, that the map needs for a chunk.
func (t *tree) path(chunk int64, f func(p pageKey)) {
	i := chunk / leafEntries
	f(pageKey{0, i})
	for level := range t.levels {
		i /= nodeEntries
		f(pageKey{level + 1, i})
	}
}

// pageKey names a page of a replica's map.
type pageKey struct {
	level int
	index int64
}

// exists returns the indexes of the leaves within [lo, hi) that there are, in
// memory, written or zero, and that an entry above seq may have touched (0: all),
// ascending, at most max.
func (t *tree) exists(seq holdfast.Seq, lo, hi int64, max int) []int64 {
	var found []int64
	for i := lo / nodeEntries; i*nodeEntries < hi; i++ {
		n := t.levels[0][i]
		if n == nil {
			continue
		}
		for k := range n.refs {
			index := i*nodeEntries + int64(k)
			if index < lo || index >= hi || n.refs[k].page < 0 && n.refs[k].lastSeq == 0 && t.leaves[index] == nil {
				continue
			}
			if seq != 0 && n.refs[k].lastSeq <= seq {
				continue
			}
			if found = append(found, index); len(found) == max {
				return found
			}
		}
	}
	return found
}

func encodePageHead(b []byte, id holdfast.ReplicaID, level uint32, index int64, used int, seed uint32) uint32 {
	le := binary.LittleEndian
	le.PutUint32(b, pageMagic)
	copy(b[8:24], id[:])
	le.PutUint32(b[24:], level)
	le.PutUint32(b[28:], uint32(used))
	le.PutUint64(b[32:], uint64(index))
	crc := crc32.Update(seed, castagnoli, b[8:pageSize])
	le.PutUint32(b[4:], crc)
	return crc
}

// checkPage reports whether b is the page that its referrer means.
func checkPage(b []byte, id holdfast.ReplicaID, level uint32, index int64, crc, seed uint32) bool {
	le := binary.LittleEndian
	return len(b) == pageSize && le.Uint32(b) == pageMagic && le.Uint32(b[4:]) == crc &&
		crc32.Update(seed, castagnoli, b[8:]) == crc && holdfast.ReplicaID(b[8:24]) == id &&
		le.Uint32(b[24:]) == level && int64(le.Uint64(b[32:])) == index
}

func (l *leaf) encode(b []byte) {
	le := binary.LittleEndian
	for i := range l.entries {
		e, p := &l.entries[i], b[pageHead+i*leafEntry:]
		le.PutUint32(p, e.phys)
		le.PutUint32(p[4:], e.born)
		le.PutUint64(p[8:], uint64(e.lastSeq))
		le.PutUint64(p[16:], uint64(e.asOf))
		for k, c := range e.crc {
			le.PutUint32(p[24+4*k:], c)
		}
		le.PutUint64(p[88:], e.states)
		p[96] = e.typ
	}
}

func (l *leaf) decode(b []byte, chunks int64) bool {
	le := binary.LittleEndian
	for i := range l.entries {
		e, p := &l.entries[i], b[pageHead+i*leafEntry:]
		e.phys, e.born = le.Uint32(p), le.Uint32(p[4:])
		e.lastSeq, e.asOf = holdfast.Seq(le.Uint64(p[8:])), holdfast.Seq(le.Uint64(p[16:]))
		for k := range e.crc {
			e.crc[k] = le.Uint32(p[24+4*k:])
		}
		e.states, e.typ = le.Uint64(p[88:]), p[96]
		var s [blocksPerChunk]BlockState
		if e.typ > chunkZero || !unpackStates(e.states, &s) || e.typ == chunkMapped && int64(e.phys) >= chunks {
			return false
		}
	}
	return true
}

func (n *node) encode(b []byte) {
	le := binary.LittleEndian
	for i := range n.refs {
		c, p := &n.refs[i], b[pageHead+i*nodeEntry:]
		le.PutUint64(p, uint64(c.page))
		le.PutUint32(p[8:], c.crc)
		le.PutUint32(p[12:], c.poison)
		le.PutUint64(p[16:], uint64(c.lastSeq))
		le.PutUint64(p[24:], c.mapped)
	}
}

func (n *node) decode(b []byte) bool {
	le := binary.LittleEndian
	for i := range n.refs {
		c, p := &n.refs[i], b[pageHead+i*nodeEntry:]
		c.pageRef = pageRef{page: int64(le.Uint64(p)), crc: le.Uint32(p[8:])}
		c.poison, c.lastSeq, c.mapped = le.Uint32(p[12:]), holdfast.Seq(le.Uint64(p[16:])), le.Uint64(p[24:])
		if c.mapped>>leafEntries != 0 || c.poison > leafEntries*blocksPerChunk || c.page < 0 && (c.mapped != 0 || c.poison != 0) {
			return false
		}
	}
	return true
}

func newNode() *node {
	n := &node{}
	for i := range n.refs {
		n.refs[i].pageRef = noPage
	}
	return n
}

// write places a page of the map and returns its reference. A page that was
// placed since the last checkpoint is known to none, and is written where it is.
func (t *tree) write(w *pageWriter, p pageKey, b []byte) (pageRef, error) {
	d, old := w.d, t.ref(p)
	crc := encodePageHead(b, t.replica, uint32(p.level), p.index, 0, d.seed)
	if old.page >= 0 && (old.gen == d.mapGen || mutant == "page_rewritten") {
		return pageRef{old.page, crc, d.mapGen}, w.again(old.page, b)
	}
	page, err := w.put(b)
	if err != nil {
		return noPage, err
	}
	if old.page >= 0 {
		w.drop(old.page)
	}
	return pageRef{page, crc, d.mapGen}, nil
}

// refer notes where a page is written now.
func (t *tree) refer(p pageKey, ref pageRef) {
	if p.level == len(t.levels) {
		t.root = ref
		return
	}
	n := t.levels[p.level][p.index/nodeEntries]
	if n == nil {
		n = newNode()
		t.levels[p.level][p.index/nodeEntries] = n
	}
	n.refs[p.index%nodeEntries].pageRef = ref
	n.dirty = true
}

// saveLeaves writes changed leaves to new places and returns them: once they are
// flushed they are clean; see cleaned. The caller holds gate, and applying or
// gate alone.
func (r *Replica) saveLeaves(w *pageWriter) ([]*leaf, error) {
	r.mu.RLock()
	var dirty []*leaf
	for _, l := range r.tree.leaves {
		if l.dirty.Load() {
			dirty = append(dirty, l)
		}
	}
	r.mu.RUnlock()
	slices.SortFunc(dirty, func(a, b *leaf) int { return cmp.Compare(a.index, b.index) })
	for i, l := range dirty {
		b := w.buffer()
		l.encode(b)
		ref, err := r.tree.write(w, pageKey{0, l.index}, b)
		if err != nil {
			return dirty[:i], err
		}
		r.mu.Lock()
		r.tree.refer(pageKey{0, l.index}, ref)
		r.mu.Unlock()
	}
	return dirty, nil
}

// cleaned notes that leaves are as their pages are.
func (r *Replica) cleaned(leaves []*leaf) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, l := range leaves {
		l.dirty.Store(false)
	}
	r.d.cache.dirty.Add(-int64(len(leaves)))
}

// saveNodes writes the changed interior pages, children before parents. Nothing
// that the last checkpoint refers to is touched. The caller holds gate alone.
func (r *Replica) saveNodes(w *pageWriter) error {
	t := r.tree
	for level, nodes := range t.levels {
		var dirty []int64
		for i, n := range nodes {
			if n.dirty {
				dirty = append(dirty, i)
			}
		}
		slices.Sort(dirty)
		for _, i := range dirty {
			b := w.buffer()
			nodes[i].encode(b)
			p := pageKey{level + 1, i}
			ref, err := t.write(w, p, b)
			if err != nil {
				return err
			}
			r.mu.Lock()
			nodes[i].dirty = false
			t.refer(p, ref)
			r.mu.Unlock()
		}
	}
	return nil
}

// load reads the interior pages below root. use is told of every page, leaves
// too, and reports whether it was free until now.
func (t *tree) load(d *Disk, root pageRef, use func(page int64) bool) error {
	t.root = root
	if root.page < 0 {
		return nil
	}
	return t.loadNode(d, root, pageKey{len(t.levels), 0}, use)
}

func (t *tree) loadNode(d *Disk, ref pageRef, p pageKey, use func(int64) bool) error {
	if !use(ref.page) {
		return holdfast.Errorf(holdfast.ErrIntegrity, "map page %d is used twice", ref.page)
	}
	if p.level == 0 {
		return nil
	}
	b, err := d.readPage(ref.page, true)
	if err != nil {
		return err
	}
	n := &node{}
	if !checkPage(b, t.replica, uint32(p.level), p.index, ref.crc, d.seed) || !n.decode(b) {
		return holdfast.Errorf(holdfast.ErrIntegrity, "map page %d does not match its parent's checksum", ref.page)
	}
	t.levels[p.level-1][p.index] = n
	for i := range n.refs {
		c := &n.refs[i]
		t.mapped += int64(bits.OnesCount64(c.mapped))
		t.poison += int64(c.poison)
		if c.page < 0 {
			continue
		}
		if err := t.loadNode(d, c.pageRef, pageKey{p.level - 1, p.index*nodeEntries + int64(i)}, use); err != nil {
			return err
		}
	}
	return nil
}

// drop takes a leaf out of a released map, with the interior pages that have nothing
// below them any more, and tells free of their pages.
func (t *tree) drop(index int64, free func(page int64)) {
	delete(t.leaves, index)
	for p := (pageKey{0, index}); ; p = (pageKey{p.level + 1, p.index / nodeEntries}) {
		if ref := t.ref(p); ref.page >= 0 {
			free(ref.page)
		}
		if p.level == len(t.levels) {
			t.root = noPage
			return
		}
		n := t.levels[p.level][p.index/nodeEntries]
		if n == nil {
			return // the page was never written
		}
		c := &n.refs[p.index%nodeEntries]
		t.mapped -= int64(bits.OnesCount64(c.mapped))
		t.poison -= int64(c.poison)
		*c, n.dirty = childRef{pageRef: noPage}, true
		if !t.isEmpty(pageKey{p.level + 1, p.index / nodeEntries}) {
			return
		}
		delete(t.levels[p.level], p.index/nodeEntries)
	}
}

// isEmpty says whether an interior page has nothing below it, written or not.
func (t *tree) isEmpty(p pageKey) bool {
	n := t.levels[p.level-1][p.index]
	for i := nodeEntries - 1; i >= 0; i-- { // leaves are dropped from the first on
		below := p.index*nodeEntries + int64(i)
		if n.refs[i].page >= 0 || p.level == 1 && t.leaves[below] != nil || p.level > 1 && t.levels[p.level-2][below] != nil {
			return false
		}
	}
	return true
}
