package state

import (
	"fmt"
	"slices"
	"testing"

	"github.com/holdfast-storage/holdfast"
)

// ended is a world with a volume that was detached in order at seq 9, with three
// copies in sync and a fourth, empty one.
func ended(t testing.TB) (*attached, holdfast.ReplicaID) {
	a := newAttached(t)
	a.must(&Detach{Volume: a.vol, Epoch: 1, Ends: []SegmentEnd{{End: 9, Commit: 9}}})
	free := a.disks[slices.IndexFunc(a.disks, func(d holdfast.DiskID) bool {
		return !slices.ContainsFunc(a.segment().Replicas, func(r Replica) bool { return r.Disk == d })
	})]
	add := &AddReplica{Segment: a.seg, LayoutVersion: 1, Replica: newID[holdfast.ReplicaID](a.world), Disk: free}
	a.must(add)
	return a, add.Replica
}

// repair begins a maintenance attachment.
func (a *attached) repair(node int, expect holdfast.Epoch) *AttachBegin {
	return &AttachBegin{Volume: a.vol, Node: a.nodes[node], Instance: a.instances[node], Expect: expect, Maintenance: true, Since: 77}
}

func (a *attached) isr() holdfast.ISRVersion { return a.segment().ISRVersion }

// unseen checks that a user sees a detached volume, as clean as it was left.
func (a *attached) unseen(when string) {
	a.t.Helper()
	v := a.volume()
	if v.Phase != PhaseDetached || v.Holder != (Holder{}) || v.Since != 0 || !v.Session.IsZero() || !v.Offered.IsZero() || v.State() != holdfast.VolumeDetached {
		a.t.Fatalf("%s, a user sees %+v", when, v)
	}
	if s := a.segment(); !s.Clean || s.End != 9 || s.Floor() != 9 {
		a.t.Fatalf("%s, the segment is not as it was detached: %+v", when, s)
	}
}

func TestRepair(t *testing.T) {
	a, fresh := ended(t)
	begin := a.repair(0, 1)
	a.must(begin)
	a.again(begin)
	a.unseen("begun")
	if r := a.volume().Repair; r.Holder != (Holder{a.nodes[0], a.instances[0]}) || r.Since != 77 || r.Tries != 1 {
		t.Fatalf("begun: got %+v", r)
	}
	act := &Activate{Segment: a.seg, Epoch: 2, S: 9, ISR: a.r, Continuous: true}
	a.must(act)
	a.again(act)
	a.unseen("activated")
	a.refused(&SetFormat{Volume: a.vol, Epoch: 2, To: holdfast.FormatDoing}, holdfast.ErrRefused, "")
	grow := &GrowISR{Segment: a.seg, Epoch: 2, ISRVersion: a.isr(), Replica: fresh, Commit: 9}
	a.must(grow)
	a.again(grow)
	a.unseen("filled")
	end := &Detach{Volume: a.vol, Epoch: 2, Ends: []SegmentEnd{{End: 9, Commit: 9}}, Since: 99}
	a.must(end)
	a.again(end)
	a.unseen("detached")
	if v := a.volume(); v.Repair != (Repair{}) || len(v.Segments[0].ISR()) != 4 {
		t.Fatalf("in the end: %+v", v)
	}
	// It is over: nothing of its epoch counts any more.
	a.refused(&ShrinkISR{Segment: a.seg, Epoch: 2, ISRVersion: a.isr(), Replica: fresh}, holdfast.ErrFenced, ReasonStaleEpoch)
}

// TestRepairWritesNothing: whatever a repair says, it begins and ends where the
// volume was detached, so the volume is as clean as before.
func TestRepairWritesNothing(t *testing.T) {
	a, fresh := ended(t)
	a.must(a.repair(0, 1))
	for _, act := range []Activate{{S: 9}, {S: 10, Continuous: true}, {S: 8, Continuous: true}} {
		act.Segment, act.Epoch, act.ISR = a.seg, 2, a.r
		a.refused(&act, holdfast.ErrIntegrity, ReasonReplicaRegression)
	}
	a.must(&Activate{Segment: a.seg, Epoch: 2, S: 9, ISR: a.r, Continuous: true})
	a.refused(&GrowISR{Segment: a.seg, Epoch: 2, ISRVersion: a.isr(), Replica: fresh, Commit: 10}, holdfast.ErrIntegrity, ReasonReplicaRegression)
	a.refused(&ShrinkISR{Segment: a.seg, Epoch: 2, ISRVersion: a.isr(), Replica: a.r[0], Commit: 10}, holdfast.ErrIntegrity, ReasonReplicaRegression)
	for _, e := range []SegmentEnd{{End: 10, Commit: 10}, {End: 10, Commit: 9}, {End: 9, Commit: 8}} {
		a.refused(&Detach{Volume: a.vol, Epoch: 2, Ends: []SegmentEnd{e}}, holdfast.ErrIntegrity, "")
	}
	a.unseen("after all that")
}

func TestRepairRefusals(t *testing.T) {
	a, _ := ended(t)
	a.refused(a.repair(0, 0), holdfast.ErrRefused, ReasonStaleRevision)
	a.refused(a.repair(0, 2), holdfast.ErrIntegrity, ReasonMetadataRegression)
	for _, change := range []func(*AttachBegin){func(c *AttachBegin) { c.Force = true }, func(c *AttachBegin) { c.Session = newID[holdfast.SessionID](a.world) }} {
		c := a.repair(0, 1)
		change(c)
		a.refused(c, holdfast.ErrInvalid, "")
	}
	old := a.repair(0, 1)
	old.Instance = newID[holdfast.InstanceID](a.world)
	a.refused(old, holdfast.ErrFenced, ReasonStaleInstance)
	a.must(a.repair(0, 1))
	// Another node only takes it over, and then the first is fenced.
	a.refused(a.repair(1, 2), holdfast.ErrRefused, ReasonHeld)
	take := a.repair(1, 2)
	take.Takeover = true
	if r := a.must(take).Volume.Repair; r.Tries != 2 || r.Holder.Node != a.nodes[1] {
		t.Fatalf("taken over: got %+v", r)
	}
	a.refused(&Activate{Segment: a.seg, Epoch: 2, S: 9, ISR: a.r, Continuous: true}, holdfast.ErrFenced, ReasonStaleEpoch)
	a.refused(&EndRepair{Volume: a.vol, Epoch: 2}, holdfast.ErrFenced, ReasonStaleEpoch)

	// Not while somebody has it, and not what was left in disorder: a salvaged
	// volume's first start is lossy, and a user's.
	b := newAttached(t)
	b.refused(b.repair(0, 1), holdfast.ErrRefused, ReasonHeld)
	b.must(b.takeover(1, 1))
	b.refused(b.repair(0, 2), holdfast.ErrRefused, ReasonHeld)
	b.must(&ForceRecover{Volume: b.vol, Expect: 2, Lineage: newID[holdfast.LineageID](b.world), Choices: []SalvageChoice{{Replica: b.r[0]}}})
	b.refused(b.repair(0, 3), holdfast.ErrRefused, "")
}

// repairSteps are the points at which a user may come.
var repairSteps = []struct {
	name string
	do   func(a *attached, fresh holdfast.ReplicaID)
}{
	{"not begun", func(*attached, holdfast.ReplicaID) {}},
	{"begun", func(a *attached, _ holdfast.ReplicaID) { a.must(a.repair(0, 1)) }},
	{"activated", func(a *attached, _ holdfast.ReplicaID) {
		a.must(&Activate{Segment: a.seg, Epoch: 2, S: 9, ISR: a.r, Continuous: true})
	}},
	{"one left out", func(a *attached, _ holdfast.ReplicaID) {
		a.must(&ShrinkISR{Segment: a.seg, Epoch: 2, ISRVersion: a.isr(), Replica: a.r[2], Commit: 9})
	}},
	{"filled", func(a *attached, fresh holdfast.ReplicaID) {
		a.must(&GrowISR{Segment: a.seg, Epoch: 2, ISRVersion: a.isr(), Replica: fresh, Commit: 9})
	}},
	{"given up", func(a *attached, _ holdfast.ReplicaID) {
		a.must(&EndRepair{Volume: a.vol, Epoch: 2, Since: 88, Why: "no progress"})
	}},
	{"taken over", func(a *attached, _ holdfast.ReplicaID) { a.must(a.repair(1, 2)) }},
	{"activated again", func(a *attached, _ holdfast.ReplicaID) {
		a.must(&Activate{Segment: a.seg, Epoch: 3, S: 9, ISR: a.segment().ISR(), Continuous: true})
	}},
	{"detached", func(a *attached, _ holdfast.ReplicaID) {
		a.must(&Detach{Volume: a.vol, Epoch: 3, Ends: []SegmentEnd{{End: 9, Commit: 9}}})
	}},
}

// TestUsersComeFirst: at whatever point of a repair a user attaches, it is given
// the next epoch at once, by no force, from a clean volume; what the repair still
// asks for is refused.
func TestUsersComeFirst(t *testing.T) {
	for n := range repairSteps {
		t.Run(repairSteps[n].name, func(t *testing.T) {
			a, fresh := ended(t)
			for _, s := range repairSteps[:n+1] {
				s.do(a, fresh)
				a.unseen(s.name)
			}
			epoch := a.volume().Epoch
			left := a.segment().ISR()
			res := a.must(a.begin(2, epoch))
			if v := res.Volume; v.Epoch != epoch+1 || v.Phase != PhaseAttaching || v.Holder.Node != a.nodes[2] || v.Repair != (Repair{}) || !v.Clean() || v.Segments[0].End != 9 {
				t.Fatalf("the user got %+v", v)
			}
			if epoch > 1 { // the one that repaired
				for _, cmd := range []Command{
					&Activate{Segment: a.seg, Epoch: epoch, S: 9, ISR: left, Continuous: true},
					&GrowISR{Segment: a.seg, Epoch: epoch, ISRVersion: a.isr(), Replica: fresh, Commit: 9},
					&ShrinkISR{Segment: a.seg, Epoch: epoch, ISRVersion: a.isr(), Replica: left[0], Commit: 9},
					&Detach{Volume: a.vol, Epoch: epoch, Ends: []SegmentEnd{{End: 9, Commit: 9}}},
					&EndRepair{Volume: a.vol, Epoch: epoch},
				} {
					a.refused(cmd, holdfast.ErrFenced, ReasonStaleEpoch)
				}
			}
			late := a.repair(0, epoch) // was on its way
			a.refused(late, holdfast.ErrRefused, ReasonStaleRevision)
			session := a.volume().Session
			a.must(&Activate{Segment: a.seg, Epoch: epoch + 1, S: 9, ISR: left, Continuous: true})
			if v := a.volume(); v.Phase != PhaseAttached || v.Session != session || a.segment().Clean {
				t.Fatalf("the user's attachment: %+v", v)
			}
		})
	}
}

// TestRepairIsInNobodysWay: what an operator may do with a detached volume goes on
// at every point of a repair, and ends it where it must.
func TestRepairIsInNobodysWay(t *testing.T) {
	for n := range repairSteps {
		for name, cmd := range map[string]func(a *attached, fresh holdfast.ReplicaID) Command{
			"delete": func(a *attached, _ holdfast.ReplicaID) Command { return &DeleteVolume{Volume: a.vol} },
			"resize": func(a *attached, _ holdfast.ReplicaID) Command {
				return &ResizeVolume{Volume: a.vol, From: 1 << 30, To: 2 << 30}
			},
			"salvage": func(a *attached, _ holdfast.ReplicaID) Command {
				return &ForceRecover{Volume: a.vol, Expect: a.volume().Epoch, Lineage: newID[holdfast.LineageID](a.world), Choices: []SalvageChoice{{Replica: a.r[1]}}}
			},
			"rename": func(a *attached, _ holdfast.ReplicaID) Command {
				return &Rename{Volume: a.vol, From: "data", To: "other"}
			},
			"fewer replicas": func(a *attached, _ holdfast.ReplicaID) Command {
				to := a.volume().Options
				to.Replicas = 2
				return &UpdateVolume{Volume: a.vol, From: a.volume().Options, To: to}
			},
			"drop the new one": func(a *attached, fresh holdfast.ReplicaID) Command {
				return &RemoveReplica{Segment: a.seg, LayoutVersion: a.segment().LayoutVersion, Replica: fresh}
			},
		} {
			t.Run(fmt.Sprintf("%s when %s", name, repairSteps[n].name), func(t *testing.T) {
				a, fresh := ended(t)
				for _, s := range repairSteps[:n+1] {
					s.do(a, fresh)
				}
				if r := a.segment().Replica(fresh); name == "drop the new one" && r.Role == holdfast.RoleInSync && len(a.segment().ISR()) < 4 {
					a.must(&UpdateVolume{Volume: a.vol, From: a.volume().Options, To: func() VolumeOptions { o := a.volume().Options; o.Replicas = 2; return o }()})
				}
				c := cmd(a, fresh)
				a.must(c)
				if name == "delete" || name == "resize" || name == "salvage" {
					if a.volume().UnderRepair() {
						t.Fatalf("the repair goes on: %+v", a.volume().Repair)
					}
				}
			})
		}
	}
}

// TestRemovedNodeRepairsNoMore: a node that only repairs is removed like any other.
func TestRemovedNodeRepairsNoMore(t *testing.T) {
	a, _ := ended(t)
	a.addNode()
	last := len(a.nodes) - 1
	a.must(a.repair(last, 1))
	a.must(&NodeRemove{Node: a.nodes[last]})
	if r := a.volume().Repair; a.volume().UnderRepair() || r.Tries != 1 || r.Why == "" {
		t.Fatalf("got %+v, want a repair that ended, and why", r)
	}
	a.refused(&Activate{Segment: a.seg, Epoch: 2, S: 9, ISR: a.r, Continuous: true}, holdfast.ErrFenced, ReasonStaleEpoch)
}

// TestTriesAreCounted: each repair counts until one gets something done, or what
// it met has changed.
func TestTriesAreCounted(t *testing.T) {
	a, fresh := ended(t)
	fail := func(want uint32) {
		t.Helper()
		e := a.volume().Epoch
		a.must(a.repair(0, e))
		end := &EndRepair{Volume: a.vol, Epoch: e + 1, Since: 5, Why: "no progress for 2m0s"}
		a.must(end)
		a.again(end)
		if r := a.volume().Repair; r.Tries != want || r.Why != end.Why || r.Since != 5 || a.volume().UnderRepair() {
			t.Fatalf("got %+v, want %d tries", r, want)
		}
	}
	fail(1)
	fail(2)
	fail(3)
	a.must(&RemoveReplica{Segment: a.seg, LayoutVersion: a.segment().LayoutVersion, Replica: fresh})
	if r := a.volume().Repair; r != (Repair{}) {
		t.Fatalf("the replica it could not fill is gone: got %+v", r)
	}
	fail(1)
	fail(2)
	a.must(a.repair(0, a.volume().Epoch))
	a.must(&Activate{Segment: a.seg, Epoch: a.volume().Epoch, S: 9, ISR: a.r[:2], Continuous: true})
	if r := a.volume().Repair; r.Tries != 3 {
		t.Fatalf("activated: got %+v", r)
	}
	a.must(&GrowISR{Segment: a.seg, Epoch: a.volume().Epoch, ISRVersion: a.isr(), Replica: a.r[2], Commit: 9})
	if r := a.volume().Repair; r.Tries != 1 || r.Why != "" {
		t.Fatalf("a replica came in: got %+v", r)
	}
}

// TestRepairOfSomeSegments: one that ended before every segment was activated.
func TestRepairOfSomeSegments(t *testing.T) {
	w := newWorld(t, 3)
	vol := w.must(w.createCommand("data", 2<<30, 1<<30, 2)).Volume
	begin := &AttachBegin{Volume: vol.ID, Node: w.nodes[0], Instance: w.instances[0], Maintenance: true}
	w.must(begin)
	seg := holdfast.SegmentID{Volume: vol.ID, Index: 1}
	w.must(&Activate{Segment: seg, Epoch: 1, ISR: vol.Segments[1].ISR(), Continuous: true})
	w.refused(&Detach{Volume: vol.ID, Epoch: 1, Ends: []SegmentEnd{{Index: 0}, {Index: 1}}}, holdfast.ErrInvalid, "")
	w.must(&EndRepair{Volume: vol.ID, Epoch: 1, Why: "no progress"})
	begin.Expect = 1
	w.must(begin)
	res := w.must(&Detach{Volume: vol.ID, Epoch: 2, Ends: nil})
	if v := res.Volume; !v.Clean() || v.Phase != PhaseDetached || v.Segments[0].Last().Epoch != 0 || v.Segments[1].Last().Epoch != 1 {
		t.Fatalf("got %+v", v)
	}
}

// TestNothingIsLeftToDo: a repair whose node died when it had done everything.
func TestNothingIsLeftToDo(t *testing.T) {
	a, _ := ended(t)
	a.must(a.repair(0, 1))
	a.must(&EndRepair{Volume: a.vol, Epoch: 2, Since: 5})
	if r := a.volume().Repair; r != (Repair{}) {
		t.Fatalf("got %+v", r)
	}
	a.unseen("ended")
}

// TestLeavingUnderRepair: while a repair runs, the in-sync set is its writer's.
func TestLeavingUnderRepair(t *testing.T) {
	a, fresh := ended(t)
	a.must(a.repair(0, 1))
	a.must(&Activate{Segment: a.seg, Epoch: 2, S: 9, ISR: a.r, Continuous: true})
	a.must(&GrowISR{Segment: a.seg, Epoch: 2, ISRVersion: a.isr(), Replica: fresh, Commit: 9})
	version := a.isr()
	a.must(&RemoveReplica{Segment: a.seg, LayoutVersion: 2, Replica: a.r[1]})
	if r := a.segment().Replica(a.r[1]); r.Role != holdfast.RoleInSync || !r.Leaving || a.isr() != version {
		t.Fatalf("got %+v at version %d, want it in sync until the writer took it out", r, a.isr())
	}
	a.must(&ShrinkISR{Segment: a.seg, Epoch: 2, ISRVersion: version, Replica: a.r[1], Commit: 9})
	if r := a.segment().Replica(a.r[1]); r.Role != holdfast.RoleDeleting {
		t.Fatalf("got %+v, want it deleted", r)
	}
}
