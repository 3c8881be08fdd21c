package sim

import (
	"slices"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/replication/coordinator"
)

// copyRecord is what raft knows of one replica.
type copyRecord struct {
	id      holdfast.ReplicaID
	node    *node
	role    holdfast.ReplicaRole
	leaving bool
	// Of an orphan: the epoch that abandoned it, and what it belonged to, for it
	// may be chosen by another salvage.
	since holdfast.Epoch
	order []logEntry
}

func (r *register) member(id holdfast.ReplicaID) *copyRecord {
	for _, m := range r.members {
		if m.id == id {
			return m
		}
	}
	return nil
}

// place makes a record for a new replica on a node. Ids are never used again.
func (r *register) place(n *node, role holdfast.ReplicaRole) *copyRecord {
	w := r.w
	w.ids++
	m := &copyRecord{id: idOf[holdfast.ReplicaID](2, w.ids-1), node: n, role: role}
	r.members = append(r.members, m)
	w.where[m.id] = n
	w.listReps()
	return m
}

// setRole changes a replica's role. One that was removed never comes back.
func (r *register) setRole(m *copyRecord, role holdfast.ReplicaRole) {
	if m.role == role {
		return
	}
	if m.role == holdfast.RoleDeleting || r.gone[m.id] {
		r.w.check.fail("replica %v, which was removed, is %s", m.id, role)
	}
	r.w.cover("role %s -> %s", m.role, role)
	m.role = role
}

// listReps notes who has a replica that counts.
func (w *world) listReps() {
	w.reps = w.reps[:0:0]
	for _, m := range w.raft.members {
		if m.role != holdfast.RoleOrphan && m.role != holdfast.RoleDeleting {
			w.reps = append(w.reps, m.node)
		}
	}
}

// nodeOf returns where a replica is, or was.
func (w *world) nodeOf(id holdfast.ReplicaID) *node { return w.where[id] }

func (w *world) indexOf(id holdfast.ReplicaID) int {
	if n := w.where[id]; n != nil {
		return n.index
	}
	return -1
}

// tell has the holder learn raft's list, after a while.
func (r *register) tell() {
	if h := r.w.ctl.holder; h != nil && !h.ended {
		h.node.after(r.w.between(time.Millisecond, 200*time.Millisecond), func() {
			if !h.ended {
				h.step(coordinator.Replicas{List: r.replicas()})
			}
		})
	}
}

// add places a new, empty replica on a host that has none, if there is one.
func (r *register) add() bool {
	var free []*node
	for _, n := range r.w.nodes {
		if !slices.ContainsFunc(r.members, func(m *copyRecord) bool { return m.node == n }) {
			free = append(free, n)
		}
	}
	if len(free) == 0 {
		return false
	}
	m := r.place(free[r.w.rng.Intn(len(free))], holdfast.RoleSyncing)
	r.w.log("replica %v is placed on n%d", m.id[15], m.node.index)
	r.w.after(r.w.between(time.Millisecond, time.Second), func() { m.node.serve(m.id) })
	r.tell()
	return true
}

// leave tells a replica to go: one that is in sync of an attached volume is taken
// out by the writer first (R2). As many as the volume demands stay.
func (r *register) leave(m *copyRecord) {
	staying := 0
	for _, o := range r.members {
		if o != m && o.role == holdfast.RoleInSync && !o.leaving {
			staying++
		}
	}
	if m.leaving || staying < max(1, min(r.w.rates.minCopies, r.w.copies)) || m.role == holdfast.RoleOrphan || m.role == holdfast.RoleDeleting {
		return
	}
	r.w.log("replica %v on n%d is to go (%s)", m.id[15], m.node.index, m.role)
	if m.role == holdfast.RoleInSync && r.attached {
		m.leaving = true
		r.w.cover("fault leaving")
	} else {
		if m.role == holdfast.RoleInSync {
			r.version++
		}
		r.remove(m)
	}
	r.tell()
}

// remove deletes a replica for good, once its host is there to do it.
func (r *register) remove(m *copyRecord) {
	r.setRole(m, holdfast.RoleDeleting)
	r.gone[m.id] = true
	r.w.listReps()
	var drop func()
	drop = func() {
		if n := m.node; !n.up || n.replica != m.id {
			r.w.after(time.Second, drop)
			return
		}
		r.w.log("replica %v on n%d is deleted", m.id[15], m.node.index)
		m.node.drop()
		r.members = slices.DeleteFunc(r.members, func(o *copyRecord) bool { return o == m })
		r.w.listReps()
		r.tell()
	}
	r.w.after(r.w.between(10*time.Millisecond, 4*time.Second), drop)
}

// startSync is StartSync: from here on a replica holds no one state of the volume.
func (r *register) startSync(epoch holdfast.Epoch, id holdfast.ReplicaID) bool {
	m := r.member(id)
	if epoch != r.epoch || m == nil || m.role != holdfast.RoleStale && m.role != holdfast.RoleSyncing {
		return false
	}
	r.setRole(m, holdfast.RoleSyncing)
	return true
}

// membership is what operators do to a volume's replicas while it is used: they
// add some, tell others to go, and see to it that the number comes right again.
func (w *world) membership() {
	r := w.raft
	switch {
	case w.chance(0.5) && len(w.reps) <= w.copies:
		if r.add() && w.chance(0.5) {
			r.leave(r.members[w.rng.Intn(len(r.members))])
		}
	case len(w.reps) > 1:
		r.leave(r.members[w.rng.Intn(len(r.members))])
	}
}

// tend brings the number of replicas to what is asked for: orphans go, new ones
// are made, surplus ones go.
func (w *world) tend() {
	r, staying := w.raft, 0
	if w.ctl.hopeless() {
		w.ctl.callOperator()
	}
	if w.healing {
		w.giveUp()
	}
	var syncing *copyRecord
	for _, m := range slices.Clone(r.members) {
		switch {
		case m.role == holdfast.RoleOrphan, m.leaving && m.role != holdfast.RoleInSync && m.role != holdfast.RoleDeleting:
			r.remove(m) // one that was told to go and lost its writer goes too
		case m.role != holdfast.RoleDeleting && !m.leaving:
			staying++
			if m.role != holdfast.RoleInSync {
				syncing = m
			}
		}
	}
	switch {
	case staying < w.copies:
		r.add()
	case staying > w.copies && syncing != nil:
		r.leave(syncing)
	case staying > w.copies:
		r.leave(r.members[w.rng.Intn(len(r.members))])
	}
}

// salvage is the operator's last resort: whoever is in sync, and whoever writes, is
// declared dead, and is; the volume goes on from one replica, whatever it holds, in
// a new lineage (ForceRecover). The others are orphans, and come back as such.
func (w *world) salvage() {
	r := w.raft
	var choice []*copyRecord
	for _, m := range r.members {
		whole := m.role == holdfast.RoleInSync || m.role == holdfast.RoleStale || m.role == holdfast.RoleOrphan
		if whole && m.node.replica == m.id && !m.node.disk.mem.st.Damaged {
			choice = append(choice, m)
		}
	}
	if w.ctl.finished || r.epoch == 0 {
		return
	}
	if len(choice) == 0 {
		// Nothing holds any one state: the medium must be made to read again.
		for _, id := range r.isr() {
			if n := w.nodeOf(id); n.disk != nil {
				n.crash(false)
				n.disk.mend()
				w.after(w.between(time.Second, 3*time.Second), n.start)
			}
		}
		w.after(4*time.Second, func() {
			if !w.ctl.finished {
				w.ctl.attach() // who wrote last has given that replica up
			}
		})
		return
	}
	chosen := choice[w.rng.Intn(len(choice))]
	for _, m := range choice {
		if m.role != holdfast.RoleInSync && w.chance(0.5) {
			chosen = m
		}
	}
	w.log("salvage: the volume goes on from replica %v on n%d (%s)", chosen.id[15], chosen.node.index, chosen.role)
	w.cover("fault salvage of %s", chosen.role)
	for _, n := range w.nodes {
		back := w.between(3*time.Second, 12*time.Second)
		if n == chosen.node {
			back = w.between(10*time.Millisecond, time.Second)
		}
		w.restart(n, w.chance(0.5), back)
	}
	r.forceRecover(chosen)
	w.after(w.between(time.Second, 15*time.Second), func() {
		if !w.healing {
			w.tend()
		}
	})
}

// forceRecover is ForceRecover.
func (r *register) forceRecover(chosen *copyRecord) {
	r.epoch++
	r.lineage++
	order := r.w.check.order
	if chosen.role == holdfast.RoleOrphan {
		// It took no part in the epochs since it was abandoned: they do not cut it.
		r.history = slices.DeleteFunc(slices.Clone(r.history), func(s coordinator.Start) bool { return s.Epoch >= chosen.since })
		r.w.check.order, order = chosen.order, slices.Clone(order)
	}
	for _, m := range slices.Clone(r.members) {
		switch {
		case m == chosen:
			r.setRole(m, holdfast.RoleInSync)
			m.leaving, m.order = false, nil
		case m.role == holdfast.RoleInSync || m.role == holdfast.RoleStale:
			r.setRole(m, holdfast.RoleOrphan)
			m.since, m.leaving, m.order = r.epoch, false, slices.Clone(order)
		case m.role == holdfast.RoleSyncing:
			r.remove(m)
		}
	}
	r.version++
	r.active, r.attached, r.detached, r.floor, r.end, r.salvaged = false, false, false, 0, 0, true
	r.w.listReps()
}
