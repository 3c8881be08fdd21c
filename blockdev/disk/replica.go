package disk

import (
	"context"
	"hash/crc32"
	"math"
	"sync"
	"sync/atomic"

	"github.com/holdfast-storage/holdfast"
)

// Replica is one copy of one segment on a disk. All methods may be called
// concurrently; those that change the log take effect one after the other.
type Replica struct {
	d    *Disk
	desc ReplicaDesc

	order    sync.Mutex // one operation on the log at a time, across its I/O
	applying sync.Mutex // the apply lock (protocol, section 8), held across the I/O of a batch
	req      walRequest // of whoever holds order

	mu       sync.RWMutex
	fence    holdfast.Epoch
	tail     holdfast.Seq
	dur      holdfast.Seq // lower bound; see durable
	commit   holdfast.Seq
	marks    []commitMark // commits in the log that may not be durable yet
	durMark  holdfast.Seq // highest commit in the log known to be durable
	applied  holdfast.Seq
	floor    holdfast.Seq // chunks may hold entries up to here
	asOf     holdfast.Seq // the highest asOf of an installed chunk
	limit    holdfast.Seq // nothing above may be applied now: it is being truncated
	ckpt     holdfast.Seq
	tails    []EpochStart
	index    *logIndex
	tree     *tree                   // read and changed under mu, changed by who holds applying too
	reserved map[int64]struct{}      // chunks promised to logged writes
	newPages map[pageKey]struct{}    // map pages that promised chunks and changes since the last checkpoint add
	credit   atomic.Int64            // chunks promised to entries to come, changed under mu; see Reserve
	mapping  map[int64]struct{}      // chunks whose promise was taken, and which the map will have in a moment
	inflight []Entry                 // being logged now
	spent    int64                   // how much of the credit the last admit took
	added    []pageKey               // what it added to newPages
	kept     map[uint32]holdfast.Seq // chunks that still hold what an entry below the checkpoint wrote to them; see fresh.go

	intact      bool
	intactEpoch holdfast.Epoch
	intactBoot  string
	intactFiles uint64
	hintEpoch   holdfast.Epoch
	hintISR     holdfast.ISRVersion

	// lastSerial: every record of this replica up to here is reflected in the
	// fields above. submitting: records above submitLow may be written and not
	// yet reflected.
	lastSerial uint64
	submitting bool
	submitLow  uint64

	installed map[int64]*installedChunk // on a disk that is not written to; nil else

	damaged   error
	deleted   bool
	uncounted map[int64]struct{} // leaves whose chunks count as free; see space.recount

	// Of a released map: the next leaf, guarded by Disk.releasing; how many could not be
	// read; whose trim made it, nil if no trim did or it is of an earlier life.
	nextLeaf   int64
	lostLeaves int
	of         *Replica

	badEntry holdfast.Seq // the first that the open found to have lost bytes

	flips map[int64]flip // chunks that must not be written before the next checkpoint; guarded by applying, or gate

	bad  badBlocks
	lost map[int64]uint16 // blocks of chunks that an apply found lost in the log; guarded by applying
}

// commitMark says that the record of serial tells of commit.
type commitMark struct {
	serial uint64
	commit holdfast.Seq
}

// maxMarks bounds the marks; beyond it the newest takes the last one's place,
// which only makes it known to be durable later.
const maxMarks = 64

func newLogIndex() *logIndex { return &logIndex{chunks: map[int64]*chunkLog{}} }

func newReplica(d *Disk, desc ReplicaDesc) *Replica {
	return &Replica{
		d: d, desc: desc, limit: math.MaxUint64,
		index: newLogIndex(), tree: newTree(desc.Replica, desc.Size), reserved: map[int64]struct{}{}, mapping: map[int64]struct{}{},
		newPages: map[pageKey]struct{}{},
		flips:    map[int64]flip{}, kept: map[uint32]holdfast.Seq{},
	}
}

// alive returns why the replica's log cannot be written, or nil. Under mu.
func (r *Replica) alive() error {
	if r.deleted {
		return holdfast.Errorf(holdfast.ErrNotFound, "replica %v was deleted", r.desc.Replica)
	}
	return r.d.failed()
}

// usable returns why the replica cannot be used, or nil. Under mu.
func (r *Replica) usable() error {
	if r.damaged != nil && !r.deleted {
		return r.damaged
	}
	return r.alive()
}

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

// mark notes that a record tells of a commit. Under mu.
func (r *Replica) mark(serial uint64, commit holdfast.Seq) {
	n := len(r.marks)
	if commit <= r.durMark || n > 0 && commit <= r.marks[n-1].commit {
		return
	}
	if n == maxMarks {
		r.marks = r.marks[:n-1]
	}
	r.marks = append(r.marks, commitMark{serial, commit})
}

// loggedCommit is the highest commit that any record tells of. Under mu.
func (r *Replica) loggedCommit() holdfast.Seq {
	if n := len(r.marks); n > 0 {
		return r.marks[n-1].commit
	}
	return r.durMark
}

// settleDurable raises dur and durMark to what the WAL says. Under mu.
func (r *Replica) settleDurable() {
	durable := r.d.wal.durableSerial()
	for r.dur < r.tail {
		if e := r.index.get(r.dur + 1); e != nil && e.serial > durable {
			break
		}
		r.dur++
	}
	n := 0
	for n < len(r.marks) && r.marks[n].serial <= durable {
		r.durMark = max(r.durMark, r.marks[n].commit)
		n++
	}
	r.marks = append(r.marks[:0], r.marks[n:]...)
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

// lowest is the last entry whose bytes may be in chunks already. Under mu.
func (r *Replica) lowest() holdfast.Seq { return max(r.floor, r.asOf) }

// first is the oldest entry held. Under mu.
func (r *Replica) first() holdfast.Seq {
	if len(r.index.entries) > 0 {
		return r.index.entries[0].seq
	}
	return r.tail + 1
}

// Sync returns once every entry appended before the call is durable, and up to
// where the log is. Calls on all replicas of the disk share fdatasyncs. A
// cancelled context ends the wait with ErrTimeout.
func (r *Replica) Sync(ctx context.Context) (holdfast.Seq, error) {
	r.mu.RLock()
	serial, err := r.lastSerial, r.alive()
	r.mu.RUnlock()
	if err != nil {
		return 0, err
	}
	if err := r.d.wal.sync(ctx, serial); err != nil {
		return 0, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.settleDurable()
	return r.dur, nil
}

// change writes one control record, makes it and everything before it durable,
// and reflects it. The caller holds order.
func (r *Replica) change(rec record, durable bool, effect func()) error {
	rec.replica = r.desc.Replica
	r.req.recs = append(r.req.recs[:0], rec)
	r.req.where, r.req.done, r.req.err, r.req.class = r.req.where[:0], 0, nil, classFence
	r.begin()
	err := r.d.wal.submit(&r.req)
	if err == nil && durable {
		err = r.d.wal.sync(context.Background(), r.req.where[0].serial)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.reflect(&r.req)
	if err != nil {
		return noSpace(err)
	}
	effect()
	r.settleDurable()
	return nil
}

// insist is change, after a checkpoint has made room if the log is full: the
// reserve lasts for hundreds of records, not for ever.
func (r *Replica) insist(rec record, durable bool, effect func()) error {
	err := r.change(rec, durable, effect)
	if holdfast.KindOf(err) != holdfast.ErrNoSpace {
		return err
	}
	if _, rerr := r.d.reclaim(r); rerr != nil {
		return err
	}
	return r.change(rec, durable, effect)
}

// Fence raises the fence to epoch. On return the fence and the whole tail are
// durable (R4, R5: the seal). An epoch that is not above the present fence is
// refused with a *FenceError that names it. A damaged replica takes it as well:
// its writer is to hear of the damage.
func (r *Replica) Fence(epoch holdfast.Epoch) error {
	r.order.Lock()
	defer r.order.Unlock()
	r.mu.RLock()
	err, present := r.alive(), r.fence
	r.mu.RUnlock()
	if err != nil {
		return err
	}
	if epoch <= present {
		return &FenceError{Present: present, Asked: epoch}
	}
	if err := r.insist(record{typ: recFence, epoch: epoch}, true, func() { r.fence = epoch }); err != nil {
		return holdfast.Errorf(holdfast.KindOf(err), "fence replica %v at epoch %d: %w", r.desc.Replica, epoch, err)
	}
	return nil
}

// Truncate drops the entries above to; durable on return, together with all
// that is left. It is refused (ErrRefused) below Status().Floor: chunks may
// hold what it would drop. At or above the tail it only syncs.
func (r *Replica) Truncate(to holdfast.Seq) error {
	r.order.Lock()
	defer r.order.Unlock()
	r.mu.Lock()
	err, tail := r.usable(), r.tail
	floor := min(r.lowest(), tail)
	if err == nil && to >= floor {
		r.limit = to // nothing above gets into chunks while this goes on
	}
	serial := r.lastSerial
	r.mu.Unlock()
	switch {
	case err != nil:
		return err
	case to < floor:
		return holdfast.Errorf(holdfast.ErrRefused, "truncate replica %v to %d: its chunks may hold entries up to %d", r.desc.Replica, to, floor)
	}
	if to >= tail {
		err = r.d.wal.sync(context.Background(), serial)
	} else {
		err = r.insist(record{typ: recTrunc, seq: to}, true, func() { r.cut(to) })
	}
	r.lift()
	if err != nil {
		return holdfast.Errorf(holdfast.KindOf(err), "truncate replica %v to %d: %w", r.desc.Replica, to, err)
	}
	return nil
}

// lift ends a limit on what may be applied.
func (r *Replica) lift() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.limit = math.MaxUint64
}

// cut drops the entries above to from memory. Under mu.
func (r *Replica) cut(to holdfast.Seq) {
	r.dropFresh(to)
	r.index.cut(to, r.dropPromise)
	if r.badEntry > to {
		r.badEntry = 0
	}
	r.tail = min(r.tail, to)
	r.dur = min(r.dur, to)
	for n := len(r.tails); n > 0 && r.tails[n-1].First > to; n-- {
		r.tails = r.tails[:n-1]
	}
}

// SetCommit raises commit; a lower value changes nothing. What is committed
// and durable here is applied in the background (R9).
func (r *Replica) SetCommit(seq holdfast.Seq) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.commit = max(r.commit, seq)
}

// DeclareIntact records that, as the writer of epoch says, everything that
// this replica acknowledged as received is here. It is remembered while this
// kernel runs and the files are the same. ErrRefused on a disk that was marked
// as failed or whose file system does not keep its pages in this kernel alone.
func (r *Replica) DeclareIntact(epoch holdfast.Epoch) error {
	r.order.Lock()
	defer r.order.Unlock()
	r.mu.RLock()
	err, known := r.usable(), r.intact && r.intactEpoch == epoch
	r.mu.RUnlock()
	switch {
	case err != nil:
		return err
	case known:
		return nil
	case !r.d.mayBeIntact():
		return holdfast.Errorf(holdfast.ErrRefused, "declare replica %v intact: its disk was marked as failed, or lies on a file system outside this kernel's page cache", r.desc.Replica)
	}
	rec := record{typ: recIntact, epoch: epoch, seq: holdfast.Seq(r.d.identity), extra: []byte(r.d.bootID)}
	err = r.insist(rec, false, func() {
		r.intact, r.intactEpoch, r.intactBoot, r.intactFiles = true, epoch, r.d.bootID, r.d.identity
		r.badEntry = 0
	})
	if err != nil {
		return holdfast.Errorf(holdfast.KindOf(err), "declare replica %v intact: %w", r.desc.Replica, err)
	}
	return nil
}

func (d *Disk) mayBeIntact() bool { return d.keepsPages && d.super.flags&superFailed == 0 }

// SetHint records the highest (epoch, ISR version) that this replica was told
// of; a lower one changes nothing. Received on return, durable with the next
// Sync. A damaged replica takes it too.
func (r *Replica) SetHint(epoch holdfast.Epoch, v holdfast.ISRVersion) error {
	r.order.Lock()
	defer r.order.Unlock()
	r.mu.RLock()
	err, known := r.alive(), epoch < r.hintEpoch || epoch == r.hintEpoch && v <= r.hintISR
	r.mu.RUnlock()
	if err != nil || known {
		return err
	}
	err = r.insist(record{typ: recHint, epoch: epoch, seq: holdfast.Seq(v)}, false, func() {
		r.hintEpoch, r.hintISR = epoch, v
	})
	if err != nil {
		return holdfast.Errorf(holdfast.KindOf(err), "record the role of replica %v: %w", r.desc.Replica, err)
	}
	return nil
}

// Status returns what the replica knows of itself.
func (r *Replica) Status() Status {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.settleDurable()
	return Status{
		ReplicaDesc: r.desc, Fence: r.fence, Tail: r.tail, Dur: r.dur, First: r.first(), Commit: r.commit,
		Applied: r.applied, Floor: r.lowest(), Checkpoint: r.ckpt,
		EpochTails: append([]EpochStart(nil), r.tails...),
		Intact:     r.intact, IntactEpoch: r.intactEpoch, HintEpoch: r.hintEpoch, HintISR: r.hintISR,
		Used: r.tree.mapped * chunkSize, Damaged: r.damaged, BadRanges: r.index.badRanges(r.applied), BadEntry: r.badEntry,
		Bad: r.bad.count(), Poison: r.tree.poison,
	}
}

// Desc returns the replica's descriptor.
func (r *Replica) Desc() ReplicaDesc { return r.desc }

// Entries returns entries of the log from a seq on, with their payloads: as
// many as fit in maxBytes of payload, but at least one; none if from is
// Tail+1. A *GapError if from is below Status().First or above Tail+1: then
// only a copy of chunks helps. ErrIntegrity if the payload is lost.
func (r *Replica) Entries(from holdfast.Seq, maxBytes int) ([]Entry, error) {
	r.mu.RLock()
	err, first, tail := r.usable(), r.first(), r.tail
	var found []*logEntry
	total := int64(0)
	if err == nil && from >= first {
		for s := from; s <= tail; s++ {
			e := r.index.get(s)
			if e.typ == recWrite {
				total += e.length
			}
			if len(found) > 0 && total > int64(maxBytes) || len(found) == maxEntries {
				break
			}
			found = append(found, e)
		}
	}
	r.mu.RUnlock()
	switch {
	case err != nil:
		return nil, err
	case from < first || from > tail+1:
		return nil, &GapError{Wanted: from, First: first, Tail: tail}
	}
	entries := make([]Entry, 0, len(found))
	for _, e := range found {
		out := Entry{
			Epoch: e.epoch, Seq: e.seq, Commit: e.commit, Type: OpType(e.typ),
			Offset: e.off, Length: e.length, CRC: append([]uint32(nil), e.crc...),
		}
		if e.typ == recWrite {
			out.Payload = make([]byte, e.length)
			if err := r.readPayload(out.Payload, e, 0); err != nil {
				r.mu.RLock()
				gone := r.index.get(e.seq) != e
				first, tail := r.first(), r.tail
				r.mu.RUnlock()
				if gone { // its place in the log was taken while we read
					return nil, &GapError{Wanted: e.seq, First: first, Tail: tail}
				}
				return nil, err
			}
		}
		entries = append(entries, out)
	}
	return entries, nil
}

// maxEntries bounds what Entries returns at once when payloads are small.
const maxEntries = 4096
