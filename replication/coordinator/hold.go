package coordinator

import (
	"time"

	"github.com/holdfast-storage/holdfast"
)

// Two things make requests wait for more than replicas. Below the volume's
// min_copies in sync nothing new is acknowledged, for it would be on fewer copies
// than the user demands; reads go on. And while raft does not answer whether a
// silent member is out, nothing that needs that member goes on, reads included
// (R10). What on_quorum_loss says then, hold for ever or fail after a time, holds
// for both: Options.FailHeldAfter.

// below is since when fewer than min_copies are in sync.
type below struct {
	is    bool
	since time.Duration
}

// inSyncCount is the size of raft's in-sync set as far as known.
func (c *Core) inSyncCount() int {
	n := 0
	for _, m := range c.members {
		if m.inISR {
			n++
		}
	}
	return n
}

// lookBelow notes when the in-sync set falls below min_copies and when it is
// enough again.
func (c *Core) lookBelow() {
	low := c.inSyncCount() < c.opt.MinCopies
	if low == c.below.is {
		return
	}
	c.below = below{low, c.now}
	if low {
		c.notice(NoticeHold, nil, true, "%d in-sync copies, fewer than min_copies %d: writes are held", c.inSyncCount(), c.opt.MinCopies)
	} else {
		c.notice(NoticeRelease, nil, false, "%d in-sync copies: writes go on", c.inSyncCount())
	}
}

// raftWait is how long raft has owed the word that a silent member is out.
func (c *Core) raftWait() time.Duration {
	if c.command == nil || c.command.kind != CommandShrink {
		return 0
	}
	return c.now - c.command.since
}

// flushable is up to where a flush may be answered: what is durable on every
// ackset member, but below min_copies only what was so before.
func (c *Core) flushable() holdfast.Seq {
	if !c.below.is {
		c.safe = c.commit
	}
	return c.safe
}

// failHeld gives up waiting: requests that are held for longer than the policy
// allows fail. A write that has its place stays in the window and may take effect
// later, like any write that was never answered.
func (c *Core) failHeld() {
	limit := c.opt.FailHeldAfter
	low := c.below.is && c.now-c.below.since >= limit
	deaf := c.raftWait() >= limit
	if limit == 0 || !low && !deaf {
		return
	}
	err := holdfast.Errorf(holdfast.ErrUnavailable, "raft has no quorum to take a silent replica out").
		WithRemedy("bring back a majority of the voters; on_quorum_loss says how long requests wait")
	if low {
		err = holdfast.Errorf(holdfast.ErrUnavailable, "%d in-sync copies are fewer than min_copies %d", c.inSyncCount(), c.opt.MinCopies).
			WithRemedy("bring back the nodes of the others, or lower min_copies; on_quorum_loss says how long requests wait")
	}
	for s := c.acked + 1; s <= c.win.last; s++ {
		c.answer(c.win.at(s), err)
	}
	for c.waiting.len() > 0 {
		c.do(CompleteWrite{ID: c.waiting.pop().ID, Err: err})
	}
	for c.waits.len() > 0 {
		c.finish(c.waits.pop(), err)
	}
	kept := c.reads[:0]
	for _, r := range c.reads {
		// A read just taken may be on its way; one that overlaps a held write, or
		// waits for the silent member, is not.
		if r.step == readSampling || low && !deaf && r.step == readConfirm || c.now-r.since < c.lim.Tick {
			kept = append(kept, r)
			continue
		}
		c.do(CompleteRead{ID: r.id, Err: err})
		c.freeReads = append(c.freeReads, r)
	}
	clear(c.reads[len(kept):])
	c.reads = kept
}

// answer completes the write of an entry, once.
func (c *Core) answer(e *entry, err error) {
	if !e.answered {
		e.answered = true
		c.do(CompleteWrite{ID: e.id, Err: err})
	}
}

// finish completes a flush, or a write that waited to be durable.
func (c *Core) finish(w wait, err error) {
	if w.write {
		c.do(CompleteWrite{ID: w.id, Err: err})
	} else {
		c.do(CompleteFlush{ID: w.id, Err: err})
	}
}
