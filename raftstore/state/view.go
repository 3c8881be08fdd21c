package state

import (
	"crypto/sha256"
	"iter"

	"github.com/holdfast-storage/holdfast"
)

// View is the tables as of one log index. It is immutable: any number of
// goroutines may read it. What it returns is shared: do not modify it. The zero
// View is the empty cluster before its first command.
type View struct {
	index    uint64
	cluster  Cluster
	nodes    table[Node]
	disks    table[Disk]
	volumes  table[Volume]
	names    table[Volume]       // by nameKey, live volumes only
	replicas table[ReplicaPlace] // every replica id there ever was
}

// ReplicaPlace says which segment a replica belongs, or belonged, to.
type ReplicaPlace struct {
	Replica holdfast.ReplicaID
	Segment holdfast.SegmentID
	Gone    bool // its disk confirmed that it holds nothing of it
}

// nameKey makes a table key of a name. 128 bits of SHA-256: a collision is out
// of reach, and would show as a name that is taken.
func nameKey(name string) key {
	sum := sha256.Sum256([]byte(name))
	return key(sum[:16])
}

// Index is the log index of the last command that the View reflects.
func (v *View) Index() uint64 { return v.index }

// Cluster returns the cluster's record; its ID is zero before the bootstrap.
func (v *View) Cluster() Cluster { return v.cluster }

// Node returns a node's record, removed nodes included.
func (v *View) Node(id holdfast.NodeID) (*Node, bool) { return v.nodes.get(id) }

// Nodes yields the nodes that are not removed, in id order.
func (v *View) Nodes() iter.Seq[*Node] {
	return func(yield func(*Node) bool) {
		for n := range v.nodes.all() {
			if !n.Removed && !yield(n) {
				return
			}
		}
	}
}

// NodeByName returns the node of a name that is not removed.
func (v *View) NodeByName(name string) (*Node, bool) {
	for n := range v.Nodes() {
		if n.Name == name {
			return n, true
		}
	}
	return nil, false
}

// Disk returns a disk's record, removed disks included.
func (v *View) Disk(id holdfast.DiskID) (*Disk, bool) { return v.disks.get(id) }

// Disks yields the disks that are not removed, in id order.
func (v *View) Disks() iter.Seq[*Disk] {
	return func(yield func(*Disk) bool) {
		for d := range v.disks.all() {
			if !d.Removed && !yield(d) {
				return
			}
		}
	}
}

// Volume returns a volume's record, tombstones included (Deleted is set).
func (v *View) Volume(id holdfast.VolumeID) (*Volume, bool) { return v.volumes.get(id) }

// VolumeByName returns the live volume of a name.
func (v *View) VolumeByName(name string) (*Volume, bool) { return v.names.get(nameKey(name)) }

// Volumes yields the live volumes in id order.
func (v *View) Volumes() iter.Seq[*Volume] {
	return func(yield func(*Volume) bool) {
		for vol := range v.volumes.all() {
			if !vol.Deleted && !yield(vol) {
				return
			}
		}
	}
}

// Tombstones yields the deleted volumes in id order; those that still have
// segments wait for replicas to be confirmed gone.
func (v *View) Tombstones() iter.Seq[*Volume] {
	return func(yield func(*Volume) bool) {
		for vol := range v.volumes.all() {
			if vol.Deleted && !yield(vol) {
				return
			}
		}
	}
}

// Segment returns a volume and its segment.
func (v *View) Segment(id holdfast.SegmentID) (*Volume, *Segment, bool) {
	vol, ok := v.volumes.get(id.Volume)
	if !ok || uint64(id.Index) >= uint64(len(vol.Segments)) {
		return nil, nil, false
	}
	return vol, &vol.Segments[id.Index], true
}

// Replica says where a replica belongs; false if the id was never seen. A
// replica found on a disk may be deleted only if its role is DELETING or it is
// Gone in a View read linearizably.
func (v *View) Replica(id holdfast.ReplicaID) (*ReplicaPlace, bool) { return v.replicas.get(id) }

// Placed is one replica with what it belongs to.
type Placed struct {
	Segment holdfast.SegmentID
	Volume  *Volume
	Size    int64 // of the segment, bytes
	Replica Replica
}

// ReplicasOn yields the replicas that stand, or are to be deleted, on a disk,
// in the order of volume ids. It walks all volumes.
func (v *View) ReplicasOn(disk holdfast.DiskID) iter.Seq[Placed] {
	return func(yield func(Placed) bool) {
		for vol := range v.volumes.all() {
			for i := range vol.Segments {
				s := &vol.Segments[i]
				for _, r := range s.Replicas {
					if r.Disk != disk {
						continue
					}
					id := holdfast.SegmentID{Volume: vol.ID, Index: uint32(i)}
					if !yield(Placed{Segment: id, Volume: vol, Size: s.Size, Replica: r}) {
						return
					}
				}
			}
		}
	}
}

// Counts returns the numbers of nodes (removed included), disks and volumes
// (tombstones included).
func (v *View) Counts() (nodes, disks, volumes int) { return v.nodes.n, v.disks.n, v.volumes.n }
