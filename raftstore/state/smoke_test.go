package state

import (
	"bytes"
	"testing"

	"github.com/holdfast-storage/holdfast"
)

// TestOneVolumesLife walks a volume from the bootstrap to its tombstone.
func TestOneVolumesLife(t *testing.T) {
	w := newWorld(t, 3)
	vol, _ := w.create("data", 3)
	att := w.must(&AttachBegin{Volume: vol.ID, Node: w.nodes[0], Instance: w.instances[0], Session: newID[holdfast.SessionID](w)})
	if att.Epoch != 1 || att.Volume.Phase != PhaseAttaching || len(att.Volume.Segments[0].ISR()) != 3 {
		t.Fatalf("attach: got %+v", att)
	}
	seg := holdfast.SegmentID{Volume: vol.ID}
	isr := att.Volume.Segments[0].ISR()
	act := w.must(&Activate{Segment: seg, Epoch: 1, S: 0, ISR: isr, Continuous: true})
	if act.ISRVersion != 2 || act.Volume.Phase != PhaseAttached {
		t.Fatalf("activate: got %+v", act)
	}
	shrunk := w.must(&ShrinkISR{Segment: seg, Epoch: 1, ISRVersion: 2, Replica: isr[2], Commit: 7})
	grown := w.must(&GrowISR{Segment: seg, Epoch: 1, ISRVersion: shrunk.ISRVersion, Replica: isr[2], Commit: 9})
	if got := grown.Volume.Segments[0]; grown.ISRVersion != 4 || got.LastCommit != 9 || len(got.ISR()) != 3 {
		t.Fatalf("grow: got %+v", got)
	}
	w.must(&Detach{Volume: vol.ID, Epoch: 1, Ends: []SegmentEnd{{Index: 0, End: 12, Commit: 12}}})
	w.must(&DeleteVolume{Volume: vol.ID})
	for _, r := range isr {
		w.must(&ReplicaGone{Replica: r})
	}
	got, ok := w.view.Volume(vol.ID)
	if !ok || !got.Deleted || len(got.Segments) != 0 {
		t.Fatalf("tombstone: got %+v", got)
	}
	snap, err := EncodeSnapshot(w.view)
	if err != nil {
		t.Fatal(err)
	}
	back, err := DecodeSnapshot(snap)
	if err != nil {
		t.Fatal(err)
	}
	again, err := EncodeSnapshot(back)
	if err != nil || !bytes.Equal(snap, again) {
		t.Fatalf("a restored snapshot differs from the one it came from (%v)", err)
	}
}
