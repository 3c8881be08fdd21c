package state

import (
	"errors"
	"slices"
	"testing"

	"github.com/holdfast-storage/holdfast"
)

// attached is a world with one volume of three replicas, attached in epoch 1 at
// node 0, and shorthands for its one segment.
type attached struct {
	*world
	vol holdfast.VolumeID
	seg holdfast.SegmentID
	r   []holdfast.ReplicaID
}

func newAttached(t testing.TB) *attached {
	w := newWorld(t, 4)
	vol, _ := w.create("data", 3)
	a := &attached{world: w, vol: vol.ID, seg: holdfast.SegmentID{Volume: vol.ID}, r: vol.Segments[0].ISR()}
	a.must(a.begin(0, 0))
	a.must(&Activate{Segment: a.seg, Epoch: 1, ISR: a.r, Continuous: true})
	return a
}

func (a *attached) begin(node int, expect holdfast.Epoch) *AttachBegin {
	return &AttachBegin{Volume: a.vol, Node: a.nodes[node], Instance: a.instances[node], Expect: expect, Session: newID[holdfast.SessionID](a.world)}
}

func (a *attached) takeover(node int, expect holdfast.Epoch) *AttachBegin {
	c := a.begin(node, expect)
	c.Takeover = true
	return c
}

func (a *attached) segment() *Segment {
	_, s, _ := a.view.Segment(a.seg)
	return s
}

func (a *attached) volume() *Volume {
	v, _ := a.view.Volume(a.vol)
	return v
}

// refused applies a command that must fail with a kind and a reason and change nothing.
func (w *world) refused(cmd Command, kind holdfast.Kind, reason Reason) {
	w.t.Helper()
	before := w.dump()
	res, err := w.apply(cmd)
	if err == nil {
		w.t.Fatalf("%s %+v: got %+v, want a refusal (%s, %q)", Name(cmd), cmd, res, kind, reason)
	}
	if !errors.Is(err, kind) || reason != "" && !errors.Is(err, reason) {
		w.t.Fatalf("%s: got %v (%v), want kind %s and reason %q", Name(cmd), err, holdfast.KindOf(err), kind, reason)
	}
	if after := w.dump(); before != after {
		w.t.Fatalf("%s was refused (%v) and changed the tables", Name(cmd), err)
	}
}

// dump is the tables in bytes, without the index.
func (w *world) dump() string {
	w.t.Helper()
	v := *w.view
	v.index = 0
	b, err := EncodeSnapshot(&v)
	if err != nil {
		w.t.Fatal(err)
	}
	return string(b)
}

// again applies a command a second time: it must find its effect there.
func (w *world) again(cmd Command) {
	w.t.Helper()
	before := w.dump()
	res := w.must(cmd)
	if res.Changed || before != w.dump() {
		w.t.Fatalf("%s a second time changed the tables: %+v", Name(cmd), res)
	}
}

func TestAttachBegin(t *testing.T) {
	a := newAttached(t)
	// Held by a live node: only a takeover or force.
	a.refused(a.begin(1, 1), holdfast.ErrRefused, ReasonHeld)
	// A stale view of the volume.
	a.refused(a.takeover(1, 0), holdfast.ErrRefused, ReasonStaleRevision)
	// A later epoch than raft's: raft went backwards.
	a.refused(a.takeover(1, 7), holdfast.ErrIntegrity, ReasonMetadataRegression)
	// An instance that is not the announced one.
	old := a.takeover(1, 1)
	old.Instance = newID[holdfast.InstanceID](a.world)
	a.refused(old, holdfast.ErrFenced, ReasonStaleInstance)
	none := a.takeover(1, 1)
	none.Session = holdfast.SessionID{}
	a.refused(none, holdfast.ErrInvalid, "")

	session := a.volume().Session
	take := a.takeover(1, 1)
	res := a.must(take)
	if res.Epoch != 2 || res.Volume.Holder.Node != a.nodes[1] || res.Volume.Phase != PhaseAttaching {
		t.Fatalf("takeover: got %+v", res.Volume)
	}
	if got := res.Volume.Session; got != session {
		t.Fatalf("session after a takeover: got %v, want the old one %v until an activation is lossy", got, session)
	}
	if !slices.Equal(res.Volume.Segments[0].ISR(), a.r) {
		t.Fatalf("in-sync set to fence: got %v, want %v", res.Volume.Segments[0].ISR(), a.r)
	}
	a.again(take)
	// The old writer is fenced in everything.
	a.refused(&ShrinkISR{Segment: a.seg, Epoch: 1, ISRVersion: 2, Replica: a.r[0]}, holdfast.ErrFenced, ReasonStaleEpoch)
	a.refused(&GrowISR{Segment: a.seg, Epoch: 1, ISRVersion: 2, Replica: a.r[0]}, holdfast.ErrFenced, ReasonStaleEpoch)
	a.refused(&Activate{Segment: a.seg, Epoch: 1, ISR: a.r, Continuous: true}, holdfast.ErrFenced, ReasonStaleEpoch)
	a.refused(&Detach{Volume: a.vol, Epoch: 1, Ends: []SegmentEnd{{}}}, holdfast.ErrFenced, ReasonStaleEpoch)
	a.refused(&SetFormat{Volume: a.vol, Epoch: 1, To: holdfast.FormatDoing}, holdfast.ErrFenced, ReasonStaleEpoch)
	a.refused(&StartSync{Segment: a.seg, Epoch: 1, Replica: a.r[0]}, holdfast.ErrFenced, ReasonStaleEpoch)
	// The same takeover by another is late.
	a.refused(a.takeover(2, 1), holdfast.ErrRefused, ReasonStaleRevision)
	// Force takes it from a live holder.
	force := a.begin(2, 2)
	force.Force = true
	if res := a.must(force); res.Epoch != 3 {
		t.Fatalf("force: got epoch %d, want 3", res.Epoch)
	}
}

func TestRestartedNodeAttachesAgainWithoutTakeover(t *testing.T) {
	a := newAttached(t)
	a.instances[0] = newID[holdfast.InstanceID](a.world)
	n := a.node(0)
	have, _ := a.view.Node(n.ID)
	n.Revision = have.Revision
	a.must(&NodeUpdate{Node: n})
	if res := a.must(a.begin(0, 1)); res.Epoch != 2 {
		t.Fatalf("got epoch %d, want 2", res.Epoch)
	}
}

func TestActivate(t *testing.T) {
	a := newAttached(t)
	a.must(&ShrinkISR{Segment: a.seg, Epoch: 1, ISRVersion: 2, Replica: a.r[2], Commit: 50})
	a.must(a.takeover(1, 1))
	// From a replica that is not in sync (R6), or from none.
	a.refused(&Activate{Segment: a.seg, Epoch: 2, S: 60, ISR: []holdfast.ReplicaID{a.r[0], a.r[2]}, Continuous: true}, holdfast.ErrRefused, "")
	a.refused(&Activate{Segment: a.seg, Epoch: 2, S: 60, ISR: nil, Continuous: true}, holdfast.ErrRefused, ReasonLastInSync)
	a.refused(&Activate{Segment: a.seg, Epoch: 2, S: 60, ISR: []holdfast.ReplicaID{a.r[0], a.r[0]}}, holdfast.ErrInvalid, "")
	a.refused(&Activate{Segment: a.seg, Epoch: 2, S: 60, ISR: []holdfast.ReplicaID{newID[holdfast.ReplicaID](a.world)}}, holdfast.ErrRefused, "")
	// Below what is known to be committed, continuous or lossy.
	a.refused(&Activate{Segment: a.seg, Epoch: 2, S: 49, ISR: a.r[:2], Continuous: true}, holdfast.ErrIntegrity, ReasonReplicaRegression)
	a.refused(&Activate{Segment: a.seg, Epoch: 2, S: 49, ISR: a.r[:2]}, holdfast.ErrIntegrity, ReasonReplicaRegression)
	a.refused(&Activate{Segment: holdfast.SegmentID{Volume: a.vol, Index: 1}, Epoch: 2, ISR: a.r[:2]}, holdfast.ErrNotFound, "")

	session := a.volume().Session
	act := &Activate{Segment: a.seg, Epoch: 2, S: 60, ISR: a.r[:1], Continuous: true}
	res := a.must(act)
	if res.Volume.Phase != PhaseAttached || res.Volume.Session != session {
		t.Fatalf("continuous: got phase %v session %v, want attached and %v", res.Volume.Phase, res.Volume.Session, session)
	}
	for i, want := range []holdfast.ReplicaRole{holdfast.RoleInSync, holdfast.RoleStale, holdfast.RoleStale} {
		if got := a.segment().Replica(a.r[i]).Role; got != want {
			t.Fatalf("replica %d: got %v, want %v", i, got, want)
		}
	}
	if got := a.segment().Last(); got != (EpochStart{2, 60, FlagContinuous}) {
		t.Fatalf("history: got %+v", got)
	}
	a.again(act)
	other := *act
	other.S = 61
	a.refused(&other, holdfast.ErrRefused, ReasonStaleISR)
	other = *act
	other.Continuous = false
	a.refused(&other, holdfast.ErrRefused, ReasonStaleISR)
	// The next activation may not start below this one's S.
	a.must(a.takeover(2, 2))
	a.refused(&Activate{Segment: a.seg, Epoch: 3, S: 59, ISR: a.r[:1], Continuous: true}, holdfast.ErrIntegrity, ReasonReplicaRegression)
}

func TestLossyActivationVoidsTheSession(t *testing.T) {
	a := newAttached(t)
	old := a.volume().Session
	take := a.must(a.takeover(1, 1))
	res := a.must(&Activate{Segment: a.seg, Epoch: 2, S: 5, ISR: a.r})
	if res.Volume.Session == old || res.Volume.Session != take.Volume.Offered {
		t.Fatalf("got session %v, want the offered %v", res.Volume.Session, take.Volume.Offered)
	}
}

func TestShrinkAndGrow(t *testing.T) {
	a := newAttached(t)
	v := holdfast.ISRVersion(2)
	a.refused(&ShrinkISR{Segment: a.seg, Epoch: 1, ISRVersion: 1, Replica: a.r[0]}, holdfast.ErrRefused, ReasonStaleISR)
	a.refused(&ShrinkISR{Segment: a.seg, Epoch: 1, ISRVersion: 3, Replica: a.r[0]}, holdfast.ErrRefused, ReasonStaleISR)
	a.refused(&ShrinkISR{Segment: a.seg, Epoch: 1, ISRVersion: v, Replica: newID[holdfast.ReplicaID](a.world)}, holdfast.ErrNotFound, "")
	a.refused(&GrowISR{Segment: a.seg, Epoch: 1, ISRVersion: v, Replica: a.r[0]}, holdfast.ErrRefused, "")

	first := &ShrinkISR{Segment: a.seg, Epoch: 1, ISRVersion: v, Replica: a.r[0], Commit: 10}
	a.must(first)
	a.again(first)
	second := &ShrinkISR{Segment: a.seg, Epoch: 1, ISRVersion: v + 1, Replica: a.r[1], Commit: 8}
	a.must(second)
	if got := a.segment().LastCommit; got != 10 {
		t.Fatalf("last commit: got %d, want 10, which never falls", got)
	}
	// A repeat that is two versions late is refused: its writer reads again.
	a.refused(first, holdfast.ErrRefused, ReasonStaleISR)
	// Never empty.
	a.refused(&ShrinkISR{Segment: a.seg, Epoch: 1, ISRVersion: v + 2, Replica: a.r[2]}, holdfast.ErrRefused, ReasonLastInSync)

	// A failed disk does not come back into the set.
	disk := a.segment().Replica(a.r[0]).Disk
	a.must(&DiskFailed{Disk: disk, OpenCount: 1, Reason: "EIO"})
	a.refused(&GrowISR{Segment: a.seg, Epoch: 1, ISRVersion: v + 2, Replica: a.r[0], Commit: 20}, holdfast.ErrRefused, "")
	grow := &GrowISR{Segment: a.seg, Epoch: 1, ISRVersion: v + 2, Replica: a.r[1], Commit: 20}
	a.must(grow)
	a.again(grow)
	if got := a.segment(); len(got.ISR()) != 2 || got.LastCommit != 20 || got.Replica(a.r[1]).Opened != 1 {
		t.Fatalf("after growing: got %+v", got)
	}
}

func TestNoChangeOfTheSetBeforeActivation(t *testing.T) {
	a := newAttached(t)
	a.must(a.takeover(1, 1))
	a.refused(&ShrinkISR{Segment: a.seg, Epoch: 2, ISRVersion: 2, Replica: a.r[0]}, holdfast.ErrRefused, "")
	a.refused(&GrowISR{Segment: a.seg, Epoch: 2, ISRVersion: 2, Replica: a.r[0]}, holdfast.ErrRefused, "")
}

func TestDetach(t *testing.T) {
	a := newAttached(t)
	end := func(end, commit holdfast.Seq) []SegmentEnd { return []SegmentEnd{{Index: 0, End: end, Commit: commit}} }
	a.refused(&Detach{Volume: a.vol, Epoch: 1}, holdfast.ErrInvalid, "")
	a.refused(&Detach{Volume: a.vol, Epoch: 1, Ends: []SegmentEnd{{Index: 1}}}, holdfast.ErrNotFound, "")
	a.refused(&Detach{Volume: a.vol, Epoch: 1, Ends: append(end(1, 1), end(1, 1)...)}, holdfast.ErrInvalid, "")
	a.refused(&Detach{Volume: a.vol, Epoch: 1, Ends: end(5, 6)}, holdfast.ErrIntegrity, ReasonReplicaRegression)
	detach := &Detach{Volume: a.vol, Epoch: 1, Ends: end(100, 100), Since: 77}
	res := a.must(detach)
	if v := res.Volume; v.Phase != PhaseDetached || v.Holder != (Holder{}) || !v.Session.IsZero() || !v.Segments[0].Clean || v.Segments[0].End != 100 {
		t.Fatalf("got %+v", v)
	}
	a.again(detach)
	a.refused(&ShrinkISR{Segment: a.seg, Epoch: 1, ISRVersion: 2, Replica: a.r[0]}, holdfast.ErrFenced, ReasonStaleEpoch)

	// The next attach may not start below the clean end.
	a.must(a.begin(1, 1))
	a.refused(&Activate{Segment: a.seg, Epoch: 2, S: 99, ISR: a.r, Continuous: true}, holdfast.ErrIntegrity, ReasonReplicaRegression)
	// It gives up before it activates: the end is as clean as it was.
	res = a.must(&Detach{Volume: a.vol, Epoch: 2})
	if !res.Volume.Segments[0].Clean || res.Volume.Segments[0].End != 100 {
		t.Fatalf("after an attach that gave up: got %+v", res.Volume.Segments[0])
	}

	// Activated, then taken over, then given up: nothing is clean any more, as
	// acked writes of epoch 3 may be beyond the old end.
	a.must(a.begin(0, 2))
	a.must(&Activate{Segment: a.seg, Epoch: 3, S: 100, ISR: a.r, Continuous: true})
	a.must(a.takeover(1, 3))
	res = a.must(&Detach{Volume: a.vol, Epoch: 4})
	if res.Volume.Segments[0].Clean {
		t.Fatal("a segment that was written and not ended is called clean")
	}

	// An end that is not committed everywhere is not clean either.
	a.must(a.begin(0, 4))
	a.must(&Activate{Segment: a.seg, Epoch: 5, S: 120, ISR: a.r, Continuous: true})
	res = a.must(&Detach{Volume: a.vol, Epoch: 5, Ends: end(130, 125)})
	if s := res.Volume.Segments[0]; s.Clean || s.LastCommit != 125 {
		t.Fatalf("got %+v, want unclean at commit 125", s)
	}
}

func TestSeveralSegmentsActivateOneByOne(t *testing.T) {
	w := newWorld(t, 3)
	c := w.createCommand("big", 3<<30, 1<<30, 2)
	vol := w.must(c).Volume
	if len(vol.Segments) != 3 || vol.Segments[2].Size != 1<<30 {
		t.Fatalf("segments: got %+v", vol.Segments)
	}
	w.must(&AttachBegin{Volume: vol.ID, Node: w.nodes[0], Instance: w.instances[0], Session: newID[holdfast.SessionID](w)})
	for i := range uint32(3) {
		res := w.must(&Activate{Segment: holdfast.SegmentID{Volume: vol.ID, Index: i}, Epoch: 1, ISR: vol.Segments[i].ISR(), Continuous: true})
		want := PhaseAttaching
		if i == 2 {
			want = PhaseAttached
		}
		if res.Volume.Phase != want {
			t.Fatalf("after segment %d: got %v, want %v", i, res.Volume.Phase, want)
		}
	}
	w.must(&Detach{Volume: vol.ID, Epoch: 1, Ends: []SegmentEnd{{Index: 0}, {Index: 1, End: 5, Commit: 5}, {Index: 2}}})
}

func TestSetFormatOnlyForward(t *testing.T) {
	a := newAttached(t)
	set := func(to holdfast.FormatState) *SetFormat { return &SetFormat{Volume: a.vol, Epoch: 1, To: to} }
	a.refused(set(holdfast.FormatDone), holdfast.ErrRefused, "")
	a.must(set(holdfast.FormatDoing))
	a.again(set(holdfast.FormatDoing))
	a.refused(set(holdfast.FormatNone), holdfast.ErrRefused, "")
	a.must(set(holdfast.FormatDone))
	a.again(set(holdfast.FormatDone))
	a.refused(set(holdfast.FormatDoing), holdfast.ErrRefused, "")
	a.refused(set(holdfast.FormatNone), holdfast.ErrRefused, "")
}

func TestHistoryPruning(t *testing.T) {
	a := newAttached(t)
	v := holdfast.Epoch(1)
	cycle := func(isr []holdfast.ReplicaID) {
		a.must(a.takeover(int(v)%2, v))
		v++
		a.must(&Activate{Segment: a.seg, Epoch: v, S: holdfast.Seq(v), ISR: isr, Continuous: true})
	}
	// Everyone opens every epoch: one entry is enough.
	cycle(a.r)
	cycle(a.r)
	if got := a.segment().History; len(got) != 1 || got[0].Epoch != 3 {
		t.Fatalf("all opened epoch 3: history got %+v", got)
	}
	// Replica 2 stays behind at epoch 3: all from there on is kept for it.
	for range 5 {
		cycle(a.r[:2])
	}
	if got := a.segment().History; len(got) != 6 || got[0].Epoch != 3 {
		t.Fatalf("one stayed at epoch 3: history got %+v", got)
	}
	if r := *a.segment().Replica(a.r[2]); a.segment().CountsAsEmpty(r) {
		t.Fatal("the replica that stayed counts as empty though its epoch is kept")
	}
	// Its tail, ending in epoch 3, is cut where epoch 4 began.
	if got := a.segment().EffectiveTail(1000, 3); got != 4 {
		t.Fatalf("effective tail: got %d, want 4", got)
	}
	if got := a.segment().EffectiveTail(1000, v); got != 1000 {
		t.Fatalf("effective tail in the last epoch: got %d, want 1000", got)
	}
	// Beyond the limit it counts as empty.
	for range MaxHistory {
		cycle(a.r[:2])
	}
	if got := len(a.segment().History); got != MaxHistory {
		t.Fatalf("history: got %d entries, want %d", got, MaxHistory)
	}
	if r := *a.segment().Replica(a.r[2]); !a.segment().CountsAsEmpty(r) {
		t.Fatal("a replica older than the oldest kept epoch does not count as empty")
	}
	// When it is to be deleted, nothing is kept for it.
	seg := a.segment()
	a.must(&RemoveReplica{Segment: a.seg, LayoutVersion: seg.LayoutVersion, Replica: a.r[2], Force: true})
	if got := len(a.segment().History); got != 1 {
		t.Fatalf("after the removal: history got %d entries, want 1", got)
	}
}
