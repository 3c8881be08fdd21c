package nbd

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"
)

// stallGrace is how long a connection may wait for its client to send the rest
// of a request, or to take replies, while another connection waits for it; then
// it is taken for dead and closed. A client that is alive does both within
// milliseconds.
const stallGrace = 5 * time.Second

// A batch counts the requests that a connection has handed to its device since
// the last time somebody wanted to wait for them. It is over once it is sealed
// and all of them have returned.
type batch struct {
	open atomic.Int64 // requests, plus one until sealed
	over chan struct{}
}

func newBatch() *batch {
	b := &batch{over: make(chan struct{})}
	b.open.Store(1)
	return b
}

// add counts a request. Only the connection's reader calls it, before seal.
func (b *batch) add() { b.open.Add(1) }

// leave is called for each request that returned, and once to seal.
func (b *batch) leave() {
	if b.open.Add(-1) == 0 {
		close(b.over)
	}
}

// A mark is a place in what a connection received. It is passed when all bytes
// before it belong to requests handed to the device (or refused).
type mark struct {
	at     int64         // in bytes since transmission began; -1 until the reader knows
	passed chan struct{} // closed when passed; batches is set then
	// batches are those that were not over when the mark was passed.
	batches []*batch
}

// enter lets the connection into the export's transmission, in the order that
// the package comment promises.
func (n *negotiation) enter(e *export) error {
	c := n.c
	timeout := c.s.opts.EntryTimeout
	ctx, cancel := context.WithTimeout(c.ctx, timeout)
	defer cancel()
	select {
	case e.entry <- struct{}{}:
		defer func() { <-e.entry }()
	case <-ctx.Done():
		return fmt.Errorf("export %q: wait for another connection to enter: %w", e.Name, ctx.Err())
	}

	e.mu.Lock()
	older := make([]*conn, 0, len(e.conns))
	for o := range e.conns {
		older = append(older, o)
	}
	e.mu.Unlock()
	marks := make([]*mark, len(older))
	for i, o := range older {
		marks[i] = o.placeMark()
	}
	for i, o := range older {
		if err := o.waitPassed(ctx, marks[i]); err != nil {
			return fmt.Errorf("export %q: wait for the requests of %s: %w", e.Name, o.client.Name, err)
		}
	}

	// The last options and the wait may have used up the handshake's deadline;
	// what is left of it is writing. Nothing is read any more, and from here on
	// the deadline for reading belongs to marks and stop.
	if err := c.setDeadlines(noDeadline, time.Now().Add(c.s.opts.HandshakeTimeout)); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.removed {
		return fmt.Errorf("export %q was removed", e.Name)
	}
	c.client.Since = time.Now()
	e.conns[c] = struct{}{}
	n.export = e
	c.export = e
	return nil
}

// leave takes an ended connection out of its export.
func (e *export) leave(c *conn) {
	e.mu.Lock()
	delete(e.conns, c)
	e.mu.Unlock()
}

// placeMark asks the connection's reader to mark what has arrived so far.
func (c *conn) placeMark() *mark {
	m := &mark{at: -1, passed: make(chan struct{})}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.readerEnded {
		c.passMark(m)
		return m
	}
	c.marks = append(c.marks, m)
	c.marked.Store(true)
	// Wakes the reader if it waits for bytes; it clears the deadline itself.
	_ = c.nc.SetReadDeadline(time.Unix(1, 0))
	return m
}

// passMark records which requests the mark's owner has to wait for: those of
// all sealed batches. The caller holds c.mu.
func (c *conn) passMark(m *mark) {
	live := c.sealed[:0]
	for _, b := range c.sealed {
		select {
		case <-b.over:
		default:
			live = append(live, b)
		}
	}
	clear(c.sealed[len(live):])
	c.sealed = live
	m.batches = append([]*batch(nil), live...)
	close(m.passed)
}

// settleMarks is called by the reader between two requests, when pos bytes of
// the stream are dealt with. It passes the marks that pos has reached and says
// whether any are left.
func (c *conn) settleMarks(pos int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	left := c.marks[:0]
	for _, m := range c.marks {
		if m.at < 0 || m.at > pos {
			left = append(left, m)
			continue
		}
		c.sealBatch()
		c.passMark(m)
	}
	clear(c.marks[len(left):])
	c.marks = left
	c.marked.Store(len(left) > 0)
}

// fixMarks is called by the reader when a mark's deadline woke it: received
// bytes have been read, and those that wait in the socket had arrived, too.
func (c *conn) fixMarks(received int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	at := received + unread(c.nc) // asked under mu, so after every mark was placed
	for _, m := range c.marks {
		if m.at < 0 {
			m.at = at
		}
	}
	if !c.stopping {
		_ = c.nc.SetReadDeadline(time.Time{})
	}
}

// sealBatch ends the present batch and starts the next. The caller holds c.mu
// and is the reader, or the reader has ended.
func (c *conn) sealBatch() {
	c.sealed = append(c.sealed, c.batch)
	c.batch.leave()
	c.batch = newBatch()
}

// waitPassed waits until the mark is passed and the requests before it have
// returned.
func (c *conn) waitPassed(ctx context.Context, m *mark) error {
	grace := time.NewTicker(stallGrace)
	defer grace.Stop()
	progress := c.progress.Load()
	for waiting := true; waiting; {
		select {
		case <-m.passed:
			waiting = false
		case <-c.done:
			return nil
		case <-grace.C:
			progress = c.abortIfStalled(progress, "another connection enters")
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if c.ended() {
		// Nobody is left to hear of these requests.
		c.cancel()
	}
	for _, b := range m.batches {
		select {
		case <-b.over:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// abortIfStalled closes the connection if it waits for its client and did so
// ever since progress was loaded, at least stallGrace ago. It returns the
// present progress.
func (c *conn) abortIfStalled(progress uint64, reason string) uint64 {
	now := c.progress.Load()
	if now == progress && c.waitsForClient() {
		c.s.opts.Logger.Warn("connection closed: its client stalls while it is waited for",
			"export", c.export.Name, "client", c.client.Name, "reason", reason)
		c.abort()
	}
	return now
}
