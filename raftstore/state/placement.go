package state

import (
	"bytes"
	"cmp"
	"slices"

	"github.com/holdfast-storage/holdfast"
)

// PlaceRequest asks where the replicas of new segments should go.
type PlaceRequest struct {
	Size        int64 // of the volume, bytes
	SegmentSize int64 // bytes
	Replicas    int
	Pool        string // "" for any
	First       int    // index of the first segment to place: 0, or what is there before a resize
	// Avoid names nodes that get nothing, those known to be down.
	Avoid []holdfast.NodeID
	// NewReplica returns a fresh id: holdfast.NewID[holdfast.ReplicaID].
	NewReplica func() holdfast.ReplicaID
}

// Place chooses disks for the segments of a volume: distinct nodes always,
// distinct zones and then racks (the node labels) as far as there are enough,
// and among those the disk that is least loaded with the replica on it. Volumes are
// thin: a disk's load is the share of its size that is promised to replicas, or that is
// in use, whichever is more. One fuller than MostFull is taken only if there are too few others. Too few
// nodes is ErrRefused. It is pure; the proposer calls it and CreateVolume checks it.
func Place(v *View, req PlaceRequest) ([]SegmentPlacement, error) {
	count, err := SegmentCount(req.Size, req.SegmentSize)
	if err != nil {
		return nil, err
	}
	candidates := v.candidates(req)
	if roomy := withRoom(candidates); countNodes(roomy) >= req.Replicas {
		candidates = roomy
	}
	if nodes := countNodes(candidates); req.Replicas > nodes {
		return nil, holdfast.Errorf(holdfast.ErrRefused, "%d replicas need %d nodes with a usable disk, there are %d", req.Replicas, req.Replicas, nodes).
			WithRemedy("add nodes with disks, or ask for fewer replicas")
	}
	var out []SegmentPlacement
	for i := req.First; i < count; i++ {
		size := min(req.SegmentSize, req.Size-int64(i)*req.SegmentSize)
		var seg SegmentPlacement
		var chosen []*candidate
		for range req.Replicas {
			best := pick(candidates, chosen, size)
			best.allocated += size
			chosen = append(chosen, best)
			seg = append(seg, ReplicaPlacement{Replica: req.NewReplica(), Disk: best.disk.ID})
		}
		out = append(out, seg)
	}
	return out, nil
}

// PlaceOne chooses a disk for one more replica of a segment, beside those it has:
// by the rules of Place, on none of the nodes in Avoid, and on no disk that is
// fuller than MostFull. Pool, Avoid and NewReplica of req count.
func PlaceOne(v *View, seg *Segment, req PlaceRequest) (ReplicaPlacement, error) {
	var chosen []*candidate
	candidates := withRoom(v.candidates(req))
	for _, r := range seg.Replicas {
		if d, ok := v.disks.get(r.Disk); ok && r.Role != holdfast.RoleDeleting && r.Role != holdfast.RoleOrphan {
			if n, ok := v.nodes.get(d.Node); ok {
				chosen = append(chosen, &candidate{disk: d, node: n})
			}
		}
	}
	best := pick(candidates, chosen, seg.Size)
	if best == nil {
		return ReplicaPlacement{}, holdfast.Errorf(holdfast.ErrRefused, "no other node has a usable disk that is less than %.0f %% full", 100*MostFull).
			WithRemedy("add a node with a disk, or ask for fewer replicas")
	}
	return ReplicaPlacement{Replica: req.NewReplica(), Disk: best.disk.ID}, nil
}

// MostFull is the share of a disk in use above which a new volume gets a replica on
// it only if there are too few other disks, and no replica is made anew on it: what
// is left is for those it has.
const MostFull = 0.92

// candidate is a usable disk.
type candidate struct {
	disk      *Disk
	node      *Node
	allocated int64 // bytes promised to replicas on it
}

func (c *candidate) used() int64 { return c.disk.Size - c.disk.Free }

// load is that of the disk with so many bytes more promised.
func (c *candidate) load(more int64) float64 {
	return float64(max(c.allocated, c.used())+more) / float64(c.disk.Size)
}

// withRoom returns the candidates that are not fuller than MostFull.
func withRoom(candidates []*candidate) (out []*candidate) {
	for _, c := range candidates {
		if float64(c.used()) <= float64(c.disk.Size)*MostFull {
			out = append(out, c)
		}
	}
	return out
}

func countNodes(candidates []*candidate) int {
	seen := map[holdfast.NodeID]bool{}
	for _, c := range candidates {
		seen[c.node.ID] = true
	}
	return len(seen)
}

func (v *View) candidates(req PlaceRequest) []*candidate {
	var out []*candidate
	at := map[holdfast.DiskID]*candidate{}
	for d := range v.Disks() {
		n, ok := v.nodes.get(d.Node)
		if !ok || n.Removed || n.Duty != DutyServing || !d.Usable() || slices.Contains(req.Avoid, n.ID) || req.Pool != "" && req.Pool != d.Pool {
			continue
		}
		c := &candidate{disk: d, node: n}
		out = append(out, c)
		at[d.ID] = c
	}
	for vol := range v.volumes.all() {
		for i := range vol.Segments {
			for _, r := range vol.Segments[i].Replicas {
				if c := at[r.Disk]; c != nil {
					c.allocated += vol.Segments[i].Size
				}
			}
		}
	}
	return out
}

// pick returns the best candidate beside those already chosen: on another node,
// in another zone and rack if possible, least loaded with size bytes more, lowest id.
func pick(candidates, chosen []*candidate, size int64) *candidate {
	var best *candidate
	var bestShared int
	for _, c := range candidates {
		shared := 0
		sameNode := false
		for _, o := range chosen {
			sameNode = sameNode || o.node.ID == c.node.ID
			if z := c.node.Labels.Get("zone"); z != "" && z == o.node.Labels.Get("zone") {
				shared += MaxReplicas // a shared zone outweighs any number of shared racks
			}
			if r := c.node.Labels.Get("rack"); r != "" && r == o.node.Labels.Get("rack") {
				shared++
			}
		}
		if sameNode {
			continue
		}
		if best == nil || cmp.Or(cmp.Compare(shared, bestShared), compareLoad(c, best, size)) < 0 {
			best, bestShared = c, shared
		}
	}
	return best
}

func compareLoad(a, b *candidate, more int64) int {
	return cmp.Or(cmp.Compare(a.load(more), b.load(more)), bytes.Compare(a.disk.ID[:], b.disk.ID[:]))
}
