package controller

import (
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

// fleet is a cluster's tables with the writers, disks and nodes that act on them.
type fleet struct {
	t     testing.TB
	view  *state.View
	index uint64
	nodes []holdfast.NodeID
	inst  []holdfast.InstanceID
	disks []holdfast.DiskID
	gone  map[holdfast.NodeID]bool
	lost  map[holdfast.NodeID]bool
	vols  []holdfast.VolumeID
	rests map[holdfast.VolumeID]time.Duration // how long a volume is still left alone
}

func newFleet(t testing.TB, zones ...string) *fleet {
	f := &fleet{t: t, view: &state.View{}, gone: map[holdfast.NodeID]bool{}, lost: map[holdfast.NodeID]bool{}, rests: map[holdfast.VolumeID]time.Duration{}}
	f.must(&state.InitCluster{ID: holdfast.NewID[holdfast.ClusterID](), Level: holdfast.Level1})
	for i, zone := range zones {
		n := state.Node{ID: holdfast.NewID[holdfast.NodeID](), Name: fmt.Sprintf("n%d", i+1), Instance: holdfast.NewID[holdfast.InstanceID](), HasDisks: true,
			Version: "test", MaxLevel: holdfast.Level1, Addresses: state.Addresses{API: "a:1", Data: "a:2", Raft: "a:3"}}
		if zone != "" {
			n.Labels = state.Labels{{Key: "zone", Value: zone}}
		}
		d := holdfast.NewID[holdfast.DiskID]()
		f.nodes, f.inst, f.disks = append(f.nodes, n.ID), append(f.inst, n.Instance), append(f.disks, d)
		f.must(&state.NodeJoin{Node: n})
		f.must(&state.DiskOpen{Disk: d, Node: n.ID, Instance: n.Instance, OpenCount: 1, Size: 1 << 40, Free: 1 << 40})
	}
	return f
}

func (f *fleet) apply(cmd state.Command) (state.Result, error) {
	f.index++
	next, res, err := f.view.Apply(f.index, cmd)
	f.view = next
	return res, err
}

func (f *fleet) must(cmd state.Command) state.Result {
	f.t.Helper()
	res, err := f.apply(cmd)
	if err != nil {
		f.t.Fatalf("%s %+v: %v", state.Name(cmd), cmd, err)
	}
	return res
}

// volume makes a volume on the disks given and attaches it at a node, if that is
// not below zero.
func (f *fleet) volume(at int, on ...int) holdfast.VolumeID {
	f.t.Helper()
	c := &state.CreateVolume{Volume: holdfast.NewID[holdfast.VolumeID](), Name: fmt.Sprintf("v%d", len(f.vols)), Size: 1 << 30, Lineage: holdfast.NewID[holdfast.LineageID](),
		Options: state.VolumeOptions{Replicas: len(on), SegmentSize: 64 << 30, AckMode: holdfast.AckReceived, MinCopies: 1}}
	var p state.SegmentPlacement
	for _, i := range on {
		p = append(p, state.ReplicaPlacement{Replica: holdfast.NewID[holdfast.ReplicaID](), Disk: f.disks[i]})
	}
	c.Placement = []state.SegmentPlacement{p}
	f.must(c)
	f.vols = append(f.vols, c.Volume)
	if at >= 0 {
		f.attach(c.Volume, at)
	}
	return c.Volume
}

func (f *fleet) attach(id holdfast.VolumeID, at int) {
	f.t.Helper()
	v, _ := f.view.Volume(id)
	f.must(&state.AttachBegin{Volume: id, Node: f.nodes[at], Instance: f.inst[at], Expect: v.Epoch, Session: holdfast.NewID[holdfast.SessionID](), Takeover: true})
	v, _ = f.view.Volume(id)
	f.must(&state.Activate{Segment: holdfast.SegmentID{Volume: id}, Epoch: v.Epoch, S: v.Segments[0].Floor(), ISR: v.Segments[0].ISR(), Continuous: true})
}

func (f *fleet) segment(id holdfast.VolumeID) *state.Segment {
	v, _ := f.view.Volume(id)
	return &v.Segments[0]
}

func (f *fleet) situation() Situation {
	return Situation{Gone: func(id holdfast.NodeID) bool { return f.gone[id] }, Lost: func(id holdfast.NodeID) bool { return f.lost[id] },
		Paused: func(v *state.Volume) time.Duration { return f.rests[v.ID] }, Now: 1000,
		NewReplica: holdfast.NewID[holdfast.ReplicaID]}
}

// round plans and applies; it returns what was proposed.
func (f *fleet) round() []state.Command {
	f.t.Helper()
	cmds, _ := Plan(f.view, f.situation())
	for _, c := range cmds {
		if begin, ok := c.(*state.AttachBegin); ok {
			f.mayRepair(begin)
		}
		f.must(c)
	}
	repairs := map[holdfast.NodeID]int{}
	for v := range f.view.Volumes() {
		if n, _ := f.view.Node(v.Repair.Holder.Node); v.UnderRepair() && !f.gone[n.ID] {
			if repairs[n.ID]++; repairs[n.ID] > MaxRepairs {
				f.t.Fatalf("node %s repairs more than %d volumes at a time", n.Name, MaxRepairs)
			}
		}
	}
	return cmds
}

// mayRepair checks that no copy would be left behind that is only silent, and that
// there is something to do.
func (f *fleet) mayRepair(c *state.AttachBegin) {
	f.t.Helper()
	fills, here := 0, false
	for _, r := range f.segment(c.Volume).Replicas {
		n, _ := f.view.Node(f.nodeOf(r))
		switch {
		case r.Role == holdfast.RoleInSync && f.gone[n.ID] && (n.Duty == state.DutyMaintenance || n.Duty == state.DutyServing && !f.lost[n.ID]):
			f.t.Fatalf("a repair begins that leaves the copy at node %s behind, which will be back", n.Name)
		case r.Role == holdfast.RoleInSync && n.ID == c.Node && f.up(r):
			here = true
		case (r.Role == holdfast.RoleSyncing || r.Role == holdfast.RoleStale) && f.up(r) && !r.Leaving:
			fills++
		}
	}
	if !c.Maintenance || fills == 0 || !here {
		f.t.Fatalf("%+v: %d replicas to fill, in sync where it is repaired: %v", c, fills, here)
	}
}

func (f *fleet) nodeOf(r state.Replica) holdfast.NodeID {
	d, _ := f.view.Disk(r.Disk)
	return d.Node
}

func (f *fleet) up(r state.Replica) bool {
	d, _ := f.view.Disk(r.Disk)
	return d.State == holdfast.DiskOK && !f.gone[d.Node]
}

// work does what writers and disks do in time: silent copies leave the in-sync
// set, others are filled, those that are to go go.
func (f *fleet) work() {
	f.t.Helper()
	for _, id := range f.vols {
		sid := holdfast.SegmentID{Volume: id}
		v, _ := f.view.Volume(id)
		for _, r := range f.segment(id).Replicas {
			attached := v.Phase == state.PhaseAttached && !f.gone[v.Holder.Node] || v.UnderRepair() && f.repairs(v)
			seg := f.segment(id)
			now := seg.Replica(r.ID)
			if now == nil {
				continue
			}
			healthy := 0
			for _, o := range seg.Replicas {
				if o.Role == holdfast.RoleInSync && !o.Leaving && f.up(o) && o.ID != r.ID {
					healthy++
				}
			}
			switch {
			case now.Role == holdfast.RoleDeleting && f.up(*now):
				f.must(&state.ReplicaGone{Replica: r.ID})
			case !attached:
			case now.Role == holdfast.RoleInSync && healthy > 0 && (now.Leaving || !f.up(*now)):
				f.must(&state.ShrinkISR{Segment: sid, Epoch: v.Epoch, ISRVersion: seg.ISRVersion, Replica: r.ID})
			case (now.Role == holdfast.RoleSyncing || now.Role == holdfast.RoleStale) && f.up(*now) && !now.Leaving:
				f.must(&state.GrowISR{Segment: sid, Epoch: v.Epoch, ISRVersion: seg.ISRVersion, Replica: r.ID})
			}
		}
		f.endRepair(id)
	}
}

// repairs does what a node that repairs does first; false if it gives up.
func (f *fleet) repairs(v *state.Volume) bool {
	f.t.Helper()
	v, _ = f.view.Volume(v.ID)
	seg := &v.Segments[0]
	if !v.UnderRepair() || f.gone[v.Repair.Holder.Node] {
		return false
	}
	var isr []holdfast.ReplicaID
	for _, r := range seg.Replicas {
		if r.Role == holdfast.RoleInSync && f.gone[f.nodeOf(r)] && !f.lost[f.nodeOf(r)] {
			f.must(&state.EndRepair{Volume: v.ID, Epoch: v.Epoch, Why: "a node is gone"})
			return false
		}
		if r.Role == holdfast.RoleInSync && f.up(r) {
			isr = append(isr, r.ID)
		}
	}
	if seg.Last().Epoch == v.Epoch {
		return true
	}
	if len(isr) == 0 {
		f.must(&state.EndRepair{Volume: v.ID, Epoch: v.Epoch, Why: "nobody answers"})
		return false
	}
	f.must(&state.Activate{Segment: holdfast.SegmentID{Volume: v.ID}, Epoch: v.Epoch, S: seg.End, ISR: isr, Continuous: true})
	return true
}

// endRepair detaches a volume that its repair has brought as far as it can be.
func (f *fleet) endRepair(id holdfast.VolumeID) {
	f.t.Helper()
	v, _ := f.view.Volume(id)
	seg := f.segment(id)
	if !v.UnderRepair() || f.gone[v.Repair.Holder.Node] || seg.Last().Epoch != v.Epoch {
		return
	}
	for _, r := range seg.Replicas {
		if (r.Role == holdfast.RoleSyncing || r.Role == holdfast.RoleStale) && f.up(r) && !r.Leaving {
			return
		}
	}
	f.must(&state.Detach{Volume: id, Epoch: v.Epoch, Ends: []state.SegmentEnd{{End: seg.End, Commit: seg.End}}})
}

// detach ends a user's attachment in order, behind what it wrote.
func (f *fleet) detach(id holdfast.VolumeID) {
	f.t.Helper()
	v, _ := f.view.Volume(id)
	end := f.segment(id).Floor() + 7
	f.must(&state.Detach{Volume: id, Epoch: v.Epoch, Ends: []state.SegmentEnd{{End: end, Commit: end}}})
}

// settle runs rounds and work until nothing more is proposed.
func (f *fleet) settle() {
	f.t.Helper()
	for range 200 {
		cmds := f.round()
		before := f.index
		f.work()
		if len(cmds) == 0 && f.index == before {
			return
		}
	}
	f.t.Fatal("200 rounds, and there is still something to do")
}

// inSyncOn are the indexes of the nodes with an in-sync replica.
func (f *fleet) inSyncOn(id holdfast.VolumeID) (on []int) {
	for i, n := range f.nodes {
		for _, r := range f.segment(id).Replicas {
			if r.Role == holdfast.RoleInSync && f.nodeOf(r) == n {
				on = append(on, i)
			}
		}
	}
	return on
}

func (f *fleet) want(id holdfast.VolumeID, what string, on ...int) {
	f.t.Helper()
	if got := f.inSyncOn(id); fmt.Sprint(got) != fmt.Sprint(on) {
		f.t.Errorf("%s: in sync on nodes %v, want %v", what, got, on)
	}
}

func TestALostNodeIsReplaced(t *testing.T) {
	f := newFleet(t, "a", "b", "c", "b", "d")
	v := f.volume(1, 0, 1, 2)
	f.gone[f.nodes[0]] = true
	f.settle()
	f.want(v, "within the grace period", 1, 2)
	if n := len(f.segment(v).Replicas); n != 3 {
		t.Errorf("within the grace period: %d replicas, want the three there were", n)
	}
	f.lost[f.nodes[0]] = true
	f.settle()
	f.want(v, "after it: in a zone that has none", 1, 2, 4)
	// The dead one's record goes with its node, when that comes back.
	delete(f.gone, f.nodes[0])
	delete(f.lost, f.nodes[0])
	f.settle()
	f.want(v, "the node comes back", 1, 2, 4)
	if n := len(f.segment(v).Replicas); n != 3 {
		t.Errorf("the node came back: %d replicas, want 3", n)
	}
}

// A disk that is empty and small is fuller, with the replica on it, than a large one
// that holds something.
func TestANewReplicaIsPlacedByItsSize(t *testing.T) {
	f := newFleet(t, "", "", "", "")
	id := f.volume(0, 0, 1)
	f.must(&state.DiskUpdate{Disk: f.disks[2], OpenCount: 1, Size: 8 << 30, Free: 8 << 30})
	f.must(&state.DiskUpdate{Disk: f.disks[3], OpenCount: 1, Size: 1 << 40, Free: 1<<40 - 10<<30})
	f.gone[f.nodes[1]], f.lost[f.nodes[1]] = true, true
	f.round()
	on := map[holdfast.DiskID]bool{}
	for _, r := range f.segment(id).Replicas {
		on[r.Disk] = true
	}
	if on[f.disks[2]] || !on[f.disks[3]] {
		t.Errorf("the new replica of 1 GiB stands on the disk of 8 GiB: %+v", f.segment(id).Replicas)
	}
}

func TestAnotherOneIsNotMadeInMaintenance(t *testing.T) {
	f := newFleet(t, "", "", "", "")
	v := f.volume(1, 0, 1, 2)
	f.must(&state.SetDuty{Node: f.nodes[0], From: state.DutyServing, To: state.DutyMaintenance})
	f.gone[f.nodes[0]], f.lost[f.nodes[0]] = true, true
	f.settle()
	f.want(v, "maintenance", 1, 2)
	f.must(&state.SetDuty{Node: f.nodes[0], From: state.DutyMaintenance, To: state.DutyServing})
	f.settle()
	f.want(v, "maintenance has ended, the node is still away", 1, 2, 3)
}

func TestTheNodeIsBackBeforeItsSuccessorIsFilled(t *testing.T) {
	f := newFleet(t, "", "", "", "")
	v := f.volume(1, 0, 1, 2)
	f.gone[f.nodes[0]], f.lost[f.nodes[0]] = true, true
	f.work()
	f.round()
	if n := len(f.segment(v).Replicas); n != 4 {
		t.Fatalf("%d replicas, want a fourth", n)
	}
	delete(f.gone, f.nodes[0])
	delete(f.lost, f.nodes[0])
	cmds, _ := Plan(f.view, f.situation())
	if len(cmds) != 1 {
		t.Fatalf("got %v, want one removal", cmds)
	}
	rm, ok := cmds[0].(*state.RemoveReplica)
	if !ok || f.segment(v).Replica(rm.Replica).Role != holdfast.RoleSyncing {
		t.Fatalf("got %+v, want the one that is not filled removed", cmds[0])
	}
	f.settle()
	f.want(v, "as it was", 0, 1, 2)
}

func TestAFailedDiskIsReplacedAtOnce(t *testing.T) {
	f := newFleet(t, "", "", "", "")
	v := f.volume(1, 0, 1, 2)
	f.must(&state.DiskFailed{Disk: f.disks[2], OpenCount: 1, Reason: "EIO"})
	f.settle()
	f.want(v, "one disk failed", 0, 1, 3)
}

func TestDrain(t *testing.T) {
	f := newFleet(t, "", "", "", "")
	var vols []holdfast.VolumeID
	for i := range 6 {
		vols = append(vols, f.volume(i%2, i%4, (i+1)%4, (i+2)%4))
	}
	detached := f.volume(-1, 0, 1, 2)
	f.must(&state.SetDuty{Node: f.nodes[2], From: state.DutyServing, To: state.DutyDraining})
	for range 100 {
		f.round()
		filling := map[holdfast.DiskID]int{}
		for _, id := range vols {
			for _, r := range f.segment(id).Replicas {
				if r.Role == holdfast.RoleSyncing {
					filling[r.Disk]++
				}
			}
		}
		for d, n := range filling {
			if n > MaxRebuilds {
				t.Fatalf("%d replicas are filled at disk %v, more than %d", n, d, MaxRebuilds)
			}
		}
		f.work()
	}
	for _, id := range vols {
		f.want(id, "drained", 0, 1, 3)
	}
	f.want(detached, "detached", 0, 1, 3)
	if v, _ := f.view.Volume(detached); v.HasWriter() || v.Phase != state.PhaseDetached || !v.Clean() {
		t.Errorf("the detached volume ends as %+v", v)
	}
	if err := func() error { _, err := f.apply(&state.NodeRemove{Node: f.nodes[2]}); return err }(); err != nil {
		t.Errorf("a drained node cannot be removed: %v", err)
	}
}

// TestRebuildsOfANodeWithTwoDisks: its network is one, however many disks it has.
func TestRebuildsOfANodeWithTwoDisks(t *testing.T) {
	f := newFleet(t, "", "", "", "")
	second := holdfast.NewID[holdfast.DiskID]()
	f.must(&state.DiskOpen{Disk: second, Node: f.nodes[3], Instance: f.inst[3], OpenCount: 1, Size: 1 << 40, Free: 1 << 40})
	var vols []holdfast.VolumeID
	for range 8 {
		vols = append(vols, f.volume(0, 0, 1, 2))
	}
	f.gone[f.nodes[2]], f.lost[f.nodes[2]] = true, true
	// One is being filled at the disk that the planner would not choose first.
	cmds, _ := Plan(f.view, f.situation())
	other := second
	if cmds[0].(*state.AddReplica).Disk == second {
		other = f.disks[3]
	}
	f.must(&state.AddReplica{Segment: holdfast.SegmentID{Volume: vols[0]}, LayoutVersion: f.segment(vols[0]).LayoutVersion, Replica: holdfast.NewID[holdfast.ReplicaID](), Disk: other})
	most := 0
	for range 100 {
		f.round()
		filling := 0
		for _, id := range vols {
			for _, r := range f.segment(id).Replicas {
				if r.Role == holdfast.RoleSyncing && f.nodeOf(r) == f.nodes[3] {
					filling++
				}
			}
		}
		if most = max(most, filling); most > MaxRebuilds {
			t.Fatalf("%d replicas are filled at one node, more than %d", most, MaxRebuilds)
		}
		f.work()
	}
	if most != MaxRebuilds {
		t.Errorf("at most %d replicas were filled at a time, want %d", most, MaxRebuilds)
	}
	for _, id := range vols {
		f.want(id, "made anew", 0, 1, 3)
	}
}

func TestAnotherNumberOfReplicas(t *testing.T) {
	f := newFleet(t, "a", "a", "b", "c")
	v := f.volume(0, 0, 1)
	set := func(n int) {
		t.Helper()
		vol, _ := f.view.Volume(v)
		to := vol.Options
		to.Replicas = n
		f.must(&state.UpdateVolume{Volume: v, From: vol.Options, To: to})
		f.settle()
	}
	set(3)
	if got := f.inSyncOn(v); len(got) != 3 || got[2] < 2 {
		t.Errorf("three replicas: on %v, want the third in another zone", got)
	}
	set(2)
	if got := f.inSyncOn(v); len(got) != 2 || got[0] != 0 || got[1] < 2 {
		t.Errorf("two replicas: on %v, want the holder's and one of another zone", got)
	}
	set(1)
	f.want(v, "one replica: the holder's", 0)
	set(5)
	f.want(v, "five on four nodes", 0, 1, 2, 3)
	if _, blocked := Plan(f.view, f.situation()); len(blocked) != 1 || blocked[0].Segment.Volume != v {
		t.Errorf("five on four nodes: blocked %v, want one segment", blocked)
	}
}

// TestALeavingReplicaLeftBehind: one that was told to go and whose writer did not
// take it out goes all the same, once it is not missed.
func TestALeavingReplicaLeftBehind(t *testing.T) {
	for name, end := range map[string]func(f *fleet, v holdfast.VolumeID){
		"detached": func(f *fleet, v holdfast.VolumeID) {
			vol, _ := f.view.Volume(v)
			f.must(&state.Detach{Volume: v, Epoch: vol.Epoch, Ends: []state.SegmentEnd{{End: 7, Commit: 7}}})
		},
		"left out of an activation": func(f *fleet, v holdfast.VolumeID) {
			vol, _ := f.view.Volume(v)
			f.must(&state.AttachBegin{Volume: v, Node: f.nodes[1], Instance: f.inst[1], Expect: vol.Epoch, Session: holdfast.NewID[holdfast.SessionID](), Takeover: true})
			var isr []holdfast.ReplicaID
			for _, r := range f.segment(v).Replicas {
				if r.Role == holdfast.RoleInSync && !r.Leaving {
					isr = append(isr, r.ID)
				}
			}
			f.must(&state.Activate{Segment: holdfast.SegmentID{Volume: v}, Epoch: vol.Epoch + 1, ISR: isr, Continuous: true})
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFleet(t, "", "", "", "")
			v := f.volume(0, 0, 1, 2)
			f.must(&state.SetDuty{Node: f.nodes[2], From: state.DutyServing, To: state.DutyDraining})
			for range 3 { // place, fill, and say that the drained one is to go
				f.round()
				seg := f.segment(v)
				for _, r := range seg.Replicas {
					if vol, _ := f.view.Volume(v); r.Role == holdfast.RoleSyncing {
						f.must(&state.GrowISR{Segment: holdfast.SegmentID{Volume: v}, Epoch: vol.Epoch, ISRVersion: seg.ISRVersion, Replica: r.ID})
					}
				}
			}
			leaving := 0
			for _, r := range f.segment(v).Replicas {
				if r.Leaving {
					leaving++
				}
			}
			if leaving != 1 {
				t.Fatalf("%d replicas are told to go, want the drained one: %+v", leaving, f.segment(v).Replicas)
			}
			end(f, v)
			f.settle()
			f.want(v, "in the end", 0, 1, 3)
			if n := len(f.segment(v).Replicas); n != 3 {
				t.Errorf("%d replicas are left, want 3: %+v", n, f.segment(v).Replicas)
			}
		})
	}
}

func TestNothingToFillFrom(t *testing.T) {
	f := newFleet(t, "", "", "", "")
	v := f.volume(3, 0, 1)
	for _, n := range f.nodes[:2] {
		f.gone[n], f.lost[n] = true, true
	}
	cmds, blocked := Plan(f.view, f.situation())
	if len(cmds) != 0 || len(blocked) != 1 || blocked[0].Segment.Volume != v {
		t.Errorf("no in-sync replica answers: got %v, %v", cmds, blocked)
	}
}

// TestAnyTrouble: whatever happens to nodes and disks, no step takes an in-sync
// copy away that is asked for, no node gets two replicas of a segment, and when
// the trouble ends everything becomes whole and quiet.
func TestAnyTrouble(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		n := rapid.IntRange(3, 6).Draw(rt, "nodes")
		zones := make([]string, n)
		for i := range zones {
			zones[i] = rapid.SampledFrom([]string{"", "a", "b"}).Draw(rt, "zone")
		}
		f := newFleet(t, zones...)
		for range rapid.IntRange(1, 4).Draw(rt, "volumes") {
			first, k := rapid.IntRange(0, n-1).Draw(rt, "first"), rapid.IntRange(1, 3).Draw(rt, "replicas")
			var on []int
			for i := range k {
				on = append(on, (first+i)%n)
			}
			f.volume(rapid.IntRange(-1, n-1).Draw(rt, "holder"), on...)
		}
		healthy := func(id holdfast.VolumeID) (count int) {
			for _, r := range f.segment(id).Replicas {
				if r.Role == holdfast.RoleInSync && !r.Leaving && f.up(r) {
					count++
				}
			}
			return count
		}
		for range rapid.IntRange(5, 40).Draw(rt, "steps") {
			node := rapid.IntRange(0, n-1).Draw(rt, "node")
			id := f.nodes[node]
			switch rapid.IntRange(0, 9).Draw(rt, "what") {
			case 0:
				f.gone[id] = true
			case 1:
				f.lost[id] = f.gone[id]
			case 2:
				delete(f.gone, id)
				delete(f.lost, id)
			case 3:
				have, _ := f.view.Node(id)
				f.must(&state.SetDuty{Node: id, From: have.Duty, To: rapid.SampledFrom([]state.NodeDuty{state.DutyServing, state.DutyMaintenance, state.DutyDraining}).Draw(rt, "duty")})
			case 4:
				vol, _ := f.view.Volume(rapid.SampledFrom(f.vols).Draw(rt, "volume"))
				to := vol.Options
				to.Replicas = rapid.IntRange(1, 4).Draw(rt, "to")
				f.must(&state.UpdateVolume{Volume: vol.ID, From: vol.Options, To: to})
			case 5:
				f.work()
			case 8:
				vol, _ := f.view.Volume(rapid.SampledFrom(f.vols).Draw(rt, "volume"))
				switch {
				case vol.Phase == state.PhaseAttached:
					f.detach(vol.ID)
				case f.up(state.Replica{Disk: f.disks[node]}):
					f.attach(vol.ID, node)
				}
			default:
				before := map[holdfast.VolumeID]int{}
				for _, v := range f.vols {
					before[v] = healthy(v)
				}
				f.round()
				for _, v := range f.vols {
					vol, _ := f.view.Volume(v)
					if now := healthy(v); now < before[v] && now < vol.Options.Replicas {
						rt.Fatalf("volume %v: %d in-sync copies that answer became %d, %d are asked for", v, before[v], now, vol.Options.Replicas)
					}
				}
			}
			for _, v := range f.vols {
				seen := map[holdfast.NodeID]bool{}
				for _, r := range f.segment(v).Replicas {
					if r.Role != holdfast.RoleDeleting && seen[f.nodeOf(r)] {
						rt.Fatalf("volume %v has two replicas on one node: %+v", v, f.segment(v).Replicas)
					}
					seen[f.nodeOf(r)] = seen[f.nodeOf(r)] || r.Role != holdfast.RoleDeleting
				}
			}
		}
		clear(f.gone)
		clear(f.lost)
		for i, id := range f.nodes {
			have, _ := f.view.Node(id)
			f.must(&state.SetDuty{Node: id, From: have.Duty, To: state.DutyServing})
			_ = i
		}
		f.settle()
		for _, v := range f.vols {
			vol, _ := f.view.Volume(v)
			if vol.UnderRepair() || vol.Phase == state.PhaseDetached && !vol.Clean() {
				rt.Fatalf("volume %v ends as %+v", v, vol)
			}
			if got, want := len(f.inSyncOn(v)), min(vol.Options.Replicas, n); got != want || len(f.segment(v).Replicas) != want {
				rt.Fatalf("volume %v ends with %d in-sync of %d replicas, want %d: %+v", v, got, len(f.segment(v).Replicas), want, f.segment(v).Replicas)
			}
		}
	})
}

// disk opens one more disk at a node and returns it.
func (f *fleet) disk(at int) holdfast.DiskID {
	f.t.Helper()
	d := holdfast.NewID[holdfast.DiskID]()
	f.must(&state.DiskOpen{Disk: d, Node: f.nodes[at], Instance: f.inst[at], OpenCount: 1, Size: 1 << 40, Free: 1 << 40})
	return d
}

func (f *fleet) on(id holdfast.VolumeID, disk holdfast.DiskID) bool {
	for _, r := range f.segment(id).Replicas {
		if r.Disk == disk {
			return true
		}
	}
	return false
}

// TestALeavingDisk: what it has moves to other disks, to another of its own node
// where no other node may have a copy, and no copy is missed meanwhile.
func TestALeavingDisk(t *testing.T) {
	for _, at := range []int{1, -1} { // attached, and not
		f := newFleet(t, "", "", "")
		v := f.volume(at, 0, 1, 2)
		if at < 0 { // of a volume that was never attached nothing can be copied
			f.attach(v, 1)
			f.detach(v)
		}
		leave := &state.SetDiskLeaving{Disk: f.disks[0], Leaving: true}
		f.must(leave)
		f.settle()
		f.want(v, "there is nowhere to go", 0, 1, 2)
		if _, blocked := Plan(f.view, f.situation()); len(blocked) != 1 {
			t.Errorf("nowhere to go: blocked is %v", blocked)
		}
		second := f.disk(0)
		for range 100 {
			if len(f.round()) == 0 && !f.on(v, f.disks[0]) {
				break
			}
			f.work()
			if n := len(f.inSyncOn(v)); n < 3 {
				t.Fatalf("%d in-sync copies on the way", n)
			}
		}
		f.settle()
		f.want(v, "moved", 0, 1, 2)
		if f.on(v, f.disks[0]) || !f.on(v, second) {
			t.Errorf("attached at %d: replicas %+v, want one on the second disk and none on the first", at, f.segment(v).Replicas)
		}
		f.must(&state.DiskRemove{Disk: f.disks[0]})
	}
}

// TestADiskStaysAfterAll: of two copies on one node, made while one was to leave,
// one goes, and no other node's.
func TestADiskStaysAfterAll(t *testing.T) {
	for range 20 { // ids are random, and the last tie is between them
		f := newFleet(t, "", "", "")
		v := f.volume(1, 0, 1, 2)
		f.disk(0)
		f.must(&state.SetDiskLeaving{Disk: f.disks[0], Leaving: true})
		f.round()
		f.work()
		if n := len(f.segment(v).Replicas); n != 4 {
			t.Fatalf("%d replicas, want a fourth", n)
		}
		f.must(&state.SetDiskLeaving{Disk: f.disks[0]})
		f.settle()
		f.want(v, "after all", 0, 1, 2)
		if n := len(f.segment(v).Replicas); n != 3 {
			t.Errorf("%d replicas, want 3", n)
		}
	}
}
