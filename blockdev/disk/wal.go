package disk

import (
	"context"
	"errors"
	"hash/crc32"
	"slices"
	"sync"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// Sizes of the WAL.
const (
	minSlotSize     = 256 << 10 // in tests; Format makes none below 4 MiB
	maxSlotSize     = 64 << 20  // one file is read into memory at a time when the disk is opened
	maxBatchRecords = 256       // two iovecs each stay below IOV_MAX
	maxBatchBytes   = 4 << 20   // a batch holds up those behind it
)

// errWALFull: the record would use the reserve, or does not fit at all.
var errWALFull = errors.New("the log is full")

// slot is one WAL file: a file beside the image, or a part of the raw device.
type slot struct {
	file vfs.File
	base int64  // of the slot in the file
	last uint64 // serial of its last record; 0: none
}

// wal is the log of one disk. Its records have contiguous serials. It is
// written in batches of whole pages, each batch by one pwritev; whoever finds
// no batch being written writes the next one for all that wait (the leader).
// Waiting for the batch before it is what makes "received" mean "and all
// before it": a hole can then only be at the end.
type wal struct {
	slots    []slot
	slotSize int64
	seed     uint32
	open     uint64
	reserve  int64
	// fail ends the disk; forget tells the replicas that the records up to a
	// serial are about to be overwritten.
	fail   func(error) error
	forget func(serial uint64)

	data vfs.File // what a sync of the log does not cover: the image, for fresh chunks; nil if all are one file

	mu       sync.Mutex
	queue    []*walRequest
	writing  bool
	cur      int
	pos      int64  // where the next batch goes in the current slot
	outside  int64  // bytes in fresh chunks of the current slot's records: they count as if they were in it
	freshTo  uint64 // serial of the last record with fresh chunks
	dataTo   uint64 // the fresh chunks of records up to here are durable
	serial   uint64
	durable  uint64
	freed    int64  // slots; see freedSlots
	keepFrom uint64 // records below are not needed; slots of only such are free
	failed   error
	syncing  bool
	next     *syncRound

	heads    []byte // the leader's, from here on
	bufs     [][]byte
	takes    []take
	finished []*walRequest
}

// take is how many records of a request go into a batch.
type take struct {
	req *walRequest
	n   int
}

// walRequest is the records of one caller, in order.
type walRequest struct {
	recs  []record
	class class
	where []walPlace // of recs[:done]
	done  int
	err   error
	wake  chan bool // true: lead; false: finished
}

// walPlace is where a record's payload is.
type walPlace struct {
	serial uint64
	slot   int32
	pos    int64 // of the payload in the slot
}

type syncRound struct {
	lead chan struct{} // holds one token: who takes it does the work
	done chan struct{}
	err  error
}

func newSyncRound() *syncRound {
	r := &syncRound{lead: make(chan struct{}, 1), done: make(chan struct{})}
	return r
}

// submit writes the request's records. With errWALFull, req.done says how many
// were written all the same.
func (w *wal) submit(req *walRequest) error {
	if req.wake == nil {
		req.wake = make(chan bool, 1)
	}
	w.mu.Lock()
	if err := w.failed; err != nil {
		w.mu.Unlock()
		return err
	}
	w.queue = append(w.queue, req)
	lead := !w.writing
	w.writing = true
	w.mu.Unlock()
	if !lead && !<-req.wake {
		return req.err
	}
	w.lead(req)
	return req.err
}

// lead writes batches until req is finished, then hands over.
func (w *wal) lead(req *walRequest) {
	for {
		finished := w.writeBatch(w.finished[:0])
		mine := false
		for _, f := range finished {
			if f == req {
				mine = true
			} else {
				f.wake <- false
			}
		}
		if !mine {
			continue
		}
		clear(finished)
		w.finished = finished
		w.mu.Lock()
		if len(w.queue) == 0 {
			w.writing = false
		} else {
			w.queue[0].wake <- true
		}
		w.mu.Unlock()
		return
	}
}

// writeBatch writes the next batch and returns the requests that it finished.
// Only the leader calls it; the position is the leader's, the mutex lets others
// look.
func (w *wal) writeBatch(finished []*walRequest) []*walRequest {
	w.mu.Lock()
	pos, outside, cur, serial, durable := w.pos, w.outside, w.cur, w.serial, w.durable
	queue := w.queue
	full := func(req *walRequest) []*walRequest {
		req.err = errWALFull
		w.dequeue(req)
		w.mu.Unlock()
		return append(finished, req)
	}
	if w.failed != nil {
		for _, req := range queue {
			req.err = w.failed
			finished = append(finished, req)
		}
		w.queue = w.queue[:0]
		w.mu.Unlock()
		return finished
	}
	// The first record decides whether this slot still does.
	first := queue[0]
	size := pageUp(first.recs[first.done].size()) + first.recs[first.done].freshBytes()
	rest, free := w.slotSize-pos-outside, w.freeSlots()
	moved := false
	if size > rest {
		if free == 0 {
			return full(first)
		}
		moved, rest, free = true, w.slotSize, free-1
	}
	spare := rest + free*w.slotSize // what is left for this batch and all after it
	if spare-size < w.keep(first) {
		return full(first)
	}
	w.mu.Unlock()

	if moved {
		if err := w.moveOn(&cur, &pos); err != nil {
			return w.writeBatch(finished) // which finishes all with the failure
		}
		w.mu.Lock()
		durable, outside = w.durable, 0
		w.mu.Unlock()
	}
	// Take whole records as long as they fit.
	var total, fresh int64
	headTotal, count, lastFresh := 0, 0, uint64(0)
	takes := w.takes[:0]
gather:
	for _, req := range queue {
		n := 0
		for i := req.done; i < len(req.recs); i++ {
			size, more := req.recs[i].size(), req.recs[i].freshBytes()
			needs := pageUp(total+size) + fresh + more
			if count == maxBatchRecords || (count > 0 && total+size > maxBatchBytes) ||
				count > 0 && more > 0 || // see fresh.go
				needs > rest || spare-needs < w.keep(req) {
				if n > 0 {
					takes = append(takes, take{req, n})
				}
				break gather
			}
			total += size
			fresh += more
			headTotal += req.recs[i].headSize()
			count++
			n++
		}
		takes = append(takes, take{req, n})
	}
	if cap(w.heads) < headTotal {
		w.heads = make([]byte, headTotal)
	}
	heads := w.heads[:headTotal]
	w.bufs = w.bufs[:0]
	at, k := pos, 0
	for _, t := range takes {
		for i := 0; i < t.n; i++ {
			rec := &t.req.recs[t.req.done+i]
			k++
			serial++
			rec.serial, rec.open, rec.durable = serial, w.open, durable
			if rec.freshBytes() > 0 {
				lastFresh = serial
			}
			rec.flags &^= flagBatchEnd
			if k == count {
				rec.flags |= flagBatchEnd
			}
			h := rec.headSize()
			rec.encodeHead(heads[:h:h], w.seed)
			w.bufs = append(w.bufs, heads[:h:h])
			heads = heads[h:]
			if len(rec.payload) > 0 {
				w.bufs = append(w.bufs, rec.payload)
			}
			t.req.where = append(t.req.where, walPlace{serial: serial, slot: int32(cur), pos: at + int64(h)})
			at += rec.size()
		}
	}
	if pad := pageUp(at) - at; pad > 0 {
		w.bufs = append(w.bufs, zeroPage[:pad])
		at += pad
	}
	err := w.slots[cur].file.WritevAt(w.bufs, w.slots[cur].base+pos)
	clear(w.bufs)
	if err != nil {
		err = w.fail(holdfast.Errorf(holdfast.ErrIO, "write the log: %w", err))
	}
	w.mu.Lock()
	if err != nil {
		w.failed = firstOf(w.failed, err)
		w.mu.Unlock()
		return w.writeBatch(finished)
	}
	w.pos, w.cur, w.serial = at, cur, serial
	w.outside, w.freshTo = outside+fresh, max(w.freshTo, lastFresh)
	w.slots[cur].last = serial
	for _, t := range takes {
		t.req.done += t.n
		if t.req.done == len(t.req.recs) {
			w.dequeue(t.req)
			finished = append(finished, t.req)
		}
	}
	w.mu.Unlock()
	clear(takes)
	w.takes = takes
	return finished
}

// class says how much of the reserve a record may use. The more a record does
// to make room, or to let a fence pass, the more.
type class uint8

const (
	classEntry  class = iota // entries and installs: nothing of it
	classRelog               // entries moved to the head: half
	classFence               // FENCE TRUNC and whatever else concerns one replica: three quarters
	classCommit              // COMMIT: seven eighths
	classCkpt                // all
)

// keep is how much of the log the request must leave.
func (w *wal) keep(req *walRequest) int64 {
	switch req.class {
	case classEntry:
		return w.reserve
	case classRelog:
		return w.reserve / 2
	case classFence:
		return w.reserve / 4
	case classCommit:
		return w.reserve / 8
	}
	return 0
}

// frees reports whether a slot could be overwritten if the records from the
// serial on were all that is needed.
func (w *wal) frees(from uint64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	before, keep := w.freeSlots(), w.keepFrom
	w.keepFrom = max(keep, from)
	after := w.freeSlots()
	w.keepFrom = keep
	return after > before
}

func (w *wal) dequeue(req *walRequest) {
	for i, q := range w.queue {
		if q == req {
			w.queue = append(w.queue[:i], w.queue[i+1:]...)
			return
		}
	}
}

// moveOn makes the next slot the current one. The one that is left is synced
// first, so that a hole in the log can only be in the last slot.
func (w *wal) moveOn(cur *int, pos *int64) error {
	err := w.syncData()
	if err == nil {
		err = w.slots[*cur].file.Sync()
	}
	if err != nil {
		err = w.fail(holdfast.Errorf(holdfast.ErrIO, "sync the log: %w", err))
		w.mu.Lock()
		w.failed = firstOf(w.failed, err)
		w.mu.Unlock()
		return err
	}
	n := w.nextSlot()
	if last := w.slots[n].last; last > 0 {
		w.forget(last)
	}
	w.mu.Lock()
	w.durable = max(w.durable, w.serial)
	w.cur, w.pos, w.outside = n, 0, 0
	w.slots[n].last = 0
	w.mu.Unlock()
	*cur, *pos = n, 0
	return nil
}

// freeSlots counts the slots beside the current one that can be overwritten. They are
// those that follow it, unless a misdirected write put a record into one of them: that
// one is passed over until a checkpoint lets go of the record. Under mu.
func (w *wal) freeSlots() int64 {
	n := int64(0)
	for i := range w.slots {
		if i != w.cur && w.isFree(i) {
			n++
		}
	}
	return n
}

// isFree says whether no record of a slot is needed. Under mu.
func (w *wal) isFree(i int) bool { return w.slots[i].last < max(1, w.keepFrom) }

// nextSlot is the next one that can be overwritten, of which there is one.
func (w *wal) nextSlot() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := (w.cur + 1) % len(w.slots)
	for !w.isFree(n) {
		n = (n + 1) % len(w.slots)
	}
	return n
}

// used returns the bytes of the log that cannot be overwritten, with those in fresh
// chunks that its records refer to.
func (w *wal) used() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return int64(len(w.slots)-1)*w.slotSize - w.freeSlots()*w.slotSize + w.pos + w.outside
}

// freedSlots counts the slots that checkpoints ever let go of.
func (w *wal) freedSlots() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.freed
}

func (w *wal) size() int64 { return int64(len(w.slots)) * w.slotSize }

// written returns the serial of the last record written.
func (w *wal) written() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.serial
}

func (w *wal) durableSerial() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.durable
}

// oldest returns the last serial of the oldest slot that is still needed, and
// whether only the reserve is left, which takes no entries.
func (w *wal) oldest() (last uint64, tight bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	free := w.freeSlots()
	tight = w.slotSize-w.pos-w.outside+free*w.slotSize-vfs.PageSize < w.reserve
	last = w.serial
	for i := range w.slots {
		if i != w.cur && !w.isFree(i) {
			last = min(last, w.slots[i].last)
		}
	}
	return last, tight
}

// oldestPart returns the last serial of the oldest slots that are needed, of at least
// so many bytes together or all but the one in use.
func (w *wal) oldestPart(bytes int64) (last uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	lasts := make([]uint64, 0, len(w.slots))
	for i := range w.slots {
		if i != w.cur && !w.isFree(i) {
			lasts = append(lasts, w.slots[i].last)
		}
	}
	if len(lasts) == 0 {
		return w.serial
	}
	slices.Sort(lasts)
	return lasts[min(int64(len(lasts)), (bytes+w.slotSize-1)/w.slotSize)-1]
}

// recycle lets the slots whose records are all below the serial be overwritten.
func (w *wal) recycle(keepFrom uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	before := w.freeSlots()
	w.keepFrom = max(w.keepFrom, keepFrom)
	w.freed += w.freeSlots() - before
}

// sync returns once every record up to the serial is durable. Callers that come
// while a sync runs share the next one. A cancelled context ends the wait, not the sync.
func (w *wal) sync(ctx context.Context, serial uint64) error {
	w.mu.Lock()
	if w.failed != nil || w.durable >= serial {
		defer w.mu.Unlock()
		return w.failed
	}
	if w.next == nil {
		w.next = newSyncRound()
		if !w.syncing {
			w.next.lead <- struct{}{}
			w.syncing = true
		}
	}
	round := w.next
	w.mu.Unlock()

	select { // whoever can lead does so: the others wait for it
	case <-round.lead:
		w.syncOnce(round)
		return round.err
	default:
	}
	select {
	case <-round.lead:
		w.syncOnce(round)
		return round.err
	case <-round.done:
		return round.err
	case <-ctx.Done():
		return holdfast.Errorf(holdfast.ErrTimeout, "wait for the log's sync: %w", ctx.Err())
	}
}

// syncOnce is one fdatasync for all who joined the round.
func (w *wal) syncOnce(round *syncRound) {
	w.mu.Lock()
	w.next = nil // later callers may have written after this fdatasync began
	serial, file, err := w.serial, w.slots[w.cur].file, w.failed
	w.mu.Unlock()
	// A move to the next slot from here on has synced this one itself.
	if err == nil {
		if err = w.syncData(); err == nil && mutant != "dur_without_log_sync" {
			err = file.Sync()
		}
		if err != nil {
			err = w.fail(holdfast.Errorf(holdfast.ErrIO, "sync the log: %w", err))
		}
	}
	w.mu.Lock()
	if err != nil {
		w.failed = firstOf(w.failed, err)
	} else {
		w.durable = max(w.durable, serial)
	}
	round.err = w.failed
	if w.next != nil {
		w.next.lead <- struct{}{}
	} else {
		w.syncing = false
	}
	w.mu.Unlock()
	close(round.done)
}

// touch reads the first page of the slot in use from the medium.
func (w *wal) touch(page []byte) error {
	w.mu.Lock()
	s := w.slots[w.cur]
	w.mu.Unlock()
	_, err := s.file.ReadDirectAt(page, s.base)
	return err
}

// read fills p with bytes of a payload.
func (w *wal) read(p []byte, slot int32, pos int64) error {
	s := &w.slots[slot]
	_, err := s.file.ReadAt(p, s.base+pos)
	return err
}

// readDirect is read from the medium.
func (w *wal) readDirect(p []byte, slot int32, pos int64) error {
	s := &w.slots[slot]
	return readDirect(s.file, p, s.base+pos)
}

// readDirect reads any range from the medium.
func readDirect(f vfs.File, p []byte, off int64) error {
	from := off &^ (vfs.PageSize - 1)
	b := vfs.AlignedBuffer(int(pageUp(off+int64(len(p))) - from))
	if _, err := f.ReadDirectAt(b, from); err != nil {
		return err
	}
	copy(p, b[off-from:])
	return nil
}

func pageUp(n int64) int64 { return (n + vfs.PageSize - 1) &^ (vfs.PageSize - 1) }

var zeroPage [vfs.PageSize]byte

// seedOf is the crc seed of everything on a disk that carries its own crc.
func seedOf(id holdfast.DiskID) uint32 { return crc32.Checksum(id[:], castagnoli) }
