package coordinator

import (
	"math/bits"
	"slices"
	"time"
)

// A member that answers, but far slower than the others, makes every write as slow
// as itself: fail-slow disks are as common as dead ones, and worse to live with.
// It is measured against its cohort, not against a clock: on a host where all are
// slow nobody is put out.
const (
	// slowFactor is how many times the others' median makes a member slow, and
	// slowLeast the median below which nobody is: what users do not feel is left
	// alone.
	slowFactor = 10
	slowLeast  = 100 * time.Millisecond
	// slowWindows is how many windows in a row make it certain.
	slowWindows = 3
	// firstHoldDown and lastHoldDown bound how long a member that was put out for
	// slowness, or for its full disk, stays out; it doubles each time, so that a disk
	// that is slow on and off does not cost a resync each time.
	firstHoldDown = time.Minute
	lastHoldDown  = 64 * time.Minute
)

// latency counts durations in steps of a quarter of a power of two, so that a
// median is known to 20 % from 512 bytes.
type latency struct {
	n      uint32
	counts [128]uint32
}

func (l *latency) add(d time.Duration) {
	us := uint64(max(d, 0) / time.Microsecond)
	l.n++
	l.counts[step(us)]++
}

// step is 4 log2(us), rounded down, at most the last.
func step(us uint64) int {
	if us < 4 {
		return int(us)
	}
	power := bits.Len64(us) - 1
	return min(4*(power-1)+int(us>>(power-2)&3), 127)
}

// floorOf is the least duration that step counts at i.
func floorOf(i int) time.Duration {
	if i < 4 {
		return time.Duration(i) * time.Microsecond
	}
	power := i/4 + 1
	return time.Duration((4+uint64(i%4))<<(power-2)) * time.Microsecond
}

// median returns a lower bound of it, zero without samples.
func (l *latency) median() time.Duration {
	var below uint32
	for i, n := range l.counts {
		if below += n; n > 0 && 2*below >= l.n {
			return floorOf(i)
		}
	}
	return 0
}

// pace is how fast a member was in the present window: at taking writes, and at
// making them durable.
type pace struct {
	acks, flushes latency
	strikes       int           // windows in a row in which it was slow
	holdDown      time.Duration // the last one
	until         time.Duration // it is not brought back before this
}

// lookPace ends a window: who was slow three times in a row is put out, if enough
// others remain.
func (c *Core) lookPace() {
	if c.now-c.paceFrom < c.lim.SlowWindow {
		return
	}
	c.paceFrom = c.now
	for _, m := range c.members {
		if !m.inAckset {
			m.pace.strikes = 0
			continue
		}
		acks, others := c.compare(m, func(p *pace) *latency { return &p.acks })
		slow := isSlow(acks, others)
		if !slow {
			acks, others = c.compare(m, func(p *pace) *latency { return &p.flushes })
			slow = isSlow(acks, others)
		}
		if !slow {
			m.pace.strikes = 0
			continue
		}
		m.pace.strikes++
		c.notice(NoticeSlow, m, true, "median %v, the others' %v, %d windows in a row", acks, others, m.pace.strikes)
		if m.pace.strikes >= slowWindows && m.inISR && !m.evicting && c.stayingCount() > max(1, c.opt.MinCopies) && c.otherHealthy(m) {
			m.pace.strikes = 0
			m.holdDown(c.now)
			m.evicting = true
			c.notice(NoticeEvicting, m, true, "slow for %d windows: out for %v at least", slowWindows, m.pace.holdDown)
		}
	}
	c.freshPace()
}

// stayingCount is the size of the in-sync set without those that are on their way
// out of it: raft takes one at a time.
func (c *Core) stayingCount() int {
	n := 0
	for _, m := range c.members {
		if m.inISR && !m.evicting {
			n++
		}
	}
	return n
}

func isSlow(median, others time.Duration) bool {
	return median >= slowLeast && others > 0 && median >= slowFactor*others
}

// compare returns m's median and the median of the other ackset members' medians;
// zero where there were too few samples.
func (c *Core) compare(m *member, of func(*pace) *latency) (own, others time.Duration) {
	var medians []time.Duration
	for _, o := range c.members {
		l := of(&o.pace)
		if !o.inAckset || int(l.n) < c.lim.SlowSamples {
			continue
		}
		if o == m {
			own = l.median()
		} else {
			medians = append(medians, max(l.median(), time.Microsecond))
		}
	}
	if len(medians) > 0 {
		slices.Sort(medians)
		// Of two, the slower one: a member that is as fast as another is not slow,
		// however near the third is to the writer.
		others = medians[len(medians)/2]
	}
	return own, others
}

// freshPace begins a window anew: after a stall of this process nothing measured
// says anything of others.
func (c *Core) freshPace() {
	c.paceFrom = c.now
	for _, m := range c.members {
		m.pace.acks, m.pace.flushes = latency{}, latency{}
	}
}

// holdDown keeps m out for a while once it is out.
func (m *member) holdDown(now time.Duration) {
	m.pace.holdDown = min(max(2*m.pace.holdDown, firstHoldDown), lastHoldDown)
	m.pace.until = now + m.pace.holdDown
}

// heldDown says whether m is kept out for its slowness, or a full disk. One that is needed, since
// too few are in sync, is not.
func (c *Core) heldDown(m *member) bool {
	return c.now < m.pace.until && c.inSyncCount() > 1 && !c.below.is
}
