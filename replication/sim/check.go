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
	epoch    holdfast.Epoch // the session's that wrote it
	begin    stamp          // the write's invocation
	ack      stamp          // its completion, or never
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
	// salvaged: an operator chose what the era goes on from, and accepted any loss.
	salvaged bool
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

	// order is the one order of all that was written and may be there still: every
	// entry that a writer gave its place to, cut at the start of each later epoch.
	order  []logEntry
	starts map[holdfast.Epoch][blocks]value // what each session began with, by it
}

func newChecker(w *world) *checker {
	c := &checker{w: w, eraByEp: map[holdfast.Epoch]int{}, activeAt: map[holdfast.Epoch]stamp{}, starts: map[holdfast.Epoch][blocks]value{}}
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
func (c *checker) activate(ep holdfast.Epoch, s holdfast.Seq, continuous bool, r *register) {
	c.epochs++
	if !continuous {
		c.lossy++
		for _, id := range r.isr() {
			n := c.w.nodeOf(id)
			kept := !r.salvaged && n.up && n.disk != nil && !n.disk.mem.st.Damaged && n.disk.mem.intactBoot == n.boot && c.w.now >= n.pausedUntil
			if kept && c.w.ctl.reachedThroughout(n) {
				c.fail("C2: epoch %d activated as lossy although in-sync replica n%d kept its memory and was in reach", ep, n.index)
			}
		}
		c.newEra()
		c.eras[len(c.eras)-1].salvaged = r.salvaged
	}
	if s > holdfast.Seq(len(c.order)) {
		c.fail("C4: epoch %d starts behind %d, but only %d entries were written", ep, s, len(c.order))
		return
	}
	c.order = c.order[:s]
	c.starts[ep] = c.state(s)
	c.eraByEp[ep] = len(c.eras) - 1
	c.clock++
	c.activeAt[ep] = c.clock
	c.newest = max(c.newest, ep)
}

// placed notes that a writer gave a mutation its place. What a writer orders that
// has been replaced is in no order that counts.
func (c *checker) placed(ep holdfast.Epoch, s holdfast.Seq, m mutation) {
	if ep != c.newest {
		return
	}
	if s != holdfast.Seq(len(c.order)+1) {
		c.fail("epoch %d gave place %d, want %d", ep, s, len(c.order)+1)
		return
	}
	c.order = append(c.order, logEntry{epoch: ep, seq: s, m: m})
}

// state is what every block holds by the first s entries of the order.
func (c *checker) state(s holdfast.Seq) (out [blocks]value) {
	for _, e := range c.order[:s] {
		for b := e.m.first; b < e.m.first+e.m.n; b++ {
			out[b] = e.m.v
		}
	}
	return out
}

// atRest compares the in-sync replicas of a volume that was just detached with
// the order: each must be its log's prefix, base and log, and end where the volume does.
func (c *checker) atRest(r *register) {
	for _, id := range r.isr() {
		n := c.w.nodeOf(id)
		m := &n.disk.mem
		if m.st.Damaged {
			continue // its log fell ill since, and tells so
		}
		if m.st.Tail != r.end || m.st.Applied > m.st.Tail {
			c.fail("at rest: in-sync n%d ends at %d, its base at %d; the volume was detached at %d", n.index, m.st.Tail, m.st.Applied, r.end)
			return
		}
		for _, e := range m.log {
			if e != c.order[e.seq-1] {
				c.fail("at rest: in-sync n%d has logged %+v, the order is %+v", n.index, e, c.order[e.seq-1])
			}
		}
		want := c.state(r.end)
		for k := range chunks {
			asOf := max(m.st.Applied, m.v[k])
			base := c.state(asOf)
			for b := k * blocksPerChunk; b < (k+1)*blocksPerChunk; b++ {
				if m.lost(b) {
					continue // lost, and says so
				}
				if got := m.block(b); got != want[b] {
					c.fail("at rest: block %d of in-sync n%d is %d, by the order %d", b, n.index, got, want[b])
				}
				if !m.poison[b] && m.base[b] != base[b] && !c.wroteBehind(asOf, b, m.base[b]) {
					c.fail("at rest: the base of in-sync n%d holds %d in block %d as of %d, by the order %d", n.index, m.base[b], b, asOf, base[b])
				}
			}
		}
	}
}

// wroteBehind says whether an entry behind s put v into block b: it may have been
// written back to the base before the power failed, and the word of it lost.
func (c *checker) wroteBehind(s holdfast.Seq, b int, v value) bool {
	for _, e := range c.order[s:] {
		if e.m.v == v && e.m.first <= b && b < e.m.first+e.m.n {
			return true
		}
	}
	return false
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
			e.add(b, &cluster{v: o.m.v, epoch: o.wr.epoch, begin: o.begin, ack: never, minEnd: never, maxBegin: o.begin})
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
	if first := c.starts[o.wr.epoch][b]; v != first && (cl == nil || cl.epoch != o.wr.epoch) {
		// A write of an older session takes effect before this one's first read,
		// or never; and what survives is a prefix of one order over all blocks.
		c.fail("C1/C4: epoch %d read value %d from block %d, which it did not write; by the order of all writes the block held %d when it began", o.wr.epoch, v, b, first)
		return
	}
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
	if c.eras[era].salvaged {
		c.eras[era].setFirst(b, &cluster{v: v, begin: -1, ack: -1, flushed: true, minEnd: -1, maxBegin: -1})
		return ""
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
