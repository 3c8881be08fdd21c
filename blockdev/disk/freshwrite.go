package disk

import (
	"sync"
	"sync/atomic"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// minFresh is how many whole chunks a write must cover: one that covers less is not
// worth a sync of the image.
const minFresh = 2

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
	if d.hostFull || d.mayGrow(true) != nil {
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
			n := min(maxFreshRun, runOfChunks(chunks))
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

// maxFreshRun chunks, 256 KiB, are one run at most, so that one large write is several at
// the device.
const maxFreshRun = 4

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
				err = r.d.writePast(run.e.Payload[run.from*blockSize:run.to*blockSize], run.first)
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

// writePast writes to fresh chunks, from one on, past the page cache, where the file
// system can: in it, the bytes would be copied once more, and take the place of what is read.
func (d *Disk) writePast(b []byte, first uint32) error {
	if err := d.failed(); err != nil {
		return err
	}
	if !vfs.Aligned(b) {
		wide := d.wideBuffer()
		defer d.wide.Put(wide)
		b = (*wide)[:copy(*wide, b)]
	}
	if _, err := d.direct.WriteAt(b, d.chunkOffset(first)); err != nil {
		return d.fail(holdfast.Errorf(holdfast.ErrIO, "write chunk %d: %w", first, err))
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
