package nbd

import (
	"net"
	"runtime"
	"sync"
	"time"
	"unicode/utf8"
)

// maxMessage bounds the text in an error reply; proto.md has clients expect at
// most 4096 bytes.
const maxMessage = 1024

// noDeadline takes a deadline off.
var noDeadline time.Time

// replies is the sending side of a connection in transmission. Whoever finishes
// a request queues its reply; the first to find nobody writing writes for all
// until the queue is empty, so replies that are ready together leave in one
// system call and no goroutine waits for another.
type replies struct {
	mu      sync.Mutex
	queue   []*op
	writing bool
	broken  bool // a write failed: replies are dropped

	// The writer's, whoever it is.
	taken  []*op
	vector net.Buffers
	rest   net.Buffers // what of vector is unwritten; a field so that it does not escape at each write
}

// answer queues the reply to a request, and writes if nobody does.
func (c *conn) answer(o *op, e wireError, message string) {
	o.encode(e, message, c.structured)
	out := &c.out
	out.mu.Lock()
	out.queue = append(out.queue, o)
	if out.writing {
		out.mu.Unlock()
		return
	}
	out.writing = true
	out.mu.Unlock()
	// Requests that are about to be answered get the chance to join.
	runtime.Gosched()
	c.writeReplies()
}

// encode makes the reply. A READ that failed loses its payload.
func (o *op) encode(e wireError, message string, structured bool) {
	b := o.headMem[:0]
	switch {
	case e == wireOK && structured && o.cmd == cmdRead:
		b = appendDataChunk(b, o.handle, o.offset, o.length)
	case e != wireOK && structured:
		b = appendErrorChunk(b, o.handle, e, clip(message))
	default:
		b = appendSimpleReply(b, o.handle, e)
	}
	o.head = b
	if e != wireOK || o.cmd != cmdRead {
		o.dropPayload()
	}
}

// clip bounds a message and keeps it valid UTF-8.
func clip(message string) string {
	if len(message) <= maxMessage {
		return message
	}
	n := maxMessage
	for n > 0 && !utf8.RuneStart(message[n]) {
		n--
	}
	return message[:n]
}

// writeReplies writes until the queue is empty.
func (c *conn) writeReplies() {
	out := &c.out
	for {
		out.mu.Lock()
		out.taken, out.queue = out.queue, out.taken[:0]
		if len(out.taken) == 0 {
			out.writing = false
			out.mu.Unlock()
			return
		}
		broken := out.broken
		out.mu.Unlock()
		if !broken {
			if err := c.writeTaken(); err != nil {
				out.mu.Lock()
				out.broken = true
				out.mu.Unlock()
				// The reader has to learn of it, too.
				c.nc.Close()
			}
		}
		for i, o := range out.taken {
			out.taken[i] = nil
			c.finish(o)
		}
	}
}

// writeTaken writes the taken replies in one system call where the kernel
// takes them at once.
func (c *conn) writeTaken() error {
	out := &c.out
	if len(out.taken) == 1 && out.taken[0].payload == nil {
		_, err := c.nc.Write(out.taken[0].head)
		return err
	}
	out.vector = out.vector[:0]
	for _, o := range out.taken {
		out.vector = append(out.vector, o.head)
		if o.payload != nil {
			out.vector = append(out.vector, o.payload.data)
		}
	}
	out.rest = out.vector
	_, err := out.rest.WriteTo(c.nc)
	clear(out.vector)
	return err
}

// finish gives back all that a request held.
func (c *conn) finish(o *op) {
	o.dropPayload()
	c.s.ops.put(o)
	c.slots.Release(1)
	c.live.Done()
}

// dropPayload gives the payload back to the pool and the budget.
func (o *op) dropPayload() {
	s := o.c.s
	if o.payload != nil {
		s.buffers.put(o.payload)
		o.payload = nil
	}
	if o.cost != 0 {
		s.payload.Release(o.cost)
		o.cost = 0
	}
}

// opPool reuses ops.
type opPool struct{ pool sync.Pool }

func (p *opPool) get() *op {
	if o, ok := p.pool.Get().(*op); ok {
		return o
	}
	return new(op)
}

func (p *opPool) put(o *op) {
	*o = op{}
	p.pool.Put(o)
}
