package coordinator

// A promise is a member's word to answer no FENCE of a higher epoch for a
// while. Every ping may ask for one, and a ping goes out every quarter of L
// anyway: so a volume that is read keeps the promises of all its members, and
// its reads wait for nobody.

// roundsKept is of how many ping rounds the begin is remembered: more than are
// under way. An answer to an older one is a pong without a promise.
const roundsKept = 16

// holderShare is the part of a promise that its holder counts on, in tenths.
// The rest is for clocks that do not run alike: up to 5 % off each.
const holderShare = 9

// wantsPromises says whether this segment is being read. One that is not needs
// no promises, and a takeover of it need not wait for them to run out.
func (c *Core) wantsPromises() bool {
	return !c.opt.PingsOnly && c.hasRead && c.now-c.readAt <= c.lim.PromiseLength/2
}

// onPong takes a member's answer. What it promised counts from before the ping
// was sent, never from when the answer came.
func (c *Core) onPong(m *member, e Pong) {
	if e.Nonce > m.pinged {
		return // it answers what was not asked
	}
	m.pong = max(m.pong, e.Nonce)
	m.askedAt = c.now // later pings were sent before now, and are as good as new
	if e.Promise <= 0 || c.opt.PingsOnly || e.Nonce <= c.doubted || c.round-e.Nonce >= roundsKept {
		return
	}
	counted := e.Promise / 10 * holderShare
	if Mutant == "no_lease_margin" {
		counted = e.Promise
	}
	m.promised = max(m.promised, c.rounds[e.Nonce%roundsKept]+counted)
}

// covers says whether m's promise stands now, on its present connection.
func (c *Core) covers(m *member) bool {
	return m.link == linkStreaming && c.now < m.promised
}

// doubtClock drops all promises, and those still on their way, when this
// process did not run for a while.
func (c *Core) doubtClock() {
	if c.now-c.lastTick <= c.lim.PromiseLength/2 {
		return
	}
	for _, m := range c.members {
		m.promised = 0
	}
	c.doubted = c.round
}
