package reconcile

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/disk"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
	"github.com/holdfast-storage/holdfast/raftstore/state"
	"github.com/holdfast-storage/holdfast/replication/serve"
)

// retryEvery is the pause after a step that failed before it is tried again;
// the watch wakes earlier when something changed.
const retryEvery = time.Second

// DisksOptions are what Disks works with.
type DisksOptions struct {
	Cluster  Cluster
	Serve    *serve.Server
	FS       vfs.FS
	ID       holdfast.ClusterID
	Node     holdfast.NodeID
	Instance holdfast.InstanceID
	// Probe says what a target holds that is not ours, InUse who uses it now; see
	// disk.FormatOptions.
	Probe, InUse func(path string) (what string, err error)
	// Class names the pool of a disk for which its operator names none. May be nil.
	Class func(path string) string
	// Save keeps the list of this node's disks for its next start. May be nil.
	Save func([]DiskSpec) error
	// MayGrow says why an image may take no more space of its host, or nil; with ahead,
	// before it needs any. May be nil.
	MayGrow func(path string, ahead bool) error
	// HostFill says how full the file system is that a path is an image on, 0 to 1; false
	// of a device. May be nil.
	HostFill func(path string) (float64, bool)
	// HostRoom says what that file system has left; false of a device. May be nil.
	HostRoom func(path string) (HostRoom, bool)
	// None: the node was started to have no disks, and is given none.
	None bool
	// ScrubEvery is how often a disk is scrubbed. Zero: DefaultScrubEvery;
	// negative: only when it is asked for.
	ScrubEvery time.Duration
	Logger     *slog.Logger
}

// Disks are this node's pooled disks.
type Disks struct {
	o      DisksOptions
	ctx    context.Context // of what a failing disk tells raft; ends with Close
	cancel context.CancelFunc

	changing sync.Mutex // one disk is added or let go at a time; held across I/O

	mu     sync.Mutex
	open   map[holdfast.DiskID]*openDisk
	known  []DiskSpec // also those that do not open, and removed ones
	closed bool
}

type openDisk struct {
	*disk.Disk
	path  string
	pool  string
	count holdfast.OpenCount
	scrub *scrubber
}

// OpenedDisk is one disk for lists.
type OpenedDisk struct {
	Path, Pool string
	Stat       disk.Stat
	Fill       Fill
	Room       Room
	Scrub      Scrubbing
}

// NewDisks returns no disks; Open adds them.
func NewDisks(o DisksOptions) *Disks {
	d := &Disks{o: o, open: map[holdfast.DiskID]*openDisk{}}
	d.ctx, d.cancel = context.WithCancel(context.Background()) //nolint:gosec // cancelled by Close
	return d
}

// Prepare formats what is not formatted yet. A target that is in use, or that holds
// something else, another cluster's disk or another node's, is ErrRefused and
// unchanged; force overwrites what is not in use. This node's own disk is left as
// it is, forced or not.
func (d *Disks) Prepare(ctx context.Context, spec DiskSpec, force bool) error {
	o := disk.FormatOptions{
		Cluster: d.o.ID, Node: d.o.Node, Size: spec.Size, WALSize: spec.WAL, Probe: d.o.Probe, InUse: d.o.InUse,
	}
	err := disk.Format(ctx, d.o.FS, spec.Path, o)
	if force && errors.Is(err, holdfast.ErrRefused) {
		o.Force = true
		err = disk.Format(ctx, d.o.FS, spec.Path, o)
	}
	if errors.Is(err, holdfast.ErrExists) {
		return nil // ours already
	}
	if err != nil {
		return fmt.Errorf("disk %s: %w", spec.Path, err)
	}
	d.o.Logger.Info("disk formatted", "path", spec.Path, "forced", o.Force)
	return nil
}

// Open opens a formatted disk, tells raft, and serves its replicas. Raft
// refuses a disk that was rolled back, cloned or removed; then it is closed again.
func (d *Disks) Open(ctx context.Context, spec DiskSpec) error {
	_, err := d.openOne(ctx, spec)
	return err
}

func (d *Disks) openOne(ctx context.Context, spec DiskSpec) (holdfast.DiskID, error) {
	path, pool := spec.Path, spec.Pool
	if pool == "" && d.o.Class != nil {
		pool = d.o.Class(path)
	}
	opened := make(chan *openDisk, 1)
	o := disk.Options{Logger: d.o.Logger, Cluster: d.o.ID, Node: d.o.Node, OnFail: func(err error) { d.failed(<-opened, err) }}
	if d.o.MayGrow != nil {
		o.MayGrow = func(ahead bool) error { return d.o.MayGrow(path, ahead) }
	}
	dk, err := disk.Open(ctx, d.o.FS, path, o)
	if err != nil {
		return holdfast.DiskID{}, fmt.Errorf("disk %s: %w", path, err)
	}
	stat := dk.Stat()
	if stat.ReadOnly != nil { // nothing can be served from it, and its open count is that of its last life
		dk.Abandon()
		return stat.Disk, fmt.Errorf("disk %s: %w", path, stat.ReadOnly)
	}
	od := &openDisk{Disk: dk, path: path, pool: pool, count: stat.OpenCount}
	opened <- od
	room := d.rooms(append(d.opened(), OpenedDisk{Path: path, Stat: stat}))[stat.Disk]
	cmd := &state.DiskOpen{Disk: stat.Disk, Node: d.o.Node, Instance: d.o.Instance, OpenCount: stat.OpenCount, Pool: pool, Size: room.Size, Free: room.Free}
	if err := d.insist(ctx, cmd); err != nil {
		dk.Abandon()
		return stat.Disk, fmt.Errorf("disk %s: %w", path, err)
	}
	if err := d.o.Serve.AddDisk(dk); err != nil {
		dk.Close()
		return stat.Disk, fmt.Errorf("disk %s: %w", path, err)
	}
	od.scrub = startScrubber(dk, d.o.ScrubEvery, d.o.Logger)
	d.mu.Lock()
	closed := d.closed
	if !closed {
		d.open[stat.Disk] = od
	}
	d.mu.Unlock()
	if closed { // the node is stopping, and does not know of this one
		od.scrub.close()
		dk.Abandon()
		return stat.Disk, holdfast.Errorf(holdfast.ErrUnavailable, "the node is stopping")
	}
	d.o.Logger.Info("disk opened", "path", path, "disk", stat.Disk, "pool", pool, "size", stat.Size, "replicas", stat.Replicas)
	return stat.Disk, nil
}

// insist proposes until raft gives a definite answer.
func (d *Disks) insist(ctx context.Context, cmd state.Command) error {
	for {
		_, err := d.o.Cluster.Propose(ctx, cmd)
		if err == nil || definite(err) {
			return err
		}
		changed := d.o.Cluster.Changed()
		select {
		case <-changed:
		case <-time.After(retryEvery):
		case <-ctx.Done():
			return holdfast.Errorf(holdfast.ErrTimeout, "raft did not answer: %w", err)
		}
	}
}

// definite reports whether the state machine itself refused a command, so that
// asking again cannot help. Metadata that is spared (ErrNoSpace) passes.
func definite(err error) bool {
	var reason state.Reason
	if errors.As(err, &reason) {
		return true
	}
	switch holdfast.KindOf(err) { //nolint:exhaustive // the rest may hide an applied command
	case holdfast.ErrInvalid, holdfast.ErrNotFound, holdfast.ErrExists, holdfast.ErrRefused, holdfast.ErrFenced, holdfast.ErrUnsupported, holdfast.ErrIntegrity:
		return true
	}
	return false
}

// failed tells raft that a disk is out for this process life (R12).
func (d *Disks) failed(od *openDisk, cause error) {
	d.o.Logger.Error("disk failed", "path", od.path, "err", cause)
	ctx, cancel := context.WithTimeout(d.ctx, 30*time.Second)
	defer cancel()
	if err := d.insist(ctx, &state.DiskFailed{Disk: od.Stat().Disk, OpenCount: od.count, Reason: cause.Error()}); err != nil {
		d.o.Logger.Warn("record the failed disk", "path", od.path, "err", err)
	}
}

// List returns the open disks, by path.
func (d *Disks) List() []OpenedDisk {
	list := d.opened()
	rooms := d.rooms(list)
	for i := range list {
		list[i].Fill, list[i].Room = d.fill(list[i].Path, list[i].Stat), rooms[list[i].Stat.Disk]
	}
	slices.SortFunc(list, func(a, b OpenedDisk) int { return cmp.Compare(a.Path, b.Path) })
	return list
}

// opened returns the open disks without what their hosts say.
func (d *Disks) opened() []OpenedDisk {
	d.mu.Lock()
	defer d.mu.Unlock()
	list := make([]OpenedDisk, 0, len(d.open)+1)
	for _, od := range d.open {
		list = append(list, OpenedDisk{Path: od.path, Pool: od.pool, Stat: od.Stat(), Scrub: od.scrub.state()})
	}
	return list
}

// Run creates and deletes replicas as raft says, until ctx ends.
func (d *Disks) Run(ctx context.Context) {
	for ctx.Err() == nil {
		changed := d.o.Cluster.Changed()
		wait := 30 * time.Second // sizes are reported at this pace when nothing else happens
		rooms := d.rooms(d.opened())
		for _, id := range d.ids() {
			if err := d.reconcile(ctx, id, rooms[id]); err != nil {
				d.o.Logger.Warn("reconcile disk", "disk", id, "err", err)
				wait = min(wait, retryAfter(err))
			}
		}
		if err := d.giveUp(ctx); err != nil {
			d.o.Logger.Warn("give up a leaving disk", "err", err)
			wait = min(wait, retryAfter(err))
		}
		select {
		case <-changed:
		case <-time.After(wait):
		case <-ctx.Done():
		}
	}
}

// retryAfter is the pause before what failed is tried again. Where space is missing
// a line of log each second would take more of it.
func retryAfter(err error) time.Duration {
	if errors.Is(err, holdfast.ErrNoSpace) {
		return 10 * retryEvery
	}
	return retryEvery
}

func (d *Disks) ids() []holdfast.DiskID {
	d.mu.Lock()
	defer d.mu.Unlock()
	ids := make([]holdfast.DiskID, 0, len(d.open))
	for id := range d.open {
		ids = append(ids, id)
	}
	return ids
}

// reconcile makes what raft placed on a disk, and deletes what raft gave up.
// A replica that raft does not name is left alone: only a tombstone or the role
// deleting, seen in a view, allows to delete.
func (d *Disks) reconcile(ctx context.Context, id holdfast.DiskID, room Room) error {
	d.mu.Lock()
	od := d.open[id]
	d.mu.Unlock()
	var errs []error
	for p := range d.o.Cluster.View().ReplicasOn(id) {
		var err error
		if p.Volume.Deleted || p.Replica.Role == holdfast.RoleDeleting {
			if err = d.o.Serve.DeleteReplica(ctx, p.Replica.ID); err == nil {
				_, err = d.o.Cluster.Propose(ctx, &state.ReplicaGone{Replica: p.Replica.ID})
			}
		} else if _, have := od.Replica(p.Replica.ID); !have {
			err = d.o.Serve.CreateReplica(id, disk.ReplicaDesc{Segment: p.Segment, Replica: p.Replica.ID, Lineage: p.Replica.Lineage, Size: p.Size})
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("replica %v of volume %s: %w", p.Replica.ID, p.Volume.Name, err))
		}
	}
	if rec, ok := d.o.Cluster.View().Disk(id); ok && len(errs) == 0 && (rec.Removed || rec.Leaving && d.empty(id)) {
		return d.release(ctx, id, od)
	}
	errs = append(errs, d.report(ctx, od, room))
	return errors.Join(errs...)
}

// A change of room is worth a raft command above reportAbove, or above a share of a
// small disk, but not below reportLeast.
const (
	reportAbove = 64 << 20
	reportShare = 16
	reportLeast = 1 << 20
)

// report tells raft how much room a disk has, once that moved enough to matter for
// placement.
func (d *Disks) report(ctx context.Context, od *openDisk, room Room) error {
	stat := od.Stat()
	known, ok := d.o.Cluster.View().Disk(stat.Disk)
	failed := stat.Failed != nil
	if !ok || failed || room.Size == 0 { // opened since the rooms were looked at
		return nil //nolint:nilerr // raft was told when it failed
	}
	enough := min(reportAbove, max(known.Size/reportShare, reportLeast))
	if moved := max(distance(known.Free, room.Free), distance(known.Size, room.Size)); moved < enough {
		return nil
	}
	_, err := d.o.Cluster.Propose(ctx, &state.DiskUpdate{Disk: stat.Disk, OpenCount: od.count, Size: room.Size, Free: room.Free})
	return err
}

func distance(a, b int64) int64 { return max(a-b, b-a) }

// Close closes every disk. The server must be closed before.
func (d *Disks) Close() error {
	d.cancel()
	d.changing.Lock()
	defer d.changing.Unlock()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	var errs []error
	for id, od := range d.open {
		od.scrub.close()
		errs = append(errs, od.Disk.Close())
		delete(d.open, id)
	}
	return errors.Join(errs...)
}
