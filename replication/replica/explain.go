package replica

import "fmt"

// Explain says what this copy waits for, and since when. Empty: for a message.
func (c *Core) Explain() []Wait {
	var w []Wait
	add := func(since Wait) { w = append(w, since) }
	if c.failed != nil {
		add(Wait{For: fmt.Sprintf("nothing any more: the disk failed: %v", c.failed), Since: c.since})
		return w
	}
	if c.held != nil {
		add(Wait{For: fmt.Sprintf("the promise to an older writer, or the start-up time, to pass (until %v) before epoch %d is accepted", c.promised, c.held.Epoch), Since: c.heldAt})
	}
	switch c.sess.step {
	case stepFencing:
		add(Wait{For: fmt.Sprintf("fence %d and the tail to be durable (%d appends, %d changes before it)", c.sess.epoch, c.appends.len(), c.other), Since: c.since})
	case stepFenced:
		add(Wait{For: fmt.Sprintf("the writer of epoch %d to open", c.sess.epoch), Since: c.since})
	case stepOpening:
		add(Wait{For: fmt.Sprintf("the log to be cut to %d", c.opening.to), Since: c.since})
	case stepNone, stepOpen:
	}
	if len(c.waiters) > 0 {
		add(Wait{For: fmt.Sprintf("entries up to %d to be durable, for %d flushes", c.waiters[len(c.waiters)-1].need, len(c.waiters)), Since: c.since})
	}
	if len(c.fetches) > 0 {
		add(Wait{For: fmt.Sprintf("the base to reach %d (now %d) before the chunks are listed", c.fetches[0].need, c.st.Applied), Since: c.since})
	}
	if c.wholeWant {
		add(Wait{For: fmt.Sprintf("the log to reach %d (now %d) before the copy is whole", c.sess.maxV, c.st.Tail), Since: c.since})
	}
	return w
}
