package coordinator

import (
	"errors"
	"time"

	"github.com/holdfast-storage/holdfast"
)

// countWithin is how near its tail must be before a copy is counted in the
// ackset (protocol section 8: 1 MiB): near enough that writers do not notice.
const countWithin = 1 << 20

// maxCopyDelay is the longest pause between two tries to bring a member its
// log: short beside what a round of it costs.
const maxCopyDelay = 5 * time.Second

// maxRoundsUnpinned bounds the rounds of log copying before the window is
// pinned, so that writers cannot run ahead for ever.
const maxRoundsUnpinned = 3

// rejoin brings a fenced member back: by replay from the window, by the log of
// another member, or by a whole copy.
func (c *Core) rejoin(m *member) {
	eff := min(m.eff, c.win.last)
	// What it lost of its log comes from the others, if there are any; else the
	// blocks become poison.
	lost := m.status.Lost > 0 && (!m.inISR || c.otherHealthy(m))
	if m.inISR && eff >= m.durEver && !c.otherHealthy(m) {
		// What was wrong with it before is not any more, or shows in its status: with
		// nobody to copy from, nothing else can go on.
		m.needCopy, m.fromZero = false, false
	}
	whole := !m.status.Syncing && !m.status.Damaged && !m.needCopy && !lost
	if m.inAckset && (!whole || eff < m.durEver) {
		// It lost what it said was durable, or its log is bad.
		c.notice(NoticeRegression, m, true, "holds up to %d, was durable up to %d, first lost entry %d", eff, m.durEver, m.status.Lost)
		m.fromZero = m.fromZero || !lost || m.status.Syncing || m.status.Damaged || eff < m.durEver
		m.hard, m.needCopy = true, true
		c.dropLink(m)
		c.forget(m)
		c.backOff(m)
		return
	}
	switch {
	case whole && (eff+1 >= c.win.first || c.logSource(m) != nil):
		m.eff, m.cut = eff, eff
		m.link = linkOpening
		if eff+1 >= c.win.first {
			m.pinned, m.pinAt = true, eff
		}
		c.do(SendOpen{Replica: m.ID, Conn: m.conn, Epoch: c.opt.Epoch, CutTo: eff, ISRVersion: c.isrVersion})
	case whole:
		// Nobody to bring the log from now: stay fenced, look again.
	case c.logSource(m) != nil:
		m.link = linkOpening
		m.joining, m.joinAt, m.cut = true, c.acked, c.acked
		m.pinned, m.pinAt = true, c.acked
		c.wantFlush(c.acked)
		c.notice(NoticeCopy, m, false, "copy begins behind %d", c.acked)
		c.do(SendJoin{Replica: m.ID, Conn: m.conn, Epoch: c.opt.Epoch, At: c.acked, ISRVersion: c.isrVersion})
	}
}

// logSource returns a member to bring entries or chunks from, the local one first.
func (c *Core) logSource(not *member) *member {
	var best *member
	for _, m := range c.members {
		if !c.mayBring(m, not) {
			continue
		}
		if best == nil || m.Node == c.opt.Node {
			best = m
		}
	}
	return best
}

// chunkSource is logSource for chunks: a member that could not read one of them is
// asked again only if there is no other.
func (c *Core) chunkSource(m *member) *member {
	src := c.logSource(m)
	if src == nil || src != m.badSource {
		return src
	}
	for _, o := range c.members {
		if o != src && c.mayBring(o, m) {
			return o
		}
	}
	return src
}

// mayBring says whether entries or chunks for another member may come from m.
func (c *Core) mayBring(m, to *member) bool {
	return m != to && m.inISR && m.inAckset && m.link == linkStreaming && !m.suspect && !m.evicting && m.tail >= c.acked
}

func (c *Core) onOpened(m *member, e Opened) {
	if m.link != linkOpening {
		return
	}
	if e.Tail != m.cut || e.Dur > e.Tail {
		// Not what was asked for: nothing may be built on it.
		c.dropLink(m)
		c.forget(m)
		c.backOff(m)
		return
	}
	if Mutant == "stale_acks_kept" {
		m.tail, m.dur = max(m.tail, e.Tail), max(m.dur, e.Dur)
	} else {
		m.tail, m.dur = e.Tail, e.Dur
	}
	m.durEver = max(m.durEver, e.Dur)
	m.tell(e.Credit, e.Tail)
	m.delay = 0
	switch {
	case c.phase == PhaseOpening || c.phase == PhaseActivating:
		m.link = linkOpened
	case m.joining:
		m.link, m.sent = linkStreaming, e.Tail
		m.held = m.heldOf(e.Held)
	case e.Tail+1 >= c.win.first:
		c.notice(NoticeReplay, m, false, "replay from %d to %d", e.Tail+1, c.win.last)
		m.link, m.sent = linkStreaming, e.Tail
		m.pinned = true
	default:
		m.link = linkCatchup
		m.rounds = 0
		// Its log may be full of entries whose commit it was never told: it takes
		// no more before it is.
		c.sendCommit(m)
		c.notice(NoticeCatchUp, m, false, "log from %d to %d", e.Tail+1, c.acked)
		c.progressCatchup(m)
	}
}

// progressCatchup copies log until the gap to the window is closed.
func (c *Core) progressCatchup(m *member) {
	if m.link != linkCatchup || m.copy != 0 && m.tail < m.copyTo {
		return
	}
	if m.copy != 0 {
		m.copy = 0 // reached; its report will find nobody
	}
	if m.tail+1 >= c.win.first {
		m.copyDelay = 0
		m.link, m.sent = linkStreaming, m.tail
		m.pinned, m.pinAt = true, m.tail
		return
	}
	src := c.logSource(m)
	if src == nil {
		return
	}
	to := c.acked
	m.rounds++
	if m.rounds > maxRoundsUnpinned || int64(to-m.tail) <= int64(c.lim.WindowOps/4) {
		m.pinned, m.pinAt = true, to
	}
	c.copyLogTo(m, src, to)
}

func (c *Core) copyLogTo(m, src *member, to holdfast.Seq) {
	c.copies++
	m.copy, m.copyLog, m.copyTo, m.source = c.copies, true, to, src
	c.do(CopyLog{Copy: m.copy, Epoch: c.opt.Epoch, Source: src.ID, Target: m.ID, SourceConn: src.conn, TargetConn: m.conn, From: m.tail + 1, To: to})
}

func (c *Core) copying(id uint64) *member {
	for _, m := range c.members {
		if id != 0 && m.copy == id {
			return m
		}
	}
	return nil
}

// onCopiedLog: on success the acks say when it has arrived. On failure an
// unknown part is under way: only a new connection knows where the log ends.
func (c *Core) onCopiedLog(e CopiedLog) {
	m := c.copying(e.Copy)
	if m == nil || !m.copyLog || e.Err == nil && !e.Gap {
		return
	}
	m.copy = 0
	m.needCopy = m.needCopy || e.Gap && c.phase != PhaseOpening
	tooShort := e.Gap && c.phase == PhaseOpening
	c.dropLink(m)
	c.forget(m)
	if tooShort {
		m.answered = true
	}
	// At once the first time; what fails again and again, more and more seldom.
	m.retry = max(m.retry, c.now+m.copyDelay)
	m.copyDelay = min(max(2*m.copyDelay, c.lim.Tick), maxCopyDelay)
	c.connect(m)
}

// progressMembers moves every member that is being brought back as far as it goes.
func (c *Core) progressMembers() {
	for _, m := range c.members {
		switch m.link {
		case linkFenced:
			c.rejoin(m)
		case linkCatchup:
			c.progressCatchup(m)
		case linkStreaming:
			c.progressJoin(m)
			c.count(m)
		}
		if Mutant == "add_without_catchup" && (m.link == linkCatchup || m.streaming() && !m.joining) {
			m.inAckset = true
		}
		if m.streaming() && m.inAckset && !m.intactSent && m.tail >= c.acked {
			m.intactSent = true
			c.do(SendIntact{Replica: m.ID, Conn: m.conn, Epoch: c.opt.Epoch})
		}
		if m.pinned && m.inISR && m.streaming() && m.tail >= c.acked {
			m.pinned = false
		}
	}
}

// progressJoin drives a whole copy (R11): chunks once commit has reached the
// join, then the log up to the highest as-of, then the whole made durable.
func (c *Core) progressJoin(m *member) {
	if !m.joining {
		return
	}
	switch {
	case m.copied:
		if (m.tail >= m.maxAsOf || Mutant == "no_tail_floor") && !m.wholeSent {
			m.wholeSent = true
			c.do(SendWhole{Replica: m.ID, Conn: m.conn, Epoch: c.opt.Epoch})
		}
	case m.copy != 0 || c.now < m.copyRetry:
	case c.commit < m.joinAt:
		c.wantFlush(m.joinAt)
	default:
		if src := c.chunkSource(m); src != nil {
			c.copies++
			m.copy, m.copyLog, m.source = c.copies, false, src
			c.do(StartCopy{Copy: m.copy, Epoch: c.opt.Epoch, Source: src.ID, Target: m.ID, SourceConn: src.conn, TargetConn: m.conn, After: m.held, At: m.joinAt})
		}
	}
}

// heldOf returns the seq up to which the chunks of a member that joined are those
// of the history, whichever member the others come from. It told that they hold
// its own log up to told. That log was one with the history up to there: chunks
// take no more than was committed (R9), what is committed is in the log of every
// member that S can be taken from, so no later epoch starts below it, and a
// salvage, which may, leaves no copy that it would have to cut (decision 0008). So
// told is at most the effective tail. A member of which that is not true holds
// something else, or counts as empty since its epoch was pruned: it gets everything.
func (m *member) heldOf(told holdfast.Seq) holdfast.Seq {
	if m.fromZero || m.status.Damaged || told > m.eff {
		return 0
	}
	return told
}

func (c *Core) onCopied(e Copied) {
	m := c.copying(e.Copy)
	if m == nil || m.copyLog {
		return
	}
	m.copy = 0
	m.badSource = nil
	if e.Err != nil {
		if errors.Is(e.Err, holdfast.ErrIntegrity) {
			m.badSource = m.source
		}
		c.notice(NoticeCopy, m, true, "copy interrupted: %v", e.Err)
		m.copyRetry = c.now + time.Second
		return
	}
	m.copied, m.maxAsOf = true, max(m.maxAsOf, e.MaxAsOf)
}

func (c *Core) onWhole(m *member, dur holdfast.Seq) {
	if !m.joining || !m.wholeSent {
		return
	}
	m.joining, m.needCopy, m.fromZero = false, false, false
	m.dur = max(m.dur, dur)
	m.durEver = m.dur
	c.notice(NoticeCopy, m, false, "copy whole, durable up to %d", m.dur)
}

// mayCount says whether m lacks nothing but the most recent entries.
func (c *Core) mayCount(m *member) bool {
	return !m.inAckset && m.streaming() && !m.joining && m.Role != holdfast.RoleDeleting
}

// count takes m into the ackset once it is near (R2: before raft hears of it).
func (c *Core) count(m *member) {
	if !c.mayCount(m) {
		return
	}
	if m.dur < c.commit {
		c.wantFlush(c.commit)
	}
	var behind int64
	for s := max(m.tail+1, c.win.first); s <= c.win.last && behind <= countWithin; s++ {
		behind += c.win.cost[c.win.costAt(s)]
	}
	if behind <= countWithin && m.dur >= c.commit {
		m.inAckset = Mutant != "add_raft_first"
	}
}

// mayGrow says whether raft may be told that m is in sync: it holds all that
// was acknowledged, all that is committed durably, and every install.
func (c *Core) mayGrow(m *member) bool {
	if Mutant == "add_without_catchup" {
		return m.inAckset && !m.inISR
	}
	if Mutant == "add_raft_first" && c.mayCount(m) && !m.inISR {
		return m.tail >= c.acked && m.dur >= c.commit
	}
	if !m.inAckset || m.inISR || m.evicting || m.Leaving || !m.streaming() {
		return false
	}
	return m.tail >= c.acked && m.dur >= c.commit && m.intactSent
}

// stopCopy ends what runs towards m.
func (c *Core) stopCopy(m *member) {
	if m.copy != 0 {
		c.do(StopCopy{Copy: m.copy})
		m.copy = 0
	}
	m.source = nil
}

// sourceLost: chunks can be brought from another member; log cannot be
// resumed without knowing what arrived.
func (c *Core) sourceLost(t *member) {
	log := t.copyLog
	c.stopCopy(t)
	if log {
		c.dropLink(t)
		c.forget(t)
	} else {
		t.copyRetry = c.now + c.lim.Tick
	}
}
