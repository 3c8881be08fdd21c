package keeper

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/rpc"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/mount"
)

// The tests run this test binary in three roles: the test; the keeper, in mount
// and process namespaces of its own, as in a container; the daemon, which the
// keeper starts. The test tells the daemon what to do over a socket.

const roleVariable = "HOLDFAST_KEEPER_TEST_ROLE"

func TestMain(m *testing.M) {
	role := os.Getenv(roleVariable)
	if Under() != "" {
		role = os.Args[1]
	}
	switch role {
	case "keeper":
		os.Exit(runKeeper())
	case "daemon":
		if err := runDaemon(os.Getenv("HOLDFAST_KEEPER_TEST_DIR")); err != nil {
			fmt.Fprintln(os.Stderr, "daemon:", err)
			os.Exit(1)
		}
		os.Exit(0)
	case "fail":
		os.Exit(7)
	}
	os.Exit(m.Run())
}

func runKeeper() int {
	role := "daemon"
	if r := os.Getenv("HOLDFAST_KEEPER_TEST_DAEMON"); r != "" {
		role = r
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	code, err := Run(context.Background(), Options{DataDir: os.Getenv("HOLDFAST_KEEPER_TEST_DIR"), Command: []string{"/proc/self/exe", role},
		Logger: log, MountGrace: 5 * time.Second})
	if err != nil {
		fmt.Fprintln(os.Stderr, "keeper:", err)
	}
	return code
}

// daemonServer is what the test asks of the daemon, by net/rpc.
type daemonServer struct {
	dir    string
	client *Client

	mu       sync.Mutex
	attached map[string]*Attached
}

// Args of every call.
type Args struct {
	Spec   DeviceSpec
	FS     mount.FileSystem
	Format FormatOptions
	Mount  MountOptions
	Force  bool
}

func runDaemon(dir string) error {
	ctx := context.Background()
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})).With("from", "daemon")
	client, err := Dial(ctx, dir, DialOptions{Instance: holdfast.NewID[holdfast.InstanceID](), Logger: log})
	if err != nil {
		return err
	}
	s := &daemonServer{dir: dir, client: client, attached: make(map[string]*Attached)}
	devices, err := client.Devices(ctx)
	if err != nil {
		return err
	}
	for _, d := range devices {
		if _, err := os.Stat(filepath.Join(dir, "discontinuous")); err == nil {
			if err := client.Abort(ctx, d.Volume); err != nil {
				return err
			}
			continue
		}
		if err := s.Attach(Args{Spec: d.DeviceSpec}, new(string)); err != nil {
			return err
		}
	}
	path := filepath.Join(dir, "test.sock")
	_ = os.Remove(path)
	l, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	server := rpc.NewServer()
	if err := server.RegisterName("Daemon", s); err != nil {
		return err
	}
	terminated := make(chan os.Signal, 1)
	notifyTerm(terminated)
	go server.Accept(l)
	select {
	case <-terminated:
	case <-client.Done():
		return errors.New("the keeper is gone")
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	for _, a := range s.attached {
		a.Close(ctx)
	}
	client.Close()
	return nil
}

func (s *daemonServer) Attach(a Args, path *string) error {
	dev, err := openFileDevice(s.dir, a.Spec.Name, a.Spec.Size)
	if err != nil {
		return err
	}
	at, err := Attach(context.Background(), s.client, dev, a.Spec, AttachOptions{Logger: slog.Default()})
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.attached[a.Spec.Name] = at
	*path = at.Path()
	return nil
}

// OpenOnly opens a device and asks for its loop device, but serves nothing.
func (s *daemonServer) OpenOnly(a Args, _ *string) error {
	if _, err := s.client.OpenDevice(context.Background(), a.Spec); err != nil {
		return err
	}
	go func() { _, _ = s.client.ConfigureLoop(context.Background(), a.Spec.Volume) }() // ends with the daemon
	return nil
}

func (s *daemonServer) StopServing(a Args, _ *string) error {
	s.mu.Lock()
	at := s.attached[a.Spec.Name]
	s.mu.Unlock()
	at.Close(context.Background())
	return nil
}

func (s *daemonServer) Format(a Args, _ *string) error {
	return s.client.Format(context.Background(), a.Spec.Volume, a.Format)
}
func (s *daemonServer) Fsck(a Args, _ *string) error {
	return s.client.Fsck(context.Background(), a.Spec.Volume, a.FS)
}
func (s *daemonServer) Probe(a Args, what *string) (err error) {
	*what, err = s.client.Probe(context.Background(), a.Spec.Volume)
	return err
}
func (s *daemonServer) Mount(a Args, path *string) (err error) {
	*path, err = s.client.Mount(context.Background(), a.Spec.Volume, a.Mount)
	return err
}
func (s *daemonServer) Unmount(a Args, _ *string) error {
	return s.client.Unmount(context.Background(), a.Spec.Volume, UnmountOptions{Force: a.Force})
}
func (s *daemonServer) CloseDevice(a Args, _ *string) error {
	return s.client.CloseDevice(context.Background(), a.Spec.Volume)
}
func (s *daemonServer) Abort(a Args, _ *string) error {
	return s.client.Abort(context.Background(), a.Spec.Volume)
}
func (s *daemonServer) RemovePath(a Args, _ *string) error {
	return s.client.RemovePath(context.Background(), a.Spec.Name)
}
func (s *daemonServer) Devices(_ Args, devices *[]Device) (err error) {
	*devices, err = s.client.Devices(context.Background())
	return err
}
func (s *daemonServer) PID(_ Args, pid *string) error {
	link, err := os.Readlink("/proc/self") // as the host's /proc counts
	*pid = link
	return err
}

// Orphan leaves a process to the keeper.
func (s *daemonServer) Orphan(Args, *string) error {
	return exec.Command("sh", "-c", "sleep 0.01 &").Run()
}
func (s *daemonServer) Mounts(_ Args, table *string) error {
	b, err := os.ReadFile("/proc/self/mountinfo")
	*table = string(b)
	return err
}

// node is a keeper and its daemon under test.
type node struct {
	t    *testing.T
	dir  string
	cmd  *exec.Cmd
	done chan struct{}
	err  error
}

// needRoot skips a test that needs root and the named programs, unless CI says
// that nothing may be skipped.
func needRoot(t testing.TB, programs ...string) {
	t.Helper()
	if os.Getenv("HOLDFAST_UNIT") == "1" {
		t.Skip("HOLDFAST_UNIT=1: tests that need root are left out")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	lack := ""
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			lack = p
		}
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		lack = "/dev/fuse"
	}
	if lack == "" {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatalf("needs %s", lack)
	}
	t.Skipf("needs %s", lack)
}

// startNode starts a keeper in a directory, "" for a new one, with namespaces
// of its own.
func startNode(t *testing.T, dir string, environment ...string) *node {
	return startNodeIn(t, dir, ownNamespaces, environment...)
}

var (
	ownNamespaces = syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID, Unshareflags: unix.CLONE_NEWNS}
	hostNamespace = syscall.SysProcAttr{}
)

func startNodeIn(t *testing.T, dir string, attr syscall.SysProcAttr, environment ...string) *node {
	t.Helper()
	if dir == "" {
		dir = t.TempDir()
	}
	log, err := os.OpenFile(filepath.Join(dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	n := &node{t: t, dir: dir, done: make(chan struct{})}
	n.cmd = exec.Command("/proc/self/exe")
	n.cmd.Env = append(os.Environ(), roleVariable+"=keeper", "HOLDFAST_KEEPER_TEST_DIR="+dir)
	n.cmd.Env = append(n.cmd.Env, environment...)
	n.cmd.Stdout, n.cmd.Stderr = log, log
	n.cmd.SysProcAttr = &attr
	if err := n.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { n.err = n.cmd.Wait(); close(n.done) }()
	t.Cleanup(func() {
		n.kill()
		if t.Failed() {
			b, _ := os.ReadFile(filepath.Join(dir, "log"))
			t.Logf("log of the node:\n%s", b)
		}
		clearMounts(dir)
	})
	return n
}

// clearMounts makes the directory of mounts removable.
func clearMounts(dir string) {
	paths, _ := filepath.Glob(filepath.Join(mountsDir(dir), "*"))
	for _, p := range paths {
		_ = mount.Unmount(context.Background(), p, true)
		_ = mount.RemoveTarget(p)
	}
}

func (n *node) kill() {
	_ = n.cmd.Process.Kill()
	n.wait(20 * time.Second)
}

// wait waits for the keeper's end.
func (n *node) wait(most time.Duration) {
	n.t.Helper()
	select {
	case <-n.done:
	case <-time.After(most):
		n.t.Errorf("the keeper has not ended after %v", most)
	}
}

// call asks the daemon, waiting for it to come up.
func (n *node) call(method string, a Args, reply any) error {
	n.t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		c, err := rpc.Dial("unix", filepath.Join(n.dir, "test.sock"))
		if err == nil {
			defer c.Close()
			return c.Call("Daemon."+method, a, reply)
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the daemon did not come up: %w", err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func (n *node) must(method string, a Args) string {
	n.t.Helper()
	var text string
	if err := n.call(method, a, &text); err != nil {
		n.t.Fatalf("%s: %v", method, err)
	}
	return text
}

// daemonPID finds the daemon by the file that it listens on.
func (n *node) daemonPID() int {
	n.t.Helper()
	pid, err := strconv.Atoi(n.must("PID", Args{}))
	if err != nil {
		n.t.Fatal(err)
	}
	return pid
}

// nextDaemon finds the daemon that follows one that is dying, which may still
// answer, or die in the middle of its answer.
func (n *node) nextDaemon(dying int) (pid int) {
	n.t.Helper()
	await(n.t, "another daemon", func() bool {
		var text string
		if err := n.call("PID", Args{}, &text); err != nil {
			return false
		}
		pid, _ = strconv.Atoi(text)
		return pid != 0 && pid != dying
	})
	return pid
}

// await looks until something is so.
func await(t *testing.T, what string, so func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !so(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// killDaemon kills the daemon and waits until it is gone.
func (n *node) killDaemon() {
	n.t.Helper()
	pid := n.daemonPID()
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		n.t.Fatal(err)
	}
	defer unix.Close(pidfd)
	if err := unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0); err != nil {
		n.t.Fatal(err)
	}
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	for { // the scheduler's own signals end a poll
		m, err := unix.Poll(fds, 20000)
		if m == 1 {
			return
		}
		if !errors.Is(err, unix.EINTR) {
			n.t.Fatalf("the daemon does not die: %v", err)
		}
	}
}

// mounterPID is the process that is in the namespace of the mounts.
func (n *node) mounterPID() int {
	n.t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", n.cmd.Process.Pid))
	if err != nil {
		n.t.Fatal(err)
	}
	for _, task := range tasks {
		children, err := os.ReadFile(task)
		if err != nil {
			continue
		}
		for _, child := range strings.Fields(string(children)) {
			env, err := os.ReadFile("/proc/" + child + "/environ")
			if err == nil && strings.Contains(string(env), stageVariable+"="+stageMounter) {
				pid, err := strconv.Atoi(child)
				if err != nil {
					n.t.Fatal(err)
				}
				return pid
			}
		}
	}
	n.t.Fatal("there is no mounter")
	return 0
}

// inside prepares a program that runs in the mounts' namespace, as a
// container's would.
func (n *node) inside(name string, args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"-t", strconv.Itoa(n.mounterPID()), "-m", name}, args...)...)
}

func (n *node) runInside(name string, args ...string) string {
	n.t.Helper()
	out, err := n.inside(name, args...).CombinedOutput()
	if err != nil {
		n.t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
	return string(out)
}

func (n *node) count(volume string, at int) uint64 {
	n.t.Helper()
	counts, err := mapCounts(n.dir, volume)
	if err != nil {
		n.t.Fatal(err)
	}
	defer unix.Munmap(counts)
	return binary.NativeEndian.Uint64(counts[at:])
}

func (n *node) set(volume string, at int, v uint64) {
	n.t.Helper()
	counts, err := mapCounts(n.dir, volume)
	if err != nil {
		n.t.Fatal(err)
	}
	defer unix.Munmap(counts)
	binary.NativeEndian.PutUint64(counts[at:], v)
}

// log is what the keeper and the daemon logged.
func (n *node) log() string {
	b, err := os.ReadFile(filepath.Join(n.dir, "log"))
	if err != nil {
		n.t.Fatal(err)
	}
	return string(b)
}

// volume is the arguments for a volume with a file system.
func volume(name string, fs mount.FileSystem, size int64) Args {
	return Args{
		Spec: DeviceSpec{Volume: holdfast.NewID[holdfast.VolumeID](), Name: name, Size: size, Session: holdfast.NewID[holdfast.SessionID](), Epoch: 1},
		FS:   fs, Format: FormatOptions{FS: fs}, Mount: MountOptions{FS: fs},
	}
}

// up makes a volume up to its mount and returns the directory for its user.
func (n *node) up(a Args) string {
	n.t.Helper()
	n.must("Attach", a)
	n.must("Format", a)
	n.must("Fsck", a)
	return n.must("Mount", a)
}

// gone checks that nothing is left of a device: no loop device, no connection.
func gone(t *testing.T, d Device) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		_, loopErr := os.Stat("/sys/block/" + strings.TrimPrefix(d.Loop, "/dev/") + "/loop/backing_file")
		conn := connectionExists(t, d.Connection)
		if loopErr != nil && !conn {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("left over: loop device %s configured: %v; connection %d there: %v", d.Loop, loopErr == nil, d.Connection, conn)
		}
		time.Sleep(5 * time.Millisecond)
	}
}
