package state

import (
	"bytes"
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/holdfast-storage/holdfast"
)

// machine draws commands over a small world: mostly ones that could be right,
// with stale and wrong values mixed in, and checks after each what must hold.
type machine struct {
	*world
	rt    *rapid.T
	vols  []holdfast.VolumeID
	reps  []holdfast.ReplicaID
	snaps map[uint64][]byte
}

func newMachine(t *testing.T, rt *rapid.T) *machine {
	m := &machine{world: newWorld(t, 0), rt: rt, snaps: map[uint64][]byte{}}
	for range 4 {
		m.addNode()
	}
	return m
}

func (m *machine) chance(percent int, label string) bool {
	return rapid.IntRange(0, 99).Draw(m.rt, label) < percent
}

// off returns v, or now and then a neighbour of it.
func off[T ~uint64](m *machine, v T) T {
	switch rapid.IntRange(0, 49).Draw(m.rt, "off") {
	case 48: // rapid likes small numbers: the odd ones are large
		return v + 1
	case 49:
		return v - 1
	}
	return v
}

func pickOne[T any](m *machine, from []T, label string) T {
	return from[rapid.IntRange(0, len(from)-1).Draw(m.rt, label)]
}

// volume returns a volume's record, an empty one if there is no volume yet.
func (m *machine) volume() (*Volume, holdfast.SegmentID, *Segment) {
	if len(m.vols) == 0 {
		return &Volume{}, holdfast.SegmentID{}, &Segment{}
	}
	if len(m.vols) > 4 { // few volumes have longer lives
		m.vols = m.vols[len(m.vols)-4:]
	}
	v, ok := m.view.Volume(pickOne(m, m.vols, "volume"))
	if !ok {
		return &Volume{}, holdfast.SegmentID{}, &Segment{}
	}
	if len(v.Segments) == 0 {
		return v, holdfast.SegmentID{Volume: v.ID}, &Segment{}
	}
	i := rapid.IntRange(0, len(v.Segments)-1).Draw(m.rt, "segment")
	return v, holdfast.SegmentID{Volume: v.ID, Index: uint32(i)}, &v.Segments[i]
}

func (m *machine) replicaOf(s *Segment) holdfast.ReplicaID {
	if len(s.Replicas) > 0 && !m.chance(5, "any replica") {
		return pickOne(m, s.Replicas, "replica").ID
	}
	if len(m.reps) > 0 {
		return pickOne(m, m.reps, "known replica")
	}
	return newID[holdfast.ReplicaID](m.world)
}

func (m *machine) draw() Command {
	vol, sid, seg := m.volume()
	node := rapid.IntRange(0, len(m.nodes)-1).Draw(m.rt, "node")
	commands := []int{0, 2, 3, 5, 8, 10, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 26}
	switch {
	case vol.UnderRepair() && seg.Last().Epoch < vol.Epoch && m.chance(70, "repair"):
		commands = []int{5}
	case vol.UnderRepair() && m.chance(85, "work"):
		commands = []int{8, 8, 8, 8, 10, 10, 14, 15, 18, 12, 25, 3}
	case vol.Phase == PhaseAttaching && m.chance(60, "go on"):
		commands = []int{5}
	case vol.Phase == PhaseAttached && m.chance(70, "work"):
		commands = []int{8, 10, 18, 14, 15, 10, 8, 12}
	case vol.Phase == PhaseDetached && m.chance(50, "attach"):
		commands = []int{3, 19, 17}
	}
	switch pickOne(m, commands, "command") {
	case 25:
		return &EndRepair{Volume: vol.ID, Epoch: off(m, vol.Epoch), Why: pickOne(m, []string{"", "nothing more can be done"}, "why")}
	case 0, 1:
		size, segSize := int64(1<<20), int64(1<<20)
		if m.chance(30, "two segments") {
			size = 2<<20 - 4096
		}
		replicas := rapid.IntRange(1, 3).Draw(m.rt, "replicas")
		placement, err := Place(m.view, PlaceRequest{Size: size, SegmentSize: segSize, Replicas: replicas,
			NewReplica: func() holdfast.ReplicaID {
				r := newID[holdfast.ReplicaID](m.world)
				m.reps = append(m.reps, r)
				return r
			}})
		if err != nil {
			return &InitCluster{ID: m.view.Cluster().ID, Level: holdfast.Level1}
		}
		if m.chance(5, "reuse a replica id") {
			placement[0][0].Replica = pickOne(m, m.reps, "reused")
		}
		if len(m.vols) > 2 && !m.chance(10, "one more") {
			return &InitCluster{ID: m.view.Cluster().ID, Level: holdfast.Level1}
		}
		id := newID[holdfast.VolumeID](m.world)
		if len(m.vols) > 0 && m.chance(5, "reuse a volume id") {
			id = pickOne(m, m.vols, "reused")
		}
		m.vols = append(m.vols, id)
		return &CreateVolume{Volume: id, Name: fmt.Sprintf("v%d", rapid.IntRange(0, 3).Draw(m.rt, "name")), Size: size,
			Lineage: newID[holdfast.LineageID](m.world), Placement: placement,
			Options: VolumeOptions{Replicas: replicas, SegmentSize: segSize, AckMode: holdfast.AckReceived, MinCopies: 1}}
	case 2, 3, 4:
		if vol.Phase == PhaseDetached && m.chance(50, "maintenance") {
			return &AttachBegin{Volume: vol.ID, Node: m.nodes[node], Instance: m.instances[node], Expect: off(m, vol.Epoch), Takeover: m.chance(30, "takeover"), Maintenance: true}
		}
		return &AttachBegin{Volume: vol.ID, Node: m.nodes[node], Instance: m.instances[node], Expect: off(m, vol.Epoch),
			Session: newID[holdfast.SessionID](m.world), Takeover: m.chance(60, "takeover"), Force: m.chance(10, "force")}
	case 5, 6, 7:
		var isr []holdfast.ReplicaID
		for _, r := range seg.Replicas {
			if r.Role == holdfast.RoleInSync && !m.chance(20, "leave out") || m.chance(3, "take in") {
				isr = append(isr, r.ID)
			}
		}
		return &Activate{Segment: sid, Epoch: off(m, vol.Epoch), S: off(m, seg.Floor()), ISR: isr,
			Continuous: m.chance(70, "continuous")}
	case 8, 9:
		return &ShrinkISR{Segment: sid, Epoch: off(m, vol.Epoch), ISRVersion: off(m, seg.ISRVersion), Replica: m.replicaOf(seg), Commit: off(m, seg.LastCommit) + m.written(vol)}
	case 10, 11:
		return &GrowISR{Segment: sid, Epoch: off(m, vol.Epoch), ISRVersion: off(m, seg.ISRVersion), Replica: m.replicaOf(seg), Commit: seg.LastCommit}
	case 12, 13:
		var ends []SegmentEnd
		for i := range vol.Segments {
			if s := &vol.Segments[i]; s.Last().Epoch == vol.Epoch && vol.Epoch > 0 && !m.chance(5, "forget") {
				end := off(m, s.Floor())
				if !vol.UnderRepair() || m.chance(5, "wrote") {
					end += 2
				}
				ends = append(ends, SegmentEnd{Index: uint32(i), End: end, Commit: min(end, off(m, end))})
			}
		}
		return &Detach{Volume: vol.ID, Epoch: off(m, vol.Epoch), Ends: ends}
	case 14:
		return &AddReplica{Segment: sid, LayoutVersion: off(m, seg.LayoutVersion), Replica: newID[holdfast.ReplicaID](m.world), Disk: m.disks[node]}
	case 15:
		return &RemoveReplica{Segment: sid, LayoutVersion: off(m, seg.LayoutVersion), Replica: m.replicaOf(seg), Force: m.chance(30, "force")}
	case 16:
		return &ReplicaGone{Replica: m.replicaOf(seg)}
	case 17:
		if m.chance(50, "delete") {
			return &DeleteVolume{Volume: vol.ID}
		}
		return &Rename{Volume: vol.ID, From: vol.Name, To: fmt.Sprintf("v%d", rapid.IntRange(0, 3).Draw(m.rt, "name"))}
	case 18:
		return &StartSync{Segment: sid, Epoch: off(m, vol.Epoch), Replica: m.replicaOf(seg)}
	case 19:
		return &ResizeVolume{Volume: vol.ID, From: vol.Size, To: vol.Size + int64(rapid.IntRange(-2, 2).Draw(m.rt, "blocks"))*4096}
	case 20:
		d, _ := m.view.Disk(m.disks[node])
		if m.chance(40, "fail") {
			return &DiskFailed{Disk: d.ID, OpenCount: off(m, d.OpenCount), Reason: "EIO"}
		}
		return &DiskOpen{Disk: d.ID, Node: m.nodes[node], Instance: m.instances[node], OpenCount: off(m, d.OpenCount+1), Size: 1 << 40, Free: 1 << 30}
	case 23:
		if vol.ID.IsZero() {
			return &InitCluster{ID: m.view.Cluster().ID, Level: holdfast.Level1}
		}
		to := vol.Options
		to.Replicas, to.MinCopies = rapid.IntRange(1, 4).Draw(m.rt, "replicas"), rapid.IntRange(1, 3).Draw(m.rt, "min_copies")
		return &UpdateVolume{Volume: vol.ID, From: vol.Options, To: to}
	case 24:
		have, _ := m.view.Node(m.nodes[node])
		return &SetDuty{Node: have.ID, From: have.Duty, To: pickOne(m, duties, "duty")}
	case 26:
		d, _ := m.view.Disk(m.disks[node])
		if m.chance(40, "remove") {
			return &DiskRemove{Disk: d.ID, Force: m.chance(50, "force")}
		}
		return &SetDiskLeaving{Disk: d.ID, Leaving: !m.chance(60, "stays")}
	case 22:
		c := &ForceRecover{Volume: vol.ID, Expect: off(m, vol.Epoch), Lineage: newID[holdfast.LineageID](m.world)}
		for i := range vol.Segments {
			if m.chance(70, "choose") {
				c.Choices = append(c.Choices, SalvageChoice{Index: uint32(i), Replica: m.replicaOf(&vol.Segments[i])})
			}
		}
		return c
	default:
		if m.chance(4, "remove") {
			return &NodeRemove{Node: m.nodes[node]}
		}
		have, _ := m.view.Node(m.nodes[node])
		m.instances[node] = newID[holdfast.InstanceID](m.world)
		n := m.node(node)
		n.Revision = off(m, have.Revision)
		return &NodeUpdate{Node: n}
	}
}

// written is how far a writer's commit has moved: a repair moves none.
func (m *machine) written(vol *Volume) holdfast.Seq {
	if vol.UnderRepair() && !m.chance(5, "wrote") {
		return 0
	}
	return 1
}

// compareRepair checks what a repair may do to a volume: nothing that its next
// user could tell.
func compareRepair(v, after *Volume, cmd Command, bad func(string, ...any)) {
	begin, attach := cmd.(*AttachBegin)
	if attach && !begin.Maintenance && after.Phase == PhaseAttaching && after.UnderRepair() {
		bad("a user's attach does not end the repair of volume %v", v.ID)
	}
	if !v.UnderRepair() || after.Phase != PhaseDetached {
		return
	}
	if _, salvage := cmd.(*ForceRecover); !salvage && !after.Deleted && !after.Clean() || after.Session != v.Session || after.Format != v.Format {
		bad("the repair of volume %v shows: %+v", v.ID, after)
	}
	for i := range v.Segments {
		if _, salvage := cmd.(*ForceRecover); !salvage && i < len(after.Segments) && (after.Segments[i].End != v.Segments[i].End || after.Segments[i].Floor() != v.Segments[i].Floor()) {
			bad("the repair of segment %v/%d moved its end: %+v", v.ID, i, after.Segments[i])
		}
	}
}

func (c *ForceRecover) chose(index uint32) bool {
	return slices.ContainsFunc(c.Choices, func(s SalvageChoice) bool { return s.Index == index })
}

// compare checks what may never go backwards from one View to the next.
func (m *machine) compare(old, now *View, cmd Command) {
	bad := func(format string, args ...any) {
		m.rt.Fatalf("after %s %+v: %s", Name(cmd), cmd, fmt.Sprintf(format, args...))
	}
	if err := now.check(); err != nil {
		bad("%v", err)
	}
	for n := range old.nodes.all() {
		if after, ok := now.Node(n.ID); !ok || n.Removed && !after.Removed || after.Revision < n.Revision {
			bad("node %v went backwards", n.ID)
		}
	}
	for d := range old.disks.all() {
		after, ok := now.Disk(d.ID)
		if !ok || d.Removed && *after != *d {
			bad("disk %v came back", d.ID)
		}
		for p := range now.ReplicasOn(d.ID) {
			if after.Removed {
				bad("replica %v stands on disk %v, which was removed", p.Replica.ID, d.ID)
			}
			if d.Leaving && after.Leaving && old.segmentHasNot(p) {
				bad("replica %v was placed on disk %v, which is leaving", p.Replica.ID, d.ID)
			}
		}
	}
	for p := range old.replicas.all() {
		if after, ok := now.Replica(p.Replica); !ok || p.Gone && !after.Gone || after.Segment != p.Segment {
			bad("replica id %v was used again", p.Replica)
		}
	}
	for v := range old.volumes.all() {
		after, ok := now.Volume(v.ID)
		if !ok || v.Deleted && !after.Deleted {
			bad("volume %v came back", v.ID)
		}
		compareRepair(v, after, cmd, bad)
		if after.Size < v.Size || after.Epoch < v.Epoch {
			bad("volume %v shrank or lost an epoch: %+v", v.ID, after)
		}
		for i := range min(len(v.Segments), len(after.Segments)) {
			a, b := &v.Segments[i], &after.Segments[i]
			salvage, _ := cmd.(*ForceRecover)
			forced := salvage != nil && salvage.chose(uint32(i))
			if b.ISRVersion < a.ISRVersion || b.LayoutVersion < a.LayoutVersion || b.LastCommit < a.LastCommit && !forced || b.Floor() < a.Floor() && !forced {
				bad("segment %v/%d went backwards:\n%+v\n%+v", v.ID, i, a, b)
			}
			for _, r := range b.Replicas {
				was := a.Replica(r.ID)
				if was == nil {
					continue
				}
				if _, grow := cmd.(*GrowISR); r.Role == holdfast.RoleInSync && was.Role != holdfast.RoleInSync && !grow && !forced {
					bad("replica %v came into the in-sync set without GrowISR", r.ID)
				}
				if r.Opened < was.Opened {
					bad("replica %v unlearned an epoch", r.ID)
				}
			}
			for j := 1; j < len(b.History); j++ {
				if b.History[j].Epoch <= b.History[j-1].Epoch {
					bad("history out of order: %+v", b.History)
				}
			}
		}
	}
}

// segmentHasNot says whether a replica is not there yet.
func (v *View) segmentHasNot(p Placed) bool {
	_, ok := v.Replica(p.Replica.ID)
	return !ok
}

// propertyRounds bounds how often a hundred sequences are drawn until all commands were
// accepted that must have been: the rarest is not, in one round of some dozens.
const propertyRounds = 10

func TestRulesHoldForAnyCommands(t *testing.T) {
	accepted := map[string]int{}
	for range propertyRounds {
		checkRules(t, accepted)
		if t.Failed() || len(neverAccepted(accepted)) == 0 {
			break
		}
	}
	for _, name := range neverAccepted(accepted) {
		t.Errorf("no %s was ever accepted: the property says nothing of it", name)
	}
	t.Logf("accepted: %v", accepted)
}

// checkRules draws sequences of commands, and counts those that took effect.
func checkRules(t *testing.T, accepted map[string]int) {
	rapid.Check(t, func(rt *rapid.T) {
		m := newMachine(t, rt)
		steps := rapid.IntRange(120, 160).Draw(rt, "steps")
		for range steps {
			old, before := m.view, m.dump()
			cmd := m.draw()
			res, err := m.apply(cmd)
			if res.Index != m.index || m.view.Index() != m.index {
				rt.Fatalf("index: result %d, view %d, want %d", res.Index, m.view.Index(), m.index)
			}
			if err != nil || !res.Changed {
				if m.dump() != before {
					rt.Fatalf("%s changed the tables, but says it did not (%v)", Name(cmd), err)
				}
			} else {
				accepted[Name(cmd)]++
				if v, ok := m.view.Volume(volumeOf(cmd)); ok && v.UnderRepair() {
					accepted["repair: "+Name(cmd)]++
				}
			}
			m.compare(old, m.view, cmd)
			if err == nil {
				// Idempotent: proposed again, it is refused or finds its effect.
				again, res, err := m.view.Apply(m.index, cmd)
				if err == nil && res.Changed {
					rt.Fatalf("%s %+v took effect twice", Name(cmd), cmd)
				}
				_ = again
			}
			if m.chance(10, "snapshot") {
				b, err := EncodeSnapshot(m.view)
				if err != nil {
					rt.Fatal(err)
				}
				m.snaps[m.index] = b
			}
		}
		m.replay(&View{}, 0)
		for at, b := range m.snaps {
			v, err := DecodeSnapshot(b)
			if err != nil {
				rt.Fatalf("snapshot at %d: %v", at, err)
			}
			m.replay(v, at)
		}
	})
}

// neverAccepted lists what has not come to pass: the drawing is worth something only if
// all of these do.
func neverAccepted(accepted map[string]int) (names []string) {
	for _, cmd := range []Command{&CreateVolume{}, &AttachBegin{}, &Activate{}, &ShrinkISR{}, &GrowISR{}, &Detach{}, &AddReplica{}, &RemoveReplica{},
		&ReplicaGone{}, &DeleteVolume{}, &Rename{}, &StartSync{}, &ResizeVolume{}, &DiskFailed{}, &DiskOpen{}, &NodeUpdate{}, &NodeRemove{}, &ForceRecover{}, &UpdateVolume{}, &SetDuty{}, &EndRepair{}, &SetDiskLeaving{}, &DiskRemove{}} {
		if accepted[Name(cmd)] == 0 {
			names = append(names, Name(cmd))
		}
	}
	for _, cmd := range []Command{&AttachBegin{}, &Activate{}, &ShrinkISR{}, &GrowISR{}, &AddReplica{}, &RemoveReplica{}} {
		if name := "repair: " + Name(cmd); accepted[name] == 0 {
			names = append(names, name)
		}
	}
	return names
}

// volumeOf is the volume that a command of a writer or the controller names.
func volumeOf(cmd Command) holdfast.VolumeID {
	switch c := cmd.(type) {
	case *AttachBegin:
		return c.Volume
	case *Activate:
		return c.Segment.Volume
	case *ShrinkISR:
		return c.Segment.Volume
	case *GrowISR:
		return c.Segment.Volume
	case *AddReplica:
		return c.Segment.Volume
	case *RemoveReplica:
		return c.Segment.Volume
	}
	return holdfast.VolumeID{}
}

// replay applies the log from an index on to a View and compares the end.
func (m *machine) replay(v *View, from uint64) {
	for i := from; i < m.index; i++ {
		cmd, err := DecodeCommand(m.log[i])
		if err != nil {
			m.rt.Fatal(err)
		}
		v, _, _ = v.Apply(i+1, cmd)
	}
	got, err := EncodeSnapshot(v)
	if err != nil {
		m.rt.Fatal(err)
	}
	want, err := EncodeSnapshot(m.view)
	if err != nil {
		m.rt.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		m.rt.Fatalf("replayed from index %d the tables differ", from)
	}
}

// TestTable compares the persistent table with a map.
func TestTable(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		var tab table[int]
		model := map[key]int{}
		type old struct {
			tab   table[int]
			count int
			sum   int
		}
		var olds []old
		sum := func(t table[int]) (n, s int) {
			var last *int
			for v := range t.all() {
				n, s = n+1, s+*v
				last = v
			}
			_ = last
			return n, s
		}
		for range rapid.IntRange(0, 200).Draw(rt, "steps") {
			var k key
			k[0], k[1] = rapid.Byte().Draw(rt, "shard")%4, rapid.Byte().Draw(rt, "key")%16
			if rapid.IntRange(0, 3).Draw(rt, "op") == 0 {
				tab = tab.remove(k)
				delete(model, k)
			} else {
				v := rapid.IntRange(0, 1000).Draw(rt, "value")
				tab = tab.set(k, &v)
				model[k] = v
			}
			if tab.n != len(model) {
				rt.Fatalf("count: got %d, want %d", tab.n, len(model))
			}
			for k, want := range model {
				if got, ok := tab.get(k); !ok || *got != want {
					rt.Fatalf("get %x: got %v, want %d", k, got, want)
				}
			}
			n, s := sum(tab)
			olds = append(olds, old{tab, n, s})
		}
		for i, o := range olds {
			if n, s := sum(o.tab); n != o.count || s != o.sum {
				rt.Fatalf("table %d changed after it was made: got %d/%d, want %d/%d", i, n, s, o.count, o.sum)
			}
		}
	})
}
