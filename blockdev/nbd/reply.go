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

	// The writer's, whoever it is.
	taken  []*op
	broken bool // a write failed: replies are dropped
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
		out.mu.Unlock()
		for rest := out.taken; len(rest) > 0; {
			n := c.writeSome(rest)
			for i, o := range rest[:n] {
				rest[i] = nil
				c.finish(o)
			}
			rest = rest[n:]
		}
	}
}

// writeAtOnce is how much is written before what it held is given back.
const writeAtOnce = 1 << 20

// writeSome writes the first of the replies, up to writeAtOnce, in one system
// call where the kernel takes them at once. It returns how many are dealt with.
func (c *conn) writeSome(replies []*op) (n int) {
	out := &c.out
	out.vector = out.vector[:0]
	for size := 0; n < len(replies) && size < writeAtOnce; n++ {
		o := replies[n]
		out.vector = append(out.vector, o.head)
		if o.payload != nil {
			out.vector = append(out.vector, o.payload.data)
			size += len(o.payload.data)
		}
	}
	if out.broken {
		return n
	}
	var err error
	if len(out.vector) == 1 {
		_, err = c.nc.Write(out.vector[0])
	} else {
		out.rest = out.vector
		_, err = out.rest.WriteTo(c.nc)
	}
	clear(out.vector)
	if err != nil {
		out.broken = true
		c.nc.Close() // the reader has to learn of it, too
		return n
	}
	c.progress.Add(1)
	return n
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
