package disk

import (
	"context"
	"errors"
	"hash/crc32"

	"github.com/holdfast-storage/holdfast"
)

// Rebase makes the replica the target of a copy: its log is dropped, its tail
// is seq, whose entry counts as one of epoch, and its chunks stay as they are,
// to be replaced by InstallChunk. The live stream follows from seq+1. Durable
// on return. The epoch must not be above the fence (ErrInvalid), and seq not
// below Status().Floor (ErrRefused): a join point is at least what was committed,
// so a lower one belongs to another history.
//
// A damaged replica loses its chunks too and is sound again, and empty: what it
// held is not known.
func (r *Replica) Rebase(epoch holdfast.Epoch, seq holdfast.Seq) error {
	anew, err := r.rebaseOrAnew(epoch, seq)
	if anew && err == nil {
		r.d.releaseSoon()
	}
	return err
}

func (r *Replica) rebaseOrAnew(epoch holdfast.Epoch, seq holdfast.Seq) (anew bool, err error) {
	if seq > maxSeq {
		return false, holdfast.Errorf(holdfast.ErrInvalid, "rebase replica %v to %d: no log is so long", r.desc.Replica, seq)
	}
	r.order.Lock()
	defer r.order.Unlock()
	if !r.isDamaged() {
		if err := r.rebaseSound(epoch, seq); err == nil || !r.isDamaged() {
			return false, err
		} // found on the way
	}
	return true, r.beginAnew(epoch, seq)
}

// beginAnew drops all that a damaged replica holds. The caller holds order.
func (r *Replica) beginAnew(epoch holdfast.Epoch, seq holdfast.Seq) error {
	r.d.gate.RLock()
	defer r.d.gate.RUnlock()
	r.applying.Lock()
	defer r.applying.Unlock()
	r.mu.RLock()
	err, fence := r.alive(), r.fence
	r.mu.RUnlock()
	if err == nil && epoch > fence {
		err = holdfast.Errorf(holdfast.ErrInvalid, "epoch %d is above its fence %d", epoch, fence)
	}
	var old *tree
	if err == nil {
		err = r.change(record{typ: recRebase, flags: flagAnew, epoch: epoch, seq: seq}, true, func() { old = r.anew(epoch, seq) })
	}
	if err != nil {
		return holdfast.Errorf(holdfast.KindOf(err), "begin replica %v anew at %d: %w", r.desc.Replica, seq, err)
	}
	r.release(old)
	r.uncounted = nil
	r.d.log.Warn("a damaged replica begins anew", "replica", r.desc.Replica.String(), "seq", uint64(seq))
	return nil
}

// anew is the effect of a REBASE that drops everything; it returns the map that
// is to be released. Under mu, or during recovery.
func (r *Replica) anew(epoch holdfast.Epoch, seq holdfast.Seq) *tree {
	old := r.empty()
	r.rebase(epoch, seq)
	r.damaged, r.intact, r.asOf = nil, false, 0
	r.bad.clear()
	clear(r.mapping)
	return old
}

// rebaseSound is Rebase of a replica that is not damaged. The caller holds order.
func (r *Replica) rebaseSound(epoch holdfast.Epoch, seq holdfast.Seq) error {
	if err := r.catchUp(); err != nil {
		return err
	}
	r.mu.Lock()
	err, fence, low := r.usable(), r.fence, r.lowest()
	if err == nil && epoch <= fence && seq >= low {
		r.limit = 0 // nothing more gets into chunks from the old log
	}
	r.mu.Unlock()
	if err != nil {
		return err
	}
	if seq < low {
		return holdfast.Errorf(holdfast.ErrRefused, "rebase replica %v to %d: its chunks may hold entries up to %d", r.desc.Replica, seq, low)
	}
	if epoch > fence {
		return holdfast.Errorf(holdfast.ErrInvalid, "rebase replica %v in epoch %d: its fence is at %d", r.desc.Replica, epoch, fence)
	}
	defer r.lift()
	// After a crash nothing of the dropped log is applied again, so the chunks
	// must be as the map has them before it is dropped.
	if err := r.d.checkpoint(r, true); err != nil {
		return holdfast.Errorf(holdfast.KindOf(err), "rebase replica %v to %d: %w", r.desc.Replica, seq, err)
	}
	r.d.gate.RLock()
	defer r.d.gate.RUnlock()
	r.applying.Lock()
	defer r.applying.Unlock()
	err = r.change(record{typ: recRebase, epoch: epoch, seq: seq}, true, func() { r.rebase(epoch, seq) })
	if err != nil {
		return holdfast.Errorf(holdfast.KindOf(err), "rebase replica %v to %d: %w", r.desc.Replica, seq, err)
	}
	return nil
}

// rebase is the effect of a REBASE record. Under mu, or during recovery.
func (r *Replica) rebase(epoch holdfast.Epoch, seq holdfast.Seq) {
	r.d.alloc.release(int64(len(r.reserved)))
	r.reserved = map[int64]struct{}{} // what the map will need is counted anew by the next checkpoint
	r.dropFresh(r.applied)
	clear(r.kept)
	r.index = newLogIndex()
	r.index.indexed = seq
	r.tail, r.dur, r.applied, r.floor, r.ckpt = seq, seq, seq, seq, seq
	r.tails, r.badEntry = nil, 0
	if seq > 0 {
		r.tails = []EpochStart{{epoch, seq}}
	}
}

// Chunks lists the chunks above index after (-1 for all) that an entry above
// seq touched (0: that any entry touched), whether or not they hold data still,
// ascending, at most max: as of the applied entry, so a source lists them after
// Apply has reached the join point (protocol, section 8). What is known of the
// leaves of the map keeps it from reading those without such a chunk.
func (r *Replica) Chunks(seq holdfast.Seq, after int64, max int) ([]ChunkRef, error) {
	if err := r.catchUp(); err != nil {
		return nil, err
	}
	r.mu.RLock()
	err, of := r.usable(), r.tree
	r.mu.RUnlock()
	if err != nil {
		return nil, err
	}
	var refs []ChunkRef
	done := errors.New("enough")
	err = r.eachLeaf(seq, after+1, maxSegment/chunkSize, func(l *leaf) error {
		r.mu.RLock()
		defer r.mu.RUnlock()
		for k := range l.entries {
			c, e := l.index*leafEntries+int64(k), &l.entries[k]
			if c <= after || e.typ == chunkAbsent || e.lastSeq <= seq && seq != 0 {
				continue
			}
			if len(refs) == max {
				return done
			}
			refs = append(refs, ChunkRef{Index: c, LastSeq: e.lastSeq, Mapped: e.typ == chunkMapped})
		}
		return nil
	})
	if err == done {
		err = nil
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	if err == nil {
		err = r.usable()
	}
	if err == nil && r.tree != of {
		err = holdfast.Errorf(holdfast.ErrRefused, "list chunks of replica %v: it began anew meanwhile", r.desc.Replica)
	}
	return refs, err
}

// catchUp applies what chunks may hold already from before the last crash, so
// that the map says what is in them.
func (r *Replica) catchUp() error {
	if r.d.readOnly != nil {
		return r.d.readOnly
	}
	r.mu.RLock()
	behind, floor := r.applied < r.floor, r.floor
	r.mu.RUnlock()
	if !behind {
		return nil
	}
	_, err := r.Apply(context.Background(), floor)
	return err
}

// ReadChunk returns a chunk as of the applied entry, which it names. A chunk
// that was never written is all zero. A block that cannot be read, or does not
// match, also when read from the medium, is BlockBad, with the checksum that it
// should have; one known to be lost is BlockPoison.
func (r *Replica) ReadChunk(index int64) (Chunk, error) {
	if index < 0 || index > (r.desc.Size-1)/chunkSize {
		return Chunk{}, holdfast.Errorf(holdfast.ErrInvalid, "read chunk %d of replica %v: it has %d bytes", index, r.desc.Replica, r.desc.Size)
	}
	if err := r.catchUp(); err != nil {
		return Chunk{}, err
	}
	r.applying.Lock()
	defer r.applying.Unlock()
	r.mu.RLock()
	asOf, err := r.applied, r.usable()
	r.mu.RUnlock()
	if err != nil {
		return Chunk{}, err
	}
	e, err := r.lookupChunk(index)
	if err != nil {
		return Chunk{}, err
	}
	// An installed chunk may be ahead of what is applied to others.
	c := Chunk{Index: index, LastSeq: e.lastSeq, AsOf: max(asOf, e.asOf)}
	if e.typ != chunkMapped {
		return c, nil
	}
	for i := range c.State {
		c.State[i] = e.state(int64(i))
		if c.State[i] == BlockData && c.Data == nil {
			c.Data = make([]byte, chunkSize)
		}
	}
	if c.Data == nil {
		return c, nil
	}
	err = r.readChunk(&c, &e)
	return c, err
}

// readChunk reads the blocks of a chunk that hold data, each from the medium if
// it does not match. The caller holds applying.
func (r *Replica) readChunk(c *Chunk, e *chunkEntry) error {
	_, failed := r.d.main.ReadAt(c.Data, r.d.chunkOffset(e.phys))
	bad := uint16(0)
	for i, s := range c.State {
		b := c.Data[i*blockSize : (i+1)*blockSize]
		if s == BlockPoison {
			bad |= 1 << i
		}
		if s != BlockData {
			clear(b)
			continue
		}
		c.CRC[i] = e.crc[i]
		if failed == nil && crc32.Checksum(b, castagnoli) == e.crc[i] {
			continue
		}
		src := source{kind: fromChunk, phys: e.phys, pos: int64(i) * blockSize}
		if err := r.d.fetch(b, src, true); err == nil && crc32.Checksum(b, castagnoli) == e.crc[i] {
			continue
		}
		if err := r.d.failed(); err != nil {
			return err
		}
		clear(b)
		c.State[i] = BlockBad
		bad |= 1 << i
	}
	r.bad.keep(c.Index, bad)
	if bad != 0 {
		r.found(c.Index, bad)
	}
	return nil
}

// InstallChunk replaces a chunk by what a source read as of entry c.AsOf, with
// one WAL record; received on return, durable with the next Sync. A chunk that is data
// all over is written to its place before, and not to the log (fresh.go). Logged
// entries above AsOf stay in force, those up to it are in the chunk (R11). A
// chunk of all zero states frees the chunk. It is refused (ErrRefused) with
// AsOf below Status().Checkpoint, where entries above AsOf may be gone from
// the log; that AsOf is at least the join point and at most commit is the
// caller's to see to. ErrNoSpace and ErrIntegrity as for Append.
func (r *Replica) InstallChunk(c Chunk) error {
	rec, err := r.checkInstall(&c)
	if err != nil {
		return err
	}
	if r.d.readOnly != nil {
		return r.d.readOnly
	}
	cost := int64(chunkSize)
	if c.whole() {
		cost /= largeDiscount
	}
	r.d.slow(r, cost)
	r.order.Lock()
	defer r.order.Unlock()
	if err := r.d.makeRoom(r); err != nil {
		return err
	}
	var fresh []uint32
	if c.whole() {
		fresh = r.d.takeFresh(1)
	}
	if fresh != nil {
		if err := r.d.writePast(c.Data, fresh[0]); err != nil {
			return err
		}
		defer func() {
			if fresh != nil { // nothing refers to it
				r.d.alloc.giveBack(fresh)
			}
		}()
	}
	for reclaimed := false; ; {
		flipped, err := r.installOnce(&c, rec, fresh)
		if flipped {
			fresh = nil
		}
		if err == nil {
			return nil
		}
		if err == errBare {
			if err = r.d.grow(1, r.creditPages()); err == nil {
				reclaimed = false
				continue
			}
		}
		if err != errWALFull || reclaimed {
			return holdfast.Errorf(holdfast.KindOf(noSpace(err)), "install chunk %d of replica %v: %w", c.Index, r.desc.Replica, noSpace(err))
		}
		room, err := r.d.reclaim(r)
		if err != nil {
			return err
		}
		reclaimed = !room
	}
}

// whole says whether all blocks of the chunk are data.
func (c *Chunk) whole() bool {
	for _, s := range c.State {
		if s != BlockData {
			return false
		}
	}
	return true
}

// checkInstall checks a chunk and makes its record.
func (r *Replica) checkInstall(c *Chunk) (record, error) {
	rec := record{typ: recInstall, replica: r.desc.Replica, off: c.Index * chunkSize, length: chunkSize}
	bad := func(kind holdfast.Kind, what string) (record, error) {
		return rec, holdfast.Errorf(kind, "install chunk %d of replica %v: %s", c.Index, r.desc.Replica, what)
	}
	if c.Index < 0 || c.Index > (r.desc.Size-1)/chunkSize || len(c.Data) != 0 && len(c.Data) != chunkSize {
		return bad(holdfast.ErrInvalid, "not a chunk of this segment")
	}
	for i, s := range c.State {
		switch {
		case s > BlockPoison:
			return bad(holdfast.ErrInvalid, "unknown block state")
		case s != BlockData:
			continue
		case c.Data == nil:
			return bad(holdfast.ErrInvalid, "it has no data")
		}
		b := c.Data[i*blockSize : (i+1)*blockSize]
		if crc32.Checksum(b, castagnoli) != c.CRC[i] {
			return bad(holdfast.ErrIntegrity, "a block does not match its checksum")
		}
		rec.crc = append(rec.crc, c.CRC[i])
		rec.payload = append(rec.payload, b...)
	}
	rec.extra = encodeInstall(c)
	rec.epoch, rec.seq = 0, c.AsOf
	return rec, nil
}

// installOnce logs and installs, by way of the fresh chunk that holds it already, if
// there is one and no applied entry lies above it: flipped says whether. The caller holds
// order.
func (r *Replica) installOnce(c *Chunk, rec record, fresh []uint32) (flipped bool, err error) {
	r.d.gate.RLock()
	defer r.d.gate.RUnlock()
	r.applying.Lock()
	defer r.applying.Unlock()
	r.mu.RLock()
	err, ckpt := r.usable(), r.ckpt
	_, promised := r.reserved[c.Index]
	applied, _ := r.appliedAbove(c)
	r.mu.RUnlock()
	if err != nil {
		return false, err
	}
	old, err := r.lookupChunk(c.Index)
	switch {
	case err != nil:
		return false, err
	case c.AsOf < ckpt:
		return false, holdfast.Errorf(holdfast.ErrRefused, "it is as of entry %d, and the log before entry %d may be gone", c.AsOf, ckpt)
	case c.AsOf < old.asOf:
		return false, holdfast.Errorf(holdfast.ErrRefused, "it is as of entry %d, older than what was installed as of %d", c.AsOf, old.asOf)
	}
	needs := packStates(&c.State) != 0
	flipped = fresh != nil && !applied
	// A place is promised: what is taken now, or the second one of a chunk in a fresh one
	// that had none.
	places := int64(0)
	if !promised && (needs && !flipped || flipped && old.typ != chunkMapped) {
		places = 1
	}
	if places > 0 || !needs && old.typ != chunkMapped { // its entry may need a page all the same
		if err := r.promisePlace(c.Index, places); err != nil {
			return false, err
		}
	}
	var phys uint32
	switch {
	case flipped:
		rec.payload = nil
		rec.list(fresh)
		if places > 0 {
			r.mu.Lock()
			r.reserved[c.Index] = struct{}{}
			r.mu.Unlock()
		}
	case needs:
		if phys, err = r.d.alloc.take(true); err != nil {
			return false, err
		}
		if promised {
			r.mu.Lock()
			delete(r.reserved, c.Index)
			r.mapping[c.Index] = struct{}{}
			r.mu.Unlock()
		}
	}
	req := &r.req
	req.recs = append(req.recs[:0], rec)
	req.where, req.done, req.err, req.class = req.where[:0], 0, nil, classEntry
	r.begin()
	err = r.d.wal.submit(req)
	logged := err == nil
	r.mu.Lock()
	r.reflect(req)
	r.mu.Unlock()
	clear(req.recs)
	switch {
	case !logged:
	case flipped:
		err = r.flipInstalled(c, fresh[0], req.where[0].serial)
	default:
		err = r.replaceChunk(c, phys)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.mapping)
	switch {
	case err == nil:
	case flipped:
		if places > 0 {
			r.dropPromise(c.Index)
		}
		if logged { // the map does not refer to it, but the record does
			r.d.alloc.later(fresh[0])
		}
		return logged, err
	case needs: // nothing refers to the new chunk
		r.d.alloc.later(phys)
		if promised {
			r.d.alloc.promise(1, 0)
			r.reserved[c.Index] = struct{}{}
		}
	}
	return flipped, err
}

// promisePlace promises so many chunks, out of the credit first, and the pages of the map
// that an entry for a chunk needs.
func (r *Replica) promisePlace(chunk, places int64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	pages := r.addPages([]int64{chunk})
	k := min(places, r.credit.Load())
	if err := r.d.alloc.exchange(k, k*r.creditPages(), places, int64(len(pages))); err != nil {
		r.dropPages(pages)
		return err
	}
	r.credit.Add(-k)
	return nil
}

// appliedAbove returns the applied entries above an install's AsOf that changed its
// chunk, by block, and whether there are any. Under mu; the caller holds applying.
func (r *Replica) appliedAbove(c *Chunk) (any bool, p chunkPlan) {
	for i := range p.src {
		p.src[i] = r.index.newestIn(c.Index*blocksPerChunk+int64(i), c.AsOf, r.applied)
		if p.src[i] != nil {
			any = true
			p.last = max(p.last, p.src[i].seq)
		}
	}
	return any, p
}

// flipInstalled puts an installed chunk that is in its fresh place into the map. serial is
// its record's, 0 if that is durable. The caller holds applying, or recovers.
func (r *Replica) flipInstalled(c *Chunk, phys uint32, serial uint64) error {
	l, err := r.leaf(c.Index / leafEntries)
	if err != nil {
		return err
	}
	old := l.entries[c.Index%leafEntries]
	e := chunkEntry{typ: chunkMapped, phys: phys, states: packStates(&c.State), crc: c.CRC, lastSeq: c.LastSeq, asOf: c.AsOf}
	r.mu.Lock()
	r.turnTo(c.Index, &old, phys, serial)
	r.setChunk(l, c.Index, e, r.applied)
	r.foundLost()
	r.asOf = max(r.asOf, c.AsOf)
	r.mu.Unlock()
	return r.spill()
}

// replaceChunk writes an installed chunk to its fresh place, with the applied
// entries above AsOf upon it, and puts it into the map. The caller holds
// applying, or recovers.
func (r *Replica) replaceChunk(c *Chunk, phys uint32) error {
	l, err := r.leaf(c.Index / leafEntries)
	if err != nil {
		return err
	}
	old := l.entries[c.Index%leafEntries]
	e := chunkEntry{typ: chunkZero, lastSeq: c.LastSeq, asOf: c.AsOf}
	buf := r.d.buffer()
	defer r.d.buffers.Put(buf)
	var dirty [blocksPerChunk]bool
	if states := packStates(&c.State); states != 0 {
		e.typ, e.phys, e.states, e.crc = chunkMapped, phys, states, c.CRC
		for i, s := range c.State {
			if s == BlockData {
				dirty[i] = true
				copy((*buf)[i*blockSize:], c.Data[i*blockSize:(i+1)*blockSize])
			} else {
				e.crc[i] = 0
			}
		}
	}
	r.mu.Lock()
	if old.typ == chunkMapped {
		r.unkeep(old.phys)
	}
	applied := r.applied
	again, p := r.appliedAbove(c)
	r.mu.Unlock()
	if again {
		if e.typ == chunkZero && old.typ == chunkMapped {
			// Entries above AsOf put data here: the old place can take them, for
			// every block of it that they do not touch is zero now.
			place, err := r.place(c.Index, old.phys)
			if err != nil {
				return err
			}
			e.typ, e.phys = chunkMapped, place
		}
		more, err := r.merge(*buf, c.Index, &e, &p)
		if err != nil {
			return err
		}
		for i := range dirty {
			dirty[i] = dirty[i] && p.src[i] == nil || more[i]
		}
		e.lastSeq = max(e.lastSeq, p.last)
	}
	if err := r.d.writeBlocks(*buf, e.phys, dirty); err != nil {
		return err
	}
	r.mu.Lock()
	if old.typ == chunkMapped && !(e.typ == chunkMapped && e.phys == old.phys) {
		if e.typ == chunkZero && r.writePending(c.Index, applied) {
			e.typ, e.phys = chunkMapped, old.phys // a logged write counts on it
		} else {
			r.d.alloc.later(old.phys)
		}
	}
	r.leftFlip(c.Index, &e)
	r.setChunk(l, c.Index, e, applied)
	r.foundLost()
	r.asOf = max(r.asOf, c.AsOf)
	r.mu.Unlock()
	return r.spill()
}
