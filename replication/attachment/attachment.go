package attachment

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev"
	"github.com/holdfast-storage/holdfast/replication/coordinator"
)

// defaultTick is how often the cores are told the time.
const defaultTick = 100 * time.Millisecond

// metaPause is the pause between asks of raft to record a detach.
const metaPause = 200 * time.Millisecond

// Attachment is a running writer of one volume. All methods may be called
// concurrently.
type Attachment struct {
	o        Options
	memory   *Memory
	ranges   ranges
	segments []*segment

	ctx     context.Context // ended by Close
	stop    context.CancelFunc
	ticking sync.WaitGroup
	active  chan struct{} // closed when every segment serves
	done    chan struct{} // closed when the session is over

	mu        sync.Mutex
	isActive  bool
	detaching bool
	over      bool
	err       error // why
	closing   bool
	closed    chan struct{} // closed when Close is through
}

var _ blockdev.Device = (*Attachment)(nil)

// New makes an attachment and starts to take over the replicas. Close or
// Detach ends it.
func New(o Options) (*Attachment, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	if o.SegmentSize == 0 {
		o.SegmentSize = holdfast.DefaultSegmentSize
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Memory == nil {
		o.Memory = NewMemory(0)
	}
	if o.Throttle == nil {
		o.Throttle = NewThrottle()
	}
	if o.Limits.Tick == 0 {
		o.Limits.Tick = defaultTick
	}
	if o.Level == 0 {
		o.Level = holdfast.Level1
	}
	limitWindow(&o)
	a := &Attachment{
		o: o, memory: o.Memory,
		active: make(chan struct{}), done: make(chan struct{}), closed: make(chan struct{}),
	}
	a.ctx, a.stop = context.WithCancel(context.Background())
	for i := range o.Segments {
		size := min(o.SegmentSize, o.Size-int64(i)*o.SegmentSize)
		a.segments = append(a.segments, newSegment(a, i, size))
	}
	for _, s := range a.segments {
		s.start()
	}
	a.ticking.Add(1)
	go a.tick()
	return a, nil
}

// limitWindow keeps a segment's replay window within an eighth of the smallest
// log of this node's disks, unless the limits say otherwise: what is in the
// window and not yet committed fills the logs.
func limitWindow(o *Options) {
	if o.Limits.WindowBytes != 0 || o.Local == nil {
		return
	}
	window := int64(maxWindow)
	for _, d := range o.Local.Disks() {
		window = min(window, d.Stat().WALSize/8)
	}
	o.Limits.WindowBytes = max(window, minWindow)
	if o.Limits.FlushBytes == 0 {
		o.Limits.FlushBytes = min(o.Limits.WindowBytes/4, 16<<20)
	}
}

// Bounds of the replay window when the limits leave it open: two operations of
// the largest size, and the protocol's bound per segment.
const (
	minWindow = 2 << 20
	maxWindow = 64 << 20
)

func (a *Attachment) tick() {
	defer a.ticking.Done()
	t := time.NewTicker(a.o.Limits.Tick)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			for _, s := range a.segments {
				s.step(coordinator.Tick{})
				s.report()
			}
		case <-a.ctx.Done():
			return
		}
	}
}

// report tells the throttle what requests took since the last tick.
func (s *segment) report() {
	s.mu.Lock()
	at, took := s.clock, (*foreground)(nil)
	if s.took.count() > 0 {
		t := s.took
		took, s.took = &t, foreground{}
	}
	s.mu.Unlock()
	s.a.o.Throttle.observe(at, took)
}

// segmentActive looks whether every segment serves now.
func (a *Attachment) segmentActive() {
	for _, s := range a.segments {
		s.mu.Lock()
		active := s.activated != nil
		s.mu.Unlock()
		if !active {
			return
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.isActive {
		a.isActive = true
		close(a.active)
	}
}

// segmentEnded ends the whole attachment when one segment's session ended, but
// for a detach, which is over once all have.
func (a *Attachment) segmentEnded(s *segment, end coordinator.EndSession) {
	if end.Reason == coordinator.EndDetached {
		for _, o := range a.segments {
			o.mu.Lock()
			ended := o.ended
			o.mu.Unlock()
			if !ended {
				return
			}
		}
		a.finish(nil)
		return
	}
	if !a.finish(end.Err) {
		return
	}
	for _, o := range a.segments {
		if o != s {
			o.step(coordinator.Stop{Err: end.Err})
		}
	}
}

// finish notes that the session is over, and why; only the first time counts.
func (a *Attachment) finish(err error) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.over {
		return false
	}
	a.over, a.err = true, err
	close(a.done)
	return true
}

// Attach waits until every segment serves, the session ended, or ctx did; the
// attachment goes on trying in the last case. ErrUnavailable: the in-sync set
// changed between AttachBegin and the activation; begin again, with a new epoch.
// ErrFenced: somebody else did. ErrIntegrity: a person must look.
func (a *Attachment) Attach(ctx context.Context) error {
	select {
	case <-a.active:
		return nil
	case <-a.done:
		return a.endedErr()
	case <-ctx.Done():
		return ctx.Err()
	}
}

// endedErr is what a request is told once the session is over: why, if a core
// ended it. ErrUnavailable means that the in-sync set changed meanwhile: a new
// AttachBegin may succeed.
func (a *Attachment) endedErr() error {
	a.mu.Lock()
	err := a.err
	a.mu.Unlock()
	if err != nil {
		return err
	}
	return errEnded(a.o.Volume)
}

// Continuous reports, once Attach returned nil, whether older sessions may be
// continued: nothing that was acknowledged to them is lost.
func (a *Attachment) Continuous() bool {
	for _, s := range a.segments {
		s.mu.Lock()
		ok := s.activated != nil && s.activated.Continuous
		s.mu.Unlock()
		if !ok {
			return false
		}
	}
	return true
}

// UpdateReplicas tells what raft now says of the copies of a segment: a copy
// was added, removed, or changed its role. An unknown segment is ignored.
func (a *Attachment) UpdateReplicas(segment uint32, replicas []coordinator.Replica) {
	if int64(segment) < int64(len(a.segments)) {
		a.segments[segment].step(coordinator.Replicas{List: append([]coordinator.Replica(nil), replicas...)})
	}
}

// SetPolicy replaces Options.Policy.
func (a *Attachment) SetPolicy(p Policy) {
	for _, s := range a.segments {
		s.step(coordinator.Policy(p))
	}
}

// NodeGone tells a change of a node's liveness.
func (a *Attachment) NodeGone(node holdfast.NodeID, gone bool) {
	for _, s := range a.segments {
		s.step(coordinator.NodeGone{Node: node, Gone: gone})
	}
}

// Detach ends the session cleanly: requests that were taken are finished,
// everything is durable on every in-sync replica, and raft records it. Requests
// made after the call fail with ErrFenced. On error (ctx ended, raft did not
// answer) the volume is not detached, and Close remains.
func (a *Attachment) Detach(ctx context.Context) error {
	if err := a.Attach(ctx); err != nil {
		return err
	}
	a.mu.Lock()
	a.detaching = true
	a.mu.Unlock()
	for _, s := range a.segments {
		s.step(coordinator.Detach{})
	}
	select {
	case <-a.done:
	case <-ctx.Done():
		return ctx.Err()
	}
	var ends []SegmentEnd
	for _, s := range a.segments {
		s.mu.Lock()
		d := s.detached
		s.mu.Unlock()
		if d == nil {
			return a.endedErr()
		}
		ends = append(ends, SegmentEnd{Segment: s.id, ISRVersion: d.ISRVersion, End: d.End, Commit: d.Commit})
	}
	for {
		ask, cancel := context.WithTimeout(ctx, raftTime)
		err := a.o.Meta.Detach(ask, a.o.Volume, a.o.Epoch, ends)
		cancel()
		if outcome(err) != coordinator.OutcomeUnknown {
			return err
		}
		select {
		case <-time.After(metaPause): // not known: the same command again
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Close ends the session at once, as a crash would: nothing is flushed and
// raft is not told. It waits for every goroutine of the attachment.
func (a *Attachment) Close() error {
	a.mu.Lock()
	if a.closing {
		a.mu.Unlock()
		<-a.closed
		return nil
	}
	a.closing = true
	a.mu.Unlock()
	a.finish(nil)
	a.stop()
	a.ticking.Wait()
	for _, s := range a.segments {
		s.step(coordinator.Stop{Err: errEnded(a.o.Volume)})
	}
	for _, s := range a.segments {
		s.close()
	}
	close(a.closed)
	return nil
}

// Done is closed when the session is over, by a higher epoch, Detach or Close.
func (a *Attachment) Done() <-chan struct{} { return a.done }

// Err returns why the session is over, or nil while it is not. After a clean
// Detach or a Close it is of kind ErrFenced too: no request is served.
func (a *Attachment) Err() error {
	select {
	case <-a.done:
		return a.endedErr()
	default:
		return nil
	}
}

// Status says how things stand.
func (a *Attachment) Status() Status {
	st := Status{Volume: a.o.Volume, Epoch: a.o.Epoch, Session: a.o.Session, Ended: a.Err()}
	a.mu.Lock()
	st.Active = a.isActive && !a.over
	a.mu.Unlock()
	for _, s := range a.segments {
		st.Segments = append(st.Segments, s.status())
	}
	return st
}

func (s *segment) status() SegmentStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.broken != nil {
		return SegmentStatus{Segment: s.id, Waits: []Wait{{For: s.broken.Error()}}}
	}
	st := SegmentStatus{Segment: s.id, State: s.core.State(), Window: s.window.bytes, Requests: len(s.ops), BytesResynced: s.resent}
	for _, w := range s.core.Explain() {
		st.Waits = append(st.Waits, Wait{For: w.For, Time: max(0, now()-w.Since)})
	}
	st.Waits = append(st.Waits, s.repairWaits()...)
	for _, m := range st.State.Members {
		ms := MemberStatus{Replica: m.Replica}
		for _, c := range s.copies {
			if c.target == m.Replica {
				ms.Resync = ResyncWaiting
				if c.resync != nil {
					ms.Resync, ms.ResyncRate = ResyncRunning, c.resync.rateOf()
				}
			}
		}
		if p := s.peers[m.Replica]; p != nil {
			ms.LastError = p.lastError
			if p.conn != nil {
				ms.Remote = p.conn.link.Remote()
			}
		}
		if st.State.Tail > m.Tail {
			ms.LagOps = int64(st.State.Tail - m.Tail)
		}
		for seq := m.Tail + 1; seq <= st.State.Tail; seq++ {
			w := s.window.at(seq)
			if w == nil {
				ms.LagBytes = -1
				break
			}
			ms.LagBytes += int64(len(w.entry.Data))
		}
		st.Members = append(st.Members, ms)
	}
	return st
}
