package e2e

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The file system of the data directory fills up: the disk on it takes no more space,
// then the node does not lead raft; what needs neither goes on, and with room again
// everything does.
func TestDataDirectoryFills(t *testing.T) {
	whole(t)
	need(t, "fio", "mount")
	t.Parallel()
	n := newNode(t, "solo")
	data := filepath.Join(n.dir, "d")
	tmpfsOf(t, n, data, "400m")
	n.flags = append(n.flags, "--disk", filepath.Join(data, "disk.img")+",size=200M,wal=16M")
	n.start()
	n.ready()
	n.must("volume", "create", "v", "--size", "128M", "--replicas", "1")
	uri := n.attach("v")
	write := func(off string, size string) error {
		return fioCommand(t, uri, "--rw=write", "--bs=64k", "--offset="+off, "--size="+size, "--end_fsync=1").Run()
	}
	if err := write("0", "8M"); err != nil {
		t.Fatalf("write with room: %v", err)
	}
	fill := func(leave int64) { // bytes free
		t.Helper()
		var st unix.Statfs_t
		if err := unix.Statfs(data, &st); err != nil {
			t.Fatal(err)
		}
		growFiller(t, data, int64(st.Bavail)*st.Bsize-leave)
	}
	fill(24 << 20) // the ballast is of 16 MiB: below twice that
	eventually(t, 20*time.Second, "writes that need new space fail", func() bool { return write("64M", "60M") != nil })
	if err := write("0", "8M"); err != nil {
		t.Fatalf("overwrite on a full host: %v", err)
	}
	n.must("volume", "create", "w", "--size", "16M", "--replicas", "1") // raft goes on
	fill(6 << 20)                                                       // below half of it
	eventually(t, 20*time.Second, "changes of the metadata are refused", func() bool {
		return n.cli("volume", "create", "x", "--size", "16M", "--replicas", "1").code == 5
	})
	if log, err := os.ReadFile(filepath.Join(n.dir, "log")); err != nil || !strings.Contains(string(log), "free, less than half of the ballast") {
		t.Errorf("the log does not say why: %v", err)
	}
	if err := write("0", "8M"); err != nil {
		t.Fatalf("overwrite while raft is spared: %v", err)
	}
	removeFiller(t, data)
	eventually(t, 30*time.Second, "changes of the metadata go on", func() bool {
		return n.cli("volume", "create", "y", "--size", "16M", "--replicas", "1").code == 0
	})
	eventually(t, 30*time.Second, "writes go on", func() bool { return write("64M", "60M") == nil })
	n.must("volume", "detach", "v")
}

// TestSparseImagesAreNotRoom: images that are larger than what their file system has left
// count as what it has left, once for all of them. Volumes are placed by that; disk ls
// says so on every node, also of one that is down.
func TestSparseImagesAreNotRoom(t *testing.T) {
	t.Parallel()
	whole(t)
	need(t, "mount")
	n := newNode(t, "n1", "--bootstrap")
	host := filepath.Join(n.dir, "host")
	tmpfsOf(t, n, host, "300m")
	n.flags = append(n.flags, "--disk", filepath.Join(host, "a.img")+",size=64G,wal=16M")
	n.start()
	n.ready()
	other := newNode(t, "n2", "--disk", "none", "--join", n.address)
	other.start()
	other.ready()
	const left = 300 << 20
	free := func(from *node) (sum int64) {
		t.Helper()
		var ls struct {
			Disks []struct {
				Node     string
				Free     int64
				FreeHost bool `json:"free_host"`
				Open     bool
			}
		}
		from.decode(&ls, "disk", "ls", "--node", "n1")
		for _, d := range ls.Disks {
			if d.Open && !d.FreeHost {
				t.Errorf("%s: disk ls does not say that the file system bounds %+v", from.name, d)
			}
			sum += d.Free
		}
		return sum
	}
	for _, from := range []*node{n, other} {
		if got := free(from); got > left || got < left/2 {
			t.Errorf("%s: n1 has %d free, of a file system of %d", from.name, got, left)
		}
	}
	n.must("disk", "add", filepath.Join(host, "b.img")+",size=64G,wal=16M")
	if got := free(other); got > left || got < left/2 {
		t.Errorf("with two images: n1 has %d free, of a file system of %d", got, left)
	}

	// A smaller disk with more room gets what there is to place.
	roomy := newNode(t, "n3", "--join", n.address)
	roomy.flags = append(roomy.flags, "--disk", filepath.Join(roomy.dir, "c.img")+",size=8G,wal=16M")
	roomy.start()
	roomy.ready()
	for _, name := range []string{"u", "v", "w"} {
		n.must("volume", "create", name, "--size", "2G", "--replicas", "1")
		var v struct{ Replicas []struct{ Node string } }
		n.decode(&v, "volume", "inspect", name)
		if len(v.Replicas) != 1 || v.Replicas[0].Node != "n3" {
			t.Errorf("volume %s stands on %+v, want it on n3", name, v.Replicas)
		}
	}

	// Raft is told within half a minute that the file system fills.
	known := func() int64 { // free on all disks, as raft has it
		var s struct{ Size, Used int64 }
		other.decode(&s, "status")
		return s.Size - s.Used
	}
	was := known()
	var st unix.Statfs_t
	if err := unix.Statfs(host, &st); err != nil {
		t.Fatal(err)
	}
	growFiller(t, host, int64(st.Bavail)*st.Bsize-32<<20)
	eventually(t, time.Minute, "raft knows that the file system fills", func() bool { return known() < was-100<<20 })
}

// tmpfsOf mounts a file system of a size for a node, which is killed before it goes.
func tmpfsOf(t *testing.T, n *node, dir, size string) {
	t.Helper()
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size="+size, "tmpfs", dir).CombinedOutput(); err != nil {
		t.Fatalf("mount: %s", out)
	}
	t.Cleanup(func() {
		n.kill()
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount %s: %s", dir, out)
		}
	})
}

// growFiller takes that many bytes more of a file system, in one file; of none or less
// nothing.
func growFiller(t *testing.T, dir string, more int64) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(dir, "filler"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		t.Fatal(err)
	}
	if more > 0 {
		if err := unix.Fallocate(int(f.Fd()), 0, size, more); err != nil {
			t.Fatal(err)
		}
	}
}

func removeFiller(t *testing.T, dir string) {
	t.Helper()
	if err := os.Remove(filepath.Join(dir, "filler")); err != nil {
		t.Fatal(err)
	}
}
