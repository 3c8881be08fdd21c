package disk

import "github.com/holdfast-storage/holdfast"

// Entries that wait for their commit keep their place in the log from being
// used again, and everything written after them as well. The tail of a volume
// that nobody attaches would so fill the log of all. So a checkpoint logs the
// entries that have become older than half the log once more, at its head: the
// same epochs and seqs in new records, which refer to the same fresh chunks. Until
// the checkpoint that follows is durable, the old records stay.

// relogBatch bounds the memory that logging again takes.
const relogBatch = 4 << 20

// relogOld logs old uncommitted entries again, and says how many bytes of the log that
// took. held is the replica whose order the caller holds, if any; one that is busy is
// left for the next time. A log that has no room for it stays as it is.
func (d *Disk) relogOld(held *Replica) (took int64, err error) {
	for _, r := range d.Replicas() {
		if r != held && !r.order.TryLock() {
			continue
		}
		some, err := r.relog()
		if r != held {
			r.order.Unlock()
		}
		took += some
		if err == errWALFull {
			break
		}
		if err != nil {
			return took, err
		}
	}
	return took, nil
}

// relog logs this replica's old entries again. The caller holds order, so none
// of them is truncated while its new record is written: that record would bring
// it back.
func (r *Replica) relog() (took int64, err error) {
	for old := r.oldEntries(); len(old) > 0; {
		n, err := r.relogSome(old)
		for _, e := range old[:n] {
			took += e.recordBytes()
		}
		if err != nil {
			return took, err
		}
		old = old[n:]
	}
	return took, nil
}

// oldEntries returns the entries that are to be logged again: none if they are
// more than a quarter of the log, which moving them would only churn.
func (r *Replica) oldEntries() []*logEntry {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if r.deleted || r.damaged != nil {
		return nil
	}
	var old []*logEntry
	total := int64(0)
	for s := max(r.applied, r.appliable()) + 1; s <= r.tail; s++ { // those before are about to be applied
		if e := r.index.get(s); r.d.wal.isOld(e) {
			if e.bad {
				return nil // what is left of its record is all there is
			}
			old = append(old, e)
			total += recordFixed + int64(len(e.crc))*(4+blockSize)
		}
	}
	if total > r.d.wal.size()/4 {
		return nil
	}
	return old
}

// relogSome logs the first of the entries again and returns how many.
func (r *Replica) relogSome(old []*logEntry) (int, error) {
	req := walRequest{class: classRelog}
	total := 0
	for _, e := range old {
		if total += len(e.crc)*blockSize - len(e.fresh)*chunkSize; total > relogBatch && len(req.recs) > 0 {
			break
		}
		rec := record{
			typ: e.typ, flags: flagRelogged, replica: r.desc.Replica, epoch: e.epoch, seq: e.seq, commit: e.commit,
			off: e.off, length: e.length, crc: e.crc,
		}
		if e.typ == recWrite {
			err := r.referAgain(&rec, e)
			if holdfast.KindOf(err) == holdfast.ErrIntegrity {
				r.mu.Lock()
				e.bad = true // it stays where it is, and those that were to move with it
				r.mu.Unlock()
				return len(old), nil
			}
			if err != nil {
				return 0, err
			}
		}
		req.recs = append(req.recs, rec)
	}
	r.begin()
	err := r.d.wal.submit(&req)
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := 0; i < req.done; i++ {
		old[i].serial, old[i].slot, old[i].pos = req.where[i].serial, req.where[i].slot, req.where[i].pos
	}
	r.reflect(&req)
	if err != nil && err != errWALFull {
		return req.done, holdfast.Errorf(holdfast.KindOf(err), "log entries of replica %v again: %w", r.desc.Replica, err)
	}
	return req.done, err
}

// isOld reports whether half the slots or more were written to after an entry's record:
// those between its slot and the current one, unless a misdirected write has put it
// elsewhere.
func (w *wal) isOld(e *logEntry) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := 0
	for i := range w.slots {
		if i != int(e.slot) && (i == w.cur || w.slots[i].last > e.serial) {
			n++
		}
	}
	return 2*n >= len(w.slots)
}
