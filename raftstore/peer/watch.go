package peer

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/raftstore/peer/peerpb"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

const (
	// watchPiece is the size of one message of a snapshot, in bytes.
	watchPiece = 1 << 20
	// watchPace is the least time between two snapshots to one watcher: each is whole.
	watchPace = 200 * time.Millisecond
	// maxWatched bounds a snapshot that is received, in bytes.
	maxWatched = 1 << 30
	// followEvery is the pace at which a node looks whether it must follow.
	followEvery = 500 * time.Millisecond
)

// follower holds what is followed and who waits for a change of either copy.
type follower struct {
	view atomic.Pointer[state.View] // nil while nothing was followed

	mu      sync.Mutex // of changed
	changed chan struct{}
}

func (f *follower) next() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.changed
}

func (f *follower) announce() {
	f.mu.Lock()
	close(f.changed)
	f.changed = make(chan struct{})
	f.mu.Unlock()
}

// mirror passes changes of the store on, and saves the contacts for the next life.
func (p *Peer) mirror() {
	defer p.wg.Done()
	var saved []string
	own := p.store.Changed()
	for {
		followed := p.Changed()
		if known := p.KnownAddresses(); len(known) > 0 && !slices.Equal(known, saved) {
			if err := p.store.SaveContacts(known); err != nil {
				p.log.Warn("contacts not saved", "error", err)
			}
			saved = known
		}
		select {
		case <-own:
			own = p.store.Changed() // before the word is passed on: none is missed
			p.watch.announce()
		case <-followed:
		case <-p.ctx.Done():
			return
		}
	}
}

// follow keeps a copy of the tables on a node that is no raft member.
func (p *Peer) follow() {
	defer p.wg.Done()
	ticker := time.NewTicker(followEvery)
	defer ticker.Stop()
	for {
		if p.mustFollow() {
			if address := p.nextTarget(); address != "" {
				if err := p.followOne(address); err != nil && p.ctx.Err() == nil {
					p.log.Debug("watch ended", "address", address, "error", err)
				}
			}
		}
		select {
		case <-ticker.C:
		case <-p.ctx.Done():
			return
		}
	}
}

// mustFollow: the node has a cluster, and raft does not count it in.
func (p *Peer) mustFollow() bool {
	if !p.store.HasCluster() {
		return false
	}
	members, err := p.store.Members()
	if err != nil {
		return false
	}
	for _, m := range members {
		if m.Node == p.store.Node() {
			return false
		}
	}
	return true
}

// followOne follows one node until it ends or this node becomes a member.
func (p *Peer) followOne(address string) error {
	conn, err := p.conns.to(address)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(p.ctx)
	defer cancel()
	cluster, self := p.store.Cluster(), p.store.Node()
	stream, err := peerpb.NewPeerClient(conn).Watch(ctx, &peerpb.WatchRequest{Cluster: cluster[:], From: self[:], Index: p.View().Index()})
	if err != nil {
		return callError("watch "+address, err)
	}
	var snap []byte
	for {
		r, err := stream.Recv()
		if err != nil {
			return callError("watch "+address, err)
		}
		if f := r.GetFailure(); f != nil {
			return failureError(f)
		}
		snap = append(snap, r.GetData()...)
		if len(snap) > maxWatched {
			return holdfast.Errorf(holdfast.ErrIntegrity, "a watched snapshot of more than %d bytes", maxWatched)
		}
		if !r.GetLast() {
			continue
		}
		v, err := state.DecodeSnapshot(snap)
		if err != nil {
			return err
		}
		snap = nil
		if v.Cluster().ID == cluster && v.Index() > p.View().Index() {
			p.watch.view.Store(v)
			p.watch.announce()
		}
		if !p.mustFollow() {
			return nil
		}
	}
}

// Watch streams the tables: whole snapshots, each when something changed.
func (s server) Watch(r *peerpb.WatchRequest, stream grpc.ServerStreamingServer[peerpb.WatchReply]) error {
	p := s.p
	if err := p.checkSender(r.GetCluster(), r.GetFrom(), true); err != nil {
		return stream.Send(&peerpb.WatchReply{Failure: failureOf(err)})
	}
	pace := time.NewTicker(watchPace)
	defer pace.Stop()
	sent := r.GetIndex()
	for {
		changed := p.Changed()
		if v := p.View(); v.Index() > sent {
			if err := sendSnapshot(stream, v); err != nil {
				return err
			}
			sent = v.Index()
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return stream.Context().Err()
		case <-p.ctx.Done():
			return nil
		}
		select {
		case <-pace.C:
		case <-stream.Context().Done():
			return stream.Context().Err()
		case <-p.ctx.Done():
			return nil
		}
	}
}

func sendSnapshot(stream grpc.ServerStreamingServer[peerpb.WatchReply], v *state.View) error {
	b, err := state.EncodeSnapshot(v)
	if err != nil {
		return stream.Send(&peerpb.WatchReply{Failure: failureOf(err)})
	}
	for {
		n := min(len(b), watchPiece)
		if err := stream.Send(&peerpb.WatchReply{Data: b[:n], Last: n == len(b)}); err != nil {
			return err
		}
		if b = b[n:]; len(b) == 0 {
			return nil
		}
	}
}
