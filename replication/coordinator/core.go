package coordinator

import (
	"fmt"
	"time"

	"github.com/holdfast-storage/holdfast"
)

// Core is the writer of one attached segment. It is not safe for concurrent use.
type Core struct {
	opt Options
	lim Limits
	now time.Duration

	phase      Phase
	phaseSince time.Duration
	members    []*member
	history    []Start // with this epoch once it is activated
	isrVersion holdfast.ISRVersion

	// Attach.
	attachAt    time.Duration // begin of the present round
	firstIntact time.Duration // first intact answer of the round
	hasIntact   bool
	continuous  bool
	marred      bool // members with lost entries decide: there are no others
	s           holdfast.Seq

	// Data path.
	win        window
	acked      holdfast.Seq // received by every ackset member; never falls
	commit     holdfast.Seq // durable on every ackset member; never falls
	durable    bool         // writes complete only when durable
	waiting    queue[Write] // taken, not yet sequenced: the window is full
	waits      queue[wait]  // flushes and durable writes, by rising target
	below      below
	room       room
	paceFrom   time.Duration // begin of the present window of paces
	safe       holdfast.Seq  // commit as of the last moment with min_copies in sync
	flushWant  holdfast.Seq  // every ackset member is to be durable up to here
	dirtySince time.Duration
	flushedAt  int64 // bytes sequenced when the last flush was asked for
	written    int64 // bytes sequenced
	flushIDs   uint64

	// Reads.
	reads     []*read
	freeReads []*read
	samples   uint64
	round     uint64 // nonce of the last ping round
	roundWant bool
	pingedAt  time.Duration
	rounds    [roundsKept]time.Duration // when each of the last began
	doubted   uint64                    // answers up to this round promise nothing
	readAt    time.Duration             // the last read's arrival
	hasRead   bool
	hedges    int // twentieths of reads that may be hedged

	// Raft.
	command    *command
	proposals  uint64
	proposedAt time.Duration
	metaWant   bool
	metaBusy   bool
	metaID     uint64
	metaAt     time.Duration
	sawHigher  holdfast.Epoch // a replica knows a higher epoch
	metaEpoch  holdfast.Epoch // what raft says, when that is too low

	copies    uint64
	asks      uint64
	crc       refusal
	detaching bool
	lastTick  time.Duration
	out       []Action
}

// wait is a flush, or a write that completes only when durable.
type wait struct {
	id     OpID
	target holdfast.Seq
	write  bool
	since  time.Duration
}

// refusal remembers who refused an op for its checksum.
type refusal struct {
	seq holdfast.Seq
	by  *member
	n   int
}

// New returns the core of an attachment whose AttachBegin was applied.
func New(o Options) *Core {
	c := &Core{
		opt: o, lim: o.Limits.withDefaults(), now: o.Now,
		phase: PhaseFencing, phaseSince: o.Now, attachAt: o.Now, lastTick: o.Now, paceFrom: o.Now, hedges: hedgeShare,
		history:    append([]Start(nil), o.History...),
		isrVersion: o.ISRVersion,
	}
	for _, r := range o.Replicas {
		c.addMember(r)
	}
	for _, n := range o.Gone {
		c.nodeGone(n, true)
	}
	return c
}

func (l Limits) withDefaults() Limits {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&l.Tick, 100*time.Millisecond)
	def(&l.PromiseLength, 2*time.Second)
	def(&l.Suspect, 2*time.Second)
	def(&l.Hedge, 200*time.Millisecond)
	def(&l.Evict, 5*time.Second)
	def(&l.OpAge, 10*time.Second)
	def(&l.AttachGrace, 500*time.Millisecond)
	def(&l.LossyWait, 30*time.Second)
	def(&l.ExtendWait, 10*time.Second)
	def(&l.FlushEvery, 100*time.Millisecond)
	def(&l.RetryRaft, 500*time.Millisecond)
	def(&l.SlowWindow, 30*time.Second)
	if l.SlowSamples == 0 {
		l.SlowSamples = 20
	}
	if l.FlushBytes == 0 {
		l.FlushBytes = 16 << 20
	}
	if l.WindowBytes == 0 {
		l.WindowBytes = 64 << 20
	}
	if l.WindowOps == 0 {
		l.WindowOps = 16384
	}
	return l
}

// Start returns the first actions. Call it once, before the first Step.
func (c *Core) Start() []Action {
	c.out = c.out[:0]
	for _, m := range c.members {
		if m.inISR {
			c.connect(m)
		}
	}
	c.settle()
	return c.out
}

// Step consumes one event. The slice it returns is valid until the next call.
func (c *Core) Step(now time.Duration, ev Event) []Action {
	c.out = c.out[:0]
	if c.phase == PhaseEnded {
		c.refuse(ev)
		return c.out
	}
	c.now = max(c.now, now)
	c.doubtClock()
	switch e := ev.(type) {
	case Write:
		c.waiting.push(e)
	case Acked:
		if m := c.from(e.Replica, e.Conn); m != nil {
			m.tell(e.Credit, e.Tail)
			c.onAcked(m, e.Tail)
		}
	case Afforded:
		if m := c.from(e.Replica, e.Conn); m != nil {
			c.onAfforded(m, e)
		}
	case Flushed:
		if m := c.from(e.Replica, e.Conn); m != nil {
			c.onFlushed(m, e)
		}
	case Read:
		c.onRead(e)
	case Sampled:
		c.onSampled(e)
	case Pong:
		if m := c.from(e.Replica, e.Conn); m != nil {
			c.onPong(m, e)
		}
	case Flush:
		c.waits.push(wait{id: e.ID, target: c.acked, since: c.now})
		c.wantFlush(c.acked)
	case Settle:
		c.wantFlush(c.acked)
	case Tick:
		c.onTick()
	case LinkUp:
		c.onLinkUp(e)
	case LinkDown:
		c.onLinkDown(e)
	case FenceOK:
		if m := c.from(e.Replica, e.Conn); m != nil && e.Epoch == c.opt.Epoch {
			c.onFenceOK(m, e.Status)
		}
	case Refused:
		c.onRefused(e)
	case Opened:
		if m := c.from(e.Replica, e.Conn); m != nil {
			c.onOpened(m, e)
		}
	case WholeOK:
		if m := c.from(e.Replica, e.Conn); m != nil {
			c.onWhole(m, e.Dur)
		}
	case ReplicaFailed:
		if m := c.from(e.Replica, e.Conn); m != nil {
			c.onReplicaFailed(m, e)
		}
	case CopiedLog:
		c.onCopiedLog(e)
	case Copied:
		c.onCopied(e)
	case CopyProgress:
		if m := c.copying(e.Copy); m != nil {
			m.copyDone, m.copyTotal = e.Done, e.Total
			m.lastHeard = c.now
		}
	case NodeGone:
		c.nodeGone(e.Node, e.Gone)
	case Replicas:
		c.onReplicas(e.List)
	case Proposed:
		c.onProposed(e)
	case Meta:
		c.onMeta(e)
	case Policy:
		c.opt.Copies, c.opt.MinCopies, c.opt.FailHeldAfter = e.Copies, e.MinCopies, e.FailHeldAfter
		if c.phase == PhaseActive || c.phase == PhaseDetaching {
			c.setAckMode()
			c.lookBelow()
		}
	case Detach:
		c.detaching = true
	case Stop:
		c.end(EndStopped, e.Err)
	}
	c.settle()
	return c.out
}

func (c *Core) do(a Action) { c.out = append(c.out, a) }

func (c *Core) notice(kind NoticeKind, m *member, warn bool, format string, args ...any) {
	n := Notice{Kind: kind, Warn: warn, Text: fmt.Sprintf(format, args...)}
	if m != nil {
		n.Replica = m.ID
	}
	c.do(n)
}

func (c *Core) enter(p Phase) { c.phase, c.phaseSince = p, c.now }

// settle brings everything forward that the event made possible. It is the one
// place from which work starts, so that no event can forget a consequence.
func (c *Core) settle() {
	switch c.phase {
	case PhaseFencing:
		c.decide()
	case PhaseOpening:
		c.progressOpening()
	}
	if c.phase == PhaseActive || c.phase == PhaseDetaching {
		c.progressMembers()
		c.sequence()
		c.stream()
		c.complete()
		c.ownFlush()
		c.sendFlushes()
		c.sendCommits()
		c.progressReads()
		c.sendPings()
		c.releaseWindow()
		c.sequence() // what the release made room for
		c.stream()
	}
	if c.phase == PhaseEnded {
		return
	}
	c.pumpRaft()
	c.progressDetach()
}

// progressDetach ends cleanly once nothing is in flight and everything is
// durable on every ackset member.
func (c *Core) progressDetach() {
	if !c.detaching || c.phase != PhaseActive && c.phase != PhaseDetaching {
		return
	}
	if c.phase == PhaseActive {
		c.enter(PhaseDetaching)
	}
	if c.waiting.len() > 0 || c.acked < c.win.last || len(c.reads) > 0 || c.waits.len() > 0 || c.command != nil || c.metaBusy {
		return
	}
	for _, m := range c.members {
		if m.inAckset && (!m.streaming() || m.tail != c.win.last || m.dur < c.win.last || m.evicting) {
			c.wantFlush(c.win.last)
			c.sendFlushes()
			return
		}
	}
	if c.commit < c.win.last {
		return
	}
	c.do(Detached{End: c.win.last, Commit: c.commit, ISRVersion: c.isrVersion})
	c.end(EndDetached, nil)
}

// end completes every request and closes the session. What was sequenced and
// not completed is neither promised nor denied.
func (c *Core) end(reason EndReason, err error) {
	if c.phase == PhaseEnded {
		return
	}
	if err == nil && reason != EndDetached && reason != EndStopped {
		err = c.endError(reason)
	}
	c.enter(PhaseEnded)
	opErr := err
	if opErr == nil {
		opErr = holdfast.Errorf(holdfast.ErrUnavailable, "the attachment has ended")
	}
	for s := c.acked + 1; s <= c.win.last; s++ {
		c.answer(c.win.at(s), opErr)
	}
	for c.waiting.len() > 0 {
		c.do(CompleteWrite{ID: c.waiting.pop().ID, Err: opErr})
	}
	for c.waits.len() > 0 {
		c.finish(c.waits.pop(), opErr)
	}
	for _, r := range c.reads {
		c.do(CompleteRead{ID: r.id, Err: opErr})
	}
	c.reads = nil
	for _, m := range c.members {
		if m.link == linkDialing {
			c.do(Disconnect{Replica: m.ID})
		}
		c.stopCopy(m)
		if m.link != linkDown && m.link != linkDialing {
			c.do(CloseConn{Replica: m.ID, Conn: m.conn})
		}
		m.link = linkDown
	}
	c.do(EndSession{Reason: reason, Err: err})
}

func (c *Core) endError(reason EndReason) error {
	switch reason {
	case EndFenced:
		return holdfast.Errorf(holdfast.ErrFenced, "epoch %d was fenced by epoch %d", c.opt.Epoch, c.sawHigher)
	case EndReplicaRegression:
		return holdfast.Errorf(holdfast.ErrIntegrity, "REPLICA_REGRESSION: the in-sync replicas hold less than seq %d, which was durable", c.floor()).
			WithRemedy("look for a rolled-back or exchanged disk; what is left can be had with holdfast volume salvage")
	case EndNoInSync:
		return holdfast.Errorf(holdfast.ErrIntegrity, "NO_IN_SYNC_REPLICA: the log of every in-sync replica is damaged").
			WithRemedy("holdfast volume salvage lists what else there is")
	case EndMetadataRegression:
		return holdfast.Errorf(holdfast.ErrIntegrity, "METADATA_REGRESSION: epoch %d was given, the metadata knows only %d", c.sawHigher, c.metaEpoch).
			WithRemedy("the metadata went backwards: restore a newer backup, or rebuild the record from the replicas")
	case EndBadMemory:
		return holdfast.Errorf(holdfast.ErrIntegrity, "two replicas refused the checksum of seq %d: this host's memory is bad", c.crc.seq)
	case EndChanged:
		return holdfast.Errorf(holdfast.ErrUnavailable, "the in-sync set changed while epoch %d was attaching", c.opt.Epoch).
			WithRemedy("attach again")
	case EndDetached, EndStopped:
	}
	return holdfast.Errorf(holdfast.ErrUnavailable, "the attachment has ended")
}

// refuse answers requests that come after the end.
func (c *Core) refuse(ev Event) {
	err := holdfast.Errorf(holdfast.ErrFenced, "the attachment has ended")
	switch e := ev.(type) {
	case Write:
		c.do(CompleteWrite{ID: e.ID, Err: err})
	case Read:
		c.do(CompleteRead{ID: e.ID, Err: err})
	case Flush:
		c.do(CompleteFlush{ID: e.ID, Err: err})
	case LinkUp:
		c.do(CloseConn{Replica: e.Replica, Conn: e.Conn})
	}
}
