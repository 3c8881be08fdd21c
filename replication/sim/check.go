package sim

import (
	"fmt"
	"math"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/replication/coordinator"
)

// stamp orders what clients did: every invocation and every completion has its own.
type stamp int64

const never stamp = math.MaxInt64

// cluster is one written value of one block in one era, with every read that
// returned it. Zones after Gibbons and Korach, "Testing shared memories" (SIAM
// J. Comput. 26, 1997): with unique values, a register's history is
// linearizable if and only if no two forward zones overlap and no backward zone
// lies within a forward one.
type cluster struct {
	v        value
	begin    stamp // the write's invocation
	ack      stamp // its completion, or never
	flushed  bool
	minEnd   stamp // of the write and its reads
	maxBegin stamp
}

func (c *cluster) forward() bool { return c.minEnd < c.maxBegin }
func (c *cluster) zone() (lo, hi stamp) {
	return min(c.minEnd, c.maxBegin), max(c.minEnd, c.maxBegin)
}

// era is the time between two lossy activations: within it nothing
// acknowledged may be lost. What the next era starts from may be any value from
// the last flushed one on (C4), but then it is that value.
type era struct {
	block [blocks]map[value]*cluster
	order [blocks][]*cluster
	first [blocks]*cluster // what the block held when the era began, once known
}

// checker judges the promises C1 to C5 by what clients were told.
type checker struct {
	w         *world
	clock     stamp
	eras      []*era
	eraByEp   map[holdfast.Epoch]int
	activeAt  map[holdfast.Epoch]stamp
	newest    holdfast.Epoch
	values    value
	failure   string
	completed int
	readsSeen int
	lossy     int
	epochs    int
}

func newChecker(w *world) *checker {
	c := &checker{w: w, eraByEp: map[holdfast.Epoch]int{}, activeAt: map[holdfast.Epoch]stamp{}}
	c.newEra()
	for b := range blocks {
		c.eras[0].setFirst(b, &cluster{begin: -1, ack: -1, flushed: true, minEnd: -1, maxBegin: -1})
	}
	return c
}

func (c *checker) newEra() {
	e := &era{}
	for b := range blocks {
		e.block[b] = map[value]*cluster{}
	}
	c.eras = append(c.eras, e)
}

func (e *era) setFirst(b int, cl *cluster) {
	e.first[b] = cl
	e.add(b, cl)
}

func (e *era) add(b int, cl *cluster) {
	e.block[b][cl.v] = cl
	e.order[b] = append(e.order[b], cl)
}

func (c *checker) fail(format string, args ...any) {
	if c.failure == "" {
		c.failure = fmt.Sprintf(format, args...)
		c.w.log("VIOLATION: %s", c.failure)
	}
}

func (c *checker) eraOf(ep holdfast.Epoch) int { return c.eraByEp[ep] }

// activate notes that raft recorded an activation. A lossy one is allowed only
// if every in-sync member lost its memory, or was out of reach for T_wait (C2).
func (c *checker) activate(ep holdfast.Epoch, continuous bool, r *register) {
	c.epochs++
	if !continuous {
		c.lossy++
		for _, id := range r.isr {
			n := c.w.nodeOf(id)
			kept := n.up && n.disk.mem.intactBoot == n.boot && c.w.now >= n.pausedUntil
			if kept && c.w.ctl.reachedThroughout(n) {
				c.fail("C2: epoch %d activated as lossy although in-sync replica n%d kept its memory and was in reach", ep, n.index)
			}
		}
		c.newEra()
	}
	c.eraByEp[ep] = len(c.eras) - 1
	c.clock++
	c.activeAt[ep] = c.clock
	c.newest = max(c.newest, ep)
}

// op is a client's request.
type op struct {
	id     coordinator.OpID
	kind   opKind
	wr     *writer
	m      mutation
	fua    bool
	begin  stamp
	sample uint64
	values []value
	// covers: for a flush, what was acknowledged before it.
	covers []*cluster
}

func (c *checker) invoke(o *op) {
	c.clock++
	o.begin = c.clock
	e := c.eras[o.wr.era]
	switch o.kind {
	case opWrite:
		c.values++
		o.m.v = c.values
		for b := o.m.first; b < o.m.first+o.m.n; b++ {
			e.add(b, &cluster{v: o.m.v, begin: o.begin, ack: never, minEnd: never, maxBegin: o.begin})
		}
	case opFlush:
		for b := range blocks {
			for _, cl := range e.order[b] {
				if cl.ack < o.begin && !cl.flushed && cl.ack != never {
					o.covers = append(o.covers, cl)
				}
			}
		}
	case opRead:
	}
}

// done judges a successful completion.
func (c *checker) done(o *op) {
	c.clock++
	c.completed++
	e := c.eras[o.wr.era]
	switch o.kind {
	case opWrite:
		for ep, at := range c.activeAt {
			if ep > o.wr.epoch && at < o.begin {
				c.fail("C5: epoch %d acknowledged write %d, which was asked for after epoch %d was active", o.wr.epoch, o.m.v, ep)
			}
		}
		for b := o.m.first; b < o.m.first+o.m.n; b++ {
			cl := e.block[b][o.m.v]
			cl.ack = c.clock
			cl.flushed = cl.flushed || o.fua
			cl.minEnd = min(cl.minEnd, c.clock)
			c.judge(o.wr.era, b, cl)
		}
	case opFlush:
		for _, cl := range o.covers {
			cl.flushed = true
		}
	case opRead:
		c.readsSeen++
		for i, v := range o.values {
			c.sawRead(o, o.m.first+i, v)
		}
	}
}

func (c *checker) sawRead(o *op, b int, v value) {
	e := c.eras[o.wr.era]
	cl := e.block[b][v]
	if cl == nil {
		if why := c.firstMayBe(o.wr.era, b, v); why != "" {
			c.fail("%s: epoch %d read value %d from block %d: %s", map[bool]string{true: "C3/C4", false: "C1"}[o.wr.era > 0], o.wr.epoch, v, b, why)
			return
		}
		cl = e.block[b][v]
	}
	if cl.ack == never {
		c.w.strike(2) // seen, but not promised: the moment to lose it
	}
	cl.minEnd = min(cl.minEnd, c.clock)
	cl.maxBegin = max(cl.maxBegin, o.begin)
	c.judge(o.wr.era, b, cl)
}

// firstMayBe settles that block b held v when the era began, or says why it cannot.
func (c *checker) firstMayBe(era, b int, v value) string {
	if e := c.eras[era]; e.first[b] != nil {
		if e.first[b].v == v {
			return ""
		}
		return fmt.Sprintf("the block held %d when this session's history began, and changed by itself", e.first[b].v)
	}
	if era == 0 {
		return "nobody wrote it"
	}
	before := c.eras[era-1]
	if before.block[b][v] == nil {
		if why := c.firstMayBe(era-1, b, v); why != "" {
			return why
		}
	}
	cl := before.block[b][v]
	for _, other := range before.order[b] {
		if other != cl && other.flushed && cl.ack < other.begin {
			return fmt.Sprintf("value %d was written later and flushed", other.v)
		}
	}
	c.eras[era].setFirst(b, &cluster{v: v, begin: -1, ack: -1, flushed: true, minEnd: -1, maxBegin: -1})
	return ""
}

// judge looks for a contradiction of the cluster's zone with the others.
func (c *checker) judge(era, b int, cl *cluster) {
	if cl.minEnd == never {
		return
	}
	for _, other := range c.eras[era].order[b] {
		if other == cl || other.minEnd == never {
			continue
		}
		if why := conflict(cl, other); why != "" {
			c.fail("C1: block %d is not linearizable: values %d %v and %d %v: %s", b, cl.v, *cl, other.v, *other, why)
			return
		}
	}
}

func conflict(a, b *cluster) string {
	alo, ahi := a.zone()
	blo, bhi := b.zone()
	switch {
	case a.forward() && b.forward():
		if alo < bhi && blo < ahi {
			return "each was seen while the other was"
		}
	case a.forward() && !b.forward():
		if alo < blo && bhi < ahi {
			return fmt.Sprintf("%d came and went while %d was there before and after", b.v, a.v)
		}
	case !a.forward() && b.forward():
		if blo < alo && ahi < bhi {
			return fmt.Sprintf("%d came and went while %d was there before and after", a.v, b.v)
		}
	}
	return ""
}
