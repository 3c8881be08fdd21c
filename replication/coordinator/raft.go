package coordinator

import (
	"time"

	"github.com/holdfast-storage/holdfast"
)

// command is the one raft command that may be outstanding. It is proposed
// until its outcome is definite: a command without an answer may be applied
// later, so that nothing may be concluded from silence.
type command struct {
	kind    Command
	replica *member
	isr     []holdfast.ReplicaID
	version holdfast.ISRVersion
	since   time.Duration
	id      uint64 // of the proposal outstanding; 0: to be proposed (again)
}

func (c *Core) propose(cmd command) {
	cmd.version, cmd.since = c.isrVersion, c.now
	c.command = &cmd
	c.sendProposal()
}

func (c *Core) sendProposal() {
	cmd := c.command
	c.proposals++
	cmd.id = c.proposals
	c.proposedAt = c.now
	p := Propose{ID: cmd.id, Command: cmd.kind, Epoch: c.opt.Epoch, ISRVersion: cmd.version, Commit: c.commit}
	if cmd.kind == CommandActivate {
		p.S, p.ISR, p.Continuous = c.s, cmd.isr, c.continuous
	} else {
		p.Replica = cmd.replica.ID
	}
	c.do(p)
}

// pumpRaft asks raft for what is wanted next, and again for what had no answer.
func (c *Core) pumpRaft() {
	if c.metaWant && !c.metaBusy && c.now >= c.metaAt {
		c.metaWant, c.metaBusy = false, true
		c.proposals++
		c.metaID = c.proposals
		c.do(ReadMeta{ID: c.metaID})
	}
	if c.command != nil {
		if c.command.id == 0 && !c.metaWant && !c.metaBusy && c.now-c.proposedAt >= c.lim.RetryRaft {
			c.sendProposal()
		}
		return
	}
	if c.phase != PhaseActive && c.phase != PhaseDetaching || c.metaWant || c.metaBusy {
		return
	}
	for _, m := range c.members {
		if m.evicting && !m.inISR {
			c.dropFromAckset(m) // raft does not count it, and no Grow is on its way
			continue
		}
		if m.evicting {
			if !c.otherHealthy(m) {
				m.evicting = false // nobody would remain: hold, and look again
				continue
			}
			c.propose(command{kind: CommandShrink, replica: m})
			return
		}
	}
	for _, m := range c.members {
		if c.mayGrow(m) {
			c.propose(command{kind: CommandGrow, replica: m})
			return
		}
	}
}

func (c *Core) onProposed(e Proposed) {
	cmd := c.command
	if cmd == nil || cmd.id == 0 || e.ID != cmd.id {
		return
	}
	cmd.id = 0
	switch e.Outcome {
	case OutcomeApplied:
		c.command = nil
		c.applied(cmd, e.ISRVersion)
	case OutcomeFenced:
		c.end(EndFenced, nil)
	case OutcomeRefused:
		if cmd.kind == CommandActivate {
			c.end(EndReplicaRegression, nil)
			return
		}
		c.command = nil
		c.readMeta()
		c.metaAt = c.now + c.lim.RetryRaft
	case OutcomeConflict, OutcomeUnknown:
		// Keep holding; find out first.
		c.readMeta()
	}
}

func (c *Core) readMeta() {
	c.metaWant = true
	c.metaAt = c.now
}

// applied draws the consequences of a command that raft has taken.
func (c *Core) applied(cmd *command, version holdfast.ISRVersion) {
	switch cmd.kind {
	case CommandActivate:
		c.activated(version, cmd.isr)
	case CommandShrink:
		c.isrVersion = version
		c.dropFromAckset(cmd.replica)
	case CommandGrow:
		c.isrVersion = version
		cmd.replica.inISR = true
		if Mutant == "add_raft_first" {
			cmd.replica.inAckset = true
		}
		c.notice(NoticeInSync, cmd.replica, false, "in sync; isr version %d", version)
		c.setAckMode()
		c.lookBelow()
	}
}

// onMeta takes raft's record, read linearizably after an unknown outcome or a
// sign of a higher epoch.
func (c *Core) onMeta(e Meta) {
	if !c.metaBusy || e.ID != c.metaID {
		return
	}
	c.metaBusy = false
	if e.Err != nil {
		c.metaWant, c.metaAt = true, c.now+c.lim.RetryRaft
		return
	}
	if e.Epoch > c.opt.Epoch {
		c.sawHigher = max(c.sawHigher, e.Epoch)
		c.end(EndFenced, nil)
		return
	}
	if e.Epoch < c.opt.Epoch || c.sawHigher > c.opt.Epoch {
		c.sawHigher, c.metaEpoch = max(c.sawHigher, c.opt.Epoch), e.Epoch
		c.end(EndMetadataRegression, nil)
		return
	}
	has := func(m *member) bool {
		for _, id := range e.ISR {
			if id == m.ID {
				return true
			}
		}
		return false
	}
	if c.phase == PhaseActivating {
		switch {
		case e.Activated:
			c.command = nil
			c.activated(e.ISRVersion, e.ISR)
		case e.ISRVersion != c.isrVersion:
			// The set changed under us before we were active. Another S in this
			// epoch must not be tried while the first may still be applied.
			c.end(EndChanged, nil)
		}
		return
	}
	if c.phase != PhaseActive && c.phase != PhaseDetaching || e.ISRVersion == c.isrVersion {
		return // not applied yet; the command, if any, is proposed again
	}
	c.command = nil
	c.isrVersion = e.ISRVersion
	for _, m := range c.members {
		switch {
		case has(m) && !m.inISR:
			m.inISR = true
			m.inAckset = true
			c.notice(NoticeInSync, m, false, "in sync; isr version %d", e.ISRVersion)
		case !has(m) && m.inISR:
			c.dropFromAckset(m)
		}
	}
	c.setAckMode()
	c.lookBelow()
}

// suspectHigher: a replica knows an epoch above ours. Either a newer writer
// was admitted, or the metadata went backwards; raft tells which.
func (c *Core) suspectHigher(epoch holdfast.Epoch) {
	c.sawHigher = max(c.sawHigher, epoch)
	if !c.metaBusy && !c.metaWant {
		c.readMeta()
	}
}

// onRefused: a member accepted a higher epoch. An active writer is over at
// once; one that is still attaching asks raft what that means.
func (c *Core) onRefused(e Refused) {
	m := c.from(e.Replica, e.Conn)
	if m == nil || e.Fence <= c.opt.Epoch {
		return
	}
	c.sawHigher = max(c.sawHigher, e.Fence)
	if c.phase == PhaseActive || c.phase == PhaseDetaching {
		c.end(EndFenced, nil)
		return
	}
	c.suspectHigher(e.Fence)
}
