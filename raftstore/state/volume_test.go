package state

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-storage/holdfast"
)

func TestCreateVolumeRefusals(t *testing.T) {
	w := newWorld(t, 3)
	fresh := func(change func(c *CreateVolume)) *CreateVolume {
		c := w.createCommand("v", 1<<30, 1<<30, 2)
		change(c)
		return c
	}
	for _, c := range []struct {
		name   string
		change func(c *CreateVolume)
		kind   holdfast.Kind
	}{
		{"no id", func(c *CreateVolume) { c.Volume = holdfast.VolumeID{} }, holdfast.ErrInvalid},
		{"no lineage", func(c *CreateVolume) { c.Lineage = holdfast.LineageID{} }, holdfast.ErrInvalid},
		{"no name", func(c *CreateVolume) { c.Name = "" }, holdfast.ErrInvalid},
		{"long name", func(c *CreateVolume) { c.Name = strings.Repeat("a", 129) }, holdfast.ErrInvalid},
		{"bad name", func(c *CreateVolume) { c.Name = "-v" }, holdfast.ErrInvalid},
		{"slash", func(c *CreateVolume) { c.Name = "a/b" }, holdfast.ErrInvalid},
		{"size 0", func(c *CreateVolume) { c.Size = 0 }, holdfast.ErrInvalid},
		{"negative size", func(c *CreateVolume) { c.Size = -4096 }, holdfast.ErrInvalid},
		{"odd size", func(c *CreateVolume) { c.Size++ }, holdfast.ErrInvalid},
		{"absurd size", func(c *CreateVolume) { c.Size = 1<<63 - 4096 }, holdfast.ErrInvalid},
		{"segment size 0", func(c *CreateVolume) { c.Options.SegmentSize = 0 }, holdfast.ErrInvalid},
		{"no replicas", func(c *CreateVolume) { c.Options.Replicas = 0 }, holdfast.ErrInvalid},
		{"too many replicas", func(c *CreateVolume) { c.Options.Replicas = 8 }, holdfast.ErrInvalid},
		{"min_copies 0", func(c *CreateVolume) { c.Options.MinCopies = 0 }, holdfast.ErrInvalid},
		{"held for less than no time", func(c *CreateVolume) { c.Options.FailHeldAfter = -1 }, holdfast.ErrInvalid},
		{"held for two days", func(c *CreateVolume) { c.Options.FailHeldAfter = 48 * 3600 }, holdfast.ErrInvalid},
		{"min_copies above replicas", func(c *CreateVolume) { c.Options.MinCopies = 3 }, holdfast.ErrInvalid},
		{"bad pool", func(c *CreateVolume) { c.Options.Pool = "a b" }, holdfast.ErrInvalid},
		{"other pool", func(c *CreateVolume) { c.Options.Pool = "ssd" }, holdfast.ErrRefused},
		{"long mkfs", func(c *CreateVolume) { c.Options.Mkfs = strings.Repeat("x", MaxTextLength+1) }, holdfast.ErrInvalid},
		{"labels not sorted", func(c *CreateVolume) { c.Labels = Labels{{"b", ""}, {"a", ""}} }, holdfast.ErrInvalid},
		{"label twice", func(c *CreateVolume) { c.Labels = Labels{{"a", ""}, {"a", ""}} }, holdfast.ErrInvalid},
		{"not placed", func(c *CreateVolume) { c.Placement = nil }, holdfast.ErrInvalid},
		{"one replica missing", func(c *CreateVolume) { c.Placement[0] = c.Placement[0][:1] }, holdfast.ErrInvalid},
		{"two replicas on one node", func(c *CreateVolume) { c.Placement[0][1].Disk = c.Placement[0][0].Disk }, holdfast.ErrRefused},
		{"one replica id twice", func(c *CreateVolume) { c.Placement[0][1].Replica = c.Placement[0][0].Replica }, holdfast.ErrRefused},
		{"replica without id", func(c *CreateVolume) { c.Placement[0][1].Replica = holdfast.ReplicaID{} }, holdfast.ErrInvalid},
		{"unknown disk", func(c *CreateVolume) { c.Placement[0][1].Disk = newID[holdfast.DiskID](w) }, holdfast.ErrNotFound},
	} {
		t.Run(c.name, func(t *testing.T) { w.refused(fresh(c.change), c.kind, "") })
	}
	w.must(&DiskFailed{Disk: w.disks[0], OpenCount: 1, Reason: "EIO"})
	c := fresh(func(c *CreateVolume) { c.Placement[0][0].Disk = w.disks[0] })
	w.refused(c, holdfast.ErrRefused, "")
	w.must(fresh(func(c *CreateVolume) {}))
}

func TestCreateIsIdempotentAndNamesAreTaken(t *testing.T) {
	w := newWorld(t, 3)
	_, c := w.create("data", 3)
	w.again(c)
	changed := *c
	changed.Size = 2 << 30
	w.refused(&changed, holdfast.ErrRefused, ReasonRemoved)
	w.refused(w.createCommand("data", 1<<30, 1<<30, 1), holdfast.ErrExists, "")
}

func TestDeletedVolumesNeverComeBack(t *testing.T) {
	a := newAttached(t)
	a.refused(&DeleteVolume{Volume: a.vol}, holdfast.ErrRefused, ReasonHeld)
	a.must(&Detach{Volume: a.vol, Epoch: 1, Ends: []SegmentEnd{{}}})
	a.refused(&ReplicaGone{Replica: a.r[0]}, holdfast.ErrRefused, "")
	a.must(&DeleteVolume{Volume: a.vol})
	a.again(&DeleteVolume{Volume: a.vol})
	if _, ok := a.view.VolumeByName("data"); ok {
		t.Fatal("a deleted volume keeps its name")
	}
	a.refused(a.begin(0, 1), holdfast.ErrNotFound, "")
	a.refused(&Rename{Volume: a.vol, From: "data", To: "x"}, holdfast.ErrNotFound, "")
	for i, r := range a.r {
		place, _ := a.view.Replica(r)
		if place.Gone || len(a.volume().Segments) == 0 {
			t.Fatalf("replica %d is gone before it is confirmed", i)
		}
		if got := a.segment().Replica(r).Role; got != holdfast.RoleDeleting {
			t.Fatalf("replica %d: got %v, want %v", i, got, holdfast.RoleDeleting)
		}
		a.must(&ReplicaGone{Replica: r})
		a.again(&ReplicaGone{Replica: r})
	}
	if got := a.volume(); !got.Deleted || len(got.Segments) != 0 {
		t.Fatalf("tombstone: got %+v", got)
	}
	// The name is free, neither the volume's nor a replica's id ever is.
	c := a.createCommand("data", 1<<30, 64<<30, 2)
	again := *c
	again.Volume = a.vol
	a.refused(&again, holdfast.ErrRefused, ReasonRemoved)
	reused := *c
	reused.Placement = []SegmentPlacement{{c.Placement[0][0], {Replica: a.r[0], Disk: c.Placement[0][1].Disk}}}
	a.refused(&reused, holdfast.ErrRefused, ReasonRemoved)
	a.must(c)
}

func TestAddAndRemoveReplica(t *testing.T) {
	a := newAttached(t)
	used := make([]holdfast.DiskID, 0, 3)
	for _, r := range a.segment().Replicas {
		used = append(used, r.Disk)
	}
	free := a.disks[slices.IndexFunc(a.disks, func(d holdfast.DiskID) bool { return !slices.Contains(used, d) })]
	add := &AddReplica{Segment: a.seg, LayoutVersion: 1, Replica: newID[holdfast.ReplicaID](a.world), Disk: free}
	a.must(add)
	a.again(add)
	if r := a.segment().Replica(add.Replica); r.Role != holdfast.RoleSyncing || r.Opened != 1 {
		t.Fatalf("added: got %+v, want syncing since epoch 1", r)
	}
	a.refused(&AddReplica{Segment: a.seg, LayoutVersion: 1, Replica: newID[holdfast.ReplicaID](a.world), Disk: free}, holdfast.ErrRefused, ReasonStaleRevision)
	a.refused(&AddReplica{Segment: a.seg, LayoutVersion: 2, Replica: newID[holdfast.ReplicaID](a.world), Disk: free}, holdfast.ErrRefused, "")

	a.refused(&RemoveReplica{Segment: a.seg, LayoutVersion: 2, Replica: a.r[0]}, holdfast.ErrRefused, "") // in sync, and two of three would stay
	a.must(&ShrinkISR{Segment: a.seg, Epoch: 1, ISRVersion: 2, Replica: a.r[0]})
	// Stale, while too few are in sync: it may be the last hope.
	a.refused(&RemoveReplica{Segment: a.seg, LayoutVersion: 2, Replica: a.r[0]}, holdfast.ErrRefused, "")
	a.must(&GrowISR{Segment: a.seg, Epoch: 1, ISRVersion: 3, Replica: add.Replica})
	a.refused(&RemoveReplica{Segment: a.seg, LayoutVersion: 1, Replica: a.r[0]}, holdfast.ErrRefused, ReasonStaleRevision)
	remove := &RemoveReplica{Segment: a.seg, LayoutVersion: 2, Replica: a.r[0]}
	a.must(remove)
	a.again(remove)
	// It does not come back while it is being deleted, nor after.
	a.refused(&GrowISR{Segment: a.seg, Epoch: 1, ISRVersion: 4, Replica: a.r[0]}, holdfast.ErrRefused, "")
	a.must(&ReplicaGone{Replica: a.r[0]})
	a.again(remove)
	back := &AddReplica{Segment: a.seg, LayoutVersion: 3, Replica: a.r[0], Disk: used[0]}
	a.refused(back, holdfast.ErrRefused, ReasonRemoved)
}

func TestStartSync(t *testing.T) {
	a := newAttached(t)
	sync := &StartSync{Segment: a.seg, Epoch: 1, Replica: a.r[0]}
	a.refused(sync, holdfast.ErrRefused, "")
	a.must(&ShrinkISR{Segment: a.seg, Epoch: 1, ISRVersion: 2, Replica: a.r[0]})
	a.must(sync)
	a.again(sync)
	if got := a.segment().Replica(a.r[0]).Role; got != holdfast.RoleSyncing {
		t.Fatalf("got %v, want %v", got, holdfast.RoleSyncing)
	}
	a.must(&GrowISR{Segment: a.seg, Epoch: 1, ISRVersion: 3, Replica: a.r[0]})
}

func TestResizeOnlyGrows(t *testing.T) {
	w := newWorld(t, 3)
	vol := w.must(w.createCommand("v", 1<<30, 1<<30, 2)).Volume
	w.refused(&ResizeVolume{Volume: vol.ID, From: 1 << 30, To: 1 << 20}, holdfast.ErrRefused, "")
	w.refused(&ResizeVolume{Volume: vol.ID, From: 5 << 30, To: 6 << 30}, holdfast.ErrRefused, ReasonStaleRevision)
	w.refused(&ResizeVolume{Volume: vol.ID, From: 1 << 30, To: 2<<30 + 8192}, holdfast.ErrInvalid, "")
	grow := &ResizeVolume{Volume: vol.ID, From: 1 << 30, To: 2<<30 + 8192, Placement: w.place(2<<30+8192, 1<<30, 2, 1)}
	res := w.must(grow)
	w.again(grow)
	var sizes []int64
	for _, s := range res.Volume.Segments {
		sizes = append(sizes, s.Size)
	}
	if want := []int64{1 << 30, 1 << 30, 8192}; !slices.Equal(sizes, want) {
		t.Fatalf("segments: got %v, want %v", sizes, want)
	}
	w.must(&AttachBegin{Volume: vol.ID, Node: w.nodes[0], Instance: w.instances[0], Session: newID[holdfast.SessionID](w)})
	w.refused(&ResizeVolume{Volume: vol.ID, From: res.Volume.Size, To: 3 << 30}, holdfast.ErrRefused, ReasonHeld)
}

func TestRenameAndLabels(t *testing.T) {
	w := newWorld(t, 2)
	a, _ := w.create("a", 1)
	w.create("b", 1)
	w.refused(&Rename{Volume: a.ID, From: "a", To: "b"}, holdfast.ErrExists, "")
	w.refused(&Rename{Volume: a.ID, From: "z", To: "c"}, holdfast.ErrRefused, ReasonStaleRevision)
	w.refused(&Rename{Volume: a.ID, From: "a", To: "c d"}, holdfast.ErrInvalid, "")
	w.must(&Rename{Volume: a.ID, From: "a", To: "c"})
	w.again(&Rename{Volume: a.ID, From: "a", To: "c"})
	if got, ok := w.view.VolumeByName("c"); !ok || got.ID != a.ID {
		t.Fatalf("by the new name: got %v %v", got, ok)
	}
	if _, ok := w.view.VolumeByName("a"); ok {
		t.Fatal("the old name still leads to the volume")
	}
	w.create("a", 1) // free again
	set := &SetLabels{Volume: a.ID, Revision: 1, Labels: LabelsOf(map[string]string{"y": "2", "x": "1"})}
	w.must(set)
	w.again(set)
	w.refused(&SetLabels{Volume: a.ID, Revision: 1, Labels: nil}, holdfast.ErrRefused, ReasonStaleRevision)
	got, _ := w.view.Volume(a.ID)
	if !slices.Equal(got.Labels, Labels{{"x", "1"}, {"y", "2"}}) {
		t.Fatalf("labels: got %v", got.Labels)
	}
}

func TestOldViewsStayAsTheyWere(t *testing.T) {
	a := newAttached(t)
	old, oldDump := a.view, a.dump()
	a.must(&ShrinkISR{Segment: a.seg, Epoch: 1, ISRVersion: 2, Replica: a.r[0]})
	a.must(a.takeover(1, 1))
	a.create("another", 2)
	a.must(&Rename{Volume: a.vol, From: "data", To: "renamed"})
	a.view = old
	if a.dump() != oldDump {
		t.Fatal("commands changed a View that was taken before them")
	}
	if _, ok := old.VolumeByName("data"); !ok {
		t.Fatal("a rename changed an old View")
	}
}

func TestPlacement(t *testing.T) {
	w := newWorld(t, 0)
	for _, zone := range []string{"a", "a", "b", "c"} {
		w.addNode(Label{"zone", zone})
	}
	zones := func(p SegmentPlacement) []string {
		var z []string
		for _, r := range p {
			d, _ := w.view.Disk(r.Disk)
			n, _ := w.view.Node(d.Node)
			z = append(z, n.Labels.Get("zone"))
		}
		slices.Sort(z)
		return z
	}
	if got := zones(w.place(1<<30, 1<<30, 3, 0)[0]); !slices.Equal(got, []string{"a", "b", "c"}) {
		t.Fatalf("three replicas over three zones: got %v", got)
	}
	if got := zones(w.place(1<<30, 1<<30, 4, 0)[0]); !slices.Equal(got, []string{"a", "a", "b", "c"}) {
		t.Fatalf("four replicas over three zones: got %v", got)
	}
	_, err := Place(w.view, PlaceRequest{Size: 1 << 30, SegmentSize: 1 << 30, Replicas: 5, NewReplica: func() holdfast.ReplicaID { return newID[holdfast.ReplicaID](w) }})
	if holdfast.KindOf(err) != holdfast.ErrRefused {
		t.Fatalf("five replicas on four nodes: got %v, want %v", err, holdfast.ErrRefused)
	}
	_, err = Place(w.view, PlaceRequest{Size: 1 << 30, SegmentSize: 1 << 30, Replicas: 4, Avoid: w.nodes[:1], NewReplica: func() holdfast.ReplicaID { return newID[holdfast.ReplicaID](w) }})
	if holdfast.KindOf(err) != holdfast.ErrRefused {
		t.Fatalf("with a node down: got %v, want %v", err, holdfast.ErrRefused)
	}
	// Segments spread evenly: 40 of one replica over four equal disks.
	count := map[holdfast.DiskID]int{}
	for _, p := range w.place(40<<30, 1<<30, 1, 0) {
		count[p[0].Disk]++
	}
	for _, d := range w.disks {
		if count[d] != 10 {
			t.Fatalf("40 segments over 4 disks: got %v", count)
		}
	}
}

// TestPlacementByRoom: what is in use counts as what is promised does, and a disk
// that is nearly full gets something only if there is no other.
func TestPlacementByRoom(t *testing.T) {
	w := newWorld(t, 0)
	for range 4 {
		w.addNode()
	}
	use := func(disk int, percent int64) {
		t.Helper()
		w.must(&DiskUpdate{Disk: w.disks[disk], OpenCount: 1, Size: 1 << 40, Free: 1 << 40 / 100 * (100 - percent)})
	}
	want := func(what string, replicas int, disks ...int) {
		t.Helper()
		var got, ids []holdfast.DiskID
		for _, r := range w.place(1<<30, 1<<30, replicas, 0)[0] {
			got = append(got, r.Disk)
		}
		for _, d := range disks {
			ids = append(ids, w.disks[d])
		}
		if !slices.Equal(got, ids) {
			t.Errorf("%s: got %v, want %v", what, got, ids)
		}
	}
	use(0, 50)
	use(1, 20)
	use(2, 93)
	use(3, 60)
	want("least used first", 3, 1, 0, 3)
	want("a full one if need be", 4, 1, 0, 3, 2)
	const most = 1<<39 + 1<<37 // five eighths of a disk are promised
	cmd := w.createCommand("big", most, most, 1)
	cmd.Placement = []SegmentPlacement{{{newID[holdfast.ReplicaID](w), w.disks[1]}}}
	w.must(cmd)
	want("what is promised counts, too", 3, 0, 3, 1)
	use(3, 70)
	want("the more of both counts", 3, 0, 1, 3)
	// Nothing is used of a disk whose image is of 1 TiB, on a file system with 1 GiB left.
	w.must(&DiskUpdate{Disk: w.disks[1], OpenCount: 1, Size: 1 << 30, Free: 1 << 30})
	want("what is promised counts against what is left of the host", 3, 0, 3, 1)
	w.must(&DiskUpdate{Disk: w.disks[0], OpenCount: 1, Size: 1 << 30, Free: 1 << 26})
	want("of little, little is left", 2, 3, 1)
	x := newWorld(t, 0)
	for range 2 {
		x.addNode()
	}
	x.must(&DiskUpdate{Disk: x.disks[0], OpenCount: 1, Size: 1 << 28, Free: 1 << 28})
	x.must(&DiskUpdate{Disk: x.disks[1], OpenCount: 1, Size: 1 << 33, Free: 1 << 33})
	for range 3 { // an empty disk is loaded least until one sees what is to go there
		cmd := x.createCommand("", 1<<30, 1<<30, 1)
		cmd.Name, cmd.Placement = cmd.Volume.String(), x.place(1<<30, 1<<30, 1, 0)
		if got := cmd.Placement[0][0].Disk; got != x.disks[1] {
			t.Errorf("1 GiB goes to %v, which has 256 MiB, and not to %v, which has 8 GiB", got, x.disks[1])
		}
		x.must(cmd)
	}
}

// Too many segments: the sizes as people write them, and a segment_size that works.
func TestTooManySegments(t *testing.T) {
	const size = 64 << 40
	_, err := SegmentCount(size, 1<<30)
	if !errors.Is(err, holdfast.ErrInvalid) || !strings.Contains(err.Error(), "64 TiB") || !strings.Contains(err.Error(), "65536 segments of 1 GiB") {
		t.Fatalf("got %v, want invalid with both sizes", err)
	}
	if remedy := holdfast.RemedyOf(err); remedy != "give a segment_size of at least 4096M" {
		t.Errorf("the remedy is %q", remedy)
	}
	if n, err := SegmentCount(size, 4096<<20); err != nil || n != MaxSegments {
		t.Errorf("what the remedy says: %d segments, %v", n, err)
	}
	if _, err := SegmentCount(size, 4095<<20); err == nil {
		t.Error("the remedy is not the least")
	}
}
