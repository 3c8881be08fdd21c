package state

import (
	"testing"

	"github.com/holdfast-storage/holdfast"
)

// roles are those of the segment's replicas, in order.
func (a *attached) roles() (roles []holdfast.ReplicaRole) {
	for _, r := range a.segment().Replicas {
		roles = append(roles, r.Role)
	}
	return roles
}

func (a *attached) wantRoles(want ...holdfast.ReplicaRole) {
	a.t.Helper()
	got := a.roles()
	if len(got) != len(want) {
		a.t.Fatalf("roles: got %v, want %v", got, want)
	}
	for i := range want {
		if got[i] != want[i] {
			a.t.Fatalf("roles: got %v, want %v", got, want)
		}
	}
}

func (a *attached) salvage(replica int) *ForceRecover {
	return &ForceRecover{Volume: a.vol, Expect: a.volume().Epoch, Lineage: newID[holdfast.LineageID](a.world), Since: 99,
		Choices: []SalvageChoice{{Replica: a.r[replica]}}}
}

// shrink drops a replica in the present epoch, with a commit.
func (a *attached) shrink(replica int, commit holdfast.Seq) {
	a.t.Helper()
	a.must(&ShrinkISR{Segment: a.seg, Epoch: a.volume().Epoch, ISRVersion: a.segment().ISRVersion, Replica: a.r[replica], Commit: commit})
}

func TestSalvage(t *testing.T) {
	const (
		inSync, stale, syncing, orphan, deleting = holdfast.RoleInSync, holdfast.RoleStale, holdfast.RoleSyncing, holdfast.RoleOrphan, holdfast.RoleDeleting
	)
	a := newAttached(t)
	lineage, session := a.volume().Lineage, a.volume().Session
	// Two replicas fall behind at 40 and 50; raft hears of commits up to 100 from the last.
	a.shrink(1, 40)
	a.shrink(2, 50)
	a.must(&StartSync{Segment: a.seg, Epoch: 1, Replica: a.r[2]})
	a.must(a.takeover(0, 1))
	a.must(&Activate{Segment: a.seg, Epoch: 2, S: 100, ISR: a.r[:1], Continuous: true})
	a.wantRoles(inSync, stale, syncing)

	// What is half filled holds no one state.
	a.refused(a.salvage(2), holdfast.ErrRefused, "")
	c := a.salvage(1)
	c.Expect--
	a.refused(c, holdfast.ErrRefused, ReasonStaleRevision)
	c = a.salvage(1)
	c.Lineage = lineage
	a.refused(c, holdfast.ErrInvalid, "")
	c.Lineage = holdfast.LineageID{}
	a.refused(c, holdfast.ErrInvalid, "")
	c = a.salvage(1)
	c.Choices = nil
	a.refused(c, holdfast.ErrInvalid, "")
	c = a.salvage(1)
	c.Choices = append(c.Choices, c.Choices[0])
	a.refused(c, holdfast.ErrInvalid, "")
	c = a.salvage(1)
	c.Choices[0].Index = 1
	a.refused(c, holdfast.ErrNotFound, "")
	c = a.salvage(1)
	c.Choices[0].Replica = newID[holdfast.ReplicaID](a.world)
	a.refused(c, holdfast.ErrNotFound, "")
	c = a.salvage(1)
	c.Volume = newID[holdfast.VolumeID](a.world)
	a.refused(c, holdfast.ErrNotFound, "")

	c = a.salvage(1)
	res := a.must(c)
	a.again(c)
	a.wantRoles(orphan, inSync, deleting)
	v := a.volume()
	if v.Epoch != 3 || res.Epoch != 3 || v.Phase != PhaseDetached || v.Holder != (Holder{}) || v.Lineage != c.Lineage || !v.Session.IsZero() || v.Since != 99 {
		t.Fatalf("after a salvage: got %+v", v)
	}
	for _, r := range a.segment().Replicas {
		if r.Lineage != lineage {
			t.Errorf("replica %v: its disk answers to lineage %v, got %v", r.ID, lineage, r.Lineage)
		}
	}
	// The writer of before is fenced, the next starts where the replica ends.
	a.refused(&ShrinkISR{Segment: a.seg, Epoch: 2, ISRVersion: a.segment().ISRVersion, Replica: a.r[1]}, holdfast.ErrFenced, ReasonStaleEpoch)
	a.refused(&GrowISR{Segment: a.seg, Epoch: 2, ISRVersion: a.segment().ISRVersion, Replica: a.r[0]}, holdfast.ErrFenced, ReasonStaleEpoch)
	a.must(a.begin(1, 3))
	a.refused(&Activate{Segment: a.seg, Epoch: 4, S: 45, ISR: a.r[:1]}, holdfast.ErrRefused, "") // an orphan
	act := &Activate{Segment: a.seg, Epoch: 4, S: 45, ISR: a.r[1:2], Continuous: true}
	res = a.must(act)
	a.again(act)
	if got := a.segment().Last().Flags; got != FlagForced|FlagLossy {
		t.Errorf("flags of the first activation: got %b, want forced and lossy", got)
	}
	if res.Volume.Session == session || res.Volume.Session.IsZero() {
		t.Errorf("session: got %v, want a new one (it was %v)", res.Volume.Session, session)
	}
	if a.segment().Salvaged || a.segment().Floor() != 45 {
		t.Errorf("after the first activation: got %+v, want no mark and floor 45", a.segment())
	}
	// From here it is bound again.
	a.must(a.takeover(2, 4))
	a.refused(&Activate{Segment: a.seg, Epoch: 5, S: 44, ISR: a.r[1:2], Continuous: true}, holdfast.ErrIntegrity, ReasonReplicaRegression)
	a.must(&Activate{Segment: a.seg, Epoch: 5, S: 45, ISR: a.r[1:2], Continuous: true})
	if got := a.segment().Last().Flags; got != FlagContinuous {
		t.Errorf("flags of the second activation: got %b, want continuous", got)
	}

	// An abandoned replica does not keep another from its node, and goes without force.
	layout := a.segment().LayoutVersion
	fresh := newID[holdfast.ReplicaID](a.world)
	disk := a.segment().Replicas[0].Disk
	a.must(&AddReplica{Segment: a.seg, LayoutVersion: layout, Replica: fresh, Disk: disk})
	if r := a.segment().Replica(fresh); r.Lineage != c.Lineage {
		t.Errorf("a replica added after the salvage is of lineage %v, want %v", r.Lineage, c.Lineage)
	}
	a.must(&RemoveReplica{Segment: a.seg, LayoutVersion: layout + 1, Replica: a.r[0]})
	a.wantRoles(deleting, inSync, deleting, syncing)
	a.must(&ReplicaGone{Replica: a.r[0]})
}

// TestSalvageBack: what was abandoned can be gone back to, and is then cut by
// what it took part in only.
func TestSalvageBack(t *testing.T) {
	a := newAttached(t)
	a.shrink(1, 40)
	a.must(a.takeover(0, 1))
	a.must(&Activate{Segment: a.seg, Epoch: 2, S: 90, ISR: []holdfast.ReplicaID{a.r[0], a.r[2]}, Continuous: true})
	if got := a.segment().EffectiveTail(60, 1); got != 60 {
		t.Fatalf("before: effective tail of 60 got %d", got)
	}
	if got := a.segment().EffectiveTail(95, 1); got != 90 {
		t.Fatalf("before: effective tail of 95 got %d, want 90", got)
	}
	// To replica 1, which ends at 55: from now on everything of epochs 1 and 2
	// is cut at 55, also by an epoch that comes after another start.
	a.must(a.salvage(1)) // epoch 3
	a.must(a.begin(3, 3))
	a.must(&Activate{Segment: a.seg, Epoch: 4, S: 55, ISR: a.r[1:2]})
	if got := a.segment().EffectiveTail(95, 1); got != 55 {
		t.Errorf("entries of epoch 1 up to 95: effective tail %d, want 55", got)
	}
	if got := a.segment().EffectiveTail(200, 2); got != 55 {
		t.Errorf("entries of epoch 2 up to 200: effective tail %d, want 55", got)
	}
	// The nodes of the others come back: the operator wants the newer state after all.
	a.must(a.salvage(2)) // epoch 5
	if got := a.segment().EffectiveTail(200, 2); got != 200 {
		t.Errorf("gone back to: effective tail of what epoch 2 wrote is %d, want all 200", got)
	}
	if got := a.segment().EffectiveTail(95, 1); got != 90 {
		t.Errorf("gone back to: effective tail of what epoch 1 left is %d, want 90", got)
	}
	a.must(a.begin(2, 5))
	a.must(&Activate{Segment: a.seg, Epoch: 6, S: 200, ISR: a.r[2:3]})
	a.wantRoles(holdfast.RoleOrphan, holdfast.RoleOrphan, holdfast.RoleInSync)
	if got := a.segment().Floor(); got != 200 {
		t.Errorf("floor: got %d, want 200", got)
	}
}

// TestSalvageOfOneSegment leaves the others as they are.
func TestSalvageOfOneSegment(t *testing.T) {
	w := newWorld(t, 3)
	cmd := w.createCommand("data", 3<<20, 1<<20, 2)
	w.must(cmd)
	v, _ := w.view.Volume(cmd.Volume)
	chosen := v.Segments[1].Replicas[1].ID
	w.must(&ForceRecover{Volume: v.ID, Choices: []SalvageChoice{{Index: 1, Replica: chosen}}, Lineage: newID[holdfast.LineageID](w)})
	after, _ := w.view.Volume(cmd.Volume)
	for i := range after.Segments {
		s := &after.Segments[i]
		want := 2
		if i == 1 {
			want = 1
		}
		if len(s.ISR()) != want || s.Salvaged != (i == 1) || s.Clean == (i == 1) {
			t.Errorf("segment %d: got %+v", i, s)
		}
	}
	if !after.Segments[1].Salvaged || after.Segments[1].ISR()[0] != chosen {
		t.Errorf("segment 1: got %+v, want %v alone in sync", after.Segments[1], chosen)
	}
	// A failed disk cannot be gone on from.
	r := after.Segments[0].Replicas[0]
	d, _ := w.view.Disk(r.Disk)
	w.must(&DiskFailed{Disk: d.ID, OpenCount: d.OpenCount, Reason: "EIO"})
	w.refused(&ForceRecover{Volume: v.ID, Expect: after.Epoch, Choices: []SalvageChoice{{Index: 0, Replica: r.ID}}, Lineage: newID[holdfast.LineageID](w)}, holdfast.ErrRefused, "")
}
