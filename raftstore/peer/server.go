package peer

import (
	"context"
	"errors"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/raftstore"
	"github.com/holdfast-storage/holdfast/raftstore/peer/peerpb"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

// server is the Peer as gRPC sees it.
type server struct {
	peerpb.UnimplementedPeerServer
	p *Peer
}

// Hello says who is there.
func (s server) Hello(context.Context, *peerpb.HelloRequest) (*peerpb.HelloReply, error) {
	p := s.p
	node, cluster := p.store.Node(), p.store.Cluster()
	r := &peerpb.HelloReply{Node: node[:], Leader: p.redirect()}
	// A node that has not heard of the tables yet cannot take anybody in.
	if !cluster.IsZero() {
		r.Cluster = cluster[:]
	}
	return r, nil
}

// Join is Announce at the leader.
func (s server) Join(ctx context.Context, r *peerpb.CommandRequest) (*peerpb.CommandReply, error) {
	p := s.p
	cmd, err := p.decode(r, false)
	if err != nil {
		return p.reply(state.Result{}, err), nil
	}
	join, ok := cmd.(*state.NodeJoin)
	if !ok || join.Node.ID != nodeID(r.GetFrom()) {
		return p.reply(state.Result{}, holdfast.Errorf(holdfast.ErrInvalid, "a join carries the sender's own record")), nil
	}
	return p.reply(p.announceHere(ctx, join.Node)), nil
}

// Forward is Propose at the leader.
func (s server) Forward(ctx context.Context, r *peerpb.CommandRequest) (*peerpb.CommandReply, error) {
	p := s.p
	cmd, err := p.decode(r, true)
	if err != nil {
		return p.reply(state.Result{}, err), nil
	}
	return p.reply(p.proposeHere(ctx, cmd)), nil
}

// ReadIndex is the leader's part of Read.
func (s server) ReadIndex(ctx context.Context, r *peerpb.ReadIndexRequest) (*peerpb.ReadIndexReply, error) {
	p := s.p
	index, err := uint64(0), p.checkSender(r.GetCluster(), r.GetFrom(), true)
	if err == nil {
		index, err = p.store.ReadIndex(ctx)
	}
	if err != nil {
		c := p.reply(state.Result{}, err)
		return &peerpb.ReadIndexReply{Failure: c.GetFailure(), Redirect: c.GetRedirect()}, nil
	}
	return &peerpb.ReadIndexReply{Index: index}, nil
}

// Heartbeat notes that a node lives.
func (s server) Heartbeat(_ context.Context, r *peerpb.HeartbeatRequest) (*peerpb.HeartbeatReply, error) {
	p := s.p
	self := p.Self()
	reply := &peerpb.HeartbeatReply{Node: self.ID[:], Instance: self.Instance[:]}
	if err := p.checkSender(r.GetCluster(), r.GetFrom(), true); err != nil {
		reply.Failure = failureOf(err)
		return reply, nil
	}
	var instance holdfast.InstanceID
	if len(r.GetInstance()) != len(instance) {
		reply.Failure = failureOf(holdfast.Errorf(holdfast.ErrInvalid, "an instance of %d bytes", len(r.GetInstance())))
		return reply, nil
	}
	copy(instance[:], r.GetInstance())
	node := nodeID(r.GetFrom())
	p.record.arrive(node, instance, r.GetApplied())
	for _, gone := range p.record.silent() {
		reply.Gone = append(reply.Gone, gone[:])
	}
	if address := r.GetRaftAddress(); address != "" && len(address) <= state.MaxTextLength {
		p.store.LearnAddress(node, address)
	}
	return reply, nil
}

// decode checks the sender and reads the command.
func (p *Peer) decode(r *peerpb.CommandRequest, member bool) (state.Command, error) {
	if err := p.checkSender(r.GetCluster(), r.GetFrom(), member); err != nil {
		return nil, err
	}
	if len(r.GetCommand()) > raftstore.MaxCommand {
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "a command of %d bytes, more than %d", len(r.GetCommand()), raftstore.MaxCommand)
	}
	return state.DecodeCommand(r.GetCommand())
}

// checkSender refuses who belongs to another cluster or was removed; member asks
// for the sender's record to stand in the tables, as far as this node knows them.
func (p *Peer) checkSender(cluster, from []byte, member bool) error {
	own := p.store.Cluster()
	if own.IsZero() {
		return holdfast.Errorf(holdfast.ErrUnavailable, "this node has no cluster yet")
	}
	if string(cluster) != string(own[:]) {
		e := holdfast.Errorf(holdfast.ErrRefused, "this node belongs to cluster %v, the sender to another", own)
		e.Cause = state.ReasonForeign
		return e
	}
	if len(from) != len(holdfast.NodeID{}) {
		return holdfast.Errorf(holdfast.ErrInvalid, "a node id of %d bytes", len(from))
	}
	node := nodeID(from)
	n, ok := p.View().Node(node)
	if ok && n.Removed {
		e := holdfast.Errorf(holdfast.ErrRefused, "node %v (%s) was removed from the cluster", n.ID, n.Name).
			WithRemedy("an id is never taken again: start the node with an empty data directory")
		e.Cause = state.ReasonRemoved
		return e
	}
	if member && !ok && p.store.IsLeader() {
		return holdfast.Errorf(holdfast.ErrRefused, "node %v is no node of the cluster", node).WithRemedy("join it first")
	}
	return nil
}

func nodeID(b []byte) holdfast.NodeID {
	var id holdfast.NodeID
	copy(id[:], b)
	return id
}

// reply puts an answer or an error into a message; an answer that only the
// leader can give becomes a redirect to it.
func (p *Peer) reply(res state.Result, err error) *peerpb.CommandReply {
	var not *raftstore.NotLeader
	if errors.As(err, &not) {
		return &peerpb.CommandReply{Redirect: p.redirect()}
	}
	if err != nil {
		return &peerpb.CommandReply{Failure: failureOf(err)}
	}
	b, err := state.EncodeResult(res)
	if err != nil {
		return &peerpb.CommandReply{Failure: failureOf(err)}
	}
	return &peerpb.CommandReply{Result: b}
}

// redirect names the leader as far as it is known here.
func (p *Peer) redirect() *peerpb.Redirect {
	r := &peerpb.Redirect{}
	leader, ok := p.store.Leader()
	if !ok {
		return r
	}
	r.Leader = leader[:]
	if n, ok := p.View().Node(leader); ok {
		r.Address = n.Addresses.API
	}
	return r
}

func failureOf(err error) *peerpb.Failure {
	f := state.FailureOf(err)
	return &peerpb.Failure{Kind: string(f.Kind), Reason: string(f.Reason), Message: f.Message, Remedy: f.Remedy}
}

func failureError(f *peerpb.Failure) error {
	return state.Failure{Kind: holdfast.Kind(f.GetKind()), Reason: state.Reason(f.GetReason()), Message: f.GetMessage(), Remedy: f.GetRemedy()}.Err()
}
