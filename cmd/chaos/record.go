package main

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/holdfast-storage/holdfast/cmd/internal/history"
)

// clock gives every event a time of its own, in the order in which they are.
type clock struct {
	start time.Time
	last  atomic.Int64
}

func newClock() *clock { return &clock{start: time.Now()} }

// now returns nanoseconds since the start, more than any call that returned before.
func (c *clock) now() history.Time {
	for {
		last := c.last.Load()
		next := max(last+1, time.Since(c.start).Nanoseconds())
		if c.last.CompareAndSwap(last, next) {
			return history.Time(next)
		}
	}
}

// record is what the clients saw so far.
type record struct {
	clock *clock

	mu      sync.Mutex
	history history.History
	counts  counts
	lastAck history.Time
	gap     time.Duration // the longest time without an answer, since resetGap
}

// counts are of requests that were answered with success.
type counts struct {
	Reads, Writes, Flushes int // requests: one may be for many blocks
	Unanswered             int
	Errors                 int // answered with an error
}

// begin notes that a request for blocks is sent, and returns where in the record
// it stands. A write has one value for all its blocks.
func (r *record) begin(op history.Op, blocks int) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	op.Call, op.Return = r.clock.now(), history.Never
	at := len(r.history.Ops)
	for i := range blocks {
		one := op
		one.Block += int64(i)
		r.history.Ops = append(r.history.Ops, one)
	}
	return at
}

// end notes that the request at a place was answered; a read with its values.
func (r *record) end(at, blocks int, values []history.Value) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.clock.now()
	for i := range blocks {
		op := &r.history.Ops[at+i]
		op.Return = now
		if op.Kind == history.Read {
			op.Value = values[i]
		}
	}
	switch r.history.Ops[at].Kind {
	case history.Read:
		r.counts.Reads++
	case history.Write:
		r.counts.Writes++
	case history.Flush:
		r.counts.Flushes++
	}
	r.gap = max(r.gap, time.Duration(now-r.lastAck))
	r.lastAck = now
}

// unanswered notes that a request got an error or none at all.
func (r *record) unanswered(answeredWithError bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if answeredWithError {
		r.counts.Errors++
	} else {
		r.counts.Unanswered++
	}
}

func (r *record) addSession(s history.Session) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.history.Sessions = append(r.history.Sessions, s)
}

// resetGap begins to measure how long the volume answers nothing.
func (r *record) resetGap() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lastAck, r.gap = r.clock.now(), 0
}

// longestGap is the longest time without any answer since resetGap, the present
// one included.
func (r *record) longestGap() time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	return max(r.gap, time.Duration(r.clock.now()-r.lastAck))
}

// answered counts the requests that were answered so far.
func (r *record) answered() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.counts.Reads + r.counts.Writes + r.counts.Flushes
}
