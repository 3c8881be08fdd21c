package state

import (
	"slices"
	"testing"

	"github.com/holdfast-storage/holdfast"
)

func TestUpdateVolume(t *testing.T) {
	a := newAttached(t)
	from := a.volume().Options
	to := from
	to.Replicas, to.MinCopies, to.FailHeldAfter, to.PingsOnly = 4, 2, 30, true
	c := &UpdateVolume{Volume: a.vol, From: from, To: to}
	a.must(c)
	a.again(c)
	if got := a.volume().Options; got != to {
		t.Fatalf("options: got %+v, want %+v", got, to)
	}
	other := to
	other.MinCopies = 1
	a.refused(&UpdateVolume{Volume: a.vol, From: from, To: other}, holdfast.ErrRefused, ReasonStaleRevision)
	for name, change := range map[string]func(*VolumeOptions){
		"min_copies above replicas": func(o *VolumeOptions) { o.MinCopies = 5 },
		"no replicas":               func(o *VolumeOptions) { o.Replicas = 0 },
		"too many replicas":         func(o *VolumeOptions) { o.Replicas = MaxReplicas + 1 },
		"a hold time below zero":    func(o *VolumeOptions) { o.FailHeldAfter = -1 },
		"another segment size":      func(o *VolumeOptions) { o.SegmentSize *= 2 },
		"another file system":       func(o *VolumeOptions) { o.FS = "xfs" },
		"another pool":              func(o *VolumeOptions) { o.Pool = "ssd" },
	} {
		bad := to
		change(&bad)
		t.Run(name, func(t *testing.T) {
			a.t = t
			a.refused(&UpdateVolume{Volume: a.vol, From: to, To: bad}, holdfast.ErrInvalid, "")
		})
	}
	a.t = t
	a.refused(&UpdateVolume{Volume: newID[holdfast.VolumeID](a.world), From: from, To: to}, holdfast.ErrNotFound, "")
}

func TestSetDuty(t *testing.T) {
	w := newWorld(t, 3)
	id := w.nodes[1]
	c := &SetDuty{Node: id, From: DutyServing, To: DutyMaintenance}
	w.must(c)
	w.again(c)
	w.refused(&SetDuty{Node: id, From: DutyServing, To: DutyDraining}, holdfast.ErrRefused, ReasonStaleRevision)
	w.refused(&SetDuty{Node: newID[holdfast.NodeID](w), From: DutyServing, To: DutyDraining}, holdfast.ErrNotFound, "")
	// What the node says of itself does not change it.
	have, _ := w.view.Node(id)
	n := w.node(1, Label{"zone", "a"})
	n.Revision = have.Revision
	w.must(&NodeUpdate{Node: n})
	if have, _ = w.view.Node(id); have.Duty != DutyMaintenance || have.Labels.Get("zone") != "a" {
		t.Fatalf("after an update of the node: got %+v", have)
	}
	// Nothing new is placed on it.
	if _, err := Place(w.view, PlaceRequest{Size: 1 << 30, SegmentSize: 64 << 30, Replicas: 3, NewReplica: func() holdfast.ReplicaID { return newID[holdfast.ReplicaID](w) }}); holdfast.KindOf(err) != holdfast.ErrRefused {
		t.Errorf("three replicas on two nodes that serve: got %v", err)
	}
	for _, r := range w.place(1<<30, 64<<30, 2, 0)[0] {
		if r.Disk == w.disks[1] {
			t.Error("a replica was placed on a node in maintenance")
		}
	}
	w.must(&SetDuty{Node: id, From: DutyMaintenance, To: DutyServing})
	w.place(1<<30, 64<<30, 3, 0)
}

// TestRemoveOfAnInSyncReplica: it goes only if enough stay, by its writer if there
// is one, and the last never.
func TestRemoveOfAnInSyncReplica(t *testing.T) {
	a := newAttached(t)
	remove := func(replica int, force bool) *RemoveReplica {
		return &RemoveReplica{Segment: a.seg, LayoutVersion: a.segment().LayoutVersion, Replica: a.r[replica], Force: force}
	}
	a.refused(remove(0, false), holdfast.ErrRefused, "") // two would stay of three
	opts := a.volume().Options
	fewer := opts
	fewer.Replicas = 2
	a.must(&UpdateVolume{Volume: a.vol, From: opts, To: fewer})

	version := a.segment().ISRVersion
	a.must(remove(0, false))
	if r := a.segment().Replicas[0]; r.Role != holdfast.RoleInSync || !r.Leaving || a.segment().ISRVersion != version {
		t.Fatalf("removed under a writer: got %+v, want it in sync and leaving", r)
	}
	if res := a.must(remove(0, false)); res.Changed {
		t.Error("asked again it changed something")
	}
	a.refused(remove(1, false), holdfast.ErrRefused, "") // one would stay of two
	a.must(remove(1, true))
	a.refused(remove(2, true), holdfast.ErrRefused, ReasonLastInSync) // those that leave do not count
	// The writer takes the first out; it is gone for good, and does not come back.
	a.shrink(0, 10)
	if r := a.segment().Replica(a.r[0]); r.Role != holdfast.RoleDeleting {
		t.Fatalf("taken out: got %s, want deleting", r.Role)
	}
	a.refused(&GrowISR{Segment: a.seg, Epoch: 1, ISRVersion: a.segment().ISRVersion, Replica: a.r[0], Commit: 10}, holdfast.ErrRefused, "")
	a.must(&ReplicaGone{Replica: a.r[0]})

	// Without a writer it goes at once.
	a.must(&Detach{Volume: a.vol, Epoch: 1, Ends: []SegmentEnd{{End: 20, Commit: 20}}})
	version = a.segment().ISRVersion
	a.must(remove(1, true))
	if r := a.segment().Replica(a.r[1]); r.Role != holdfast.RoleDeleting || a.segment().ISRVersion != version+1 {
		t.Fatalf("removed while detached: got %+v at version %d", r, a.segment().ISRVersion)
	}
	a.refused(remove(2, true), holdfast.ErrRefused, ReasonLastInSync)
}

// TestALeavingReplicaThatIsNeeded: it is as good as any other for a takeover and a
// salvage.
func TestALeavingReplicaThatIsNeeded(t *testing.T) {
	a := newAttached(t)
	a.must(&RemoveReplica{Segment: a.seg, LayoutVersion: 1, Replica: a.r[0], Force: true})
	a.must(a.takeover(1, 1))
	a.must(&Activate{Segment: a.seg, Epoch: 2, S: 5, ISR: a.r[:1], Continuous: true})
	if got := a.segment().ISR(); !slices.Equal(got, a.r[:1]) {
		t.Fatalf("in-sync set: got %v, want the leaving one", got)
	}
	a.must(&ForceRecover{Volume: a.vol, Expect: 2, Lineage: newID[holdfast.LineageID](a.world), Choices: []SalvageChoice{{Replica: a.r[0]}}})
	if r := a.segment().Replica(a.r[0]); r.Leaving {
		t.Error("salvaged, it is still to leave")
	}
}

func TestPlaceOne(t *testing.T) {
	w := newWorld(t, 0)
	w.addNode(Label{"zone", "a"})
	w.addNode(Label{"zone", "b"})
	w.addNode(Label{"zone", "a"})
	w.addNode(Label{"zone", "c"})
	cmd := w.createCommand("data", 1<<30, 64<<30, 2)
	cmd.Placement = []SegmentPlacement{{{newID[holdfast.ReplicaID](w), w.disks[0]}, {newID[holdfast.ReplicaID](w), w.disks[1]}}}
	w.must(cmd)
	v, _ := w.view.Volume(cmd.Volume)
	seg := &v.Segments[0]
	req := PlaceRequest{NewReplica: func() holdfast.ReplicaID { return newID[holdfast.ReplicaID](w) }}
	wantDisk := func(disk int, what string) {
		t.Helper()
		if p, err := PlaceOne(w.view, seg, req); err != nil || p.Disk != w.disks[disk] {
			t.Errorf("%s: got %v, %v, want disk %d", what, p.Disk, err, disk)
		}
	}
	wantDisk(3, "a zone without a replica comes first")
	req.Avoid = []holdfast.NodeID{w.nodes[3]}
	wantDisk(2, "else any node without one")
	req.Avoid = nil
	w.must(&SetDuty{Node: w.nodes[3], From: DutyServing, To: DutyDraining})
	wantDisk(2, "none on a node that drains")
	w.must(&DiskUpdate{Disk: w.disks[2], OpenCount: 1, Size: 1 << 40, Free: 1 << 30})
	if p, err := PlaceOne(w.view, seg, req); holdfast.KindOf(err) != holdfast.ErrRefused {
		t.Errorf("nothing but a full disk: got %v, %v", p, err)
	}
}

// TestRemoveOfADeadNode: what is only waiting to be deleted there goes with it.
func TestRemoveOfADeadNode(t *testing.T) {
	a := newAttached(t)
	disk, _ := a.view.Disk(a.segment().Replicas[2].Disk)
	dead := disk.Node
	a.refused(&NodeRemove{Node: dead}, holdfast.ErrRefused, "")
	a.shrink(2, 10)
	a.refused(&NodeRemove{Node: dead}, holdfast.ErrRefused, "")
	a.must(&RemoveReplica{Segment: a.seg, LayoutVersion: a.segment().LayoutVersion, Replica: a.r[2], Force: true})
	rm := &NodeRemove{Node: dead}
	a.must(rm)
	a.again(rm)
	if a.segment().Replica(a.r[2]) != nil {
		t.Error("its replica is still recorded")
	}
	if p, ok := a.view.Replica(a.r[2]); !ok || !p.Gone {
		t.Errorf("its replica's id: got %+v, %v, want it remembered as gone", p, ok)
	}
}
