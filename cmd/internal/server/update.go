package server

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/cmd/internal/api/apipb"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

// updatable are the options that a volume's life does not fix.
var updatable = []string{"replicas", "min_copies", "on_quorum_loss", "read_promises"}

// UpdateVolume implements apipb.HoldfastServer. What it changes of a number of
// replicas the controller carries out.
func (s *Server) UpdateVolume(ctx context.Context, req *apipb.UpdateVolumeRequest) (*apipb.Volume, error) {
	given, err := holdfast.ParseOptions(req.Options)
	if err != nil {
		return nil, err
	}
	if len(req.Options) == 0 {
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "nothing to change").WithRemedy("the options that can be changed are %s", strings.Join(updatable, ", "))
	}
	for _, key := range slices.Sorted(maps.Keys(req.Options)) {
		if !slices.Contains(updatable, strings.ReplaceAll(strings.ToLower(key), "-", "_")) {
			return nil, holdfast.Errorf(holdfast.ErrInvalid, "option %s cannot be changed after the volume was made", key).WithRemedy("the options that can are %s", strings.Join(updatable, ", "))
		}
	}
	for {
		view, v, err := s.volumeNow(ctx, req.Name)
		if err != nil {
			return nil, err
		}
		to, err := s.updated(view, v, given)
		if err != nil {
			return nil, err
		}
		res, err := s.o.Cluster.Propose(ctx, &state.UpdateVolume{Volume: v.ID, From: v.Options, To: to})
		if errors.Is(err, state.ReasonStaleRevision) {
			continue
		}
		if err != nil {
			return nil, err
		}
		s.o.Logger.Info("volume updated", "volume", v.Name, "replicas", to.Replicas, "min_copies", to.MinCopies)
		return s.volume(s.o.Cluster.View(), res.Volume), nil
	}
}

// updated are a volume's options with those that were given.
func (s *Server) updated(view *state.View, v *state.Volume, given holdfast.VolumeOptions) (state.VolumeOptions, error) {
	to := v.Options
	if given.Replicas != 0 {
		to.Replicas = given.Replicas
		if nodes := nodesWithDisks(view, to.Pool); to.Replicas > nodes && to.Replicas > v.Options.Replicas {
			return to, holdfast.Errorf(holdfast.ErrRefused, "%d replicas need as many nodes with disks; there are %d", to.Replicas, nodes).WithRemedy("ask for at most %d, or add nodes", nodes)
		}
	}
	if given.MinCopies != 0 {
		to.MinCopies = given.MinCopies
	}
	if to.MinCopies > to.Replicas {
		return to, holdfast.Errorf(holdfast.ErrInvalid, "min_copies=%d is more than the volume's %d replicas", to.MinCopies, to.Replicas).WithRemedy("ask for more replicas, or fewer min_copies, in the same update")
	}
	if given.OnQuorumLoss != "" {
		hold, err := holdfast.HoldTime(given.OnQuorumLoss)
		if err != nil {
			return to, err
		}
		to.FailHeldAfter = int64(hold.Seconds())
	}
	if given.ReadPromises != "" {
		to.PingsOnly = given.ReadPromises == holdfast.PromisesOff
	}
	return to, nil
}

// SetNodeDuty implements apipb.HoldfastServer.
func (s *Server) SetNodeDuty(ctx context.Context, req *apipb.NodeDutyRequest) (*apipb.Node, error) {
	duty := state.NodeDuty(req.Duty)
	if duty != state.DutyServing && duty != state.DutyMaintenance && duty != state.DutyDraining {
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "%q is not a duty of a node", req.Duty).
			WithRemedy("the duties are %s, %s and %s", state.DutyServing, state.DutyMaintenance, state.DutyDraining)
	}
	for {
		view, n, err := s.nodeNow(ctx, req.Name)
		if err != nil {
			return nil, err
		}
		if duty == state.DutyDraining && !req.Force {
			if err := s.mayDrain(view, n); err != nil {
				return nil, err
			}
		}
		_, err = s.o.Cluster.Propose(ctx, &state.SetDuty{Node: n.ID, From: n.Duty, To: duty})
		if errors.Is(err, state.ReasonStaleRevision) {
			continue
		}
		if err != nil {
			return nil, err
		}
		s.o.Logger.Info("a node's duty is changed", "node", n.Name, "from", string(n.Duty), "to", req.Duty)
		view = s.o.Cluster.View()
		if n, err = findNode(view, req.Name); err != nil {
			return nil, err
		}
		return s.nodeWithAttached(ctx, view, n), nil
	}
}

// mayDrain refuses what could never end: a replica that no other node can take.
func (s *Server) mayDrain(view *state.View, n *state.Node) error {
	if err := orphanOn(view, n); err != nil {
		return err
	}
	able := 0
	for o := range view.Nodes() {
		if o.ID != n.ID && o.Duty == state.DutyServing && !s.gone(o.ID) && slices.ContainsFunc(slices.Collect(view.Disks()), func(d *state.Disk) bool { return d.Node == o.ID && d.Usable() }) {
			able++
		}
	}
	for d := range view.Disks() {
		if d.Node != n.ID {
			continue
		}
		for p := range view.ReplicasOn(d.ID) {
			if r := p.Replica.Role; r != holdfast.RoleDeleting && r != holdfast.RoleOrphan && p.Volume.Options.Replicas > able {
				return holdfast.Errorf(holdfast.ErrRefused, "volume %s has %d replicas, and without node %s only %d nodes with disks serve", p.Volume.Name, p.Volume.Options.Replicas, n.Name, able).
					WithRemedy("add a node, lower its replicas with holdfast volume update, or use --force to move what can be moved")
			}
		}
	}
	return nil
}

// volumeNow finds a volume by name or id in a view that shows all that was decided
// before the call.
func (s *Server) volumeNow(ctx context.Context, name string) (*state.View, *state.Volume, error) {
	view, err := s.o.Cluster.Read(ctx)
	if err != nil {
		return nil, nil, err
	}
	found, err := s.o.Attachments.Find(ctx, name)
	if err != nil {
		return nil, nil, err
	}
	v, ok := view.Volume(found.ID)
	if !ok || v.Deleted {
		return nil, nil, holdfast.Errorf(holdfast.ErrNotFound, "no volume %q", name).WithRemedy("see holdfast volume ls")
	}
	return view, v, nil
}

// nodeNow is volumeNow for a node.
func (s *Server) nodeNow(ctx context.Context, name string) (*state.View, *state.Node, error) {
	view, err := s.o.Cluster.Read(ctx)
	if err != nil {
		return nil, nil, err
	}
	n, err := findNode(view, name)
	return view, n, err
}

func (s *Server) gone(id holdfast.NodeID) bool { return id != s.o.Node && s.o.Cluster.Gone(id) }

// RemoveNode implements apipb.HoldfastServer.
func (s *Server) RemoveNode(ctx context.Context, req *apipb.NodeRequest) (*apipb.RemoveNodeResponse, error) {
	view, n, err := s.nodeNow(ctx, req.Name)
	if err != nil {
		return nil, err
	}
	switch {
	case n.ID == s.o.Node:
		return nil, holdfast.Errorf(holdfast.ErrRefused, "node %s cannot remove itself", n.Name).WithRemedy("ask another node")
	case !s.gone(n.ID) && !req.Force:
		return nil, holdfast.Errorf(holdfast.ErrRefused, "node %s is up", n.Name).WithRemedy("drain it, stop it, then remove it; or use --force")
	}
	if err := orphanOn(view, n); err != nil {
		return nil, err
	}
	if _, err := s.o.Cluster.Propose(ctx, &state.NodeRemove{Node: n.ID}); err != nil {
		return nil, err
	}
	s.o.Logger.Info("node removed", "node", n.Name)
	return &apipb.RemoveNodeResponse{Id: n.ID.String()}, nil
}

// orphanOn refuses to have a node emptied or removed that has an abandoned replica:
// nothing is made in its place, and it may be what an operator wants to go back to.
func orphanOn(view *state.View, n *state.Node) error {
	for d := range view.Disks() {
		if d.Node != n.ID {
			continue
		}
		for p := range view.ReplicasOn(d.ID) {
			if p.Replica.Role == holdfast.RoleOrphan {
				return holdfast.Errorf(holdfast.ErrRefused, "node %s has an abandoned replica of volume %s, and those are not moved", n.Name, p.Volume.Name).
					WithRemedy("holdfast volume salvage %s goes back to it, or deletes it with --drop-orphans", p.Volume.Name)
			}
		}
	}
	return nil
}

// explainRebuilds says what is to become of replicas on nodes that are gone, and why
// a missing one is not made.
func (s *Server) explainRebuilds(e *apipb.Explanation, view *state.View, v *state.Volume) {
	blocked := s.o.Rebuilds.Blocked()
	for i := range v.Segments {
		for _, r := range v.Segments[i].Replicas {
			d, ok := view.Disk(r.Disk)
			if !ok || r.Role == holdfast.RoleDeleting || r.Role == holdfast.RoleOrphan {
				continue
			}
			n, ok := view.Node(d.Node)
			gone, left, is := s.o.Rebuilds.GoneFor(d.Node)
			if !ok || !is {
				continue
			}
			w := &apipb.WaitReason{Segment: uint32(i), SinceMillis: gone.Milliseconds()}
			switch {
			case n.Duty == state.DutyMaintenance:
				w.Reason = "node " + n.Name + ", in maintenance, to come back: its replica is not made anew elsewhere"
			case left > 0:
				w.Reason = "node " + n.Name + ", which is gone, to come back; in " + left.Round(time.Second).String() + " its replica is made anew elsewhere"
			default:
				w.Reason = "a replica elsewhere for the one of node " + n.Name + ", which is gone"
			}
			e.Waits = append(e.Waits, w)
		}
		if why := blocked[holdfast.SegmentID{Volume: v.ID, Index: uint32(i)}]; why != "" {
			e.Waits = append(e.Waits, &apipb.WaitReason{Segment: uint32(i), Reason: why})
		}
	}
}
