package server

import (
	"errors"
	"strings"
	"testing"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/cmd/internal/api/apipb"
	"github.com/holdfast-storage/holdfast/cmd/internal/reconcile"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

// tables are a View that commands were applied to.
type tables struct {
	t     *testing.T
	view  *state.View
	index uint64
}

func (x *tables) must(cmd state.Command) {
	x.t.Helper()
	x.index++
	next, _, err := x.view.Apply(x.index, cmd)
	if err != nil {
		x.t.Fatalf("%s: %v", state.Name(cmd), err)
	}
	x.view = next
}

func (x *tables) node(id byte) {
	x.t.Helper()
	x.must(&state.NodeJoin{Node: state.Node{ID: holdfast.NodeID{id}, Name: "n" + string('0'+rune(id)), Instance: holdfast.InstanceID{id}, HasDisks: true,
		Version: "test", MaxLevel: holdfast.Level1, Addresses: state.Addresses{API: "a:1", Data: "a:2", Raft: "a:3"}}})
}

func (x *tables) disk(id, node byte, pool string) {
	x.t.Helper()
	x.must(&state.DiskOpen{Disk: holdfast.DiskID{id}, Node: holdfast.NodeID{node}, Instance: holdfast.InstanceID{node}, OpenCount: 1, Pool: pool, Size: 1 << 40, Free: 1 << 40})
}

func TestFindDisk(t *testing.T) {
	x := &tables{t: t, view: &state.View{}}
	x.must(&state.InitCluster{ID: holdfast.ClusterID{1}, Level: holdfast.Level1})
	x.node(1)
	x.disk(0xaa, 1, "ssd")
	x.must(&state.DiskOpen{Disk: holdfast.DiskID{0xab, 0xcd, 1}, Node: holdfast.NodeID{1}, Instance: holdfast.InstanceID{1}, OpenCount: 1, Size: 1, Free: 1})
	x.must(&state.DiskOpen{Disk: holdfast.DiskID{0xab, 0xcd, 2}, Node: holdfast.NodeID{1}, Instance: holdfast.InstanceID{1}, OpenCount: 1, Size: 1, Free: 1})
	for id, kind := range map[string]holdfast.Kind{
		"aa00": "", "AA000": "", holdfast.DiskID{0xaa}.String(): "", "abcd02": "",
		"abcd": holdfast.ErrInvalid, "aa0": holdfast.ErrNotFound, "": holdfast.ErrNotFound, "ffff": holdfast.ErrNotFound, holdfast.DiskID{9}.String(): holdfast.ErrNotFound,
	} {
		if _, err := findDisk(x.view, id); holdfast.KindOf(err) != kind {
			t.Errorf("%q: got %v, want %q", id, err, kind)
		}
	}
	if p := pools(x.view); len(p) != 1 || p[0] != "ssd" || nodesWithDisks(x.view, "ssd") != 1 || nodesWithDisks(x.view, "hdd") != 0 {
		t.Errorf("pools: %v", p)
	}
}

// TestMayLeave: a disk is told to leave only if all it has has somewhere to go, in
// its pool.
func TestMayLeave(t *testing.T) {
	x := &tables{t: t, view: &state.View{}}
	x.must(&state.InitCluster{ID: holdfast.ClusterID{1}, Level: holdfast.Level1})
	for n := range byte(3) {
		x.node(n + 1)
		x.disk(n+1, n+1, "ssd")
	}
	s := New(nil)
	s.o = Options{Node: holdfast.NodeID{1}, Cluster: silent{}}
	volume := func(name, pool string, replicas byte) {
		var p state.SegmentPlacement
		for i := range replicas {
			p = append(p, state.ReplicaPlacement{Replica: holdfast.NewID[holdfast.ReplicaID](), Disk: holdfast.DiskID{i + 1}})
		}
		x.must(&state.CreateVolume{Volume: holdfast.NewID[holdfast.VolumeID](), Name: name, Size: 1 << 30, Lineage: holdfast.NewID[holdfast.LineageID](),
			Options: state.VolumeOptions{Replicas: int(replicas), SegmentSize: 64 << 30, AckMode: holdfast.AckReceived, MinCopies: 1, Pool: pool}, Placement: []state.SegmentPlacement{p}})
	}
	leave := func(id byte) error {
		d, ok := x.view.Disk(holdfast.DiskID{id})
		if !ok {
			t.Fatalf("no disk %d", id)
		}
		return s.mayLeave(x.view, d)
	}
	refused := func(id byte, says string) {
		t.Helper()
		if err := leave(id); !errors.Is(err, holdfast.ErrRefused) || !strings.Contains(err.Error(), says) || holdfast.RemedyOf(err) == "" {
			t.Errorf("disk %d: got %v, want %q in it", id, err, says)
		}
	}
	if err := leave(1); err != nil {
		t.Errorf("an empty disk: %v", err)
	}
	volume("one", "", 1)
	if err := leave(1); err != nil {
		t.Errorf("another node can take it: %v", err)
	}
	volume("three", "ssd", 3)
	refused(2, "a copy of volume three, and it has nowhere to go in pool ssd")
	x.disk(12, 2, "hdd")
	refused(2, "nowhere to go in pool ssd")
	x.disk(13, 2, "ssd")
	if err := leave(2); err != nil {
		t.Errorf("another disk of the node can take it: %v", err)
	}
	for _, id := range []byte{2, 3, 12, 13} {
		x.must(&state.DiskFailed{Disk: holdfast.DiskID{id}, OpenCount: 1, Reason: "EIO"})
	}
	refused(1, "the last copy in sync of volume")
}

// silent is a cluster in which nobody is gone.
type silent struct{ reconcile.Cluster }

func (silent) Gone(holdfast.NodeID) bool { return false }

// TestFillWarning: a person is told of a disk from the first watermark on.
func TestFillWarning(t *testing.T) {
	for _, c := range []struct {
		d    *apipb.Disk
		says string
	}{
		{&apipb.Disk{Path: "/d", Node: "n1", FullPercent: 84}, ""},
		{&apipb.Disk{Path: "/d", Node: "n1", FullPercent: 99, Watermark: 97, Removed: true}, ""},
		{&apipb.Disk{Path: "/d", Node: "n1", FullPercent: 86, Watermark: 85}, "disk /d, node n1, is 86 % full; "},
		{&apipb.Disk{Id: "abcd", Node: "n1", FullPercent: 86, Watermark: 85}, "disk abcd, node n1"}, // its node does not answer
		{&apipb.Disk{Path: "/d", Node: "n1", FullPercent: 98, Watermark: 97, FullHost: true}, "the file system of disk /d, node n1, is 98 % full: what needs new space is refused; "},
	} {
		if got := fillWarning(c.d); !strings.HasPrefix(got, c.says) || (c.says == "") != (got == "") {
			t.Errorf("got %q, want %q", got, c.says)
		}
	}
}
