package reconcile

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/disk"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

func TestParseDisk(t *testing.T) {
	for in, want := range map[string]DiskSpec{
		"/dev/sdb":                             {Path: "/dev/sdb"},
		"/a.img,size=10G":                      {Path: "/a.img", Size: 10 << 30},
		"/a.img,size=64M,wal=16M,pool=archive": {Path: "/a.img", Size: 64 << 20, WAL: 16 << 20, Pool: "archive"},
		"/x/../a.img":                          {Path: "/a.img"},
	} {
		if got, err := ParseDisk("--disk", in); err != nil || got != want {
			t.Errorf("%q: %+v, %v; want %+v", in, got, err, want)
		}
	}
	for _, in := range []string{"", ",size=10G", "/a,size=", "/a,size=1M", "/a,size=x", "/a,wal=1M", "/a,pool=", "/a,pool=a b", "/a,colour=red", "/a,size=-1G"} {
		if _, err := ParseDisk("--disk", in); !errors.Is(err, holdfast.ErrInvalid) {
			t.Errorf("%q: got %v", in, err)
		}
	}
}

// kept is what Save was given last.
type kept struct{ list []DiskSpec }

// withSave has a node's disks keep their list.
func withSave(n *fakeNode) *kept {
	k := &kept{}
	n.disks.o.Save = func(list []DiskSpec) error { k.list = slices.Clone(list); return nil }
	return k
}

// until waits for what other goroutines do.
func until(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for range 3000 {
		if cond() {
			return
		}
		time.Sleep(10 * time.Millisecond) // between two looks at what other goroutines do
	}
	t.Fatalf("still not: %s", what)
}

func TestDisksComeAndGo(t *testing.T) {
	reg := newRegister(t)
	n := run(t, reg, holdfast.NewID[holdfast.NodeID](), vfs.NewMemory(1), t.TempDir())
	defer n.end(t)
	k := withSave(n)
	n.disks.o.Class = func(string) string { return "hdd" }
	if err := n.disks.Know([]DiskSpec{{Path: "/disk.img"}}); err != nil {
		t.Fatal(err)
	}
	spec := DiskSpec{Path: "/second.img", Size: 256 << 20, WAL: 16 << 20}
	for what, c := range map[string]struct {
		spec DiskSpec
		kind holdfast.Kind
	}{
		"open":         {DiskSpec{Path: "/disk.img"}, holdfast.ErrExists},
		"no size":      {DiskSpec{Path: "/none.img"}, holdfast.ErrInvalid},
		"no directory": {DiskSpec{Path: "/none/a.img", Size: 1 << 30}, holdfast.ErrNotFound},
		"too small":    {DiskSpec{Path: "/small.img", Size: 1 << 20, WAL: 16 << 20}, holdfast.ErrInvalid},
	} {
		if _, err := n.disks.Add(t.Context(), c.spec, true); !errors.Is(err, c.kind) {
			t.Errorf("%s: got %v, want %v", what, err, c.kind)
		}
	}
	id, err := n.disks.Add(t.Context(), spec, false)
	if err != nil {
		t.Fatal(err)
	}
	if rec, ok := reg.View().Disk(id); !ok || rec.Pool != "hdd" || rec.Node != n.id {
		t.Errorf("in the tables: %+v", rec)
	}
	if len(k.list) != 2 || k.list[1] != spec {
		t.Errorf("kept: %+v", k.list)
	}

	// A replica comes and is deleted; then the leaving disk goes, and not before.
	place := func() *state.Volume {
		return reg.must(t, &state.CreateVolume{Volume: holdfast.NewID[holdfast.VolumeID](), Name: "v", Size: 64 << 20,
			Options: state.VolumeOptions{Replicas: 1, FS: "ext4", SegmentSize: 1 << 30, AckMode: holdfast.AckReceived, MinCopies: 1},
			Lineage: holdfast.NewID[holdfast.LineageID](), Placement: []state.SegmentPlacement{{{Replica: holdfast.NewID[holdfast.ReplicaID](), Disk: id}}}}).Volume
	}
	v := place()
	until(t, "the replica is made", func() bool { _, ok := n.serve.Replica(v.Segments[0].Replicas[0].ID); return ok })
	reg.must(t, &state.SetDiskLeaving{Disk: id, Leaving: true})
	if err := n.disks.reconcile(t.Context(), id, Room{}); err != nil || len(n.disks.List()) != 2 {
		t.Fatalf("a leaving disk with a replica: %v, %d disks", err, len(n.disks.List()))
	}
	reg.must(t, &state.DeleteVolume{Volume: v.ID})
	until(t, "the disk is let go", func() bool { return len(n.disks.List()) == 1 })
	until(t, "its removal is kept", func() bool {
		n.disks.changing.Lock()
		defer n.disks.changing.Unlock()
		return len(k.list) == 2 && k.list[1].Removed
	})
	if rec, _ := reg.View().Disk(id); !rec.Removed {
		t.Errorf("in the tables: %+v", rec)
	}
	if _, err := disk.Identify(n.fs, spec.Path); !errors.Is(err, holdfast.ErrIntegrity) {
		t.Errorf("the removed disk is not erased: %v", err)
	}
	if _, err := n.disks.Add(t.Context(), spec, false); !errors.Is(err, holdfast.ErrRefused) {
		t.Errorf("added again without force, with its old log: %v", err)
	}
	again, err := n.disks.Add(t.Context(), spec, true)
	if err != nil || again == id {
		t.Errorf("added again: disk %v, %v", again, err)
	}
	if len(k.list) != 2 || k.list[1].Removed {
		t.Errorf("kept: %+v", k.list)
	}
}

// TestRemovedBehindItsBack: raft removed a disk, and its node did not live to let it
// go: it is not opened any more, and is erased.
func TestRemovedBehindItsBack(t *testing.T) {
	reg := newRegister(t)
	fs := vfs.NewMemory(1)
	n := run(t, reg, holdfast.NewID[holdfast.NodeID](), fs, t.TempDir())
	spec := DiskSpec{Path: "/second.img", Size: 256 << 20, WAL: 16 << 20}
	id, err := n.disks.Add(t.Context(), spec, false)
	if err != nil {
		t.Fatal(err)
	}
	n.end(t)
	reg.must(t, &state.SetDiskLeaving{Disk: id, Leaving: true})
	reg.must(t, &state.DiskRemove{Disk: id})
	n = run(t, reg, n.id, fs, t.TempDir())
	defer n.end(t)
	k := withSave(n)
	if err := n.disks.Open(t.Context(), spec); !errors.Is(err, state.ReasonRemoved) {
		t.Fatalf("open a removed disk: %v", err)
	}
	if err := n.disks.Retire("/disk.img"); err == nil {
		t.Error("a disk that was not removed is erased")
	}
	if err := n.disks.Retire(spec.Path); err != nil {
		t.Fatal(err)
	}
	if _, err := disk.Identify(fs, spec.Path); !errors.Is(err, holdfast.ErrIntegrity) {
		t.Errorf("not erased: %v", err)
	}
	if len(k.list) != 1 || !k.list[0].Removed {
		t.Errorf("kept: %+v", k.list)
	}
}

// TestAnUnknownReplicaKeepsItsDisk: what raft does not name may be all there is.
func TestAnUnknownReplicaKeepsItsDisk(t *testing.T) {
	reg := newRegister(t)
	n := run(t, reg, holdfast.NewID[holdfast.NodeID](), vfs.NewMemory(1), t.TempDir())
	defer n.end(t)
	id := n.disks.List()[0].Stat.Disk
	desc := disk.ReplicaDesc{Segment: holdfast.SegmentID{Volume: holdfast.NewID[holdfast.VolumeID]()}, Replica: holdfast.NewID[holdfast.ReplicaID](), Lineage: holdfast.NewID[holdfast.LineageID](), Size: 1 << 20}
	if err := n.serve.CreateReplica(id, desc); err != nil {
		t.Fatal(err)
	}
	reg.must(t, &state.SetDiskLeaving{Disk: id, Leaving: true})
	if err := n.disks.reconcile(t.Context(), id, Room{}); !errors.Is(err, holdfast.ErrRefused) {
		t.Errorf("let go: %v", err)
	}
	if rec, _ := reg.View().Disk(id); rec.Removed || len(n.disks.List()) != 1 {
		t.Errorf("removed with a replica on it: %+v", rec)
	}
}

func TestScrubber(t *testing.T) {
	fs := vfs.NewMemory(1)
	if err := disk.Format(t.Context(), fs, "/a", disk.FormatOptions{Cluster: holdfast.NewID[holdfast.ClusterID](), Node: holdfast.NewID[holdfast.NodeID](), Size: 64 << 20, WALSize: 16 << 20}); err != nil {
		t.Fatal(err)
	}
	d, err := disk.Open(t.Context(), fs, "/a", disk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	log := slog.New(slog.DiscardHandler)
	s := startScrubber(d, -1, log)
	if st := s.state(); st.Running || !st.Next.IsZero() {
		t.Errorf("one that is only asked: %+v", st)
	}
	s.start(disk.DefaultScrubRate)
	until(t, "it is done", func() bool { st := s.state(); return !st.Running && st.Scrubs == 1 })
	s.end()
	s.close()

	// By itself, again and again.
	s = startScrubber(d, time.Millisecond, log)
	until(t, "it scrubbed twice", func() bool { return s.state().Scrubs >= 2 })
	s.close()

	// One that is ended before it began never runs.
	_, stop := context.WithCancel(context.Background())
	s = &scrubber{d: d, every: -1, log: log, ask: make(chan int64, 1), stop: stop}
	s.start(disk.DefaultScrubRate)
	s.start(disk.DefaultScrubRate)
	s.end()
	if st := s.state(); st.Running || st.Ended.IsZero() || len(s.ask) != 0 {
		t.Errorf("ended before it began: %+v", st)
	}
	s.close()
}
