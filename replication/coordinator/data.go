package coordinator

import "github.com/holdfast-storage/holdfast"

// sequence gives waiting writes their place while the window has room.
func (c *Core) sequence() {
	most := c.windowBytes()
	for c.waiting.len() > 0 {
		w := c.waiting.front()
		cost := windowCost(w.Kind, w.Length)
		if c.win.len() > 0 && (c.win.len() >= c.lim.WindowOps || c.win.bytes+cost > most) {
			c.wantFlush(c.acked) // makes room
			return
		}
		charge, verdict := c.afford(w)
		if verdict == affordWaits {
			return
		}
		if verdict == affordRefused {
			c.waiting.pop()
			continue
		}
		if c.commit == c.win.last {
			c.dirtySince = c.now
		}
		seq := c.win.push(entry{id: w.ID, offset: w.Offset, length: w.Length, at: c.now, fua: w.FUA}, cost, charge)
		c.written += cost
		c.room.note(w)
		if w.Kind != OpWrite {
			c.room.cleared = seq
		}
		c.do(Sequence{ID: w.ID, Seq: seq})
		c.waiting.pop()
	}
}

// logShare is the part of a disk's log that the window of one segment may fill: the
// log holds at least what the window does, and other volumes' entries beside it.
const logShare = 8

// windowBytes bounds the window by the smallest log of the copies.
func (c *Core) windowBytes() int64 {
	most := c.lim.WindowBytes
	for _, m := range c.members {
		if m.status.LogSize > 0 {
			most = min(most, m.status.LogSize/logShare)
		}
	}
	return most
}

// stream sends every streaming member what it has not been sent.
func (c *Core) stream() {
	for _, m := range c.members {
		last := c.win.last
		if loseAcked && m != c.favourite() {
			last = c.agedTo(m.sent)
		}
		if m.link != linkStreaming || m.sent >= last {
			continue
		}
		c.do(SendAppend{Replica: m.ID, Conn: m.conn, Epoch: c.opt.Epoch, First: m.sent + 1, Last: last})
		m.sent = last
	}
}

// agedTo is the last entry after sent that the lose-acked mutant lets go out.
func (c *Core) agedTo(sent holdfast.Seq) holdfast.Seq {
	for sent < c.win.last && (sent+1 < c.win.first || c.now-c.win.at(sent+1).at >= loseAckedFor) {
		sent++
	}
	return sent
}

// onAcked takes a cumulative acknowledgement.
func (c *Core) onAcked(m *member, tail holdfast.Seq) {
	if tail > m.tail {
		if tail >= c.win.first && tail <= c.win.last && m.streaming() && m.inAckset {
			m.pace.acks.Add(c.now - max(c.win.at(tail).at, m.ageFrom))
		}
		m.tail = tail
	}
	if m.link == linkCatchup {
		c.progressCatchup(m)
	}
}

// complete finishes the writes that every ackset member has received (R2).
func (c *Core) complete() {
	acked, any := c.win.last, false
	for _, m := range c.members {
		if m.inAckset {
			acked, any = min(acked, m.tail), true
		}
	}
	if Mutant == "ack_majority" || loseAcked {
		acked = c.weakAcked()
	}
	if !any {
		return
	}
	if c.below.is {
		acked = c.acked
	}
	for c.acked < acked {
		c.acked++
		e := c.win.at(c.acked)
		if e.answered {
			continue
		}
		if c.durable || e.fua {
			c.waits.push(wait{id: e.id, target: c.acked, write: true, since: c.now})
			c.wantFlush(c.acked)
			continue
		}
		c.answer(e, nil)
	}
	c.raiseCommit()
	durable := c.flushable()
	if loseAcked && c.favourite() != nil {
		durable = max(durable, c.favourite().dur)
	}
	for c.waits.len() > 0 && c.waits.front().target <= durable {
		c.finish(c.waits.pop(), nil)
	}
}

// weakAcked serves the mutants that acknowledge too early.
func (c *Core) weakAcked() holdfast.Seq {
	if loseAcked {
		if f := c.favourite(); f != nil {
			return min(f.tail, c.win.last)
		}
		return c.acked
	}
	for seq := c.win.last; seq > c.acked; seq-- {
		have := 0
		for _, m := range c.members {
			if m.tail >= seq {
				have++
			}
		}
		if have > len(c.members)/2 {
			return seq
		}
	}
	return c.acked
}

// favourite is the one copy that the lose-acked mutant waits for.
func (c *Core) favourite() *member {
	var f *member
	for _, m := range c.members {
		if m.inAckset && m.streaming() && (f == nil || m.Node == c.opt.Node) {
			f = m
		}
	}
	return f
}

// raiseCommit: commit = min dur over the ackset, and never falls.
func (c *Core) raiseCommit() {
	commit, any := c.acked, false
	for _, m := range c.members {
		if m.inAckset {
			commit, any = min(commit, m.dur), true
			if Mutant == "flush_local_only" && m.Node == c.opt.Node {
				commit = min(c.acked, m.dur)
				break
			}
		}
	}
	if any && commit > c.commit {
		c.commit = commit
		if c.commit < c.win.last {
			c.dirtySince = c.now
		}
	}
}

// wantFlush asks that every ackset member be durable up to seq.
func (c *Core) wantFlush(seq holdfast.Seq) { c.flushWant = max(c.flushWant, seq) }

// ownFlush keeps the window short: by time, by bytes, by half the window.
func (c *Core) ownFlush() {
	if c.commit >= c.acked {
		return
	}
	if c.now-c.dirtySince >= c.lim.FlushEvery || c.written-c.flushedAt >= c.lim.FlushBytes ||
		c.win.len() >= c.lim.WindowOps/2 || c.win.bytes >= c.windowBytes()/2 {
		c.wantFlush(c.acked)
	}
}

func (c *Core) sendFlushes() {
	for _, m := range c.members {
		if m.link == linkStreaming && (m.inAckset || m.joining || c.mayCount(m)) &&
			m.dur < c.flushWant && m.covered < c.flushWant && m.sent >= c.flushWant && len(m.flushes) < maxFlushes {
			c.sendFlush(m, m.sent)
			c.flushedAt = c.written
		}
	}
}

func (c *Core) sendFlush(m *member, cover holdfast.Seq) {
	c.flushIDs++
	m.flushes = append(m.flushes, sentFlush{id: c.flushIDs, cover: cover, at: c.now})
	m.covered = cover
	c.do(SendFlush{Replica: m.ID, Conn: m.conn, Epoch: c.opt.Epoch, ID: c.flushIDs})
}

func (c *Core) onFlushed(m *member, e Flushed) {
	n := 0
	for n < len(m.flushes) && m.flushes[n].id <= e.ID {
		m.pace.flushes.Add(c.now - max(m.flushes[n].at, m.ageFrom))
		n++
	}
	m.flushes = append(m.flushes[:0], m.flushes[n:]...)
	m.tail = max(m.tail, e.Dur) // what is durable was received
	if e.Dur > m.dur {
		m.dur = e.Dur
		m.durEver = max(m.durEver, e.Dur)
	}
}

// sendCommits tells the members what their bases may take (R9).
func (c *Core) sendCommits() {
	for _, m := range c.members {
		if m.link >= linkCatchup {
			c.sendCommit(m)
		}
	}
}

// sendCommit tells one member. All that an opened member holds is of the
// history that commit counts.
func (c *Core) sendCommit(m *member) {
	if m.commitSent < c.commit {
		m.commitSent = c.commit
		c.do(SendCommit{Replica: m.ID, Conn: m.conn, Epoch: c.opt.Epoch, Seq: c.commit})
	}
}

// releaseWindow lets go of what is durable everywhere, and not needed by a
// member that is catching up.
func (c *Core) releaseWindow() {
	upTo := c.commit
	for _, m := range c.members {
		switch {
		case !m.pinned:
		case m.link == linkStreaming:
			upTo = min(upTo, m.tail)
		default:
			upTo = min(upTo, m.pinAt)
		}
	}
	if c.win.release(upTo) {
		c.do(ReleaseWindow{UpTo: upTo})
	}
}
