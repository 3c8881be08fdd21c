package keeper

import (
	"context"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
)

// caller is the asking end of a conversation: many calls at a time, answered in
// any order.
type caller struct {
	peer string // what the other end is, for errors
	p    *packets
	done chan struct{} // closed when the conversation is over and receive has ended

	mu    sync.Mutex
	next  uint64
	calls map[uint64]chan answer // nil once done
}

type answer struct {
	response
	fd int // the caller's to close; -1 for none
}

// newCaller makes a caller; its maker starts receive.
func newCaller(peer string, p *packets) *caller {
	return &caller{peer: peer, p: p, done: make(chan struct{}), calls: make(map[uint64]chan answer)}
}

func (c *caller) close() {
	_ = c.p.conn.Close()
	<-c.done
}

// receive hands answers to their callers until the conversation ends.
func (c *caller) receive() {
	defer close(c.done)
	for {
		a := answer{}
		var err error
		a.fd, err = c.p.receive(&a.response)
		c.mu.Lock()
		if err != nil {
			calls := c.calls
			c.calls = nil
			c.mu.Unlock()
			_ = c.p.conn.Close()
			for _, ch := range calls {
				close(ch)
			}
			return
		}
		ch := c.calls[a.ID]
		delete(c.calls, a.ID)
		c.mu.Unlock()
		switch {
		case ch != nil:
			ch <- a // has room for one
		case a.fd >= 0:
			_ = unix.Close(a.fd) // its caller has gone
		}
	}
}

// call sends a request, with fd unless it is negative (it stays the caller's),
// and waits for the answer.
func (c *caller) call(ctx context.Context, r request, fd int) (answer, error) {
	timeout := defaultTimeout
	if d, ok := ctx.Deadline(); ok {
		timeout = min(time.Until(d), maxTimeout)
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	r.TimeoutMS = max(timeout.Milliseconds(), 1)
	ch := make(chan answer, 1)
	gone := holdfast.Errorf(holdfast.ErrUnavailable, "the %s is gone", c.peer)
	c.mu.Lock()
	if c.calls == nil {
		c.mu.Unlock()
		return answer{fd: -1}, gone
	}
	c.next++
	r.ID = c.next
	c.calls[r.ID] = ch
	c.mu.Unlock()
	if err := c.p.send(r, fd); err != nil {
		c.forget(r.ID, ch)
		return answer{fd: -1}, err
	}
	select {
	case a, ok := <-ch:
		if !ok {
			return answer{fd: -1}, gone
		}
		if a.Error != nil && a.fd >= 0 {
			_ = unix.Close(a.fd)
			a.fd = -1
		}
		return a, a.Error.err()
	case <-ctx.Done():
		c.forget(r.ID, ch)
		return answer{fd: -1}, holdfast.Errorf(holdfast.ErrTimeout, "%s: %s: no answer in time: %w", c.peer, r.Verb, ctx.Err())
	}
}

// forget gives up a call; an answer that came meanwhile must not leak its
// descriptor.
func (c *caller) forget(id uint64, ch chan answer) {
	c.mu.Lock()
	_, waiting := c.calls[id]
	delete(c.calls, id)
	c.mu.Unlock()
	if waiting {
		return
	}
	if a, ok := <-ch; ok && a.fd >= 0 { // it is there or about to be
		_ = unix.Close(a.fd)
	}
}
