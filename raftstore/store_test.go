package raftstore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

// patience bounds every wait of a test; nothing is asserted about time.
const patience = 60 * time.Second

func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// fast are timings for tests that name the leader: a lease long enough that a
// loaded machine does not take it away, in a log that soon needs its snapshot.
var fast = Timings{Heartbeat: time.Second, Election: time.Second, Lease: time.Second,
	Connect: 5 * time.Second, SnapshotInterval: time.Hour, SnapshotEntries: 1 << 20, TrailingEntries: 8}

func logger() *slog.Logger {
	if os.Getenv("HOLDFAST_TEST_LOG") == "" {
		return nil
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// member is a Store with what its node says of itself.
type member struct {
	*Store
	dir      string
	name     string
	instance holdfast.InstanceID
}

func listen(t testing.TB, address string) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func openStore(t testing.TB, dir, address string) (*Store, error) {
	t.Helper()
	l := listen(t, address)
	return Open(Options{Dir: dir, Listener: l, Address: l.Addr().String(), Timings: fast, Logger: logger()})
}

func start(t testing.TB, name string) *member {
	t.Helper()
	return restart(t, &member{dir: t.TempDir(), name: name}, "127.0.0.1:0")
}

// restart opens a member's directory, as a new process of its node would.
func restart(t testing.TB, m *member, address string) *member {
	t.Helper()
	s, err := openStore(t, m.dir, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return &member{Store: s, dir: m.dir, name: m.name, instance: holdfast.NewID[holdfast.InstanceID]()}
}

func (m *member) node() state.Node {
	return state.Node{ID: m.Node(), Name: m.name, Instance: m.instance, Version: "test", MaxLevel: holdfast.Level1,
		Addresses: state.Addresses{API: "127.0.0.1:1", Data: "127.0.0.1:2", Raft: m.Address()}}
}

// bootstrap makes a cluster of one.
func bootstrap(t testing.TB) *member {
	t.Helper()
	m := start(t, "n1")
	if err := m.Bootstrap(within(t), holdfast.NewID[holdfast.ClusterID]()); err != nil {
		t.Fatal(err)
	}
	propose(t, m.Store, &state.NodeJoin{Node: m.node()})
	return m
}

func propose(t testing.TB, s *Store, cmd state.Command) state.Result {
	t.Helper()
	res, err := s.Propose(within(t), cmd)
	if err != nil {
		t.Fatalf("%s: %v", state.Name(cmd), err)
	}
	return res
}

// eventually waits for a condition on a member's View.
func eventually(t testing.TB, s *Store, what string, done func(*state.View) bool) {
	t.Helper()
	if err := s.await(within(t), what, done); err != nil {
		t.Fatal(err)
	}
}

func TestBootstrapAndRestart(t *testing.T) {
	m := bootstrap(t)
	if !m.HasCluster() || !m.IsLeader() {
		t.Fatalf("after bootstrap: cluster %v, leader %v", m.HasCluster(), m.IsLeader())
	}
	cluster, node := m.Cluster(), m.Node()
	if got := m.View().Cluster(); got.ID != cluster || got.Level != holdfast.Level1 {
		t.Fatalf("cluster: got %+v", got)
	}
	if err := m.Bootstrap(within(t), holdfast.NewID[holdfast.ClusterID]()); !errors.Is(err, holdfast.ErrRefused) {
		t.Fatalf("bootstrap of another cluster: got %v, want %v", err, holdfast.ErrRefused)
	}
	if err := m.Bootstrap(within(t), cluster); err != nil {
		t.Fatalf("bootstrap of the same cluster again: %v", err)
	}
	address := m.Address()
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	again := restart(t, m, address)
	if again.Node() != node || again.Cluster() != cluster {
		t.Fatalf("identity after restart: got %v %v, want %v %v", again.Node(), again.Cluster(), node, cluster)
	}
	eventually(t, again.Store, "the node's record", func(v *state.View) bool { _, ok := v.NodeByName("n1"); return ok })
}

func TestRefusalsAreAnswersAndLoseNothing(t *testing.T) {
	m := bootstrap(t)
	before := m.View()
	_, err := m.Propose(within(t), &state.DeleteVolume{Volume: holdfast.NewID[holdfast.VolumeID]()})
	if !errors.Is(err, holdfast.ErrNotFound) {
		t.Fatalf("got %v, want %v", err, holdfast.ErrNotFound)
	}
	if m.View().Index() <= before.Index() {
		t.Fatalf("a refused command has index %d, not above %d", m.View().Index(), before.Index())
	}
	big := &state.DiskFailed{Reason: string(make([]byte, 60_000))}
	if _, err := m.Propose(within(t), big); !errors.Is(err, holdfast.ErrNotFound) {
		t.Fatalf("a large command: got %v, want %v", err, holdfast.ErrNotFound)
	}
	huge := &state.NodeJoin{Node: m.node()}
	for i := range 20 {
		huge.Node.Labels = append(huge.Node.Labels, state.Label{Key: fmt.Sprint(i), Value: string(make([]byte, 60_000))})
	}
	if _, err := m.Propose(within(t), huge); !errors.Is(err, holdfast.ErrInvalid) {
		t.Fatalf("a command over MaxCommand: got %v, want %v", err, holdfast.ErrInvalid)
	}
}

func TestDirectoryInUse(t *testing.T) {
	m := bootstrap(t)
	if _, err := openStore(t, m.dir, "127.0.0.1:0"); !errors.Is(err, holdfast.ErrRefused) {
		t.Fatalf("second open: got %v, want %v", err, holdfast.ErrRefused)
	}
}

// TestBootstrapGoesOnAfterACrash crashes between raft's bootstrap and the
// identity: the directory may be bootstrapped again and may not join another.
func TestBootstrapGoesOnAfterACrash(t *testing.T) {
	m := bootstrap(t)
	id := m.identity
	m.Close()
	id.Cluster = holdfast.ClusterID{}
	if err := saveIdentity(m.dir, id); err != nil {
		t.Fatal(err)
	}
	again := restart(t, m, m.Address())
	if err := again.Adopt(holdfast.NewID[holdfast.ClusterID]()); !errors.Is(err, holdfast.ErrRefused) {
		t.Fatalf("join over an unfinished bootstrap: got %v, want %v", err, holdfast.ErrRefused)
	}
	if err := again.Bootstrap(within(t), m.Cluster()); err != nil {
		t.Fatal(err)
	}
	if !again.HasCluster() || again.View().Cluster().ID != m.Cluster() {
		t.Fatalf("after the second bootstrap: got %+v", again.View().Cluster())
	}
}
