package disk

import (
	"errors"
	"math/bits"
	"sort"
	"sync"

	"github.com/holdfast-storage/holdfast"
)

// allocator hands out the chunks of the disk, and the 4 KiB pages of chunks
// that hold map pages. A freed chunk or page waits until a checkpoint that no
// longer refers to it is durable.
type allocator struct {
	mu       sync.Mutex
	used     []uint64 // one bit per chunk
	chunks   int64
	free     int64
	backed   []uint64 // chunks that have space below; nil: all, always
	ready    int64    // free and backed; free if all are
	reserved int64    // promised to logged entries
	need     int64    // map pages that promised chunks will add; see Replica.newPages
	next     int64    // where the search begins
	waiting  []uint32
	spares   spares

	pages        map[int64]uint16 // chunks of map pages: their used pages
	freePages    []int64
	waitingPages []int64
	mapPages     int64 // pages that the map in memory refers to, or will when they are written
	captured     int64 // pages that come free with the checkpoint being written
}

// spareChunks is what a disk needs beside its data: a map needs 1/600 of its
// data, twice while a checkpoint is written.
func spareChunks(chunks int64) int64 { return 8 + chunks/128 }

// slackChunks are kept on top of what the map needs at most: for a directory
// that grows, and for the pages of checkpoints that did not come about.
const slackChunks = 8

// kept is what data may not take: the next checkpoint may have to write every
// page of the map anew before one of the old ones is free; those that promised
// chunks add are written once, and are then among those that may be written
// anew. A sparse map has pages for each chunk. Under mu.
func (a *allocator) kept() int64 {
	pages := a.mapPages + 2*a.need - int64(len(a.freePages)) - a.captured
	return slackChunks + (max(0, pages)+pagesPerChunk-1)/pagesPerChunk
}

const pagesPerChunk = chunkSize / pageSize

func newAllocator(chunks int64) *allocator {
	return &allocator{
		used: make([]uint64, (chunks+63)/64), chunks: chunks, free: chunks, ready: chunks,
		pages: map[int64]uint16{},
	}
}

// use marks a chunk as used when the map is loaded; false if it is not free.
func (a *allocator) use(c int64) bool {
	if c < 0 || c >= a.chunks || a.used[c/64]&(1<<(c%64)) != 0 {
		return false
	}
	a.used[c/64] |= 1 << (c % 64)
	a.free--
	a.ready--
	return true
}

// useAll marks the chunks that maps refer to; false, with the first of them, if
// one is in use otherwise.
func (a *allocator) useAll(mapped []uint64) (chunk int64, ok bool) {
	for i, w := range mapped {
		if both := w & a.used[i]; both != 0 {
			return int64(i)*64 + int64(bits.TrailingZeros64(both)), false
		}
		n := int64(bits.OnesCount64(w))
		a.used[i] |= w
		a.free -= n
		a.ready -= n
	}
	return 0, true
}

// thin says that no free chunk has space below yet: an image file is sparse.
func (a *allocator) thin() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.backed = make([]uint64, len(a.used))
	a.ready = 0
	copy(a.backed, a.used) // what is in use has been written
}

// solid says that chunks need no space of their own below, or cannot be given any.
func (a *allocator) solid() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.backed, a.ready = nil, a.free
}

// short returns how many more chunks must get space below before n can be
// promised that add pages to the map.
func (a *allocator) short(n, pages int64) int64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.need += pages
	defer func() { a.need -= pages }()
	return max(0, n+a.reserved+a.kept()-a.ready)
}

// bare finds up to n chunks in a row that are free and have no space below.
func (a *allocator) bare(n int64) (from, count int64) { return a.bareFrom(0, n) }

func (a *allocator) bareFrom(start, n int64) (from, count int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.backed == nil {
		return 0, 0
	}
	for c := start; c < a.chunks && count < n; c++ {
		if (a.used[c/64]|a.backed[c/64])&(1<<(c%64)) == 0 {
			if count == 0 {
				from = c
			}
			count++
		} else if count > 0 {
			break
		} else if a.used[c/64]|a.backed[c/64] == ^uint64(0) {
			c |= 63 // none in this word
		}
	}
	return from, count
}

// back notes that free chunks have space below now.
func (a *allocator) back(from, count int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for c := from; c < from+count && a.backed != nil; c++ {
		if a.backed[c/64]&(1<<(c%64)) == 0 {
			a.backed[c/64] |= 1 << (c % 64)
			a.ready++
		}
	}
}

// punched notes that the space of chunks, still in use, was given back.
func (a *allocator) punched(chunks []uint32) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, c := range chunks {
		if a.backed != nil {
			a.backed[c/64] &^= 1 << (c % 64)
		}
	}
}

// usePage marks a page as used when the map is loaded; false if it is not free.
func (a *allocator) usePage(p int64) bool {
	c := p / pagesPerChunk
	if p < 0 || c >= a.chunks {
		return false
	}
	mask, ok := a.pages[c]
	if !ok && !a.use(c) {
		return false
	}
	bit := uint16(1) << (p % pagesPerChunk)
	if mask&bit != 0 {
		return false
	}
	a.pages[c] = mask | bit
	a.mapPages++
	return true
}

// loaded ends loading: the free pages of map chunks can be given out.
func (a *allocator) loaded() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.listFreePages()
}

func (a *allocator) listFreePages() {
	a.freePages = a.freePages[:0]
	for c, mask := range a.pages {
		for i := int64(0); i < pagesPerChunk; i++ {
			if mask&(1<<i) == 0 {
				a.freePages = append(a.freePages, c*pagesPerChunk+i)
			}
		}
	}
	// Given out from the end: ascending, so that a checkpoint writes long runs.
	sort.Slice(a.freePages, func(i, j int) bool { return a.freePages[i] > a.freePages[j] })
}

// reserve promises n chunks to entries about to be logged, which will add pages
// to the map.
func (a *allocator) reserve(n, pages int64) error { return a.exchange(0, 0, n, pages) }

// exchange gives chunks and pages that were promised to one purpose back and
// promises n and pages to another, both or neither.
func (a *allocator) exchange(oldChunks, oldPages, n, pages int64) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.reserved -= oldChunks
	pages -= oldPages
	a.need += pages
	switch kept := a.kept(); {
	case a.ready-a.reserved-kept >= n:
	case a.free-a.reserved-kept >= n:
		a.reserved += oldChunks
		a.need -= pages
		return errBare
	default:
		a.reserved += oldChunks
		a.need -= pages
		return holdfast.Errorf(holdfast.ErrNoSpace, "the disk is full: %d chunks free, %d promised, %d kept for its map",
			a.free, a.reserved, kept)
	}
	a.reserved += n
	return nil
}

// errBare: there are chunks, but they have no space below; see Disk.grow.
var errBare = errors.New("free chunks have no space yet")

// fits says whether there are n chunks with space that are not promised, though the map's
// next checkpoint may then lack some.
func (a *allocator) fits(n int64) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.ready-a.reserved >= n
}

// promise reserves without asking, for entries that are already logged.
func (a *allocator) promise(n, pages int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.reserved += n
	a.need += pages
}

// needs changes how many pages promised chunks will add to the map.
func (a *allocator) needs(change int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.need += change
}

func (a *allocator) release(n int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.reserved -= n
}

// take returns a free chunk. With promised, it comes out of the reservation.
func (a *allocator) take(promised bool) (uint32, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	c, ok := a.find()
	if !ok {
		return 0, holdfast.Errorf(holdfast.ErrNoSpace, "the disk has no free chunk with space below it")
	}
	if promised {
		a.reserved--
	}
	return uint32(c), nil
}

// find takes the next free chunk. Under mu.
func (a *allocator) find() (int64, bool) {
	if a.ready == 0 {
		return 0, false
	}
	words := int64(len(a.used))
	for i := int64(0); i <= words; i++ {
		w := (a.next/64 + i) % words
		free := ^a.used[w]
		if a.backed != nil {
			free &= a.backed[w]
		}
		if i == 0 {
			free &= ^uint64(0) << (a.next % 64)
		}
		if free == 0 {
			continue
		}
		c := w*64 + int64(bits.TrailingZeros64(free))
		if c >= a.chunks {
			continue
		}
		a.used[w] |= 1 << (c % 64)
		a.free--
		a.ready--
		a.next = (c + 1) % a.chunks
		return c, true
	}
	return 0, false
}

// later frees a chunk once the next checkpoint is durable.
func (a *allocator) later(c uint32) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if mutant == "chunk_reused_before_ckpt" {
		a.clear(int64(c))
		a.next = int64(c)
		return
	}
	a.waiting = append(a.waiting, c)
}

// page returns a free page for the map.
func (a *allocator) page() (int64, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.freePages) == 0 {
		c, ok := a.find()
		if !ok {
			return 0, holdfast.Errorf(holdfast.ErrNoSpace, "the disk has no chunk with space left for its map")
		}
		a.pages[c] = 0
		for i := int64(pagesPerChunk) - 1; i >= 0; i-- {
			a.freePages = append(a.freePages, c*pagesPerChunk+i)
		}
	}
	p := a.freePages[len(a.freePages)-1]
	a.freePages = a.freePages[:len(a.freePages)-1]
	a.pages[p/pagesPerChunk] |= 1 << (p % pagesPerChunk)
	a.mapPages++
	return p, nil
}

// laterPage frees a page once the next checkpoint is durable.
func (a *allocator) laterPage(p int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.waitingPages = append(a.waitingPages, p)
	a.mapPages--
}

// capture returns the chunks and pages that the checkpoint now being written no
// longer refers to.
func (a *allocator) capture() (chunks []uint32, pages []int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	chunks, pages = a.waiting, a.waitingPages
	a.waiting, a.waitingPages = nil, nil
	a.captured = int64(len(pages))
	return chunks, pages
}

// keepWaiting takes back what capture returned: the checkpoint did not come about.
func (a *allocator) keepWaiting(chunks []uint32, pages []int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.waiting, a.waitingPages = append(a.waiting, chunks...), append(a.waitingPages, pages...)
	a.captured = 0
}

// settled frees what capture returned, now that the checkpoint is durable.
// It returns the chunks that held nothing but freed pages; they are free as well.
func (a *allocator) settled(chunks []uint32, pages []int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, c := range chunks {
		a.clear(int64(c))
	}
	for _, p := range pages {
		c := p / pagesPerChunk
		a.pages[c] &^= 1 << (p % pagesPerChunk)
		if a.pages[c] == 0 {
			delete(a.pages, c)
			a.clear(c)
		}
	}
	a.captured = 0
	if len(pages) > 0 {
		a.listFreePages()
	}
}

// clear marks a chunk free. Under mu.
func (a *allocator) clear(c int64) {
	a.used[c/64] &^= 1 << (c % 64)
	a.free++
	if a.backed == nil || a.backed[c/64]&(1<<(c%64)) != 0 {
		a.ready++
	}
}

// allocStat counts chunks.
type allocStat struct {
	free, reserved int64
	waiting        int64 // in use, and free once a checkpoint is durable
	mapping        int64 // that hold pages of the map
	backed         int64 // that have space below, in use or not
}

func (a *allocator) stat() allocStat {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := allocStat{free: a.free, reserved: a.reserved, waiting: int64(len(a.waiting)), mapping: int64(len(a.pages)), backed: a.chunks}
	if a.backed != nil {
		s.backed = a.chunks - a.free + a.ready
	}
	return s
}
