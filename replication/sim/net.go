package sim

import (
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/replication/replica"
)

// link is one connection between a writer and a replica's host. Each direction
// keeps its order. An end that closes, or dies, is seen by the other end after
// what was sent before it.
type link struct {
	w     *world
	wr    *writer
	wLife int
	host  *node
	id    holdfast.ReplicaID // of the replica there
	rLife int
	toR   pipe
	toW   pipe
	wOpen bool
	rOpen bool
}

type message struct {
	at   time.Duration
	body any
}

// fin is the end of a direction.
type fin struct{}

type pipe struct {
	queue   []message
	pumping bool
	last    time.Duration
	closed  bool
}

func (l *link) local() bool { return l.wr.node == l.host }

func (l *link) delay() time.Duration {
	if l.local() {
		return l.w.between(time.Microsecond, 20*time.Microsecond)
	}
	if l.w.chance(l.w.rates.slowMessage) {
		return l.w.between(time.Millisecond, 400*time.Millisecond)
	}
	return l.w.between(50*time.Microsecond, l.w.rates.delay)
}

func (l *link) sendToReplica(body any) { l.send(&l.toR, body, l.wr.node, l.host, l.deliverR) }
func (l *link) sendToWriter(body any)  { l.send(&l.toW, body, l.host, l.wr.node, l.deliverW) }

func (l *link) send(p *pipe, body any, from, to *node, deliver func(any)) {
	if p.closed {
		return
	}
	if _, end := body.(fin); end {
		p.closed = true
	}
	p.last = max(p.last, l.w.now+l.delay())
	p.queue = append(p.queue, message{at: p.last, body: body})
	l.pump(p, from, to, deliver)
}

// pump delivers what is due. Behind a cut, messages wait.
func (l *link) pump(p *pipe, from, to *node, deliver func(any)) {
	if p.pumping || len(p.queue) == 0 {
		return
	}
	p.pumping = true
	l.w.at(p.queue[0].at, func() {
		p.pumping = false
		if len(p.queue) == 0 {
			return
		}
		if from != to && l.w.cut[from.index][to.index] {
			return // heal pumps again
		}
		if l.w.now < p.queue[0].at {
			l.pump(p, from, to, deliver)
			return
		}
		m := p.queue[0]
		p.queue = p.queue[1:]
		deliver(m.body)
		l.pump(p, from, to, deliver)
	})
}

// wake restarts both directions after a cut has healed.
func (l *link) wake() {
	l.pump(&l.toR, l.wr.node, l.host, l.deliverR)
	l.pump(&l.toW, l.host, l.wr.node, l.deliverW)
}

func (l *link) deliverR(body any) {
	l.host.run(l.rLife, func() {
		if !l.rOpen || l.host.replica != l.id {
			return
		}
		if _, end := body.(fin); end {
			l.rOpen = false
			l.sendToWriter(fin{})
			l.host.host.closed(l)
			return
		}
		l.host.host.receive(l, body)
	})
}

func (l *link) deliverW(body any) {
	l.wr.node.run(l.wLife, func() {
		if !l.wOpen {
			return
		}
		if _, end := body.(fin); end {
			l.wOpen = false
			l.sendToReplica(fin{})
			l.wr.linkDown(l)
			return
		}
		l.wr.receive(l, body)
	})
}

// closeByWriter ends the writer's side; the replica learns in time.
func (l *link) closeByWriter() {
	if !l.wOpen {
		return
	}
	l.wOpen = false
	l.sendToReplica(replica.Left{})
	l.sendToReplica(fin{})
	l.wr.node.after(0, func() { l.wr.linkDown(l) })
}

func (l *link) closeByReplica() {
	if !l.rOpen {
		return
	}
	l.sendToWriter(fin{})
	l.rOpen = false
	if h := l.host.host; h != nil {
		l.host.after(0, func() { h.closed(l) })
	}
}

// reset loses what is under way; both ends learn of it.
func (l *link) reset() {
	l.toR.queue, l.toW.queue = nil, nil
	l.sendToReplica(fin{})
	l.sendToWriter(fin{})
}

// nodeDied ends the sides that were on the node. What it had sent travels on
// if only the process died. A host without power tells nobody: its peers learn
// when it is back.
func (l *link) nodeDied(n *node, power bool) {
	tell := func(do func()) {
		if !power {
			do()
			return
		}
		l.w.after(l.w.between(time.Second, 12*time.Second), do)
	}
	if l.wr.node == n && l.wOpen && l.wLife == n.life {
		l.wOpen = false
		if power {
			l.toR.queue = nil
		}
		tell(func() { l.sendToReplica(fin{}) })
	}
	if l.host == n && l.rOpen && l.rLife == n.life {
		l.rOpen = false
		if power {
			l.toW.queue = nil
		}
		tell(func() { l.sendToWriter(fin{}) })
	}
}

func (l *link) dead() bool {
	return !l.wOpen && !l.rOpen && len(l.toR.queue) == 0 && len(l.toW.queue) == 0
}

// setCut changes one direction between two nodes.
func (w *world) setCut(a, b int, v bool) {
	if w.cut[a][b] == v {
		return
	}
	w.cut[a][b] = v
	if !v {
		for _, l := range w.links {
			l.wake()
		}
	}
}

// reachable says whether two nodes can hold a conversation.
func (w *world) reachable(a, b int) bool { return a == b || !w.cut[a][b] && !w.cut[b][a] }
