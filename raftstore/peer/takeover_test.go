package peer

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/raftstore/peer/peerpb"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

// attachedAt makes a volume that a node holds in epoch 1.
func attachedAt(t testing.TB, hosts []*host, holder *host) holdfast.VolumeID {
	t.Helper()
	for _, h := range hosts {
		h.disk(t)
	}
	vol := holder.create(t, "data", len(hosts))
	holder.propose(t, holder.attach(vol, 0, false))
	v, _ := holder.View().Volume(vol)
	holder.propose(t, &state.Activate{Segment: holdfast.SegmentID{Volume: vol}, Epoch: 1, ISR: v.Segments[0].ISR(), Continuous: true})
	return vol
}

func TestTakeoverIsRefusedWhileTheHolderLives(t *testing.T) {
	hosts := cluster(t, 3)
	vol := attachedAt(t, hosts, hosts[0])
	for _, h := range hosts[1:] {
		if _, err := h.Propose(within(t), h.attach(vol, 1, false)); !errors.Is(err, state.ReasonHeld) || !errors.Is(err, holdfast.ErrRefused) {
			t.Fatalf("without takeover at %s: got %v, want %v", h.name, err, state.ReasonHeld)
		}
		ctx, cancel := context.WithTimeout(within(t), 300*time.Millisecond)
		_, err := h.Propose(ctx, h.attach(vol, 1, true))
		cancel()
		if !errors.Is(err, holdfast.ErrTimeout) {
			t.Fatalf("takeover from a live holder at %s: got %v, want %v", h.name, err, holdfast.ErrTimeout)
		}
	}
	if v, _ := leader(t, hosts).View().Volume(vol); v.Epoch != 1 {
		t.Fatalf("epoch: got %d, want 1", v.Epoch)
	}
}

func TestDetachWakesAWaitingAttach(t *testing.T) {
	hosts := cluster(t, 3)
	vol := attachedAt(t, hosts, hosts[0])
	answers := make(chan error, 2)
	for _, h := range hosts[1:] {
		go func() {
			_, err := h.Propose(within(t), h.attach(vol, 1, true))
			answers <- err
		}()
	}
	hosts[0].propose(t, &state.Detach{Volume: vol, Epoch: 1, Ends: []state.SegmentEnd{{Index: 0, End: 4, Commit: 4}}})
	first, second := <-answers, <-answers
	if first != nil {
		first, second = second, first
	}
	if first != nil || !errors.Is(second, state.ReasonStaleRevision) && !errors.Is(second, state.ReasonHeld) {
		t.Fatalf("of two waiting one gets it: got %v and %v", first, second)
	}
}

// TestHolderAndLeaderDieTogether is the worst case: the waiting node has to
// learn of a new leader, which must know at once how long the holder is silent.
func TestHolderAndLeaderDieTogether(t *testing.T) {
	hosts := cluster(t, 3)
	dead := leader(t, hosts)
	vol := attachedAt(t, hosts, dead)
	rest := others(hosts, dead)
	answer := make(chan error, 1)
	go func() {
		res, err := rest[0].Propose(within(t), rest[0].attach(vol, 1, true))
		if err == nil && (res.Epoch != 2 || res.Volume.Holder.Node != rest[0].store.Node()) {
			err = fmt.Errorf("got epoch %d, holder %v", res.Epoch, res.Volume.Holder)
		}
		answer <- err
	}()
	dead.kill()
	if err := <-answer; err != nil {
		t.Fatal(err)
	}
	// The old holder comes back and finds itself fenced.
	dead.start(t)
	if err := dead.Announce(within(t), dead.Self()); err != nil {
		t.Fatal(err)
	}
	_, err := dead.Propose(within(t), &state.Detach{Volume: vol, Epoch: 1, Ends: []state.SegmentEnd{{}}})
	if !errors.Is(err, holdfast.ErrFenced) || !errors.Is(err, state.ReasonStaleEpoch) {
		t.Fatalf("the old writer: got %v, want %v", err, state.ReasonStaleEpoch)
	}
}

func TestARestartedHolderIsGoneAtOnce(t *testing.T) {
	hosts := cluster(t, 3)
	holder := others(hosts, leader(t, hosts))[0]
	vol := attachedAt(t, hosts, holder)
	other := leader(t, hosts)
	answer := make(chan error, 1)
	go func() {
		_, err := other.Propose(within(t), other.attach(vol, 1, true))
		answer <- err
	}()
	holder.kill()
	holder.start(t) // a new instance; its heartbeats and its announcement tell
	if err := holder.Announce(within(t), holder.Self()); err != nil {
		t.Fatal(err)
	}
	if err := <-answer; err != nil {
		t.Fatal(err)
	}
}

func TestRemovedNodesAreRefused(t *testing.T) {
	hosts := cluster(t, 3)
	gone := others(hosts, leader(t, hosts))[0]
	rest := others(hosts, gone)
	rest[0].propose(t, &state.NodeRemove{Node: gone.store.Node()})
	if err := gone.Announce(within(t), gone.Self()); !errors.Is(err, state.ReasonRemoved) {
		t.Fatalf("announce of a removed node: got %v, want %v", err, state.ReasonRemoved)
	}
	_, err := gone.Propose(within(t), &state.DeleteVolume{})
	if !errors.Is(err, state.ReasonRemoved) {
		t.Fatalf("command of a removed node: got %v, want %v", err, state.ReasonRemoved)
	}
	l := leader(t, rest)
	ctx := within(t)
	for {
		members, err := l.store.Members()
		if err != nil {
			t.Fatal(err)
		}
		if len(members) == 2 {
			break
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			t.Fatalf("the removed node is still a member: %v", members)
		}
	}
	// Two of three voters are left, and they still decide.
	rest[1].propose(t, &state.NodeRemove{Node: gone.store.Node()})
}

func TestClustersDoNotMix(t *testing.T) {
	one, two := cluster(t, 1)[0], cluster(t, 1)[0]
	if err := one.Join(within(t), []string{two.api}); !errors.Is(err, holdfast.ErrRefused) {
		t.Fatalf("join of another cluster: got %v, want %v", err, holdfast.ErrRefused)
	}
	if err := one.SameCluster(within(t), []string{one.api, two.api}); !errors.Is(err, holdfast.ErrRefused) {
		t.Fatalf("another cluster's node among the targets: got %v, want %v", err, holdfast.ErrRefused)
	}
	if err := one.SameCluster(within(t), []string{one.api, "127.0.0.1:1"}); err != nil {
		t.Fatalf("the own cluster, and nobody: got %v, want no error", err)
	}
	conn, err := grpc.NewClient("passthrough:///"+two.api, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := peerpb.NewPeerClient(conn)
	foreign, own, self, stranger := one.store.Cluster(), two.store.Cluster(), two.store.Node(), one.store.Node()
	command, err := state.EncodeCommand(holdfast.Level1, &state.DeleteVolume{})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		req  *peerpb.CommandRequest
		kind holdfast.Kind
	}{
		"another cluster":  {&peerpb.CommandRequest{Cluster: foreign[:], From: self[:], Command: command}, holdfast.ErrRefused},
		"no cluster":       {&peerpb.CommandRequest{From: self[:], Command: command}, holdfast.ErrRefused},
		"a stranger":       {&peerpb.CommandRequest{Cluster: own[:], From: stranger[:], Command: command}, holdfast.ErrRefused},
		"a short id":       {&peerpb.CommandRequest{Cluster: own[:], From: self[:3], Command: command}, holdfast.ErrInvalid},
		"a cut command":    {&peerpb.CommandRequest{Cluster: own[:], From: self[:], Command: command[:9]}, holdfast.ErrIntegrity},
		"a later version":  {&peerpb.CommandRequest{Cluster: own[:], From: self[:], Command: []byte{9, 0, 0, 0, 1, 0, 0, 0}}, holdfast.ErrUnsupported},
		"a large command":  {&peerpb.CommandRequest{Cluster: own[:], From: self[:], Command: make([]byte, 1<<20)}, holdfast.ErrInvalid},
		"the right sender": {&peerpb.CommandRequest{Cluster: own[:], From: self[:], Command: command}, holdfast.ErrNotFound},
	} {
		r, err := client.Forward(within(t), c.req)
		if err != nil || r.GetFailure() == nil || holdfast.Kind(r.GetFailure().GetKind()) != c.kind {
			t.Errorf("%s: got %v, %v, want %v", name, r, err, c.kind)
		}
	}
	hb, err := client.Heartbeat(within(t), &peerpb.HeartbeatRequest{Cluster: foreign[:], From: self[:]})
	if err != nil || hb.GetFailure() == nil {
		t.Errorf("a foreign heartbeat: got %v, %v", hb, err)
	}
	hb, err = client.Heartbeat(within(t), &peerpb.HeartbeatRequest{Cluster: own[:], From: self[:], Instance: []byte{1}})
	if err != nil || hb.GetFailure() == nil {
		t.Errorf("a heartbeat with a short instance: got %v, %v", hb, err)
	}
	j, err := client.Join(within(t), &peerpb.CommandRequest{Cluster: own[:], From: stranger[:], Command: command})
	if err != nil || holdfast.Kind(j.GetFailure().GetKind()) != holdfast.ErrInvalid {
		t.Errorf("a join that is none: got %v, %v", j, err)
	}
}

func TestJoinWithATakenName(t *testing.T) {
	first := cluster(t, 1)[0]
	twin := newHost(t, "n1")
	if err := twin.Join(within(t), []string{first.api}); !errors.Is(err, holdfast.ErrExists) {
		t.Fatalf("got %v, want %v", err, holdfast.ErrExists)
	}
	if twin.store.HasCluster() {
		t.Fatal("a refused join bound the directory to the cluster")
	}
}

func TestJoinWaitsForTheTarget(t *testing.T) {
	first := newHost(t, "n1")
	second := newHost(t, "n2")
	joined := make(chan error, 1)
	go func() { joined <- second.Join(within(t), []string{"127.0.0.1:1", first.api}) }()
	if err := first.Bootstrap(within(t), holdfast.NewID[holdfast.ClusterID]()); err != nil {
		t.Fatal(err)
	}
	if err := <-joined; err != nil {
		t.Fatal(err)
	}
	second.eventually(t, "its own record", func(v *state.View) bool { _, ok := v.NodeByName("n2"); return ok })
}

func TestAnswersEndWithTheContext(t *testing.T) {
	h := newHost(t, "n1")
	ctx, cancel := context.WithTimeout(within(t), 50*time.Millisecond)
	defer cancel()
	if err := h.Join(ctx, []string{"127.0.0.1:1"}); !errors.Is(err, holdfast.ErrTimeout) {
		t.Fatalf("join of nobody: got %v, want %v", err, holdfast.ErrTimeout)
	}
	if err := h.Trouble(); err == nil || !strings.Contains(err.Error(), "ask 127.0.0.1:1: ") || !strings.Contains(err.Error(), "refused") || strings.Contains(err.Error(), "rpc error") {
		t.Errorf("trouble: %v, want that 127.0.0.1:1 refuses", err)
	}
	hosts := cluster(t, 3)
	rest := others(hosts, hosts[0])
	for _, r := range rest {
		r.kill()
	}
	ctx, cancel = context.WithTimeout(within(t), 500*time.Millisecond)
	defer cancel()
	if _, err := hosts[0].Propose(ctx, &state.DeleteVolume{}); !errors.Is(err, holdfast.ErrTimeout) {
		t.Fatalf("a proposal without quorum: got %v, want %v", err, holdfast.ErrTimeout)
	}
	if _, err := hosts[0].Read(ctx); !errors.Is(err, holdfast.ErrTimeout) {
		t.Fatalf("a linearizable read without quorum: got %v, want %v", err, holdfast.ErrTimeout)
	}
	if _, ok := hosts[0].View().NodeByName("n2"); !ok {
		t.Fatal("the local View needs no quorum")
	}
}

// TestNodesMoveToOtherAddresses restarts followers elsewhere, one after the other.
func TestNodesMoveToOtherAddresses(t *testing.T) {
	hosts := cluster(t, 3)
	for _, h := range others(hosts, leader(t, hosts)) {
		h.kill()
		h.api, h.raft = "127.0.0.1:0", "127.0.0.1:0"
		h.start(t)
		if err := h.Announce(within(t), h.Self()); err != nil {
			t.Fatal(err)
		}
		for _, o := range hosts {
			o.eventually(t, "the new address", func(v *state.View) bool {
				n, ok := v.Node(h.store.Node())
				return ok && n.Addresses.API == h.api && n.Addresses.Raft == h.raft
			})
		}
	}
}

// TestNodesBeyondTheMembersFollow: the eighth node is no raft member and still
// proposes, reads and sees what happens.
func TestNodesBeyondTheMembersFollow(t *testing.T) {
	hosts := cluster(t, 8)
	var watcher *host
	l := leader(t, hosts)
	ctx := within(t)
	for watcher == nil {
		members, err := l.store.Members()
		if err != nil {
			t.Fatal(err)
		}
		if len(members) == 7 {
			for _, h := range hosts {
				in := false
				for _, m := range members {
					in = in || m.Node == h.store.Node()
				}
				if !in {
					watcher = h
				}
			}
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			t.Fatalf("members: %d, want 7", len(members))
		}
	}
	for _, h := range hosts[:3] {
		h.disk(t)
	}
	id := watcher.create(t, "made-by-the-watcher", 3)
	if _, ok := watcher.View().Volume(id); !ok {
		t.Fatal("the watcher does not see what it made")
	}
	other := hosts[0].create(t, "made-elsewhere", 2)
	v, err := watcher.Read(within(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := v.Volume(other); !ok {
		t.Fatal("a linearizable read at the watcher lacks what was made elsewhere")
	}
	if watcher.store.View().Index() != 0 {
		t.Fatal("the watcher has a log of its own")
	}
	// Its process restarts with the contacts it saved, and follows again.
	watcher.kill()
	watcher.start(t)
	if err := watcher.Announce(within(t), watcher.Self()); err != nil {
		t.Fatal(err)
	}
	watcher.eventually(t, "the tables", func(v *state.View) bool { _, ok := v.Volume(other); return ok })
}
