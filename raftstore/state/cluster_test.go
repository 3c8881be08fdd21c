package state

import (
	"strings"
	"testing"

	"github.com/holdfast-storage/holdfast"
)

func TestNothingBeforeTheBootstrap(t *testing.T) {
	w := &world{t: t, view: &View{}}
	w.refused(&DeleteVolume{}, holdfast.ErrUnavailable, "")
	w.refused(&InitCluster{}, holdfast.ErrInvalid, "")
	w.refused(&InitCluster{ID: newID[holdfast.ClusterID](w)}, holdfast.ErrInvalid, "")
	c := &InitCluster{ID: newID[holdfast.ClusterID](w), Level: holdfast.Level1}
	w.must(c)
	w.again(c)
	w.refused(&InitCluster{ID: newID[holdfast.ClusterID](w), Level: holdfast.Level1}, holdfast.ErrRefused, ReasonForeign)
}

func TestNodes(t *testing.T) {
	w := newWorld(t, 2)
	w.again(&NodeJoin{Node: w.node(0)})
	twin := w.node(0)
	twin.Addresses.API = "elsewhere:1"
	w.refused(&NodeJoin{Node: twin}, holdfast.ErrExists, "")
	same := w.node(0)
	same.ID = newID[holdfast.NodeID](w)
	w.refused(&NodeJoin{Node: same}, holdfast.ErrExists, "")
	for name, change := range map[string]func(n *Node){
		"no id":       func(n *Node) { n.ID = holdfast.NodeID{} },
		"no instance": func(n *Node) { n.Instance = holdfast.InstanceID{} },
		"no name":     func(n *Node) { n.Name = "" },
		"no address":  func(n *Node) { n.Addresses.API = "" },
		"no raft":     func(n *Node) { n.Addresses.Raft = "" },
		"long":        func(n *Node) { n.Version = strings.Repeat("v", MaxTextLength+1) },
		"labels":      func(n *Node) { n.Labels = make(Labels, MaxLabels+1) },
	} {
		n := w.node(0)
		n.ID, n.Name = newID[holdfast.NodeID](w), "other"
		change(&n)
		t.Run(name, func(t *testing.T) { w.refused(&NodeJoin{Node: n}, holdfast.ErrInvalid, "") })
	}

	// An update compares the revision.
	n := w.node(0)
	n.Addresses.Data = "moved:9401"
	n.Revision = 9
	w.refused(&NodeUpdate{Node: n}, holdfast.ErrRefused, ReasonStaleRevision)
	n.Revision = 1
	w.must(&NodeUpdate{Node: n})
	w.again(&NodeUpdate{Node: n})
	got, _ := w.view.Node(n.ID)
	if got.Addresses.Data != "moved:9401" || got.Revision != 2 {
		t.Fatalf("got %+v", got)
	}
	n.Name, n.Revision = "n2", 2
	w.refused(&NodeUpdate{Node: n}, holdfast.ErrExists, "")
	stranger := w.node(0)
	stranger.ID = newID[holdfast.NodeID](w)
	w.refused(&NodeUpdate{Node: stranger}, holdfast.ErrNotFound, "")

	// Kind is raft's affair.
	w.refused(&SetMember{Node: w.nodes[0], From: MemberVoter, To: MemberNonVoter}, holdfast.ErrRefused, ReasonStaleRevision)
	w.must(&SetMember{Node: w.nodes[0], From: MemberWatcher, To: MemberVoter})
	w.again(&SetMember{Node: w.nodes[0], From: MemberWatcher, To: MemberVoter})
	n.Name, n.Revision, n.Kind = "n1", 3, MemberNonVoter
	n.Addresses.Data = "moved:2"
	w.must(&NodeUpdate{Node: n})
	if got, _ := w.view.Node(n.ID); got.Kind != MemberVoter {
		t.Fatalf("an update changed the member kind to %v", got.Kind)
	}
}

func TestRemovedNodesNeverComeBack(t *testing.T) {
	w := newWorld(t, 3)
	vol, _ := w.create("v", 2)
	holder := -1
	for i, d := range w.disks {
		for _, r := range vol.Segments[0].Replicas {
			if r.Disk == d {
				holder = i
			}
		}
	}
	w.refused(&NodeRemove{Node: w.nodes[holder]}, holdfast.ErrRefused, "")
	w.addNode()
	last := len(w.nodes) - 1
	w.must(&AttachBegin{Volume: vol.ID, Node: w.nodes[last], Instance: w.instances[last], Session: newID[holdfast.SessionID](w)})
	w.refused(&NodeRemove{Node: w.nodes[last]}, holdfast.ErrRefused, "")
	w.must(&Detach{Volume: vol.ID, Epoch: 1})
	w.must(&NodeRemove{Node: w.nodes[last]})
	w.again(&NodeRemove{Node: w.nodes[last]})
	w.refused(&NodeRemove{Node: newID[holdfast.NodeID](w)}, holdfast.ErrNotFound, "")

	w.refused(&NodeJoin{Node: w.node(last)}, holdfast.ErrRefused, ReasonRemoved)
	w.refused(&NodeUpdate{Node: w.node(last)}, holdfast.ErrRefused, ReasonRemoved)
	w.refused(&SetMember{Node: w.nodes[last], From: MemberWatcher, To: MemberVoter}, holdfast.ErrRefused, ReasonRemoved)
	w.refused(&DiskOpen{Disk: w.disks[last], Node: w.nodes[last], Instance: w.instances[last], OpenCount: 9, Size: 1}, holdfast.ErrRefused, ReasonRemoved)
	w.refused(&AttachBegin{Volume: vol.ID, Node: w.nodes[last], Instance: w.instances[last], Expect: 1, Session: newID[holdfast.SessionID](w)}, holdfast.ErrRefused, ReasonRemoved)
	for n := range w.view.Nodes() {
		if n.ID == w.nodes[last] {
			t.Fatal("a removed node is listed")
		}
	}
	// Its name is free for a node with another id; its disks take nothing.
	n := w.node(last)
	n.ID = newID[holdfast.NodeID](w)
	w.must(&NodeJoin{Node: n})
	c := w.createCommand("w", 1<<30, 1<<30, 1)
	c.Placement[0][0].Disk = w.disks[last]
	w.refused(c, holdfast.ErrRefused, ReasonRemoved)
}

func TestDiskOpen(t *testing.T) {
	w := newWorld(t, 2)
	open := func(disk, node int, count holdfast.OpenCount) *DiskOpen {
		return &DiskOpen{Disk: w.disks[disk], Node: w.nodes[node], Instance: w.instances[node], OpenCount: count, Size: 1 << 40, Free: 1 << 39}
	}
	w.again(open(0, 0, 1)) // the same opening
	restarted := open(0, 0, 1)
	w.instances[0] = newID[holdfast.InstanceID](w)
	n := w.node(0)
	n.Revision = 1
	w.must(&NodeUpdate{Node: n})
	w.refused(restarted, holdfast.ErrFenced, ReasonStaleInstance)
	w.refused(open(0, 0, 1), holdfast.ErrRefused, ReasonRolledBack) // same count, new process: rolled back
	w.refused(open(0, 1, 5), holdfast.ErrRefused, ReasonForeign)    // another node: a clone
	w.must(open(0, 0, 2))
	w.refused(open(0, 0, 1), holdfast.ErrRefused, ReasonRolledBack)
	w.refused(open(0, 0, 0), holdfast.ErrInvalid, "")
	for name, change := range map[string]func(c *DiskOpen){
		"no id":         func(c *DiskOpen) { c.Disk = holdfast.DiskID{} },
		"no size":       func(c *DiskOpen) { c.Size = 0 },
		"free > size":   func(c *DiskOpen) { c.Free = c.Size + 1 },
		"free negative": func(c *DiskOpen) { c.Free = -1 },
		"bad pool":      func(c *DiskOpen) { c.Pool = "no good" },
		"long reason":   func(c *DiskOpen) { c.Failed = strings.Repeat("x", MaxTextLength+1) },
	} {
		c := open(0, 0, 7)
		change(c)
		t.Run(name, func(t *testing.T) { w.refused(c, holdfast.ErrInvalid, "") })
	}
	// Failure is recorded for this opening only.
	w.refused(&DiskFailed{Disk: w.disks[0], OpenCount: 1, Reason: "late"}, holdfast.ErrRefused, ReasonStaleRevision)
	fail := &DiskFailed{Disk: w.disks[0], OpenCount: 2, Reason: "EIO"}
	w.must(fail)
	w.again(fail)
	if d, _ := w.view.Disk(w.disks[0]); d.State != holdfast.DiskFailed || d.Reason != "EIO" {
		t.Fatalf("got %+v", d)
	}
	bad := open(0, 0, 3)
	bad.Failed = "still bad"
	w.must(bad)
	w.must(open(0, 0, 4))
	if d, _ := w.view.Disk(w.disks[0]); d.State != holdfast.DiskOK || d.Reason != "" {
		t.Fatalf("verified again: got %+v", d)
	}
	w.must(&DiskUpdate{Disk: w.disks[0], OpenCount: 4, Size: 1 << 40, Free: 7})
	w.again(&DiskUpdate{Disk: w.disks[0], OpenCount: 4, Size: 1 << 40, Free: 7})
	w.refused(&DiskUpdate{Disk: w.disks[0], OpenCount: 3, Size: 1 << 40, Free: 8}, holdfast.ErrRefused, ReasonStaleRevision)
	w.refused(&DiskUpdate{Disk: newID[holdfast.DiskID](w), OpenCount: 3, Size: 1, Free: 1}, holdfast.ErrNotFound, "")
}

func TestRaiseLevelNeedsEveryNode(t *testing.T) {
	w := newWorld(t, 1)
	w.again(&RaiseLevel{To: holdfast.Level1})
	w.refused(&RaiseLevel{To: 3}, holdfast.ErrRefused, ReasonStaleRevision)
	w.refused(&RaiseLevel{To: 2}, holdfast.ErrRefused, "")
}

func TestDisksLeave(t *testing.T) {
	a := newAttached(t)
	disk := a.segment().Replicas[0].Disk
	leave := &SetDiskLeaving{Disk: disk, Leaving: true}
	a.refused(&DiskRemove{Disk: disk, Force: true}, holdfast.ErrRefused, "")
	a.refused(&SetDiskLeaving{Disk: newID[holdfast.DiskID](a.world), Leaving: true}, holdfast.ErrNotFound, "")
	a.must(leave)
	a.again(leave)
	d, _ := a.view.Disk(disk)
	a.must(&DiskOpen{Disk: disk, Node: d.Node, Instance: d.Instance, OpenCount: d.OpenCount + 1, Size: d.Size, Free: d.Free})
	if d, _ = a.view.Disk(disk); !d.Leaving || d.Usable() {
		t.Fatalf("opened again it does not leave any more: %+v", d)
	}
	for _, c := range a.view.candidates(PlaceRequest{}) {
		if c.disk.ID == disk {
			t.Error("a leaving disk is a place for new replicas")
		}
	}
	a.refused(&DiskRemove{Disk: disk, Force: true}, holdfast.ErrRefused, "") // it has a replica

	// Another disk of the node may take it, but only one.
	other := newID[holdfast.DiskID](a.world)
	a.must(&DiskOpen{Disk: other, Node: d.Node, Instance: d.Instance, OpenCount: 1, Size: 1 << 40, Free: 1 << 40})
	add := &AddReplica{Segment: a.seg, LayoutVersion: a.segment().LayoutVersion, Replica: newID[holdfast.ReplicaID](a.world), Disk: disk}
	a.refused(add, holdfast.ErrRefused, "")
	add.Disk = other
	a.must(add)
	third := *add
	third.LayoutVersion, third.Replica = a.segment().LayoutVersion, newID[holdfast.ReplicaID](a.world)
	a.refused(&third, holdfast.ErrRefused, "")

	a.must(&Detach{Volume: a.vol, Epoch: 1, Ends: []SegmentEnd{{}}})
	a.must(&DeleteVolume{Volume: a.vol})
	a.refused(&DiskRemove{Disk: disk}, holdfast.ErrRefused, "") // it is to be asked to delete
	force := &DiskRemove{Disk: disk, Force: true}
	a.must(force)
	a.again(force)
	if place, _ := a.view.Replica(a.r[0]); !place.Gone {
		t.Error("a replica of a removed disk is not gone")
	}
	for d := range a.view.Disks() {
		if d.ID == disk {
			t.Error("a removed disk is listed")
		}
	}
	d, _ = a.view.Disk(disk)
	a.refused(&DiskOpen{Disk: disk, Node: d.Node, Instance: d.Instance, OpenCount: d.OpenCount + 1, Size: 1, Free: 1}, holdfast.ErrRefused, ReasonRemoved)
	a.refused(&DiskUpdate{Disk: disk, OpenCount: d.OpenCount, Size: 1, Free: 1}, holdfast.ErrRefused, ReasonRemoved)
	a.refused(&DiskFailed{Disk: disk, OpenCount: d.OpenCount, Reason: "EIO"}, holdfast.ErrRefused, ReasonRemoved)
	a.refused(&SetDiskLeaving{Disk: disk}, holdfast.ErrRefused, ReasonRemoved)
}
