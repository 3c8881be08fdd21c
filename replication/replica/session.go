package replica

import (
	"github.com/holdfast-storage/holdfast"
)

// fence takes FENCE, or holds it back while a promise stands, or may stand from
// before a restart.
func (c *Core) fence(e Fence) {
	switch {
	case c.failed != nil:
		c.do(SendFailed{Conn: e.Conn, Epoch: e.Epoch, Err: c.failed})
		c.do(CloseConn{Conn: e.Conn})
	case e.Epoch < c.accepted:
		c.do(SendRefused{Conn: e.Conn, Fence: c.accepted})
		c.do(CloseConn{Conn: e.Conn})
	case e.Epoch > c.accepted && c.now < c.promised:
		if c.held != nil && c.held.Conn != e.Conn {
			older := *c.held
			if e.Epoch < older.Epoch {
				c.do(CloseConn{Conn: e.Conn})
				return
			}
			c.do(CloseConn{Conn: older.Conn})
		}
		c.held, c.heldAt = &e, c.now
	default:
		c.accept(e)
	}
}

func (c *Core) releaseHeld() {
	if c.held == nil || c.now < c.promised {
		return
	}
	e := *c.held
	c.held = nil
	c.fence(e)
}

// accept makes e's connection the session. From here on nothing of a lower
// epoch, and nothing of an older connection, changes or learns anything.
func (c *Core) accept(e Fence) {
	old := c.sess
	c.leave()
	if old.step != stepNone && old.conn != e.Conn && Mutant != "no_fence" {
		if old.epoch < e.Epoch {
			c.do(SendRefused{Conn: old.conn, Fence: e.Epoch})
		}
		c.do(CloseConn{Conn: old.conn})
	}
	c.accepted = e.Epoch
	c.sessions++
	c.sess = session{number: c.sessions, conn: e.Conn, epoch: e.Epoch, step: stepFencing}
	c.since = c.now
}

// leave forgets the session and what waits on its behalf.
func (c *Core) leave() {
	for _, f := range c.fetches {
		c.do(DropRead{Conn: f.conn, ID: f.id})
	}
	c.fetches = c.fetches[:0]
	c.waiters = c.waiters[:0]
	c.wholeWant = false
	c.sess = session{}
	c.since = c.now
}

func (c *Core) fenced(e Fenced) {
	if !c.fencing {
		return
	}
	c.fencing = false
	if e.Err != nil {
		c.fail(e.Err)
		return
	}
	if Mutant != "no_fence" {
		c.st.Fence = c.fenceFor
	}
	c.st.Dur = c.st.Tail // the seal
	c.syncTo = min(c.syncTo, c.st.Tail)
	if c.sess.step == stepFencing && c.sess.epoch == c.fenceFor && c.sess.conn == c.fenceConn {
		c.move(stepFenced)
		c.do(SendFenceOK{Conn: c.sess.conn, Epoch: c.sess.epoch, Status: c.Status()})
	}
}

func (c *Core) move(s step) { c.sess.step, c.since = s, c.now }

// open takes OPEN and JOIN.
func (c *Core) open(conn Conn, epoch holdfast.Epoch, isr holdfast.ISRVersion, w openWork) {
	if epoch < c.accepted {
		c.do(SendRefused{Conn: conn, Fence: c.accepted})
		return
	}
	if c.failed != nil || conn != c.sess.conn || epoch != c.sess.epoch || c.sess.step != stepFenced {
		return
	}
	if !w.rebase && c.st.Syncing {
		// The tail of a copy in the making proves nothing: only JOIN may go on.
		c.do(CloseConn{Conn: conn})
		return
	}
	if !w.rebase && w.to < c.st.Commit {
		// What was committed is in the base, or on its way: no true writer cuts it.
		c.do(SendFailed{Conn: conn, Epoch: epoch, Err: holdfast.Errorf(holdfast.ErrRefused, "a cut to %d below commit %d", w.to, c.st.Commit)})
		c.do(CloseConn{Conn: conn})
		c.leave()
		return
	}
	if epoch > c.st.HintEpoch || epoch == c.st.HintEpoch && isr > c.st.HintISR {
		c.st.HintEpoch, c.st.HintISR = epoch, isr
		c.do(LogHint{Epoch: epoch, ISR: isr})
	}
	w.session = c.sess.number
	c.opening = w
	c.move(stepOpening)
	switch {
	case w.rebase:
		c.other++
		c.rebasing = true
		c.do(LogRebase{Epoch: epoch, To: w.to})
	case w.to < c.st.Tail:
		c.other++
		c.do(LogTruncate{To: w.to})
	default:
		c.openDone()
	}
}

func (c *Core) opened(e Opened) {
	if c.other == 0 {
		return
	}
	c.other--
	c.rebasing = false
	if e.Err != nil {
		c.fail(e.Err)
		return
	}
	w := c.opening
	if w.rebase {
		if !c.st.Syncing {
			c.st.Held = e.Held
			if c.st.Lost > 0 {
				c.st.Held = min(c.st.Held, c.st.Lost-1) // the base is not whole beyond
			}
		}
		c.st.Syncing, c.st.Intact, c.st.Lost = true, false, 0
		c.st.Tail, c.st.Dur = w.to, w.to
		c.st.Applied, c.st.Checkpoint = w.to, w.to
		c.st.TailEpoch = c.st.Fence
		c.st.EpochStarts = append(c.st.EpochStarts[:0], EpochStart{Epoch: c.st.Fence, First: w.to})
		c.st.Commit = min(c.st.Commit, w.to)
		c.commitGot = c.st.Commit
		c.syncTo = 0
	} else {
		c.cut(w.to)
	}
	c.handed, c.handedEpoch = c.st.Tail, c.st.TailEpoch
	if c.sess.number == w.session && c.sess.step == stepOpening {
		c.openDone()
	}
}

// cut mirrors a truncation of the log.
func (c *Core) cut(to holdfast.Seq) {
	c.st.Tail = to
	if c.st.Lost > to {
		c.st.Lost = 0
	}
	c.st.Dur = min(c.st.Dur, to)
	c.syncTo = min(c.syncTo, to)
	starts := c.st.EpochStarts
	for len(starts) > 0 && starts[len(starts)-1].First > to {
		starts = starts[:len(starts)-1]
	}
	c.st.EpochStarts = starts
	c.st.TailEpoch = 0
	if len(starts) > 0 && to > 0 {
		c.st.TailEpoch = starts[len(starts)-1].Epoch
	}
}

func (c *Core) openDone() {
	c.sess.joined, c.sess.joinAt = c.opening.rebase, c.opening.to
	c.move(stepOpen)
	c.do(SendOpened{Conn: c.sess.conn, Epoch: c.sess.epoch, Tail: c.st.Tail, Dur: c.st.Dur, Held: c.st.Held})
}
