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
	blocked map[holdfast.SegmentID]string // as of the last round here
}

// New returns a controller that does nothing until Run.
func New(o Options) *Controller {
	if o.Grace == 0 {
		o.Grace = DefaultGrace
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return &Controller{o: o, since: map[holdfast.NodeID]time.Time{}}
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

// note keeps since when nodes are gone.
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

// Blocked says why a segment is not brought to its number of replicas, "" if
// nothing is in the way or this node does not lead.
func (c *Controller) Blocked(id holdfast.SegmentID) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.blocked[id]
}

func (c *Controller) remember(blocked []Blocked) {
	m := make(map[holdfast.SegmentID]string, len(blocked))
	for _, b := range blocked {
		m[b.Segment] = b.Why
	}
	c.mu.Lock()
	c.blocked = m
	c.mu.Unlock()
}

func (c *Controller) round(ctx context.Context, view *state.View) {
	commands, blocked := Plan(view, Situation{
		Gone: func(id holdfast.NodeID) bool { _, _, gone := c.GoneFor(id); return gone },
		Lost: func(id holdfast.NodeID) bool { _, left, gone := c.GoneFor(id); return gone && left == 0 },

		NewReplica: holdfast.NewID[holdfast.ReplicaID],
	})
	c.remember(blocked)
	for _, cmd := range commands {
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		_, err := c.o.Cluster.Propose(ctx, cmd)
		cancel()
		switch x := cmd.(type) {
		case *state.AddReplica:
			c.o.Logger.Info("a replica is placed", "segment", x.Segment, "disk", x.Disk, "replica", x.Replica, "err", err)
		case *state.RemoveReplica:
			c.o.Logger.Info("a replica is to go", "segment", x.Segment, "replica", x.Replica, "err", err)
		}
		if err != nil {
			return // the tables moved on, or there is no quorum: the next round sees
		}
	}
}
