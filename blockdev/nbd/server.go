package nbd

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/holdfast-storage/holdfast"
	"golang.org/x/sync/semaphore"
)

// Options configure a Server. The zero value is usable.
type Options struct {
	// Logger takes connections coming, going and breaking the protocol; nil
	// discards.
	Logger *slog.Logger
	// InFlight bounds the requests of one connection that are not answered
	// yet; the connection is not read beyond. 0 means 256: twice the deepest
	// queue that clients use.
	InFlight int
	// PayloadBytes bounds the memory for payloads of all connections
	// together; at least the largest request, 32 MiB. 0 means 64 MiB.
	PayloadBytes int64
	// Connections bounds the connections of all exports together, those that
	// negotiate included; further ones are closed at once. 0 means 1024.
	Connections int
	// HandshakeTimeout bounds the negotiation. 0 means 10 s.
	HandshakeTimeout time.Duration
	// EntryTimeout bounds how long a connection that negotiated waits for the
	// requests of older connections (see the package comment) before it is
	// closed. 0 means 30 s.
	EntryTimeout time.Duration
}

// Validate reports options that can never work.
func (o Options) Validate() error {
	switch {
	case o.InFlight < 0:
		return holdfast.Errorf(holdfast.ErrInvalid, "%d requests in flight is negative", o.InFlight)
	case o.PayloadBytes < 0 || o.PayloadBytes > 0 && o.PayloadBytes < maxPayload:
		return holdfast.Errorf(holdfast.ErrInvalid, "%d bytes for payloads is less than the largest request, %d", o.PayloadBytes, maxPayload)
	case o.Connections < 0:
		return holdfast.Errorf(holdfast.ErrInvalid, "%d connections is negative", o.Connections)
	case o.HandshakeTimeout < 0 || o.EntryTimeout < 0:
		return holdfast.Errorf(holdfast.ErrInvalid, "timeouts of %v and %v: negative", o.HandshakeTimeout, o.EntryTimeout)
	}
	return nil
}

func (o Options) withDefaults() Options {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.InFlight == 0 {
		o.InFlight = 256
	}
	if o.PayloadBytes == 0 {
		o.PayloadBytes = 64 << 20
	}
	if o.Connections == 0 {
		o.Connections = 1024
	}
	if o.HandshakeTimeout == 0 {
		o.HandshakeTimeout = 10 * time.Second
	}
	if o.EntryTimeout == 0 {
		o.EntryTimeout = 30 * time.Second
	}
	return o
}

// Server serves any number of exports on any number of listeners. Its methods
// may be called concurrently.
type Server struct {
	opts    Options
	buffers bufferPool
	payload *semaphore.Weighted // bytes of payload in memory, of opts.PayloadBytes
	ops     opPool
	workers workers

	mu        sync.Mutex
	closed    bool
	exports   map[string]*export
	listeners map[net.Listener]struct{}
	conns     map[*conn]struct{}
	running   sync.WaitGroup // one for each connection and each Serve; added to under mu, never once closed
}

// NewServer returns a server without exports; it listens nowhere until Serve.
func NewServer(opts Options) (*Server, error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	opts = opts.withDefaults()
	return &Server{
		opts:      opts,
		payload:   semaphore.NewWeighted(opts.PayloadBytes),
		exports:   make(map[string]*export),
		listeners: make(map[net.Listener]struct{}),
		conns:     make(map[*conn]struct{}),
	}, nil
}

// errClosed is what a closed server answers.
func errClosed() error {
	return holdfast.Errorf(holdfast.ErrUnavailable, "the NBD server is closed")
}

// acceptPause is how long Serve rests after a failed Accept (out of file
// descriptors, most likely), so that it neither gives up nor spins.
const acceptPause = 50 * time.Millisecond

// Serve accepts connections on l until Close or Shutdown, then returns nil, or
// until l is closed by someone else, then returns an error. It closes l. Devices
// get contexts derived from ctx; when ctx ends, accepting stops and connections
// are closed as by Close.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		l.Close()
		return errClosed()
	}
	s.listeners[l] = struct{}{}
	s.running.Add(1)
	s.mu.Unlock()
	defer s.running.Done()
	defer l.Close()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	for {
		nc, err := l.Accept()
		if err == nil {
			s.ServeConn(ctx, nc)
			continue
		}
		if s.isClosed() || ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, net.ErrClosed) {
			return holdfast.Errorf(holdfast.ErrUnavailable, "accept NBD connections on %v: %w", l.Addr(), err)
		}
		s.opts.Logger.Error("accept failed", "address", l.Addr().String(), "error", err)
		time.Sleep(acceptPause)
	}
}

// ServeConn serves one connection in the background and closes it in the end.
// ctx is as for Serve.
func (s *Server) ServeConn(ctx context.Context, nc net.Conn) {
	c := newConn(ctx, s, nc)
	s.mu.Lock()
	refused := s.closed || len(s.conns) >= s.opts.Connections
	if !refused {
		s.conns[c] = struct{}{}
		s.running.Add(1)
	}
	s.mu.Unlock()
	if refused {
		s.opts.Logger.Warn("connection refused", "client", c.client.Name, "limit", s.opts.Connections)
		nc.Close()
		return
	}
	go func() {
		defer s.running.Done()
		c.serve()
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
	}()
}

// Shutdown stops accepting and reading, lets the requests in flight finish and
// be answered, and closes the connections; a client that can reconnect sends
// the rest of its requests again elsewhere or later. When ctx ends first, what
// is left is ended as by Close, and ctx's error is returned. The exports'
// devices are not flushed and not closed.
func (s *Server) Shutdown(ctx context.Context) error {
	for _, c := range s.beginClose() {
		c.stop()
	}
	done := make(chan struct{})
	go func() {
		s.running.Wait()
		close(done)
	}()
	select {
	case <-done:
		s.workers.close()
		return nil
	case <-ctx.Done():
		s.Close()
		<-done
		return holdfast.Errorf(holdfast.ErrTimeout, "finish the requests in flight: %w", ctx.Err())
	}
}

// Close closes every listener and connection, cancels the requests in flight
// and waits until each has returned from its device. It is idempotent.
func (s *Server) Close() error {
	for _, c := range s.beginClose() {
		c.abort()
	}
	s.running.Wait()
	s.workers.close()
	return nil
}

// beginClose closes the listeners and returns the connections to end.
func (s *Server) beginClose() []*conn {
	s.mu.Lock()
	s.closed = true
	listeners, conns := s.listeners, make([]*conn, 0, len(s.conns))
	s.listeners = nil
	for c := range s.conns {
		conns = append(conns, c)
	}
	s.mu.Unlock()
	for l := range listeners {
		l.Close()
	}
	return conns
}

func (s *Server) isClosed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}

// acquirePayload takes n bytes of the budget. When that takes long, clients
// that hold memory and take no replies lose their connection: one that was
// stopped shall not stop the others.
func (s *Server) acquirePayload(ctx context.Context, n int64) error {
	if s.payload.TryAcquire(n) {
		return nil
	}
	for {
		before := make(map[*conn]uint64)
		s.mu.Lock()
		for c := range s.conns {
			before[c] = c.progress.Load()
		}
		s.mu.Unlock()
		limited, cancel := context.WithTimeout(ctx, stallGrace)
		err := s.payload.Acquire(limited, n)
		cancel()
		if err == nil || ctx.Err() != nil {
			return err
		}
		for c, progress := range before {
			if c.holdsReplies() {
				c.abortIfStalled(progress, "memory is short")
			}
		}
	}
}
