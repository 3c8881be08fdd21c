package e2e

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// device is a whole block device of this machine: a loop device on a sparse file.
type device struct{ path, file string }

// loopDevice makes one. It goes with the test, after users have been told to end.
func loopDevice(t *testing.T, file string, size int64, users ...*node) device {
	t.Helper()
	sparse(t, file, size)
	out, err := exec.Command("losetup", "--find", "--show", file).Output()
	if err != nil {
		t.Fatalf("losetup: %v", err)
	}
	d := device{strings.TrimSpace(string(out)), file}
	t.Cleanup(func() {
		for _, n := range users {
			n.kill()
		}
		if out, err := exec.Command("losetup", "--detach", d.path).CombinedOutput(); err != nil {
			t.Errorf("losetup --detach %s: %s", d.path, out)
		}
	})
	return d
}

// takes is what the device's file takes of its file system, in bytes.
func (d device) takes(t *testing.T) int64 {
	t.Helper()
	info, err := os.Stat(d.file)
	if err != nil {
		t.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t).Blocks * 512
}

// free opens the device for itself alone, as nobody can who does not find it free.
func (d device) free(t *testing.T) {
	t.Helper()
	f, err := os.OpenFile(d.path, os.O_RDONLY|unix.O_EXCL, 0)
	if err != nil {
		t.Errorf("%s is not free: %v", d.path, err)
		return
	}
	f.Close()
}

// noise writes a file of bytes that no two blocks have in common.
func noise(t *testing.T, path string, size int, seed byte) {
	t.Helper()
	b := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(b) // it never fails
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// qemuImg has the real NBD client of QEMU copy a file onto a volume, or compare them.
func qemuImg(args ...string) *exec.Cmd { return exec.Command("qemu-img", args...) }

func copyTo(file, uri string) *exec.Cmd {
	return qemuImg("convert", "-n", "-f", "raw", "-O", "raw", file, uri)
}

func compare(t *testing.T, file, uri string) {
	t.Helper()
	if out, err := qemuImg("compare", "-f", "raw", "-F", "raw", file, uri).CombinedOutput(); err != nil {
		t.Fatalf("compare %s with the volume: %v\n%s", file, err, out)
	}
}

// TestRawDevice is a node's life on a raw block device: a volume is written, the node
// is killed at rest and in the middle of writes, and finds all of it again; what is
// trimmed is given back to the device; and the volume moves to another device while it
// is in use.
func TestRawDevice(t *testing.T) {
	t.Parallel()
	whole(t)
	need(t, "losetup", "qemu-img", "qemu-io")
	const size = 64 << 20
	n := newNode(t, "solo")
	first := loopDevice(t, filepath.Join(n.dir, "first"), 512<<20, n)
	second := loopDevice(t, filepath.Join(n.dir, "second"), 384<<20, n)
	n.flags = append(n.flags, "--disk", first.path+",wal=16M,pool=raw")
	n.start()
	n.ready()
	was := n.disks("")[0]
	if was.Path != first.path || was.Pool != "raw" || was.State != "ok" || was.Allocated < 480<<20 {
		t.Fatalf("a whole device: %+v", was)
	}
	n.must("volume", "create", "v", "--size", "64M", "--replicas", "1")
	uri := n.attach("v")
	data := filepath.Join(n.dir, "data")
	noise(t, data, size, 1)
	if out, err := copyTo(data, uri).CombinedOutput(); err != nil {
		t.Fatalf("write the volume: %v\n%s", err, out)
	}
	compare(t, data, uri)

	// Killed at rest: the attachment comes back under the same URI.
	n.kill()
	n.start()
	n.ready()
	if again := n.attach("v"); again != uri {
		t.Fatalf("after a restart the URI is %s, want %s", again, uri)
	}
	compare(t, data, uri)

	// Killed in the middle of writes: every block is the one that was, whichever of
	// two writes of the same bytes it is from.
	for round := range 2 {
		write := copyTo(data, uri)
		if err := write.Start(); err != nil {
			t.Fatal(err)
		}
		before := n.inspect("v").Replicas[0].Tail
		eventually(t, 30*time.Second, "some of it is written", func() bool { return n.inspect("v").Replicas[0].Tail >= before+uint64(4<<round) })
		n.kill()
		_ = write.Wait() // its connection broke, or it was through
		n.start()
		n.ready()
		n.attach("v")
		compare(t, data, uri)
	}

	// What is trimmed goes back to the device.
	eventually(t, time.Minute, "all is applied", func() bool { d := n.disk(was.ID); return d.Used >= size && d.Reclaimable == 0 })
	full, used := first.takes(t), n.disk(was.ID).Used
	blockIO(t, uri, "discard 0 48M", "flush")
	eventually(t, time.Minute, "the trimmed space is given back", func() bool {
		return first.takes(t) <= full-(40<<20) && n.disk(was.ID).Used <= used-(40<<20)
	})
	blockIO(t, uri, "read -P 0 0 48M")
	if err := unix.Fallocate(fileOf(t, data), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 48<<20); err != nil {
		t.Fatal(err)
	}
	compare(t, data, uri)

	// The volume moves to another device while it is attached; the first is free then,
	// and still not blank.
	n.must("disk", "add", second.path+",wal=16M")
	n.must("disk", "rm", was.ID, "--wait", "60s")
	compare(t, data, uri)
	first.free(t)
	if d := n.disks(""); len(d) != 1 || d[0].Path != second.path || !n.disk(was.ID).Removed {
		t.Errorf("after the move: %+v", d)
	}
	n.refuses(5, first.path+" is not blank", "disk", "add", first.path+",wal=16M")
	n.must("volume", "detach", "v")
	n.terminate()
	second.free(t)
	n.start()
	n.ready()
	uri = n.attach("v")
	compare(t, data, uri)
	n.must("volume", "detach", "v")
}

// fileOf opens a file until the test ends.
func fileOf(t *testing.T, path string) int {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return int(f.Fd())
}

// TestRawDeviceIsRefused: what somebody may still want is named, with the remedy, and
// not a byte of it changes; force overwrites what is not in use.
func TestRawDeviceIsRefused(t *testing.T) {
	t.Parallel()
	whole(t)
	need(t, "losetup", "mkfs.ext4", "mount", "sfdisk", "mkswap")
	n, stranger := newNode(t, "solo"), newNode(t, "stranger")
	n.flags = append(n.flags, "--disk", filepath.Join(n.dir, "own.img")+",size=128M,wal=16M")
	blank := func(name string) device { return loopDevice(t, filepath.Join(n.dir, name), 128<<20, n, stranger) }
	sum := func(d device) string {
		t.Helper()
		out, err := exec.Command("sha256sum", d.path).Output()
		if err != nil {
			t.Fatal(err)
		}
		return string(out)
	}
	n.start()
	n.ready()
	ext4, table, swap, foreign := blank("ext4"), blank("table"), blank("swap"), blank("foreign")
	mkfs(t, ext4.path)
	sfdisk := exec.Command("sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", table.path)
	sfdisk.Stdin = strings.NewReader("label: gpt\n,32M\n")
	if out, err := sfdisk.CombinedOutput(); err != nil {
		t.Fatalf("sfdisk: %v: %s", err, out)
	}
	if out, err := exec.Command("mkswap", swap.path).CombinedOutput(); err != nil {
		t.Fatalf("mkswap: %v: %s", err, out)
	}
	stranger.flags = append(stranger.flags, "--disk", foreign.path+",wal=16M")
	stranger.start()
	stranger.ready()
	n.refuses(5, foreign.path+" is in use", "disk", "add", foreign.path+",wal=16M", "--force") // its node runs
	id := stranger.disks("")[0].ID
	stranger.terminate()

	for _, c := range []struct {
		d    device
		says string
	}{
		{ext4, "a file system of type ext4"},
		{table, "partition table"},
		{swap, "swap"},
		{foreign, "it is disk " + id + " of another cluster"},
	} {
		before := sum(c.d)
		n.refuses(5, c.d.path+" is not blank: ", "disk", "add", c.d.path+",wal=16M")
		n.refuses(5, c.says, "disk", "add", c.d.path+",wal=16M")
		n.refuses(5, "force it if nobody needs what is there", "disk", "add", c.d.path+",wal=16M")
		// So is a node's first start.
		fresh := newNode(t, "fresh", "--disk", c.d.path+",wal=16M")
		fresh.start()
		err := <-fresh.exited
		code := fresh.cmd.ProcessState.ExitCode()
		fresh.cmd = nil
		fresh.log.Close()
		if log, _ := os.ReadFile(filepath.Join(fresh.dir, "log")); err == nil || code != 5 || !strings.Contains(string(log), c.d.path+" is not blank: ") {
			t.Errorf("a first start with %s: exit %d\n%s", c.d.path, code, log)
		}
		if sum(c.d) != before {
			t.Errorf("%s, which was refused (%s), has changed", c.d.path, c.says)
		}
	}

	// What is mounted is refused always.
	dir := filepath.Join(n.dir, "mnt")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mount", ext4.path, dir).CombinedOutput(); err != nil {
		t.Fatalf("mount: %s", out)
	}
	for _, more := range [][]string{nil, {"--force"}} {
		n.refuses(5, fmt.Sprintf("%s is in use: it is mounted at %s (ext4)", ext4.path, dir), append([]string{"disk", "add", ext4.path + ",wal=16M"}, more...)...)
		n.refuses(5, "no force overrides it", append([]string{"disk", "add", ext4.path + ",wal=16M"}, more...)...)
	}
	if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
		t.Fatalf("umount: %s", out)
	}
	if out, err := exec.Command("fsck.ext4", "-f", "-n", ext4.path).CombinedOutput(); err != nil {
		t.Errorf("the file system that was refused: %v\n%s", err, out)
	}

	n.refuses(2, "too small", "disk", "add", table.path+",wal=1G", "--force")
	n.refuses(5, "in use by the loop device "+table.path, "disk", "add", table.file+",wal=16M", "--force")
	for _, d := range []device{ext4, table, swap, foreign} {
		n.must("disk", "add", d.path+",wal=16M", "--force")
	}
	n.refuses(4, "open", "disk", "add", ext4.path, "--force")
	if d := n.disks(""); len(d) != 5 {
		t.Errorf("forced: %+v", d)
	}
	n.terminate()
	n.start()
	n.ready()
	for _, d := range n.disks("") {
		if !d.Open || d.State != "ok" {
			t.Errorf("after a restart: %+v", d)
		}
	}
}
