package attachment

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/holdfast-storage/holdfast"
)

// resyncsPerDisk bounds the resyncs that read from a disk or write to it at a
// time (protocol section 8): more of them only make each one late.
const resyncsPerDisk = 2

// throttleLook is how often who waits looks again whether it must hurry, and
// what rate is allowed now.
const throttleLook = 20 * time.Millisecond

// Throttle bounds what all attachments of a node do to bring members back: the
// resyncs per disk, and the rate of each, by what clients' requests take meanwhile.
// It knows only of this node's clients and resyncs.
type Throttle struct {
	mu      sync.Mutex
	pace    pace
	running map[*resync]struct{}
	disks   map[holdfast.DiskID]int // resyncs on each
	queue   []*resync               // in order of arrival
}

// NewThrottle returns a throttle that allows full speed until it learns of
// requests.
func NewThrottle() *Throttle {
	return &Throttle{running: map[*resync]struct{}{}, disks: map[holdfast.DiskID]int{}}
}

// resync is one member being brought back: a copy of log or of chunks.
type resync struct {
	t     *Throttle
	disks []holdfast.DiskID
	// hurry says that holding back would hold clients: nil for never.
	hurry   func() bool
	granted chan struct{} // closed when it may run

	// Guarded by the Throttle's mu.
	stalled bool          // it gets nowhere, and takes no place meanwhile
	due     time.Duration // what was sent is paid for then
	sent    int64         // since the window began
	rate    float64       // bytes a second in the last window
}

// begin waits until there is room on both disks. The caller ends the resync.
func (t *Throttle) begin(ctx context.Context, hurry func() bool, disks ...holdfast.DiskID) (*resync, error) {
	r := &resync{t: t, hurry: hurry, granted: make(chan struct{})}
	for _, d := range disks {
		if d != (holdfast.DiskID{}) && !slices.Contains(r.disks, d) {
			r.disks = append(r.disks, d)
		}
	}
	t.mu.Lock()
	t.queue = append(t.queue, r)
	t.grant()
	t.mu.Unlock()
	for {
		look, stop := r.lookAgain()
		select {
		case <-r.granted:
			stop()
			return r, nil
		case <-look:
			if hurry() {
				t.mu.Lock()
				if i := slices.Index(t.queue, r); i >= 0 {
					t.run(i)
				}
				t.mu.Unlock()
			}
		case <-ctx.Done():
			stop()
			t.mu.Lock()
			defer t.mu.Unlock()
			if i := slices.Index(t.queue, r); i >= 0 {
				t.queue = slices.Delete(t.queue, i, i+1)
			} else {
				t.leave(r)
			}
			return nil, ctx.Err()
		}
		stop()
	}
}

// lookAgain is a timer for who may have to hurry; nothing for others.
func (r *resync) lookAgain() (<-chan time.Time, func()) {
	if r.hurry == nil {
		return nil, func() {}
	}
	timer := time.NewTimer(throttleLook)
	return timer.C, func() { timer.Stop() }
}

// grant lets run who waits and has room, in order of arrival.
func (t *Throttle) grant() {
	for i := 0; i < len(t.queue); {
		if slices.ContainsFunc(t.queue[i].disks, func(d holdfast.DiskID) bool { return t.disks[d] >= resyncsPerDisk }) {
			i++
			continue
		}
		t.run(i)
	}
}

// run lets the i-th in the queue run.
func (t *Throttle) run(i int) {
	r := t.queue[i]
	t.queue = slices.Delete(t.queue, i, i+1)
	if len(t.running) == 0 {
		t.pace.begin()
	}
	t.running[r] = struct{}{}
	t.occupy(r, 1)
	close(r.granted)
}

// occupy takes a place on each of a resync's disks, or gives it back.
func (t *Throttle) occupy(r *resync, n int) {
	for _, d := range r.disks {
		if t.disks[d] += n; t.disks[d] == 0 {
			delete(t.disks, d)
		}
	}
}

// stall notes that a resync gets nowhere, since its target takes nothing (it may
// be full), or that it goes on. Meanwhile others may use its disks: a full disk must
// not keep the members on all others from coming back.
func (r *resync) stall(stalled bool) {
	r.t.mu.Lock()
	defer r.t.mu.Unlock()
	switch {
	case r.stalled == stalled:
	case stalled:
		r.stalled = true
		r.t.occupy(r, -1)
		r.t.grant()
	default:
		r.stalled = false
		r.t.occupy(r, 1)
	}
}

// end gives the room back.
func (r *resync) end() {
	r.t.mu.Lock()
	r.t.leave(r)
	r.t.mu.Unlock()
}

func (t *Throttle) leave(r *resync) {
	delete(t.running, r)
	if !r.stalled {
		t.occupy(r, -1)
	}
	t.grant()
}

// wait waits until what was sent before is paid for.
func (r *resync) wait(ctx context.Context) error {
	for {
		r.t.mu.Lock()
		left := r.due - now()
		if r.t.pace.rate == 0 {
			left = 0
		}
		r.t.mu.Unlock()
		if left <= 0 || r.hurry != nil && r.hurry() {
			return ctx.Err()
		}
		timer := time.NewTimer(min(left, throttleLook))
		select {
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

// spend notes n bytes sent.
func (r *resync) spend(n int64) {
	r.t.mu.Lock()
	defer r.t.mu.Unlock()
	r.sent += n
	r.t.pace.sent += n
	if rate := r.t.pace.rate; rate > 0 {
		r.due = max(r.due, now()) + time.Duration(float64(n)/rate*float64(time.Second))
	}
}

// observe takes in what an attachment's requests took since it last did so. Each
// attachment calls it at every tick, also without requests.
func (t *Throttle) observe(now time.Duration, took *foreground) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if took != nil {
		t.pace.window.merge(took)
	}
	window := now - t.pace.from
	if !t.pace.look(now, len(t.running)) {
		return
	}
	for r := range t.running {
		r.rate = float64(r.sent) / window.Seconds()
		r.sent = 0
		if t.pace.rate > 0 {
			// A debt made at a lower rate is not carried on for long.
			r.due = min(r.due, now+time.Second)
		}
	}
}

// rateOf is what a resync sent in the last window, in bytes a second.
func (r *resync) rateOf() int64 {
	r.t.mu.Lock()
	defer r.t.mu.Unlock()
	return int64(r.rate)
}

// ThrottleStatus is what a throttle says of itself.
type ThrottleStatus struct {
	Resyncs int   // that run
	Waiting int   // for room on a disk
	Rate    int64 // bytes a second of all, in the last window
	Limit   int64 // of each, bytes a second; zero: none
	Verdict string
	// Requests of this node's clients in the last window that had some.
	Requests []ForegroundStatus
}

// ForegroundStatus is one kind of request.
type ForegroundStatus struct {
	Op       string        // read, write or flush
	P99      time.Duration // in the last window
	Baseline time.Duration // without resync; zero: not known yet
}

// Status says how things stand.
func (t *Throttle) Status() ThrottleStatus {
	t.mu.Lock()
	defer t.mu.Unlock()
	st := ThrottleStatus{Resyncs: len(t.running), Waiting: len(t.queue), Rate: int64(t.pace.lastRate), Limit: int64(t.pace.rate), Verdict: t.pace.verdict}
	if len(t.running) == 0 {
		st.Rate, st.Limit, st.Verdict = 0, 0, ""
	}
	for k := range opKinds {
		base, _ := t.pace.baseline(k)
		st.Requests = append(st.Requests, ForegroundStatus{Op: opKindNames[k], P99: t.pace.last[k], Baseline: base})
	}
	return st
}
