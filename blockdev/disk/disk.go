package disk

import (
	"context"
	"log/slog"
	"sort"
	"sync"
	"sync/atomic"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// maxReplicas bounds the replicas of one disk, and with them the directory
// that every checkpoint writes.
const maxReplicas = 1 << 16

// Disk is one open pooled disk. All methods may be called concurrently, Close
// last.
//
// Locks, in the order in which they are taken: Replica.order, Disk.table,
// Disk.releasing, Disk.passes, Disk.gate, Replica.applying, then the short ones that
// guard fields and are never held across I/O: Disk.mu, Replica.mu, then mapCache.mu,
// space.mu, allocator.mu or wal.mu. The first six order whole operations and are held
// across I/O on purpose.
type Disk struct {
	fs   vfs.FS
	path string
	log  *slog.Logger
	opts Options

	main vfs.File // locked; superblock, reads of chunks and map
	base vfs.File // writes of chunks and map; main on images
	// direct takes what is written past the page cache: whole chunks, and on a device
	// all that base takes.
	direct vfs.File
	super  *superblock
	seed   uint32
	wal    *wal
	alloc  *allocator
	space  *space
	cache  *mapCache

	bootID     string
	identity   uint64 // of the files, see filesIdentity
	keepsPages bool

	table     sync.Mutex   // creates and deletes replicas, one at a time
	releasing sync.Mutex   // one gives chunks of released maps back
	growing   sync.Mutex   // one takes space below; taken after order alone, or after passes
	swept     bool         // free chunks without space hold none for certain; guarded by growing
	passes    sync.Mutex   // one checkpoint at a time
	gate      sync.RWMutex // held shared by whatever changes maps, exclusively while a checkpoint writes them

	mu       sync.RWMutex
	replicas map[holdfast.ReplicaID]*Replica
	released []*Replica // what is left of maps that are no replica's any more; see release.go
	closed   bool

	repairs  repairCounters
	begun    time.Time     // what paced counts from
	pacing   sync.Mutex    // no other lock is taken under it
	paced    time.Duration // when the next writer may go on; guarded by pacing
	stuck    atomic.Int64  // how full the log was when a pass made no room; 0 once one did
	relogged int64         // bytes that the last pass logged again; guarded by passes
	settled  atomic.Int64  // how full the log was after the last checkpoint
	readOnly error         // why nothing may be written, or nil; set before Open returns
	failure  atomic.Pointer[holdfast.Error]
	opened   atomic.Bool // Open has returned, or is about to
	kick     chan struct{}
	shed     chan struct{} // wakes who gives released maps back
	stop     chan struct{}
	wg       sync.WaitGroup
	dirPages []int64 // of the directory of the last durable checkpoint; guarded by passes
	dirNext  []int64 // of one whose checkpoint did not come about, or is being written; the same
	mapGen   uint32  // rises with each durable checkpoint; guarded by gate

	spaceLost error     // why space was counted anew
	buffers   sync.Pool // of chunkSize bytes, aligned
	wide      sync.Pool // of holdfast.MaxOpSize bytes, aligned
	hostFull  bool      // no space was found for new chunks since the last checkpoint; guarded by growing
}

// errClosed is returned by everything after Close.
var errClosed = holdfast.Errorf(holdfast.ErrUnavailable, "the disk is closed")

// Stat returns what is known of the disk.
func (d *Disk) Stat() Stat {
	chunks := d.alloc.stat()
	s := Stat{
		Cluster: d.super.cluster, Node: d.super.node, Disk: d.super.disk, OpenCount: d.super.openCount,
		Size: d.super.size, Capacity: d.alloc.chunks * chunkSize,
		Used: (d.alloc.chunks - chunks.free) * chunkSize, Reserved: chunks.reserved * chunkSize,
		Reclaimable: chunks.waiting * chunkSize, Map: chunks.mapping * chunkSize, Allocated: chunks.backed * chunkSize,
		WALSize: d.wal.size(), WALUsed: d.wal.used(),
		MarkedFailed: d.super.flags&superFailed != 0, ReadOnly: d.super.refusesWrites(),
	}
	if e := d.failure.Load(); e != nil && e != errClosed {
		s.Failed = e
	}
	s.Repair = RepairStat{Found: d.repairs.found.Load(), Repaired: d.repairs.repaired.Load(), Poisoned: d.repairs.poisoned.Load()}
	d.mu.RLock()
	s.Replicas = len(d.replicas)
	for _, r := range d.released {
		r.mu.RLock()
		s.Reclaimable += r.tree.mapped * chunkSize
		r.mu.RUnlock()
	}
	d.mu.RUnlock()
	return s
}

// failed returns the error that ended the disk's work, or nil.
func (d *Disk) failed() error {
	if e := d.failure.Load(); e != nil {
		return e
	}
	return nil
}

// fail ends the disk's work for this process's life (R12) and returns the
// error that everything returns from now on. The mark in the superblock is a
// best effort: the medium may take it although it refused something else.
func (d *Disk) fail(cause error) error {
	e := holdfast.Errorf(holdfast.ErrIO, "disk %v failed: %v", d.super.disk, cause) // not %w: whatever it was, it is ErrIO now
	if !d.failure.CompareAndSwap(nil, e) {
		return d.failure.Load()
	}
	d.wal.setFailed(e)
	d.log.Error("disk failed", "disk", d.super.disk.String(), "path", d.path, "error", cause)
	d.wg.Go(func() {
		marked := *d.super
		marked.flags |= superFailed
		if err := writeSuperblock(d.main, &marked); err != nil {
			d.log.Warn("mark of failure not written", "disk", d.super.disk.String(), "error", err)
		}
		if d.opts.OnFail != nil && d.opened.Load() {
			d.opts.OnFail(e)
		}
	})
	return e
}

func (w *wal) setFailed(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.failed = firstOf(w.failed, err)
}

// Replicas returns all replicas, ordered by id.
func (d *Disk) Replicas() []*Replica {
	d.mu.RLock()
	all := make([]*Replica, 0, len(d.replicas))
	for _, r := range d.replicas {
		all = append(all, r)
	}
	d.mu.RUnlock()
	sort.Slice(all, func(i, j int) bool {
		return string(all[i].desc.Replica[:]) < string(all[j].desc.Replica[:])
	})
	return all
}

// Replica returns one replica.
func (d *Disk) Replica(id holdfast.ReplicaID) (*Replica, bool) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	r, ok := d.replicas[id]
	return r, ok
}

// CreateReplica makes an empty replica, durable on return. A replica that
// exists with the same descriptor is returned as it is; with another one it is
// an ErrExists error.
func (d *Disk) CreateReplica(desc ReplicaDesc) (*Replica, error) {
	if desc.Replica.IsZero() || desc.Size <= 0 || desc.Size > maxSegment || desc.Size%blockSize != 0 {
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "create replica %v of %d bytes: it needs an id and a size in whole blocks", desc.Replica, desc.Size)
	}
	d.table.Lock()
	defer d.table.Unlock()
	d.mu.RLock()
	r, n, closed := d.replicas[desc.Replica], len(d.replicas)+len(d.released), d.closed
	d.mu.RUnlock()
	switch {
	case closed:
		return nil, errClosed
	case r != nil && r.desc == desc:
		return r, nil
	case r != nil:
		return nil, holdfast.Errorf(holdfast.ErrExists, "create replica %v: it exists as another segment, lineage or size", desc.Replica)
	case n >= maxReplicas:
		return nil, holdfast.Errorf(holdfast.ErrNoSpace, "create replica %v: the disk holds %d replicas, with those that are being deleted, the most it can", desc.Replica, n)
	}
	d.gate.RLock() // so that a checkpoint sees the record and its effect, or neither
	defer d.gate.RUnlock()
	serial, err := d.control(classFence, record{typ: recCreate, replica: desc.Replica, extra: encodeDesc(desc)})
	if err != nil {
		return nil, holdfast.Errorf(holdfast.KindOf(err), "create replica %v: %w", desc.Replica, err)
	}
	r = newReplica(d, desc)
	r.lastSerial = serial
	d.mu.Lock()
	d.replicas[desc.Replica] = r
	d.mu.Unlock()
	return r, nil
}

// DeleteReplica deletes a replica, durable on return; its space comes back
// with the next checkpoint, or, of a large one, with those that follow (release.go).
// An unknown replica is no error. Methods of a
// deleted Replica return ErrNotFound.
func (d *Disk) DeleteReplica(id holdfast.ReplicaID) error {
	if err := d.deleteReplica(id); err != nil {
		return err
	}
	d.releaseSoon()
	return nil
}

func (d *Disk) deleteReplica(id holdfast.ReplicaID) error {
	r, ok := d.Replica(id)
	if !ok {
		return d.failed()
	}
	r.order.Lock()
	defer r.order.Unlock()
	d.table.Lock()
	defer d.table.Unlock()
	if r, ok = d.Replica(id); !ok {
		return d.failed()
	}
	d.gate.RLock()
	defer d.gate.RUnlock()
	r.applying.Lock()
	defer r.applying.Unlock()
	if _, err := d.control(classFence, record{typ: recDelete, replica: id}); err != nil {
		return holdfast.Errorf(holdfast.KindOf(err), "delete replica %v: %w", id, err)
	}
	d.mu.Lock()
	delete(d.replicas, id)
	d.mu.Unlock()
	r.mu.Lock()
	r.deleted = true
	old := r.empty()
	d.alloc.release(r.credit.Load())
	d.alloc.needs(-r.credit.Load() * r.creditPages())
	r.credit.Store(0)
	r.mu.Unlock()
	r.release(old)
	return nil
}

// empty takes the replica's map and log away, and what was promised to them, and
// returns the map. Under mu.
func (r *Replica) empty() *tree {
	d, old := r.d, r.tree
	r.dropFresh(r.applied)
	r.dropFlips()
	clear(r.kept)
	d.alloc.release(int64(len(r.reserved)))
	d.alloc.needs(-int64(len(r.newPages)))
	r.newPages, r.reserved = map[pageKey]struct{}{}, map[int64]struct{}{}
	r.tree, r.index = newTree(r.desc.Replica, r.desc.Size), newLogIndex()
	return old
}

// control writes one control record and makes it durable.
func (d *Disk) control(c class, rec record) (serial uint64, err error) {
	req := walRequest{recs: []record{rec}, class: c}
	if err := d.wal.submit(&req); err != nil {
		return 0, noSpace(err)
	}
	serial = req.where[0].serial
	return serial, d.wal.sync(context.Background(), serial)
}

// noSpace gives a full log the kind that the API knows.
func noSpace(err error) error {
	if err == errWALFull {
		return holdfast.Errorf(holdfast.ErrNoSpace, "the log is full of entries that are not committed")
	}
	return err
}

// forget tells all replicas that records up to serial are about to be overwritten.
func (d *Disk) forget(serial uint64) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	for _, r := range d.replicas {
		r.mu.Lock()
		r.index.forget(serial)
		r.mu.Unlock()
	}
}

// background applies and checkpoints until Close.
func (d *Disk) background() {
	every := d.opts.ApplyEvery
	if every == 0 {
		every = DefaultApplyEvery
	}
	var tick <-chan time.Time
	if every > 0 {
		t := time.NewTicker(every)
		defer t.Stop()
		tick = t.C
	}
	var watch sparesWatch
	for {
		select {
		case <-d.stop:
			return
		case <-d.kick:
		case <-tick:
		}
		if d.failed() != nil {
			continue
		}
		d.wakeReleaser()
		if watch.idle(d.alloc, time.Now()) {
			d.dropSpares(0)
		}
		if err := d.tend(); err != nil && d.failed() == nil {
			d.log.Warn("apply stopped", "disk", d.super.disk.String(), "error", err)
		}
	}
}

// Close checkpoints if the disk is sound, and closes. Every other call must
// have returned, or returns an error.
func (d *Disk) Close() error { return d.end(true) }

// Abandon closes without a checkpoint: for a disk that turned out not to be this
// node's to write to. What was logged before is found again by the next Open.
func (d *Disk) Abandon() { _ = d.end(false) }

func (d *Disk) end(checkpoint bool) (err error) {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return nil
	}
	d.closed = true
	d.mu.Unlock()
	close(d.stop)
	if checkpoint && d.failed() == nil && d.readOnly == nil {
		err = d.checkpoint(nil, true)
		d.dropSpares(0)
	}
	// Whatever comes now, or is still under way, finds the disk closed: a write
	// to a closed file must not pass for a failure of the disk.
	d.failure.CompareAndSwap(nil, errClosed)
	d.wal.setFailed(errClosed)
	d.wg.Wait()
	d.closeFiles()
	return err
}

func (d *Disk) closeFiles() {
	if d.wal != nil && d.super.walOffset == 0 {
		for _, s := range d.wal.slots {
			if s.file != nil {
				_ = s.file.Close() // synced, or failed before
			}
		}
	}
	if d.direct != nil && d.direct != d.main {
		_ = d.direct.Close()
	}
	_ = d.main.Close()
}

// buffer returns an aligned chunk buffer; give it back with d.buffers.Put.
func (d *Disk) buffer() *[]byte {
	if b, ok := d.buffers.Get().(*[]byte); ok {
		return b
	}
	b := vfs.AlignedBuffer(chunkSize)
	return &b
}

// chunkOffset is where a chunk is in the file.
func (d *Disk) chunkOffset(phys uint32) int64 { return d.super.dataOffset + int64(phys)*chunkSize }
