package controller

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

// ended makes a volume, detached in order, of three copies on the first nodes, of
// which the third was lost and is placed anew.
func ended(f *fleet) holdfast.VolumeID {
	f.t.Helper()
	v := f.volume(0, 0, 1, 2)
	f.detach(v)
	f.gone[f.nodes[2]], f.lost[f.nodes[2]] = true, true
	f.round() // one more is placed
	return v
}

// begun returns the repairs that a round has begun.
func begun(cmds []state.Command) (list []*state.AttachBegin) {
	for _, c := range cmds {
		if b, ok := c.(*state.AttachBegin); ok {
			list = append(list, b)
		}
	}
	return list
}

func (f *fleet) blocked(id holdfast.VolumeID, part string) {
	f.t.Helper()
	cmds, blocked := Plan(f.view, f.situation())
	if list := begun(cmds); len(list) != 0 {
		f.t.Fatalf("got the repair %+v, want it to wait for %q", list[0], part)
	}
	for _, b := range blocked {
		if b.Segment.Volume == id && strings.Contains(b.Why, part) {
			return
		}
	}
	f.t.Fatalf("blocked: got %v, want %q", blocked, part)
}

func TestADetachedVolumeIsRepaired(t *testing.T) {
	f := newFleet(t, "", "", "", "")
	v := ended(f)
	f.want(v, "placed", 0, 1, 2) // the lost one is in sync by the tables
	list := begun(f.round())
	if len(list) != 1 || list[0].Node != f.nodes[0] && list[0].Node != f.nodes[1] || list[0].Takeover || list[0].Since != 1000 {
		t.Fatalf("got %+v, want one repair by a node that has all", list)
	}
	if again := begun(f.round()); len(again) != 0 {
		t.Fatalf("begun again: %+v", again)
	}
	f.settle()
	f.want(v, "repaired", 0, 1, 3)
	if vol, _ := f.view.Volume(v); vol.Repair != (state.Repair{}) || vol.Phase != state.PhaseDetached || !vol.Clean() {
		t.Errorf("it ends as %+v", vol)
	}
}

// TestAStaleCopyIsRepaired: its node was away while somebody wrote, and is back.
func TestAStaleCopyIsRepaired(t *testing.T) {
	f := newFleet(t, "", "", "")
	v := f.volume(0, 0, 1, 2)
	f.gone[f.nodes[2]] = true
	f.work()
	f.detach(v)
	if cmds := f.round(); len(cmds) != 0 {
		t.Fatalf("its node is away: got %v", cmds)
	}
	delete(f.gone, f.nodes[2])
	f.settle()
	f.want(v, "back", 0, 1, 2)
}

func TestARepairIsTakenOver(t *testing.T) {
	for name, harm := range map[string]func(f *fleet, at int){
		"the node is gone": func(f *fleet, at int) { f.gone[f.nodes[at]], f.lost[f.nodes[at]] = true, true },
		"the node runs another process": func(f *fleet, at int) {
			n, _ := f.view.Node(f.nodes[at])
			next := *n
			next.Instance = holdfast.NewID[holdfast.InstanceID]()
			f.must(&state.NodeUpdate{Node: next})
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFleet(t, "", "", "", "", "")
			v := ended(f)
			first := begun(f.round())[0]
			at := 0
			if first.Node == f.nodes[1] {
				at = 1
			}
			harm(f, at)
			var list []*state.AttachBegin
			for range 5 {
				if list = begun(f.round()); len(list) > 0 {
					break
				}
			}
			if len(list) != 1 || !list[0].Takeover || f.gone[list[0].Node] {
				t.Fatalf("got %+v, want another to go on", list)
			}
			f.settle()
			if n := len(f.inSyncOn(v)); n < 3 {
				t.Errorf("in sync on %v", f.inSyncOn(v))
			}
		})
	}
}

func TestWhatARepairWaitsFor(t *testing.T) {
	t.Run("a silent copy", func(t *testing.T) {
		f := newFleet(t, "", "", "", "")
		v := ended(f)
		f.gone[f.nodes[1]] = true
		f.blocked(v, "node n2, which is gone, to come back")
		// In maintenance it will be, however long that takes.
		f.must(&state.SetDuty{Node: f.nodes[1], From: state.DutyServing, To: state.DutyMaintenance})
		f.lost[f.nodes[1]] = true
		f.blocked(v, "node n2, which is gone, to come back")
		delete(f.gone, f.nodes[1])
		delete(f.lost, f.nodes[1])
		if list := begun(f.round()); len(list) != 1 || list[0].Node != f.nodes[0] {
			t.Errorf("got %+v, want a repair, and not by the node in maintenance", list)
		}
	})
	t.Run("a pause", func(t *testing.T) {
		f := newFleet(t, "", "", "", "")
		v := ended(f)
		b := begun(f.round())[0]
		f.must(&state.EndRepair{Volume: v, Epoch: b.Expect + 1, Why: "no progress for 2m0s"})
		f.rests[v] = 20 * time.Second
		f.blocked(v, "1 repair did not bring it into sync, the last one: no progress for 2m0s; the next try is in 20s")
		delete(f.rests, v)
		// The next try is another node's.
		if list := begun(f.round()); len(list) != 1 || list[0].Node == b.Node {
			t.Errorf("got %+v, want the other node, not %v", list, b.Node)
		}
	})
	t.Run("a salvaged volume", func(t *testing.T) {
		f := newFleet(t, "", "", "", "")
		v := ended(f)
		vol, _ := f.view.Volume(v)
		f.must(&state.ForceRecover{Volume: v, Expect: vol.Epoch, Lineage: holdfast.NewID[holdfast.LineageID](),
			Choices: []state.SalvageChoice{{Replica: vol.Segments[0].Replicas[0].ID}}})
		f.round()
		f.round()
		f.blocked(v, "somebody to attach the volume")
		f.attach(v, 0)
		f.settle()
		f.detach(v)
		f.settle()
		f.want(v, "attached once", 0, 1, 3)
	})
	t.Run("the last copy", func(t *testing.T) {
		f := newFleet(t, "", "", "", "")
		v := ended(f)
		for _, n := range f.nodes[:2] {
			f.gone[n], f.lost[n] = true, true
		}
		f.blocked(v, "none answers")
	})
	t.Run("other repairs", func(t *testing.T) {
		f := newFleet(t, "", "", "", "", "", "", "")
		// One copy each, at the same node; the second goes to different nodes.
		var vols []holdfast.VolumeID
		for range 4 {
			vols = append(vols, f.volume(-1, 0))
		}
		for i, id := range vols {
			vol, _ := f.view.Volume(id)
			to := vol.Options
			to.Replicas = 2
			f.must(&state.UpdateVolume{Volume: id, From: vol.Options, To: to})
			f.must(&state.AddReplica{Segment: holdfast.SegmentID{Volume: id}, LayoutVersion: 1, Replica: holdfast.NewID[holdfast.ReplicaID](), Disk: f.disks[i+1]})
		}
		if list := begun(f.round()); len(list) != MaxRepairs {
			t.Fatalf("%d repairs begin, want %d: %v", len(list), MaxRepairs, list)
		}
		waits := 0
		_, blocked := Plan(f.view, f.situation())
		for _, b := range blocked {
			if strings.Contains(b.Why, "are repairing 2 other volumes each") {
				waits++
			}
		}
		if waits != 2 {
			t.Errorf("blocked: %v, want two that wait for their turn", blocked)
		}
		f.settle()
		for i, id := range vols {
			f.want(id, "in turn", 0, i+1)
		}
	})
	t.Run("other rebuilds at the target", func(t *testing.T) {
		f := newFleet(t, "", "", "", "")
		// Copies at different nodes, and all the second ones at the last.
		var vols []holdfast.VolumeID
		for i := range 3 {
			id := f.volume(-1, i)
			vol, _ := f.view.Volume(id)
			to := vol.Options
			to.Replicas = 2
			f.must(&state.UpdateVolume{Volume: id, From: vol.Options, To: to})
			f.must(&state.AddReplica{Segment: holdfast.SegmentID{Volume: id}, LayoutVersion: 1, Replica: holdfast.NewID[holdfast.ReplicaID](), Disk: f.disks[3]})
			vols = append(vols, id)
		}
		if list := begun(f.round()); len(list) != MaxRebuilds {
			t.Fatalf("%d repairs begin, want %d", len(list), MaxRebuilds)
		}
		_, blocked := Plan(f.view, f.situation())
		if len(blocked) != 1 || !strings.Contains(blocked[0].Why, "node n4, which is filling 2 other replicas") {
			t.Errorf("blocked: %v", blocked)
		}
		f.settle()
		for i, id := range vols {
			f.want(id, "in turn", i, 3)
		}
	})
}

// TestARepairLeftBehind: its node is gone and there is nothing to do any more.
func TestARepairLeftBehind(t *testing.T) {
	f := newFleet(t, "", "", "")
	v := f.volume(0, 0, 1, 2)
	f.gone[f.nodes[2]] = true
	f.work()
	f.detach(v)
	delete(f.gone, f.nodes[2])
	b := begun(f.round())[0]
	f.gone[b.Node], f.gone[f.nodes[2]] = true, true
	cmds := f.round()
	if len(cmds) != 1 || state.Name(cmds[0]) != "EndRepair" {
		t.Fatalf("got %v, want the end of the repair", cmds)
	}
	if vol, _ := f.view.Volume(v); vol.Repair != (state.Repair{}) {
		t.Errorf("got %+v", vol.Repair)
	}
	clear(f.gone)
	f.settle()
	f.want(v, "all back", 0, 1, 2)
}

func TestPausesGrow(t *testing.T) {
	last := time.Duration(0)
	for tries := range uint32(100) {
		p := pause(tries)
		if p < last || p > maxPause || p <= 0 {
			t.Fatalf("after %d tries: %v, before it %v", tries, p, last)
		}
		last = p
	}
	if pause(0) != settle || pause(1) != firstPause || pause(2) != 2*firstPause || last != maxPause {
		t.Errorf("pauses: %v, %v, %v, in the end %v", pause(0), pause(1), pause(2), last)
	}
}

// TestRests: the pause is counted from when this node saw the volume left alone.
func TestRests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, "", "", "", "")
		v := ended(f)
		c := New(Options{Leads: func() bool { return true }, Cluster: fixed{f}})
		left := func(want time.Duration, when string) {
			t.Helper()
			c.note(f.view, time.Now())
			vol, _ := f.view.Volume(v)
			if got := c.paused(vol); got != want {
				t.Errorf("%s: left alone for %v more, want %v", when, got, want)
			}
		}
		left(settle, "seen first")
		time.Sleep(settle - time.Second)
		left(time.Second, "a little later")
		time.Sleep(time.Second)
		left(0, "settled")
		b := begun(f.round())[0]
		left(firstPause, "under repair, as if it failed now")
		f.must(&state.EndRepair{Volume: v, Epoch: b.Expect + 1, Why: "x"})
		left(firstPause, "failed")
		time.Sleep(firstPause)
		left(0, "rested")
		f.attach(v, 0)
		f.detach(v)
		left(settle, "a user had it")
	})
}

// fixed is a fleet as a Cluster.
type fixed struct{ *fleet }

func (c fixed) View() *state.View            { return c.view }
func (c fixed) Gone(id holdfast.NodeID) bool { return c.gone[id] }
func (c fixed) Propose(_ context.Context, cmd state.Command) (state.Result, error) {
	return c.apply(cmd)
}
