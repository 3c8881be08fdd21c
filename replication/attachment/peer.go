package attachment

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/replication/coordinator"
	"github.com/holdfast-storage/holdfast/replication/serve"
	"github.com/holdfast-storage/holdfast/replication/wire"
)

const (
	// maxUnacked bounds the bytes of entries sent to a member and not yet
	// acknowledged; the member buffers as much, so control messages are never
	// stuck behind data that it cannot take yet (FORMAT.md of wire).
	maxUnacked = 8 << 20
	// maxCalls bounds the requests a member is asked at a time.
	maxCalls = 256
	// dialTime bounds one try to connect, HELLO included.
	dialTime = 5 * time.Second
	// First and longest pause between tries.
	minDialPause = 50 * time.Millisecond
	maxDialPause = time.Second
	// callBit keeps the numbers of calls apart from the core's nonces and ids.
	callBit = 1 << 63
)

// peer is one copy of a segment as this end of the wire sees it. Everything in
// it is guarded by the segment's mu.
type peer struct {
	id        holdfast.ReplicaID
	stopDial  context.CancelFunc // a dial loop runs
	conn      *conn              // the present session
	lastError string
	repairs   []int64 // chunks with bad blocks, to be repaired
	repairing int     // goroutines that do so
}

// conn is one session with a member.
type conn struct {
	seg    *segment
	peer   *peer
	number coordinator.Conn
	link   wire.Link
	local  *serve.Session // in process; else nil
	over   chan struct{}  // closed when the session has ended
	ended  bool

	calls    map[wire.RequestID]*call
	lastCall uint64

	// Entries on their way: asked to send up to want, sent up to sent; later
	// holds what must not overtake them.
	want, sent holdfast.Seq
	replay     holdfast.Seq // entries up to here were sequenced before the session opened
	flying     []flight
	unacked    int64
	later      []late
	room       chan struct{} // capacity 1: unacked fell
}

// flight is one APPEND that was not acknowledged.
type flight struct {
	last  holdfast.Seq
	bytes int64
}

// late is a message that follows the entries up to after.
type late struct {
	after   holdfast.Seq
	request wire.RequestID
	m       wire.Message
}

// connect begins a dial loop.
func (s *segment) connect(a coordinator.Connect) {
	p := s.peer(a.Replica)
	if p.stopDial != nil || s.closed {
		return
	}
	ctx, stop := context.WithCancel(s.ctx)
	p.stopDial = stop
	s.running.Add(1)
	go func() {
		defer s.running.Done()
		defer stop()
		s.dial(ctx, p, a)
	}()
}

func (s *segment) peer(id holdfast.ReplicaID) *peer {
	p := s.peers[id]
	if p == nil {
		p = &peer{id: id}
		s.peers[id] = p
	}
	return p
}

// dial tries until it is connected or taken back.
func (s *segment) dial(ctx context.Context, p *peer, to coordinator.Connect) {
	pause := minDialPause
	for {
		err := s.dialOnce(ctx, p, to.Node, to.Lineage)
		if err == nil || ctx.Err() != nil {
			return
		}
		s.mu.Lock()
		p.lastError = err.Error()
		s.mu.Unlock()
		s.logger.Debug("no session", "replica", p.id, "node", to.Node, "error", err)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
		pause = min(2*pause, maxDialPause)
	}
}

func (s *segment) dialOnce(ctx context.Context, p *peer, node holdfast.NodeID, lineage holdfast.LineageID) error {
	ctx, cancel := context.WithTimeout(ctx, dialTime)
	defer cancel()
	o := &s.a.o
	hello := &wire.Hello{
		Level: o.Level, Cluster: o.Cluster, From: o.Node, To: node, Instance: o.Instance,
		Segment: s.id, Replica: p.id, Lineage: lineage, Session: o.Session,
	}
	c := &conn{seg: s, peer: p, over: make(chan struct{}), room: make(chan struct{}, 1), calls: map[wire.RequestID]*call{}}
	if node == o.Node && o.Local != nil {
		session, _, err := o.Local.Connect(o.Epoch, hello)
		if err != nil {
			return err
		}
		c.link, c.local = session, session
	} else {
		tcp, err := o.Dial(ctx, node)
		if err != nil {
			return err
		}
		link, _, err := wire.Connect(ctx, tcp, o.Epoch, hello)
		if err != nil {
			return err
		}
		c.link = link
	}
	s.mu.Lock()
	if ctx.Err() != nil || s.closed {
		s.mu.Unlock()
		c.link.Start(func([]wire.Received, error) {}) // so that Close can end it
		c.link.Close()
		c.link.Wait()
		return context.Canceled
	}
	s.conns++
	c.number = s.conns
	p.conn, p.stopDial, p.lastError = c, nil, ""
	s.links = append(s.links, c.link)
	s.linked.Add(1)
	s.stepLocked(coordinator.LinkUp{Replica: p.id, Conn: c.number})
	s.unlock()
	c.link.Start(func(batch []wire.Received, err error) { s.receive(c, batch, err) })
	go func() {
		defer s.linked.Done()
		c.link.Wait()
	}()
	return nil
}

// connOf returns the session of that number, if it still is one.
func (s *segment) connOf(id holdfast.ReplicaID, number coordinator.Conn) *conn {
	p := s.peers[id]
	if p == nil || p.conn == nil || p.conn.number != number || p.conn.ended {
		return nil
	}
	return p.conn
}

// send queues a message and has the link flushed once mu is released.
func (c *conn) send(request wire.RequestID, m wire.Message) {
	c.link.Send(c.seg.a.o.Epoch, request, m)
	c.seg.flushLater(c)
}

// sendOrdered queues a message behind the entries asked for before it.
func (c *conn) sendOrdered(request wire.RequestID, m wire.Message) {
	if c.sent < c.want {
		c.later = append(c.later, late{after: c.want, request: request, m: m})
		return
	}
	c.send(request, m)
}

// append is asked to send the window's entries up to last.
func (c *conn) append(first, last holdfast.Seq) {
	if c.sent == c.want && c.sent < first-1 {
		c.sent = first - 1 // what is between came as another member's log
	}
	c.want = max(c.want, last)
	c.pump()
}

// pump sends entries as far as the member's credit reaches.
func (c *conn) pump() {
	for c.sent < c.want && c.unacked < maxUnacked {
		m := &wire.Append{Commit: c.seg.commit}
		var bytes int64
		for c.sent < c.want && len(m.Entries) < wire.MaxEntries {
			w := c.seg.window.at(c.sent + 1)
			if w == nil {
				c.seg.breakDown(fmt.Sprintf("entry %d is to be sent and not in the window", c.sent+1))
				m.Release()
				return
			}
			if bytes+int64(len(w.entry.Data)) > wire.MaxPayload {
				break
			}
			bytes += int64(len(w.entry.Data))
			if w.entry.Seq <= c.replay {
				c.seg.resent += int64(len(w.entry.Data))
			}
			m.Entries = append(m.Entries, w.entry)
			if w.buffer != nil {
				w.buffer.Retain()
				m.Hold(w.buffer)
			}
			c.sent++
		}
		c.flying = append(c.flying, flight{last: c.sent, bytes: bytes})
		c.unacked += bytes
		c.send(0, m)
	}
	for len(c.later) > 0 && c.later[0].after <= c.sent {
		c.send(c.later[0].request, c.later[0].m)
		c.later = c.later[1:]
	}
}

// leave ends what this end sends: what waits for credit is not sent any more,
// for the core has given the session up and the window lets go of its entries.
// What the member still says is taken until the link ends.
func (c *conn) leave() {
	c.want = c.sent
	for _, l := range c.later {
		l.m.Release()
	}
	c.later = nil
	c.link.Send(c.seg.a.o.Epoch, 0, &wire.Close{})
}

// acked notes an acknowledgement and uses the credit it brings.
func (c *conn) acked(tail holdfast.Seq) {
	n := 0
	for n < len(c.flying) && c.flying[n].last <= tail {
		c.unacked -= c.flying[n].bytes
		n++
	}
	if n == 0 {
		return
	}
	c.flying = append(c.flying[:0], c.flying[n:]...)
	c.pump()
	select {
	case c.room <- struct{}{}:
	default:
	}
}

// receive takes what arrived on a session.
func (s *segment) receive(c *conn, batch []wire.Received, err error) {
	s.mu.Lock()
	for _, r := range batch {
		if c.ended || s.closed || r.Header.Epoch != s.a.o.Epoch {
			r.Message.Release()
			continue
		}
		s.take(c, r.Header, r.Message)
	}
	if err != nil {
		s.linkEnded(c, err)
	}
	s.unlock()
}

func (s *segment) linkEnded(c *conn, err error) {
	if c.ended {
		return
	}
	c.ended = true
	close(c.over)
	clear(c.calls)
	for _, l := range c.later {
		l.m.Release()
	}
	c.later = nil
	if c.peer.conn == c {
		c.peer.conn = nil
		c.peer.lastError = err.Error()
	}
	for i, l := range s.links {
		if l == c.link {
			s.links = append(s.links[:i], s.links[i+1:]...)
			break
		}
	}
	s.logger.Debug("session ended", "replica", c.peer.id, "error", err)
	s.stepLocked(coordinator.LinkDown{Replica: c.peer.id, Conn: c.number})
}

// take turns one message into an event, or hands it to the call it answers.
func (s *segment) take(c *conn, h wire.Header, m wire.Message) {
	id, n := c.peer.id, c.number
	switch m := m.(type) {
	case *wire.Ack:
		c.acked(m.Tail)
		s.stepLocked(coordinator.Acked{Replica: id, Conn: n, Tail: m.Tail, Credit: int64(m.Credit)})
	case *wire.Afforded:
		s.stepLocked(coordinator.Afforded{Replica: id, Conn: n, Ask: uint64(h.Request), Need: int64(m.Need), Credit: int64(m.Credit), Tail: m.Tail})
	case *wire.Pong:
		s.stepLocked(coordinator.Pong{Replica: id, Conn: n, Nonce: uint64(h.Request)})
	case *wire.Promised:
		s.stepLocked(coordinator.Pong{Replica: id, Conn: n, Nonce: uint64(h.Request), Promise: m.Length})
	case *wire.Flushed:
		s.stepLocked(coordinator.Flushed{Replica: id, Conn: n, ID: uint64(h.Request), Dur: m.Durable})
	case *wire.Fenced:
		s.stepLocked(coordinator.FenceOK{Replica: id, Conn: n, Epoch: h.Epoch, Status: coordinator.Status{
			Fence: h.Epoch, Tail: m.Tail, TailEpoch: m.TailEpoch, Dur: m.Durable, Commit: m.Commit, Applied: m.Applied,
			Checkpoint: m.Checkpoint, Intact: m.Intact, Syncing: m.Syncing, Held: m.Held, Damaged: m.Damaged, Lost: m.Lost,
			HintEpoch: m.HintEpoch, HintISR: m.HintISR, LogSize: m.LogSize,
		}})
	case *wire.Refused:
		s.stepLocked(coordinator.Refused{Replica: id, Conn: n, Fence: m.Accepted})
	case *wire.Opened:
		c.replay = s.window.last()
		s.stepLocked(coordinator.Opened{Replica: id, Conn: n, Tail: m.Tail, Dur: m.Durable, Held: m.Held, Credit: int64(m.Credit)})
	case *wire.WholeDone:
		s.stepLocked(coordinator.WholeOK{Replica: id, Conn: n, Dur: m.Durable})
	case *wire.Damaged:
		s.damaged(c, m.Chunks)
	case *wire.Failed:
		c.peer.lastError = m.Cause.Err().Error()
		s.stepLocked(coordinator.ReplicaFailed{Replica: id, Conn: n, Seq: m.Seq, Err: m.Cause.Err()})
	case *wire.Data, *wire.Entries, *wire.Chunks, *wire.Chunk, *wire.Installed, *wire.Error:
		if e, ok := m.(*wire.Error); ok && h.Request == 0 {
			s.logger.Warn("session refused", "replica", id, "error", e.Err())
			c.peer.lastError = e.Err().Error()
			return
		}
		if k := c.calls[h.Request]; k != nil {
			delete(c.calls, h.Request)
			k.reply <- m
			return
		}
		m.Release()
	default:
		s.logger.Warn("message that no writer expects", "replica", id, "message", h.Type)
		m.Release()
		s.closeLater(c)
	}
}

// errSessionOver ends a call whose session ended.
var errSessionOver = errors.New("the session with the replica ended")

// ask sends a request on a session and waits for the answer, which the caller
// releases. An ERROR answer is returned as an error. Not with mu held.
func (s *segment) ask(ctx context.Context, id holdfast.ReplicaID, number coordinator.Conn, m wire.Message) (wire.Message, error) {
	k := &call{reply: make(chan wire.Message, 1)}
	s.mu.Lock()
	c := s.connOf(id, number)
	if c == nil || s.closed {
		s.mu.Unlock()
		m.Release()
		return nil, errSessionOver
	}
	if len(c.calls) >= maxCalls {
		s.mu.Unlock()
		m.Release()
		return nil, holdfast.Errorf(holdfast.ErrUnavailable, "replica %v has %d requests to answer", id, maxCalls)
	}
	c.lastCall++
	number64 := wire.RequestID(c.lastCall | callBit)
	c.calls[number64] = k
	c.send(number64, m)
	s.unlock()
	select {
	case reply := <-k.reply:
		return unwrap(reply)
	case <-c.over:
	case <-ctx.Done():
	}
	s.mu.Lock()
	delete(c.calls, number64)
	s.mu.Unlock()
	select {
	case reply := <-k.reply: // it came in the same moment
		return unwrap(reply)
	default:
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return nil, errSessionOver
}

func unwrap(m wire.Message) (wire.Message, error) {
	if e, ok := m.(*wire.Error); ok {
		return nil, e.Err()
	}
	return m, nil
}
