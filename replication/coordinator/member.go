package coordinator

import (
	"errors"
	"time"

	"github.com/holdfast-storage/holdfast"
)

// linkState is how far the connection to a member has come.
//
//	down -> dialing -> fencing -> fenced -> opening -> extending (attach) -> streaming
//	                                                -> catching-up        -> streaming
//	                                     -> joining -> streaming (while copying)
//
// The end of a connection leads to down from everywhere; what is known of a
// member by its connection (tail, dur, pong, promise) is known by that one only (R8).
type linkState uint8

const (
	linkDown linkState = iota
	linkDialing
	linkFencing
	linkFenced
	linkOpening
	linkOpened // attach: open at or extending to S
	linkCatchup
	linkStreaming
)

var linkNames = [...]string{"down", "dialing", "fencing", "fenced", "opening", "opened", "catching-up", "streaming"}

// sentFlush is a FLUSH that was not answered yet.
type sentFlush struct {
	id    uint64
	cover holdfast.Seq
	at    time.Duration
}

// maxFlushes bounds the flushes outstanding per member: one syncing, one
// waiting for its turn; later ones would only wait behind.
const maxFlushes = 2

// member is one copy as the writer sees it.
type member struct {
	Replica
	gone     bool
	unlisted bool // raft does not list it any more: it is kept while its acks are required

	inISR    bool // in raft's in-sync set, as far as known
	inAckset bool // its acks are required (R2: always when inISR, once active)

	link   linkState
	conn   Conn
	retry  time.Duration // no Connect before this
	delay  time.Duration // grows with failures
	status Status
	eff    holdfast.Seq // effective tail by history
	cut    holdfast.Seq // what OPEN or JOIN asked for
	copied bool         // every chunk is installed

	// By this connection:
	sent       holdfast.Seq // last entry sent
	tail       holdfast.Seq // last entry acknowledged
	dur        holdfast.Seq
	flushes    []sentFlush
	covered    holdfast.Seq // what the flushes sent cover
	pinged     uint64
	pong       uint64
	askedAt    time.Duration // since when a ping is unanswered, while pinged > pong
	promised   time.Duration // it answers no higher FENCE before this, by our clock
	commitSent holdfast.Seq
	intactSent bool

	// Across connections:
	credit    credit // space promised outlives a connection
	pace      pace
	lastHeard time.Duration
	linkAt    time.Duration // the present connection's begin
	ageFrom   time.Duration // op ages count from here at the earliest
	durEver   holdfast.Seq  // highest dur it ever told in this session
	suspect   bool
	evicting  bool
	hard      bool // failed by itself: do not wait for silence
	needCopy  bool // its log cannot continue
	fromZero  bool // nothing it holds is to be trusted: copy every chunk
	answered  bool // attach: its last FENCE_OK is in status
	tooShort  bool // attach: not to be extended
	regressed bool
	confirmed bool // attach: holds S durably in this epoch

	// Filling:
	pinned    bool         // the window keeps everything above pinAt for it
	pinAt     holdfast.Seq // its start while it does not stream yet
	copy      uint64       // number of the running CopyLog or StartCopy, 0 none
	copyTo    holdfast.Seq // CopyLog: last entry
	copyLog   bool
	source    *member
	badSource *member // the source that could not read a chunk for the last copy
	rounds    int
	joining   bool // opened by JOIN, not whole yet
	joinAt    holdfast.Seq
	held      holdfast.Seq // its chunks are those of the history up to here
	maxAsOf   holdfast.Seq
	wholeSent bool
	copyRetry time.Duration
	copyDelay time.Duration // pause after the next failure of a CopyLog
	copyDone  int64
	copyTotal int64
}

func (m *member) streaming() bool { return m.link == linkStreaming }

// connected says whether conn means anything.
func (m *member) connected() bool { return m.link > linkDialing }

func (c *Core) addMember(r Replica) {
	if r.Role == holdfast.RoleOrphan || r.Role == holdfast.RoleDeleting {
		return
	}
	c.members = append(c.members, &member{Replica: r, inISR: r.Role == holdfast.RoleInSync || Mutant == "activate_from_any", lastHeard: c.now, ageFrom: c.now})
}

func (c *Core) member(id holdfast.ReplicaID) *member {
	for _, m := range c.members {
		if m.ID == id {
			return m
		}
	}
	return nil
}

// from returns the member that spoke, if it spoke on its present connection
// (R8), and notes that it was heard.
func (c *Core) from(id holdfast.ReplicaID, conn Conn) *member {
	m := c.member(id)
	if m == nil || !m.connected() || m.conn != conn {
		return nil
	}
	m.lastHeard = c.now
	return m
}

// onReplicas takes raft's present list: new copies are filled, removed ones
// that are not required any more are let go.
func (c *Core) onReplicas(list []Replica) {
	listed := func(id holdfast.ReplicaID) *Replica {
		for i := range list {
			if list[i].ID == id && list[i].Role != holdfast.RoleOrphan && list[i].Role != holdfast.RoleDeleting {
				return &list[i]
			}
		}
		return nil
	}
	for _, m := range c.members {
		if r := listed(m.ID); r != nil {
			m.Replica.Role, m.Leaving = r.Role, r.Leaving
		}
		m.unlisted = listed(m.ID) == nil
	}
	c.letGo()
	for _, r := range list {
		if c.member(r.ID) == nil && listed(r.ID) != nil {
			// Only this writer adds to the in-sync set within its epoch.
			r.Role = holdfast.RoleSyncing
			c.addMember(r)
		}
	}
}

// letGo forgets the members that raft does not list and nobody waits for.
func (c *Core) letGo() {
	kept := c.members[:0:0]
	for _, m := range c.members {
		if m.unlisted && !m.inAckset && !m.inISR {
			c.dropLink(m)
			c.forget(m)
			continue
		}
		kept = append(kept, m)
	}
	c.members = kept
}

func (c *Core) nodeGone(node holdfast.NodeID, gone bool) {
	for _, m := range c.members {
		if m.Node == node {
			m.gone = gone
		}
	}
}

func (c *Core) connect(m *member) {
	if m.link != linkDown || c.now < m.retry || c.heldDown(m) || m.Leaving && !m.inISR {
		return
	}
	m.link = linkDialing
	c.do(Connect{Replica: m.ID, Node: m.Node, Lineage: m.Lineage})
}

func (c *Core) onLinkUp(e LinkUp) {
	m := c.member(e.Replica)
	if m == nil || m.link != linkDialing {
		c.do(CloseConn{Replica: e.Replica, Conn: e.Conn})
		return
	}
	m.link, m.conn = linkFencing, e.Conn
	m.linkAt = c.now // not a word of the replica: lastHeard stays
	c.do(SendFence{Replica: m.ID, Conn: m.conn, Epoch: c.opt.Epoch})
}

func (c *Core) onLinkDown(e LinkDown) {
	m := c.member(e.Replica)
	if m == nil || !m.connected() || m.conn != e.Conn {
		return
	}
	c.forget(m)
}

// dropLink closes the connection; forget follows here, LinkDown finds nothing.
func (c *Core) dropLink(m *member) {
	if m.link == linkDialing {
		c.do(Disconnect{Replica: m.ID})
	}
	if m.connected() {
		c.do(CloseConn{Replica: m.ID, Conn: m.conn})
	}
}

// forget drops all that was known by the connection (R8).
func (c *Core) forget(m *member) {
	c.stopCopy(m)
	for _, t := range c.members {
		if t.copy != 0 && t.source == m {
			c.sourceLost(t)
		}
	}
	m.link, m.conn = linkDown, 0
	if Mutant != "stale_acks_kept" {
		m.tail, m.dur = 0, 0
	}
	m.sent, m.covered, m.commitSent = 0, 0, 0
	m.flushes = m.flushes[:0]
	m.pinged, m.pong, m.promised = 0, 0, 0
	m.intactSent, m.confirmed, m.tooShort = false, false, false
	m.pinned, m.joining, m.copied, m.wholeSent = false, false, false, false
	m.rounds, m.maxAsOf, m.held = 0, 0, 0
	m.credit.asked = 0
	c.readsFromLost(m)
	if c.phase == PhaseFencing && m.answered && m.status.Intact {
		m.answered = false // it may answer differently when it comes back
	}
}

// backOff keeps a failing copy from being tried without end.
func (c *Core) backOff(m *member) {
	m.delay = min(max(2*m.delay, time.Second), time.Minute)
	m.retry = c.now + m.delay
}

// onReplicaFailed: a disk error is final for that copy (R12). A refused
// checksum is retried once by a new connection; if another member refuses the
// same op too, the bytes are bad here.
func (c *Core) onReplicaFailed(m *member, e ReplicaFailed) {
	c.do(CloseConn{Replica: m.ID, Conn: m.conn})
	if errors.Is(e.Err, holdfast.ErrIntegrity) && e.Seq > 0 {
		if c.crc.seq == e.Seq && c.crc.by != m {
			c.end(EndBadMemory, nil)
			return
		}
		if c.crc.seq != e.Seq {
			c.crc = refusal{seq: e.Seq, by: m}
		}
		c.crc.n++
		m.hard = m.hard || c.crc.n > 2
	} else {
		m.hard = true
		c.backOff(m)
	}
	c.forget(m)
}

// onTick counts silence, but only while this process ran itself: after a
// stall everybody gets a new start.
func (c *Core) onTick() {
	if gap := c.now - c.lastTick; gap > c.lim.PromiseLength/2 {
		c.notice(NoticeStall, nil, true, "no tick for %v: suspicion starts anew", gap)
		for _, m := range c.members {
			m.lastHeard, m.ageFrom = c.now, c.now
		}
		c.freshPace()
	}
	c.lastTick = c.now
	c.letGo()
	if c.phase != PhaseActive && c.phase != PhaseDetaching {
		for _, m := range c.members {
			if waits := m.link == linkFencing || m.link == linkOpening; waits && c.now-max(m.lastHeard, m.linkAt) >= c.lim.Evict {
				c.dropLink(m)
				c.forget(m)
			}
			if m.inISR {
				c.connect(m)
			}
		}
		return
	}
	if c.now-c.pingedAt >= c.lim.PromiseLength/4 {
		c.roundWant = true
	}
	for _, m := range c.members {
		c.connect(m)
		c.watch(m)
	}
	c.lookPace()
	c.readsOverdue()
	c.failHeld()
}

// watch suspects and evicts (R2: by raft first).
func (c *Core) watch(m *member) {
	silence := c.silence(m)
	age := c.opAge(m)
	if quiet := c.now - max(m.lastHeard, m.linkAt); m.connected() && (quiet >= c.lim.Evict || !m.inAckset && age >= c.lim.OpAge) {
		// The connection may be dead without anybody knowing.
		c.notice(NoticeSuspect, m, true, "connection silent for %v, oldest op %v: a new one", quiet, age)
		c.dropLink(m)
		c.forget(m)
		if !m.inAckset {
			c.backOff(m)
		}
	}
	switch {
	case !m.inAckset:
		return
	case silence < c.lim.Suspect && age < c.lim.OpAge/2 && !m.hard:
		m.suspect = false
	case !m.suspect:
		m.suspect = true
		c.notice(NoticeSuspect, m, true, "no answer for %v, oldest op %v", silence, age)
	}
	if !m.evicting && (m.hard || silence >= c.lim.Evict || age >= c.lim.OpAge) && c.otherHealthy(m) {
		m.evicting = true
		c.notice(NoticeEvicting, m, true, "silent for %v, oldest op %v, failed %v", silence, age, m.hard)
	}
	if !m.evicting && c.mayLeave(m) {
		m.evicting = true
		c.notice(NoticeEvicting, m, false, "it is to go, and enough others are in sync")
	}
	if m.evicting && Mutant == "ack_before_raft" {
		c.dropFromAckset(m)
	}
}

// silence is for how long m gave no sign of life. Acknowledgements alone are none:
// they may come from memory, while a ping is answered only if the member's disk
// works (its node looks).
func (c *Core) silence(m *member) time.Duration {
	silence := c.now - m.lastHeard
	if m.pinged > m.pong {
		silence = max(silence, c.now-max(m.askedAt, m.ageFrom))
	}
	return silence
}

// otherHealthy says whether an in-sync member would remain that can go on.
func (c *Core) otherHealthy(m *member) bool {
	for _, o := range c.members {
		if o != m && o.inISR && o.inAckset && o.streaming() && !o.suspect && !o.evicting && !o.hard {
			return true
		}
	}
	return false
}

// opAge returns how long the oldest entry or flush waits for m.
func (c *Core) opAge(m *member) time.Duration {
	var age time.Duration
	tail := m.tail
	if !m.streaming() {
		tail = max(tail, c.acked)
		if !m.inAckset {
			tail = c.win.last
		}
	}
	if next := max(tail+1, c.win.first); next <= c.win.last {
		age = c.now - max(c.win.at(next).at, m.ageFrom)
	}
	if len(m.flushes) > 0 {
		age = max(age, c.now-max(m.flushes[0].at, m.ageFrom))
	}
	return age
}

// dropFromAckset stops requiring m's acks. Raft no longer has it in the ISR.
func (c *Core) dropFromAckset(m *member) {
	m.inISR, m.inAckset, m.evicting, m.suspect = false, false, false, false
	hard := m.hard
	m.hard = false
	c.dropLink(m)
	c.forget(m)
	if hard {
		c.backOff(m)
	}
	c.notice(NoticeEvicted, m, true, "no longer in sync; isr version %d", c.isrVersion)
	c.setAckMode()
	c.lookBelow()
}

// setAckMode: when the in-sync members of a replicated volume are down to one
// node, acknowledged means durable, until another node is in sync again.
func (c *Core) setAckMode() {
	durable := c.opt.Ack == holdfast.AckDurable
	if !durable && c.opt.Copies >= 2 {
		durable = true
		var first *member
		for _, m := range c.members {
			if !m.inISR {
				continue
			}
			if first == nil {
				first = m
			} else if m.Node != first.Node {
				durable = false
			}
		}
	}
	if durable == c.durable {
		return
	}
	c.durable = durable
	if durable {
		c.wantFlush(c.win.last)
		c.notice(NoticeDurable, nil, true, "in-sync copies on one node only: writes are acknowledged when durable")
	} else {
		c.notice(NoticeReceived, nil, false, "writes are acknowledged when received")
	}
}
