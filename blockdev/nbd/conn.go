package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"
)

// conn is one connection, from accept to close. Its goroutine (serve) owns it
// and is the only one to read; whoever finishes a request may write (reply.go).
type conn struct {
	s      *Server
	nc     net.Conn
	client Client

	// ctx is what requests get; abort ends it. It is kept here because it lives
	// as long as the connection, and a request belongs to one.
	ctx    context.Context
	cancel context.CancelFunc
	done   chan struct{} // closed when no request is left and nc is closed

	// Set once by the handshake.
	export     *export
	structured bool

	in    stream              // the reader's
	slots *semaphore.Weighted // requests that may still be taken in
	live  sync.WaitGroup      // requests taken in and not answered

	resting    atomic.Bool   // the reader waits for bytes within a request
	marked     atomic.Bool   // marks is not empty
	progress   atomic.Uint64 // counts what the client sent and took
	complained atomic.Bool   // a failed request was logged

	mu          sync.Mutex
	stopping    bool     // no further request is to be read
	readerEnded bool     // none will
	marks       []*mark  // not passed yet
	batch       *batch   // counts the requests being taken in; changed by the reader
	sealed      []*batch // those before it that are not known to be over

	out replies
}

func newConn(ctx context.Context, s *Server, nc net.Conn) *conn {
	c := &conn{
		s:      s,
		nc:     nc,
		client: Client{Name: clientName(nc)},
		done:   make(chan struct{}),
		slots:  semaphore.NewWeighted(int64(s.opts.InFlight)),
		batch:  newBatch(),
	}
	c.ctx, c.cancel = context.WithCancel(ctx)
	return c
}

// serve runs the connection and returns when nothing of it is left.
func (c *conn) serve() {
	log := c.s.opts.Logger
	defer close(c.done)
	defer c.cancel()
	defer c.nc.Close()
	stopWatch := context.AfterFunc(c.ctx, func() { c.nc.Close() })
	defer stopWatch()

	n, err := c.negotiate()
	if c.export != nil {
		defer c.export.leave(c)
	}
	if err != nil {
		if !errors.Is(err, errEnd) && !errors.Is(err, io.EOF) {
			log.Warn("negotiation failed", "client", c.client.Name, "error", err)
		}
		return
	}
	c.structured = n.structured
	log.Info("client connected", "export", c.export.Name, "client", c.client.Name)
	err = c.transmit()
	c.endReading()
	c.live.Wait()
	if err != nil && err != io.EOF && !c.isStopping() {
		log.Warn("client lost", "export", c.export.Name, "client", c.client.Name, "error", err)
		return
	}
	log.Info("client disconnected", "export", c.export.Name, "client", c.client.Name)
}

// endReading passes every mark: no request will be taken in any more.
func (c *conn) endReading() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.readerEnded = true
	c.sealBatch()
	for _, m := range c.marks {
		c.passMark(m)
	}
	c.marks = nil
}

// stop lets the connection read no further request; those in flight finish and
// are answered.
func (c *conn) stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stopping = true
	_ = c.nc.SetReadDeadline(time.Unix(1, 0))
	// A client that takes no replies does not hold up the rest for ever.
	_ = c.nc.SetWriteDeadline(time.Now().Add(c.s.opts.HandshakeTimeout))
}

// abort closes the connection and cancels its requests.
func (c *conn) abort() {
	c.mu.Lock()
	c.stopping = true
	c.mu.Unlock()
	c.cancel()
	c.nc.Close()
}

// holdsReplies reports whether replies wait for the client to take them.
func (c *conn) holdsReplies() bool {
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	return c.out.writing
}

// setDeadlines bounds the next reads and writes, unless the connection is
// stopping: stop's deadlines stay.
func (c *conn) setDeadlines(read, write time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopping {
		return errStopping
	}
	if err := c.nc.SetReadDeadline(read); err != nil {
		return err
	}
	return c.nc.SetWriteDeadline(write)
}

// openEnded takes the handshake's deadline for writing off.
func (c *conn) openEnded() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopping {
		return errStopping
	}
	return c.nc.SetWriteDeadline(noDeadline)
}

func (c *conn) isStopping() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stopping
}

func (c *conn) ended() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.readerEnded
}

// waitsForClient reports whether the connection cannot go on unless its client
// sends the rest of a request or takes replies.
func (c *conn) waitsForClient() bool {
	return c.resting.Load() || c.holdsReplies()
}

// unread returns how many bytes wait in the connection's socket; 0 where that
// cannot be asked, as of a pipe, which holds none.
func unread(nc net.Conn) int64 {
	sc, ok := nc.(syscall.Conn)
	if !ok {
		return 0
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return 0
	}
	n := 0
	_ = raw.Control(func(fd uintptr) {
		n, err = unix.IoctlGetInt(int(fd), unix.SIOCINQ)
	})
	if err != nil {
		return 0
	}
	return int64(n)
}

// clientName names the other end.
func clientName(nc net.Conn) string {
	if uc, ok := nc.(*net.UnixConn); ok {
		if raw, err := uc.SyscallConn(); err == nil {
			var cred *unix.Ucred
			var credErr error
			err = raw.Control(func(fd uintptr) {
				cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
			})
			if err == nil && credErr == nil {
				return fmt.Sprintf("pid %d uid %d", cred.Pid, cred.Uid)
			}
		}
	}
	return nc.RemoteAddr().String()
}
