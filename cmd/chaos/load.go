package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/cmd/internal/history"
)

// The load: some clients on a hot set of blocks that moves on, so that clients
// meet on blocks and yet no block's history grows too long to be judged.
const (
	// clientsPerSession are connected to one attachment at a time.
	clientsPerSession = 6
	// regionBlocks is 128 KiB, the least that takes the path of large writes.
	regionBlocks = 32
	// hotBlocks of a region get most of the requests.
	hotBlocks = 6
	// think is the longest pause of a client between two requests: about 250
	// requests a second in all.
	think = 40 * time.Millisecond
	// moveEvery is how long one region is hot.
	moveEvery = 15 * time.Second
	// outlive is how long clients stay on a session after another has begun: what
	// they are still answered there is of most interest.
	outlive = 20 * time.Second
)

// load is all sessions and their clients.
type load struct {
	rec    *record
	seed   uint64
	region atomic.Int64  // the one that is hot; those below were
	writer atomic.Uint32 // the last number given to a client
	// found takes what is wrong with the bytes that a client read.
	found func(history.Violation)

	mu       sync.Mutex
	sessions []*session // by epoch
	over     bool       // no client begins any more
}

// session is one attachment with its clients.
type session struct {
	epoch uint64
	node  *node
	quit  chan struct{} // closed: clients end after their present request
	team  sync.WaitGroup

	mu         sync.Mutex
	conns      map[*nbdClient]bool
	superseded time.Time // when a later one began
}

// latest returns the session with the highest epoch, nil before the first.
func (l *load) latest() *session {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.sessions) == 0 {
		return nil
	}
	return l.sessions[len(l.sessions)-1]
}

// wants reports whether clients should connect to an epoch: it is the latest and
// nobody is there.
func (l *load) wants(epoch uint64) bool {
	s := l.latest()
	l.mu.Lock()
	over := l.over
	l.mu.Unlock()
	switch {
	case over, s != nil && s.epoch > epoch:
		return false
	case s == nil || s.epoch < epoch:
		return true
	}
	select {
	case <-s.quit:
		return false
	default:
		return !s.alive()
	}
}

// begin starts clients on an attachment, one call at a time. Confirm is asked
// once they are connected: only if it says that the attachment is that epoch's
// still are their connections of that epoch.
func (l *load) begin(about history.Session, n *node, uri string, confirm func() bool) error {
	epoch := about.Epoch
	if !l.wants(epoch) {
		return nil
	}
	var conns []*nbdClient
	closeAll := func() {
		for _, c := range conns {
			c.close()
		}
	}
	for range clientsPerSession {
		c, err := dialNBD(uri)
		if err != nil {
			closeAll()
			return fmt.Errorf("connect to epoch %d on %s: %w", epoch, n.name, err)
		}
		conns = append(conns, c)
	}
	if !confirm() {
		closeAll()
		return holdfast.Errorf(holdfast.ErrUnavailable, "epoch %d on %s ended while clients connected", epoch, n.name)
	}
	s := l.latest()
	if s == nil || s.epoch < epoch {
		s = &session{epoch: epoch, node: n, quit: make(chan struct{}), conns: map[*nbdClient]bool{}}
		about.Ready = l.rec.clock.now()
		l.rec.addSession(about)
		l.add(s)
	}
	for _, c := range conns {
		s.mu.Lock()
		s.conns[c] = true
		s.mu.Unlock()
		number := l.writer.Add(1)
		s.team.Go(func() {
			l.client(s, c, number)
			s.mu.Lock()
			delete(s.conns, c)
			s.mu.Unlock()
			c.close()
		})
	}
	return nil
}

func (l *load) add(s *session) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, old := range l.sessions {
		old.mu.Lock()
		if old.superseded.IsZero() {
			old.superseded = time.Now()
		}
		old.mu.Unlock()
	}
	l.sessions = append(l.sessions, s)
}

// alive reports whether any client is connected.
func (s *session) alive() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns) > 0
}

// prune ends what is left of sessions that were superseded long ago.
func (l *load) prune() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.sessions {
		s.mu.Lock()
		old := !s.superseded.IsZero() && time.Since(s.superseded) > outlive
		s.mu.Unlock()
		if old {
			s.cut()
		}
	}
}

// cut closes the connections, under requests that wait; the clients end.
func (s *session) cut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		c.close()
	}
}

// stop lets every client end after its present request; those that get no answer
// in time are cut, which is an error.
func (s *session) stop(limit time.Duration) error {
	close(s.quit)
	done := make(chan struct{})
	go func() { s.team.Wait(); close(done) }()
	select {
	case <-done:
		return nil
	case <-time.After(limit):
	}
	s.cut()
	<-done
	return holdfast.Errorf(holdfast.ErrTimeout, "clients of epoch %d on %s had no answer for %v", s.epoch, s.node.name, limit)
}

// finish ends all clients, those of the latest session in order.
func (l *load) finish(limit time.Duration) error {
	l.mu.Lock()
	l.over = true
	sessions := l.sessions
	l.mu.Unlock()
	for i, s := range sessions {
		if i < len(sessions)-1 {
			s.cut()
			s.team.Wait()
		}
	}
	if len(sessions) == 0 {
		return nil
	}
	return sessions[len(sessions)-1].stop(limit)
}

// moves makes another region hot from time to time.
func (l *load) moves(ctx context.Context) {
	tick := time.NewTicker(moveEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if l.region.Load() < volumeBlocks/regionBlocks-1 {
				l.region.Add(1)
			}
		case <-ctx.Done():
			return
		}
	}
}

// client works on one connection until it breaks or is told to end.
func (l *load) client(s *session, c *nbdClient, number uint32) {
	rng := rand.New(rand.NewPCG(l.seed, uint64(number)))
	w := worker{load: l, session: s, conn: c, number: number}
	for {
		select {
		case <-s.quit:
			return
		case <-time.After(time.Duration(rng.Int64N(int64(think)))):
		}
		if err := w.request(rng); err != nil {
			var answer nbdError
			l.rec.unanswered(errors.As(err, &answer))
			return
		}
	}
}

// worker is a client at work.
type worker struct {
	load    *load
	session *session
	conn    *nbdClient
	number  uint32
	counter uint32
	buf     [regionBlocks * holdfast.BlockSize]byte
}

// request draws a request, sends it and waits for its answer.
func (w *worker) request(rng *rand.Rand) error {
	region := w.load.region.Load()
	if rng.IntN(20) == 0 {
		region = rng.Int64N(region + 1) // what was written long ago must be there still
	}
	first, blocks := region*regionBlocks, int64(1)
	draw := rng.IntN(100)
	if draw >= 92 && draw < 97 { // the whole region, one large request
		blocks = regionBlocks
	} else if rng.IntN(4) > 0 {
		first += rng.Int64N(hotBlocks)
	} else {
		first += rng.Int64N(regionBlocks)
	}
	switch {
	case draw < 45, draw >= 95 && draw < 97:
		return w.read(first, blocks)
	case draw < 95:
		return w.write(first, blocks, rng.IntN(10) == 0)
	}
	return w.flush()
}

func (w *worker) op(kind history.Kind, first int64) history.Op {
	return history.Op{Client: int(w.number), Epoch: w.session.epoch, Kind: kind, Block: first}
}

func (w *worker) read(first, blocks int64) error {
	at := w.load.rec.begin(w.op(history.Read, first), int(blocks))
	p := w.buf[:blocks*holdfast.BlockSize]
	if err := w.conn.read(p, first*holdfast.BlockSize); err != nil {
		return err
	}
	values := make([]history.Value, blocks)
	for i := range values {
		v, err := history.Parse(p[i*holdfast.BlockSize:], first+int64(i))
		if err != nil {
			w.load.found(history.Violation{Rule: "C6", Block: first + int64(i), What: fmt.Sprintf("client %d, epoch %d on node %s: %v", w.number, w.session.epoch, w.session.node.name, err)})
		}
		values[i] = v
	}
	w.load.rec.end(at, int(blocks), values)
	return nil
}

func (w *worker) write(first, blocks int64, fua bool) error {
	w.counter++
	op := w.op(history.Write, first)
	op.Value, op.FUA = history.NewValue(w.number, w.counter), fua
	p := w.buf[:blocks*holdfast.BlockSize]
	for i := range blocks {
		history.Fill(p[i*holdfast.BlockSize:], first+i, op.Value)
	}
	at := w.load.rec.begin(op, int(blocks))
	if err := w.conn.write(p, first*holdfast.BlockSize, fua); err != nil {
		return err
	}
	w.load.rec.end(at, int(blocks), nil)
	return nil
}

func (w *worker) flush() error {
	at := w.load.rec.begin(w.op(history.Flush, 0), 1)
	if err := w.conn.flush(); err != nil {
		return err
	}
	w.load.rec.end(at, 1, nil)
	return nil
}
