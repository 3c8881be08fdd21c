package sim

import (
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/replication/coordinator"
)

// controller attaches the volume somewhere, again and again, like the users
// and operators of a cluster do.
type controller struct {
	w           *world
	ops         uint64
	failed      int // requests answered with an error
	holder      *writer
	regressions int
	lastReach   []time.Duration // since when each node answers everybody; -1 not
	reading     []*op
	readAll     bool
	final       *writer
	finished    bool
	called      bool // an operator is on the way
}

// isGone is what the liveness record says: silent for 5 s.
func (c *controller) isGone(n *node) bool { return !n.up && c.w.now-n.downAt >= 5*time.Second }

func (c *controller) gone() []holdfast.NodeID {
	var out []holdfast.NodeID
	for _, n := range c.w.nodes {
		if c.isGone(n) {
			out = append(out, n.id)
		}
	}
	return out
}

// livenessChanged tells every writer, once the record knows.
func (c *controller) livenessChanged() {
	tell := func() {
		for _, n := range c.w.nodes {
			gone := c.isGone(n)
			for _, m := range c.w.nodes {
				for _, wr := range m.writers {
					wr := wr
					id := n.id
					m.run(m.life, func() { wr.step(coordinator.NodeGone{Node: id, Gone: gone}) })
				}
			}
		}
	}
	c.w.after(time.Millisecond, tell)
	c.w.after(5*time.Second+time.Millisecond, tell)
}

// reachedThroughout says whether a node was up, running and in everybody's
// reach for all of T_wait.
func (c *controller) reachedThroughout(n *node) bool {
	t := c.lastReach[n.index]
	wait := c.w.rates.lossyWait
	if wait == 0 {
		wait = 30 * time.Second
	}
	return t >= 0 && c.w.now-t > wait+time.Second
}

// watch runs all the time: it notes reach, and replaces a lost holder.
func (c *controller) watch() {
	w := c.w
	for i, n := range w.nodes {
		ok := n.up && w.now >= n.pausedUntil && (w.now >= n.slowUntil+2*time.Second || n.slowUntil == 0)
		for j := range w.nodes {
			ok = ok && w.reachable(i, j)
		}
		switch {
		case !ok:
			c.lastReach[i] = -1
		case c.lastReach[i] < 0:
			c.lastReach[i] = w.now
		}
	}
	h := c.holder
	lost := h == nil || h.ended && (h.node.up && h.node.life == h.life || w.now-h.node.downAt > w.rates.takeover || h.node.life != h.life)
	if lost && !c.finished && w.now >= w.raft.outUntil {
		c.attach()
	}
	w.after(w.between(50*time.Millisecond, 150*time.Millisecond), c.watch)
}

// attach begins an attachment on some node that is up, whether or not the
// present holder still runs.
func (c *controller) attach() { c.attachBut(nil) }

// attachBut does so on any node but those marked.
func (c *controller) attachBut(not []bool) {
	var up []*node
	for i, n := range c.w.nodes {
		if (not == nil || !not[i]) && n.up && c.w.now >= n.pausedUntil && c.w.now >= n.raftCutUntil {
			up = append(up, n)
		}
	}
	if len(up) == 0 {
		return
	}
	n := up[c.w.rng.Intn(len(up))]
	if last := up[len(up)-1]; last.disk == nil && c.w.chance(0.4) {
		n = last
	}
	c.holder = newWriter(n, c.w.raft.attachBegin(n))
}

// detach ends the holder's session cleanly.
func (c *controller) detach() {
	if h := c.holder; h != nil && h.active && !h.ended && !h.detaching && h.node.up && h.life == h.node.life {
		h.detaching = true
		h.node.run(h.life, func() { h.step(coordinator.Detach{}) })
	}
}

// hopeless says whether nothing can go on by itself: no in-sync log is whole.
func (c *controller) hopeless() bool {
	for _, id := range c.w.raft.isr() {
		if n := c.w.nodeOf(id); n.disk == nil || !n.disk.mem.st.Damaged {
			return false
		}
	}
	return true
}

// callOperator has the volume salvaged, if that is the only way.
func (c *controller) callOperator() {
	if c.called {
		return
	}
	c.called = true
	c.w.after(c.w.between(2*time.Second, 5*time.Second), func() {
		c.called = false
		if c.hopeless() {
			c.w.salvage()
		}
	})
}

// finalReads reads every block once through the last writer.
func (c *controller) finalReads(wr *writer) {
	if c.readAll || c.final == wr || c.holder != wr {
		return
	}
	c.final = wr
	c.reading = nil
	for b := range blocks {
		c.reading = append(c.reading, &op{wr: wr, kind: opRead, m: mutation{first: b, n: 1}})
	}
	for _, o := range append([]*op(nil), c.reading...) {
		wr.request(o)
	}
}

func (c *controller) completed(wr *writer, o *op, err error) {
	if err != nil {
		c.failed++
	}
	for i, r := range c.reading {
		switch {
		case r != o:
		case err == nil:
			c.reading = append(c.reading[:i:i], c.reading[i+1:]...)
			c.readAll = len(c.reading) == 0
			return
		case !wr.ended:
			// It was held for too long (on_quorum_loss=error): once more.
			again := &op{wr: wr, kind: opRead, m: o.m}
			c.reading[i] = again
			wr.node.after(time.Second, func() {
				if c.final == wr && !wr.ended {
					wr.request(again)
				}
			})
			return
		}
	}
}
