package controller

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

const (
	// MaxRebuilds is how many replicas are filled at one node, and so at one disk, at a time: more would only share its network and its disks, and
	// all be late.
	MaxRebuilds = 2
	// maxCommands bounds what one round proposes: the next one sees the effect.
	maxCommands = 16
)

// Situation is what the tables do not say.
type Situation struct {
	// Gone: the node does not answer now.
	Gone func(holdfast.NodeID) bool
	// Lost: it has not answered for the grace period.
	Lost func(holdfast.NodeID) bool
	// Paused is how long a detached volume is still left alone before its repair.
	Paused func(*state.Volume) time.Duration
	// Now is what a repair is said to begin at, in Unix seconds.
	Now int64
	// NewReplica returns a fresh id.
	NewReplica func() holdfast.ReplicaID
}

// Blocked says why a segment is not brought to its number of replicas, as what it
// waits for or what is the matter.
type Blocked struct {
	Segment holdfast.SegmentID
	Why     string
}

// Plan returns what to propose now, the segments that are worst off first.
func Plan(view *state.View, s Situation) ([]state.Command, []Blocked) {
	p := &planner{view: view, s: s, filling: map[holdfast.NodeID]int{}, repairs: map[holdfast.NodeID]int{}}
	var segments []*segment
	var volumes []*volume
	for vol := range view.Volumes() {
		v := &volume{Volume: vol}
		for i := range vol.Segments {
			v.segments = append(v.segments, p.look(vol, i))
		}
		segments, volumes = append(segments, v.segments...), append(volumes, v)
	}
	slices.SortStableFunc(segments, func(a, b *segment) int { return cmp.Compare(a.reachable, b.reachable) })
	for _, seg := range segments {
		if len(p.out) >= maxCommands {
			break
		}
		p.plan(seg)
	}
	for _, v := range volumes {
		v.moved = slices.ContainsFunc(v.segments, func(s *segment) bool { return s.moved })
	}
	p.repair(volumes)
	return p.out, p.blocked
}

type planner struct {
	view    *state.View
	s       Situation
	filling map[holdfast.NodeID]int // replicas being filled, by node
	repairs map[holdfast.NodeID]int // detached volumes that a node repairs
	out     []state.Command
	blocked []Blocked
}

// segment is one segment with its replicas by what they are good for.
type segment struct {
	id  holdfast.SegmentID
	vol *state.Volume
	seg *state.Segment
	// good replicas count towards the number asked for; lost ones are to be
	// replaced; leaving ones were told to go. Orphans and those being deleted are
	// nothing of these.
	good, lost, leaving []state.Replica

	moved     bool
	reachable int // in-sync replicas whose nodes answer, wherever they are to go
}

func (p *planner) look(vol *state.Volume, index int) *segment {
	out := &segment{id: holdfast.SegmentID{Volume: vol.ID, Index: uint32(index)}, vol: vol, seg: &vol.Segments[index]}
	for _, r := range out.seg.Replicas {
		if r.Role == holdfast.RoleOrphan || r.Role == holdfast.RoleDeleting {
			continue
		}
		disk, node := p.where(r)
		if r.Role == holdfast.RoleInSync && node != nil && disk.State == holdfast.DiskOK && !p.s.Gone(node.ID) {
			out.reachable++
		}
		switch {
		case r.Leaving:
			out.leaving = append(out.leaving, r)
		case node == nil || node.Removed || !disk.Usable() || node.Duty == state.DutyDraining,
			node.Duty != state.DutyMaintenance && p.s.Lost(node.ID):
			out.lost = append(out.lost, r)
		default:
			out.good = append(out.good, r)
			if r.Role != holdfast.RoleInSync && p.writes(vol) && !p.s.Gone(node.ID) {
				p.filling[node.ID]++
			}
		}
	}
	return out
}

// where returns a replica's disk and node, nil if they are not known.
func (p *planner) where(r state.Replica) (*state.Disk, *state.Node) {
	d, ok := p.view.Disk(r.Disk)
	if !ok {
		return nil, nil
	}
	n, ok := p.view.Node(d.Node)
	if !ok {
		return d, nil
	}
	return d, n
}

func (p *planner) plan(s *segment) {
	for _, r := range s.leaving {
		// Its writer takes it out. One that no writer has in its in-sync set any
		// more would stay for ever.
		if (r.Role != holdfast.RoleInSync || !s.vol.HasWriter()) && p.mayRemove(s, r) {
			p.remove(s, r)
			return
		}
	}
	switch want := s.vol.Options.Replicas; {
	case len(s.good) < want:
		p.add(s)
	case len(s.lost) > 0:
		for _, r := range s.lost {
			if p.mayRemove(s, r) {
				p.remove(s, r)
				return // the layout's version is compared: one at a time
			}
		}
	case len(s.good) > want:
		if r, ok := p.surplus(s); ok {
			p.remove(s, r)
		}
	}
}

// add places one more replica, unless nothing could fill it or the nodes that
// could take it have enough to do.
func (p *planner) add(s *segment) {
	block := func(format string, args ...any) { p.block(s.id, format, args...) }
	if s.reachable == 0 {
		block("no in-sync replica answers that a new one could be filled from")
		return
	}
	var avoid, busy []holdfast.NodeID
	for n := range p.view.Nodes() {
		if p.s.Gone(n.ID) {
			avoid = append(avoid, n.ID)
		}
	}
	for _, r := range s.seg.Replicas {
		// No node twice, whatever becomes of the replica that it has: but another
		// disk of it may take what one that failed or leaves has.
		if d, n := p.where(r); n != nil && d.Usable() && r.Role != holdfast.RoleDeleting && r.Role != holdfast.RoleOrphan {
			avoid = append(avoid, n.ID)
		}
	}
	if p.writes(s.vol) {
		for n := range p.view.Nodes() {
			if p.filling[n.ID] >= MaxRebuilds {
				busy = append(busy, n.ID)
			}
		}
	}
	// The places of what stays decide the failure domains; the new one's node must
	// be none of those to avoid.
	place := func(avoid []holdfast.NodeID) (state.ReplicaPlacement, error) {
		return state.PlaceOne(p.view, &state.Segment{Size: s.seg.Size, Replicas: s.good}, state.PlaceRequest{Pool: s.vol.Options.Pool, Avoid: avoid, NewReplica: p.s.NewReplica})
	}
	at, err := place(append(slices.Clone(avoid), busy...))
	if err != nil {
		if _, other := place(avoid); other == nil {
			block("the nodes that could take a new replica are filling %s each", count(MaxRebuilds, "other"))
			return
		}
		block("a new replica has no place: %v", err)
		return
	}
	if d, ok := p.view.Disk(at.Disk); ok && p.writes(s.vol) {
		p.filling[d.Node]++
	}
	s.moved = true
	p.out = append(p.out, &state.AddReplica{Segment: s.id, LayoutVersion: s.seg.LayoutVersion, Replica: at.Replica, Disk: at.Disk})
}

func (p *planner) block(id holdfast.SegmentID, format string, args ...any) {
	p.blocked = append(p.blocked, Blocked{id, fmt.Sprintf(format, args...)})
}

// count puts a number before what is counted.
func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// mayRemove says whether the segment keeps as many in-sync replicas that answer as
// asked for. What never was whole is no loss.
func (p *planner) mayRemove(s *segment, r state.Replica) bool {
	if r.Role == holdfast.RoleSyncing {
		return true
	}
	staying := 0
	for _, o := range s.good {
		if _, n := p.where(o); o.ID != r.ID && o.Role == holdfast.RoleInSync && !p.s.Gone(n.ID) {
			staying++
		}
	}
	return staying >= s.vol.Options.Replicas
}

func (p *planner) remove(s *segment, r state.Replica) {
	s.moved = true
	p.out = append(p.out, &state.RemoveReplica{Segment: s.id, LayoutVersion: s.seg.LayoutVersion, Replica: r.ID})
}

// surplus chooses which of too many replicas goes: the one that is furthest from
// being in sync, then one that is not at the holder, then one that shares a zone
// or rack with another, then the one on the fullest disk.
func (p *planner) surplus(s *segment) (state.Replica, bool) {
	rank := map[holdfast.ReplicaRole]int{holdfast.RoleSyncing: 0, holdfast.RoleStale: 1, holdfast.RoleInSync: 2}
	type ranked struct {
		state.Replica
		key [4]int
	}
	var all []ranked
	for _, r := range s.good {
		if !p.mayRemove(s, r) {
			continue
		}
		d, n := p.where(r)
		x := ranked{Replica: r}
		x.key[0] = rank[r.Role]
		if s.vol.Phase != state.PhaseDetached && n.ID == s.vol.Holder.Node {
			x.key[1] = 1
		}
		x.key[2] = -p.shared(s, r, n)
		x.key[3] = int(100 * d.Free / max(1, d.Size))
		all = append(all, x)
	}
	if len(all) == 0 {
		return state.Replica{}, false
	}
	return slices.MinFunc(all, func(a, b ranked) int {
		return cmp.Or(slices.Compare(a.key[:], b.key[:]), bytes.Compare(a.ID[:], b.ID[:]))
	}).Replica, true
}

// shared counts the other good replicas on a node, then in its zone, then rack.
func (p *planner) shared(s *segment, r state.Replica, n *state.Node) int {
	count := 0
	for _, o := range s.good {
		_, other := p.where(o)
		if o.ID == r.ID {
			continue
		}
		if n.ID == other.ID { // one of the two was to leave, and stays
			count += state.MaxReplicas * state.MaxReplicas
		}
		if z := n.Labels.Get("zone"); z != "" && z == other.Labels.Get("zone") {
			count += state.MaxReplicas
		}
		if k := n.Labels.Get("rack"); k != "" && k == other.Labels.Get("rack") {
			count++
		}
	}
	return count
}
