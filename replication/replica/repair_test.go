package replica

import (
	"reflect"
	"testing"

	"github.com/holdfast-storage/holdfast"
)

// opened is a copy with entries 1 to 5, all of them durable, in an open session
// of epoch 7 that told commit 4.
func opened(t *testing.T, st Status) *Core {
	t.Helper()
	st.Fence, st.Tail, st.TailEpoch, st.Dur, st.Commit, st.Applied = 6, 5, 6, 5, 3, 3
	c := New(Options{Status: st, Fresh: true})
	c.Step(Fence{Conn: 1, Epoch: 7})
	c.Step(Fenced{})
	c.Step(Open{Conn: 1, Epoch: 7, CutTo: 5})
	c.Step(Commit{Conn: 1, Epoch: 7, Seq: 4})
	return c
}

func wantActions(t *testing.T, what string, got []Action, want ...Action) {
	t.Helper()
	if len(got) != len(want) || len(got) > 0 && !reflect.DeepEqual(append([]Action(nil), got...), want) {
		t.Fatalf("%s: got %+v, want %+v", what, got, want)
	}
}

func TestRepair(t *testing.T) {
	c := opened(t, Status{})
	wantActions(t, "another connection", c.Step(Repair{Conn: 2, Epoch: 7, AsOf: 4, Batch: 1}), Drop{Batch: 1})
	wantActions(t, "above commit", c.Step(Repair{Conn: 1, Epoch: 7, AsOf: 5, Batch: 2}),
		SendRepaired{Conn: 1, Batch: 2, AsOf: 5, Retry: true}, Drop{Batch: 2})
	wantActions(t, "at commit", c.Step(Repair{Conn: 1, Epoch: 7, AsOf: 4, Batch: 3}), LogRepair{Batch: 3, AsOf: 4})
	// While the log is being changed nothing else of it begins, but appends.
	wantActions(t, "a flush of what is durable", c.Step(Flush{Conn: 1, Epoch: 7, ID: 9}), SendFlushed{Conn: 1, Epoch: 7, ID: 9, Dur: 5})
	wantActions(t, "an unknown answer", c.Step(Repaired{Batch: 8}))
	wantActions(t, "repaired", c.Step(Repaired{Batch: 3}), SendRepaired{Conn: 1, Batch: 3, AsOf: 4})
	for batch, err := range map[Batch]error{4: holdfast.ErrRefused, 5: holdfast.ErrIntegrity} {
		c.Step(Repair{Conn: 1, Epoch: 7, AsOf: 4, Batch: batch})
		wantActions(t, "refused by the disk", c.Step(Repaired{Batch: batch, Err: err}), SendRepaired{Conn: 1, Batch: batch, AsOf: 4, Retry: true})
	}
	// A fence waits for what is under way, and the answer reaches nobody.
	c.Step(Repair{Conn: 1, Epoch: 7, AsOf: 4, Batch: 6})
	for _, a := range c.Step(Fence{Conn: 2, Epoch: 8}) {
		if _, ok := a.(LogFence); ok {
			t.Fatal("the log is fenced while a repair changes it")
		}
	}
	wantActions(t, "the fence", c.Step(Repaired{Batch: 6}), LogFence{Epoch: 8})

	c = opened(t, Status{})
	c.Step(Repair{Conn: 1, Epoch: 7, AsOf: 4, Batch: 1})
	got := c.Step(Repaired{Batch: 1, Err: holdfast.ErrIO})
	if len(got) == 0 || c.failed == nil {
		t.Fatalf("after an I/O error: %+v", got)
	}
}

// A copy that is being filled takes chunks by INSTALL alone.
func TestNoRepairOfACopyInTheMaking(t *testing.T) {
	c := New(Options{Status: Status{Fence: 6, Syncing: true}, Fresh: true})
	c.Step(Fence{Conn: 1, Epoch: 7})
	c.Step(Fenced{})
	c.Step(Join{Conn: 1, Epoch: 7, At: 5})
	c.Step(Opened{})
	c.Step(Commit{Conn: 1, Epoch: 7, Seq: 5})
	wantActions(t, "filling", c.Step(Repair{Conn: 1, Epoch: 7, AsOf: 5, Batch: 1}),
		SendRepaired{Conn: 1, Batch: 1, AsOf: 5, Retry: true}, Drop{Batch: 1})
}

// What is lost of the log is told until it is cut or dropped, or
// the writer took this copy as it is.
func TestLostIsTold(t *testing.T) {
	for what, step := range map[string]func(c *Core){
		"declared intact": func(c *Core) { c.Step(Intact{Conn: 1, Epoch: 7}) },
		"cut": func(c *Core) {
			c.Step(Fence{Conn: 2, Epoch: 8})
			c.Step(Fenced{})
			c.Step(Open{Conn: 2, Epoch: 8, CutTo: 4})
			c.Step(Opened{})
		},
		"dropped": func(c *Core) {
			c.Step(Fence{Conn: 2, Epoch: 8})
			c.Step(Fenced{})
			c.Step(Join{Conn: 2, Epoch: 8, At: 9})
			c.Step(Opened{Held: 5})
			if got := c.Status().Held; got != 4 {
				t.Errorf("whole up to %d, want 4", got)
			}
		},
	} {
		c := opened(t, Status{Lost: 5})
		c.Step(AppliedTo{Applied: 5})
		if got := c.Status().Lost; got != 5 {
			t.Errorf("lost %d, want 5", got)
		}
		step(c)
		if got := c.Status().Lost; got != 0 {
			t.Errorf("%s: still lost %d", what, got)
		}
	}
}
