package sim

import (
	"time"

	"github.com/holdfast-storage/holdfast/replication/coordinator"
	"github.com/holdfast-storage/holdfast/replication/replica"
)

// rates say how the world behaves. Every seed draws its own: some worlds are
// calm but for one kind of fault, some have all of them.
type rates struct {
	// The ordinary.
	think       time.Duration // between a client's requests, at most
	reads       float64
	flushes     float64
	delay       time.Duration // of a message, at most
	raftDelay   time.Duration // of a command or an answer, at most
	slowMessage float64
	slowSync    float64
	hungSync    float64
	checkpoint  float64 // per tick
	readTime    time.Duration
	applyTime   time.Duration
	chunkTime   time.Duration
	flushEvery  time.Duration
	window      int           // operations in the replay window
	takeover    time.Duration // how long a dead holder is waited for
	grace       time.Duration // AttachGrace; 0: its default
	pingsOnly   bool          // read_promises=off
	minCopies   int
	failHeld    time.Duration // on_quorum_loss=error:T; 0 freezes
	durable     bool          // ack=durable
	slowWindow  time.Duration // of the look for slow members; 0: the default, longer than a run
	policy      time.Duration // between changes of min_copies
	members     time.Duration // between two changes of who has a replica
	apart       bool          // every clock is as fast or as slow as may be
	lossyWait   time.Duration // T_wait; 0: its default

	// Faults, each as the mean time between two.
	crash, power, blackout, cut, isolate, reset, stall, force, detach, outage, recycle, drill, eclipse, absence, broken, jump time.Duration
	salvage, rot, harm, slowDisk, oneWay, relay, focus                                                                        time.Duration

	loseAnswer float64
	flips      float64 // bits, per append or read
	// strike is the chance of a fault right at a change of membership.
	strike float64
}

func (w *world) drawRates() {
	r := w.rng
	pick := func(p float64, lo, hi time.Duration) time.Duration {
		v := w.between(lo, hi)
		if r.Float64() >= p {
			return 0
		}
		return v
	}
	const s = time.Second
	w.rates = rates{
		think:       w.between(5*time.Millisecond, 120*time.Millisecond),
		reads:       0.2 + 0.4*r.Float64(),
		flushes:     0.1 * r.Float64(),
		delay:       w.between(100*time.Microsecond, 3*time.Millisecond),
		raftDelay:   w.between(2*time.Millisecond, 30*time.Millisecond),
		slowMessage: 0.02 * r.Float64(),
		slowSync:    0.05 * r.Float64(),
		checkpoint:  0.02 * r.Float64(),
		readTime:    w.between(10*time.Microsecond, 3*time.Millisecond),
		applyTime:   w.between(time.Millisecond, 300*time.Millisecond),
		chunkTime:   w.between(2*time.Millisecond, 100*time.Millisecond),
		flushEvery:  w.between(20*time.Millisecond, 2*time.Second),
		takeover:    w.between(500*time.Millisecond, 6*time.Second),
		crash:       pick(0.6, 3*s, 20*s),
		power:       pick(0.6, 3*s, 25*s),
		blackout:    pick(0.25, 10*s, 40*s),
		cut:         pick(0.6, 1*s, 10*s),
		isolate:     pick(0.4, 4*s, 20*s),
		reset:       pick(0.5, 1*s, 8*s),
		stall:       pick(0.4, 3*s, 20*s),
		force:       pick(0.6, 2*s, 12*s),
		detach:      pick(0.3, 5*s, 20*s),
		outage:      pick(0.3, 5*s, 20*s),
		recycle:     pick(0.5, 4*s, 20*s),
	}
	if r.Float64() < 0.3 {
		w.rates.loseAnswer = 0.3 * r.Float64()
	}
	switch p := r.Float64(); {
	case p < 0.35:
		w.rates.delay = w.between(5*time.Millisecond, 60*time.Millisecond)
	case p < 0.55:
		w.rates.delay = w.between(60*time.Millisecond, 250*time.Millisecond)
	}
	w.rates.window = 48
	if r.Float64() < 0.35 {
		// Little is flushed: much is acknowledged that is not committed.
		w.rates.flushEvery, w.rates.window = w.between(2*s, 60*s), 2000
		w.rates.flushes = 0
	}
	w.rates.broken = pick(0.3, 5*s, 25*s)
	if r.Float64() < 0.3 {
		w.rates.flips = 0.01 * r.Float64()
	}
	w.rates.absence = pick(0.5, 3*s, 15*s)
	w.rates.jump = pick(0.3, 10*s, 40*s)
	w.rates.pingsOnly = w.chance(0.35)
	switch w.rng.Intn(3) {
	case 0:
		w.rates.grace = w.between(time.Millisecond, 10*time.Millisecond)
	case 1:
		w.rates.grace = w.between(time.Millisecond, 500*time.Millisecond)
	}
	w.rates.eclipse = pick(0.4, 4*s, 15*s)
	w.rates.drill = pick(0.5, 5*s, 20*s)
	if r.Float64() < 0.6 {
		w.rates.strike = 0.4 * r.Float64()
	}
	if r.Float64() < 0.2 {
		w.rates.hungSync = 0.003 * r.Float64()
	} else if r.Float64() < 0.3 {
		w.rates.lossyWait = w.between(12*s, 20*s)
	}
	w.rates.members = pick(0.3, 3*s, 15*s)
	w.rates.salvage = pick(0.15, 8*s, 40*s)
	w.rates.rot = pick(0.3, 1*s, 10*s)
	w.rates.harm = pick(0.2, 5*s, 20*s)
	w.rates.slowDisk = pick(0.3, 3*s, 15*s)
	w.rates.oneWay = pick(0.3, 3*s, 15*s)
	w.rates.relay = pick(0.25, 8*s, 20*s)
	w.rates.focus = pick(0.3, 1*s, 8*s)
	// Some worlds are calm but for one script, which otherwise others cut short.
	switch script := w.rng.Intn(50); {
	case script < 2 && w.copies == 3:
		w.calm()
		w.rates.relay = 2 * s
	case script < 5 && w.copies > 1:
		w.calm()
		w.rates.eclipse, w.rates.pingsOnly, w.rates.apart = 3*s, false, true
		w.rates.delay, w.rates.raftDelay, w.rates.grace = w.between(200*time.Microsecond, 3*time.Millisecond), 5*time.Millisecond, w.between(time.Millisecond, 10*time.Millisecond)
	case script < 8 && w.copies > 1:
		// The volume goes from hand to hand, sooner than all replicas answer, and
		// now and then a host fails just then.
		w.calm()
		w.rates.force, w.rates.strike = 2*s, 0.1+0.2*r.Float64()
		w.rates.pingsOnly, w.rates.apart, w.rates.raftDelay = false, true, 5*time.Millisecond
		w.rates.delay, w.rates.grace, w.rates.lossyWait = w.between(50*time.Millisecond, 200*time.Millisecond), w.between(time.Millisecond, 20*time.Millisecond), 12*s
	}
}

// calm takes all faults out but what a script brings.
func (w *world) calm() {
	r := &w.rates
	for _, d := range []*time.Duration{
		&r.crash, &r.power, &r.blackout, &r.cut, &r.isolate, &r.reset, &r.stall, &r.force, &r.detach, &r.outage, &r.recycle, &r.drill, &r.eclipse, &r.absence,
		&r.broken, &r.jump, &r.salvage, &r.rot, &r.harm, &r.slowDisk, &r.oneWay, &r.focus, &r.members,
	} {
		*d = 0
	}
	r.strike, r.flips, r.hungSync, r.loseAnswer = 0, 0, 0, 0
}

// drawPolicies draws what a user may demand of a volume. It holds and fails
// requests, which hides what else is wrong: most worlds have none of it.
func (w *world) drawPolicies() {
	const s = time.Second
	r := w.rng
	if r.Float64() < 0.6 {
		w.rates.minCopies = 1 + r.Intn(3)
	}
	if r.Float64() < 0.6 {
		w.rates.failHeld = w.between(2*s, 15*s)
	}
	w.rates.durable = r.Float64() < 0.3
	if r.Float64() < 0.5 {
		// Slow members are taken out, and brought back after a while.
		w.rates.slowWindow = w.between(500*time.Millisecond, 3*s)
	}
	if r.Float64() < 0.4 {
		w.rates.policy = w.between(3*s, 20*s)
	}
}

// faults starts every kind of fault that this world has.
func (w *world) faults() {
	n := len(w.nodes)
	some := func() *node { return w.nodes[w.rng.Intn(n)] }
	w.raft.loseAnswer = w.rates.loseAnswer
	w.every(w.rates.policy, func() {
		w.rates.minCopies = 1 + w.rng.Intn(min(len(w.reps), w.copies))
		if h := w.ctl.holder; h != nil {
			h.step(coordinator.Policy{Copies: w.copies, MinCopies: w.rates.minCopies, FailHeldAfter: w.rates.failHeld})
		}
	})
	w.every(w.rates.members, w.membership)
	w.every(w.rates.salvage, w.salvage)
	w.every(w.rates.rot, w.rot)
	w.every(w.rates.harm, w.harm)
	w.every(w.rates.relay, w.startRelay)
	w.every(w.rates.focus, func() { w.focus = w.rng.Intn(chunks+1) - 1 })
	w.every(w.rates.slowDisk, func() { some().slow(w.between(200*time.Millisecond, 8*time.Second)) })
	w.every(w.rates.oneWay, func() {
		a, d, out := w.rng.Intn(n), w.between(50*time.Millisecond, 15*time.Second), w.chance(0.5)
		w.cover("fault one-way")
		w.log("n%d is cut off one way for %v, what it says %v", a, d, out)
		w.deafen(a, out, true)
		w.after(d, func() { w.deafen(a, out, false) })
	})
	w.every(w.rates.crash, func() { w.restart(some(), false, w.between(10*time.Millisecond, 8*time.Second)) })
	w.every(w.rates.power, func() { w.restart(some(), true, w.between(100*time.Millisecond, 10*time.Second)) })
	w.every(w.rates.blackout, func() {
		for _, x := range w.nodes {
			if w.chance(0.9) {
				w.restart(x, true, w.between(100*time.Millisecond, 10*time.Second))
			}
		}
	})
	w.every(w.rates.cut, func() {
		a, b := w.rng.Intn(n), w.rng.Intn(n)
		if a == b {
			return
		}
		both, d := w.chance(0.7), w.between(50*time.Millisecond, 15*time.Second)
		w.log("cut n%d -> n%d (both ways %v) for %v", a, b, both, d)
		w.setCut(a, b, true)
		if both {
			w.setCut(b, a, true)
		}
		w.after(d, func() { w.setCut(a, b, false); w.setCut(b, a, false) })
	})
	w.every(w.rates.isolate, func() {
		a, d := w.rng.Intn(n), w.between(50*time.Millisecond, 20*time.Second)
		w.log("n%d is cut off for %v", a, d)
		w.isolate(a, true)
		if w.chance(0.4) {
			w.nodes[a].raftCutUntil = w.now + d + w.between(0, 3*time.Second)
		}
		w.after(d, func() { w.isolate(a, false) })
	})
	w.every(w.rates.reset, func() {
		if len(w.links) > 0 {
			l := w.links[w.rng.Intn(len(w.links))]
			w.log("connection n%d -> n%d is reset", l.wr.n, l.host.index)
			l.reset()
		}
	})
	w.every(w.rates.stall, func() { some().pause(w.between(50*time.Millisecond, 9*time.Second)) })
	w.every(w.rates.jump, func() { some().jump(w.between(1050*time.Millisecond, 8*time.Second)) })
	w.every(w.rates.force, func() {
		if !w.ctl.finished {
			w.log("the volume is taken over by force")
			w.ctl.attach()
		}
	})
	w.every(w.rates.detach, w.ctl.detach)
	w.every(w.rates.outage, func() {
		w.raft.outUntil = w.now + w.between(time.Second, 12*time.Second)
		w.log("raft is out of reach until %v", w.raft.outUntil)
	})
	w.every(w.rates.drill, w.drill)
	w.every(w.rates.eclipse, w.eclipse)
	w.every(w.rates.absence, w.absence)
	w.every(w.rates.broken, func() { w.breakDisk(w.reps[w.rng.Intn(len(w.reps))]) })
	w.every(w.rates.recycle, func() {
		if x := some(); x.up && x.disk != nil {
			x.disk.checkpoint(0)
			x.host.tellApplied()
		}
	})
}

// drill is the classic: the writer's side of the cluster is cut off but does
// not notice, the volume is taken over on the other side, perhaps hosts
// restart, and the old writer comes back.
func (w *world) drill() {
	h := w.ctl.holder
	if h == nil || !h.active || w.ctl.finished || len(w.nodes) < 2 {
		return
	}
	here := make([]bool, len(w.nodes)) // the writer's side
	here[h.n] = true
	other := (h.n + 1 + w.rng.Intn(len(w.nodes)-1)) % len(w.nodes)
	for i := range here {
		here[i] = here[i] || i != other && w.chance(0.4)
	}
	split := func(v bool) {
		for a := range here {
			for b := range here {
				if here[a] != here[b] {
					w.setCut(a, b, v)
				}
			}
		}
	}
	w.log("drill: n%d is cut off with %v", h.n, here)
	split(true)
	d := w.between(time.Second, 5*time.Second)
	h.node.raftCutUntil = w.now + d + w.between(0, 4*time.Second)
	w.after(w.between(50*time.Millisecond, 800*time.Millisecond), func() {
		if !w.ctl.finished && !w.healing {
			w.ctl.attachBut(here)
		}
	})
	if w.chance(0.5) {
		for i, x := range w.nodes {
			if here[i] || w.chance(0.3) {
				continue
			}
			power := w.chance(0.5)
			w.after(w.between(500*time.Millisecond, d), func() {
				if !w.healing {
					w.restart(x, power, w.between(10*time.Millisecond, time.Second))
				}
			})
		}
	}
	w.after(d, func() { split(false) })
}

// eclipse is the old writer's best chance to read what is no longer true: it is
// being read, so the members promised, and is cut off from one of them, where
// the volume is taken over at once. That member may have lost its memory of the
// promise with its process. Until well after every promise has run out, the old
// writer is asked to read what the new one is asked to write.
func (w *world) eclipse() {
	h := w.ctl.holder
	other := w.reps[w.rng.Intn(len(w.reps))]
	if h == nil || !h.active || w.ctl.finished || other == h.node || !other.up {
		return
	}
	here := make([]bool, len(w.nodes)) // the old writer's side
	for i := range here {
		here[i] = i != other.index && (i == h.n || w.chance(0.6))
	}
	split := func(v bool) {
		for a := range here {
			for b := range here {
				if here[a] != here[b] {
					w.setCut(a, b, v)
				}
			}
		}
	}
	w.log("eclipse: n%d is cut off with %v", h.n, here)
	end := w.now + 3*time.Second
	var stare func()
	stare = func() {
		if w.healing || w.now > end {
			return
		}
		for _, wr := range []*writer{h, w.ctl.holder} {
			o := &op{wr: wr, kind: opWrite, m: mutation{first: w.rng.Intn(2), n: 1}}
			if wr == h {
				o.kind = opRead
			}
			if wr.active && !wr.ended && !wr.detaching && wr.node.up && wr.node.life == wr.life && wr.reading < 2*depth && wr.writing < 2*depth {
				wr.node.run(wr.life, func() { wr.request(o) })
			}
		}
		w.after(w.between(3*time.Millisecond, 20*time.Millisecond), stare)
	}
	stare()
	w.after(w.between(5*time.Millisecond, 700*time.Millisecond), func() {
		if w.healing {
			return
		}
		split(true)
		h.node.raftCutUntil = end
		soon := w.between(time.Millisecond, 100*time.Millisecond)
		if w.chance(0.4) {
			w.restart(other, false, soon)
		}
		w.after(soon+10*time.Millisecond, func() {
			if !w.ctl.finished && !w.healing {
				w.ctl.attachBut(here)
			}
		})
		w.at(end, func() { split(false) })
	})
}

// absence is the other classic: a copy is away, for long enough to be put out
// or only for a moment, and the writer's host fails while it is brought back.
func (w *world) absence() {
	x := w.reps[w.rng.Intn(len(w.reps))]
	h := w.ctl.holder
	if h == nil || !h.active || !x.up || x == h.node {
		return
	}
	w.log("absence of n%d", x.index)
	switch w.rng.Intn(3) {
	case 0:
		d := w.between(5*time.Second, 7*time.Second)
		w.isolate(x.index, true)
		w.after(d, func() { w.isolate(x.index, false) })
		w.after(d-time.Millisecond, func() { x.ambush = true })
	case 1:
		w.restart(x, false, w.between(10*time.Millisecond, 7*time.Second))
		x.ambush = true
	case 2:
		w.restart(x, true, w.between(10*time.Millisecond, 3*time.Second))
		x.ambush = w.chance(0.5)
		x.ambushIntact = !x.ambush
	}
}

// ambushed has the writer's host fail, now that x is open again, or is
// declared intact.
func (w *world) ambushed(x *node, within time.Duration) {
	if !x.ambush || w.healing {
		return
	}
	x.ambush = false
	if w.ctl.holder == nil {
		return
	}
	h := w.ctl.holder.node
	what := w.rng.Intn(3)
	w.after(w.between(0, within), func() {
		switch {
		case w.healing:
		case what == 0:
			w.restart(h, false, w.between(time.Second, 8*time.Second))
		case what == 1:
			w.restart(h, true, w.between(time.Second, 8*time.Second))
		default:
			w.log("ambush: n%d is cut off", h.index)
			w.isolate(h.index, true)
			w.after(w.between(5*time.Second, 10*time.Second), func() { w.isolate(h.index, false) })
			w.after(w.between(100*time.Millisecond, time.Second), func() {
				if !w.healing && !w.ctl.finished {
					not := make([]bool, len(w.nodes))
					not[h.index] = true
					w.ctl.attachBut(not)
				}
			})
		}
	})
}

// strike hits some host, mostly the writer's, right after a change: of the
// in-sync set, of what a copy is declared to be, of what a client was told.
// There the cluster is between two states.
func (w *world) strike(share float64) {
	if w.healing || !w.chance(w.rates.strike*share) {
		return
	}
	x := w.nodes[w.rng.Intn(len(w.nodes))]
	if h := w.ctl.holder; h != nil && w.chance(0.6) {
		x = h.node
	}
	what := w.rng.Intn(3)
	soon := 30 * time.Millisecond
	if w.chance(0.5) {
		soon = time.Millisecond
	}
	w.after(w.between(0, soon), func() {
		if w.healing {
			return
		}
		switch what {
		case 0:
			w.restart(x, false, w.between(10*time.Millisecond, 8*time.Second))
		case 1:
			w.restart(x, true, w.between(100*time.Millisecond, 10*time.Second))
		case 2:
			w.log("strike: n%d is cut off", x.index)
			w.isolate(x.index, true)
			w.after(w.between(100*time.Millisecond, 8*time.Second), func() { w.isolate(x.index, false) })
		}
	})
}

// breakDisk fails a replica's disk for this process life (R12): what was not
// synced may be gone, and the copy is not intact any more.
func (w *world) breakDisk(x *node) {
	if !x.up {
		return
	}
	h := x.host
	if h == nil {
		return
	}
	w.log("the disk of n%d fails", x.index)
	x.run(x.life, func() { h.step(replica.Failed{Err: errDisk}) })
	w.after(w.between(10*time.Millisecond, 6*time.Second), func() {
		if x.host != h || h == nil {
			return
		}
		x.crash(false)
		if w.chance(0.5) {
			x.disk.powerLoss()
		}
		x.disk.write(record{kind: recIntact, boot: -1})
		w.after(w.between(10*time.Millisecond, 3*time.Second), x.start)
	})
}

// every repeats a fault about every d, until the world heals. 0: never.
func (w *world) every(d time.Duration, do func()) {
	if d == 0 {
		return
	}
	w.after(w.between(d/4, d*7/4), func() {
		if w.healing {
			return
		}
		do()
		w.every(d, do)
	})
}

func (w *world) restart(n *node, power bool, after time.Duration) {
	n.crash(power)
	w.after(after, n.start)
}

func (w *world) isolate(a int, v bool) {
	for b := range w.nodes {
		if a != b {
			w.setCut(a, b, v)
			w.setCut(b, a, v)
		}
	}
}

// deafen cuts one node off in one direction: what it says, or what it is told.
func (w *world) deafen(a int, out, v bool) {
	for b := range w.nodes {
		switch {
		case a == b:
		case out:
			w.setCut(a, b, v)
		default:
			w.setCut(b, a, v)
		}
	}
}

// rot has the medium forget what a block of some base holds; sometimes other
// replicas lose of the same chunk at the same time. A scrub finds it in time, if no read
// does; until it is repaired every read of it fails its checksum (C6).
func (w *world) rot() {
	first, c, several := w.rng.Intn(len(w.reps)), w.rng.Intn(chunks), w.chance(0.3)
	for i := range w.reps {
		x := w.reps[(first+i)%len(w.reps)]
		b := c*blocksPerChunk + w.rng.Intn(blocksPerChunk)
		if x.disk == nil || x.disk.mem.base[b] == 0 || i > 0 && w.chance(0.2) {
			continue
		}
		w.log("block %d of n%d rots", b, x.index)
		w.cover("fault rot")
		x.disk.mem.rot[b] = true
		x.rots++
		w.after(w.between(time.Second, 20*time.Second), func() {
			if x.host != nil {
				x.host.scrub()
			}
		})
		if !several {
			return
		}
	}
}

// harm makes a durable record of a log unreadable, and the process that would
// have it in memory dies. Seldom in the last in-sync log that is whole: what comes
// after that is a salvage.
func (w *world) harm() {
	var sound []*node
	for _, id := range w.raft.isr() {
		if n := w.nodeOf(id); n.disk != nil && !n.disk.mem.st.Damaged {
			sound = append(sound, n)
		}
	}
	if len(sound) == 0 || len(sound) == 1 && !w.chance(0.2) {
		return
	}
	x := sound[w.rng.Intn(len(sound))]
	x.crash(w.chance(0.3))
	if x.disk.harm() {
		w.log("a record in the log of n%d is unreadable", x.index)
		w.cover("fault harm")
	}
	w.after(w.between(10*time.Millisecond, 5*time.Second), x.start)
}

// heal ends every fault.
func (w *world) heal() {
	w.log("the faults are over")
	w.healing = true
	for a := range w.nodes {
		for b := range w.nodes {
			w.setCut(a, b, false)
		}
	}
	w.raft.outUntil, w.raft.loseAnswer = 0, 0
	w.focus = -1
	w.rates.minCopies = 1 // whoever is to go can
	if h := w.ctl.holder; h != nil && !h.ended {
		h.step(coordinator.Policy{Copies: w.copies, MinCopies: 1, FailHeldAfter: w.rates.failHeld})
	}
	w.rates.hungSync, w.rates.slowMessage, w.rates.flips = 0, 0, 0
	for _, n := range w.nodes {
		n.raftCutUntil, n.slowUntil, n.relay = 0, 0, nil
		n.start()
	}
	if w.rates.slowWindow > 0 {
		w.ctl.attach() // a new session holds nobody down for having been slow
	}
}
