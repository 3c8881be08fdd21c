package disk

import (
	"hash/crc32"

	"github.com/holdfast-storage/holdfast"
)

// Append logs entries. The first must be the one after the tail, the rest
// follow without gaps (R1; else a *GapError, nothing logged); epochs never fall
// along the log and none is above the fence (ErrInvalid). The payload of a
// write must match its crcs (ErrIntegrity, nothing logged).
//
// On return all are received: write(2) has returned for them and everything
// before them. With ErrNoSpace for want of a chunk nothing was logged (Reserve
// makes sure beforehand); with that of a log full of uncommitted entries a first part of the entries may have been logged;
// Status().Tail tells. Any other error after that is the disk's failure. While
// the log is full of entries that can be applied, Append waits.
// The slices belong to the caller again on return.
func (r *Replica) Append(entries []Entry) error {
	if len(entries) == 0 {
		return nil
	}
	crcs, grows := 0, int64(0)
	for i := range entries {
		e := &entries[i]
		if err := r.check(e); err != nil {
			return err
		}
		if !e.large() { // else on its way to fresh chunks
			if err := r.checkSums(e, 0, len(e.CRC)); err != nil {
				return err
			}
		}
		crcs += len(e.CRC)
		if e.large() {
			grows += e.Length / largeDiscount
		} else {
			grows += int64(len(e.Payload))
		}
	}
	if r.d.readOnly != nil {
		return r.d.readOnly
	}
	r.d.slow(r, grows)
	r.order.Lock()
	defer r.order.Unlock()
	if err := r.d.makeRoom(r); err != nil {
		return err
	}
	for squeezed := false; ; {
		n, pages, err := r.admit(entries)
		if err == errBare {
			if err = r.d.grow(n, pages); err == nil {
				continue
			}
			err = holdfast.Errorf(holdfast.KindOf(err), "log entry %d of replica %v: %w", entries[0].Seq, r.desc.Replica, err)
		}
		if holdfast.KindOf(err) == holdfast.ErrNoSpace && !squeezed && r.d.wouldFree() {
			if squeezed, err = true, r.d.squeeze(r); err == nil {
				continue
			}
		}
		if err != nil {
			return err
		}
		break
	}
	return r.logFresh(entries, crcs)
}

// check looks at what concerns one entry alone, but not at its checksums.
func (r *Replica) check(e *Entry) error {
	bad := func(what string) error {
		return holdfast.Errorf(holdfast.ErrInvalid, "entry %d of replica %v: %s at %d, %d bytes: %s", e.Seq, r.desc.Replica, e.Type, e.Offset, e.Length, what)
	}
	if e.Offset < 0 || e.Length <= 0 || e.Offset%blockSize != 0 || e.Length%blockSize != 0 || e.Length > r.desc.Size || e.Offset > r.desc.Size-e.Length {
		return bad("not whole blocks within the segment")
	}
	switch e.Type {
	case OpWrite:
		if e.Length > holdfast.MaxOpSize || int64(len(e.Payload)) != e.Length || int64(len(e.CRC)) != e.Length/blockSize {
			return bad("payload or checksums do not fit")
		}
	case OpZero, OpTrim:
		if len(e.Payload) != 0 || len(e.CRC) != 0 {
			return bad("it carries a payload")
		}
	default:
		return bad("unknown type")
	}
	return nil
}

// checkSums compares blocks [from, to) of a write with their checksums.
func (r *Replica) checkSums(e *Entry, from, to int) error {
	for i := from; i < to; i++ {
		if got := crc32.Checksum(e.Payload[i*blockSize:(i+1)*blockSize], castagnoli); got != e.CRC[i] {
			return holdfast.Errorf(holdfast.ErrIntegrity, "entry %d of replica %v: block %d has checksum %08x, not %08x",
				e.Seq, r.desc.Replica, e.Offset/blockSize+int64(i), got, e.CRC[i])
		}
	}
	return nil
}

// admit checks the entries against the log and promises them chunks. With
// errBare it says for how many chunks and map pages space must be taken first.
func (r *Replica) admit(entries []Entry) (chunks, newPages int64, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.usable(); err != nil {
		return 0, 0, err
	}
	last := holdfast.Epoch(0)
	if n := len(r.tails); n > 0 {
		last = r.tails[n-1].Epoch
	}
	for i := range entries {
		e := &entries[i]
		if e.Seq != r.tail+1+holdfast.Seq(i) {
			return 0, 0, &GapError{Wanted: e.Seq, First: r.first(), Tail: r.tail}
		}
		if e.Epoch > r.fence || e.Epoch < last {
			return 0, 0, holdfast.Errorf(holdfast.ErrInvalid, "entry %d of replica %v: epoch %d, with the log at epoch %d and the fence at %d",
				e.Seq, r.desc.Replica, e.Epoch, last, r.fence)
		}
		last = e.Epoch
	}
	var fresh []int64
	r.spent, r.added = 0, nil
	for i := range entries {
		e := &entries[i]
		if e.Type != OpWrite {
			continue
		}
		for c := e.Offset / chunkSize; c <= (e.Offset+e.Length-1)/chunkSize; c++ {
			if !r.hasPlace(c) {
				r.reserved[c] = struct{}{}
				fresh = append(fresh, c)
			}
		}
	}
	if len(fresh) > 0 {
		pages := r.addPages(fresh)
		k := min(int64(len(fresh)), r.credit.Load())
		err := r.d.alloc.exchange(k, k*r.creditPages(), int64(len(fresh)), int64(len(pages)))
		if err == nil {
			r.credit.Add(-k)
			r.spent, r.added = k, pages
		} else {
			r.dropPages(pages)
			for _, c := range fresh {
				delete(r.reserved, c)
			}
			if err == errBare {
				return int64(len(fresh)) - k, int64(len(pages)), err
			}
			return 0, 0, holdfast.Errorf(holdfast.ErrNoSpace, "log entry %d of replica %v: %w", entries[0].Seq, r.desc.Replica, err)
		}
	}
	r.inflight = entries
	return 0, 0, nil
}

// regret undoes the last admit, of entries of which none was logged: what came out of
// the credit is credit again. Under mu.
func (r *Replica) regret(entries []Entry) {
	r.inflight = nil
	r.d.alloc.promise(r.spent, r.spent*r.creditPages())
	r.credit.Add(r.spent)
	r.dropPromises(entries)
	before := len(r.newPages)
	r.dropPages(r.added)
	r.d.alloc.needs(int64(len(r.newPages) - before))
	r.spent, r.added = 0, nil
}

// addPages notes which pages the map will need for chunks beside those that it
// has or that were noted before, and returns them. Under mu.
func (r *Replica) addPages(chunks []int64) []pageKey {
	var added []pageKey
	for _, c := range chunks {
		r.tree.path(c, func(p pageKey) {
			if _, ok := r.newPages[p]; !ok && r.tree.ref(p).page < 0 {
				r.newPages[p] = struct{}{}
				added = append(added, p)
			}
		})
	}
	return added
}

func (r *Replica) dropPages(pages []pageKey) {
	for _, p := range pages {
		delete(r.newPages, p)
	}
}

// countPages counts anew what the map will need, now that a checkpoint has
// written what it needed until now. Under mu, while nothing saves the map.
func (r *Replica) countPages() {
	before := len(r.newPages)
	clear(r.newPages)
	for c := range r.reserved {
		r.addPages([]int64{c})
	}
	r.d.alloc.needs(int64(len(r.newPages) - before))
}

// logEntries writes the admitted entries to the log and indexes them. fresh tells, for
// each that has them, the chunks that hold its whole ones already.
func (r *Replica) logEntries(entries []Entry, crcs int, fresh [][]uint32) error {
	made := make([]logEntry, len(entries))
	sums := make([]uint32, 0, crcs)
	req := &r.req
	req.recs, req.class = req.recs[:0], classEntry
	for i := range entries {
		e, m := &entries[i], &made[i]
		*m = logEntry{epoch: e.Epoch, seq: e.Seq, commit: e.Commit, typ: recordType(e.Type), off: e.Offset, length: e.Length}
		n := len(sums)
		sums = append(sums, e.CRC...)
		m.crc = sums[n:len(sums):len(sums)]
		rec := record{
			typ: m.typ, replica: r.desc.Replica, epoch: e.Epoch, seq: e.Seq, commit: e.Commit,
			off: e.Offset, length: e.Length, crc: m.crc, payload: e.Payload,
		}
		if fresh != nil && fresh[i] != nil {
			m.fresh = fresh[i]
			rec.refer(m.fresh)
		}
		req.recs = append(req.recs, rec)
	}
	reclaimed := false
	for {
		r.begin()
		req.where, req.done, req.err = req.where[:0], 0, nil
		err := r.d.wal.submit(req)
		r.mu.Lock()
		for i := 0; i < req.done; i++ {
			m := &made[i]
			m.serial, m.slot, m.pos = req.where[i].serial, req.where[i].slot, req.where[i].pos
			r.push(m)
		}
		r.reflect(req)
		if req.done > 0 {
			reclaimed = false
		}
		made, entries = made[req.done:], entries[req.done:]
		r.inflight = entries
		if len(entries) == 0 || err != errWALFull || reclaimed {
			r.inflight = nil
			r.dropPromises(entries)
			r.dropUnlogged(made)
			r.mu.Unlock()
			clear(req.recs) // no reference to the caller's payload stays
			if err != nil {
				return holdfast.Errorf(holdfast.KindOf(noSpace(err)), "log an entry of replica %v: %w", r.desc.Replica, noSpace(err))
			}
			return nil
		}
		r.mu.Unlock()
		req.recs = req.recs[:copy(req.recs, req.recs[req.done:])]
		room, err := r.d.reclaim(r)
		if err != nil {
			r.mu.Lock()
			r.inflight = nil
			r.dropPromises(entries)
			r.dropUnlogged(made)
			r.mu.Unlock()
			return err
		}
		reclaimed = !room
	}
}

// begin notes that records are about to be written whose effect is not yet
// reflected; see needsFrom.
func (r *Replica) begin() {
	r.mu.Lock()
	r.submitting, r.submitLow = true, r.d.wal.written()
	r.mu.Unlock()
}

// reflect notes that the request's records are reflected. Under mu.
func (r *Replica) reflect(req *walRequest) {
	r.submitting = false
	if req.done > 0 {
		r.lastSerial = req.where[req.done-1].serial
	}
}

// push makes a logged entry part of the log. Under mu.
func (r *Replica) push(e *logEntry) {
	r.index.push(e)
	r.tail = e.seq
	r.startEpoch(e.epoch, e.seq)
	r.mark(e.serial, e.commit)
	r.commit = max(r.commit, e.commit)
}

func (r *Replica) startEpoch(epoch holdfast.Epoch, first holdfast.Seq) {
	if n := len(r.tails); n > 0 && r.tails[n-1].Epoch == epoch {
		return
	}
	if len(r.tails) == MaxEpochTails {
		r.tails = append(r.tails[:0], r.tails[1:]...)
	}
	r.tails = append(r.tails, EpochStart{epoch, first})
}

// dropPromises gives back the chunks promised to entries that were not logged,
// unless logged ones need them. Under mu.
func (r *Replica) dropPromises(entries []Entry) {
	for i := range entries {
		if entries[i].Type != OpWrite {
			continue
		}
		for c := entries[i].Offset / chunkSize; c <= (entries[i].Offset+entries[i].Length-1)/chunkSize; c++ {
			if r.index.chunks[c] == nil {
				r.dropPromise(c)
			}
		}
	}
}

// dropPromise gives back what was promised to a chunk, unless one in a fresh place counts
// on it. Under mu.
func (r *Replica) dropPromise(chunk int64) {
	if f, ok := r.flips[chunk]; ok && !f.has {
		return
	}
	if _, ok := r.reserved[chunk]; ok {
		delete(r.reserved, chunk)
		r.d.alloc.release(1)
	}
}
