package hostdev

import (
	"context"
	"errors"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev"
)

const (
	minReaders = 2
	// maxReaders bounds the threads per device: more gave nothing when measured.
	maxReaders = 8
	// errorLogEvery bounds the log lines of a device whose every request fails.
	errorLogEvery = 10 * time.Second
)

// Options of Serve; the zero value is usable.
type Options struct {
	// Logger gets state changes and failed requests; nil discards them.
	Logger *slog.Logger
	// Readers is the number of threads that take requests, 2 to 8; zero means
	// one per processor within these bounds.
	Readers int
	// Resend asks the kernel to repeat what a dead server had read and not
	// answered. Set it when taking over, and only after the old server is
	// proven dead and its writes are fenced.
	Resend bool
}

func (o Options) withDefaults() Options {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Readers == 0 {
		o.Readers = runtime.NumCPU()
	}
	o.Readers = min(max(o.Readers, minReaders), maxReaders)
	return o
}

// Server answers the requests of one FUSE connection from a Device.
type Server struct {
	dev   blockdev.Device
	fd    int // /dev/fuse, non-blocking
	log   *slog.Logger
	small *slabs
	large *slabs

	ctx    context.Context // of the requests in flight; not of the readers
	cancel context.CancelFunc
	stop   chan struct{} // closed when readers are to end
	wake   int           // an eventfd that gets the readers out of epoll_wait

	stopOnce sync.Once
	readers  sync.WaitGroup
	inFlight sync.WaitGroup
	ended    chan struct{} // closed when no reader runs any more
	closed   chan struct{} // closed when Close is done
	closeOne sync.Once

	counts  counters
	lastLog atomic.Int64

	mu  sync.Mutex
	err error // why the readers ended, if not by Close or by the end of the connection
}

// Stats counts the requests that reached the Device.
type Stats struct {
	Reads, Writes, Flushes, Trims, Zeroes, Errors uint64
}

type counters struct {
	reads, writes, flushes, trims, zeroes, errors atomic.Uint64
}

// Serve answers the requests that arrive on fd, a /dev/fuse descriptor whose
// INIT is done with the given Params, from dev. The server owns fd from here
// on, also when Serve fails, and closes only this duplicate.
//
// It stops by itself when the connection ends (unmounted or aborted; see Done)
// and by Close. Close the Server before the Device behind it: an error of a
// closing Device would otherwise reach an application that the next server
// could still have served.
func Serve(dev blockdev.Device, fd int, params Params, opts Options) (*Server, error) {
	opts = opts.withDefaults()
	s := &Server{
		dev: dev, fd: fd, log: opts.Logger,
		small:  newSlabs(smallPayload, maxSmallSlabs),
		large:  newSlabs(largePayload, maxLargeSlabs+opts.Readers),
		stop:   make(chan struct{}),
		ended:  make(chan struct{}),
		closed: make(chan struct{}),
		wake:   -1,
	}
	if err := s.start(params, opts); err != nil {
		if s.wake >= 0 {
			_ = unix.Close(s.wake)
		}
		s.small.close()
		s.large.close()
		_ = unix.Close(fd)
		return nil, err
	}
	return s, nil
}

func (s *Server) start(params Params, opts Options) error {
	if params.MaxWrite > maxWrite {
		return holdfast.Errorf(holdfast.ErrUnsupported, "the connection has requests of %d bytes, this server takes %d", params.MaxWrite, maxWrite)
	}
	if err := errors.Join(s.small.fill(readySmall), s.large.fill(opts.Readers+readyLarge)); err != nil {
		return err
	}
	// The flag belongs to the open file, which every duplicate shares.
	if err := unix.SetNonblock(s.fd, true); err != nil {
		return holdfast.Errorf(holdfast.ErrInternal, "make the FUSE descriptor non-blocking: %w", err)
	}
	var err error
	if s.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return holdfast.Errorf(holdfast.ErrInternal, "make an eventfd: %w", err)
	}
	polls := make([]int, 0, opts.Readers)
	for range opts.Readers {
		p, err := newPoll(s.fd, s.wake)
		if err != nil {
			for _, p := range polls {
				_ = unix.Close(p)
			}
			return err
		}
		polls = append(polls, p)
	}
	if opts.Resend {
		if err := Resend(s.fd, params); err != nil {
			for _, p := range polls {
				_ = unix.Close(p)
			}
			return err
		}
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	for _, p := range polls {
		s.readers.Add(1)
		go s.read(p)
	}
	go func() { // ends with the readers, which Close waits for
		s.readers.Wait()
		close(s.ended)
	}()
	return nil
}

// newPoll makes a reader's epoll: the FUSE descriptor, of whose waiters one is
// woken per request, and the eventfd, which wakes all.
func newPoll(fuse, wake int) (int, error) {
	p, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return -1, holdfast.Errorf(holdfast.ErrInternal, "make an epoll descriptor: %w", err)
	}
	add := func(fd int, events uint32) error {
		return unix.EpollCtl(p, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: events, Fd: int32(fd)})
	}
	if err := errors.Join(add(fuse, unix.EPOLLIN|unix.EPOLLEXCLUSIVE), add(wake, unix.EPOLLIN)); err != nil {
		_ = unix.Close(p)
		return -1, holdfast.Errorf(holdfast.ErrInternal, "watch the FUSE descriptor: %w", err)
	}
	return p, nil
}

// Done is closed when no request is read any more: the connection ended, or
// Close was called, or reading failed (see Err).
func (s *Server) Done() <-chan struct{} { return s.ended }

// Err says why reading failed; nil after Close and after a regular end of the
// connection.
func (s *Server) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// Stats returns the counts since Serve.
func (s *Server) Stats() Stats {
	c := &s.counts
	return Stats{Reads: c.reads.Load(), Writes: c.writes.Load(), Flushes: c.flushes.Load(),
		Trims: c.trims.Load(), Zeroes: c.zeroes.Load(), Errors: c.errors.Load()}
}

// MemoryLocked says whether all request memory could be locked. Where not, a
// kill at the wrong moment may show an application an I/O error.
func (s *Server) MemoryLocked() bool { return !s.small.anyUnlocked() && !s.large.anyUnlocked() }

// Close stops reading, waits for the requests in flight until ctx ends, then
// cancels the rest and leaves them unanswered: they stay with the kernel for
// the next server. It returns when every goroutine has ended and the
// descriptor is closed; the connection itself lives on while another process
// holds it. Close may be called more than once.
func (s *Server) Close(ctx context.Context) {
	s.closeOne.Do(func() {
		defer close(s.closed)
		s.halt(nil)
		<-s.ended
		idle := make(chan struct{})
		go func() { // ends when the requests do, and Close waits for that below
			s.inFlight.Wait()
			close(idle)
		}()
		select {
		case <-idle:
		case <-ctx.Done():
		}
		s.cancel()
		<-idle
		s.small.close()
		s.large.close()
		_ = unix.Close(s.fd)
		_ = unix.Close(s.wake)
	})
	<-s.closed
}

// halt ends the readers.
func (s *Server) halt(err error) {
	s.stopOnce.Do(func() {
		s.mu.Lock()
		s.err = err
		s.mu.Unlock()
		close(s.stop)
		one := []byte{1, 0, 0, 0, 0, 0, 0, 0}
		_, _ = unix.Write(s.wake, one)
	})
}

// read is one reader: it takes requests until the connection or the server ends.
func (s *Server) read(poll int) {
	defer s.readers.Done()
	defer unix.Close(poll)
	var landing *slab
	for {
		if landing == nil {
			var err error
			if landing, err = s.large.get(s.stop); landing == nil {
				s.halt(err)
				return
			}
		}
		n, err := s.next(poll, landing)
		if err == nil {
			landing, err = s.dispatch(landing, n)
		}
		if errors.Is(err, errEnd) {
			err = nil
		} else if err == nil {
			continue
		}
		if landing != nil {
			landing.free()
		}
		s.halt(err)
		return
	}
}

// errEnd is the regular end of a reader.
var errEnd = errors.New("end")

// next reads one request into the slab.
func (s *Server) next(poll int, into *slab) (int, error) {
	events := make([]unix.EpollEvent, 2)
	for {
		select {
		case <-s.stop:
			return 0, errEnd
		default:
		}
		n, err := unix.Read(s.fd, into.request())
		switch {
		case err == nil:
			return n, nil
		case errors.Is(err, unix.EAGAIN):
			if _, err := unix.EpollWait(poll, events, -1); err != nil && !errors.Is(err, unix.EINTR) {
				return 0, holdfast.Errorf(holdfast.ErrInternal, "wait for a FUSE request: %w", err)
			}
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.ENOENT):
			// ENOENT: the request was withdrawn while it was being copied.
		case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ECONNABORTED):
			return 0, errEnd // unmounted, or aborted
		default:
			return 0, holdfast.Errorf(holdfast.ErrInternal, "read a FUSE request: %w", err)
		}
	}
}

// dispatch starts the request of n bytes that lies in landing. It returns
// landing if that may be read into again, else nil.
func (s *Server) dispatch(landing *slab, n int) (*slab, error) {
	h, err := parseInHeader(landing.request()[:n])
	if err != nil {
		return landing, err
	}
	switch h.Op {
	case opForget, opBatchForget, opInterrupt, opDestroy:
		return landing, nil // these have no reply; nothing is kept per inode or handle
	}
	work, next := landing, (*slab)(nil)
	if pool := s.poolFor(h, landing, n); pool != nil {
		if work, err = pool.get(s.stop); work == nil {
			if err == nil {
				err = errEnd // stopping: the kernel keeps the request for the next server
			}
			return landing, err
		}
		next = landing
		from := landing.request()[:min(n, requestHead+smallPayload)]
		if h.Op != opWrite {
			from = from[:min(n, requestHead)]
		}
		copy(work.request(), from)
	}
	s.inFlight.Add(1)
	go func() {
		defer s.inFlight.Done()
		s.answer(h, work, n)
		work.free()
	}()
	return next, nil
}

// poolFor says which pool a request's own slab comes from; nil means that it
// keeps the one it was read into.
func (s *Server) poolFor(h inHeader, landing *slab, n int) *slabs {
	switch h.Op {
	case opWrite:
		if n > requestHead+smallPayload {
			return nil
		}
	case opRead:
		if in, ok := parseIOIn(landing.head()[inHeaderSize:]); ok && in.Size > smallPayload {
			return s.large
		}
	}
	return s.small
}
