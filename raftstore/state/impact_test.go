package state

import (
	"slices"
	"testing"

	"github.com/holdfast-storage/holdfast"
)

func TestWhatIfDown(t *testing.T) {
	w := newWorld(t, 4)
	for _, id := range w.nodes[:3] {
		n, _ := w.view.Node(id)
		w.must(&SetMember{Node: id, From: n.Kind, To: MemberVoter})
	}
	// The worlds' volumes stand on the first nodes: three, two and one of them.
	make := func(name string, replicas, minCopies int) holdfast.VolumeID {
		id := newID[holdfast.VolumeID](w)
		seg := SegmentPlacement{}
		for i := range replicas {
			seg = append(seg, ReplicaPlacement{Replica: newID[holdfast.ReplicaID](w), Disk: w.disks[i]})
		}
		w.must(&CreateVolume{Volume: id, Name: name, Size: 1 << 30, Lineage: newID[holdfast.LineageID](w), Placement: []SegmentPlacement{seg},
			Options: VolumeOptions{Replicas: replicas, SegmentSize: 1 << 30, AckMode: holdfast.AckReceived, MinCopies: minCopies}})
		return id
	}
	make("three", 3, 1)
	make("demanding", 3, 3)
	make("two", 2, 1)
	one := make("one", 1, 1)
	w.must(&AttachBegin{Volume: one, Node: w.nodes[3], Instance: w.instances[3], Session: newID[holdfast.SessionID](w)})

	look := func(node int, down ...int) (Impact, map[string]VolumeImpact) {
		i := w.view.WhatIfDown(w.nodes[node], func(n holdfast.NodeID) bool {
			return slices.ContainsFunc(down, func(d int) bool { return w.nodes[d] == n })
		})
		by := map[string]VolumeImpact{}
		for _, v := range i.Volumes {
			by[v.Volume.Name] = v
		}
		return i, by
	}
	for _, c := range []struct {
		when   string
		node   int
		down   []int
		loses  map[string]Loss
		left   map[string]int
		quorum bool // lost
	}{
		{"all are up, the first", 0, nil, map[string]Loss{"three": LosesRedundancy, "demanding": LosesWrites, "two": LosesRedundancy, "one": LosesData},
			map[string]int{"three": 2, "demanding": 2, "two": 1, "one": 0}, false},
		{"the second", 1, nil, map[string]Loss{"three": LosesRedundancy, "demanding": LosesWrites, "two": LosesRedundancy}, nil, false},
		{"the third", 2, nil, map[string]Loss{"three": LosesRedundancy, "demanding": LosesWrites}, nil, false},
		{"the fourth, a holder without copies", 3, nil, map[string]Loss{"one": LosesNothing}, nil, false},
		{"the second, while the first is gone", 1, []int{0}, map[string]Loss{"three": LosesRedundancy, "demanding": LosesWrites, "two": LosesAvailability}, nil, true},
		{"the third, while two are gone", 2, []int{0, 1}, map[string]Loss{"three": LosesAvailability, "demanding": LosesAvailability}, nil, true},
	} {
		i, by := look(c.node, c.down...)
		if i.QuorumLost != c.quorum || i.Voters != 3 {
			t.Errorf("%s: quorum lost %v of %d voters, want %v of 3", c.when, i.QuorumLost, i.Voters, c.quorum)
		}
		if len(by) != len(c.loses) {
			t.Errorf("%s: got %d volumes, want %d", c.when, len(by), len(c.loses))
		}
		for name, want := range c.loses {
			if got := by[name].Loss; got != want {
				t.Errorf("%s: %s loses %v, want %v", c.when, name, got, want)
			}
		}
		for name, want := range c.left {
			if got := by[name].InSyncLeft; got != want {
				t.Errorf("%s: %s has %d in-sync copies left, want %d", c.when, name, got, want)
			}
		}
	}
	if _, by := look(3); !by["one"].Attached {
		t.Error("the holder's volume is not called attached")
	}
	// A copy on a failed disk is none that answers.
	w.must(&DiskFailed{Disk: w.disks[1], OpenCount: 1, Reason: "EIO"})
	if _, by := look(0); by["two"].Loss != LosesAvailability {
		t.Errorf("the other copy's disk failed: two loses %v, want %v", by["two"].Loss, LosesAvailability)
	}
}
