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

// TestFullest: a volume uses what the fullest replica of each segment does.
func TestFullest(t *testing.T) {
	got := fullest([]*apipb.Replica{{Segment: 0, Used: 3}, {Segment: 0, Used: 5}, {Segment: 1, Used: 7}, {Segment: 1}})
	if got != 12 {
		t.Errorf("got %d, want 5 of segment 0 and 7 of segment 1", got)
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
