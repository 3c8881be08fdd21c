package sim

import (
	"errors"
	"slices"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/replication/coordinator"
)

// register is raft: one record, changed by compare-and-set commands.
type register struct {
	w *world

	epoch      holdfast.Epoch
	active     bool
	version    holdfast.ISRVersion
	members    []*copyRecord
	gone       map[holdfast.ReplicaID]bool // removed for good
	salvaged   bool
	lineage    int // counts salvages
	history    []coordinator.Start
	floor      holdfast.Seq
	attached   bool // somebody has, or is about to have, the right to write
	detached   bool
	end        holdfast.Seq
	outUntil   time.Duration // no quorum until then
	loseAnswer float64
}

var errNoQuorum = errors.New("no quorum")

// isr is the in-sync set.
func (r *register) isr() (ids []holdfast.ReplicaID) {
	for _, m := range r.members {
		if m.role == holdfast.RoleInSync {
			ids = append(ids, m.id)
		}
	}
	return ids
}

func (r *register) inISR(id holdfast.ReplicaID) bool {
	m := r.member(id)
	return m != nil && m.role == holdfast.RoleInSync
}

// attachBegin is AttachBegin: a new epoch.
func (r *register) attachBegin(n *node) coordinator.Options {
	r.epoch++
	r.active, r.attached = false, true
	o := coordinator.Options{
		Now: n.clock(), Node: n.id, PingsOnly: r.w.rates.pingsOnly, Epoch: r.epoch, ISRVersion: r.version,
		History: append([]coordinator.Start(nil), r.history...), Floor: r.floor, Detached: r.detached, End: r.end,
		Copies: r.w.copies, Gone: r.w.ctl.gone(), Salvaged: r.salvaged,
		MinCopies: min(r.w.rates.minCopies, r.w.copies), FailHeldAfter: r.w.rates.failHeld,
		Limits: coordinator.Limits{LossyWait: r.w.rates.lossyWait, WindowOps: r.w.rates.window, FlushEvery: r.w.rates.flushEvery, AttachGrace: r.w.rates.grace},
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
	for _, m := range r.members {
		list = append(list, coordinator.Replica{ID: m.id, Node: m.node.id, Role: m.role, Leaving: m.leaving})
	}
	return list
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
		for _, id := range p.ISR {
			if !r.inISR(id) && Mutant != "activate_from_any" {
				return coordinator.OutcomeRefused
			}
		}
		r.w.check.activate(p.Epoch, p.S, p.Continuous && !r.salvaged, r)
		for _, m := range r.members {
			if slices.Contains(p.ISR, m.id) {
				r.setRole(m, holdfast.RoleInSync)
			} else if m.role == holdfast.RoleInSync {
				r.setRole(m, holdfast.RoleStale)
			}
		}
		r.active, r.detached, r.salvaged, r.floor = true, false, false, p.S
		r.history = append(r.history, coordinator.Start{Epoch: p.Epoch, S: p.S})
	case coordinator.CommandShrink:
		m := r.member(p.Replica)
		switch {
		case !r.active:
			return coordinator.OutcomeConflict
		case p.ISRVersion+1 == r.version && !r.inISR(p.Replica):
			return coordinator.OutcomeApplied
		case p.ISRVersion != r.version && Mutant != "stale_raft_cmd":
			return coordinator.OutcomeConflict
		case m == nil || len(r.isr()) == 1 && r.inISR(p.Replica):
			return coordinator.OutcomeRefused
		}
		if m.leaving {
			r.remove(m)
		} else {
			r.setRole(m, holdfast.RoleStale)
		}
		r.floor = max(r.floor, p.Commit)
	case coordinator.CommandGrow:
		m := r.member(p.Replica)
		switch {
		case !r.active:
			return coordinator.OutcomeConflict
		case p.ISRVersion+1 == r.version && r.inISR(p.Replica):
			return coordinator.OutcomeApplied
		case p.ISRVersion != r.version && Mutant != "stale_raft_cmd":
			return coordinator.OutcomeConflict
		case m == nil || m.leaving || m.role != holdfast.RoleStale && m.role != holdfast.RoleSyncing && m.role != holdfast.RoleInSync:
			return coordinator.OutcomeRefused
		}
		r.setRole(m, holdfast.RoleInSync)
		r.floor = max(r.floor, p.Commit)
	}
	r.version++
	r.w.strike(1)
	r.w.log("raft: e%d %s, isr version %d: %v", p.Epoch, p.Command, r.version, r.indexes())
	return coordinator.OutcomeApplied
}

func (r *register) indexes() []int {
	var out []int
	for _, id := range r.isr() {
		out = append(out, r.w.indexOf(id))
	}
	return out
}

func (r *register) read(wr *writer, a coordinator.ReadMeta) {
	r.route(wr, func() coordinator.Event {
		return coordinator.Meta{ID: a.ID, Epoch: r.epoch, Activated: r.active, ISRVersion: r.version, ISR: r.isr()}
	}, func() coordinator.Event { return coordinator.Meta{ID: a.ID, Err: errNoQuorum} })
}

func (r *register) detach(wr *writer, a coordinator.Detached) {
	epoch := wr.epoch
	r.w.after(r.w.between(time.Millisecond, 20*time.Millisecond), func() {
		if epoch == r.epoch && r.active && a.ISRVersion == r.version {
			r.active, r.attached, r.detached, r.end = false, false, true, a.End
			r.floor = max(r.floor, a.Commit)
			r.w.log("raft: e%d detached at %d", epoch, a.End)
			r.w.check.atRest(r)
		}
	})
}
