package disk

import (
	"context"
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
