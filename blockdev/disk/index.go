package disk

import (
	"sort"

	"github.com/holdfast-storage/holdfast"
)

const (
	blockSize      = holdfast.BlockSize
	chunkSize      = holdfast.ChunkSize
	blocksPerChunk = holdfast.BlocksPerChunk
)

// wideLength is the length above which a ZERO or TRIM is not indexed by block
// but kept in a list of its own: a trim of a whole volume is one list element.
const wideLength = holdfast.MaxOpSize

// logEntry is one entry of a replica's log, whose payload is in the WAL, or in part in
// fresh chunks.
type logEntry struct {
	epoch    holdfast.Epoch
	seq      holdfast.Seq
	commit   holdfast.Seq
	typ      recordType
	off      int64
	length   int64
	crc      []uint32
	serial   uint64 // of its record
	slot     int32
	pos      int64    // of its payload in the slot
	fresh    []uint32 // where its whole chunks are, if not in the payload
	bad      bool     // its payload was lost to corruption
	upTo     int64    // bytes of this entry's record and all before it; see logIndex.held
	versions []version
}

// recordBytes is what the entry takes of the log, but for the rest of its last page.
func (e *logEntry) recordBytes() int64 {
	n := int64(recordFixed + 4*len(e.crc))
	if e.typ == recWrite {
		n += e.length
	}
	return n
}

func (e *logEntry) wide() bool { return e.typ != recWrite && e.length > wideLength }

// covers reports whether the entry touches the block.
func (e *logEntry) covers(block int64) bool {
	return block >= e.off/blockSize && block < (e.off+e.length)/blockSize
}

// version is one logged version of one block: a link of a chain from the newest
// to the oldest, so that a truncation finds what was there before.
type version struct {
	entry        *logEntry
	newer, older *version
}

// chunkLog holds the newest logged version of each block of a chunk.
type chunkLog struct {
	heads [blocksPerChunk]*version
	n     int // versions in all chains
}

// logIndex is the log of one replica in memory: the entries that the WAL still
// holds, and the versions of those above the last checkpoint.
//
//	first .. indexed .. tail
//
// Entries first to indexed are held for Entries alone; those above indexed are
// found by block as well.
type logIndex struct {
	entries []*logEntry // ascending by one
	indexed holdfast.Seq
	chunks  map[int64]*chunkLog
	wide    []*logEntry // the wide ones above indexed, ascending
	settled int64       // upTo of the entry at indexed
}

// held is how much of the log the entries above the last checkpoint take.
func (x *logIndex) held() int64 {
	if n := len(x.entries); n > 0 && x.entries[n-1].seq > x.indexed {
		return x.entries[n-1].upTo - x.settled
	}
	return 0
}

// get returns the entry of a seq, or nil.
func (x *logIndex) get(seq holdfast.Seq) *logEntry {
	if len(x.entries) == 0 || seq < x.entries[0].seq || seq > x.entries[len(x.entries)-1].seq {
		return nil
	}
	return x.entries[seq-x.entries[0].seq]
}

// push adds the next entry.
func (x *logIndex) push(e *logEntry) {
	e.upTo = x.settled + x.held() + e.recordBytes()
	x.entries = append(x.entries, e)
	if e.wide() {
		x.wide = append(x.wide, e)
		return
	}
	first := e.off / blockSize
	e.versions = make([]version, e.length/blockSize)
	for i := range e.versions {
		b := first + int64(i)
		cl := x.chunks[b/blocksPerChunk]
		if cl == nil {
			cl = &chunkLog{}
			x.chunks[b/blocksPerChunk] = cl
		}
		v := &e.versions[i]
		v.entry, v.older = e, cl.heads[b%blocksPerChunk]
		if v.older != nil {
			v.older.newer = v
		}
		cl.heads[b%blocksPerChunk] = v
		cl.n++
	}
}

// unlink takes an entry's versions out of their chains. It calls gone for each
// chunk that has none left.
func (x *logIndex) unlink(e *logEntry, gone func(chunk int64)) {
	first := e.off / blockSize
	for i := range e.versions {
		b := first + int64(i)
		cl := x.chunks[b/blocksPerChunk]
		v := &e.versions[i]
		if v.newer != nil {
			v.newer.older = v.older
		} else {
			cl.heads[b%blocksPerChunk] = v.older
		}
		if v.older != nil {
			v.older.newer = v.newer
		}
		if cl.n--; cl.n == 0 {
			delete(x.chunks, b/blocksPerChunk)
			gone(b / blocksPerChunk)
		}
	}
	e.versions = nil
}

// cut drops the entries above to.
func (x *logIndex) cut(to holdfast.Seq, gone func(chunk int64)) {
	for n := len(x.entries); n > 0 && x.entries[n-1].seq > to; n-- {
		x.unlink(x.entries[n-1], gone)
		x.entries[n-1] = nil
		x.entries = x.entries[:n-1]
	}
	for n := len(x.wide); n > 0 && x.wide[n-1].seq > to; n-- {
		x.wide = x.wide[:n-1]
	}
}

// settle takes the entries up to seq out of the index by block: a checkpoint
// holds what they did.
func (x *logIndex) settle(seq holdfast.Seq, gone func(chunk int64)) {
	for s := x.indexed + 1; s <= seq; s++ {
		if e := x.get(s); e != nil {
			x.unlink(e, gone)
			x.settled = e.upTo
		}
	}
	for len(x.wide) > 0 && x.wide[0].seq <= seq {
		x.wide = x.wide[1:]
	}
	x.indexed = max(x.indexed, seq)
}

// forget drops the entries, already settled, whose records are about to be overwritten.
func (x *logIndex) forget(serial uint64) {
	n := 0
	for i := 0; i < len(x.entries) && x.entries[i].seq <= x.indexed; i++ {
		if x.entries[i].serial <= serial { // earlier ones may have been logged again
			n = i + 1
		}
	}
	if n > 0 {
		x.entries = append([]*logEntry(nil), x.entries[n:]...)
	}
}

// newest returns the newest logged entry that touches a block, or nil.
func (x *logIndex) newest(block int64) *logEntry {
	var e *logEntry
	if cl := x.chunks[block/blocksPerChunk]; cl != nil {
		if v := cl.heads[block%blocksPerChunk]; v != nil {
			e = v.entry
		}
	}
	for i := len(x.wide) - 1; i >= 0 && (e == nil || x.wide[i].seq > e.seq); i-- {
		if x.wide[i].covers(block) {
			return x.wide[i]
		}
	}
	return e
}

// newestIn returns the newest entry above after and up to to that touches a block, or nil.
func (x *logIndex) newestIn(block int64, after, to holdfast.Seq) *logEntry {
	var e *logEntry
	if cl := x.chunks[block/blocksPerChunk]; cl != nil {
		for v := cl.heads[block%blocksPerChunk]; v != nil; v = v.older {
			if v.entry.seq <= to {
				if v.entry.seq > after {
					e = v.entry
				}
				break
			}
		}
	}
	for i := len(x.wide) - 1; i >= 0; i-- {
		w := x.wide[i]
		if w.seq <= after || e != nil && w.seq < e.seq {
			break
		}
		if w.seq <= to && w.covers(block) {
			return w
		}
	}
	return e
}

// writtenAbove reports whether a WRITE above seq touches the chunk.
func (x *logIndex) writtenAbove(chunk int64, seq holdfast.Seq) bool {
	cl := x.chunks[chunk]
	if cl == nil {
		return false
	}
	for _, v := range cl.heads {
		for ; v != nil && v.entry.seq > seq; v = v.older {
			if v.entry.typ == recWrite {
				return true
			}
		}
	}
	return false
}

// clearedAbove reports whether a ZERO or TRIM above seq touches the chunk and is the
// newest entry there of a block.
func (x *logIndex) clearedAbove(chunk int64, seq holdfast.Seq) bool {
	if cl := x.chunks[chunk]; cl != nil {
		for _, v := range cl.heads {
			if v != nil && v.entry.typ != recWrite && v.entry.seq > seq {
				return true
			}
		}
	}
	for i := len(x.wide) - 1; i >= 0 && x.wide[i].seq > seq; i-- {
		if e := x.wide[i]; e.off < (chunk+1)*chunkSize && chunk*chunkSize < e.off+e.length {
			return true
		}
	}
	return false
}

// badRanges lists the ranges of indexed entries above seq whose payload is lost.
func (x *logIndex) badRanges(above holdfast.Seq) []Range {
	var bad []Range
	for _, e := range x.entries {
		if e.bad && e.seq > above {
			bad = append(bad, Range{e.off, e.length})
		}
	}
	sort.Slice(bad, func(i, j int) bool { return bad[i].Offset < bad[j].Offset })
	return bad
}
