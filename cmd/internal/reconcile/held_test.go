package reconcile

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

func (a *Attachments) entries() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.held)
}

// TestNothingIsKeptOfWhatIsNotHeld: what a node attached, detached, mounted, was asked
// for in vain or lost leaves nothing in its memory.
func TestNothingIsKeptOfWhatIsNotHeld(t *testing.T) {
	reg, n := one(t)
	for i := range 8 {
		name := fmt.Sprint("v", i)
		v := n.create(t, name)
		switch i % 4 {
		case 0:
			if _, err := n.att.Attach(t.Context(), name, AttachOptions{NBD: true}); err != nil {
				t.Fatal(err)
			}
			if err := n.att.Detach(t.Context(), v.ID, false); err != nil {
				t.Fatal(err)
			}
		case 1:
			if _, err := n.att.Mount(t.Context(), name, "c", nil); err != nil {
				t.Fatal(err)
			}
			if err := n.att.Unmount(t.Context(), name, "c"); err != nil {
				t.Fatal(err)
			}
		case 2:
			if err := n.att.Detach(t.Context(), v.ID, false); err != nil { // it never was attached
				t.Fatal(err)
			}
		case 3:
			n.devices.mu.Lock()
			n.devices.fail["mount"] = holdfast.Errorf(holdfast.ErrIO, "bad superblock")
			n.devices.mu.Unlock()
			if _, err := n.att.Mount(t.Context(), name, "c", nil); !errors.Is(err, holdfast.ErrIO) {
				t.Fatalf("a mount that fails: %v", err)
			}
			n.devices.mu.Lock()
			delete(n.devices.fail, "mount")
			n.devices.mu.Unlock()
		}
		reg.must(t, &state.DeleteVolume{Volume: v.ID})
	}
	await(t, reg, "nothing is kept", func() bool { return n.att.entries() == 0 })

	// A session that ends by itself: the volume is another's.
	v := n.create(t, "lost")
	if _, err := n.att.Attach(t.Context(), "lost", AttachOptions{NBD: true}); err != nil {
		t.Fatal(err)
	}
	if got := n.att.entries(); got != 1 || len(n.att.All()) != 1 {
		t.Errorf("%d are kept, %v, want the one that is attached", got, n.att.All())
	}
	now, _ := reg.View().Volume(v.ID)
	reg.must(t, &state.AttachBegin{Volume: v.ID, Node: n.id, Instance: n.inst, Expect: now.Epoch, Session: holdfast.NewID[holdfast.SessionID](), Force: true})
	await(t, reg, "the session that was taken over is forgotten", func() bool { return n.att.entries() == 0 })
}

// TestOneTurnForEachVolume: however many ask for a volume's turn and give up, one has it
// at a time, and nothing is left when all are gone.
func TestOneTurnForEachVolume(t *testing.T) {
	_, n := one(t)
	id := holdfast.NewID[holdfast.VolumeID]()
	h, err := n.att.enter(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	for range 64 { // those who give up do not take the turn from who has it
		if _, err := n.att.enter(over, id); !errors.Is(err, holdfast.ErrTimeout) {
			t.Fatalf("while another has the turn: got it (%v)", err)
		}
	}
	n.att.leave(id, h)
	var having, had atomic.Int32
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			for k := range 200 {
				ctx, cancel := context.WithCancel(t.Context())
				if (i+k)%5 == 0 {
					cancel() // whether it gets the turn is left to chance
				}
				h, err := n.att.enter(ctx, id)
				cancel()
				if err != nil {
					continue
				}
				if having.Add(1) != 1 {
					t.Error("two have the turn of one volume")
				}
				had.Add(1)
				having.Add(-1)
				n.att.leave(id, h)
			}
		})
	}
	wg.Wait()
	if had.Load() == 0 || n.att.entries() != 0 {
		t.Errorf("%d turns, %d entries left", had.Load(), n.att.entries())
	}
}
