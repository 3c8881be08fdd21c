package attachment

import (
	"context"
	"sync"
)

// ranges keeps requests that change the same blocks apart where it matters: a
// request that reads a block, changes a part and writes it back must not
// overlap any other change of that block. Whole-block changes may overlap each
// other: the core gives them an order.
type ranges struct {
	mu    sync.Mutex
	held  []*hold
	queue []*hold // in order of arrival; a hold waits for conflicting ones before it, too
}

// hold is one request's claim on [off, off+n).
type hold struct {
	off, n    int64
	exclusive bool
	granted   chan struct{} // closed when granted; nil if it was at once
}

func (h *hold) conflicts(o *hold) bool {
	return (h.exclusive || o.exclusive) && h.off < o.off+o.n && o.off < h.off+h.n
}

// acquire waits until the claim is granted.
func (r *ranges) acquire(ctx context.Context, off, n int64, exclusive bool) (*hold, error) {
	h := &hold{off: off, n: n, exclusive: exclusive}
	r.mu.Lock()
	if r.free(h, r.queue) {
		r.held = append(r.held, h)
		r.mu.Unlock()
		return h, nil
	}
	h.granted = make(chan struct{})
	r.queue = append(r.queue, h)
	r.mu.Unlock()
	select {
	case <-h.granted:
		return h, nil
	case <-ctx.Done():
	}
	r.mu.Lock()
	for i, q := range r.queue {
		if q == h {
			r.queue = append(r.queue[:i], r.queue[i+1:]...)
			r.grant() // those behind may have waited for this one
			r.mu.Unlock()
			return nil, ctx.Err()
		}
	}
	r.mu.Unlock()
	r.release(h) // granted in the same moment
	return nil, ctx.Err()
}

// free says whether h conflicts with nothing held and nothing in ahead.
func (r *ranges) free(h *hold, ahead []*hold) bool {
	for _, o := range r.held {
		if h.conflicts(o) {
			return false
		}
	}
	for _, o := range ahead {
		if h.conflicts(o) {
			return false
		}
	}
	return true
}

// release gives a claim back.
func (r *ranges) release(h *hold) {
	if h == nil {
		return
	}
	r.mu.Lock()
	for i, o := range r.held {
		if o == h {
			last := len(r.held) - 1
			r.held[i] = r.held[last]
			r.held[last] = nil
			r.held = r.held[:last]
			break
		}
	}
	if len(r.queue) > 0 {
		r.grant()
	}
	r.mu.Unlock()
}

// grant grants what can be granted, in order of arrival.
func (r *ranges) grant() {
	kept := r.queue[:0]
	for _, h := range r.queue {
		if r.free(h, kept) {
			r.held = append(r.held, h)
			close(h.granted)
		} else {
			kept = append(kept, h)
		}
	}
	clear(r.queue[len(kept):])
	r.queue = kept
}
