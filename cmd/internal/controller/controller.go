package controller

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

// DefaultGrace is how long a node may be gone before its replicas are made anew
// elsewhere: longer than a reboot or an upgrade of its host.
const DefaultGrace = 10 * time.Minute

// every is the time between two rounds: nothing here is urgent.
const every = time.Second

// Cluster is the metadata as the controller needs it.
type Cluster interface {
	View() *state.View
	Propose(ctx context.Context, cmd state.Command) (state.Result, error)
	Gone(node holdfast.NodeID) bool
}

// Options are what a controller works with.
type Options struct {
	Cluster Cluster
	Leads   func() bool     // this node leads the metadata
	Self    holdfast.NodeID // is not gone
	Grace   time.Duration   // 0: DefaultGrace
	Logger  *slog.Logger
}

// Controller runs on every node, notes since when others are gone, and acts where
// raft leads. After a change of leader the grace period may be counted anew in part:
// a node counts from when it first saw the other gone.
type Controller struct {
	o Options

	mu      sync.Mutex
	since   map[holdfast.NodeID]time.Time // first seen gone
	rests   map[holdfast.VolumeID]rest
	blocked map[holdfast.SegmentID]string // as of the last round here; nil: it does not lead
}

// rest is since when a volume is seen detached and left alone.
type rest struct {
	epoch  holdfast.Epoch
	repair state.Repair
	since  time.Time
}

// New returns a controller that does nothing until Run.
func New(o Options) *Controller {
	if o.Grace == 0 {
		o.Grace = DefaultGrace
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return &Controller{o: o, since: map[holdfast.NodeID]time.Time{}, rests: map[holdfast.VolumeID]rest{}}
}

// Run works until ctx ends.
func (c *Controller) Run(ctx context.Context) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		view := c.o.Cluster.View()
		c.note(view, time.Now())
		if c.o.Leads() {
			c.round(ctx, view)
		} else {
			c.remember(nil)
		}
	}
}

// note keeps since when nodes are gone, and volumes left alone.
func (c *Controller) note(view *state.View, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for n := range view.Nodes() {
		_, known := c.since[n.ID]
		switch gone := n.ID != c.o.Self && c.o.Cluster.Gone(n.ID); {
		case gone && !known:
			c.since[n.ID] = now
		case !gone:
			delete(c.since, n.ID)
		}
	}
	c.noteRests(view, now)
}

func (c *Controller) noteRests(view *state.View, now time.Time) {
	p := &planner{view: view, s: Situation{Gone: func(id holdfast.NodeID) bool { _, gone := c.since[id]; return gone }}}
	was := c.rests
	c.rests = map[holdfast.VolumeID]rest{}
	for v := range view.Volumes() {
		if v.Phase != state.PhaseDetached || p.writes(v) || !lacks(v) {
			continue
		}
		r := rest{epoch: v.Epoch, repair: v.Repair, since: now}
		if old, ok := was[v.ID]; ok && old.epoch == r.epoch && old.repair == r.repair {
			r.since = old.since
		}
		c.rests[v.ID] = r
	}
}

// lacks says whether a volume has a replica that is not in sync.
func lacks(v *state.Volume) bool {
	for i := range v.Segments {
		for _, r := range v.Segments[i].Replicas {
			if r.Role == holdfast.RoleSyncing || r.Role == holdfast.RoleStale {
				return true
			}
		}
	}
	return false
}

// paused is how long a detached volume is still left alone.
func (c *Controller) paused(v *state.Volume) time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	r, ok := c.rests[v.ID]
	if !ok {
		return pause(v.Repair.Tries)
	}
	return max(0, pause(v.Repair.Tries)-time.Since(r.since))
}

// GoneFor is for how long this node has seen another gone, and how much of the
// grace period is left; false if it answers.
func (c *Controller) GoneFor(node holdfast.NodeID) (gone, left time.Duration, is bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	at, is := c.since[node]
	if !is {
		return 0, 0, false
	}
	gone = time.Since(at)
	return gone, max(0, c.o.Grace-gone), true
}

// Replaced says whether a node is gone and its replicas are to be made anew
// elsewhere, as far as this node has seen.
func (c *Controller) Replaced(node holdfast.NodeID) bool {
	n, ok := c.o.Cluster.View().Node(node)
	return !ok || n.Removed || c.o.Cluster.Gone(node) && replaced(n, c.Lost)
}

// Lost says whether a node is gone for longer than the grace period, as far as this
// node has seen.
func (c *Controller) Lost(node holdfast.NodeID) bool {
	_, left, gone := c.GoneFor(node)
	return gone && left == 0
}

// Blocked says why segments are not brought to their number of replicas. A node
// that does not lead says what it would think: it sees the same tables, and may
// have seen others gone since another time.
func (c *Controller) Blocked() map[holdfast.SegmentID]string {
	c.mu.Lock()
	blocked := c.blocked
	c.mu.Unlock()
	if blocked == nil {
		_, list := Plan(c.o.Cluster.View(), c.situation())
		blocked = reasons(list)
	}
	return blocked
}

func reasons(blocked []Blocked) map[holdfast.SegmentID]string {
	m := make(map[holdfast.SegmentID]string, len(blocked))
	for _, b := range blocked {
		m[b.Segment] = b.Why
	}
	return m
}

func (c *Controller) remember(blocked map[holdfast.SegmentID]string) {
	c.mu.Lock()
	c.blocked = blocked
	c.mu.Unlock()
}

func (c *Controller) situation() Situation {
	return Situation{
		Gone: func(id holdfast.NodeID) bool { _, _, gone := c.GoneFor(id); return gone },
		Lost: c.Lost, Paused: c.paused, Now: time.Now().Unix(),
		NewReplica: holdfast.NewID[holdfast.ReplicaID],
	}
}

func (c *Controller) round(ctx context.Context, view *state.View) {
	commands, blocked := Plan(view, c.situation())
	c.remember(reasons(blocked))
	for _, cmd := range commands {
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		_, err := c.o.Cluster.Propose(ctx, cmd)
		cancel()
		switch x := cmd.(type) {
		case *state.AddReplica:
			c.o.Logger.Info("a replica is placed", "segment", x.Segment, "disk", x.Disk, "replica", x.Replica, "err", err)
		case *state.RemoveReplica:
			c.o.Logger.Info("a replica is to go", "segment", x.Segment, "replica", x.Replica, "err", err)
		case *state.AttachBegin:
			c.o.Logger.Info("a detached volume is to be repaired", "volume", x.Volume, "node", x.Node, "epoch", uint64(x.Expect)+1, "err", err)
		case *state.EndRepair:
			c.o.Logger.Warn("a repair was left behind, and nothing is left to do", "volume", x.Volume, "err", err)
		}
		if err != nil {
			return // the tables moved on, or there is no quorum: the next round sees
		}
	}
}
