package raftstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/raft"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

// everyone is present and caught up.
func everyone(holdfast.NodeID) Presence { return Presence{Alive: true, Applied: ^uint64(0) >> 1} }

// join adds a started member to a cluster through its leader, by hand.
func join(t testing.TB, leader, m *member) {
	t.Helper()
	if err := m.Adopt(leader.Cluster()); err != nil {
		t.Fatal(err)
	}
	propose(t, leader.Store, &state.NodeJoin{Node: m.node()})
}

// settle makes membership steps until there is none to make.
func settle(t testing.TB, leader *member, present func(holdfast.NodeID) Presence) {
	t.Helper()
	for {
		moved, err := leader.Reconcile(within(t), present)
		if err != nil {
			t.Fatal(err)
		}
		if !moved {
			return
		}
	}
}

func count(t testing.TB, m *member) (voters, all int) {
	t.Helper()
	members, err := m.Members()
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range members {
		if x.Voter {
			voters++
		}
	}
	return voters, len(members)
}

// three makes a cluster of three voters and returns its members, the leader first.
func three(t testing.TB) []*member {
	t.Helper()
	ms := []*member{bootstrap(t), start(t, "n2"), start(t, "n3")}
	for _, m := range ms[1:] {
		join(t, ms[0], m)
	}
	settle(t, ms[0], everyone)
	if v, _ := count(t, ms[0]); v != 3 {
		t.Fatalf("%d voters, want 3", v)
	}
	return ms
}

func TestJoinThenPromote(t *testing.T) {
	first, second := bootstrap(t), start(t, "n2")
	join(t, first, second)
	settle(t, first, everyone)
	// Two nodes: one voter, as two would fail when either does.
	if v, all := count(t, first); v != 1 || all != 2 {
		t.Fatalf("two nodes: got %d voters of %d members, want 1 of 2", v, all)
	}
	eventually(t, second.Store, "the log", func(v *state.View) bool {
		n, ok := v.NodeByName("n2")
		return ok && n.Kind == state.MemberNonVoter
	})
	third := start(t, "n3")
	join(t, first, third)
	// The third is behind: it does not vote yet, so the second does not either.
	settle(t, first, func(id holdfast.NodeID) Presence { return Presence{Alive: true, Applied: 0} })
	settle(t, first, func(id holdfast.NodeID) Presence { return Presence{Alive: id != third.Node(), Applied: 1 << 40} })
	if v, _ := count(t, first); v != 1 {
		t.Fatalf("with one ready non-voter: got %d voters, want 1", v)
	}
	settle(t, first, everyone)
	if v, all := count(t, first); v != 3 || all != 3 {
		t.Fatalf("three nodes: got %d voters of %d members, want 3 of 3", v, all)
	}
	fourth := start(t, "n4")
	join(t, first, fourth)
	settle(t, first, everyone)
	if v, all := count(t, first); v != 3 || all != 4 {
		t.Fatalf("four nodes: got %d voters of %d members, want 3 of 4", v, all)
	}
	// Removed: no member any more.
	propose(t, first.Store, &state.NodeRemove{Node: fourth.Node()})
	settle(t, first, everyone)
	if v, all := count(t, first); v != 3 || all != 3 {
		t.Fatalf("after a removal: got %d voters of %d members, want 3 of 3", v, all)
	}
	if _, err := first.Propose(within(t), &state.NodeJoin{Node: fourth.node()}); !errors.Is(err, state.ReasonRemoved) {
		t.Fatalf("join of a removed id: got %v, want %v", err, state.ReasonRemoved)
	}
}

func TestFollowersAnswerWithTheLeader(t *testing.T) {
	ms := three(t)
	for _, m := range ms[1:] {
		var not *NotLeader
		_, err := m.Propose(within(t), &state.DeleteVolume{})
		if !errors.Is(err, holdfast.ErrUnavailable) || !errors.As(err, &not) || not.Leader != ms[0].Node() {
			t.Fatalf("propose at a follower: got %v, want the leader %v", err, ms[0].Node())
		}
		if _, err := m.ReadIndex(within(t)); !errors.As(err, &not) {
			t.Fatalf("read index at a follower: got %v", err)
		}
	}
	index, err := ms[0].ReadIndex(within(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range ms {
		if err := m.WaitIndex(within(t), index); err != nil {
			t.Fatal(err)
		}
		if _, ok := m.View().NodeByName("n3"); !ok {
			t.Fatal("a View at the read index lacks an answered command")
		}
	}
}

func TestLeadershipMoves(t *testing.T) {
	ms := three(t)
	moved := ms[1].LeaderChanged()
	if err := ms[0].StepDown(within(t)); err != nil {
		t.Fatal(err)
	}
	select {
	case <-moved:
	case <-within(t).Done():
		t.Fatal("no word of the new leader")
	}
	eventuallyLeads(t, ms[1:])
	if _, err := ms[0].Propose(within(t), &state.DeleteVolume{}); err == nil || errors.Is(err, holdfast.ErrNotFound) {
		t.Fatalf("the old leader answered %v", err)
	}
}

func eventuallyLeads(t testing.TB, ms []*member) *member {
	t.Helper()
	ctx := within(t)
	for {
		var moved []<-chan struct{}
		for _, m := range ms {
			moved = append(moved, m.LeaderChanged())
		}
		for _, m := range ms {
			if m.IsLeader() {
				return m
			}
		}
		select {
		case <-moved[0]:
		case <-moved[len(moved)-1]:
		case <-ctx.Done():
			t.Fatal("nobody leads")
		}
	}
}

func TestSnapshotRestartAndInstall(t *testing.T) {
	ms := three(t)
	ms[2].Close() // it misses what follows
	for i := range 50 {
		n := ms[1].node()
		n.Revision = mustNode(t, ms[0].View(), n.ID).Revision
		n.Version = fmt.Sprint("v", i)
		propose(t, ms[0].Store, &state.NodeUpdate{Node: n})
	}
	if err := ms[0].Snapshot(within(t)); err != nil {
		t.Fatal(err)
	}
	want, err := state.EncodeSnapshot(ms[0].View())
	if err != nil {
		t.Fatal(err)
	}
	// The log no longer reaches back to where it was: it gets the snapshot.
	late := restart(t, ms[2], ms[2].Address())
	eventually(t, late.Store, "the snapshot", func(v *state.View) bool { return v.Index() >= ms[0].View().Index() })
	got, err := state.EncodeSnapshot(late.View())
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != string(want) {
		t.Fatal("the tables differ after an installed snapshot")
	}
	// The leader itself begins from its snapshot file.
	ms[0].Close()
	again := restart(t, ms[0], ms[0].Address())
	if again.View().Index() == 0 {
		t.Fatal("nothing restored from the snapshot at the start")
	}
	eventually(t, again.Store, "the log", func(v *state.View) bool { return v.Index() >= 50 })
	if n := mustNode(t, again.View(), ms[1].Node()); n.Version != "v49" {
		t.Fatalf("version: got %q, want v49", n.Version)
	}
}

func mustNode(t testing.TB, v *state.View, id holdfast.NodeID) *state.Node {
	t.Helper()
	n, ok := v.Node(id)
	if !ok {
		t.Fatalf("no node %v", id)
	}
	return n
}

func TestDamagedSnapshotStopsTheStart(t *testing.T) {
	m := bootstrap(t)
	if err := m.Snapshot(within(t)); err != nil {
		t.Fatal(err)
	}
	m.Close()
	files, err := filepath.Glob(filepath.Join(m.dir, "snapshots", "*", "state.bin"))
	if err != nil || len(files) != 1 {
		t.Fatalf("snapshot files: %v %v", files, err)
	}
	b, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := os.WriteFile(files[0], b, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openStore(t, m.dir, "127.0.0.1:0"); err == nil {
		t.Fatal("a node started from a damaged snapshot")
	}
}

func TestPanicWhileApplyingStopsTheNode(t *testing.T) {
	m := bootstrap(t)
	m.fsm.apply = func(*state.View, uint64, state.Command) (*state.View, state.Result, error) { panic("broken rule") }
	before := m.View()
	_, err := m.Propose(within(t), &state.DeleteVolume{})
	if !errors.Is(err, holdfast.ErrInternal) || !strings.Contains(err.Error(), "broken rule") {
		t.Fatalf("got %v, want the panic", err)
	}
	select {
	case <-m.Fatal():
	case <-within(t).Done():
		t.Fatal("the node goes on")
	}
	if m.View() != before || m.Err() == nil {
		t.Fatalf("view moved or no error: %v", m.Err())
	}
	if _, err := m.Propose(within(t), &state.DeleteVolume{}); !errors.Is(err, holdfast.ErrInternal) {
		t.Fatalf("a stopped node answers %v", err)
	}
	if m.IsLeader() {
		t.Fatal("a stopped node says it leads")
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestUnknownEntryStopsTheNode(t *testing.T) {
	for name, data := range map[string][]byte{
		"a later version": {2, 0, 0, 0, 1, 0, 0, 0},
		"an unknown kind": {1, 0, 0, 0, 200, 0, 0, 0},
		"cut short":       {1, 0, 0},
		"nothing":         {},
	} {
		t.Run(name, func(t *testing.T) {
			var fatal error
			f := newFSM(func(err error) { fatal = err })
			before := f.view.Load()
			for i := range uint64(3) {
				a := f.Apply(&raft.Log{Index: i + 1, Data: data}).(answer)
				if a.err == nil || fatal == nil {
					t.Fatalf("got %v, fatal %v", a.err, fatal)
				}
			}
			if f.view.Load() != before {
				t.Fatal("the tables moved")
			}
			if _, err := f.Snapshot(); err == nil {
				t.Fatal("a stopped FSM gives a snapshot")
			}
		})
	}
}

func TestRestoreRefusesDamageAndThePast(t *testing.T) {
	f := newFSM(func(error) {})
	reader := func(v *state.View, harm int) io.ReadCloser {
		b, err := state.EncodeSnapshot(v)
		if err != nil {
			t.Fatal(err)
		}
		if harm > 0 {
			b[harm] ^= 1
		}
		return io.NopCloser(strings.NewReader(string(b)))
	}
	init := &state.InitCluster{ID: holdfast.NewID[holdfast.ClusterID](), Level: holdfast.Level1}
	v1, _, _ := (&state.View{}).Apply(5, init)
	v2, _, _ := v1.Apply(9, init)
	changed := f.next()
	if err := f.Restore(reader(v2, 0)); err != nil {
		t.Fatal(err)
	}
	select {
	case <-changed:
	default:
		t.Fatal("a restore wakes nobody")
	}
	if err := f.Restore(reader(v1, 0)); !errors.Is(err, holdfast.ErrIntegrity) {
		t.Fatalf("a snapshot of the past: got %v", err)
	}
	if err := f.Restore(reader(v2, 30)); !errors.Is(err, holdfast.ErrIntegrity) {
		t.Fatalf("a damaged snapshot: got %v", err)
	}
	if f.view.Load().Index() != 9 {
		t.Fatalf("index: got %d, want 9", f.view.Load().Index())
	}
}

func TestAMemberMovesToAnotherAddress(t *testing.T) {
	ms := three(t)
	follower := ms[2]
	follower.Close()
	moved := restart(t, follower, "127.0.0.1:0")
	if moved.Address() == follower.Address() {
		t.Skip("the same port was given again")
	}
	// As its heartbeats would tell, before anything is proposed.
	ms[0].LearnAddress(moved.Node(), moved.Address())
	eventually(t, moved.Store, "the tables", func(v *state.View) bool { return v.Index() >= ms[0].View().Index() })
	n := moved.node()
	n.Revision = mustNode(t, ms[0].View(), n.ID).Revision
	propose(t, ms[0].Store, &state.NodeUpdate{Node: n})
	settle(t, ms[0], everyone)
	members, err := ms[0].Members()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range members {
		if m.Node == moved.Node() && (m.Address != moved.Address() || !m.Voter) {
			t.Fatalf("configuration: got %+v, want a voter at %s", m, moved.Address())
		}
	}
}

func TestStrangersGetNoRaftConnection(t *testing.T) {
	m := bootstrap(t)
	good := hello{cluster: m.Cluster(), from: holdfast.NewID[holdfast.NodeID](), to: m.Node()}
	harm := func(change func(b []byte) []byte) []byte { return change(encodeHello(good)) }
	other, node := good, good
	other.cluster = holdfast.NewID[holdfast.ClusterID]()
	node.to = holdfast.NewID[holdfast.NodeID]()
	for name, c := range map[string]struct {
		hello  []byte
		answer int
	}{
		"a peer":          {encodeHello(good), helloOK},
		"another cluster": {encodeHello(other), helloForeign},
		"another node":    {encodeHello(node), helloForeign},
		"no cluster":      {encodeHello(hello{to: m.Node()}), helloForeign},
		"flipped bit":     {harm(func(b []byte) []byte { b[20] ^= 1; return b }), helloMalformed},
		"http":            {[]byte(strings.Repeat("GET / HTTP/1.1\r\n", 10))[:helloSize], helloMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := net.Dial("tcp", m.Address())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if _, err := conn.Write(c.hello); err != nil {
				t.Fatal(err)
			}
			var b [1]byte
			if _, err := io.ReadFull(conn, b[:]); err != nil || int(b[0]) != c.answer {
				t.Fatalf("got %d, %v, want %d", b[0], err, c.answer)
			}
			if c.answer != helloOK {
				if n, err := conn.Read(b[:]); err == nil {
					t.Fatalf("the connection stays open and says %d bytes", n)
				}
			}
		})
	}
	if n := len(m.View().Cluster().ID); n == 0 || !m.IsLeader() {
		t.Fatal("strangers disturbed the member")
	}
}

func FuzzHello(f *testing.F) {
	f.Add(encodeHello(hello{cluster: holdfast.NewID[holdfast.ClusterID]()}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if h, err := decodeHello(b); err == nil && string(encodeHello(h)) != string(b) {
			t.Fatalf("two encodings of %+v", h)
		}
	})
}

func TestIdentity(t *testing.T) {
	dir := t.TempDir()
	made, err := loadIdentity(dir, holdfast.NodeID{})
	if err != nil || made.Node.IsZero() {
		t.Fatalf("got %+v, %v", made, err)
	}
	if again, err := loadIdentity(dir, made.Node); err != nil || again != made {
		t.Fatalf("got %+v, %v, want %+v", again, err, made)
	}
	if _, err := loadIdentity(dir, holdfast.NewID[holdfast.NodeID]()); !errors.Is(err, holdfast.ErrRefused) {
		t.Fatalf("another node's directory: got %v, want %v", err, holdfast.ErrRefused)
	}
	for text, kind := range map[string]holdfast.Kind{
		"":  holdfast.ErrIntegrity,
		"{": holdfast.ErrIntegrity,
		`{"version":2,"node":"1b4e28ba-2fa1-41d2-883f-0016d3cca427"}`: holdfast.ErrUnsupported,
		`{"version":1}`:               holdfast.ErrIntegrity,
		`{"version":1,"node":"zzzz"}`: holdfast.ErrIntegrity,
	} {
		if err := os.WriteFile(filepath.Join(dir, identityFile), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := loadIdentity(dir, holdfast.NodeID{})
		if !errors.Is(err, kind) || kind == holdfast.ErrUnsupported && holdfast.RemedyOf(err) == "" {
			t.Fatalf("%q: got %v, want %v, and what to do about another version", text, err, kind)
		}
	}
}

func TestOptionsAreChecked(t *testing.T) {
	l := func() net.Listener { return listen(t, "127.0.0.1:0") }
	for name, o := range map[string]Options{
		"no directory": {Listener: l(), Address: "a:1"},
		"no listener":  {Dir: t.TempDir(), Address: "a:1"},
		"no address":   {Dir: t.TempDir(), Listener: l()},
		"even voters":  {Dir: t.TempDir(), Listener: l(), Address: "a:1", MaxVoters: 4},
		"many voters":  {Dir: t.TempDir(), Listener: l(), Address: "a:1", MaxVoters: 9},
	} {
		if s, err := Open(o); !errors.Is(err, holdfast.ErrInvalid) {
			t.Errorf("%s: got %v, %v", name, s, err)
		}
	}
}

func TestWaitsEnd(t *testing.T) {
	m := bootstrap(t)
	ctx, cancel := context.WithCancel(within(t))
	cancel()
	if err := m.WaitIndex(ctx, 1<<40); !errors.Is(err, holdfast.ErrTimeout) {
		t.Fatalf("a cancelled wait: got %v", err)
	}
	done := make(chan error)
	go func() { done <- m.WaitIndex(within(t), 1<<40) }()
	m.Close()
	if err := <-done; !errors.Is(err, holdfast.ErrUnavailable) {
		t.Fatalf("a wait on a closed store: got %v", err)
	}
	if _, err := m.Propose(within(t), &state.DeleteVolume{}); !errors.Is(err, holdfast.ErrUnavailable) {
		t.Fatalf("a proposal to a closed store: got %v", err)
	}
}

func TestContacts(t *testing.T) {
	m := bootstrap(t)
	if got, err := m.Contacts(); err != nil || len(got) != 0 {
		t.Fatalf("before any: got %v, %v", got, err)
	}
	var many []string
	for i := range maxContacts + 5 {
		many = append(many, fmt.Sprintf("host-%d:9400", i))
	}
	for _, want := range [][]string{{"a:1", "b:2"}, many, nil} {
		if err := m.SaveContacts(want); err != nil {
			t.Fatal(err)
		}
		want = want[:min(len(want), maxContacts)]
		if got, err := m.Contacts(); err != nil || strings.Join(got, " ") != strings.Join(want, " ") {
			t.Fatalf("got %v, %v, want %v", got, err, want)
		}
	}
}
