package keeper

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/mount"
)

// TestRootFlushCount: every fsync of a program is one flush at the device.
func TestRootFlushCount(t *testing.T) {
	needRoot(t, "fio")
	n := startNode(t, "")
	a := volume("data", mount.Ext4, 64<<20)
	loop := n.must("Attach", a)
	before := n.count("data", countFlushes)
	// fio syncs after every write but the last, and once at the end.
	n.runInside("fio", "--name=f", "--filename="+loop, "--rw=randwrite", "--bs=4k", "--number_ios=100", "--size=16m", "--ioengine=psync", "--direct=1", "--fsync=1", "--end_fsync=1")
	got := n.count("data", countFlushes) - before
	if got != 100 && got != 101 {
		t.Errorf("flushes at the device: got %d, want 100 or 101", got)
	}
	n.must("CloseDevice", a)
}

// TestRootFileSystemErrors: a full and a broken device reach the program, and
// Mount tells that what is mounted is no longer good.
func TestRootFileSystemErrors(t *testing.T) {
	needRoot(t, "mkfs.ext4", "nsenter")
	n := startNode(t, "")
	a := volume("data", mount.Ext4, 64<<20)
	path := n.up(a)
	write := func() string {
		out, err := n.inside("dd", "if=/dev/zero", "of="+filepath.Join(path, "file"), "bs=64k", "count=4", "oflag=direct").CombinedOutput()
		if err == nil {
			return ""
		}
		return string(out)
	}
	if got := write(); got != "" {
		t.Fatalf("write: %s", got)
	}
	n.set("data", switchFail, 2)
	if got := write(); !strings.Contains(got, "No space left") {
		t.Errorf("write to a full device: got %q, want no space left", got)
	}
	n.set("data", switchFail, 1)
	if got := write(); !strings.Contains(got, "Input/output error") && !strings.Contains(got, "Read-only") {
		t.Errorf("write to a broken device: got %q, want an I/O error", got)
	}
	for deadline := time.Now().Add(30 * time.Second); ; { // until the journal has noticed
		if time.Now().After(deadline) {
			t.Fatalf("mount does not tell that the file system is broken:\n%s", n.runInside("grep", "mounts/data", "/proc/self/mountinfo"))
		}
		if err := n.call("Mount", a, new(string)); err != nil {
			if !strings.Contains(err.Error(), "read-only") {
				t.Errorf("mount of a broken file system: got %v, want it to be told", err)
			}
			break
		}
		_ = write()
		_, _ = n.inside("sync", "-f", path).CombinedOutput()
	}
	n.set("data", switchFail, 0)
	n.must("Unmount", a)
	n.must("Fsck", a)
	if again := n.must("Mount", a); again != path {
		t.Errorf("mount after the repair: got %s, want %s", again, path)
	}
	if got := write(); got != "" {
		t.Errorf("write after the repair: %s", got)
	}
	n.must("Unmount", a)
	// The kernel tells once that the device had failed a write, to each who has
	// it open.
	if err := n.call("CloseDevice", a, new(string)); err != nil && !strings.Contains(err.Error(), "input/output error") {
		t.Errorf("close: %v", err)
	}
	n.must("CloseDevice", a)
}

// TestRootTrim: what a file system gives back reaches the device.
func TestRootTrim(t *testing.T) {
	needRoot(t, "mkfs.ext4", "fstrim", "nsenter")
	n := startNode(t, "")
	a := volume("data", mount.Ext4, 256<<20)
	path := n.up(a)
	used := func() int64 {
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(n.dir, "data.img"), &st); err != nil {
			t.Fatal(err)
		}
		return st.Blocks * 512
	}
	file := filepath.Join(path, "file")
	n.runInside("dd", "if=/dev/urandom", "of="+file, "bs=1M", "count=64", "conv=fsync")
	full := used()
	n.runInside("rm", file)
	n.runInside("sync", "-f", path)
	n.runInside("fstrim", path)
	if got := full - used(); got < 60<<20 {
		t.Errorf("given back: got %d bytes, want at least 60 MiB of %d", got, full)
	}
	n.must("Unmount", a)
	n.must("CloseDevice", a)
}

// TestRootDeathInEveryCall kills the daemon while the keeper makes, mounts and
// unmounts for it; the next daemon asks again, and all ends well.
func TestRootDeathInEveryCall(t *testing.T) {
	needRoot(t, "mkfs.ext4", "nsenter")
	rng := rand.New(rand.NewPCG(2, 0))
	n := startNode(t, "")
	a := volume("data", mount.Ext4, 64<<20)
	n.must("Attach", a)
	n.set("data", delayMicros, 2000) // so that the calls last
	again := a
	again.Format.Again = true // as the daemon asks when it finds that mkfs had begun
	for _, c := range []struct {
		method string
		args   Args
	}{{"Format", again}, {"Fsck", a}, {"Mount", a}, {"Unmount", a}, {"Mount", a}, {"Unmount", a}} {
		asked := make(chan error, 1)
		go func() { asked <- n.call(c.method, c.args, new(string)) }()
		time.Sleep(time.Duration(rng.IntN(40)) * time.Millisecond) // any moment is a good one
		n.killDaemon()
		<-asked // it broke, or was done before the kill
		n.must(c.method, c.args)
	}
	n.set("data", delayMicros, 0)
	d := n.onlyDevice()
	n.must("CloseDevice", a)
	gone(t, d)
	if err := (mount.Tools{}).Check(t.Context(), filepath.Join(n.dir, "data.img"), mount.Ext4); err != nil {
		t.Error(err)
	}
}

// TestRootDeathBeforeService kills a daemon between opening a device and serving
// it: the call that waits for the first answer gets it from the next one.
func TestRootDeathBeforeService(t *testing.T) {
	needRoot(t)
	n := startNode(t, "")
	a := volume("data", mount.Ext4, 64<<20)
	n.must("OpenOnly", a)
	for n.onlyDevice().Busy != string(verbLoop) {
		time.Sleep(time.Millisecond)
	}
	n.killDaemon()
	for n.onlyDevice().Busy != "" { // the new daemon attaches it by itself
		time.Sleep(time.Millisecond)
	}
	d := n.onlyDevice()
	if d.Loop == "" || !d.Lent {
		t.Errorf("device: got %+v, want it lent, with a loop device", d)
	}
	n.must("CloseDevice", a)
	gone(t, d)
}

// TestRootOneDaemon: while the daemon lives, nobody else is served.
func TestRootOneDaemon(t *testing.T) {
	needRoot(t)
	n := startNode(t, "")
	n.daemonPID()
	if _, err := Dial(t.Context(), n.dir, DialOptions{}); !errors.Is(err, holdfast.ErrRefused) || !strings.Contains(err.Error(), "lives") {
		t.Errorf("a second daemon: got %v, want it refused", err)
	}
	n.daemonPID() // the first is still served
}

// TestRootManyDevices: more devices than fit one message.
func TestRootManyDevices(t *testing.T) {
	needRoot(t)
	n := startNode(t, "")
	const many = devicesPerPage + 3
	var all []Args
	for i := range many {
		a := volume("v"+strings.Repeat("x", i), mount.Ext4, 1<<20)
		all = append(all, a)
		n.must("Attach", a)
	}
	var devices []Device
	if err := n.call("Devices", Args{}, &devices); err != nil || len(devices) != many {
		t.Errorf("devices: got %d, %v, want %d", len(devices), err, many)
	}
	for _, d := range devices {
		if !d.Lent || d.Loop == "" || d.Size != 1<<20 {
			t.Errorf("device: got %+v, want it lent, with a loop device", d)
		}
	}
	same := all[0]
	same.Spec.Volume = holdfast.NewID[holdfast.VolumeID]()
	if err := n.call("Attach", same, new(string)); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("two devices of one name: got %v, want it refused", err)
	}
	for _, a := range all {
		n.must("CloseDevice", a)
	}
}

// TestRootBusyUnmount: a process in the volume keeps it; Unmount says so.
func TestRootBusyUnmount(t *testing.T) {
	needRoot(t, "mkfs.ext4", "nsenter")
	n := startNode(t, "")
	a := volume("data", mount.Ext4, 64<<20)
	path := n.up(a)
	// As a container has it: a namespace of its own, with a copy of the mount.
	user := n.inside("unshare", "-m", "sh", "-c", "cd "+path+" && echo in > in && exec sleep 1000")
	if err := user.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = user.Process.Kill(); _ = user.Wait() }()
	for {
		if _, err := n.inside("stat", filepath.Join(path, "in")).CombinedOutput(); err == nil {
			break
		}
		time.Sleep(time.Millisecond)
	}
	err := n.call("Unmount", a, new(string))
	if err == nil || !strings.Contains(err.Error(), "another mount namespace") {
		t.Fatalf("unmount in use: got %v, want it refused", err)
	}
	if err := n.call("CloseDevice", a, new(string)); err == nil {
		t.Error("a device in use was closed")
	}
	if again := n.must("Mount", a); again != path { // the next container gets it all the same
		t.Errorf("mount: got %s, want %s", again, path)
	}
	_ = user.Process.Kill()
	_ = user.Wait()
	n.must("Unmount", a)
	n.must("CloseDevice", a)
}

// TestRootMountRefusals: Mount fails loudly and mounts nothing.
func TestRootMountRefusals(t *testing.T) {
	needRoot(t, "mkfs.ext4")
	n := startNode(t, "")
	a := volume("data", mount.Ext4, 64<<20)
	if err := n.call("Mount", a, new(string)); err == nil || !strings.Contains(err.Error(), "no device") {
		t.Errorf("without a device: got %v", err)
	}
	n.must("Attach", a)
	if what := n.must("Probe", a); what != "" {
		t.Errorf("probe of a new device: got %q, want nothing", what)
	}
	if err := n.call("Mount", a, new(string)); err == nil {
		t.Error("a device without a file system was mounted")
	}
	bad := a
	bad.Mount.Options = "nobarrier"
	if err := n.call("Mount", bad, new(string)); err == nil || !strings.Contains(err.Error(), "nobarrier") {
		t.Errorf("with a bad option: got %v, want it named", err)
	}
	n.must("Format", a)
	if err := n.call("Format", a, new(string)); err == nil || !strings.Contains(err.Error(), "not blank") {
		t.Errorf("mkfs on a file system: got %v, want it refused", err)
	}
	if what := n.must("Probe", a); !strings.Contains(what, "ext4") {
		t.Errorf("probe: got %q, want ext4 in it", what)
	}
	target := filepath.Dir(MountPath(n.dir, "data"))
	if err := n.inside("touch", filepath.Join(target, "x")).Run(); err == nil {
		t.Error("the bare mountpoint was written to")
	}
	n.must("Mount", a)
	n.must("Abort", a)
	if _, err := os.Stat(filepath.Join(target, "data")); err == nil {
		t.Error("after the abort the mountpoint still has a data directory")
	}
	if err := mount.Unmount(context.Background(), target, false); err != nil {
		t.Error(err)
	}
}
