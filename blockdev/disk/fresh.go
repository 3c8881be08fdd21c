package disk

import (
	"encoding/binary"
	"sync"
	"sync/atomic"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
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

// minFresh is how many whole chunks a write must cover: one that covers less is not
// worth a sync of the image.
const minFresh = 2

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

// takeFresh takes chunks for as many whole ones, if there are more than enough: not on
// a disk that is about to fill, for they are wanted twice until the next checkpoint.
func (a *allocator) takeFresh(n int64) ([]uint32, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	kept := a.kept()
	if a.free-a.reserved-kept < n || (a.chunks-a.free+a.reserved+n)*100 > a.chunks*creditShare {
		return nil, holdfast.Errorf(holdfast.ErrNoSpace, "no chunks to spare")
	}
	if a.ready-a.reserved-kept < n {
		return nil, errBare
	}
	fresh := make([]uint32, 0, n)
	for range n {
		c, ok := a.find()
		if !ok {
			break
		}
		fresh = append(fresh, uint32(c))
	}
	if int64(len(fresh)) < n { // there were as many free a moment ago
		for _, c := range fresh {
			a.clear(int64(c))
		}
		return nil, errBare
	}
	a.spares.taken += n
	return fresh, nil
}

// giveBack frees chunks that nothing in the log or the map ever referred to.
func (a *allocator) giveBack(chunks []uint32) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, c := range chunks {
		a.clear(int64(c))
	}
}

// takeFresh takes fresh chunks, or returns nil: then the entry is written twice.
func (d *Disk) takeFresh(n int64) []uint32 {
	fresh, err := d.alloc.takeFresh(n)
	if err == errBare && d.growFresh(n) {
		fresh, _ = d.alloc.takeFresh(n)
	}
	return fresh
}

// growFresh takes space below an image for fresh chunks. On a host that was found full
// it tries again only after a checkpoint: there, space is for what cannot do without.
func (d *Disk) growFresh(n int64) bool {
	d.growing.Lock()
	defer d.growing.Unlock()
	if d.hostFull || d.mayGrow() != nil {
		return false
	}
	d.hostFull = d.growLocked(n, 0) != nil
	return !d.hostFull
}

// tryHostAgain lets growFresh look anew whether the host is full.
func (d *Disk) tryHostAgain() {
	d.growing.Lock()
	defer d.growing.Unlock()
	d.hostFull = false
}

// large reports whether the entry is to go by way of fresh chunks.
func (e *Entry) large() bool {
	_, n := wholeChunks(e.Offset, e.Length)
	return e.Type == OpWrite && n >= minFresh
}

// logFresh logs admitted entries, those that are large by way of fresh chunks if there
// are any. Of large ones the checksums are compared here.
func (r *Replica) logFresh(entries []Entry, crcs int) error {
	var fresh [][]uint32
	for i := range entries {
		if e := &entries[i]; e.large() {
			if fresh == nil {
				fresh = make([][]uint32, len(entries))
			}
			_, n := wholeChunks(e.Offset, e.Length)
			fresh[i] = r.d.takeFresh(n)
		}
	}
	if mutant == "record_before_chunk" {
		if err := r.logEntries(entries, crcs, fresh); err != nil {
			return err
		}
		return r.writeFresh(entries, fresh)
	}
	if err := r.writeFresh(entries, fresh); err != nil {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.regret(entries)
		for _, chunks := range fresh {
			r.d.alloc.giveBack(chunks)
		}
		return holdfast.Errorf(holdfast.KindOf(err), "log an entry of replica %v: %w", r.desc.Replica, err)
	}
	return r.logEntries(entries, crcs, fresh)
}

// writeFresh writes the whole chunks of entries to their fresh ones, and compares the
// checksums of all that is large.
func (r *Replica) writeFresh(entries []Entry, fresh [][]uint32) error {
	var runs []chunkRun
	for i, chunks := range fresh {
		e := &entries[i]
		if !e.large() {
			continue
		}
		at := int(leadBlocks(e.Offset))
		end := at + len(chunks)*blocksPerChunk
		if chunks == nil {
			at, end = 0, 0
		}
		if err := firstOf(r.checkSums(e, 0, at), r.checkSums(e, end, len(e.CRC))); err != nil {
			return err
		}
		for len(chunks) > 0 {
			n := runOfChunks(chunks)
			runs = append(runs, chunkRun{chunks[0], e, at, at + n*blocksPerChunk})
			chunks, at = chunks[n:], at+n*blocksPerChunk
		}
	}
	return r.writeRuns(runs)
}

// chunkRun is whole chunks that lie one after the other, and the blocks [from, to) of
// an entry that are to be there.
type chunkRun struct {
	first    uint32
	e        *Entry
	from, to int
}

// maxFreshWriters is how many runs are written at once: a device is faster with more
// than one write at a time, and little faster with more than a few of this size.
const maxFreshWriters = 4

// writeRuns writes whole chunks, all or an error. One writer compares checksums while
// others wait for the device.
func (r *Replica) writeRuns(runs []chunkRun) error {
	if err := r.d.failed(); err != nil || len(runs) == 0 {
		return err
	}
	var (
		next   atomic.Int64
		wg     sync.WaitGroup
		mu     sync.Mutex
		failed error
	)
	write := func() {
		for i := next.Add(1) - 1; i < int64(len(runs)); i = next.Add(1) - 1 {
			run := &runs[i]
			err := r.checkSums(run.e, run.from, run.to)
			if err == nil {
				err = r.d.writeRun(run)
			}
			if err != nil {
				mu.Lock()
				failed = firstOf(failed, err)
				mu.Unlock()
				return
			}
		}
	}
	if !r.d.opts.foreground { // else all is done in an order that can be repeated
		for range min(len(runs), maxFreshWriters) - 1 {
			wg.Go(write)
		}
	}
	write()
	wg.Wait()
	return failed
}

// writeRun writes a run past the page cache, where the file system can: in it, it would
// be copied once more, and take the place of what is read.
func (d *Disk) writeRun(run *chunkRun) error {
	b := run.e.Payload[run.from*blockSize : run.to*blockSize]
	if !vfs.Aligned(b) {
		wide := d.wideBuffer()
		defer d.wide.Put(wide)
		b = (*wide)[:copy(*wide, b)]
	}
	if _, err := d.direct.WriteAt(b, d.chunkOffset(run.first)); err != nil {
		return d.fail(holdfast.Errorf(holdfast.ErrIO, "write chunk %d: %w", run.first, err))
	}
	return nil
}

// writeWhole does the same with one chunk of data.
func (d *Disk) writeWhole(data []byte, phys uint32) error {
	if err := d.failed(); err != nil {
		return err
	}
	b := d.buffer()
	defer d.buffers.Put(b)
	copy(*b, data)
	if _, err := d.direct.WriteAt(*b, d.chunkOffset(phys)); err != nil {
		return d.fail(holdfast.Errorf(holdfast.ErrIO, "write chunk %d: %w", phys, err))
	}
	return nil
}

// runOfChunks counts the chunks at the start that lie one after the other.
func runOfChunks(chunks []uint32) int {
	n := 1
	for n < len(chunks) && chunks[n] == chunks[0]+uint32(n) {
		n++
	}
	return n
}

// wideBuffer returns an aligned buffer for the largest operation; give it back with
// d.wide.Put.
func (d *Disk) wideBuffer() *[]byte {
	if b, ok := d.wide.Get().(*[]byte); ok {
		return b
	}
	b := vfs.AlignedBuffer(holdfast.MaxOpSize)
	return &b
}

// dropUnlogged gives the fresh chunks of entries back that were not logged. Under mu.
func (r *Replica) dropUnlogged(entries []logEntry) {
	for i := range entries {
		r.d.alloc.giveBack(entries[i].fresh)
	}
}

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
	phys  uint32
	spare uint32 // where the chunk was before
	has   bool   // it had a place; else one is promised to it
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
		r.turnTo(chunk, old, now.phys)
	case was:
		r.d.alloc.later(f.phys)
		delete(r.flips, chunk)
	}
}

// turnTo notes that a chunk's place is a fresh one, instead of that which it had. Under
// mu; the caller holds applying.
func (r *Replica) turnTo(chunk int64, old *chunkEntry, phys uint32) {
	f, was := r.flips[chunk]
	if was {
		r.d.alloc.later(f.phys)
	} else if old.typ == chunkMapped {
		r.unkeep(old.phys)
		f.spare, f.has = old.phys, true
	}
	f.phys = phys
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
		return f.spare, nil
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
	case now.typ != chunkMapped || now.phys != f.spare:
		r.d.alloc.later(f.spare)
	}
}

// dropFlips frees all second places. Under mu; the caller holds applying.
func (r *Replica) dropFlips() {
	for _, f := range r.flips {
		if f.has {
			r.d.alloc.later(f.spare)
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
func (r *Replica) settleFresh(was, applied holdfast.Seq) (spares []uint32) {
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
			spares = append(spares, f.spare)
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
	return spares
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

// syncData makes the fresh chunks durable that records in the log refer to.
func (w *wal) syncData() error {
	w.mu.Lock()
	to, done := w.freshTo, w.dataTo
	w.mu.Unlock()
	if w.data == nil || to <= done || mutant == "dur_without_data_sync" {
		return nil
	}
	if err := w.data.Sync(); err != nil {
		return holdfast.Errorf(holdfast.ErrIO, "sync fresh chunks: %w", err)
	}
	w.dataSynced(to)
	return nil
}

// freshSerial returns the serial of the last record with fresh chunks.
func (w *wal) freshSerial() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.freshTo
}

// dataSynced notes that the image was synced after the record of the serial was
// written.
func (w *wal) dataSynced(to uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.dataTo = max(w.dataTo, to)
}

// freshMatches compares fresh chunks, read from the medium, with the checksums of a
// write at off.
func (d *Disk) freshMatches(off int64, fresh, crc []uint32) (bool, error) {
	for _, c := range fresh {
		if int64(c) >= d.alloc.chunks {
			return false, nil
		}
	}
	buf := d.wideBuffer()
	defer d.wide.Put(buf)
	crc = crc[leadBlocks(off):]
	for i := 0; i < len(fresh); {
		n := runOfChunks(fresh[i:])
		b := (*buf)[:n*chunkSize]
		if _, err := d.main.ReadDirectAt(b, d.chunkOffset(fresh[i])); err != nil {
			return false, holdfast.Errorf(holdfast.ErrIO, "read chunk %d: %w", fresh[i], err)
		}
		if !payloadMatches(crc[i*blocksPerChunk:(i+n)*blocksPerChunk], b) {
			return false, nil
		}
		i += n
	}
	return true, nil
}

// endAtLostChunks ends the log at the first record whose fresh chunks do not match and
// of which nothing says that it was durable. No checkpoint in this log has let go of
// any chunk that is looked at: its record would say that it was durable.
func (d *Disk) endAtLostChunks(log *scannedLog) {
	for i := range log.recs {
		f := &log.recs[i]
		if f.serial <= log.durable || f.freshBytes() == 0 {
			continue
		}
		ok, err := d.freshMatches(f.off, f.freshChunks(), f.crc)
		if err != nil { // a sector that a crash tore may be unreadable
			d.log.Warn("chunks of the log's end are unreadable", "replica", f.replica.String(), "seq", uint64(f.seq), "error", err)
		}
		if err != nil || !ok {
			log.cut = true // fresh chunks are written before their record
			log.recs = log.recs[:i]
			return
		}
		log.looked = true
	}
}

// sealFresh has the superblock say how far the log is durable, before chunks may be
// written of entries that the log drops: the scan after a crash must not look at them
// again.
func (d *Disk) sealFresh(log *scannedLog) error {
	if !log.looked {
		return nil
	}
	d.super.walDurable = d.wal.serial
	if err := writeSuperblock(d.main, d.super); err != nil {
		return d.fail(err)
	}
	return nil
}

// claim takes the fresh chunks of an entry above the checkpoint into use. One that does
// not match was durable: its bytes are lost.
func (p *replay) claim(r *Replica, e *logEntry) {
	if e.fresh == nil {
		return
	}
	n := 0
	if !e.bad {
		ok, err := p.d.freshMatches(e.off, e.fresh, e.crc)
		for err == nil && ok && n < len(e.fresh) && p.d.alloc.use(int64(e.fresh[n])) {
			n++
		}
		if n == len(e.fresh) {
			return
		}
		p.log.lost = append(p.log.lost, lostChunks{r.desc.Replica, e.seq, Range{e.off, e.length}})
	}
	p.d.alloc.giveBack(e.fresh[:n])
	e.bad, e.fresh = true, nil
}

// foundInstall is an install above the checkpoint.
type foundInstall struct {
	*found
	taken bool // its fresh chunk is in use for it
	whole bool // and all of it matches
}

// claimInstall does the same for an install. What matches is not lost.
func (p *replay) claimInstall(r *Replica, f *foundInstall) {
	fresh := f.freshChunks()
	if fresh == nil {
		return
	}
	ok, err := p.d.freshMatches(f.off, fresh, f.crc)
	f.taken = int64(fresh[0]) < p.d.alloc.chunks && p.d.alloc.use(int64(fresh[0]))
	f.whole = f.taken && err == nil && ok
	if !f.whole {
		p.log.lost = append(p.log.lost, lostChunks{r.desc.Replica, f.seq, Range{f.off, f.length}})
	}
}

// lostChunks is an entry whose fresh chunks were durable and do not match.
type lostChunks struct {
	replica holdfast.ReplicaID
	seq     holdfast.Seq
	Range
}
