package peer

import (
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

// fakeClock is time that a test moves.
type fakeClock struct{ t time.Duration }

func (c *fakeClock) now() time.Duration { return c.t }

// run lets time pass as a running process sees it: in looks.
func (c *fakeClock) run(r *record, d time.Duration) {
	for end := c.t + d; c.t < end; {
		c.t += lookEvery
		r.look()
	}
}

func closedChan(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

type life struct {
	*record
	clock    *fakeClock
	node     holdfast.NodeID
	instance holdfast.InstanceID
}

func newLife() *life {
	c := &fakeClock{t: 1000 * time.Second}
	return &life{newRecord(c.now), c, holdfast.NewID[holdfast.NodeID](), holdfast.NewID[holdfast.InstanceID]()}
}

func (l *life) holder() state.Holder { return state.Holder{Node: l.node, Instance: l.instance} }

func (l *life) want(t *testing.T, gone bool, when string) {
	t.Helper()
	if got := l.gone(l.holder()); got != gone {
		t.Fatalf("%s: gone: got %v, want %v (%+v)", when, got, gone, l.of(l.node))
	}
}

func TestSilence(t *testing.T) {
	l := newLife()
	for range 20 {
		l.arrive(l.node, l.instance, 7)
		l.clock.run(l.record, HeartbeatEvery)
	}
	l.want(t, false, "beating")
	if a := l.of(l.node); a.Applied != 7 || a.Instance != l.instance || a.Gone {
		t.Fatalf("got %+v", a)
	}
	l.arrive(l.node, l.instance, 8)
	woken := l.next()
	l.clock.run(l.record, GoneAfter-lookEvery)
	l.want(t, false, "just below the limit")
	if closedChan(woken) {
		t.Fatal("woken while everyone lives")
	}
	l.clock.run(l.record, lookEvery)
	l.want(t, true, "at the limit")
	if !closedChan(woken) {
		t.Fatal("nobody was woken when the node went")
	}
	woken = l.next()
	l.arrive(l.node, l.instance, 9)
	l.want(t, false, "back again")
	if !closedChan(woken) {
		t.Fatal("nobody was woken when the node came back")
	}
}

func TestANodeNeverHeardOfGoesWithTheRecordsAge(t *testing.T) {
	l := newLife()
	l.want(t, false, "a fresh record")
	woken := l.next()
	l.clock.run(l.record, GoneAfter)
	l.want(t, true, "a record that listened for long enough")
	if !closedChan(woken) {
		t.Fatal("nobody was woken")
	}
	if woken = l.next(); func() bool { l.clock.run(l.record, GoneAfter); return closedChan(woken) }() {
		t.Fatal("woken again though nothing changed")
	}
}

// A voter that was made one a moment ago has heard of nobody, and must not call
// a living holder gone.
func TestSilenceBeginsWhenHeartbeatsCanCome(t *testing.T) {
	l := newLife()
	l.clock.run(l.record, 10*GoneAfter)
	l.want(t, true, "never heard of by an old record")
	l.listenAnew()
	l.want(t, false, "when this node has just become a voter")
	l.clock.run(l.record, GoneAfter-lookEvery)
	l.want(t, false, "just below the limit")
	l.clock.run(l.record, lookEvery)
	l.want(t, true, "at the limit")

	l = newLife()
	l.clock.run(l.record, 10*GoneAfter)
	l.expect(l.node)
	l.want(t, false, "a node that is new in the tables")
	l.clock.run(l.record, GoneAfter)
	l.want(t, true, "a new node that never said a word")
	l.expect(l.node)
	l.want(t, true, "expected again")
	l.arrive(l.node, l.instance, 1)
	l.want(t, false, "heard at last")
}

func TestANewInstanceEndsTheOldOne(t *testing.T) {
	l := newLife()
	l.arrive(l.node, l.instance, 1)
	woken := l.next()
	second := holdfast.NewID[holdfast.InstanceID]()
	l.arrive(l.node, second, 1)
	l.want(t, true, "superseded")
	if !closedChan(woken) {
		t.Fatal("nobody was woken")
	}
	if l.gone(state.Holder{Node: l.node, Instance: second}) {
		t.Fatal("the new instance is gone")
	}
	// A late heartbeat of the old process neither revives it nor ends the new one.
	l.arrive(l.node, l.instance, 99)
	l.want(t, true, "superseded, late heartbeat")
	if a := l.of(l.node); a.Instance != second || a.Applied == 99 {
		t.Fatalf("got %+v, want the second instance", a)
	}
	// Nor does it stand for life: the new process goes silent.
	for range 20 {
		l.clock.run(l.record, HeartbeatEvery)
		l.arrive(l.node, l.instance, 99)
	}
	if !l.gone(state.Holder{Node: l.node, Instance: second}) {
		t.Fatal("heartbeats of a superseded process keep its node alive")
	}
}

// TestAStallIsNobodysSilence: a process that was stopped for a minute heard
// nobody, and must not call everyone gone when it wakes.
func TestAStallIsNobodysSilence(t *testing.T) {
	for name, first := range map[string]func(l *life){
		"asked first": func(*life) {},
		"look first":  func(l *life) { l.look() },
		"heard first": func(l *life) { l.arrive(holdfast.NewID[holdfast.NodeID](), l.instance, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			l := newLife()
			l.arrive(l.node, l.instance, 1)
			l.clock.t += time.Minute
			first(l)
			l.want(t, false, "just woken")
			l.clock.run(l.record, GoneAfter-lookEvery)
			l.want(t, false, "below the limit since it woke")
			l.clock.run(l.record, lookEvery)
			l.want(t, true, "at the limit since it woke")
		})
	}
}

func TestTheRecordIsBounded(t *testing.T) {
	l := newLife()
	for range maxHeard + 10 {
		l.arrive(holdfast.NewID[holdfast.NodeID](), l.instance, 0)
	}
	if got := len(l.heard); got != maxHeard {
		t.Fatalf("got %d nodes, want %d", got, maxHeard)
	}
	for range 100 {
		l.arrive(l.node, holdfast.NewID[holdfast.InstanceID](), 0)
	}
	var other *heard
	for _, h := range l.heard {
		if len(h.old) > keptInstances {
			other = h
		}
	}
	if other != nil {
		t.Fatalf("got %d old instances, want at most %d", len(other.old), keptInstances)
	}
}

func TestBootTimeRuns(t *testing.T) {
	a := BootTime()
	if b := BootTime(); a <= 0 || b < a {
		t.Fatalf("got %v then %v", a, b)
	}
}
