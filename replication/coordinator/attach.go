package coordinator

import "github.com/holdfast-storage/holdfast"

// effective returns i's tail cut at the lowest start of the activated epochs
// above the epoch of its last entry (A3): what lies behind that start was
// written by a writer that had lost already. That is the first of those starts,
// unless one was forced after a salvage.
func (c *Core) effective(st Status) holdfast.Seq {
	if Mutant == "no_epoch_history" {
		return st.Tail
	}
	if c.opt.HistoryPruned && len(c.history) > 0 && st.TailEpoch < c.history[0].Epoch {
		return 0
	}
	tail := st.Tail
	for _, h := range c.history {
		if h.Epoch > st.TailEpoch {
			tail = min(tail, h.S)
		}
	}
	return tail
}

// floor is the seq below which no activation may fall.
func (c *Core) floor() holdfast.Seq {
	if c.opt.Detached {
		return max(c.opt.Floor, c.opt.End)
	}
	return c.opt.Floor
}

// onFenceOK takes a member's report.
func (c *Core) onFenceOK(m *member, st Status) {
	if m.link != linkFencing {
		return
	}
	m.link, m.status = linkFenced, st
	m.eff = c.effective(st)
	m.answered = true
	m.hard = false // it works again, in another process life
	m.regressed = m.inISR && m.eff < c.floor()
	if m.regressed || m.eff < st.Commit && !st.Syncing {
		// Durable entries are missing, or committed ones are not in the history.
		m.regressed = m.inISR
		m.needCopy, m.fromZero = true, true
		c.notice(NoticeRegression, m, true, "holds up to %d, commit %d, but %d was durable", m.eff, st.Commit, c.floor())
	}
	if st.HintEpoch > c.opt.Epoch || st.Fence > c.opt.Epoch {
		c.suspectHigher(max(st.HintEpoch, st.Fence))
		return
	}
	switch c.phase {
	case PhaseOpening:
		c.openAt(m)
	case PhaseActive, PhaseDetaching:
		c.rejoin(m)
	case PhaseFencing, PhaseActivating, PhaseEnded:
	}
}

// sound says whether m may decide and carry S: a fenced in-sync member whose
// log is whole, or, where there is none, one that lost bytes of some entries.
func (c *Core) sound(m *member) bool {
	return m.inISR && m.link >= linkFenced && !m.useless() && (m.status.Lost == 0 || c.marred)
}

// useless says whether nothing can be begun with m's log.
func (m *member) useless() bool { return m.status.Damaged || m.status.Syncing || m.regressed }

// decide chooses S (A3, A4).
func (c *Core) decide() {
	intact, sound, marred, regressed, useless := 0, 0, 0, 0, 0
	all, allNotIntact := true, true // of the in-sync set: answered or gone; answered and not intact
	for _, m := range c.members {
		if !m.inISR {
			continue
		}
		if !m.answered {
			allNotIntact = false
			all = all && m.gone
			continue
		}
		switch {
		case m.regressed:
			regressed++
		case m.useless():
			useless++
		case m.status.Lost > 0:
			marred++
		}
		if c.vouches(m) {
			allNotIntact = false
		}
		if c.sound(m) {
			sound++
			if c.vouches(m) {
				intact++
			}
		}
	}
	waited := c.now - c.attachAt
	switch {
	case intact > 0:
		if !c.hasIntact {
			c.hasIntact, c.firstIntact = true, c.now
		}
		if all || c.now-c.firstIntact >= c.lim.AttachGrace {
			c.choose(true)
		}
	case sound > 0:
		if allNotIntact || c.opt.AcceptLoss || waited >= c.lim.LossyWait {
			c.choose(false)
		}
	case marred > 0 && marred+regressed+useless == c.inSyncCount(), marred > 0 && (c.opt.AcceptLoss || waited >= c.lim.LossyWait):
		// The blocks that these entries wrote become poison: the rest is there.
		c.marred = true
		c.notice(NoticeRegression, nil, true, "every in-sync copy that answers lost bytes of logged entries")
		c.choose(false)
	case regressed > 0 && (allNotIntact || waited >= c.lim.LossyWait):
		c.end(EndReplicaRegression, nil)
	case useless > 0 && useless == c.inSyncCount():
		c.end(EndNoInSync, nil)
	}
}

// vouches says whether m lost nothing it acknowledged: it is intact, or the
// volume was detached cleanly and m holds all of it. After a salvage nobody can.
func (c *Core) vouches(m *member) bool {
	return !c.opt.Salvaged && !m.useless() && m.status.Lost == 0 && (m.status.Intact || c.opt.Detached)
}

func (c *Core) choose(continuous bool) {
	c.continuous = continuous || Mutant == "claim_continuity"
	first := true
	for _, m := range c.members {
		if !c.sound(m) || continuous && !c.vouches(m) {
			continue
		}
		switch {
		case first:
			c.s, first = m.eff, false
		case continuous:
			// Every acknowledged entry is in every intact member.
			c.s = min(c.s, m.eff)
		default:
			c.s = max(c.s, m.eff)
		}
	}
	c.enter(PhaseOpening)
	for _, m := range c.members {
		c.openAt(m)
	}
}

// openAt cuts a sound member to S; what it lacks is brought from another.
func (c *Core) openAt(m *member) {
	if !c.sound(m) || m.link != linkFenced {
		return
	}
	m.link, m.cut = linkOpening, min(m.eff, c.s)
	c.do(SendOpen{Replica: m.ID, Conn: m.conn, Epoch: c.opt.Epoch, CutTo: m.cut, ISRVersion: c.isrVersion})
}

// progressOpening extends short members (A5) and asks raft once everybody who
// can be had confirms S (A6).
func (c *Core) progressOpening() {
	open, confirmed := 0, 0
	for _, m := range c.members {
		if !m.inISR {
			continue
		}
		if m.link == linkOpened && !m.confirmed && !m.tooShort {
			c.extend(m)
		}
		if m.confirmed {
			confirmed++
		} else if c.sound(m) && !m.tooShort {
			open++
		}
	}
	late := c.now-c.phaseSince >= c.lim.ExtendWait
	switch {
	case confirmed > 0 && (open == 0 || late):
		c.proposeActivate()
	case late:
		c.startOver("no member confirmed its start")
	}
}

// extend brings the entries up to S to a member that lacks them, then makes
// them durable.
func (c *Core) extend(m *member) {
	switch {
	case m.tail >= c.s && m.dur >= c.s, Mutant == "isr_keeps_short":
		m.confirmed = true
	case m.tail >= c.s:
		if len(m.flushes) == 0 {
			c.sendFlush(m, m.tail)
		}
	case m.copy != 0:
	case int64(c.s-m.tail) > int64(c.lim.WindowOps):
		m.tooShort = true
	default:
		if src := c.holderOf(c.s, m); src != nil {
			c.copyLogTo(m, src, c.s)
		}
	}
}

// holderOf returns an opened member that holds everything up to s, the local
// one first.
func (c *Core) holderOf(s holdfast.Seq, not *member) *member {
	var best *member
	for _, m := range c.members {
		if m == not || m.link != linkOpened || m.tail < s {
			continue
		}
		if best == nil || m.Node == c.opt.Node {
			best = m
		}
	}
	return best
}

// startOver begins the round again: nothing was activated, so nothing of it counts.
func (c *Core) startOver(why string) {
	c.notice(NoticeStall, nil, true, "attach starts over: %s", why)
	for _, m := range c.members {
		c.dropLink(m)
		c.forget(m)
		m.answered = false
		if m.inISR {
			c.connect(m)
		}
	}
	c.hasIntact, c.marred = false, false
	c.attachAt = c.now
	c.command = nil
	c.enter(PhaseFencing)
}

func (c *Core) proposeActivate() {
	var isr []holdfast.ReplicaID
	for _, m := range c.members {
		if m.confirmed || Mutant == "isr_not_recomputed" && m.inISR {
			isr = append(isr, m.ID)
		}
	}
	c.enter(PhaseActivating)
	c.propose(command{kind: CommandActivate, isr: isr})
}

// activated begins the epoch: raft has recorded (epoch, S, isr').
func (c *Core) activated(version holdfast.ISRVersion, isr []holdfast.ReplicaID) {
	c.isrVersion = version
	c.history = append(c.history, Start{Epoch: c.opt.Epoch, S: c.s})
	c.win.reset(c.s)
	c.acked, c.commit, c.flushWant, c.safe = c.s, c.s, c.s, c.s
	c.enter(PhaseActive)
	for _, m := range c.members {
		m.inISR = false
		for _, id := range isr {
			m.inISR = m.inISR || id == m.ID
		}
		m.inAckset = m.inISR
		m.lastHeard, m.ageFrom = c.now, c.now
		m.durEver = 0
		if m.inISR {
			m.durEver = c.s
		}
	}
	c.setAckMode()
	c.do(Activated{S: c.s, Continuous: c.continuous, ISRVersion: version})
	c.lookBelow()
	for _, m := range c.members {
		switch {
		case Mutant == "isr_keeps_short" && m.confirmed && m.tail < c.s: // what it lacks comes once it counts
			m.link, m.durEver = linkCatchup, m.dur
		case m.inISR && m.confirmed:
			m.link, m.sent = linkStreaming, c.s
		case m.link == linkFenced:
			m.eff = c.effective(m.status)
			c.rejoin(m)
		case m.connected():
			// Half opened at an S that it does not share in: a new connection
			// finds out where it stands.
			c.dropLink(m)
			c.forget(m)
			c.connect(m)
		default:
			c.connect(m)
		}
	}
}
