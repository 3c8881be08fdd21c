package raftstore

import (
	"errors"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/raftstore/badgerlog"
)

// A leader whose file system is about to run full is to write no more than it must:
// it gives up what a leader whose disk hangs loses, in the same way.
//
// A leader whose disk hangs is stuck in a write of its own log, and would lead
// on for ever: its heartbeats come from other goroutines, so nobody stands for
// election, and nothing is decided. After Timings.DiskPatience it sends none any
// more and answers like a member that does not lead; when the write returns it
// finds a higher term, or leads on.

// timedLog is the log and stable store, with a record of writes under way.
type timedLog struct {
	*badgerlog.Store

	mu      sync.Mutex
	started map[int]time.Time
	next    int
	hold    func() // for tests: runs inside every write
}

// begin notes a write; end it with the function returned.
func (l *timedLog) begin() (end func()) {
	l.mu.Lock()
	n := l.next
	l.next++
	if l.started == nil {
		l.started = map[int]time.Time{}
	}
	l.started[n] = time.Now()
	hold := l.hold
	l.mu.Unlock()
	if hold != nil {
		hold()
	}
	return func() {
		l.mu.Lock()
		delete(l.started, n)
		l.mu.Unlock()
	}
}

// oldest is how long the oldest write under way has taken.
func (l *timedLog) oldest() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	var d time.Duration
	for _, at := range l.started {
		d = max(d, time.Since(at))
	}
	return d
}

// StoreLog implements raft.LogStore.
func (l *timedLog) StoreLog(e *raft.Log) error {
	defer l.begin()()
	return l.Store.StoreLog(e)
}

// StoreLogs implements raft.LogStore.
func (l *timedLog) StoreLogs(es []*raft.Log) error {
	defer l.begin()()
	return l.Store.StoreLogs(es)
}

// Set implements raft.StableStore.
func (l *timedLog) Set(k, v []byte) error {
	defer l.begin()()
	return l.Store.Set(k, v)
}

// SetUint64 implements raft.StableStore.
func (l *timedLog) SetUint64(k []byte, v uint64) error {
	defer l.begin()()
	return l.Store.SetUint64(k, v)
}

// quietTransport tells followers nothing while the member's log is stuck.
type quietTransport struct {
	*raft.NetworkTransport
	stuck func() bool
}

var _ raft.WithPreVote = (*quietTransport)(nil)

var errStuck = errors.New("this member's log is stuck in a write")

// AppendEntries implements raft.Transport.
func (t *quietTransport) AppendEntries(id raft.ServerID, to raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	if t.stuck() {
		return errStuck
	}
	return t.NetworkTransport.AppendEntries(id, to, args, resp)
}

// AppendEntriesPipeline implements raft.Transport: a pipeline sends the commit
// index now and then, which followers take for a heartbeat too.
func (t *quietTransport) AppendEntriesPipeline(id raft.ServerID, to raft.ServerAddress) (raft.AppendPipeline, error) {
	p, err := t.NetworkTransport.AppendEntriesPipeline(id, to)
	if err != nil {
		return nil, err
	}
	return &quietPipeline{p, t.stuck}, nil
}

type quietPipeline struct {
	raft.AppendPipeline
	stuck func() bool
}

// AppendEntries implements raft.AppendPipeline.
func (p *quietPipeline) AppendEntries(args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) (raft.AppendFuture, error) {
	if p.stuck() {
		return nil, errStuck
	}
	return p.AppendPipeline.AppendEntries(args, resp)
}

// stuckNow returns whether a write of the log takes longer than the patience,
// and a channel that is closed while one does.
func (s *Store) stuckNow() (ch <-chan struct{}, is bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stuck, s.isStuck
}

func (s *Store) isStuckNow() bool {
	_, is := s.stuckNow()
	return is
}

// Spare says why nothing more may be written to the log than must be, for its file
// system is about to run full, or nil. Until nil is said this member does not lead; it
// takes what a leader sends. In effect a moment after the call.
func (s *Store) Spare(why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.full = why
}

// Refuses says why nothing can be decided, for as long as this member alone decides and
// its log is spared: there is nobody else to ask. Nil otherwise. Of what is refused for
// it nothing was done.
func (s *Store) Refuses() error {
	s.mu.Lock()
	full, spared := s.full, s.isStuck
	s.mu.Unlock()
	if full == nil || !spared || !s.decidesAlone() {
		return nil
	}
	name := s.Node().String()
	if n, ok := s.View().Node(s.Node()); ok {
		name = n.Name
	}
	e := &holdfast.Error{Kind: holdfast.ErrNoSpace, Message: "node " + name + " takes no changes of the metadata: " + full.Error(), Cause: full}
	var given *holdfast.Error
	if errors.As(full, &given) {
		e.Message, e.Remedy = "node "+name+" takes no changes of the metadata: "+given.Message, given.Remedy
	}
	return e
}

// decidesAlone says whether this member is the only voter.
func (s *Store) decidesAlone() bool {
	f := s.raft.GetConfiguration() // the latest known, without waiting
	if f.Error() != nil {
		return false
	}
	alone := false
	for _, m := range f.Configuration().Servers {
		if m.Suffrage != raft.Voter {
			continue
		}
		if m.ID != raft.ServerID(s.Node().String()) {
			return false
		}
		alone = true
	}
	return alone
}

// watchDisk turns the age of the oldest write, or a log to be spared, into stuck, and
// back.
func (s *Store) watchDisk() {
	defer s.wg.Done()
	tick := time.NewTicker(max(s.opts.Timings.DiskPatience/16, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-s.ctx.Done():
			return
		}
		age := s.timed.oldest()
		s.mu.Lock()
		full := s.full
		is := age >= s.opts.Timings.DiskPatience || full != nil
		if is != s.isStuck {
			s.isStuck = is
			switch {
			case !is:
				s.stuck = make(chan struct{})
				s.opts.Logger.Info("the metadata's log writes again")
			case full != nil:
				close(s.stuck)
				s.opts.Logger.Error("the metadata's log is spared: this member does not lead until there is space", "error", full)
			default:
				close(s.stuck)
				s.opts.Logger.Warn("the metadata's log is stuck in a write: this member does not lead until it returns", "since", age)
			}
			s.leaderMoved()
		}
		s.mu.Unlock()
	}
}

// leadsAgain waits until the log is no longer stuck; false if raft does not call
// this member the leader then, or the member ends.
func (s *Store) leadsAgain() bool {
	for {
		moved := s.LeaderChanged()
		if !s.isStuckNow() {
			return s.raft.State() == raft.Leader
		}
		select {
		case <-moved:
		case <-s.fatal:
			return false
		case <-s.ctx.Done():
			return false
		}
	}
}

// stuckError leaves open whether what was asked was or will be done.
func (s *Store) stuckError() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	message := "this node does not lead the metadata: its log is stuck in a write of its disk"
	if s.full != nil {
		message = "this node does not lead the metadata: " + s.full.Error()
	}
	return &holdfast.Error{Kind: holdfast.ErrUnavailable, Message: message, Cause: errors.Join(errStuck, &NotLeader{})}
}
