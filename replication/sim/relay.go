package sim

import "time"

// relay is a copy that hands on what it was copied while the world moved: one
// replica is away for so long that only chunks can bring it back; while they
// come another one goes away; the first is in sync, the rest of the volume falls
// quiet, its source dies; and the second must be brought back from the first,
// by chunks again. A target that keeps the wrong account of what changed when
// leaves something out.
type relay struct {
	w     *world
	other *node // goes away while the copy runs
	stage int
}

// startRelay sends a replica away, and has it watched when it is back.
func (w *world) startRelay() {
	h := w.ctl.holder
	if w.relaying {
		return
	}
	if h == nil || !h.active || len(w.raft.isr()) < 3 || w.ctl.finished {
		return
	}
	first, other := w.reps[w.rng.Intn(len(w.reps))], w.reps[w.rng.Intn(len(w.reps))]
	if first == other || first == h.node || other == h.node || !first.up || !other.up {
		return
	}
	w.relaying = true
	w.after(45*time.Second, func() { w.relaying = false })
	w.log("relay: n%d goes, to be copied to, n%d goes then", first.index, other.index)
	w.restart(first, false, w.between(6*time.Second, 8*time.Second))
	w.after(6*time.Second, func() {
		w.recycle(nil)
		first.relay = &relay{w: w, other: other}
	})
}

// recycle has every log end at what is applied, so that only chunks can bring
// back who lacks anything.
func (w *world) recycle(but *node) {
	for _, n := range w.reps {
		if n.up && n.host != nil && n != but {
			n.disk.mem.apply(min(n.disk.mem.st.Commit, n.disk.mem.st.Dur))
			n.disk.checkpoint(0)
			n.host.tellApplied()
		}
	}
}

// installed: the first chunk has come.
func (r *relay) installed() {
	if r == nil || r.stage > 0 || r.w.healing {
		return
	}
	r.stage = 1
	w := r.w
	w.after(w.between(0, 100*time.Millisecond), func() {
		if !w.healing {
			w.restart(r.other, false, w.between(15*time.Second, 17*time.Second))
		}
	})
}

// whole: the copy is complete.
func (r *relay) whole(n *node) {
	if r == nil || r.stage != 1 || r.w.healing {
		return
	}
	n.relay = nil
	w := r.w
	w.cover("fault relay")
	w.focus = w.rng.Intn(chunks)
	w.after(6*time.Second, func() { w.recycle(nil) })
	w.after(w.between(7*time.Second, 9*time.Second), func() {
		if w.healing {
			return
		}
		for _, x := range w.reps {
			if x != n && x != r.other {
				w.restart(x, false, w.between(15*time.Second, 20*time.Second))
			}
		}
		w.recycle(nil)
	})
}
