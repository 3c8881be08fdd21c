package server

import (
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/cmd/internal/api/apipb"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

// TestAddReplica: a replica's own node adds what it knows, and takes nothing from
// what the writer knows better.
func TestAddReplica(t *testing.T) {
	writer := func() *apipb.Replica {
		return &apipb.Replica{Id: "a", State: "syncing", Tail: 20, Durable: 7, BytesToSync: 99}
	}
	for _, c := range []struct {
		name       string
		from, want *apipb.Replica
	}{
		{"its node has it open",
			&apipb.Replica{Id: "a", State: "stale", Served: true, Tail: 12, Durable: 11, TailEpoch: 3, Used: 64, Partial: true, DiskUsed: 1, DiskAllocated: 2, DiskReclaimable: 3},
			&apipb.Replica{Id: "a", State: "syncing", Served: true, Tail: 20, Durable: 11, TailEpoch: 3, BytesToSync: 99, Used: 64, Partial: true, DiskUsed: 1, DiskAllocated: 2, DiskReclaimable: 3}},
		{"its node answers, its disk is out",
			&apipb.Replica{Id: "a", State: "stale", Tail: 50, Used: 64, DiskAllocated: 2},
			writer()},
	} {
		got := writer()
		addReplica(got, c.from)
		if !proto.Equal(got, c.want) {
			t.Errorf("%s:\ngot  %v\nwant %v", c.name, got, c.want)
		}
	}
}

// TestUsed: a volume uses what the fullest in-sync replica of each segment does, and
// where none is told nothing is made up.
func TestUsed(t *testing.T) {
	in := func(segment uint32, used int64) *apipb.Replica {
		return &apipb.Replica{Segment: segment, Used: used, State: "in-sync", Served: true}
	}
	silent, stale, damaged := in(0, 0), in(0, 99), in(0, 99)
	silent.Served, stale.State, damaged.Damaged = false, "stale", true
	for _, c := range []struct {
		name     string
		segments int
		replicas []*apipb.Replica
		want     int64 // -1: not known
	}{
		{"of two segments", 2, []*apipb.Replica{in(0, 3), in(0, 5), in(1, 7), in(1, 0)}, 12},
		{"empty", 1, []*apipb.Replica{in(0, 0)}, 0},
		{"one is enough", 1, []*apipb.Replica{silent, stale, damaged, in(0, 4)}, 4},
		{"none answers", 1, []*apipb.Replica{silent}, -1},
		{"none in sync answers", 1, []*apipb.Replica{silent, stale}, -1},
		{"the one is damaged", 1, []*apipb.Replica{damaged}, -1},
		{"one segment lacks", 2, []*apipb.Replica{in(0, 3)}, -1},
	} {
		got := int64(-1)
		if n := used(c.segments, c.replicas); n != nil {
			got = *n
		}
		if got != c.want {
			t.Errorf("%s: got %d, want %d", c.name, got, c.want)
		}
	}
}

// TestReplicaNodes: whom to ask about a replica, by the tables.
func TestReplicaNodes(t *testing.T) {
	x := &tables{t: t, view: &state.View{}}
	x.must(&state.InitCluster{ID: holdfast.ClusterID{1}, Level: holdfast.Level1})
	for n := range byte(2) {
		x.node(n + 1)
		x.disk(n+1, n+1, "")
	}
	v := &state.Volume{Segments: []state.Segment{{Replicas: []state.Replica{
		{ID: holdfast.ReplicaID{1}, Disk: holdfast.DiskID{1}}, {ID: holdfast.ReplicaID{2}, Disk: holdfast.DiskID{2}}, {ID: holdfast.ReplicaID{3}, Disk: holdfast.DiskID{9}},
	}}}}
	got := replicaNodes(x.view, v)
	if len(got) != 2 || got[holdfast.ReplicaID{1}.String()] != (holdfast.NodeID{1}) || got[holdfast.ReplicaID{2}.String()] != (holdfast.NodeID{2}) {
		t.Errorf("got %v, want node 1 and 2, and nobody for a disk that is not known", got)
	}
}
