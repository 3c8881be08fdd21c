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
