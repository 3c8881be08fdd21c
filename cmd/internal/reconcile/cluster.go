package reconcile

import (
	"context"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

// Cluster is the metadata as a node sees it. All methods may be called
// concurrently.
type Cluster interface {
	// View is the latest local view; it may lag behind the leader's.
	View() *state.View
	// Read returns a view that shows everything that was applied anywhere
	// before the call; ErrUnavailable without quorum, ErrNoSpace as of Propose.
	Read(ctx context.Context) (*state.View, error)
	// Propose applies a command, through the leader, which holds a takeover
	// back until the holder is gone or has detached. An error without a
	// state.Reason or an ErrInvalid may hide an applied command: commands are
	// idempotent, propose the same again. ErrNoSpace hides none: the only node
	// that decides has no space to, for now.
	Propose(ctx context.Context, cmd state.Command) (state.Result, error)
	// Changed returns a channel that is closed when the local view or the
	// liveness of a node is no longer what it was at the call.
	Changed() <-chan struct{}
	// Liveness listens for a process for as long as it takes to be sure that it
	// is alive, if it is: a little more than two heartbeats.
	Liveness(ctx context.Context, holder state.Holder) (Liveness, error)
	// Gone is this node's own record of the same, for what needs no certainty.
	Gone(node holdfast.NodeID) bool
}

// Liveness is what this node knows of a process.
type Liveness struct {
	Gone bool
	// Alive: it was heard since the question was asked.
	Alive bool
	// Why says for how long it was silent, in words.
	Why string
}
