package state

import (
	"encoding/binary"
	"testing"

	"github.com/holdfast-storage/holdfast"
)

// world applies commands to a View the way a log does: encoded and decoded.
type world struct {
	t         testing.TB
	view      *View
	index     uint64
	ids       uint64
	nodes     []holdfast.NodeID
	instances []holdfast.InstanceID
	disks     []holdfast.DiskID
	log       [][]byte
}

// newID returns the next of a world's predictable ids.
func newID[T ~[16]byte](w *world) T {
	w.ids++
	var id [16]byte
	// Spread over the first byte like random ids, and never zero.
	binary.BigEndian.PutUint64(id[:], w.ids*0x9e3779b97f4a7c15)
	binary.BigEndian.PutUint64(id[8:], w.ids)
	return T(id)
}

// newWorld bootstraps a cluster of n nodes with one disk each.
func newWorld(t testing.TB, n int) *world {
	w := &world{t: t, view: &View{}}
	w.must(&InitCluster{ID: newID[holdfast.ClusterID](w), Level: holdfast.Level1})
	for range n {
		w.addNode()
	}
	return w
}

func (w *world) addNode(labels ...Label) {
	w.t.Helper()
	i := len(w.nodes)
	w.nodes = append(w.nodes, newID[holdfast.NodeID](w))
	w.instances = append(w.instances, newID[holdfast.InstanceID](w))
	w.disks = append(w.disks, newID[holdfast.DiskID](w))
	w.must(&NodeJoin{Node: w.node(i, labels...)})
	w.must(&DiskOpen{Disk: w.disks[i], Node: w.nodes[i], Instance: w.instances[i], OpenCount: 1, Size: 1 << 40, Free: 1 << 40})
}

func (w *world) node(i int, labels ...Label) Node {
	name := "n" + string(rune('1'+i))
	return Node{ID: w.nodes[i], Name: name, Instance: w.instances[i], HasDisks: true, Version: "test", MaxLevel: holdfast.Level1, Labels: labels,
		Addresses: Addresses{API: name + ":9400", Data: name + ":9401", Raft: name + ":9402"}}
}

// apply encodes, decodes and applies a command.
func (w *world) apply(cmd Command) (Result, error) {
	w.t.Helper()
	b, err := EncodeCommand(holdfast.Level1, cmd)
	if err != nil {
		w.t.Fatalf("encode %s: %v", Name(cmd), err)
	}
	back, err := DecodeCommand(b)
	if err != nil {
		w.t.Fatalf("decode %s: %v", Name(cmd), err)
	}
	w.log = append(w.log, b)
	w.index++
	next, res, err := w.view.Apply(w.index, back)
	w.view = next
	return res, err
}

func (w *world) must(cmd Command) Result {
	w.t.Helper()
	res, err := w.apply(cmd)
	if err != nil {
		w.t.Fatalf("%s: got error %v", Name(cmd), err)
	}
	return res
}

func (w *world) place(size, segment int64, replicas, first int) []SegmentPlacement {
	w.t.Helper()
	p, err := Place(w.view, PlaceRequest{Size: size, SegmentSize: segment, Replicas: replicas, First: first,
		NewReplica: func() holdfast.ReplicaID { return newID[holdfast.ReplicaID](w) }})
	if err != nil {
		w.t.Fatal(err)
	}
	return p
}

// create makes a volume of one segment.
func (w *world) create(name string, replicas int) (*Volume, *CreateVolume) {
	w.t.Helper()
	c := w.createCommand(name, 1<<30, 64<<30, replicas)
	return w.must(c).Volume, c
}

func (w *world) createCommand(name string, size, segment int64, replicas int) *CreateVolume {
	w.t.Helper()
	return &CreateVolume{Volume: newID[holdfast.VolumeID](w), Name: name, Size: size, Lineage: newID[holdfast.LineageID](w),
		Options:   VolumeOptions{Replicas: replicas, FS: "ext4", SegmentSize: segment, AckMode: holdfast.AckReceived, MinCopies: 1},
		Placement: w.place(size, segment, replicas, 0)}
}
