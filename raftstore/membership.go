package raftstore

import (
	"context"
	"slices"

	"github.com/hashicorp/raft"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

// Member is one server of the raft configuration.
type Member struct {
	Node    holdfast.NodeID
	Address string // as recorded in the configuration
	Voter   bool
}

// Members returns the raft configuration as this member knows it.
func (s *Store) Members() ([]Member, error) {
	f := s.raft.GetConfiguration()
	if err := f.Error(); err != nil {
		return nil, s.raftError("read the raft configuration", err)
	}
	var out []Member
	for _, server := range f.Configuration().Servers {
		node, address, err := parseMemberAddress(server.Address)
		if err != nil {
			return nil, err
		}
		out = append(out, Member{Node: node, Address: address, Voter: server.Suffrage == raft.Voter})
	}
	return out, nil
}

// Presence is what the leader knows of a node beyond the tables.
type Presence struct {
	Alive   bool
	Applied uint64 // the index its View had reached when it was last heard of
}

// catchUp is how far a non-voter's View may be behind when it is made a voter,
// in entries: what it still lacks arrives within a heartbeat or two.
const catchUp = 256

// Reconcile makes one step towards the wanted membership, on the leader, and
// reports whether it made one. Wanted: every node of the tables that is alive is
// a member, up to MaxMembers; an odd number of voters, up to MaxVoters, that are
// alive and caught up when they begin to vote; removed nodes are no members;
// addresses are as in the tables. A voter that is down stays one: only the
// operator's NodeRemove ends it.
func (s *Store) Reconcile(ctx context.Context, present func(holdfast.NodeID) Presence) (bool, error) {
	if !s.IsLeader() {
		return false, nil
	}
	members, err := s.Members()
	if err != nil {
		return false, err
	}
	step := plan(s.View(), s.Node(), members, s.opts.MaxVoters, present)
	if step.act == actNone {
		return false, nil
	}
	s.opts.Logger.Info("membership changes", "node", step.node.String(), "action", string(step.act))
	id, address := raft.ServerID(step.node.String()), memberAddress(step.node, step.address)
	var f raft.Future
	switch step.act {
	case actAdd:
		f = s.raft.AddNonvoter(id, address, 0, 0)
	case actVote:
		f = s.raft.AddVoter(id, address, 0, 0)
	case actRemove:
		f = s.raft.RemoveServer(id, 0, 0)
	case actRecord:
		_, err := s.Propose(ctx, &state.SetMember{Node: step.node, From: step.from, To: step.to})
		return err == nil, err
	}
	if err := s.wait(ctx, f, nil); err != nil {
		return false, s.raftError("change the raft configuration", err)
	}
	return true, nil
}

type action string

const (
	actNone   action = ""
	actAdd    action = "add as non-voter"
	actVote   action = "make voter"
	actRemove action = "remove"
	actRecord action = "record kind"
)

type step struct {
	act      action
	node     holdfast.NodeID
	address  string
	from, to state.MemberKind // actRecord
}

// plan decides the next step; pure.
func plan(v *state.View, self holdfast.NodeID, members []Member, maxVoters int, present func(holdfast.NodeID) Presence) step {
	for _, m := range members {
		n, ok := v.Node(m.Node)
		if ok && n.Removed && m.Node != self {
			return step{act: actRemove, node: m.Node}
		}
		if !ok || n.Removed {
			continue // the first voter before it announced itself
		}
		if n.Addresses.Raft != m.Address {
			if m.Voter {
				return step{act: actVote, node: m.Node, address: n.Addresses.Raft}
			}
			return step{act: actAdd, node: m.Node, address: n.Addresses.Raft}
		}
		if want := kindOf(m); n.Kind != want {
			return step{act: actRecord, node: m.Node, from: n.Kind, to: want}
		}
	}
	for n := range v.Nodes() {
		isMember := slices.ContainsFunc(members, func(m Member) bool { return m.Node == n.ID })
		if !isMember && n.Kind != state.MemberWatcher {
			return step{act: actRecord, node: n.ID, from: n.Kind, to: state.MemberWatcher}
		}
		if !isMember && len(members) < MaxMembers && present(n.ID).Alive {
			return step{act: actAdd, node: n.ID, address: n.Addresses.Raft}
		}
	}
	return planVoter(v, members, maxVoters, present)
}

// planVoter promotes a non-voter when that leads to a larger odd number of
// voters: with two nodes one votes, as two voters would fail when either does.
func planVoter(v *state.View, members []Member, maxVoters int, present func(holdfast.NodeID) Presence) step {
	voters := 0
	var ready []Member
	for _, m := range members {
		p := present(m.Node)
		switch {
		case m.Voter:
			voters++
		case p.Alive && p.Applied > 0 && p.Applied+catchUp >= v.Index():
			ready = append(ready, m)
		}
	}
	want := min(maxVoters, voters+len(ready))
	if want%2 == 0 {
		want--
	}
	if voters >= want || len(ready) == 0 {
		return step{}
	}
	return step{act: actVote, node: ready[0].Node, address: ready[0].Address}
}

func kindOf(m Member) state.MemberKind {
	if m.Voter {
		return state.MemberVoter
	}
	return state.MemberNonVoter
}
