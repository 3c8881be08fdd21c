package peer

import (
	"context"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/raftstore"
	"github.com/holdfast-storage/holdfast/raftstore/peer/peerpb"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

// listenFor is how long a living process may be silent while we listen: a little
// more than two heartbeats.
const listenFor = 2*HeartbeatEvery + 300*time.Millisecond

// Listen finds out whether a process lives: alive, if it is heard after the call,
// gone, if it was silent for GoneAfter or another process runs in its place. Neither
// is also an answer: it was silent for listenFor, and may be dead. A voter listens
// itself; another node, to which no heartbeats come, asks the leader.
func (p *Peer) Listen(ctx context.Context, h state.Holder) (alive, gone bool, err error) {
	if self, ok := p.View().Node(p.store.Node()); ok && self.Kind == state.MemberVoter {
		return p.listenHere(ctx, h)
	}
	cluster, self := p.store.Cluster(), p.store.Node()
	_, err = p.atLeader(ctx, "listen for a node",
		func(ctx context.Context) (state.Result, error) {
			var err error
			alive, gone, err = p.listenHere(ctx, h)
			return state.Result{}, err
		},
		func(ctx context.Context, client peerpb.PeerClient) (*peerpb.CommandReply, error) {
			r, err := client.Listen(ctx, &peerpb.ListenRequest{Cluster: cluster[:], From: self[:], Node: h.Node[:], Instance: h.Instance[:]})
			if err != nil {
				return nil, err
			}
			alive, gone = r.GetAlive(), r.GetGone()
			b, err := state.EncodeResult(state.Result{})
			return &peerpb.CommandReply{Result: b, Failure: r.GetFailure(), Redirect: r.GetRedirect()}, err
		})
	return alive, gone, err
}

// listenHere listens with this node's own record.
func (p *Peer) listenHere(ctx context.Context, h state.Holder) (alive, gone bool, err error) {
	asked := p.record.now()
	tick := time.NewTicker(HeartbeatEvery / 10)
	defer tick.Stop()
	for {
		if p.record.gone(h) {
			return false, true, nil
		}
		since := p.record.now() - asked
		if a := p.record.of(h.Node); a.Instance == h.Instance && a.Silence < since {
			return true, false, nil
		}
		if since >= listenFor {
			return false, false, nil
		}
		select {
		case <-tick.C:
		case <-p.ctx.Done():
			return false, false, errClosed()
		case <-ctx.Done():
			return false, false, holdfast.Errorf(holdfast.ErrTimeout, "listen for the holder: %w", ctx.Err())
		}
	}
}

// Listen is the leader's part of Peer.Listen.
func (s server) Listen(ctx context.Context, r *peerpb.ListenRequest) (*peerpb.ListenReply, error) {
	p := s.p
	err := p.checkSender(r.GetCluster(), r.GetFrom(), true)
	var instance holdfast.InstanceID
	switch {
	case err == nil && !p.store.IsLeader():
		err = &raftstore.NotLeader{}
	case err == nil && (len(r.GetNode()) != len(holdfast.NodeID{}) || len(r.GetInstance()) != len(instance)):
		err = holdfast.Errorf(holdfast.ErrInvalid, "a node id of %d bytes and an instance of %d", len(r.GetNode()), len(r.GetInstance()))
	}
	reply := &peerpb.ListenReply{}
	if err == nil {
		copy(instance[:], r.GetInstance())
		reply.Alive, reply.Gone, err = p.listenHere(ctx, state.Holder{Node: nodeID(r.GetNode()), Instance: instance})
	}
	if err != nil {
		c := p.reply(state.Result{}, err)
		return &peerpb.ListenReply{Failure: c.GetFailure(), Redirect: c.GetRedirect()}, nil
	}
	return reply, nil
}
