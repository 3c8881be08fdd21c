package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// program is bin/holdfast built once for the whole run.
var program string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "holdfast-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	program = filepath.Join(dir, "holdfast")
	build := exec.Command("go", "build", "-trimpath", "-o", program, "github.com/holdfast-storage/holdfast/cmd/holdfast")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build holdfast: %v\n%s", err, out)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// need skips, or in CI fails, when a program is missing.
func need(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatalf("%s is not installed", p)
			}
			t.Skipf("%s is not installed", p)
		}
	}
}

// whole skips tests of several processes in the unprivileged unit run.
func whole(t *testing.T) {
	t.Helper()
	if os.Getenv("HOLDFAST_UNIT") != "" {
		t.Skip("starts clusters of processes: part of make test")
	}
}

// node is one daemon.
type node struct {
	t       *testing.T
	name    string
	dir     string
	address string
	flags   []string
	keeper  bool // runs under a keeper, and makes kernel devices
	cmd     *exec.Cmd
	log     *os.File
	exited  chan error
}

// cluster is some nodes on loopback.
type cluster struct {
	t     *testing.T
	nodes []*node
}

// given are the ports that freePorts gave away and that are not in use yet, maybe.
var given = struct {
	sync.Mutex
	ports map[int]bool
}{ports: map[int]bool{}}

// freePorts returns the first of three free ports in a row, none of which it
// returned before. They lie below those that the kernel gives to connections: a node
// that starts again must not find its port taken by another test's client.
func freePorts(t *testing.T) int {
	t.Helper()
	given.Lock()
	defer given.Unlock()
	for range 100 {
		port, ok := 10000+rand.IntN(22000), true
		for i := 0; i < 3 && ok; i++ {
			if ok = !given.ports[port+i]; !ok {
				break
			}
			probe, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port+i))
			if ok = err == nil; ok {
				probe.Close()
			}
		}
		if ok {
			for i := range 3 {
				given.ports[port+i] = true
			}
			return port
		}
	}
	t.Fatal("no three free ports in a row")
	return 0
}

// newNode prepares a node without starting it. The directory is short: unix
// socket paths are.
func newNode(t *testing.T, name string, flags ...string) *node {
	t.Helper()
	dir, err := os.MkdirTemp("", "hf")
	if err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, name: name, dir: dir, address: fmt.Sprintf("127.0.0.1:%d", freePorts(t))}
	n.flags = append([]string{"serve", "--name", name, "--data-dir", filepath.Join(dir, "d"), "--address", n.address,
		"--run-dir", filepath.Join(dir, "r"), "--plugin-socket", "", "--ballast", "16M", "--docker-socket", ""}, flags...)
	t.Cleanup(func() {
		n.kill()
		if t.Failed() {
			if raw, err := os.ReadFile(filepath.Join(dir, "log")); err == nil {
				lines := strings.Split(string(raw), "\n")
				t.Logf("log of %s, last lines:\n%s", name, strings.Join(lines[max(0, len(lines)-60):], "\n"))
			}
		}
		_ = exec.Command("chattr", "-R", "-f", "-i", dir).Run() // a mountpoint is immutable
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("%s left something behind: %v", name, err)
		}
	})
	return n
}

// start runs the daemon.
func (n *node) start() {
	n.t.Helper()
	log, err := os.OpenFile(filepath.Join(n.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		n.t.Fatal(err)
	}
	n.log = log
	n.cmd = exec.Command(program, n.flags...)
	n.cmd.Stderr, n.cmd.Stdout = log, log
	n.cmd.Env = append(os.Environ(), "HOLDFAST_LOG=info")
	if !n.keeper {
		n.cmd.Env = append(n.cmd.Env, "HOLDFAST_KEEPER=off")
	}
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := n.cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	exited := make(chan error, 1)
	go func(cmd *exec.Cmd) { exited <- cmd.Wait() }(n.cmd)
	n.exited = exited
}

// kill is kill -9, and waits for the process to be gone. A keeper is told to end
// instead, so that no mount of it is left on this machine.
func (n *node) kill() {
	if n.cmd == nil {
		return
	}
	if n.keeper {
		_ = n.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-n.exited:
			n.cmd = nil
			n.log.Close()
			return
		case <-time.After(40 * time.Second): // 25 s of unmounts, 8 s of the daemon
		}
	}
	_ = n.cmd.Process.Kill()
	<-n.exited
	n.cmd = nil
	n.log.Close()
}

// terminate is SIGTERM; the daemon's contract is to be gone within 8 seconds.
func (n *node) terminate() {
	n.t.Helper()
	_ = n.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-n.exited:
	case <-time.After(8 * time.Second):
		n.t.Fatalf("%s did not exit within 8 s of SIGTERM", n.name)
	}
	n.cmd = nil
	n.log.Close()
}

// result is what one CLI call did.
type result struct {
	code           int
	stdout, stderr string
}

// cli runs a verb against this node.
func (n *node) cli(args ...string) result {
	n.t.Helper()
	return runCLI(n.t, "unix://"+filepath.Join(n.dir, "d", "control.sock"), args...)
}

func runCLI(t *testing.T, address string, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = append(os.Environ(), "HOLDFAST_ADDRESS="+address)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("holdfast %v: %v", args, err)
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), errOut.String()}
}

// must runs a verb that has to succeed and returns its output.
func (n *node) must(args ...string) string {
	n.t.Helper()
	r := n.cli(args...)
	if r.code != 0 {
		n.t.Fatalf("%s: holdfast %s: exit %d\n%s%s", n.name, strings.Join(args, " "), r.code, r.stdout, r.stderr)
	}
	return r.stdout
}

// ready waits until the node's cluster could create a volume.
func (n *node) ready() {
	n.t.Helper()
	n.must("status", "--wait", "60s")
}

// volume is what the tests read of volume inspect --json.
type volume struct {
	Name         string
	State        string
	Node         string
	Epoch        uint64
	Session      string
	Size, Used   int64
	ReplicaCount int `json:"replica_count"`
	URI          string
	Replicas     []struct {
		Node, State   string
		Tail, Durable uint64
		BytesToSync   int64 `json:"bytes_to_sync"`
	}
	Repair struct {
		Node     string
		WaitsFor string `json:"waits_for"`
		Tries    int
		Why      string
	}
}

func (n *node) inspect(name string) volume {
	n.t.Helper()
	var v volume
	n.decode(&v, "volume", "inspect", name)
	return v
}

// decode runs a verb that has to succeed and reads its JSON.
func (n *node) decode(to any, args ...string) {
	n.t.Helper()
	out := n.must(append(args, "--json")...)
	if err := json.Unmarshal([]byte(out), to); err != nil {
		n.t.Fatalf("holdfast %v --json: %v\n%s", args, err, out)
	}
}

// whole reports whether every replica is in sync and all are there.
func (v volume) whole() bool {
	for _, r := range v.Replicas {
		if r.State != "in-sync" {
			return false
		}
	}
	return len(v.Replicas) == v.ReplicaCount
}

// attach attaches over NBD and returns the URI.
func (n *node) attach(name string, more ...string) string {
	n.t.Helper()
	out := n.must(append([]string{"volume", "attach", name, "--nbd"}, more...)...)
	for line := range strings.Lines(out) {
		if uri, ok := strings.CutPrefix(line, "uri: "); ok && strings.TrimSpace(uri) != "" {
			return strings.TrimSpace(uri)
		}
	}
	n.t.Fatalf("attach printed no uri:\n%s", out)
	return ""
}

// eventually polls cond, which has an end outside of the test's control.
func eventually(t *testing.T, limit time.Duration, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for !cond() {
		if time.Now().After(deadline) {
			t.Fatalf("after %v still not: %s", limit, what)
		}
		time.Sleep(100 * time.Millisecond) // between two looks at another process
	}
}

// start makes a cluster of n nodes with small disks and waits until all are in it.
func start(t *testing.T, n int) *cluster {
	t.Helper()
	return startWith(t, n)
}

// startWith is start with more flags for every node.
func startWith(t *testing.T, n int, more ...string) *cluster {
	t.Helper()
	return startEach(t, n, func(*node) []string { return more })
}

// startEach is start with flags of its own for each node.
func startEach(t *testing.T, n int, more func(*node) []string) *cluster {
	t.Helper()
	c := &cluster{t: t}
	for i := range n {
		name := fmt.Sprintf("n%d", i+1)
		nd := newNode(t, name)
		flags := append([]string{"--disk", ""}, more(nd)...)
		flags[1] = filepath.Join(nd.dir, "disk.img") + ",size=4G,wal=256M"
		if i == 0 {
			flags = append(flags, "--bootstrap")
		} else {
			flags = append(flags, "--join", c.nodes[0].address)
		}
		nd.flags = append(nd.flags, flags...)
		c.nodes = append(c.nodes, nd)
		nd.start()
		if i == 0 {
			nd.ready()
		}
	}
	for _, nd := range c.nodes {
		nd.ready()
	}
	voters := min(3, n-1+n%2) // an even number of nodes has one voter less
	eventually(t, 60*time.Second, fmt.Sprintf("%d nodes up with their disks, %d voters", n, voters), func() bool {
		var status struct{ Voters int }
		var ls struct {
			Nodes []struct {
				State string
				Disks []any
			}
		}
		c.nodes[0].decode(&ls, "node", "ls")
		c.nodes[0].decode(&status, "status")
		up := 0
		for _, x := range ls.Nodes {
			if x.State == "up" && len(x.Disks) > 0 {
				up++
			}
		}
		return up == n && status.Voters == voters
	})
	return c
}

// fio runs fio with its nbd engine on a URI; it must succeed.
func fio(t *testing.T, uri string, args ...string) string {
	t.Helper()
	cmd := fioCommand(t, uri, args...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("fio %v: %v\n%s", args, err, out)
	}
	return string(out)
}

func fioCommand(t *testing.T, uri string, args ...string) *exec.Cmd {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, "fio", append([]string{"--name=t", "--ioengine=nbd", "--uri=" + uri, "--thread"}, args...)...)
	cmd.Dir = t.TempDir() // fio leaves its verify state where it runs
	return cmd
}

func mkfs(t *testing.T, path string) {
	t.Helper()
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", path).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v\n%s", err, out)
	}
}
