package peer

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/raftstore"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

// patience bounds every wait of a test; nothing is asserted about time.
const patience = 90 * time.Second

func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// fast are timings for many nodes in one process.
var fast = raftstore.Timings{Heartbeat: 200 * time.Millisecond, Election: 200 * time.Millisecond, Lease: 150 * time.Millisecond,
	Connect: time.Second, SnapshotInterval: time.Hour, SnapshotEntries: 1 << 20, TrailingEntries: 8}

func logger(name string) *slog.Logger {
	if os.Getenv("HOLDFAST_TEST_LOG") == "" {
		return nil
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})).With("n", name)
}

// host is one node: store, peer and the server between nodes, as a daemon has them.
type host struct {
	*Peer
	store    *raftstore.Store
	server   *grpc.Server
	dir      string
	name     string
	api      string
	raft     string
	stopping bool
}

// newHost starts a node that has no cluster yet.
func newHost(t testing.TB, name string) *host {
	t.Helper()
	h := &host{dir: t.TempDir(), name: name, api: "127.0.0.1:0", raft: "127.0.0.1:0"}
	h.start(t)
	return h
}

// start runs the node's process: a new instance over the same directory.
func (h *host) start(t testing.TB) {
	t.Helper()
	raftListener, err := net.Listen("tcp", h.raft)
	if err != nil {
		t.Fatal(err)
	}
	apiListener, err := net.Listen("tcp", h.api)
	if err != nil {
		t.Fatal(err)
	}
	h.raft, h.api = raftListener.Addr().String(), apiListener.Addr().String()
	h.store, err = raftstore.Open(raftstore.Options{Dir: h.dir, Listener: raftListener, Address: h.raft, Timings: fast, Logger: logger(h.name)})
	if err != nil {
		t.Fatal(err)
	}
	h.Peer, err = New(Options{Store: h.store, Logger: logger(h.name), Self: state.Node{
		ID: h.store.Node(), Name: h.name, Instance: holdfast.NewID[holdfast.InstanceID](), HasDisks: true, Version: "test", MaxLevel: holdfast.Level1,
		Addresses: state.Addresses{API: h.api, Data: "127.0.0.1:1", Raft: h.raft}}})
	if err != nil {
		t.Fatal(err)
	}
	h.server = grpc.NewServer()
	h.Register(h.server)
	server := h.server
	go server.Serve(apiListener)
	h.Start()
	h.stopping = false
	t.Cleanup(h.kill)
}

// kill ends the node's process.
func (h *host) kill() {
	if h.stopping {
		return
	}
	h.stopping = true
	h.server.Stop()
	h.Peer.Close()
	h.store.Close()
}

func (h *host) propose(t testing.TB, cmd state.Command) state.Result {
	t.Helper()
	res, err := h.Propose(within(t), cmd)
	if err != nil {
		t.Fatalf("%s through %s: %v", state.Name(cmd), h.name, err)
	}
	return res
}

// eventually waits for a condition on a node's View.
func (h *host) eventually(t testing.TB, what string, done func(*state.View) bool) {
	t.Helper()
	ctx := within(t)
	for {
		changed := h.Changed()
		if done(h.View()) {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			t.Fatalf("%s: waited in vain for %s; view at %d", h.name, what, h.View().Index())
		}
	}
}

func voters(v *state.View) int {
	n := 0
	for node := range v.Nodes() {
		if node.Kind == state.MemberVoter {
			n++
		}
	}
	return n
}

// cluster starts n nodes; from three on, three of them vote.
func cluster(t testing.TB, n int) []*host {
	t.Helper()
	first := newHost(t, "n1")
	if err := first.Bootstrap(within(t), holdfast.NewID[holdfast.ClusterID]()); err != nil {
		t.Fatal(err)
	}
	hosts := []*host{first}
	for i := 2; i <= n; i++ {
		h := newHost(t, fmt.Sprintf("n%d", i))
		if err := h.Join(within(t), []string{first.api}); err != nil {
			t.Fatal(err)
		}
		hosts = append(hosts, h)
	}
	want := 1
	if n >= 3 {
		want = 3
	}
	for _, h := range hosts {
		h.eventually(t, fmt.Sprintf("%d voters", want), func(v *state.View) bool { return voters(v) == want })
	}
	return hosts
}

// leader waits for one of the nodes to be ready to lead.
func leader(t testing.TB, hosts []*host) *host {
	t.Helper()
	ctx := within(t)
	for {
		for _, h := range hosts {
			if !h.stopping && h.store.IsLeader() {
				return h
			}
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			t.Fatal("no leader")
		}
	}
}

func others(hosts []*host, not *host) []*host {
	var out []*host
	for _, h := range hosts {
		if h != not {
			out = append(out, h)
		}
	}
	return out
}

// disk opens a disk of a node.
func (h *host) disk(t testing.TB) holdfast.DiskID {
	t.Helper()
	id := holdfast.NewID[holdfast.DiskID]()
	h.propose(t, &state.DiskOpen{Disk: id, Node: h.store.Node(), Instance: h.Self().Instance, OpenCount: 1, Size: 1 << 40, Free: 1 << 40})
	return id
}

// create makes a volume through a node.
func (h *host) create(t testing.TB, name string, replicas int) holdfast.VolumeID {
	t.Helper()
	const size, segment = 1 << 30, 64 << 30
	view, err := h.Read(within(t)) // the disks of other nodes may be news here
	if err != nil {
		t.Fatal(err)
	}
	placement, err := state.Place(view, state.PlaceRequest{Size: size, SegmentSize: segment, Replicas: replicas, NewReplica: holdfast.NewID[holdfast.ReplicaID]})
	if err != nil {
		t.Fatal(err)
	}
	id := holdfast.NewID[holdfast.VolumeID]()
	h.propose(t, &state.CreateVolume{Volume: id, Name: name, Size: size, Lineage: holdfast.NewID[holdfast.LineageID](), Placement: placement,
		Options: state.VolumeOptions{Replicas: replicas, SegmentSize: segment, AckMode: holdfast.AckReceived, MinCopies: 1}})
	return id
}

func (h *host) attach(vol holdfast.VolumeID, expect holdfast.Epoch, takeover bool) *state.AttachBegin {
	return &state.AttachBegin{Volume: vol, Node: h.store.Node(), Instance: h.Self().Instance, Expect: expect,
		Session: holdfast.NewID[holdfast.SessionID](), Takeover: takeover}
}

func TestJoinForwardAndRead(t *testing.T) {
	hosts := cluster(t, 3)
	for _, h := range hosts {
		h.disk(t)
	}
	for i, h := range hosts {
		id := h.create(t, fmt.Sprintf("vol-%d", i), 3)
		// Propose returned: the proposer's own View shows it.
		if _, ok := h.View().Volume(id); !ok {
			t.Fatalf("%s does not see the volume it made", h.name)
		}
		for _, o := range hosts {
			v, err := o.Read(within(t))
			if err != nil {
				t.Fatal(err)
			}
			if _, ok := v.Volume(id); !ok {
				t.Fatalf("a linearizable read at %s does not show what %s made", o.name, h.name)
			}
		}
	}
	// The command's own refusal comes through as it was.
	for _, h := range hosts {
		_, err := h.Propose(within(t), &state.Rename{Volume: firstVolume(h.View()), From: "other", To: "x"})
		if !errors.Is(err, holdfast.ErrRefused) || !errors.Is(err, state.ReasonStaleRevision) {
			t.Fatalf("through %s: got %v, want a stale revision", h.name, err)
		}
	}
}

func firstVolume(v *state.View) holdfast.VolumeID {
	for vol := range v.Volumes() {
		return vol.ID
	}
	return holdfast.VolumeID{}
}

func TestLeaderDiesAndComesBack(t *testing.T) {
	hosts := cluster(t, 3)
	for _, h := range hosts {
		h.disk(t)
	}
	dead := leader(t, hosts)
	rest := others(hosts, dead)
	id := rest[0].create(t, "before", 3)
	dead.kill()
	after := rest[1].create(t, "after", 3) // waits for the election
	if l := leader(t, rest); l == dead {
		t.Fatal("a dead node leads")
	}
	// Back as a new process over the same directory.
	dead.start(t)
	if err := dead.Announce(within(t), dead.Self()); err != nil {
		t.Fatal(err)
	}
	for _, vol := range []holdfast.VolumeID{id, after} {
		v, err := dead.Read(within(t))
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := v.Volume(vol); !ok {
			t.Fatalf("volume %v is missing on the node that came back", vol)
		}
	}
	n, _ := dead.View().Node(dead.store.Node())
	if n.Instance != dead.Self().Instance {
		t.Fatalf("instance in the tables: got %v, want %v", n.Instance, dead.Self().Instance)
	}
}

func TestWholeClusterRestarts(t *testing.T) {
	hosts := cluster(t, 3)
	for _, h := range hosts {
		h.disk(t)
	}
	id := hosts[0].create(t, "data", 3)
	for _, h := range hosts {
		h.kill()
	}
	for _, h := range hosts {
		h.start(t)
	}
	for _, h := range hosts {
		if err := h.Announce(within(t), h.Self()); err != nil {
			t.Fatal(err)
		}
		v, err := h.Read(within(t))
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := v.Volume(id); !ok {
			t.Fatalf("%s lost the volume", h.name)
		}
	}
}
