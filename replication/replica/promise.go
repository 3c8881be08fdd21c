package replica

import "time"

// ping says that the writer's epoch is still the highest (R10), and promises
// that it stays so, unless a higher FENCE waits already: what was promised
// before runs out, and nothing new is.
func (c *Core) ping(e Ping) {
	if !c.admit(e.Conn, e.Epoch) {
		return
	}
	pong := SendPong{Conn: e.Conn, Epoch: e.Epoch, Nonce: e.Nonce}
	if e.Promise && c.held == nil {
		c.now = max(c.now, e.Now)
		if Mutant != "ignore_promise" {
			c.promised = max(c.promised, c.now+c.length)
		}
		c.doubted = false
		pong.Promise = c.length
	}
	c.do(pong)
}

// tick takes the time. After a gap the clock is not believed, for it may have
// run ahead of the writer's: what stood at the last tick lasts a whole length
// again. Only once: a machine so slow that every tick is late still comes to
// accept a FENCE.
func (c *Core) tick(now time.Duration) {
	c.now = max(c.now, now)
	if c.now-c.lastTick > c.length/2 && c.promised > c.lastTick && !c.doubted {
		c.doubted = true
		c.promised = max(c.promised, c.now+c.length)
	}
	c.lastTick = c.now
	c.releaseHeld()
}

// left takes the writer's own word that it relies on no promise of this copy
// any more. A connection that only broke says nothing: its writer may not know.
func (c *Core) left(conn Conn) {
	if conn == c.sess.conn && c.sess.step != stepNone {
		c.promised = min(c.promised, c.now)
		c.releaseHeld()
	}
}
