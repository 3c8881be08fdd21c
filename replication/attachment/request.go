package attachment

import (
	"context"
	"sync"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/replication/coordinator"
	"github.com/holdfast-storage/holdfast/replication/wire"
)

// request is one call of a Device method: one or more operations. When the
// last has completed its claim on the range is given back, also when the
// caller's context ended before and it no longer waits.
type request struct {
	ranges *ranges
	hold   *hold
	done   chan struct{}

	mu      sync.Mutex
	pending int // operations, and one for the caller until it has issued all
	err     error
}

func newRequest(r *ranges, h *hold) *request {
	return &request{ranges: r, hold: h, done: make(chan struct{}), pending: 1}
}

// add counts one more operation.
func (r *request) add() {
	r.mu.Lock()
	r.pending++
	r.mu.Unlock()
}

// finish counts one operation as completed; the first error is the request's.
func (r *request) finish(err error) {
	r.mu.Lock()
	if err != nil && r.err == nil {
		r.err = err
	}
	r.pending--
	last := r.pending == 0
	r.mu.Unlock()
	if last {
		if r.hold != nil {
			r.ranges.release(r.hold)
		}
		close(r.done)
	}
}

// wait waits for all operations, which go on if ctx ends first.
func (r *request) wait(ctx context.Context) error {
	select {
	case <-r.done:
		return r.err
	case <-ctx.Done():
		select {
		case <-r.done:
			return r.err
		default:
			return ctx.Err()
		}
	}
}

// op is one operation in a core's hands.
type op struct {
	request *request // of a write or a flush
	kind    opKind
	began   time.Duration // when the core took it, or its wait for memory began

	// A mutation's place in the window once it is sequenced.
	entry  wire.Entry
	buffer *wire.Buffer // its payload; the op's reference until Sequence
	cost   int64        // taken from the node's memory

	read *readOp // of a read
}

// readOp is a read. The goroutine that called ReadAt does the sampling, so that
// a range read from this node's disk goes straight into the caller's buffer.
type readOp struct {
	wake chan struct{} // capacity 1: one of the fields below changed

	// Guarded by the segment's mu.
	sample   *coordinator.SampleRead // to be done
	done     bool
	err      error
	returned bool // the caller is gone: its buffer must not be touched
}

func (r *readOp) signal() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// call is a request on a session that awaits its answer.
type call struct {
	reply chan wire.Message // capacity 1
}

func errEnded(v holdfast.VolumeID) error {
	return holdfast.Errorf(holdfast.ErrFenced, "volume %v: the attachment has ended", v)
}
