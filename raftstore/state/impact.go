package state

import (
	"github.com/holdfast-storage/holdfast"
)

// Loss is what a volume would lose with a node, from nothing to the worst.
type Loss uint8

// The losses. Each includes those above it.
const (
	LosesNothing      Loss = iota
	LosesRedundancy        // fewer in-sync copies; it goes on
	LosesWrites            // fewer than min_copies: writes are held, reads go on
	LosesAvailability      // no in-sync copy that answers is left; others exist on nodes that are gone
	LosesData              // the only in-sync copy of some segment is there
)

// String returns the word that people are shown.
func (l Loss) String() string {
	switch l {
	case LosesRedundancy:
		return "redundancy"
	case LosesWrites:
		return "writes"
	case LosesAvailability:
		return "availability"
	case LosesData:
		return "data"
	case LosesNothing:
	}
	return "nothing"
}

// Impact is what the cluster would lose with one node.
type Impact struct {
	Voters, VotersLeft int // that are up without the node
	// QuorumLost: no majority of voters would be left: nothing could be attached and
	// no silent replica be taken out.
	QuorumLost bool
	Volumes    []VolumeImpact // those that would lose something or be detached, in the tables' order
}

// VolumeImpact is what one volume would lose: as much as its worst segment.
type VolumeImpact struct {
	Volume   *Volume
	Loss     Loss
	Attached bool // the node holds it: its clients end, another node may take it over
	// InSyncLeft is the fewest in-sync copies that a segment would have, on nodes
	// that are up.
	InSyncLeft int
}

// WhatIfDown says what would be lost if a node went down now, with everything on
// it, while the nodes that gone names stay down.
func (v *View) WhatIfDown(node holdfast.NodeID, gone func(holdfast.NodeID) bool) Impact {
	var out Impact
	for n := range v.Nodes() {
		if n.Kind != MemberVoter {
			continue
		}
		out.Voters++
		if n.ID != node && !gone(n.ID) {
			out.VotersLeft++
		}
	}
	out.QuorumLost = out.VotersLeft <= out.Voters/2
	for vol := range v.Volumes() {
		i := v.volumeImpact(vol, node, gone)
		if i.Loss != LosesNothing || i.Attached {
			out.Volumes = append(out.Volumes, i)
		}
	}
	return out
}

func (v *View) volumeImpact(vol *Volume, node holdfast.NodeID, gone func(holdfast.NodeID) bool) VolumeImpact {
	out := VolumeImpact{Volume: vol, Attached: vol.Phase != PhaseDetached && vol.Holder.Node == node, InSyncLeft: vol.Options.Replicas}
	for i := range vol.Segments {
		here, up, down := 0, 0, 0 // the in-sync copies on the node, on others that are up, on others that are gone
		for _, r := range vol.Segments[i].Replicas {
			d, ok := v.disks.get(r.Disk)
			switch {
			case r.Role != holdfast.RoleInSync || !ok:
			case d.Node == node:
				here++
			case gone(d.Node) || d.State != holdfast.DiskOK:
				down++
			default:
				up++
			}
		}
		out.InSyncLeft = min(out.InSyncLeft, up)
		if here == 0 {
			continue
		}
		loss := LosesRedundancy
		switch {
		case up == 0 && down == 0:
			loss = LosesData
		case up == 0:
			loss = LosesAvailability
		case up < vol.Options.MinCopies:
			loss = LosesWrites
		}
		out.Loss = max(out.Loss, loss)
	}
	return out
}
