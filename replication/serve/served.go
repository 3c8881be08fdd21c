package serve

import (
	"context"
	"errors"
	"log/slog"
	"runtime/debug"
	"sync"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/disk"
	"github.com/holdfast-storage/holdfast/replication/replica"
	"github.com/holdfast-storage/holdfast/replication/wire"
)

// Bounds of one replica's sessions. A writer stays far below; one that does not
// is broken, and its session ends.
const (
	// maxKept bounds the bytes of entries and chunks received and not yet
	// logged: twice what a writer may have unacknowledged (FORMAT.md, 8 MiB).
	maxKept = 16 << 20
	// maxReads bounds the reads and fetches of one session that run at a time.
	maxReads = 1024
	// maxCoalesced bounds the bytes of appends that share one write to the
	// log: enough to amortise it, small enough to acknowledge early.
	maxCoalesced = 1 << 20
	// fullPause lies between two looks whether a full log has room.
	fullPause = 5 * time.Millisecond
)

// served is one replica at work.
type served struct {
	desc   disk.ReplicaDesc
	disk   *pool
	log    replicaLog
	logger *slog.Logger

	ctx    context.Context // ended by close
	stop   context.CancelFunc
	ended  sync.WaitGroup // the log, sync and read goroutines
	linked sync.WaitGroup // the sessions' links
	wake   chan struct{}  // capacity 1: work is queued
	syncs  chan uint64    // capacity 1: the core has at most one sync outstanding
	space  space          // of the log goroutine
	copies bool           // guarded by mu: a copy runs or a list waits, so apply progress is told at once

	mu       sync.Mutex
	core     *replica.Core
	sessions map[replica.Conn]*session
	batches  map[replica.Batch]*kept
	batch    replica.Batch // last number given
	keptSize int
	reads    map[readKey]*request
	work     []replica.Action // changes of the log to be made, in order
	after    []effect         // what is done to links once mu is released
	directID uint64           // last number given to a read in process
	applied  holdfast.Seq     // last told to the core
	check    holdfast.Seq
	hurry    holdfast.Seq // what is being applied to now; zero: nothing is
	failed   error
	giveBack bool // the writer left in order: what it was promised is free
	broken   bool // failed by a broken invariant: the core is not asked again
	closed   bool
}

// kept is the payload of one APPEND or INSTALL.
type kept struct {
	conn    replica.Conn
	message wire.Message // released when the log has taken it, or dropped it
	request wire.RequestID
	entries []disk.Entry // of an APPEND
	chunk   disk.Chunk   // of an INSTALL
	size    int
}

type readKey struct {
	conn replica.Conn
	id   uint64
}

// request is a READ, FETCH, LIST or READ_CHUNK on its way.
type request struct {
	message wire.Message
	direct  *directRead // a read in process, sampled by its caller
	reply   wire.Message
}

// effect is what is done without mu: a link that has something to send, or is
// to be closed; or a call.
type effect struct {
	link  wire.Link
	close bool
	call  func()
}

// session is one writer's connection to this replica.
type session struct {
	conn  replica.Conn
	link  wire.Link
	epoch holdfast.Epoch // of HELLO; every frame must carry it
	hello *wire.Hello
	reads int
}

func newServed(p *pool, log replicaLog, logger *slog.Logger, promise time.Duration, fresh bool) *served {
	st := log.Status()
	s := &served{
		desc: st.ReplicaDesc, disk: p, log: log,
		logger:   logger.With("volume", st.Segment.Volume, "segment", st.Segment.Index, "replica", st.ReplicaDesc.Replica),
		wake:     make(chan struct{}, 1),
		syncs:    make(chan uint64, 1),
		sessions: map[replica.Conn]*session{},
		batches:  map[replica.Batch]*kept{},
		reads:    map[readKey]*request{},
		core:     replica.New(replica.Options{Status: coreStatus(log), Now: now(), PromiseLength: promise, Fresh: fresh}),
		applied:  st.Applied, check: st.Checkpoint,
	}
	s.ctx, s.stop = context.WithCancel(context.Background())
	s.ended.Add(2)
	go s.runLog()
	go s.runSyncs()
	return s
}

// step hands one event to the core.
func (s *served) step(ev replica.Event) {
	s.mu.Lock()
	s.stepLocked(ev)
	s.unlock()
}

// unlock releases mu and does what waits for that.
func (s *served) unlock() {
	after := s.after
	s.after = nil
	work := len(s.work) > 0 || s.giveBack
	s.mu.Unlock()
	if work {
		select {
		case s.wake <- struct{}{}:
		default:
		}
	}
	for _, e := range after {
		if e.call != nil {
			e.call()
			continue
		}
		e.link.Flush()
		if e.close {
			e.link.Close()
		}
	}
}

// flushLater has a link flushed once mu is released.
func (s *served) flushLater(l wire.Link, close bool) {
	if n := len(s.after); n > 0 && s.after[n-1].link == l {
		s.after[n-1].close = s.after[n-1].close || close
		return
	}
	s.after = append(s.after, effect{link: l, close: close})
}

// stepLocked hands one event to the core and queues what it asks for. A broken
// invariant ends this copy, not the process: others go on.
func (s *served) stepLocked(ev replica.Event) {
	if s.broken {
		return
	}
	defer func() {
		if v := recover(); v != nil {
			s.broken = true
			s.failed = holdfast.Errorf(holdfast.ErrInternal, "replica %v contradicts itself: %v", s.desc.Replica, v)
			s.logger.Error("broken invariant", "panic", v, "stack", string(debug.Stack()))
			for _, c := range s.sessions {
				s.flushLater(c.link, true)
			}
		}
	}()
	for _, a := range s.core.Step(ev) {
		s.do(a)
	}
}

func (s *served) do(a replica.Action) {
	switch a := a.(type) {
	case replica.LogAppend, replica.LogFence, replica.LogTruncate, replica.LogRebase, replica.LogInstall, replica.LogRepair, replica.LogWhole,
		replica.LogIntact, replica.LogHint:
		s.work = append(s.work, a)
	case replica.LogCommit:
		// Not behind the appends: a full log needs it to make room for them. It
		// only ever rises, and the disk applies no more than is durable (R9).
		s.after = append(s.after, effect{call: func() { s.log.SetCommit(a.Seq) }})
	case replica.LogSync:
		s.syncs <- a.ID // never blocks: at most one is outstanding
	case replica.LogRead:
		s.startRead(a.Conn, a.ID)
	case replica.LogFetch:
		s.startRead(a.Conn, a.ID)
	case replica.Drop:
		s.drop(a.Batch)
	case replica.DropRead:
		s.dropRead(readKey{a.Conn, a.ID})
	case replica.SendSample:
		s.sendSample(a)
	case replica.SendInstalled:
		if k := s.batches[a.Batch]; k != nil {
			s.send(a.Conn, 0, k.request, &wire.Installed{AsOf: a.AsOf, Retry: a.Retry})
			s.drop(a.Batch)
		}
	case replica.SendRepaired:
		if k := s.batches[a.Batch]; k != nil {
			s.send(a.Conn, 0, k.request, &wire.Installed{AsOf: a.AsOf, Retry: a.Retry})
			s.drop(a.Batch)
		}
	case replica.SendAck:
		s.send(a.Conn, a.Epoch, 0, &wire.Ack{Tail: a.Tail, Credit: s.credit()})
	case replica.SendPong:
		// What it says was so when the ping came, and is no less true later: the
		// writer counts from when it sent the ping.
		if s.disk.touch.works(now(), func() { s.mu.Lock(); s.sendPong(a); s.unlock() }) {
			s.sendPong(a)
		}
	case replica.SendFlushed:
		s.send(a.Conn, a.Epoch, wire.RequestID(a.ID), &wire.Flushed{Durable: a.Dur})
	case replica.SendFenceOK:
		s.send(a.Conn, a.Epoch, 0, fencedMessage(a.Status, s.disk.openCount, s.disk.logSize))
	case replica.SendRefused:
		s.send(a.Conn, 0, 0, &wire.Refused{Accepted: a.Fence})
	case replica.SendOpened:
		s.send(a.Conn, a.Epoch, 0, &wire.Opened{Tail: a.Tail, Durable: a.Dur, Credit: s.credit(), Held: a.Held})
	case replica.SendWhole:
		s.copies = false
		s.send(a.Conn, a.Epoch, 0, &wire.WholeDone{Durable: a.Dur})
	case replica.SendFailed:
		s.logger.Error("replica failed", "epoch", a.Epoch, "seq", a.Seq, "error", a.Err)
		if !errors.Is(a.Err, holdfast.ErrIntegrity) {
			s.failed = a.Err
		}
		s.send(a.Conn, a.Epoch, 0, &wire.Failed{Seq: a.Seq, Cause: *wire.ErrorOf(a.Err)})
	case replica.CloseConn:
		if c := s.sessions[a.Conn]; c != nil {
			s.flushLater(c.link, true)
		}
	}
}

// sendPong answers PING and PROMISE. What is too short to say is no promise.
func (s *served) sendPong(a replica.SendPong) {
	if a.Promise < time.Millisecond {
		s.send(a.Conn, a.Epoch, wire.RequestID(a.Nonce), &wire.Pong{})
		return
	}
	s.send(a.Conn, a.Epoch, wire.RequestID(a.Nonce), &wire.Promised{Length: a.Promise})
}

// send queues a message on a session's link; epoch zero means the session's.
func (s *served) send(conn replica.Conn, epoch holdfast.Epoch, request wire.RequestID, m wire.Message) {
	c := s.sessions[conn]
	if c == nil {
		m.Release()
		return
	}
	if epoch == 0 {
		epoch = c.epoch
	}
	c.link.Send(epoch, request, m)
	s.flushLater(c.link, false)
}

// keep holds on to a message's payload until the core says what becomes of it.
func (s *served) keep(k *kept) replica.Batch {
	s.batch++
	s.batches[s.batch] = k
	s.keptSize += k.size
	return s.batch
}

// drop frees what is kept under a number. Twice is no harm.
func (s *served) drop(b replica.Batch) {
	k := s.batches[b]
	if k == nil {
		return
	}
	delete(s.batches, b)
	s.keptSize -= k.size
	k.message.Release()
}

// tick tells the time, and apply progress: at once while a copy needs it, else
// with every tenth tick. failed is the disk's failure, if it failed.
func (s *served) tick(at time.Duration, count int, failed error) {
	s.step(replica.Tick{Now: at})
	s.mu.Lock()
	due := s.copies || count%10 == 0
	s.mu.Unlock()
	if due {
		s.tellApplied()
	}
	s.tellBad(at)
	if failed != nil {
		s.mu.Lock()
		known := s.failed != nil
		s.failed = failed
		s.mu.Unlock()
		if !known {
			s.step(replica.Failed{Err: failed})
		}
	}
}

const (
	// badAtOnce bounds the chunks with bad blocks that a tick tells of.
	badAtOnce = 4
	// badEvery is how long it takes until one is told of again.
	badEvery = 2 * time.Second
)

// tellBad tells the writer, if there is one, of chunks with bad blocks.
func (s *served) tellBad(at time.Duration) {
	s.mu.Lock()
	defer s.unlock()
	if s.broken {
		return
	}
	conn, epoch, ok := s.core.Writer()
	if !ok {
		return
	}
	if chunks := s.log.Bad(badAtOnce, at, badEvery); len(chunks) > 0 {
		s.send(conn, epoch, 0, &wire.Damaged{Chunks: chunks})
	}
}

func (s *served) tellApplied() {
	st := s.log.Status()
	s.mu.Lock()
	if st.Damaged != nil && !s.broken {
		s.stepLocked(replica.Damaged{})
	}
	if st.Applied != s.applied || st.Checkpoint != s.check {
		s.applied, s.check = st.Applied, st.Checkpoint
		s.stepLocked(replica.AppliedTo{Applied: st.Applied, Checkpoint: st.Checkpoint})
	}
	s.unlock()
}

// close ends all sessions and waits for everything that runs.
func (s *served) close() {
	s.mu.Lock()
	s.closed = true
	var links []wire.Link
	for _, c := range s.sessions {
		links = append(links, c.link)
	}
	s.mu.Unlock()
	for _, l := range links {
		l.Close()
	}
	s.linked.Wait()
	s.stop()
	s.ended.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	for b := range s.batches {
		s.drop(b)
	}
}

// status is what is known of the replica.
func (s *served) status() ReplicaStatus {
	st := ReplicaStatus{Disk: s.disk.id, Log: s.log.Status(), PingsDropped: s.disk.touch.drops()}
	s.mu.Lock()
	defer s.mu.Unlock()
	st.Failed = s.failed
	if s.broken {
		return st
	}
	st.Core = s.core.Status()
	st.Waits = s.core.Explain()
	if conn, epoch, ok := s.core.Writer(); ok {
		st.Writer = epoch
		if c := s.sessions[conn]; c != nil {
			st.Remote = c.link.Remote()
		}
	}
	return st
}
