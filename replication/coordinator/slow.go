package coordinator

import (
	"slices"
	"time"

	"github.com/holdfast-storage/holdfast/replication/latency"
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

// pace is how fast a member was in the present window: at taking writes, and at
// making them durable.
type pace struct {
	acks, flushes latency.Histogram
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
		acks, others := c.compare(m, func(p *pace) *latency.Histogram { return &p.acks })
		slow := isSlow(acks, others)
		if !slow {
			acks, others = c.compare(m, func(p *pace) *latency.Histogram { return &p.flushes })
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
func (c *Core) compare(m *member, of func(*pace) *latency.Histogram) (own, others time.Duration) {
	var medians []time.Duration
	for _, o := range c.members {
		l := of(&o.pace)
		if !o.inAckset || l.N() < c.lim.SlowSamples {
			continue
		}
		if o == m {
			own = l.Median()
		} else {
			medians = append(medians, max(l.Median(), time.Microsecond))
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
		m.pace.acks, m.pace.flushes = latency.Histogram{}, latency.Histogram{}
	}
}

// holdDown keeps m out for a while once it is out.
func (m *member) holdDown(now time.Duration) {
	m.pace.holdDown = min(max(2*m.pace.holdDown, firstHoldDown), lastHoldDown)
	m.pace.until = now + m.pace.holdDown
}

// heldDown says whether m is kept out for its slowness, or a full disk. One that
// is needed, since too few are in sync, is not.
func (c *Core) heldDown(m *member) bool {
	return c.now < m.pace.until && c.inSyncCount() > 1 && !c.below.is
}
