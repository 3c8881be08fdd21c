package peer

import (
	"fmt"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/raftstore/peer/peerpb"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

func TestHearsay(t *testing.T) {
	c := &fakeClock{t: time.Hour}
	h := newHearsay(c.now)
	a, b := holdfast.NewID[holdfast.NodeID](), holdfast.NewID[holdfast.NodeID]()
	want := func(when string, node holdfast.NodeID, gone bool) {
		t.Helper()
		if got := h.gone(node); got != gone {
			t.Errorf("%s: gone: got %v, want %v", when, got, gone)
		}
	}
	tell := func(voter string, news bool, gone ...holdfast.NodeID) {
		t.Helper()
		if got := h.tell(voter, gone); got != news {
			t.Errorf("%s says %d nodes are gone: news: got %v, want %v", voter, len(gone), got, news)
		}
	}
	want("nobody said anything", a, false)
	tell("v1", true, a)
	want("the one voter says so", a, true)
	want("and not of the other", b, false)
	tell("v1", false, a)
	tell("v2", false)
	want("another voter hears it", a, false)
	tell("v2", true, a, b)
	want("both say so", a, true)
	want("one of two", b, false)
	tell("v1", true, b)
	want("one took it back", a, false)
	c.t += GoneAfter / 2
	tell("v2", false, a, b)
	c.t += GoneAfter / 2
	want("v1 itself fell silent: v2's word alone counts", a, true)
	c.t += GoneAfter
	want("all words are old", a, false)
	for i := range 2 * maxVoices {
		h.tell(fmt.Sprint(i), []holdfast.NodeID{a})
	}
	if n := len(h.said); n != maxVoices {
		t.Errorf("voices kept: got %d, want %d", n, maxVoices)
	}
}

// TestSilentNodes: a voter tells of nodes only once it has listened long enough.
func TestSilentNodes(t *testing.T) {
	l := newLife()
	l.arrive(l.node, l.instance, 7)
	if got := l.silent(); len(got) != 0 {
		t.Errorf("just heard: got %v silent, want none", got)
	}
	l.clock.run(l.record, GoneAfter)
	if got := l.silent(); len(got) != 1 || got[0] != l.node {
		t.Errorf("after %v: got %v silent, want %v", GoneAfter, got, l.node)
	}
	l.clock.t += 2 * maxStall // this process did not run
	if got := l.silent(); len(got) != 0 {
		t.Errorf("after a stall of the listener: got %v silent, want none", got)
	}
}

// TestWhoHearsNothingIsTold: a node that is no voter learns from the voters who is
// gone, is woken by it, and learns when that one is back.
func TestWhoHearsNothingIsTold(t *testing.T) {
	hosts := cluster(t, 4)
	var asker, victim *host
	for _, h := range hosts {
		self, _ := h.View().Node(h.store.Node())
		switch {
		case self.Kind != state.MemberVoter:
			asker = h
		case !h.store.IsLeader():
			victim = h
		}
	}
	until := func(gone bool) {
		t.Helper()
		ctx := within(t)
		for asker.SaidGone(victim.store.Node()) != gone {
			changed := asker.LivenessChanged()
			if asker.SaidGone(victim.store.Node()) == gone {
				return
			}
			select {
			case <-changed:
			case <-ctx.Done():
				t.Fatalf("never told: gone %v", gone)
			}
		}
	}
	until(false)
	victim.kill()
	until(true)
	if alive := others(hosts, victim)[0]; asker.SaidGone(alive.store.Node()) {
		t.Errorf("%s lives and is called gone", alive.name)
	}
	victim.start(t)
	until(false)
}

// TestListen asks from a voter and from a node that hears nothing: a living process
// is heard, its predecessor and a dead one are gone; and who is no leader says so.
func TestListen(t *testing.T) {
	hosts := cluster(t, 4)
	l := leader(t, hosts)
	victim := others(hosts, l)[0]
	var deaf *host
	for _, h := range hosts {
		if self, _ := h.View().Node(h.store.Node()); self.Kind != state.MemberVoter {
			deaf = h
		}
	}
	if victim == deaf {
		victim = others(hosts, l)[1]
	}
	want := func(h *host, holder state.Holder, alive, gone bool) {
		t.Helper()
		a, g, err := h.Listen(within(t), holder)
		if err != nil || a != alive || g != gone {
			t.Errorf("%s listens: got alive %v, gone %v, %v, want %v, %v", h.name, a, g, err, alive, gone)
		}
	}
	first := state.Holder{Node: victim.store.Node(), Instance: victim.Self().Instance}
	for _, h := range []*host{l, deaf} {
		want(h, first, true, false)
	}
	victim.kill()
	want(deaf, first, false, false) // silent for a moment: nobody knows
	ctx := within(t)
	for gone := false; !gone; {
		var err error
		if _, gone, err = deaf.Listen(ctx, first); err != nil {
			t.Fatal(err)
		}
	}
	want(l, first, false, true)
	victim.start(t)
	if err := victim.Announce(within(t), victim.Self()); err != nil {
		t.Fatal(err)
	}
	second := state.Holder{Node: victim.store.Node(), Instance: victim.Self().Instance}
	for _, h := range []*host{l, deaf} {
		want(h, second, true, false)
		want(h, first, false, true)
	}

	conn, err := grpc.NewClient("passthrough:///"+deaf.api, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	own, self := l.store.Cluster(), l.store.Node()
	r, err := peerpb.NewPeerClient(conn).Listen(within(t), &peerpb.ListenRequest{Cluster: own[:], From: self[:], Node: first.Node[:], Instance: first.Instance[:]})
	if err != nil || r.GetRedirect() == nil {
		t.Errorf("a node that does not lead: got %v, %v, want a redirect", r, err)
	}
}
