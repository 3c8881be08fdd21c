package disk

import (
	"encoding/binary"

	"github.com/holdfast-storage/holdfast"
)

// wholeChunks returns the chunks that a range covers wholly.
func wholeChunks(off, length int64) (first, n int64) {
	first = (off + chunkSize - 1) / chunkSize
	return first, max(0, (off+length)/chunkSize-first)
}

// leadBlocks is how many blocks of a range are before its first whole chunk.
func leadBlocks(off int64) int64 { return (pageUpTo(off, chunkSize) - off) / blockSize }

func pageUpTo(n, unit int64) int64 { return (n + unit - 1) / unit * unit }

// The extra of a WRITE with flag 4: the number on the disk, u32, of the chunk that
// holds each whole chunk of its range, in order. That of a CHUNK_INSTALL with flag 4
// ends with the number of the chunk that holds it all.

// list makes the record refer to fresh chunks. Its payload is what they do not hold.
func (r *record) list(fresh []uint32) {
	r.flags |= flagFresh
	for _, c := range fresh {
		r.extra = binary.LittleEndian.AppendUint32(r.extra, c)
	}
}

// freshList is the part of extra that lists fresh chunks.
func (r *record) freshList() []byte {
	switch {
	case r.flags&flagFresh == 0:
		return nil
	case r.typ == recInstall:
		return r.extra[min(installSize, len(r.extra)):]
	}
	return r.extra
}

// refer is list for a record whose payload holds all of the range until now.
func (r *record) refer(fresh []uint32) {
	lead := leadBlocks(r.off) * blockSize
	rest := r.payload[lead+int64(len(fresh))*chunkSize:]
	r.list(fresh)
	switch {
	case len(rest) == 0:
		r.payload = r.payload[:lead]
	case lead == 0:
		r.payload = rest
	default:
		r.payload = append(r.payload[:lead:lead], rest...)
	}
}

// freshChunks returns the chunks that the record refers to, or nil.
func (r *record) freshChunks() []uint32 {
	list := r.freshList()
	if list == nil {
		return nil
	}
	fresh := make([]uint32, len(list)/4)
	for i := range fresh {
		fresh[i] = binary.LittleEndian.Uint32(list[4*i:])
	}
	return fresh
}

// freshBytes is how much of the record's bytes is in fresh chunks.
func (r *record) freshBytes() int64 { return int64(len(r.freshList())/4) * chunkSize }

// freshFits reports whether the record lists the chunks that its range needs.
func (r *record) freshFits() bool {
	if r.flags&flagFresh == 0 {
		return true
	}
	list := r.freshList()
	if r.length != int64(len(r.crc))*blockSize || r.length > holdfast.MaxOpSize || r.off > maxSegment || len(list)%4 != 0 {
		return false
	}
	_, n := wholeChunks(r.off, r.length)
	switch {
	case n == 0 || int64(len(list)/4) != n:
		return false
	case r.typ == recInstall:
		return r.length == chunkSize && len(r.extra) == installSize+4
	}
	return r.typ == recWrite
}

// edgesMatch reports whether the payload matches the checksums of what it holds.
func (r *record) edgesMatch(payload []byte) bool {
	if r.flags&flagFresh == 0 {
		return payloadMatches(r.crc, payload)
	}
	lead := leadBlocks(r.off)
	return payloadMatches(r.crc[:lead], payload) &&
		payloadMatches(r.crc[lead+r.freshBytes()/blockSize:], payload[lead*blockSize:])
}

// whole returns where the entry has a whole chunk of the segment, if in a fresh one.
func (e *logEntry) whole(chunk int64) (phys uint32, ok bool) {
	first, _ := wholeChunks(e.off, e.length)
	if k := chunk - first; k >= 0 && k < int64(len(e.fresh)) {
		return e.fresh[k], true
	}
	return 0, false
}

// at says where a block of a write is, whose bytes are not lost. Under mu.
func (e *logEntry) at(block int64) source {
	i := block - e.off/blockSize
	src := source{kind: fromLog, crc: e.crc[i], slot: e.slot, entry: e}
	if phys, ok := e.whole(block / blocksPerChunk); ok {
		return source{kind: fromChunk, crc: e.crc[i], phys: phys, pos: block % blocksPerChunk * blockSize, entry: e}
	}
	if i >= leadBlocks(e.off) { // it is behind the whole chunks
		i -= int64(len(e.fresh)) * blocksPerChunk
	}
	src.pos = e.pos + i*blockSize
	return src
}

// part is a run of blocks that one read can fetch: bytes [from, to) of what is read.
type part struct {
	src      source
	from, to int64
}

// parts says where n blocks of a write are, from the given one on. Under mu.
func (e *logEntry) parts(from, n int64) []part {
	if e.fresh == nil {
		return []part{{e.at(e.off/blockSize + from), 0, n * blockSize}}
	}
	var all []part
	first := e.off/blockSize + from
	lead := e.off/blockSize + leadBlocks(e.off)
	for b := first; b < first+n; {
		src, end := e.at(b), first+n
		if src.kind == fromChunk {
			end = min(end, (b/blocksPerChunk+1)*blocksPerChunk)
		} else if b < lead {
			end = min(end, lead)
		}
		all = append(all, part{src, (b - first) * blockSize, (end - first) * blockSize})
		b = end
	}
	return all
}
