package node

import (
	"context"
	"fmt"
	"sync"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/cmd/internal/reconcile"
	"github.com/holdfast-storage/holdfast/raftstore/peer"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

// cluster is the metadata as the rest of the node sees it.
type cluster struct {
	peer *peer.Peer
	self holdfast.NodeID

	mu      sync.Mutex
	changed chan struct{}
}

var _ reconcile.Cluster = (*cluster)(nil)

func newCluster(p *peer.Peer, self holdfast.NodeID) *cluster {
	return &cluster{peer: p, self: self, changed: make(chan struct{})}
}

// run joins changes of the tables and of liveness into one signal, until ctx ends.
func (c *cluster) run(ctx context.Context) {
	for ctx.Err() == nil {
		tables, liveness := c.peer.Changed(), c.peer.LivenessChanged()
		// Taken first, told after: what changed in between is told now.
		c.mu.Lock()
		close(c.changed)
		c.changed = make(chan struct{})
		c.mu.Unlock()
		select {
		case <-tables:
		case <-liveness:
		case <-ctx.Done():
		}
	}
}

func (c *cluster) Changed() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.changed
}

func (c *cluster) View() *state.View { return c.peer.View() }

func (c *cluster) Read(ctx context.Context) (*state.View, error) { return c.peer.Read(ctx) }

func (c *cluster) Propose(ctx context.Context, cmd state.Command) (state.Result, error) {
	return c.peer.Propose(ctx, cmd)
}

// hears reports whether heartbeats come to this node: they go to voters.
func (c *cluster) hears() bool {
	n, ok := c.View().Node(c.self)
	return ok && n.Kind == state.MemberVoter
}

func (c *cluster) Gone(node holdfast.NodeID) bool {
	if node == c.self {
		return false
	}
	if c.hears() {
		return c.peer.Alive(node).Gone
	}
	return c.peer.SaidGone(node)
}

// Liveness implements reconcile.Cluster.
func (c *cluster) Liveness(ctx context.Context, h state.Holder) (reconcile.Liveness, error) {
	alive, gone, err := c.peer.Listen(ctx, h)
	if err != nil {
		return reconcile.Liveness{}, err
	}
	return reconcile.Liveness{Alive: alive, Gone: gone, Why: fmt.Sprintf("it is gone after %v of silence", peer.GoneAfter)}, nil
}
