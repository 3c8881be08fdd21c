package coordinator

import (
	"fmt"
	"time"
)

// Explain says what this writer waits for, and since when.
func (c *Core) Explain() []Wait {
	var w []Wait
	add := func(since time.Duration, format string, args ...any) {
		w = append(w, Wait{For: fmt.Sprintf(format, args...), Since: since})
	}
	switch c.phase {
	case PhaseEnded:
		return nil
	case PhaseFencing:
		if c.nobodyLeft() {
			add(c.attachAt, "NO_IN_SYNC_REPLICA: every in-sync replica is on a node that is gone, or damaged; see holdfast volume salvage for what else there is")
		}
		for _, m := range c.members {
			if m.inISR && !m.answered {
				add(c.attachAt, "the answer of in-sync replica %v on node %v (%s%s)", m.ID, m.Node, linkNames[m.link], goneText(m))
			}
			if m.inISR && m.answered && m.status.Damaged {
				add(c.attachAt, "another in-sync replica: the log of %v is damaged", m.ID)
			} else if m.inISR && m.answered && !c.vouches(m) {
				add(c.attachAt, "an intact answer: replica %v holds %d but may have lost acknowledged writes", m.ID, m.eff)
			}
		}
	case PhaseOpening:
		for _, m := range c.members {
			if m.inISR && !m.confirmed && c.sound(m) {
				add(c.phaseSince, "replica %v to hold %d durably (has %d, durable %d)", m.ID, c.s, m.tail, m.dur)
			}
		}
	case PhaseDetaching:
		add(c.phaseSince, "everything to be durable before the detach (tail %d, commit %d, %d reads)", c.win.last, c.commit, len(c.reads))
	case PhaseActivating, PhaseActive:
	}
	if c.command != nil {
		add(c.proposedAt, "raft to answer %s at isr version %d", c.command.kind, c.command.version)
	}
	if c.metaBusy || c.metaWant {
		add(c.metaAt, "a linearizable read of the segment's record")
	}
	if c.phase == PhaseActive || c.phase == PhaseDetaching {
		c.explainData(add)
	}
	return w
}

// nobodyLeft says whether no in-sync member could carry S as things stand.
func (c *Core) nobodyLeft() bool {
	for _, m := range c.members {
		if m.inISR && (m.answered && !m.status.Damaged && !m.status.Syncing || !m.answered && !m.gone) {
			return false
		}
	}
	return true
}

func goneText(m *member) string {
	if m.gone {
		return ", node gone"
	}
	return ""
}

func (c *Core) explainData(add func(time.Duration, string, ...any)) {
	if c.below.is {
		add(c.below.since, "%d in-sync copies (%d now): writes are held", c.opt.MinCopies, c.inSyncCount())
	}
	for _, m := range c.members {
		if m.inAckset && c.acked < c.win.last && m.tail <= c.acked {
			since := c.now
			if c.acked+1 >= c.win.first {
				since = c.win.at(c.acked + 1).at
			}
			add(since, "replica %v (%s) to acknowledge write %d", m.ID, linkNames[m.link], c.acked+1)
		}
		if m.Leaving && m.inISR && !m.evicting {
			add(c.now, "enough other in-sync copies before replica %v, which is to go, is taken out", m.ID)
		}
		if m.evicting {
			add(m.lastHeard, "replica %v to be taken out of the in-sync set", m.ID)
		}
		if c.heldDown(m) {
			add(c.now, "the end of the hold-down of replica %v, which was slow or full (%v left)", m.ID, m.pace.until-c.now)
		}
		if !m.inAckset && m.link != linkDown {
			add(m.lastHeard, "replica %v to be brought back (%s, at %d of %d)", m.ID, linkNames[m.link], m.tail, c.win.last)
		}
		if c.waits.len() > 0 && m.inAckset && m.dur < c.waits.front().target {
			add(c.waits.front().since, "replica %v to be durable up to %d (is %d)", m.ID, c.waits.front().target, m.dur)
		}
	}
	if c.room.full {
		add(c.room.fullAt, "room on a disk: writes that need new space fail (%d so far)", c.room.refused)
	}
	if c.waiting.len() > 0 && c.room.asking == c.waiting.front().ID {
		for _, m := range c.members {
			if m.inAckset && !m.credit.answered {
				add(c.room.since, "replica %v (%s) to say whether its disk has room for a write", m.ID, linkNames[m.link])
			}
		}
	} else if c.waiting.len() > 0 {
		add(c.now, "room in the replay window for %d writes (%d operations, %d bytes)", c.waiting.len(), c.win.len(), c.win.bytes)
	}
	if len(c.reads) > 0 {
		r := c.reads[0]
		switch r.step {
		case readBefore, readAfter:
			add(r.since, "write %d, which overlaps a read, to be acknowledged, or a member to read from", r.overlap)
		case readSampling:
			add(r.since, "replica %v to answer a read", r.source.ID)
		case readConfirm:
			for _, m := range c.members {
				if m.inAckset && m != r.source && m.pong < r.round && !c.covers(m) {
					add(r.since, "replica %v (%s) to confirm that no other writer exists", m.ID, linkNames[m.link])
				}
			}
		}
	}
}

// State returns a summary for people.
func (c *Core) State() State {
	ack := c.opt.Ack
	if ack == "" {
		ack = "received"
	}
	if c.durable {
		ack = "durable"
	}
	s := State{Phase: c.phase, Epoch: c.opt.Epoch, ISRVersion: c.isrVersion, S: c.s, Tail: c.win.last, Acked: c.acked, Commit: c.commit, Ack: ack, Refused: c.room.refused}
	for _, m := range c.members {
		link := linkNames[m.link]
		switch {
		case m.joining && m.streaming():
			link = "copying"
		case m.streaming() && m.tail < c.acked:
			link = "replaying"
		}
		s.Members = append(s.Members, MemberState{
			Replica: m.ID, Node: m.Node, Role: m.Role, Link: link, InSync: m.inISR, InAckset: m.inAckset,
			Tail: m.tail, Dur: m.dur, CopyDone: m.copyDone, CopyTotal: m.copyTotal, Credit: m.credit.chunks, Promised: max(0, m.promised-c.now),
		})
	}
	return s
}
