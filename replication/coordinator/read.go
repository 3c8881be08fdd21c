package coordinator

import (
	"errors"
	"time"

	"github.com/holdfast-storage/holdfast"
)

// readStep is how far a read has come.
//
//	before -> sampling -> after -> confirm -> done
//
// before: overlapping writes in flight when it came; after: those in flight
// when the sample was taken, which it may show; confirm: the promise of every
// other ackset member, or its answer in a ping round (R10).
type readStep uint8

const (
	readBefore readStep = iota
	readSampling
	readAfter
	readConfirm
)

type read struct {
	id             OpID
	offset, length int64
	step           readStep
	since          time.Duration
	overlap        holdfast.Seq // before, after: the write to wait for
	sample         uint64
	sampledAt      time.Duration
	source         *member
	round          uint64 // pings of this round or later count
	tried          []*member
	err            error // of the last member that could not read it
}

// maxRounds bounds the ping rounds under way: enough for one per round trip
// step, few enough that a slow member is not flooded. Later reads share the
// next round.
const maxRounds = 4

func (c *Core) onRead(e Read) {
	var r *read
	if n := len(c.freeReads); n > 0 {
		r, c.freeReads = c.freeReads[n-1], c.freeReads[:n-1]
	} else {
		r = new(read)
	}
	c.readAt, c.hasRead = c.now, true
	c.hedges = min(c.hedges+1, maxHedges*hedgeShare)
	*r = read{id: e.ID, offset: e.Offset, length: e.Length, since: c.now, tried: r.tried[:0]}
	r.overlap = c.win.overlap(c.acked, e.Offset, e.Length)
	c.reads = append(c.reads, r)
}

// progressReads moves every read as far as it goes.
func (c *Core) progressReads() {
	kept := c.reads[:0]
	for _, r := range c.reads {
		if !c.progressRead(r) {
			kept = append(kept, r)
		} else {
			c.freeReads = append(c.freeReads, r)
		}
	}
	clear(c.reads[len(kept):])
	c.reads = kept
}

func (c *Core) progressRead(r *read) (done bool) {
	if r.step == readBefore && r.overlap <= c.acked {
		c.sampleRead(r)
	}
	if r.step == readAfter && r.overlap <= c.acked {
		r.step = readConfirm
	}
	if r.step == readConfirm {
		if c.confirmed(r) {
			c.do(CompleteRead{ID: r.id})
			return true
		}
		// A promise ran out since the sample was asked for.
		c.roundWant = c.roundWant || c.round < r.round
	}
	if r.step == readBefore && r.err != nil && len(r.tried) > 0 && c.untried(r) == nil {
		c.do(CompleteRead{ID: r.id, Err: r.err})
		return true
	}
	return false
}

// sampleRead has the bytes taken from a member, and a ping round begun.
func (c *Core) sampleRead(r *read) {
	m := c.untried(r)
	if m == nil && r.err == nil && len(r.tried) > 0 {
		// It was hedged away from a slow member, and the other one left: the slow
		// one is asked again.
		r.tried = r.tried[:0]
		m = c.untried(r)
	}
	if m == nil {
		return
	}
	c.samples++
	r.step, r.sample, r.sampledAt, r.source = readSampling, c.samples, c.now, m
	r.round = c.round + 1
	c.roundWant = c.roundWant || c.needsPing(m)
	c.do(SampleRead{ID: r.id, Sample: r.sample, Replica: m.ID, Conn: m.conn, Epoch: c.opt.Epoch, Offset: r.offset, Length: r.length})
}

// needsPing says whether a read from m needs another member's word.
func (c *Core) needsPing(m *member) bool {
	for _, o := range c.members {
		if o != m && o.inAckset && !c.covers(o) {
			return true
		}
	}
	return false
}

// untried returns the member to read from: required, streaming, not suspect,
// the one on this node first.
func (c *Core) untried(r *read) *member {
	var best *member
	for _, m := range c.members {
		if !m.inAckset || m.link != linkStreaming || m.tail < c.acked || wasTried(r, m) {
			continue
		}
		if best == nil || best.suspect && !m.suspect || m.Node == c.opt.Node && m.suspect == best.suspect {
			best = m
		}
	}
	return best
}

func wasTried(r *read, m *member) bool {
	for _, t := range r.tried {
		if t == m {
			return true
		}
	}
	return false
}

func (c *Core) onSampled(e Sampled) {
	for _, r := range c.reads {
		if r.id != e.ID {
			continue
		}
		if r.step != readSampling || r.sample != e.Sample {
			return
		}
		if e.Err != nil {
			r.step, r.overlap = readBefore, 0
			if errors.Is(e.Err, holdfast.ErrIntegrity) || errors.Is(e.Err, holdfast.ErrIO) {
				r.err = e.Err
				r.tried = append(r.tried, r.source)
			}
			return
		}
		r.source.lastHeard = c.now
		// The sample may show writes that are not yet acknowledged: answer only
		// when they are, or a later read might not see them.
		r.step, r.overlap = readAfter, c.win.overlap(c.acked, r.offset, r.length)
		if Mutant == "inflight_checked_before_only" {
			r.overlap = 0
		}
		return
	}
}

// confirmed applies R10: every other ackset member promised, on its present
// connection, to answer no higher FENCE until later than now, which is after
// the sample; or it answered a ping there that was sent after the read arrived.
// (The member read from checked the epoch at the sample.)
func (c *Core) confirmed(r *read) bool {
	if Mutant == "read_without_lease" && r.source.Node == c.opt.Node {
		return true
	}
	if Mutant == "remote_read_epoch_only" && r.source.Node != c.opt.Node {
		return true
	}
	some, all := false, true
	for _, m := range c.members {
		if !m.inAckset || m == r.source {
			continue
		}
		if c.covers(m) || m.link == linkStreaming && m.pong >= r.round {
			some = true
		} else {
			all = false
		}
	}
	if Mutant == "ping_any" && some {
		return true
	}
	return all
}

// A read that one member is slow to answer is hedged: another one is asked, and
// the first answer no longer counts. One read in hedgeShare may be, maxHedges at
// once: where every member is slow it would only double the load.
const (
	hedgeShare = 20
	maxHedges  = 16
)

// readsOverdue samples at another member what one does not answer: soon while
// few reads are so, and whatever the share once the member is suspect for it. If
// there is no other, the read waits.
func (c *Core) readsOverdue() {
	for _, r := range c.reads {
		if r.step != readSampling {
			continue
		}
		waited := c.now - max(r.sampledAt, r.source.ageFrom)
		hedge := waited < c.lim.Suspect
		if waited < c.lim.Hedge || hedge && c.hedges < hedgeShare {
			continue
		}
		r.tried = append(r.tried, r.source)
		if c.untried(r) == nil {
			r.tried = r.tried[:len(r.tried)-1]
			continue
		}
		if hedge {
			c.hedges -= hedgeShare
		}
		r.step, r.overlap = readBefore, 0
	}
}

// readsFromLost samples anew what was being read from m.
func (c *Core) readsFromLost(m *member) {
	for _, r := range c.reads {
		if r.step == readSampling && r.source == m {
			r.step, r.overlap = readBefore, 0
		}
	}
}

// sendPings begins a round if one is wanted and few are under way, and brings
// members that were not connected into the present round.
func (c *Core) sendPings() {
	if c.roundWant {
		oldest := c.round
		for _, m := range c.members {
			if m.inAckset && m.link == linkStreaming {
				oldest = min(oldest, m.pong)
			}
		}
		if c.round-oldest < maxRounds || c.now-c.pingedAt >= c.lim.PromiseLength/4 {
			c.roundWant = false
			c.round++
			c.pingedAt = c.now
			c.rounds[c.round%roundsKept] = c.now
		}
	}
	for _, m := range c.members {
		if m.link == linkStreaming && m.pinged < c.round {
			if m.pinged == m.pong {
				m.askedAt = c.now
			}
			m.pinged = c.round
			c.do(SendPing{Replica: m.ID, Conn: m.conn, Epoch: c.opt.Epoch, Nonce: c.round, Promise: m.inAckset && c.wantsPromises()})
		}
	}
}
