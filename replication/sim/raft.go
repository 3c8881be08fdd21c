package sim

import (
	"errors"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/replication/coordinator"
)

// register is raft: one record, changed by compare-and-set commands.
type register struct {
	leaving holdfast.ReplicaID // is to be taken out; zero: none
	w       *world

	epoch      holdfast.Epoch
	active     bool
	version    holdfast.ISRVersion
	isr        []holdfast.ReplicaID // in replica order
	history    []coordinator.Start
	floor      holdfast.Seq
	detached   bool
	end        holdfast.Seq
	outUntil   time.Duration // no quorum until then
	loseAnswer float64
}

var errNoQuorum = errors.New("no quorum")

func (r *register) inISR(id holdfast.ReplicaID) bool {
	for _, x := range r.isr {
		if x == id {
			return true
		}
	}
	return false
}

// attachBegin is AttachBegin: a new epoch.
func (r *register) attachBegin(n *node) coordinator.Options {
	r.epoch++
	r.active = false
	o := coordinator.Options{
		Now: n.clock(), Node: n.id, PingsOnly: r.w.rates.pingsOnly, Epoch: r.epoch, ISRVersion: r.version,
		History: append([]coordinator.Start(nil), r.history...), Floor: r.floor, Detached: r.detached, End: r.end,
		Copies: len(r.w.reps), Gone: r.w.ctl.gone(),
		MinCopies: min(r.w.rates.minCopies, len(r.w.reps)), FailHeldAfter: r.w.rates.failHeld,
		Limits: coordinator.Limits{WindowOps: r.w.rates.window, FlushEvery: r.w.rates.flushEvery, AttachGrace: r.w.rates.grace},
	}
	if r.w.rates.durable {
		o.Ack = holdfast.AckDurable
	}
	if r.w.rates.slowWindow > 0 {
		o.Limits.SlowWindow, o.Limits.SlowSamples = r.w.rates.slowWindow, 3
	}
	o.Replicas = r.replicas()
	return o
}

// replicas is raft's list.
func (r *register) replicas() (list []coordinator.Replica) {
	for _, x := range r.w.reps {
		role := holdfast.RoleStale
		if r.inISR(x.replica) {
			role = holdfast.RoleInSync
		}
		list = append(list, coordinator.Replica{ID: x.replica, Node: x.id, Role: role, Leaving: x.replica == r.leaving})
	}
	return list
}

// setLeaving says which replica is to go, none if it is zero, and tells the holder.
// (Here one that went comes back with what it has, like one that was evicted.)
func (r *register) setLeaving(id holdfast.ReplicaID) {
	r.leaving = id
	if h := r.w.ctl.holder; h != nil && !h.ended {
		h.node.after(r.w.between(time.Millisecond, 200*time.Millisecond), func() {
			if !h.ended {
				h.step(coordinator.Replicas{List: r.replicas()})
			}
		})
	}
}

// route delivers a command after a delay, and its answer after another. While
// there is no quorum it waits; the asker gives up after a while and the command
// may be applied later.
func (r *register) route(wr *writer, apply func() coordinator.Event, unknown func() coordinator.Event) {
	w := r.w
	answered := false
	answer := func(ev func() coordinator.Event, d time.Duration) {
		wr.node.after(d, func() {
			if !answered {
				answered = true
				wr.step(ev())
			}
		})
	}
	delay := w.between(time.Millisecond, w.rates.raftDelay)
	lost := w.chance(r.loseAnswer)
	if lost && w.chance(0.5) {
		delay = w.between(100*time.Millisecond, 8*time.Second)
	}
	if out := max(r.outUntil, wr.node.raftCutUntil); w.now < out {
		delay += out - w.now
		if w.chance(0.3) {
			apply = nil // never arrives
		}
	}
	if apply != nil {
		w.after(delay, func() {
			ev := apply()
			if !lost {
				answer(func() coordinator.Event { return ev }, w.between(time.Millisecond, w.rates.raftDelay))
			}
		})
	}
	answer(unknown, w.between(2*time.Second, 4*time.Second))
}

func (r *register) propose(wr *writer, p coordinator.Propose) {
	p.ISR = append([]holdfast.ReplicaID(nil), p.ISR...)
	r.route(wr, func() coordinator.Event {
		outcome := r.apply(wr, p)
		return coordinator.Proposed{ID: p.ID, Outcome: outcome, ISRVersion: r.version}
	}, func() coordinator.Event { return coordinator.Proposed{ID: p.ID, Outcome: coordinator.OutcomeUnknown} })
}

// apply is the state machine of protocol section 3.
func (r *register) apply(wr *writer, p coordinator.Propose) coordinator.Outcome {
	if p.Epoch != r.epoch && (Mutant != "stale_raft_cmd" || p.Command == coordinator.CommandActivate) {
		return coordinator.OutcomeFenced
	}
	switch p.Command {
	case coordinator.CommandActivate:
		if r.active {
			if r.history[len(r.history)-1] == (coordinator.Start{Epoch: p.Epoch, S: p.S}) {
				return coordinator.OutcomeApplied
			}
			return coordinator.OutcomeConflict
		}
		if p.ISRVersion != r.version {
			return coordinator.OutcomeConflict
		}
		if p.S < r.floor || len(p.ISR) == 0 {
			return coordinator.OutcomeRefused
		}
		r.w.check.activate(p.Epoch, p.Continuous, r)
		r.active, r.isr, r.detached, r.floor = true, p.ISR, false, p.S
		r.history = append(r.history, coordinator.Start{Epoch: p.Epoch, S: p.S})
	case coordinator.CommandShrink:
		if !r.active {
			return coordinator.OutcomeConflict
		}
		if p.ISRVersion+1 == r.version && !r.inISR(p.Replica) {
			return coordinator.OutcomeApplied
		}
		if p.ISRVersion != r.version && Mutant != "stale_raft_cmd" {
			return coordinator.OutcomeConflict
		}
		if len(r.isr) == 1 && r.inISR(p.Replica) {
			return coordinator.OutcomeRefused
		}
		var isr []holdfast.ReplicaID
		for _, x := range r.isr {
			if x != p.Replica {
				isr = append(isr, x)
			}
		}
		r.isr = isr
		r.floor = max(r.floor, p.Commit)
	case coordinator.CommandGrow:
		if !r.active {
			return coordinator.OutcomeConflict
		}
		if p.ISRVersion+1 == r.version && r.inISR(p.Replica) {
			return coordinator.OutcomeApplied
		}
		if p.ISRVersion != r.version && Mutant != "stale_raft_cmd" {
			return coordinator.OutcomeConflict
		}
		if p.Replica == r.leaving {
			return coordinator.OutcomeRefused
		}
		if !r.inISR(p.Replica) {
			r.isr = append(append([]holdfast.ReplicaID(nil), r.isr...), p.Replica)
		}
		r.floor = max(r.floor, p.Commit)
	}
	r.version++
	r.w.strike(1)
	r.w.log("raft: e%d %s, isr version %d: %v", p.Epoch, p.Command, r.version, r.indexes())
	return coordinator.OutcomeApplied
}

func (r *register) indexes() []int {
	var out []int
	for _, id := range r.isr {
		out = append(out, r.w.indexOf(id))
	}
	return out
}

func (r *register) read(wr *writer, a coordinator.ReadMeta) {
	r.route(wr, func() coordinator.Event {
		return coordinator.Meta{ID: a.ID, Epoch: r.epoch, Activated: r.active, ISRVersion: r.version, ISR: append([]holdfast.ReplicaID(nil), r.isr...)}
	}, func() coordinator.Event { return coordinator.Meta{ID: a.ID, Err: errNoQuorum} })
}

func (r *register) detach(wr *writer, a coordinator.Detached) {
	epoch := wr.epoch
	r.w.after(r.w.between(time.Millisecond, 20*time.Millisecond), func() {
		if epoch == r.epoch && r.active && a.ISRVersion == r.version {
			r.active, r.detached, r.end = false, true, a.End
			r.floor = max(r.floor, a.Commit)
			r.w.log("raft: e%d detached at %d", epoch, a.End)
		}
	})
}
