package raftstore

import (
	"context"
	"log/slog"
	"net"
	"time"

	"github.com/holdfast-storage/holdfast"
)

// Options are the settings of Open.
type Options struct {
	// Dir holds all there is: identity, log, snapshots. It is made if need be.
	Dir string
	// Node, if set, must be the id that Dir belongs to, or becomes it when Dir
	// is new. Zero: Dir's, or a fresh one.
	Node holdfast.NodeID
	// Listener accepts raft connections. The Store closes it, also when Open fails.
	Listener net.Listener
	// Address is the HOST:PORT at which other members dial the Listener.
	Address string
	// Dial connects to a HOST:PORT. Default: TCP; names are resolved each time.
	Dial func(ctx context.Context, address string) (net.Conn, error)
	// Logger. Default: none.
	Logger *slog.Logger
	// Timings of raft. Zero values mean the defaults.
	Timings Timings
	// MaxVoters is the most voters that Reconcile makes: odd. Default 3.
	MaxVoters int
}

// Timings of raft; tests on one machine shorten them.
type Timings struct {
	// Heartbeat: a follower without a word of its leader for this long starts
	// an election. Default 1 s; raft's own affair, not the liveness of nodes.
	Heartbeat time.Duration
	// Election: how long a candidate waits for votes. Default 1 s.
	Election time.Duration
	// Lease: a leader without a quorum for this long steps down. Default 500 ms.
	Lease time.Duration
	// Connect bounds a dial and one raft RPC. Default 2 s.
	Connect time.Duration
	// DiskPatience: a leader that is stuck in a write of its own log for this
	// long stops to lead. Default 3 s.
	DiskPatience time.Duration
	// SnapshotInterval is how often raft looks whether a snapshot is due. Default 2 min.
	SnapshotInterval time.Duration
	// SnapshotEntries is how many entries make one due. Default 8192.
	SnapshotEntries uint64
	// TrailingEntries stay in the log after a snapshot, for followers that are
	// a little behind. Default 2048.
	TrailingEntries uint64
}

// MaxMembers bounds the raft members; further nodes are watchers. More members
// make every command slower and none safer.
const MaxMembers = 7

func (o *Options) setDefaults() {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Dial == nil {
		o.Dial = func(ctx context.Context, address string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", address)
		}
	}
	if o.MaxVoters == 0 {
		o.MaxVoters = 3
	}
	t := &o.Timings
	orElse(&t.Heartbeat, time.Second)
	orElse(&t.Election, time.Second)
	orElse(&t.Lease, 500*time.Millisecond)
	orElse(&t.Connect, 2*time.Second)
	orElse(&t.DiskPatience, 3*time.Second)
	orElse(&t.SnapshotInterval, 2*time.Minute)
	orElse(&t.SnapshotEntries, 8192)
	orElse(&t.TrailingEntries, 2048)
}

func orElse[T comparable](p *T, v T) {
	var zero T
	if *p == zero {
		*p = v
	}
}

func (o *Options) validate() error {
	switch {
	case o.Dir == "":
		return holdfast.Errorf(holdfast.ErrInvalid, "the raft store needs a directory")
	case o.Listener == nil:
		return holdfast.Errorf(holdfast.ErrInvalid, "the raft store needs a listener")
	case o.Address == "":
		return holdfast.Errorf(holdfast.ErrInvalid, "the raft store needs the address that others dial")
	case o.MaxVoters < 1 || o.MaxVoters > MaxMembers || o.MaxVoters%2 == 0:
		return holdfast.Errorf(holdfast.ErrInvalid, "%d voters: an odd number up to %d is possible", o.MaxVoters, MaxMembers)
	}
	return nil
}
