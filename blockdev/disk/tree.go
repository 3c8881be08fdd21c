package disk

import (
	"encoding/binary"
	"hash/crc32"
	"math/bits"
	"sort"

	"github.com/holdfast-storage/holdfast"
)

// The map of one replica is a tree of 4 KiB pages, written copy-on-write: a
// leaf holds the entries of 39 consecutive chunks, an interior page refers to
// 253 pages of the level below, and whoever refers to a page holds its crc.
// Pages without content do not exist, so an empty replica has no page at all.
//
// A page, little-endian:
//
//	 0  4  magic "HFMP"
//	 4  4  crc32c, seeded with the disk id, of bytes 8 to 4096
//	 8 16  replica
//	24  4  level: 0 leaf, 1.. interior, 0xffff directory
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
// Interior entry, 16 bytes: page number (-1: none) u64, crc u32, zero u32.
const (
	pageSize      = 4096
	pageHead      = 40
	leafEntry     = 104
	leafEntries   = (pageSize - pageHead) / leafEntry // 39
	nodeEntry     = 16
	nodeEntries   = (pageSize - pageHead) / nodeEntry // 253
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
}

var noPage = pageRef{page: -1}

type leaf struct {
	entries [leafEntries]chunkEntry
	ref     pageRef // where its last checkpoint has it
	dirty   bool
}

type node struct {
	refs  [nodeEntries]pageRef
	ref   pageRef
	dirty bool
}

// tree is the map of one replica, wholly in memory.
type tree struct {
	replica holdfast.ReplicaID
	leaves  map[int64]*leaf
	levels  []map[int64]*node // levels[0] refers to leaves
	root    pageRef
	mapped  int64 // chunks of type chunkMapped
	poison  int64 // blocks that are poison
}

func newTree(id holdfast.ReplicaID, size int64) *tree {
	t := &tree{replica: id, leaves: map[int64]*leaf{}, root: noPage}
	pages := (size + chunkSize - 1) / chunkSize
	pages = (pages + leafEntries - 1) / leafEntries
	for pages > 1 {
		t.levels = append(t.levels, map[int64]*node{})
		pages = (pages + nodeEntries - 1) / nodeEntries
	}
	return t
}

// get returns a chunk's entry; of a chunk never written, the zero entry.
func (t *tree) get(chunk int64) chunkEntry {
	if l := t.leaves[chunk/leafEntries]; l != nil {
		return l.entries[chunk%leafEntries]
	}
	return chunkEntry{}
}

// set replaces a chunk's entry.
func (t *tree) set(chunk int64, e chunkEntry) {
	l := t.leaves[chunk/leafEntries]
	if l == nil {
		l = &leaf{ref: noPage}
		t.leaves[chunk/leafEntries] = l
	}
	old := &l.entries[chunk%leafEntries]
	if old.typ == chunkMapped {
		t.mapped--
	}
	if e.typ == chunkMapped {
		t.mapped++
	}
	t.poison += e.poisoned() - old.poisoned()
	*old = e
	l.dirty = true
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

// saved calls f for each page that the last checkpoint has.
func (t *tree) saved(f func(p pageKey)) {
	for i, l := range t.leaves {
		if l.ref.page >= 0 {
			f(pageKey{0, i})
		}
	}
	for level, nodes := range t.levels {
		for i, n := range nodes {
			if n.ref.page >= 0 {
				f(pageKey{level + 1, i})
			}
		}
	}
}

// pageKey names a page of a replica's map.
type pageKey struct {
	level int
	index int64
}

// each calls f for the existing entries of chunks in [from, to), in no order.
func (t *tree) each(from, to int64, f func(chunk int64, e *chunkEntry)) {
	visit := func(i int64, l *leaf) {
		for k := range l.entries {
			c := i*leafEntries + int64(k)
			if c >= from && c < to && l.entries[k].typ != chunkAbsent {
				f(c, &l.entries[k])
			}
		}
	}
	lo, hi := from/leafEntries, (to+leafEntries-1)/leafEntries
	if hi-lo > int64(len(t.leaves)) {
		for i, l := range t.leaves {
			if i >= lo && i < hi {
				visit(i, l)
			}
		}
		return
	}
	for i := lo; i < hi; i++ {
		if l := t.leaves[i]; l != nil {
			visit(i, l)
		}
	}
}

// list returns up to max existing entries above a chunk, ascending.
func (t *tree) list(after int64, max int) []ChunkRef {
	keys := make([]int64, 0, len(t.leaves))
	for i := range t.leaves {
		if (i+1)*leafEntries > after+1 {
			keys = append(keys, i)
		}
	}
	sort.Slice(keys, func(i, j int) bool { return keys[i] < keys[j] })
	var refs []ChunkRef
	for _, i := range keys {
		for k := range t.leaves[i].entries {
			c, e := i*leafEntries+int64(k), &t.leaves[i].entries[k]
			if c <= after || e.typ == chunkAbsent {
				continue
			}
			if len(refs) == max {
				return refs
			}
			refs = append(refs, ChunkRef{Index: c, LastSeq: e.lastSeq, Mapped: e.typ == chunkMapped})
		}
	}
	return refs
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
	for i, r := range n.refs {
		binary.LittleEndian.PutUint64(b[pageHead+i*nodeEntry:], uint64(r.page))
		binary.LittleEndian.PutUint32(b[pageHead+i*nodeEntry+8:], r.crc)
	}
}

func (n *node) decode(b []byte) {
	for i := range n.refs {
		n.refs[i] = pageRef{
			page: int64(binary.LittleEndian.Uint64(b[pageHead+i*nodeEntry:])),
			crc:  binary.LittleEndian.Uint32(b[pageHead+i*nodeEntry+8:]),
		}
	}
}

func newNode() *node {
	n := &node{ref: noPage}
	for i := range n.refs {
		n.refs[i] = noPage
	}
	return n
}

// pageStore takes the pages that a checkpoint writes.
type pageStore interface {
	// put places a page and returns its number; the bytes are written before
	// the checkpoint's sync.
	put(b []byte) (int64, error)
	// drop gives a page back once the checkpoint is durable.
	drop(page int64)
	// buffer returns a zero page to encode into; valid until put.
	buffer() []byte
}

// save writes the dirty pages to new places, children before parents, and
// returns the new root. Nothing that the last checkpoint refers to is touched.
func (t *tree) save(store pageStore, seed uint32) (pageRef, error) {
	put := func(old pageRef, b []byte, level int, index int64) (pageRef, error) {
		crc := encodePageHead(b, t.replica, uint32(level), index, 0, seed)
		if w, ok := store.(*pageWriter); ok && mutant == "page_rewritten" && old.page >= 0 {
			return pageRef{old.page, crc}, w.again(old.page, b)
		}
		page, err := store.put(b)
		if err != nil {
			return noPage, err
		}
		if old.page >= 0 {
			store.drop(old.page)
		}
		return pageRef{page, crc}, nil
	}
	up := func(level int, index int64, ref pageRef) {
		if level == len(t.levels) {
			t.root = ref
			return
		}
		n := t.levels[level][index/nodeEntries]
		if n == nil {
			n = newNode()
			t.levels[level][index/nodeEntries] = n
		}
		n.refs[index%nodeEntries] = ref
		n.dirty = true
	}
	for _, i := range dirtyKeys(t.leaves, func(l *leaf) bool { return l.dirty }) {
		l := t.leaves[i]
		b := store.buffer()
		l.encode(b)
		ref, err := put(l.ref, b, 0, i)
		if err != nil {
			return noPage, err
		}
		l.ref, l.dirty = ref, false
		up(0, i, ref)
	}
	for level, nodes := range t.levels {
		for _, i := range dirtyKeys(nodes, func(n *node) bool { return n.dirty }) {
			n := nodes[i]
			b := store.buffer()
			n.encode(b)
			ref, err := put(n.ref, b, level+1, i)
			if err != nil {
				return noPage, err
			}
			n.ref, n.dirty = ref, false
			up(level+1, i, ref)
		}
	}
	return t.root, nil
}

func dirtyKeys[V any](m map[int64]V, dirty func(V) bool) []int64 {
	var keys []int64
	for i, v := range m {
		if dirty(v) {
			keys = append(keys, i)
		}
	}
	sort.Slice(keys, func(i, j int) bool { return keys[i] < keys[j] })
	return keys
}

// load reads the tree below root. read returns a page's bytes; use is told of
// every page and mapped chunk and reports whether it was free until now.
func (t *tree) load(root pageRef, seed uint32, chunks int64, read func(page int64) ([]byte, error), usePage func(int64) bool, useChunk func(uint32) bool) error {
	t.root = root
	if root.page < 0 {
		return nil
	}
	return t.loadPage(root, len(t.levels), 0, seed, chunks, read, usePage, useChunk)
}

func (t *tree) loadPage(ref pageRef, level int, index int64, seed uint32, chunks int64, read func(int64) ([]byte, error), usePage func(int64) bool, useChunk func(uint32) bool) error {
	if !usePage(ref.page) {
		return holdfast.Errorf(holdfast.ErrIntegrity, "map page %d is used twice", ref.page)
	}
	b, err := read(ref.page)
	if err != nil {
		return holdfast.Errorf(holdfast.ErrIO, "read map page %d: %w", ref.page, err)
	}
	if !checkPage(b, t.replica, uint32(level), index, ref.crc, seed) {
		return holdfast.Errorf(holdfast.ErrIntegrity, "map page %d does not match its parent's checksum", ref.page)
	}
	if level == 0 {
		l := &leaf{ref: ref}
		if !l.decode(b, chunks) {
			return holdfast.Errorf(holdfast.ErrIntegrity, "map page %d contradicts itself", ref.page)
		}
		t.leaves[index] = l
		for i := range l.entries {
			if l.entries[i].typ != chunkMapped {
				continue
			}
			if !useChunk(l.entries[i].phys) {
				return holdfast.Errorf(holdfast.ErrIntegrity, "chunk %d of the disk is mapped twice", l.entries[i].phys)
			}
			t.mapped++
			t.poison += l.entries[i].poisoned()
		}
		return nil
	}
	n := &node{ref: ref}
	n.decode(b)
	t.levels[level-1][index] = n
	for i, r := range n.refs {
		if r.page < 0 {
			continue
		}
		if err := t.loadPage(r, level-1, index*nodeEntries+int64(i), seed, chunks, read, usePage, useChunk); err != nil {
			return err
		}
	}
	return nil
}

// pages calls f with every page of the last saved tree.
func (t *tree) pages(f func(page int64)) {
	for _, l := range t.leaves {
		if l.ref.page >= 0 {
			f(l.ref.page)
		}
	}
	for _, nodes := range t.levels {
		for _, n := range nodes {
			if n.ref.page >= 0 {
				f(n.ref.page)
			}
		}
	}
}
