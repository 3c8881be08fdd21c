package wire

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/holdfast-storage/holdfast"
)

// Received is one frame that a link hands on.
type Received struct {
	Header  Header
	Message Message // the handler's to release
}

// Handler takes what arrives on a link, in order, one call at a time. The last
// call has no frames and the error that ended the link: io.EOF if the other
// end closed it between two frames, net.ErrClosed if this end did. A handler
// must not wait for the other end.
type Handler func(batch []Received, err error)

// Link is one end of a session: a TCP connection, or a pipe within the process.
// All methods may be called concurrently.
type Link interface {
	// Start begins to hand what arrives to h. Called once.
	Start(h Handler)
	// Send queues a message; it never waits. The link releases the message
	// once it was sent, or could not be. Messages go out in the order of the
	// calls.
	Send(epoch holdfast.Epoch, request RequestID, m Message)
	// Flush sends what is queued. A Send without a later Flush may wait for
	// ever. It may call the handler of the other end of a pipe, so it must not
	// be called with locks held that handlers take.
	Flush()
	// Close ends the link after what was flushed before, or at once if the
	// other end takes nothing. The handler still gets its last call. Close does
	// not wait; Wait does.
	Close()
	// Wait returns when the link's goroutines have ended and the handler had
	// its last call. Only after Close or a last call; not from a handler.
	Wait()
	// Remote says who the other end is, for logs.
	Remote() string
}

// Bounds of a link.
const (
	// MaxQueued bounds the bytes that wait to be sent. W bounds what it asks
	// for far below; an end that does not take this much is broken, and the
	// link ends.
	MaxQueued = 64 << 20
	// MaxBatch bounds the frames handed on in one call: enough to share one
	// write to the log, few enough to answer early.
	MaxBatch = 64
	// handshakeTime bounds HELLO and WELCOME together.
	handshakeTime = 5 * time.Second
	// closeTime bounds how long Close waits for queued frames to leave.
	closeTime = time.Second
)

// NewNonce draws a connection's nonce.
func NewNonce() Nonce {
	var b [8]byte
	rand.Read(b[:]) //nolint:errcheck // never returns an error (crypto/rand, since Go 1.24)
	return Nonce(binary.BigEndian.Uint64(b[:]))
}

// Conn is a Link over a network connection.
type Conn struct {
	c     net.Conn
	in    *Reader
	nonce Nonce
	ended sync.WaitGroup

	mu     sync.Mutex
	queue  []outgoing
	bytes  int
	closed bool          // no more Sends; the writer ends when the queue is empty
	began  bool          // Start was called
	wake   chan struct{} // capacity 1: the queue may have something to send
}

type outgoing struct {
	epoch   holdfast.Epoch
	request RequestID
	m       Message
	size    int
}

func newConn(c net.Conn, in *Reader, nonce Nonce) *Conn {
	if t, ok := c.(*net.TCPConn); ok {
		// Small buffers keep data in cache (measured: 256 KiB 1.0 us per 4 KiB
		// block, 4 MiB 3.0 us); refusal leaves the system's default.
		_ = t.SetReadBuffer(256 << 10)
		_ = t.SetWriteBuffer(256 << 10)
		_ = t.SetNoDelay(true)
	}
	return &Conn{c: c, in: in, nonce: nonce, wake: make(chan struct{}, 1)}
}

// Connect says HELLO on a fresh connection and returns the link once WELCOME came.
// The connection belongs to the link, and is closed on error. An ERROR from the
// other end is returned as it was meant there.
func Connect(ctx context.Context, c net.Conn, epoch holdfast.Epoch, hello *Hello) (*Conn, *Welcome, error) {
	deadline := time.Now().Add(handshakeTime)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	nonce := NewNonce()
	welcome, in, err := greet(c, deadline, epoch, nonce, hello)
	if err != nil {
		_ = c.Close()
		return nil, nil, fmt.Errorf("open session with %v: %w", c.RemoteAddr(), err)
	}
	if !stop() && ctx.Err() != nil {
		_ = c.Close()
		return nil, nil, ctx.Err()
	}
	return newConn(c, in, nonce), welcome, nil
}

func greet(c net.Conn, deadline time.Time, epoch holdfast.Epoch, nonce Nonce, hello *Hello) (*Welcome, *Reader, error) {
	if err := c.SetDeadline(deadline); err != nil {
		return nil, nil, err
	}
	f, err := AppendFrame(nil, epoch, nonce, 0, hello)
	if err != nil {
		return nil, nil, err
	}
	if _, err := c.Write(f.Head); err != nil {
		return nil, nil, err
	}
	in := NewReader(c)
	in.Bind(nonce)
	_, m, err := in.Next()
	if err != nil {
		return nil, nil, err
	}
	switch m := m.(type) {
	case *Welcome:
		if m.Node != hello.To {
			return nil, nil, holdfast.Errorf(holdfast.ErrRefused, "node %v answered, not %v", m.Node, hello.To)
		}
		return m, in, c.SetDeadline(time.Time{})
	case *Error:
		return nil, nil, m.Err()
	default:
		m.Release()
		return nil, nil, holdfast.Errorf(holdfast.ErrInvalid, "%v instead of WELCOME", m.Type())
	}
}

// Accept reads HELLO from a fresh connection. The caller answers with Welcome
// or Refuse. The connection belongs to the link, and is closed on error.
func Accept(c net.Conn) (*Conn, holdfast.Epoch, *Hello, error) {
	in := NewReader(c)
	if err := c.SetDeadline(time.Now().Add(handshakeTime)); err != nil {
		_ = c.Close()
		return nil, 0, nil, err
	}
	h, m, err := in.Next()
	if err != nil {
		_ = c.Close()
		return nil, 0, nil, err
	}
	hello, ok := m.(*Hello)
	if !ok {
		m.Release()
		_ = c.Close()
		return nil, 0, nil, holdfast.Errorf(holdfast.ErrInvalid, "%v instead of HELLO", h.Type)
	}
	in.Bind(h.Nonce)
	return newConn(c, in, h.Nonce), h.Epoch, hello, nil
}

// Welcome answers HELLO; Start may follow.
func (l *Conn) Welcome(epoch holdfast.Epoch, w *Welcome) error {
	if err := l.answer(epoch, w); err != nil {
		_ = l.c.Close()
		return err
	}
	return l.c.SetDeadline(time.Time{})
}

// Refuse answers HELLO with an error and closes the connection.
func (l *Conn) Refuse(epoch holdfast.Epoch, err error) {
	_ = l.answer(epoch, ErrorOf(err)) // the close says the same
	_ = l.c.Close()
}

func (l *Conn) answer(epoch holdfast.Epoch, m Message) error {
	f, err := AppendFrame(nil, epoch, l.nonce, 0, m)
	if err != nil {
		return err
	}
	_, err = l.c.Write(f.Head)
	return err
}

// Remote implements Link.
func (l *Conn) Remote() string { return l.c.RemoteAddr().String() }

// Start implements Link.
func (l *Conn) Start(h Handler) {
	l.mu.Lock()
	l.began = true
	l.mu.Unlock()
	l.ended.Add(2)
	go l.write()
	go l.read(h)
}

// Wait implements Link.
func (l *Conn) Wait() { l.ended.Wait() }

func (l *Conn) read(h Handler) {
	defer l.ended.Done()
	batch := make([]Received, 0, MaxBatch)
	for {
		header, m, err := l.in.Next()
		if err != nil {
			if len(batch) > 0 {
				h(batch, nil)
			}
			l.shut()
			if errors.Is(err, net.ErrClosed) {
				err = net.ErrClosed
			}
			h(nil, err)
			return
		}
		batch = append(batch, Received{header, m})
		if len(batch) == MaxBatch || !l.in.Ready() {
			h(batch, nil)
			batch = batch[:0]
		}
	}
}

// Send implements Link.
func (l *Conn) Send(epoch holdfast.Epoch, request RequestID, m Message) {
	size := HeaderSize
	for _, p := range m.payload(nil) {
		size += len(p)
	}
	l.mu.Lock()
	refused := l.closed || l.bytes+size > MaxQueued
	overflow := refused && !l.closed
	if !refused {
		l.queue = append(l.queue, outgoing{epoch, request, m, size})
		l.bytes += size
	}
	l.mu.Unlock()
	if refused {
		m.Release()
	}
	if overflow {
		l.shut()
	}
}

// Flush implements Link.
func (l *Conn) Flush() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// Close implements Link.
func (l *Conn) Close() {
	l.mu.Lock()
	l.closed = true
	began := l.began
	l.mu.Unlock()
	if !began {
		_ = l.c.Close()
		return
	}
	_ = l.c.SetWriteDeadline(time.Now().Add(closeTime))
	l.Flush()
}

// shut ends the link at once.
func (l *Conn) shut() {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	_ = l.c.Close()
	l.Flush()
}

// write sends what is queued, everything that is there in one writev.
func (l *Conn) write() {
	defer l.ended.Done()
	var (
		batch []outgoing
		head  []byte
		bufs  net.Buffers
		ends  []int
	)
	for range l.wake {
		l.mu.Lock()
		batch, l.queue = l.queue, batch[:0]
		l.bytes = 0
		closed := l.closed
		l.mu.Unlock()
		if len(batch) > 0 {
			var err error
			head, ends, bufs, err = l.frames(batch, head[:0], ends[:0], bufs[:0])
			if err == nil {
				_, err = (&bufs).WriteTo(l.c)
			}
			for i := range batch {
				batch[i].m.Release()
				batch[i] = outgoing{}
			}
			if err != nil {
				closed = true
			}
		}
		if closed {
			break
		}
	}
	_ = l.c.Close()
	l.mu.Lock()
	l.closed = true
	for _, o := range l.queue {
		o.m.Release()
	}
	l.queue = nil
	l.mu.Unlock()
}

// frames encodes a batch. Heads lie in one slice, which may move while it
// grows, so the buffers are cut from it at the end.
func (l *Conn) frames(batch []outgoing, head []byte, ends []int, bufs net.Buffers) ([]byte, []int, net.Buffers, error) {
	for _, o := range batch {
		f, err := AppendFrame(head, o.epoch, l.nonce, o.request, o.m)
		if err != nil {
			return head, ends, bufs, err
		}
		head = f.Head
		ends = append(ends, len(head))
	}
	start := 0
	for i, o := range batch {
		payload := o.m.payload(nil)
		if len(payload) == 0 && i+1 < len(batch) {
			continue // its head goes with the next one's
		}
		bufs = append(bufs, head[start:ends[i]])
		bufs = append(bufs, payload...)
		start = ends[i]
	}
	return head, ends, bufs, nil
}

// end is one end of a pipe. What is sent at one end is handed to the handler
// of the other by whoever flushes: no goroutine stands between.
type end struct {
	name  string
	other *end

	mu       sync.Mutex
	inbox    []Received // sent by the other end
	spare    []Received
	handler  Handler
	draining bool // somebody hands the inbox on
	closed   bool // by either end
	cause    error
	ended    bool // the last call was made
	done     chan struct{}
	helpers  sync.WaitGroup
}

// Pipe returns the two ends of a link within the process.
func Pipe(name string) (Link, Link) {
	a := &end{name: name, done: make(chan struct{})}
	b := &end{name: name, done: make(chan struct{})}
	a.other, b.other = b, a
	return a, b
}

// Remote implements Link.
func (e *end) Remote() string { return e.name }

// Start implements Link.
func (e *end) Start(h Handler) {
	e.mu.Lock()
	e.handler = h
	e.mu.Unlock()
	e.drain()
}

// Send implements Link.
func (e *end) Send(epoch holdfast.Epoch, request RequestID, m Message) {
	o := e.other
	o.mu.Lock()
	refused := o.closed
	if !refused {
		o.inbox = append(o.inbox, Received{Header{Type: m.Type(), Epoch: epoch, Request: request}, m})
	}
	o.mu.Unlock()
	if refused {
		m.Release()
	}
}

// Flush implements Link.
func (e *end) Flush() { e.other.drain() }

// Close implements Link.
func (e *end) Close() {
	e.shut(net.ErrClosed)
	e.other.shut(io.EOF)
	e.drain()
	e.other.drain()
}

func (e *end) shut(cause error) {
	e.mu.Lock()
	if !e.closed {
		e.closed, e.cause = true, cause
	}
	e.mu.Unlock()
}

// Wait implements Link.
func (e *end) Wait() {
	<-e.done
	e.helpers.Wait()
}

// maxDrain bounds the rounds that a caller of Flush hands on for others, too,
// before a goroutine of its own does.
const maxDrain = 32

// drain hands the inbox to the handler until it is empty, unless somebody
// already does: that one then finds what was added.
func (e *end) drain() { e.handOn(maxDrain) }

func (e *end) handOn(rounds int) {
	e.mu.Lock()
	for !e.draining && e.handler != nil && !e.ended && (len(e.inbox) > 0 || e.closed) {
		if rounds == 0 {
			e.helpers.Go(func() { e.handOn(-1) })
			break
		}
		rounds--
		batch, cause := e.inbox, error(nil)
		if len(batch) == 0 {
			cause = e.cause
			e.ended = true
		}
		e.inbox, e.spare = e.spare[:0], nil
		e.draining = true
		e.mu.Unlock()
		for from := 0; from < len(batch); from += MaxBatch {
			e.handler(batch[from:min(from+MaxBatch, len(batch))], nil)
		}
		if cause != nil {
			e.handler(nil, cause)
			close(e.done)
		}
		clear(batch)
		e.mu.Lock()
		e.spare = batch
		e.draining = false
	}
	e.mu.Unlock()
}
