package replica

import (
	"errors"

	"github.com/holdfast-storage/holdfast"
)

// append takes entries. On one ordered connection they can only be the next
// ones (R1); anything else is a broken writer, whose connection ends.
func (c *Core) append(e Append) {
	if !c.admit(e.Conn, e.Epoch) {
		c.do(Drop{Batch: e.Batch})
		return
	}
	if e.First != c.handed+1 || e.Last < e.First || e.EntryEpoch > e.Epoch || e.EntryEpoch < c.handedEpoch || c.badSession == c.sess.number {
		c.do(Drop{Batch: e.Batch})
		c.do(CloseConn{Conn: e.Conn})
		return
	}
	c.handed, c.handedEpoch = e.Last, e.EntryEpoch
	c.appends.push(appending{session: c.sess.number, conn: e.Conn, writer: e.Epoch, batch: e.Batch, epoch: e.EntryEpoch, first: e.First, last: e.Last})
	c.do(LogAppend{Batch: e.Batch, First: e.First, Last: e.Last})
}

func (c *Core) appended(e Appended) {
	if c.appends.len() == 0 || c.appends.front().batch != e.Batch {
		return
	}
	a := c.appends.pop()
	if e.Err != nil {
		c.appendFailed(a, e.Err)
		return
	}
	if a.epoch > c.st.TailEpoch {
		c.st.EpochStarts = append(c.st.EpochStarts, EpochStart{Epoch: a.epoch, First: a.first})
	}
	c.st.Tail, c.st.TailEpoch = a.last, a.epoch
	if a.session == c.sess.number && c.sess.step == stepOpen {
		c.do(SendAck{Conn: a.conn, Epoch: a.writer, Tail: c.st.Tail})
	}
}

// appendFailed: a payload that does not match costs the connection; the
// batches handed out behind it cannot be logged and their errors mean nothing.
// Any other error is the disk's (R12).
func (c *Core) appendFailed(a appending, err error) {
	if a.session == c.badSession {
		c.rewindHanded()
		return
	}
	if !errors.Is(err, holdfast.ErrIntegrity) {
		c.fail(err)
		return
	}
	c.badSession = a.session
	c.rewindHanded()
	if a.session == c.sess.number {
		c.do(SendFailed{Conn: c.sess.conn, Epoch: c.sess.epoch, Seq: a.first, Err: err})
		c.do(CloseConn{Conn: c.sess.conn})
		c.leave()
	}
}

func (c *Core) rewindHanded() {
	if c.appends.len() == 0 {
		c.handed, c.handedEpoch = c.st.Tail, c.st.TailEpoch
	}
}

func (c *Core) flush(e Flush) {
	if !c.admit(e.Conn, e.Epoch) {
		return
	}
	if Mutant == "flush_lies" {
		c.do(SendFlushed{Conn: e.Conn, Epoch: e.Epoch, ID: e.ID, Dur: c.st.Tail})
		return
	}
	if c.handed <= c.st.Dur {
		c.do(SendFlushed{Conn: e.Conn, Epoch: e.Epoch, ID: e.ID, Dur: c.st.Dur})
		return
	}
	if len(c.waiters) == maxWaiters {
		c.do(CloseConn{Conn: e.Conn})
		return
	}
	c.waiters = append(c.waiters, waiter{id: e.ID, need: c.handed})
}

// startSync syncs once for all who wait and whose entries have been written.
func (c *Core) startSync() {
	if c.syncing || c.fencing || c.other > 0 || len(c.waiters) == 0 || c.waiters[0].need > c.st.Tail {
		return
	}
	c.syncing = true
	c.syncID++
	c.syncTo = c.st.Tail
	c.do(LogSync{ID: c.syncID})
}

func (c *Core) synced(e Synced) {
	if !c.syncing || e.ID != c.syncID {
		return
	}
	c.syncing = false
	if e.Err != nil {
		c.fail(e.Err)
		return
	}
	// syncTo was lowered if the log was cut meanwhile: what was appended
	// behind the cut is not covered by this sync.
	c.st.Dur = max(c.st.Dur, c.syncTo)
	n := 0
	for n < len(c.waiters) && c.waiters[n].need <= c.st.Dur {
		c.do(SendFlushed{Conn: c.sess.conn, Epoch: c.sess.epoch, ID: c.waiters[n].id, Dur: c.st.Dur})
		n++
	}
	c.waiters = append(c.waiters[:0], c.waiters[n:]...)
}
