package server

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/cmd/internal/api/apipb"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

// ListNodes implements apipb.HoldfastServer.
func (s *Server) ListNodes(context.Context, *apipb.ListNodesRequest) (*apipb.ListNodesResponse, error) {
	view := s.o.Cluster.View()
	resp := &apipb.ListNodesResponse{}
	for n := range view.Nodes() {
		resp.Nodes = append(resp.Nodes, s.node(view, n))
	}
	slices.SortFunc(resp.Nodes, func(a, b *apipb.Node) int { return cmp.Compare(a.Name, b.Name) })
	return resp, nil
}

// InspectNode implements apipb.HoldfastServer.
func (s *Server) InspectNode(ctx context.Context, req *apipb.NodeRequest) (*apipb.Node, error) {
	view := s.o.Cluster.View()
	n, err := findNode(view, req.Name)
	if err != nil {
		return nil, err
	}
	return s.nodeWithAttached(ctx, view, n), nil
}

// findNode returns the node of a name or an id.
func findNode(view *state.View, name string) (*state.Node, error) {
	n, ok := view.NodeByName(name)
	if !ok {
		if id, err := holdfast.ParseID[holdfast.NodeID](name); err == nil {
			n, ok = view.Node(id)
		}
	}
	if !ok {
		return nil, holdfast.Errorf(holdfast.ErrNotFound, "no node %q", name).WithRemedy("see holdfast node ls")
	}
	return n, nil
}

// WhatIfDown implements apipb.HoldfastServer.
func (s *Server) WhatIfDown(_ context.Context, req *apipb.NodeRequest) (*apipb.Impact, error) {
	view := s.o.Cluster.View()
	n, err := findNode(view, req.Name)
	if err != nil {
		return nil, err
	}
	i := view.WhatIfDown(n.ID, func(id holdfast.NodeID) bool { return id != s.o.Node && s.o.Cluster.Gone(id) })
	out := &apipb.Impact{Node: n.Name, Voters: int32(i.Voters), VotersLeft: int32(i.VotersLeft), QuorumLost: i.QuorumLost}
	for _, v := range i.Volumes {
		out.Volumes = append(out.Volumes, &apipb.VolumeImpact{Volume: v.Volume.Name, Loses: v.Loss.String(), Attached: v.Attached, InSyncLeft: int32(v.InSyncLeft)})
	}
	// The worst first.
	worst := map[string]state.Loss{}
	for _, v := range i.Volumes {
		worst[v.Volume.Name] = v.Loss
	}
	slices.SortFunc(out.Volumes, func(a, b *apipb.VolumeImpact) int {
		return cmp.Or(cmp.Compare(worst[b.Volume], worst[a.Volume]), cmp.Compare(a.Volume, b.Volume))
	})
	return out, nil
}

func (s *Server) node(view *state.View, n *state.Node) *apipb.Node {
	out := &apipb.Node{
		Name: n.Name, Id: n.ID.String(), Address: n.Addresses.API, DataAddress: n.Addresses.Data, RaftAddress: n.Addresses.Raft,
		State: "up", Raft: string(n.Kind), Version: n.Version, Labels: n.Labels.Map(), Disks: s.disks(view, n.ID),
	}
	out.Duty = string(n.Duty)
	if n.ID != s.o.Node && s.o.Cluster.Gone(n.ID) {
		out.State = "gone"
	}
	if gone, left, is := s.o.Rebuilds.GoneFor(n.ID); is {
		out.GoneMillis = gone.Milliseconds()
		if n.Duty != state.DutyMaintenance {
			out.RebuildInMillis = left.Milliseconds()
		}
	}
	for d := range view.Disks() {
		if d.Node != n.ID {
			continue
		}
		for p := range view.ReplicasOn(d.ID) {
			if p.Replica.Role != holdfast.RoleDeleting {
				out.Replicas++
			}
		}
	}
	if leader, ok := s.o.Leader(); ok && leader == n.ID {
		out.Raft = "leader"
	}
	for v := range view.Volumes() {
		if v.Phase != state.PhaseDetached && v.Holder.Node == n.ID {
			out.Attachments++
		}
	}
	return out
}

// Status implements apipb.HoldfastServer.
func (s *Server) Status(ctx context.Context, _ *apipb.StatusRequest) (*apipb.ClusterStatus, error) {
	view := s.o.Cluster.View()
	out := &apipb.ClusterStatus{
		Cluster: view.Cluster().ID.String(), Node: s.nodeName(s.o.Node), Level: uint32(view.Cluster().Level),
		Warnings: slices.Clone(s.o.Warnings), Off: s.o.Off, Version: s.o.Version,
	}
	for n := range view.Nodes() {
		out.Nodes++
		if n.ID == s.o.Node || !s.o.Cluster.Gone(n.ID) {
			out.NodesUp++
		}
		if n.Kind == state.MemberVoter {
			out.Voters++
		}
	}
	if out.Nodes == 2 {
		out.Warnings = append(out.Warnings, "two nodes have one raft voter: without it nothing can be attached or removed from the in-sync set; a third node, even with --disk none, makes three voters")
	}
	out.Warnings = append(out.Warnings, s.fillWarnings(ctx)...)
	for v := range view.Volumes() {
		out.Volumes++
		switch holdfast.VolumeState(s.volume(view, v).State) { //nolint:exhaustive // the rest is counted as volumes only
		case holdfast.VolumeAttached:
			out.VolumesAttached++
		case holdfast.VolumeDegraded:
			out.VolumesAttached++
			out.VolumesDegraded++
		case holdfast.VolumeUnavailable:
			out.VolumesUnavailable++
		}
	}
	for d := range view.Disks() {
		out.Size += d.Size
		out.Used += d.Size - d.Free
	}
	if leader, ok := s.o.Leader(); ok {
		out.Leader = s.nodeName(leader)
	}
	if err := s.Ready(ctx); err != nil {
		out.Reason = err.Error()
	} else {
		out.Ready = true
	}
	return out, nil
}

// askStatus bounds how long a status waits for the nodes that have disks.
const askStatus = time.Second

// fillWarnings tell of the disks of all nodes that reached a watermark.
func (s *Server) fillWarnings(ctx context.Context) []string {
	ctx, cancel := context.WithTimeout(ctx, askStatus)
	defer cancel()
	list, err := s.ListDisks(ctx, &apipb.ListDisksRequest{})
	if err != nil {
		return nil // it names no node, so there is none to miss
	}
	var out []string
	for _, d := range list.Disks {
		if w := fillWarning(d); w != "" {
			out = append(out, w)
		}
	}
	return out
}

// Ready returns nil if a volume could be created now, else ErrUnavailable: why not.
func (s *Server) Ready(ctx context.Context) error {
	view, err := s.o.Cluster.Read(ctx)
	switch {
	case errors.Is(err, holdfast.ErrNoSpace):
		return holdfast.Errorf(holdfast.ErrUnavailable, "%w", err)
	case err != nil:
		return holdfast.Errorf(holdfast.ErrUnavailable, "raft has no quorum: %w", err)
	case nodesWithDisks(view, "") == 0:
		return holdfast.Errorf(holdfast.ErrUnavailable, "no node has a disk")
	}
	return nil
}
