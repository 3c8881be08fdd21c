package attachment

import (
	"context"
	"errors"
	"log/slog"
	"runtime/debug"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/replication/coordinator"
	"github.com/holdfast-storage/holdfast/replication/wire"
)

// raftTime bounds one ask of raft; what comes later counts as not known.
const raftTime = 10 * time.Second

// segment is one segment's core at work.
type segment struct {
	a      *Attachment
	id     holdfast.SegmentID
	size   int64
	logger *slog.Logger

	ctx     context.Context // ended by close
	stop    context.CancelFunc
	running sync.WaitGroup // dial loops, asks of raft, copies
	linked  sync.WaitGroup // the links of the sessions

	mu      sync.Mutex
	core    *coordinator.Core
	after   []effect // what is done once mu is released
	pending []coordinator.Event
	busy    bool // within a step: events are queued in pending

	lastOp coordinator.OpID
	ops    map[coordinator.OpID]*op
	window window
	queued int64 // cost of writes taken and not yet sequenced
	commit holdfast.Seq
	resent int64 // payload sent to bring members back

	peers  map[holdfast.ReplicaID]*peer
	conns  coordinator.Conn // last number given
	links  []wire.Link
	copies map[uint64]*copyRun

	clock time.Duration // when the present step began
	took  foreground    // what requests took since the last tick

	repairs map[repairKey]*repair

	remoteReads chan struct{} // a place for each

	activated *coordinator.Activated
	detached  *coordinator.Detached
	broken    error // a broken invariant ended the session
	ended     bool
	reason    coordinator.EndReason
	closed    bool // by close: no more sessions
}

// effect is what a step leaves to be done without mu.
type effect struct {
	link  wire.Link
	local bool // its other end is called, not a socket: after the others
	close bool
	call  func()
}

// now is CLOCK_BOOTTIME: it goes on while the machine sleeps.
func now() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic("attachment: no CLOCK_BOOTTIME: " + err.Error()) // Linux has it since 2.6.39
	}
	return time.Duration(ts.Nano())
}

func newSegment(a *Attachment, index int, size int64) *segment {
	d := &a.o.Segments[index]
	s := &segment{
		a: a, id: holdfast.SegmentID{Volume: a.o.Volume, Index: uint32(index)}, size: size,
		logger: a.o.Logger.With("volume", a.o.Volume, "segment", index, "epoch", a.o.Epoch),
		ops:    map[coordinator.OpID]*op{},
		peers:  map[holdfast.ReplicaID]*peer{},
		copies: map[uint64]*copyRun{},

		repairs: map[repairKey]*repair{},

		remoteReads: make(chan struct{}, maxRemoteReads),
	}
	s.ctx, s.stop = context.WithCancel(a.ctx)
	o := coordinator.Options{
		Now: now(), Node: a.o.Node, Epoch: a.o.Epoch, ISRVersion: d.ISRVersion,
		Replicas: append([]coordinator.Replica(nil), d.Replicas...), History: append([]coordinator.Start(nil), d.History...),
		HistoryPruned: d.HistoryPruned, Floor: d.Floor, Detached: a.o.Detached, End: d.End, AcceptLoss: a.o.AcceptLoss, Salvaged: d.Salvaged,
		PingsOnly: a.o.PingsOnly, Copies: a.o.Policy.Copies, Ack: a.o.Ack, Limits: a.o.Limits,
		MinCopies: a.o.Policy.MinCopies, FailHeldAfter: a.o.Policy.FailHeldAfter,
	}
	if a.o.Gone != nil {
		seen := map[holdfast.NodeID]bool{}
		for _, r := range d.Replicas {
			if !seen[r.Node] && a.o.Gone(r.Node) {
				o.Gone = append(o.Gone, r.Node)
			}
			seen[r.Node] = true
		}
	}
	s.core = coordinator.New(o)
	return s
}

// start takes the core's first actions.
func (s *segment) start() {
	s.mu.Lock()
	s.run(nil)
	s.unlock()
}

// step hands one event to the core.
func (s *segment) step(ev coordinator.Event) {
	s.mu.Lock()
	s.stepLocked(ev)
	s.unlock()
}

// stepLocked hands one event to the core and does what it asks for: nothing
// in that waits. Actions that make events of their own have them queued.
func (s *segment) stepLocked(ev coordinator.Event) {
	if s.busy {
		s.pending = append(s.pending, ev)
		return
	}
	s.clock = now()
	s.stepAt(ev)
}

// takeLocked hands a request to the core. Its time counts from the clock that
// the step reads anyway, or from before its wait for memory.
func (s *segment) takeLocked(o *op, kind opKind, ev coordinator.Event) {
	s.clock = now()
	o.kind = kind
	if o.began == 0 {
		o.began = s.clock
	}
	s.stepAt(ev)
}

// stepAt is a step at s.clock, and those that it leads to.
func (s *segment) stepAt(ev coordinator.Event) {
	s.run(ev)
	for len(s.pending) > 0 {
		next := s.pending[0]
		s.pending = s.pending[1:]
		s.clock = now()
		s.run(next)
	}
	s.pending = nil
}

// run runs one step; without an event the first one. A broken invariant ends
// this attachment, not the process: other volumes go on.
func (s *segment) run(ev coordinator.Event) {
	s.busy = true
	defer func() {
		s.busy = false
		if v := recover(); v != nil {
			s.breakDown(v)
		}
	}()
	var actions []coordinator.Action
	switch {
	case s.broken != nil:
		s.answerBroken()
	case ev == nil:
		actions = s.core.Start()
	default:
		actions = s.core.Step(s.clock, ev)
	}
	for _, act := range actions {
		s.do(act)
	}
}

// breakDown ends a session whose core or edge contradicted itself.
func (s *segment) breakDown(v any) {
	if s.broken != nil {
		return
	}
	s.broken = holdfast.Errorf(holdfast.ErrInternal, "segment %v: the writer contradicts itself: %v", s.id, v)
	s.logger.Error("broken invariant", "panic", v, "stack", string(debug.Stack()))
	for _, p := range s.peers {
		if p.stopDial != nil {
			p.stopDial()
			p.stopDial = nil
		}
		if p.conn != nil && !p.conn.ended {
			s.closeLater(p.conn)
		}
	}
	for _, c := range s.copies {
		c.stop()
	}
	s.answerBroken()
	s.endSession(coordinator.EndSession{Reason: coordinator.EndStopped, Err: s.broken})
}

// answerBroken answers every request.
func (s *segment) answerBroken() {
	for id, o := range s.ops {
		if o.read != nil {
			s.completeRead(coordinator.CompleteRead{ID: id, Err: s.broken})
		} else {
			s.complete(id, s.broken)
		}
	}
}

// unlock releases mu and does what waits for that: sockets first, so that
// other hosts work while this one does.
func (s *segment) unlock() {
	after := s.after
	s.after = nil
	s.mu.Unlock()
	for _, e := range after {
		if e.link != nil && !e.local {
			e.link.Flush()
		}
	}
	for _, e := range after {
		switch {
		case e.call != nil:
			e.call()
		case e.local:
			e.link.Flush()
		}
		if e.close {
			e.link.Close()
		}
	}
}

func (s *segment) flushLater(c *conn) { s.linkLater(c, false) }
func (s *segment) closeLater(c *conn) { s.linkLater(c, true) }

func (s *segment) linkLater(c *conn, close bool) {
	for i := range s.after {
		if s.after[i].link == c.link {
			s.after[i].close = s.after[i].close || close
			return
		}
	}
	s.after = append(s.after, effect{link: c.link, local: c.local != nil, close: close})
}

// do does one thing the core asked for.
func (s *segment) do(act coordinator.Action) {
	switch a := act.(type) {
	case coordinator.SendAppend:
		if c := s.connOf(a.Replica, a.Conn); c != nil {
			c.append(a.First, a.Last)
		}
	case coordinator.Sequence:
		s.sequence(a)
	case coordinator.CompleteWrite:
		s.complete(a.ID, a.Err)
	case coordinator.CompleteFlush:
		s.complete(a.ID, a.Err)
	case coordinator.CompleteRead:
		s.completeRead(a)
	case coordinator.SampleRead:
		s.sampleRead(a)
	case coordinator.SendPing:
		if a.Promise {
			s.send(a.Replica, a.Conn, wire.RequestID(a.Nonce), &wire.Promise{})
		} else {
			s.send(a.Replica, a.Conn, wire.RequestID(a.Nonce), &wire.Ping{})
		}
	case coordinator.SendCommit:
		s.commit = max(s.commit, a.Seq)
		s.send(a.Replica, a.Conn, 0, &wire.Commit{Seq: a.Seq})
	case coordinator.SendAfford:
		s.send(a.Replica, a.Conn, wire.RequestID(a.Ask), &wire.Afford{Offset: a.Offset, Length: a.Length, Pending: uint32(a.Pending)})
	case coordinator.SendFlush:
		s.sendOrdered(a.Replica, a.Conn, wire.RequestID(a.ID), &wire.Flush{})
	case coordinator.ReleaseWindow:
		s.a.memory.give(s.window.release(a.UpTo))
	case coordinator.Connect:
		s.connect(a)
	case coordinator.Disconnect:
		if p := s.peers[a.Replica]; p != nil && p.stopDial != nil {
			p.stopDial()
			p.stopDial = nil
		}
	case coordinator.CloseConn:
		if c := s.connOf(a.Replica, a.Conn); c != nil {
			c.leave()
			s.closeLater(c)
		}
	case coordinator.SendFence:
		s.send(a.Replica, a.Conn, 0, &wire.Fence{})
	case coordinator.SendOpen:
		if c := s.connOf(a.Replica, a.Conn); c != nil {
			c.sent, c.want = a.CutTo, a.CutTo
			c.send(0, &wire.Open{Start: a.CutTo, ISRVersion: a.ISRVersion})
		}
	case coordinator.SendJoin:
		s.background(func(ctx context.Context) { s.join(ctx, a) })
	case coordinator.SendIntact:
		s.sendOrdered(a.Replica, a.Conn, 0, &wire.Intact{})
	case coordinator.SendWhole:
		s.sendOrdered(a.Replica, a.Conn, 0, &wire.Whole{})
	case coordinator.CopyLog:
		s.startCopy(a.Copy, a.Source, a.Target, s.mustHurry, func(ctx context.Context, r *resync) { s.copyLog(ctx, r, a) })
	case coordinator.StartCopy:
		s.startCopy(a.Copy, a.Source, a.Target, nil, func(ctx context.Context, r *resync) { s.copyChunks(ctx, r, a) })
	case coordinator.StopCopy:
		if c := s.copies[a.Copy]; c != nil {
			c.stop()
			delete(s.copies, a.Copy)
		}
	case coordinator.Propose:
		s.background(func(ctx context.Context) { s.step(s.propose(ctx, a)) })
	case coordinator.ReadMeta:
		s.background(func(ctx context.Context) { s.step(s.readMeta(ctx, a)) })
	case coordinator.Activated:
		s.activated = &a
		s.after = append(s.after, effect{call: s.a.segmentActive})
	case coordinator.Detached:
		s.detached = &a
	case coordinator.EndSession:
		s.endSession(a)
	case coordinator.Notice:
		level := slog.LevelInfo
		if a.Warn {
			level = slog.LevelWarn
		}
		s.logger.Log(context.Background(), level, string(a.Kind), "replica", a.Replica, "what", a.Text)
	}
}

func (s *segment) send(id holdfast.ReplicaID, n coordinator.Conn, request wire.RequestID, m wire.Message) {
	if c := s.connOf(id, n); c != nil {
		c.send(request, m)
	}
}

func (s *segment) sendOrdered(id holdfast.ReplicaID, n coordinator.Conn, request wire.RequestID, m wire.Message) {
	if c := s.connOf(id, n); c != nil {
		c.sendOrdered(request, m)
	}
}

// background runs an ask of raft, unless the segment is being closed.
func (s *segment) background(f func(ctx context.Context)) {
	if s.closed {
		return
	}
	s.running.Add(1)
	go func() {
		defer s.running.Done()
		ctx, cancel := context.WithTimeout(s.ctx, raftTime)
		defer cancel()
		f(ctx)
	}()
}

// sequence moves an operation's payload into the window.
func (s *segment) sequence(a coordinator.Sequence) {
	o := s.ops[a.ID]
	o.entry.Seq, o.entry.Epoch = a.Seq, s.a.o.Epoch
	s.window.push(windowEntry{entry: o.entry, buffer: o.buffer, cost: o.cost})
	s.queued -= o.cost
	o.entry, o.buffer, o.cost = wire.Entry{}, nil, 0
}

// complete answers a write or a flush.
func (s *segment) complete(id coordinator.OpID, err error) {
	o := s.ops[id]
	if o == nil {
		return
	}
	delete(s.ops, id)
	if o.cost > 0 || o.buffer != nil { // never sequenced
		o.buffer.Release()
		s.queued -= o.cost
		s.a.memory.give(o.cost)
	}
	s.took[o.kind].Add(s.clock - o.began)
	o.request.finish(err)
}

func (s *segment) completeRead(a coordinator.CompleteRead) {
	o := s.ops[a.ID]
	if o == nil {
		return
	}
	delete(s.ops, a.ID)
	s.took[opRead].Add(s.clock - o.began)
	o.read.sample, o.read.done, o.read.err = nil, true, a.Err
	o.read.signal()
}

// sampleRead hands the sampling to the goroutine that waits in ReadAt.
func (s *segment) sampleRead(a coordinator.SampleRead) {
	o := s.ops[a.ID]
	if o == nil {
		return
	}
	if o.read.returned { // nobody waits: any answer ends it
		s.stepLocked(coordinator.Sampled{ID: a.ID, Sample: a.Sample, Replica: a.Replica, Conn: a.Conn})
		return
	}
	o.read.sample = &a
	o.read.signal()
}

// propose asks raft and says what became of it.
func (s *segment) propose(ctx context.Context, p coordinator.Propose) coordinator.Event {
	var v holdfast.ISRVersion
	var err error
	meta := s.a.o.Meta
	switch p.Command {
	case coordinator.CommandActivate:
		v, err = meta.Activate(ctx, s.id, p.Epoch, p.ISRVersion, p.S, append([]holdfast.ReplicaID(nil), p.ISR...), p.Continuous)
	case coordinator.CommandShrink:
		v, err = meta.ShrinkISR(ctx, s.id, p.Epoch, p.ISRVersion, p.Replica, p.Commit)
	case coordinator.CommandGrow:
		v, err = meta.GrowISR(ctx, s.id, p.Epoch, p.ISRVersion, p.Replica, p.Commit)
	}
	out := coordinator.Proposed{ID: p.ID, ISRVersion: v, Outcome: outcome(err)}
	if err != nil {
		s.logger.Warn("raft did not apply", "command", p.Command, "error", err)
	}
	return out
}

func outcome(err error) coordinator.Outcome {
	switch {
	case err == nil:
		return coordinator.OutcomeApplied
	case errors.Is(err, holdfast.ErrFenced):
		return coordinator.OutcomeFenced
	case errors.Is(err, ErrConflict):
		return coordinator.OutcomeConflict
	case errors.Is(err, holdfast.ErrRefused), errors.Is(err, holdfast.ErrIntegrity):
		return coordinator.OutcomeRefused
	}
	return coordinator.OutcomeUnknown
}

func (s *segment) readMeta(ctx context.Context, r coordinator.ReadMeta) coordinator.Event {
	rec, err := s.a.o.Meta.Segment(ctx, s.id)
	return coordinator.Meta{ID: r.ID, Err: err, Epoch: rec.Epoch, Activated: rec.Activated, ISRVersion: rec.ISRVersion, ISR: rec.ISR}
}

// endSession: the core is done; so is the volume's attachment.
func (s *segment) endSession(a coordinator.EndSession) {
	s.ended, s.reason = true, a.Reason
	if a.Reason != coordinator.EndStopped && a.Reason != coordinator.EndDetached {
		s.logger.Error("session ended", "reason", a.Reason, "error", a.Err)
	}
	s.after = append(s.after, effect{call: func() { s.a.segmentEnded(s, a) }})
}

// close ends all sessions and waits for everything that runs. The core has
// ended before.
func (s *segment) close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.stop()
	s.running.Wait()
	s.mu.Lock()
	links := append([]wire.Link(nil), s.links...)
	s.mu.Unlock()
	for _, l := range links {
		l.Close()
	}
	s.linked.Wait()
	s.mu.Lock()
	if s.window.n > 0 {
		s.a.memory.give(s.window.release(s.window.first + holdfast.Seq(s.window.n)))
	}
	s.mu.Unlock()
}
