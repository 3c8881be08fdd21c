package reconcile

import (
	"sync/atomic"
	"testing"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/disk"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// TestRooms: what a disk has free is bounded by what the file system of its image has
// left, which images on it share.
func TestRooms(t *testing.T) {
	const m = 1 << 20
	a := disk.Stat{Disk: holdfast.DiskID{1}, Capacity: 1000 * m, Used: 90 * m, Reserved: 10 * m, Allocated: 100 * m}
	b := disk.Stat{Disk: holdfast.DiskID{2}, Capacity: 1000 * m}
	small := disk.Stat{Disk: holdfast.DiskID{3}, Capacity: 100 * m, Used: 20 * m, Allocated: 20 * m}
	ahead, failed, over := a, a, a
	ahead.Allocated, failed.Failed, over.Used = 130*m, holdfast.ErrIO, 995*m
	on := func(fs uint64, left, has int64) *HostRoom { return &HostRoom{FS: fs, Left: left * m, Has: has * m} }
	type at struct {
		stat       disk.Stat
		host       *HostRoom // nil: a device
		size, free int64     // MiB
		ofHost     bool
	}
	for _, c := range []struct {
		name  string
		disks []at
	}{
		{"a device", []at{{a, nil, 1000, 900, false}}},
		{"the host has more", []at{{a, on(1, 5000, 100), 1000, 900, false}}},
		{"the host has as much", []at{{a, on(1, 900, 100), 1000, 900, false}}},
		{"the host has less", []at{{a, on(1, 300, 100), 400, 300, true}}},
		{"the host has nothing", []at{{a, on(1, 0, 100), 100, 0, true}}},
		{"space was set aside", []at{{ahead, on(1, 300, 130), 430, 330, true}}},
		{"space was set aside, the host has nothing", []at{{ahead, on(1, 0, 130), 130, 30, true}}},
		{"the image is whole", []at{{a, on(1, 300, 1000), 1000, 900, false}}},
		{"the image is whole, which nobody can find out on a full host", []at{{a, on(1, 0, 1000), 100, 0, true}}},
		{"two share", []at{{a, on(1, 300, 0), 250, 150, true}, {b, on(1, 300, 0), 150, 150, true}}},
		{"one needs less than its share", []at{{a, on(1, 300, 0), 320, 220, true}, {small, on(1, 300, 0), 100, 80, false}}},
		{"all find room", []at{{a, on(1, 2000, 0), 1000, 900, false}, {b, on(1, 2000, 0), 1000, 1000, false}}},
		{"on two file systems", []at{{a, on(1, 300, 0), 400, 300, true}, {b, on(2, 200, 0), 200, 200, true}}},
		{"beside one that failed", []at{{failed, on(1, 300, 0), 1000, 900, false}, {b, on(1, 300, 0), 300, 300, true}}},
		{"more is promised than there is", []at{{over, on(1, 300, 0), 1000, 0, false}}},
	} {
		paths := map[string]*HostRoom{}
		var open []OpenedDisk
		for i, x := range c.disks {
			path := string(rune('a' + i))
			paths[path] = x.host
			open = append(open, OpenedDisk{Path: path, Stat: x.stat})
		}
		d := NewDisks(DisksOptions{HostRoom: func(path string) (HostRoom, bool) {
			if h := paths[path]; h != nil {
				return *h, true
			}
			return HostRoom{}, false
		}})
		got := d.rooms(open)
		for _, x := range c.disks {
			if want := (Room{Size: x.size * m, Free: x.free * m, Host: x.ofHost}); got[x.stat.Disk] != want {
				t.Errorf("%s, disk %d: got %+v, want %+v", c.name, x.stat.Disk[0], got[x.stat.Disk], want)
			}
		}
	}
	d := NewDisks(DisksOptions{HostRoom: func(string) (HostRoom, bool) { return HostRoom{}, true }})
	if got := d.rooms([]OpenedDisk{{Stat: b}})[b.Disk]; got.Size <= 0 || got.Free != 0 {
		t.Errorf("an empty disk on a full host: got %+v, and raft takes no disk of no size", got)
	}
}

// TestRaftIsToldOfTheHost: what raft knows of a disk follows what its host has left, and
// disk ls says the same.
func TestRaftIsToldOfTheHost(t *testing.T) {
	reg := newRegister(t)
	n := run(t, reg, holdfast.NewID[holdfast.NodeID](), vfs.NewMemory(1), t.TempDir())
	defer n.end(t)
	o := n.disks.o
	var left atomic.Int64
	left.Store(1 << 40)
	o.HostRoom = func(string) (HostRoom, bool) { return HostRoom{Left: left.Load()}, true }
	spec := DiskSpec{Path: "/second.img", Size: 512 << 20, WAL: 16 << 20}
	d := NewDisks(o)
	if err := d.Prepare(t.Context(), spec, false); err != nil {
		t.Fatal(err)
	}
	if err := d.Open(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := n.serve.RemoveDisk(t.Context(), d.List()[0].Stat.Disk); err != nil {
			t.Error(err)
		}
		d.Close()
	}()
	id := d.List()[0].Stat.Disk
	look := func(what string, bounded bool) {
		t.Helper()
		if err := d.reconcile(t.Context(), id, d.rooms(d.opened())[id]); err != nil {
			t.Fatal(err)
		}
		listed := d.List()[0]
		own := listed.Stat.Capacity - listed.Stat.Used - listed.Stat.Reserved
		if listed.Room.Host != bounded || bounded != (listed.Room.Free < own) {
			t.Errorf("%s: listed %+v, the disk has %d", what, listed.Room, own)
		}
		if rec, _ := reg.View().Disk(id); rec.Free != listed.Room.Free || rec.Size != listed.Room.Size {
			t.Errorf("%s: raft knows %d of %d, listed are %d of %d", what, rec.Free, rec.Size, listed.Room.Free, listed.Room.Size)
		}
	}
	look("opened", false)
	left.Store(100 << 20)
	look("the host fills", true)
	left.Store(0)
	look("the host is full", true)
	left.Store(1 << 40)
	look("the host has room again", false)
}
