//go:build !race

package sim

import (
	"testing"
	"time"
)

// calmWorld is a volume of three replicas, attached, in use, with nothing going
// wrong but connections that are reset now and then.
func calmWorld(t *testing.T, seed int64, failHeld time.Duration) *world {
	t.Helper()
	w := newWorld(Config{Seed: seed, Nodes: 3, Plain: true})
	w.rates = rates{
		think: 400 * time.Millisecond, reads: 0.4, flushes: 0.05, delay: 2 * time.Millisecond, raftDelay: 20 * time.Millisecond,
		readTime: 2 * time.Millisecond, applyTime: 20 * time.Millisecond, chunkTime: 5 * time.Millisecond, flushEvery: 100 * time.Millisecond,
		window: 200, takeover: 5 * time.Second, minCopies: 1, failHeld: failHeld, checkpoint: 0.01, reset: 20 * time.Second,
	}
	w.begin()
	w.faults()
	w.sweep()
	w.run(20 * time.Second)
	if h := w.ctl.holder; w.check.failure != "" || h == nil || !h.active || len(w.raft.isr()) != 3 {
		t.Fatalf("seed %d: not attached with three in-sync replicas: %s\n%s", seed, w.check.failure, w.explain())
	}
	return w
}

// minute runs a minute and returns how many requests were answered in it, and how
// many with an error.
func (w *world) minute(t *testing.T) (answered, failed int) {
	t.Helper()
	before, bad := w.check.completed, w.ctl.failed
	w.run(w.now + time.Minute)
	if w.check.failure != "" {
		t.Fatalf("at %v: %s", w.now, w.check.failure)
	}
	return w.check.completed - before, w.ctl.failed - bad
}

// TestRunFlat: an hour without a raft quorum, connections reset meanwhile, costs
// no request anything while every replica is there. Then one goes: requests are
// held, for ever or until they fail as on_quorum_loss says, until raft can take it
// out. An hour, in a few seconds.
func TestRunFlat(t *testing.T) {
	for seed := int64(1); seed <= 6; seed++ {
		var failHeld time.Duration
		if seed%2 == 0 {
			failHeld = 15 * time.Second
		}
		w := calmWorld(t, seed, failHeld)
		holder, resets := w.ctl.holder, w.ctl.holder.last
		w.raft.outUntil = w.now + 10*time.Hour
		for m := range 60 {
			if answered, failed := w.minute(t); answered == 0 || failed > 0 {
				t.Fatalf("seed %d, minute %d without raft: %d requests answered, %d with an error\n%s", seed, m, answered, failed, w.explain())
			}
		}
		if w.ctl.holder != holder || len(w.raft.isr()) != 3 {
			t.Fatalf("seed %d: after an hour without raft the volume is another session's, or %d replicas are in sync", seed, len(w.raft.isr()))
		}
		if n := holder.last - resets; n < 20 {
			t.Errorf("seed %d: %d connections were made anew in the hour, want many", seed, n)
		}

		// A replica that is not the holder's own goes away. (A flush of what is
		// durable everywhere needs nobody and would be answered.)
		w.rates.flushes = 0
		for i := range w.reps {
			if i != holder.n {
				w.isolate(i, true)
				break
			}
		}
		w.minute(t) // those that have it in-sync find out
		answered, failed := w.minute(t)
		if answered > 0 {
			t.Errorf("seed %d: %d requests were answered without raft and without an in-sync replica", seed, answered)
		}
		if (failed > 0) != (failHeld > 0) {
			t.Errorf("seed %d: %d requests failed, with on_quorum_loss=%s", seed, failed, map[bool]string{true: "error:15s", false: "freeze"}[failHeld > 0])
		}
		w.raft.outUntil = w.now
		w.minute(t)
		if answered, failed := w.minute(t); answered == 0 || failed > 0 || len(w.raft.isr()) != 2 {
			t.Errorf("seed %d: raft is back: %d requests answered, %d with an error, %d replicas in sync, want 2\n%s", seed, answered, failed, len(w.raft.isr()), w.explain())
		}
	}
}
