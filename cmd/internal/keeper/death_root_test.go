package keeper

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/mount"
)

// TestRootKeeperKilled kills keeper and daemon at once, as the death of their
// container does, under load: the application gets errors and ends, and nothing
// is left of the device.
func TestRootKeeperKilled(t *testing.T) {
	needRoot(t, "mkfs.ext4", "mkfs.xfs", "nsenter", "fio")
	for i := range rounds(t, 2) {
		fs := []mount.FileSystem{mount.Ext4, mount.XFS}[i%2]
		n := startNode(t, "")
		a := volume("data", fs, 512<<20)
		path := n.up(a)
		cmd, out := n.fio(path, 1, 1000)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		for n.count("data", countFlushes) < 20 { // it is at work
			select {
			case err := <-ended:
				t.Fatalf("fio ended early: %v\n%s", err, out)
			case <-time.After(time.Millisecond):
			}
		}
		d := n.onlyDevice()
		n.kill() // returns when every process of the keeper's process namespace is gone
		select {
		case err := <-ended:
			if err == nil {
				t.Error("fio ended without an error")
			}
		case <-time.After(20 * time.Second):
			t.Fatal("the application does not end")
		}
		gone(t, d)
	}
}

// TestRootKeeperKilledIdle kills keeper and daemon when nothing else is in
// their namespaces, with data not yet written out: the last process to leave the
// mount namespace then writes it while it dies, and must not wait for itself.
func TestRootKeeperKilledIdle(t *testing.T) {
	needRoot(t, "mkfs.ext4", "mkfs.xfs", "nsenter")
	for i := range rounds(t, 4) {
		n := startNode(t, "")
		a := volume("data", []mount.FileSystem{mount.Ext4, mount.XFS}[i%2], 512<<20)
		path := n.up(a)
		n.runInside("cp", "/proc/self/exe", filepath.Join(path, "file"))
		d := n.onlyDevice()
		n.kill()
		gone(t, d)
	}
}

// TestRootMounterKilled kills the mounter alone: nothing can be mounted any
// more, so the keeper ends, and leaves nothing.
func TestRootMounterKilled(t *testing.T) {
	needRoot(t, "mkfs.ext4", "nsenter")
	n := startNode(t, "")
	a := volume("data", mount.Ext4, 64<<20)
	path := n.up(a)
	n.runInside("cp", "/proc/self/exe", filepath.Join(path, "file"))
	d := n.onlyDevice()
	if err := unix.Kill(n.mounterPID(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	n.wait(20 * time.Second)
	if got := n.cmd.ProcessState.ExitCode(); got != 1 {
		t.Errorf("exit code: got %d, want 1", got)
	}
	gone(t, d)
}

// TestRootKeeperComesBack kills a keeper whose mounts outlive it, as on a host
// whose namespace has a copy of them: the next one takes the dead mounts away.
func TestRootKeeperComesBack(t *testing.T) {
	needRoot(t, "mkfs.ext4", "nsenter")
	dir := t.TempDir()
	n := startNodeIn(t, dir, hostNamespace)
	a := volume("data", mount.Ext4, 64<<20)
	path := n.up(a)
	if err := os.WriteFile(filepath.Join(path, "file"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	d := n.onlyDevice()
	dying := n.daemonPID()
	n.kill()
	if _, mounted, err := mount.At(filepath.Dir(path)); !mounted || err != nil {
		t.Fatalf("the dead mount: got %v, %v, want it still there", mounted, err)
	}
	n = startNodeIn(t, dir, hostNamespace)
	if n.nextDaemon(dying) == dying {
		t.Fatal("the daemon of the dead keeper still answers")
	}
	gone(t, d)
	again := n.up(Args{Spec: a.Spec, FS: a.FS, Format: FormatOptions{FS: a.FS, Again: true}, Mount: a.Mount})
	if again != path {
		t.Errorf("mount path: got %s, want %s", again, path)
	}
	n.must("Unmount", a)
	n.must("CloseDevice", a)
}

// TestRootDaemonSharesTheLock shows that the daemon holds the keeper's lock, and
// that what it executes does not.
func TestRootDaemonSharesTheLock(t *testing.T) {
	needRoot(t)
	n := startNode(t, "")
	root := fmt.Sprintf("/proc/%d", n.daemonPID())
	fds, err := os.ReadDir(root + "/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if to, err := os.Readlink(filepath.Join(root, "fd", fd.Name())); err != nil || filepath.Base(to) != "keeper.lock" {
			continue
		}
		raw, err := os.ReadFile(filepath.Join(root, "fdinfo", fd.Name()))
		if err != nil {
			t.Fatal(err)
		}
		_, after, _ := strings.Cut(string(raw), "flags:")
		flags, err := strconv.ParseInt(strings.Fields(after)[0], 8, 64)
		if err != nil {
			t.Fatal(err)
		}
		if flags&unix.O_CLOEXEC == 0 {
			t.Errorf("the lock's descriptor %s is inherited by what the daemon executes", fd.Name())
		}
		return
	}
	t.Error("the daemon does not hold keeper.lock")
}

// TestRootKeeperWaitsForTheDying starts a keeper while the daemon of one that
// was killed still holds the lock: no second daemon runs beside it.
func TestRootKeeperWaitsForTheDying(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	dying := holdLock(t, dir)
	n := startNode(t, dir)
	await(t, "the keeper to want the lock", func() bool {
		fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", n.cmd.Process.Pid))
		for _, fd := range fds {
			if to, _ := os.Readlink(fd); filepath.Base(to) == "keeper.lock" {
				return true
			}
		}
		return false
	})
	if log := n.log(); strings.Contains(log, "daemon started") {
		t.Fatalf("a daemon was started beside the dying one:\n%s", log)
	}
	_ = dying.Close()
	n.daemonPID()
}

func holdLock(t *testing.T, dir string) *os.File {
	t.Helper()
	lock, err := os.OpenFile(filepath.Join(dir, "keeper.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Fatal(err)
	}
	return lock
}

// TestRootDiscontinuous restarts the daemon into a session that may not go on:
// the application gets an error, and the volume can be attached anew.
func TestRootDiscontinuous(t *testing.T) {
	needRoot(t, "mkfs.ext4", "nsenter")
	n := startNode(t, "")
	a := volume("data", mount.Ext4, 64<<20)
	path := n.up(a)
	n.runInside("sh", "-c", "echo x > "+path+"/file; sync "+path+"/file")
	writer := n.inside("sh", "-c", "cd "+path+" && exec dd if=/dev/zero of=file bs=4k oflag=direct conv=notrunc seek=0 count=100000000")
	if err := writer.Start(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(n.dir, "discontinuous"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	d := n.onlyDevice()
	n.killDaemon()
	if err := writer.Wait(); err == nil {
		t.Error("the writer ended without an error")
	}
	gone(t, d)
	b := a
	b.Spec.Session, b.Spec.Epoch = holdfast.NewID[holdfast.SessionID](), 2
	n.must("Attach", b)
	n.must("Fsck", b)
	if again := n.must("Mount", b); again != path {
		t.Errorf("mount path: got %s, want %s", again, path)
	}
	n.runInside("stat", filepath.Join(path, "file"))
	n.must("Unmount", b)
	n.must("CloseDevice", b)
}

// TestRootOtherSession shows that a device is never lent to another session.
func TestRootOtherSession(t *testing.T) {
	needRoot(t)
	n := startNode(t, "")
	a := volume("data", mount.Ext4, 64<<20)
	n.must("Attach", a)
	n.must("StopServing", a)
	b := a
	b.Spec.Session = holdfast.NewID[holdfast.SessionID]()
	err := n.call("Attach", b, new(string))
	if err == nil || !strings.Contains(err.Error(), "is of session") {
		t.Fatalf("attach with another session: got %v, want it refused", err)
	}
	n.must("Attach", a) // the same session goes on
	n.must("Abort", a)
	n.must("Abort", a)
	n.must("Attach", b)
	n.must("CloseDevice", b)
}

// TestRootDrain stops the keeper with SIGTERM while a volume is mounted: it
// waits for the unmount, which the daemon still serves, then ends both.
func TestRootDrain(t *testing.T) {
	needRoot(t, "mkfs.ext4")
	n := startNode(t, "")
	a := volume("data", mount.Ext4, 64<<20)
	n.up(a)
	d := n.onlyDevice()
	if err := n.cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	for !strings.Contains(n.log(), "keeper stops") {
		time.Sleep(time.Millisecond)
	}
	if err := n.call("Mount", a, new(string)); err == nil || !strings.Contains(err.Error(), "stopping") {
		t.Errorf("mount while stopping: got %v, want it refused", err)
	}
	n.must("Unmount", a)
	n.wait(20 * time.Second)
	if n.err != nil {
		t.Errorf("keeper: got %v, want exit 0", n.err)
	}
	if strings.Contains(n.log(), "still mounted") {
		t.Error("the keeper did not see the unmount")
	}
	gone(t, d)
}

// TestRootDrainLeft stops the keeper while a volume stays mounted: after the
// grace it is unmounted in good order, since the daemon still serves it.
func TestRootDrainLeft(t *testing.T) {
	needRoot(t, "mkfs.ext4", "e2fsck")
	n := startNode(t, "")
	a := volume("data", mount.Ext4, 64<<20)
	path := n.up(a)
	n.runInside("sh", "-c", "echo kept > "+path+"/file")
	d := n.onlyDevice()
	for range 2 { // the second ends the wait
		if err := n.cmd.Process.Signal(unix.SIGTERM); err != nil {
			t.Fatal(err)
		}
		for !strings.Contains(n.log(), "keeper stops") {
			time.Sleep(time.Millisecond)
		}
	}
	n.wait(20 * time.Second)
	if n.err != nil {
		t.Errorf("keeper: got %v, want exit 0", n.err)
	}
	gone(t, d)
	image := filepath.Join(n.dir, "data.img")
	tools := mount.Tools{}
	if err := tools.Check(t.Context(), image, mount.Ext4); err != nil {
		t.Error(err)
	}
	r, err := mount.Exec(t.Context(), "debugfs", "-R", "cat /data/file", image)
	if err != nil || strings.TrimSpace(r.Stdout) != "kept" {
		t.Errorf("the file: got %q (%v), want what was written", r.Stdout, err)
	}
}

// TestRootStopFrozen stops the keeper while the device answers nothing, as one
// without quorum does: it ends all the same, in bounded time, and leaves nothing.
func TestRootStopFrozen(t *testing.T) {
	needRoot(t, "mkfs.ext4", "nsenter")
	n := startNode(t, "")
	a := volume("data", mount.Ext4, 64<<20)
	path := n.up(a)
	d := n.onlyDevice()
	n.set("data", delayMicros, uint64(time.Hour.Microseconds()))
	user := n.inside("sh", "-c", "cp /proc/self/exe "+filepath.Join(path, "file")+" && sync "+path)
	if err := user.Start(); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second ends the wait
		if err := n.cmd.Process.Signal(unix.SIGTERM); err != nil {
			t.Fatal(err)
		}
		for !strings.Contains(n.log(), "keeper stops") {
			time.Sleep(time.Millisecond)
		}
	}
	n.wait(40 * time.Second) // 3 s for unmounts, 8 s for the daemon, 3 s for devices, and some
	_ = user.Wait()
	gone(t, d)
}

// TestRootDaemonNeverUp shows that a daemon which cannot start ends its keeper,
// with its code.
func TestRootDaemonNeverUp(t *testing.T) {
	needRoot(t)
	n := startNode(t, "", "HOLDFAST_KEEPER_TEST_DAEMON=fail")
	n.wait(20 * time.Second)
	if got := n.cmd.ProcessState.ExitCode(); got != 7 {
		t.Errorf("exit code: got %d, want 7", got)
	}
}

// TestRootSecondKeeper shows that a data directory has one keeper.
func TestRootSecondKeeper(t *testing.T) {
	needRoot(t)
	n := startNode(t, "")
	n.daemonPID()
	second := startNode(t, n.dir)
	second.wait(20 * time.Second)
	if got := second.cmd.ProcessState.ExitCode(); got != 1 || !strings.Contains(n.log(), "another keeper runs") {
		t.Errorf("second keeper: got exit %d, want 1 and a reason", got)
	}
	n.daemonPID() // the first still serves
}

// TestRootWithoutPrivilege runs a keeper as nobody: its daemon runs, there are
// no devices, and the reason is told. (The test needs root to become nobody.)
func TestRootWithoutPrivilege(t *testing.T) {
	needRoot(t)
	const nobody = 65534
	dir, err := os.MkdirTemp("/tmp", "keeper")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chown(dir, nobody, nobody); err != nil {
		t.Fatal(err)
	}
	n := startNodeIn(t, dir, syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}})
	err = n.call("Attach", volume("data", mount.Ext4, 1<<20), new(string))
	if err == nil || !strings.Contains(err.Error(), "CAP_SYS_ADMIN") {
		t.Errorf("attach: got %v, want what is missing", err)
	}
	if !strings.Contains(n.log(), "no private mount namespace") {
		t.Error("the keeper does not say what is missing")
	}
	if err := n.cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	n.wait(20 * time.Second)
	if n.err != nil {
		t.Errorf("keeper: got %v, want exit 0", n.err)
	}
}

// TestRootReap gives the keeper an orphan: it does not stay a zombie.
func TestRootReap(t *testing.T) {
	needRoot(t, "nsenter")
	n := startNode(t, "")
	n.daemonPID()
	n.must("Orphan", Args{})
	deadline := time.Now().Add(20 * time.Second)
	for !strings.Contains(n.log(), "orphan reaped") {
		if time.Now().After(deadline) {
			t.Fatal("the orphan was not reaped")
		}
		time.Sleep(time.Millisecond)
	}
}
