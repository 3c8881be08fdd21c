package disk

import (
	"context"

	"github.com/holdfast-storage/holdfast"
)

// A WRITE that covers two or more whole chunks is not written twice (protocol,
// section 5). Its whole chunks go to free chunks of the disk before its record is
// appended; the record refers to these fresh chunks, and its payload is only what is
// left below a whole chunk.
//
//	write fresh chunks -> append record -> sync of the image -> sync of the log ->
//	durable -> applied: the map takes the fresh chunk in place of the old one
//
// Until it is applied a fresh chunk belongs to its entry; whatever drops the entry
// frees it. From then on it is the map's. Before a checkpoint has that map, recovery
// applies the entry once more, so the fresh chunk must still match its record: until
// then it is never written. Who has to write there (a part of the chunk is overwritten)
// brings its bytes to the chunk's second place: the one it had before, which is kept
// for that long, or the one promised to it when it had none.
//
// The scan at open compares fresh chunks with the record's checksums, unless the
// record is settled by a checkpoint. One that does not match, and is not known to
// have been durable, ends the log. Its head may be whole then, and it is the next
// record's place that must take it: so a record with fresh chunks is the first of its
// batch, on a page of its own. (Behind others in their last page it would stay in
// front of whatever is written next, with the same serial.)
//
// An install of a whole chunk goes the same way (InstallChunk): the map takes its fresh
// chunk at once, and it stays unwritten until a checkpoint in the same way. Its second
// place is promised to the chunk if it had none.
//
// Bytes in fresh chunks count as if they were in the log, in the file that holds their
// record. So all that bounds a log bounds them too: back-pressure, a volume's share,
// what an open has to read, and what the index keeps in memory.

// dropFresh frees the fresh chunks of the entries above a seq, none of them applied,
// which are about to be dropped, durably. Under mu.
func (r *Replica) dropFresh(above holdfast.Seq) {
	for s := above + 1; s <= r.tail; s++ {
		if e := r.index.get(s); e != nil {
			for _, c := range e.fresh {
				r.d.alloc.later(c)
			}
		}
	}
}

// flip says that the map has a chunk in a fresh one, which an entry above the last
// checkpoint refers to: it must not be written.
type flip struct {
	phys   uint32
	second uint32 // where the chunk was before
	has    bool   // it had a place; else one is promised to it
	serial uint64 // of the install that brought it, if one did: until that is durable, the second place is not written
}

// flip makes a fresh chunk a chunk's place, if all of it is to be what one entry wrote.
func (r *Replica) flip(chunk int64, e *chunkEntry, p *chunkPlan) bool {
	src := p.src[0]
	for _, other := range p.src {
		if other == nil || other != src {
			return false
		}
	}
	phys, ok := src.whole(chunk)
	if !ok || src.seq <= e.asOf {
		return false
	}
	r.mu.RLock()
	bad := src.bad
	r.mu.RUnlock()
	if bad {
		return false
	}
	*e = chunkEntry{typ: chunkMapped, phys: phys, lastSeq: max(e.lastSeq, p.last), asOf: e.asOf}
	for i := range int64(blocksPerChunk) {
		e.setState(i, BlockData)
		e.crc[i] = src.crc[chunk*blocksPerChunk+i-src.off/blockSize]
	}
	return true
}

// turn notes what has become of a chunk's places. Under mu; the caller holds applying.
func (r *Replica) turn(chunk int64, old, now *chunkEntry, p *chunkPlan) {
	if now.typ != chunkMapped || old.typ == chunkMapped && old.phys == now.phys {
		return
	}
	fresh := false
	if p.src[0] != nil {
		phys, ok := p.src[0].whole(chunk)
		fresh = ok && phys == now.phys
	}
	switch f, was := r.flips[chunk]; {
	case fresh:
		r.turnTo(chunk, old, now.phys, 0) // its entry is durable
	case was:
		r.d.alloc.later(f.phys)
		delete(r.flips, chunk)
	}
}

// turnTo notes that a chunk's place is a fresh one, instead of that which it had. Under
// mu; the caller holds applying.
func (r *Replica) turnTo(chunk int64, old *chunkEntry, phys uint32, serial uint64) {
	f, was := r.flips[chunk]
	if was {
		r.d.alloc.later(f.phys)
	} else if old.typ == chunkMapped {
		r.unkeep(old.phys)
		f.second, f.has = old.phys, true
	}
	f.phys, f.serial = phys, max(f.serial, serial)
	r.flips[chunk] = f
}

// place returns where a chunk that is in phys may be written: there, or in its second
// place. The caller holds applying.
func (r *Replica) place(chunk int64, phys uint32) (uint32, error) {
	f, ok := r.flips[chunk]
	switch {
	case !ok || f.phys != phys:
		return phys, nil
	case f.has:
		// Entries that were durable before an install are applied upon it. If it could be
		// lost after that, the map would have the second place with other bytes.
		return f.second, r.d.wal.sync(context.Background(), f.serial)
	}
	return r.takePromised(chunk)
}

// leave brings what a chunk holds, beside what is about to be written, to its second
// place if it must not be written where it is. The caller holds applying.
func (r *Replica) leave(buf []byte, chunk int64, e *chunkEntry, dirty *[blocksPerChunk]bool) error {
	phys, err := r.place(chunk, e.phys)
	if err != nil {
		return err
	}
	r.mu.Lock()
	r.unkeep(phys)
	r.mu.Unlock()
	if phys == e.phys {
		return nil
	}
	old := r.d.buffer()
	defer r.d.buffers.Put(old)
	at := r.d.chunkOffset(e.phys)
	_, failed := r.d.main.ReadAt(*old, at)
	for i := range int64(blocksPerChunk) {
		if dirty[i] || e.state(i) != BlockData {
			continue
		}
		b := (*old)[i*blockSize : (i+1)*blockSize]
		if failed != nil || !payloadMatches(e.crc[i:i+1], b) {
			// What cannot be read, or does not match, stays what it is: a block that
			// does not match.
			if _, err := r.d.main.ReadDirectAt(b, at+i*blockSize); err != nil {
				clear(b)
			}
		}
		copy(buf[i*blockSize:], b)
		dirty[i] = true
	}
	e.phys = phys
	return nil
}

// leftFlip frees the second place of a chunk that is not in its fresh one any more,
// unless it is there now. Under mu; the caller holds applying.
func (r *Replica) leftFlip(chunk int64, now *chunkEntry) {
	f, ok := r.flips[chunk]
	if !ok || now.typ == chunkMapped && now.phys == f.phys {
		return
	}
	delete(r.flips, chunk)
	switch {
	case !f.has:
		r.dropPromise(chunk)
	case now.typ != chunkMapped || now.phys != f.second:
		r.d.alloc.later(f.second)
	}
}

// dropFlips frees all second places. Under mu; the caller holds applying.
func (r *Replica) dropFlips() {
	for _, f := range r.flips {
		if f.has {
			r.d.alloc.later(f.second)
		}
	}
	clear(r.flips)
}

// freeFresh frees the fresh chunks of entries, now applied, that the map did not take.
// Under mu; the caller holds applying.
func (r *Replica) freeFresh(applied []*logEntry) {
	for _, e := range applied {
		first, _ := wholeChunks(e.off, e.length)
		for i, c := range e.fresh {
			if f, ok := r.flips[first+int64(i)]; !ok || f.phys != c {
				r.d.alloc.later(c)
			}
		}
	}
}

// settleFresh is called when a checkpoint has become durable that has the entries
// above was, up to applied, and returns the second places, which nothing refers to any
// more. Entries whose fresh chunks are not the map's are lost to Entries; of the
// others, kept says which. Under mu; the caller holds gate.
func (r *Replica) settleFresh(was, applied holdfast.Seq) (places []uint32) {
	lost := holdfast.Seq(0)
	for s := was + 1; s <= applied; s++ {
		e := r.index.get(s)
		if e == nil {
			continue
		}
		first, _ := wholeChunks(e.off, e.length)
		for i, c := range e.fresh {
			if f, ok := r.flips[first+int64(i)]; ok && f.phys == c {
				r.kept[c] = s
			} else {
				lost = s
			}
		}
	}
	for chunk, f := range r.flips {
		delete(r.flips, chunk)
		if f.has {
			places = append(places, f.second)
		} else {
			r.dropPromise(chunk) // it needs no second place any more
		}
	}
	r.index.drop(lost)
	for c, s := range r.kept {
		if s < r.first() {
			delete(r.kept, c)
		}
	}
	return places
}

// unkeep is called before a chunk is written or freed: an entry below the checkpoint
// whose bytes are in it, and all before, are lost to Entries. Under mu.
func (r *Replica) unkeep(phys uint32) {
	if s, ok := r.kept[phys]; ok {
		delete(r.kept, phys)
		r.index.drop(s)
	}
}

// drop drops entries up to seq, already settled.
func (x *logIndex) drop(seq holdfast.Seq) {
	n := 0
	for n < len(x.entries) && x.entries[n].seq <= min(seq, x.indexed) {
		x.entries[n] = nil
		n++
	}
	x.entries = x.entries[n:]
}

// referAgain gives the new record of an entry its payload, and the same fresh chunks.
func (r *Replica) referAgain(rec *record, e *logEntry) error {
	if e.fresh == nil {
		rec.payload = make([]byte, e.length)
		return r.readPayload(rec.payload, e, 0)
	}
	rec.list(e.fresh)
	rec.payload = make([]byte, e.length-rec.freshBytes())
	lead := leadBlocks(e.off)
	if err := r.readPayload(rec.payload[:lead*blockSize], e, 0); err != nil {
		return err
	}
	return r.readPayload(rec.payload[lead*blockSize:], e, lead+rec.freshBytes()/blockSize)
}
