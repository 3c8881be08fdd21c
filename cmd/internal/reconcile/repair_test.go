package reconcile

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

// pair is two nodes, and a detached volume of two segments with one copy at the
// first, some data in both, and an empty second copy at the other.
type pair struct {
	t    *testing.T
	reg  *register
	a, b *fakeNode
	vol  holdfast.VolumeID
	data []byte // at dataAt
}

const (
	pairSegment = 32 << 20
	dataAt      = 28 << 20
)

func newPair(t *testing.T) *pair {
	t.Helper()
	p := &pair{t: t, reg: newRegister(t), data: bytes.Repeat([]byte("held fast"), 1<<20)[:8<<20]}
	p.a = run(t, p.reg, holdfast.NewID[holdfast.NodeID](), vfs.NewMemory(1), t.TempDir())
	place, err := state.Place(p.reg.View(), state.PlaceRequest{Size: 2 * pairSegment, SegmentSize: pairSegment, Replicas: 1, NewReplica: holdfast.NewID[holdfast.ReplicaID]})
	if err != nil {
		t.Fatal(err)
	}
	v := p.reg.must(t, &state.CreateVolume{Volume: holdfast.NewID[holdfast.VolumeID](), Name: "data", Size: 2 * pairSegment,
		Options: state.VolumeOptions{Replicas: 1, SegmentSize: pairSegment, AckMode: holdfast.AckReceived, MinCopies: 1},
		Lineage: holdfast.NewID[holdfast.LineageID](), Placement: place}).Volume
	p.vol = v.ID
	p.b = run(t, p.reg, holdfast.NewID[holdfast.NodeID](), vfs.NewMemory(2), t.TempDir())
	t.Cleanup(func() {
		p.a.end(t)
		p.b.end(t)
	})
	if _, err := p.a.att.Attach(t.Context(), "data", AttachOptions{NBD: true}); err != nil {
		t.Fatal(err)
	}
	dev, _ := p.a.att.Device(p.vol)
	for off := 0; off < len(p.data); off += 1 << 20 {
		if err := dev.WriteAt(t.Context(), p.data[off:off+1<<20], int64(off)+dataAt, false); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.a.att.Detach(t.Context(), p.vol, false); err != nil {
		t.Fatal(err)
	}
	to := v.Options
	to.Replicas = 2
	p.reg.must(t, &state.UpdateVolume{Volume: v.ID, From: v.Options, To: to})
	var disk holdfast.DiskID
	for d := range p.reg.View().Disks() {
		if d.Node == p.b.id {
			disk = d.ID
		}
	}
	for i := range uint32(2) {
		p.reg.must(t, &state.AddReplica{Segment: holdfast.SegmentID{Volume: v.ID, Index: i}, LayoutVersion: 1, Replica: holdfast.NewID[holdfast.ReplicaID](), Disk: disk})
	}
	return p
}

func (p *pair) volume() *state.Volume {
	v, _ := p.reg.View().Volume(p.vol)
	return v
}

// inSync is the fewest copies in sync of a segment.
func (p *pair) inSync() int {
	v := p.volume()
	return min(len(v.Segments[0].ISR()), len(v.Segments[1].ISR()))
}

// repair gives the repair to the first node.
func (p *pair) repair() {
	p.t.Helper()
	p.reg.must(p.t, &state.AttachBegin{Volume: p.vol, Node: p.a.id, Instance: p.a.inst, Expect: p.volume().Epoch, Maintenance: true})
}

// reads checks that the volume, attached at a node, holds what was written.
func (p *pair) reads(n *fakeNode) {
	p.t.Helper()
	if _, err := n.att.Attach(p.t.Context(), "data", AttachOptions{NBD: true}); err != nil {
		p.t.Fatal(err)
	}
	dev, ok := n.att.Device(p.vol)
	if !ok {
		p.t.Fatal("attached, and no device")
	}
	got := make([]byte, len(p.data))
	for off := 0; off < len(got); off += 1 << 20 {
		if err := dev.ReadAt(p.t.Context(), got[off:off+1<<20], int64(off)+dataAt); err != nil {
			p.t.Fatal(err)
		}
	}
	if !bytes.Equal(got, p.data) {
		p.t.Error("the volume holds other data than was written")
	}
}

func (p *pair) idle() {
	p.t.Helper()
	await(p.t, p.reg, "no repair runs", func() bool {
		_, a := p.a.att.Repair(p.vol)
		_, b := p.b.att.Repair(p.vol)
		return !a && !b
	})
}

func TestRepairFillsADetachedVolume(t *testing.T) {
	p := newPair(t)
	p.repair()
	await(t, p.reg, "repaired", func() bool { return !p.volume().UnderRepair() })
	v := p.volume()
	if p.inSync() != 2 || v.Phase != state.PhaseDetached || !v.Clean() || v.Repair != (state.Repair{}) || v.Epoch != 2 {
		t.Fatalf("repaired: %+v", v)
	}
	if _, held := p.a.att.Get(p.vol); held || len(p.a.att.List()) != 0 || len(p.a.att.used(p.vol).holders()) != 0 {
		t.Error("the repair shows as an attachment")
	}
	p.idle()
	// Only what the second node holds is left.
	to := v.Options
	to.Replicas = 1
	p.reg.must(t, &state.UpdateVolume{Volume: v.ID, From: v.Options, To: to})
	for i := range v.Segments {
		p.reg.must(t, &state.RemoveReplica{Segment: holdfast.SegmentID{Volume: v.ID, Index: uint32(i)}, LayoutVersion: v.Segments[i].LayoutVersion, Replica: v.Segments[i].ISR()[0]})
	}
	p.reads(p.b)
}

// holders names what of a use is set.
func (u use) holders() (set []string) {
	if u.NBD {
		set = append(set, "nbd")
	}
	if u.Device {
		set = append(set, "device")
	}
	return set
}

// stall has the second node not answer, and a repair wait for it.
func (p *pair) stall() {
	p.t.Helper()
	n, _ := p.reg.View().Node(p.b.id)
	away := *n
	away.Addresses.Data = "127.0.0.1:1"
	p.reg.must(p.t, &state.NodeUpdate{Node: away})
	p.repair()
	await(p.t, p.reg, "the repair serves, and waits", func() bool {
		r, ok := p.a.att.Repair(p.vol)
		return ok && r.Status.Active
	})
}

func (p *pair) unstall() {
	p.t.Helper()
	n, _ := p.reg.View().Node(p.b.id)
	back := *n
	back.Addresses.Data = p.b.data.Addr().String()
	p.reg.must(p.t, &state.NodeUpdate{Node: back})
}

// TestUsersPreemptARepair: whoever attaches, at the node that repairs or at another,
// has the volume at once and whole.
func TestUsersPreemptARepair(t *testing.T) {
	for name, at := range map[string]func(p *pair) *fakeNode{
		"at the same node": func(p *pair) *fakeNode { return p.a },
		"at another node":  func(p *pair) *fakeNode { return p.b },
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t)
			p.a.att.o.RepairPatience = time.Hour
			p.stall()
			if v := p.volume(); !v.UnderRepair() || v.Epoch != 2 {
				t.Fatalf("under repair: %+v", v)
			}
			p.reg.alive[p.a.id] = true // nobody waits for it to be gone
			began := time.Now()
			p.reads(at(p))
			if took := time.Since(began); took > 5*time.Second {
				t.Errorf("the attach took %v", took)
			}
			v := p.volume()
			if v.Phase != state.PhaseAttached || v.Holder.Node != at(p).id || v.Epoch != 3 || v.Repair != (state.Repair{}) {
				t.Errorf("attached: %+v", v)
			}
			if last := v.Segments[0].Last(); last.Flags != state.FlagContinuous {
				t.Errorf("the attachment began as %v, want continuous", last.Flags)
			}
			p.idle()
			// The user's attachment fills the copy now.
			p.unstall()
			await(t, p.reg, "in sync", func() bool { return p.inSync() == 2 })
			if err := at(p).att.Detach(t.Context(), p.vol, true); err != nil {
				t.Fatal(err)
			}
			if v := p.volume(); v.Phase != state.PhaseDetached || !v.Clean() {
				t.Errorf("detached: %+v", v)
			}
		})
	}
}

// TestARepairThatCannotGoOn gives the repair back, and says why; the next one, or a
// user, finds the volume as it was.
func TestARepairThatCannotGoOn(t *testing.T) {
	ended := func(p *pair, part string) {
		p.t.Helper()
		await(p.t, p.reg, "the repair is given back", func() bool { return !p.volume().UnderRepair() })
		v := p.volume()
		if !strings.Contains(v.Repair.Why, part) || v.Repair.Tries != 1 || !v.Clean() || v.Phase != state.PhaseDetached {
			p.t.Errorf("got %+v, want %q", v, part)
		}
		p.idle()
	}
	t.Run("the target does not answer", func(t *testing.T) {
		p := newPair(t)
		p.stall()
		ended(p, "no progress for")
		p.unstall()
		p.repair()
		await(t, p.reg, "repaired by the next", func() bool { return p.volume().Repair == (state.Repair{}) })
		if n := p.inSync(); n != 2 {
			t.Errorf("%d copies in sync", n)
		}
	})
	t.Run("raft does not answer", func(t *testing.T) {
		p := newPair(t)
		p.reg.setRefuse(func(cmd state.Command) error {
			switch cmd.(type) {
			case *state.Activate, *state.EndRepair:
				return holdfast.Errorf(holdfast.ErrUnavailable, "no quorum")
			}
			return nil
		})
		p.repair()
		time.Sleep(2500 * time.Millisecond) // longer than its patience
		if !p.volume().UnderRepair() {
			t.Fatal("the repair ended without raft")
		}
		p.reg.setRefuse(nil)
		ended(p, "no progress for")
	})
	t.Run("a silent copy", func(t *testing.T) {
		p := newPair(t)
		p.repair()
		await(t, p.reg, "repaired", func() bool { return !p.volume().UnderRepair() })
		// Both are in sync. A third is to be filled, and the second falls silent.
		p.reg.setGone(p.b.id, true)
		p.repair()
		ended(p, "is gone: going on would leave that behind")
		if n := p.inSync(); n != 2 {
			t.Errorf("%d copies in sync, want both as they were", n)
		}
		// One that is replaced anyway is no reason to wait.
		p.reg.mu.Lock()
		p.reg.lost[p.b.id] = true
		p.reg.mu.Unlock()
		p.repair()
		await(t, p.reg, "repaired", func() bool { return p.volume().Repair == (state.Repair{}) })
	})
}

// TestARepairWhoseVolumeIsRemoved ends, and leaves nothing.
func TestARepairWhoseVolumeIsRemoved(t *testing.T) {
	p := newPair(t)
	p.a.att.o.RepairPatience = time.Hour
	p.stall()
	p.reg.must(t, &state.DeleteVolume{Volume: p.vol})
	p.idle()
	p.unstall()
	await(t, p.reg, "every replica is gone", func() bool { v := p.volume(); return len(v.Segments) == 0 })
}

// TestAnotherProcessDoesNotRepair: what raft gave an earlier run of this node is not
// taken up by the next.
func TestAnotherProcessDoesNotRepair(t *testing.T) {
	p := newPair(t)
	p.a.att.o.RepairPatience = time.Hour
	p.stall()
	p.a.end(t)
	p.a = run(t, p.reg, p.a.id, p.a.fs, p.a.dir)
	p.unstall()
	time.Sleep(time.Second)
	if _, runs := p.a.att.Repair(p.vol); runs || !p.volume().UnderRepair() || p.volume().Epoch != 2 {
		t.Errorf("repair runs: %v; %+v", runs, p.volume().Repair)
	}
	// Until raft gives it to this one.
	p.reg.must(t, &state.AttachBegin{Volume: p.vol, Node: p.a.id, Instance: p.a.inst, Expect: 2, Takeover: true, Maintenance: true})
	await(t, p.reg, "repaired", func() bool { return p.volume().Repair == (state.Repair{}) })
	if n := p.inSync(); n != 2 {
		t.Errorf("%d copies in sync", n)
	}
}
