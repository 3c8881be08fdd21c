package coordinator

import (
	"math"
	"time"

	"github.com/holdfast-storage/holdfast"
)

// A replica that cannot log an entry for want of space would have a hole, or hold
// up everything behind it. So a write that may map chunks is given its place only
// once every ackset member has promised space for it. Members promise ahead: each
// acknowledgement tells how many chunks the entries behind it may map, and a write
// is counted with as many as it touches. Where that is not enough (a disk is nearly
// full, or the promise ran out) the members are asked what this write takes indeed:
// an overwrite takes nothing, and always goes on. What they answered, and what was
// written since, is remembered: on a full disk the first write to a chunk costs a
// question, the next ones none.

// Unlimited is the credit of a member that never lacks space.
const Unlimited int64 = math.MaxUint32

// credit is what one member promised, and what it answered to the last question.
type credit struct {
	chunks int64 // entries behind at may map so many
	at     holdfast.Seq

	asked    OpID          // the write it was asked about; 0: none
	ask      uint64        // number of the question
	askedAt  time.Duration // when
	answered bool
	need     int64 // chunks that write would map
}

// room is what the core remembers of writes that wait for space.
type room struct {
	asking  OpID // the write that members are asked about
	since   time.Duration
	full    bool          // the last write that needed space was refused
	fullAt  time.Duration // since when
	refused uint64        // writes refused for want of space
	cleared holdfast.Seq  // the last entry that may give chunks back
	counted holdfast.Seq  // members were asked after everything up to here was committed
	sure    []uint64      // from the first question on: a bit for each chunk that has its place on every ackset member
}

func (r *room) isSure(chunk int64) bool {
	return chunk/64 < int64(len(r.sure)) && r.sure[chunk/64]&(1<<(chunk%64)) != 0
}

// note remembers what an operation does to the chunks that are sure: one that is
// written has its place from then on, one that is zeroed or trimmed may lose it.
func (r *room) note(w *Write) {
	if r.sure == nil {
		return
	}
	for c := firstChunk(w); c <= lastChunk(w); c++ {
		if w.Kind != OpWrite {
			if r.isSure(c) {
				r.sure[c/64] &^= 1 << (c % 64)
			}
			continue
		}
		if grown := c/64 + 1; grown > int64(len(r.sure)) {
			r.sure = append(r.sure, make([]uint64, grown-int64(len(r.sure)))...)
		}
		r.sure[c/64] |= 1 << (c % 64)
	}
}

func firstChunk(w *Write) int64 { return w.Offset / holdfast.ChunkSize }
func lastChunk(w *Write) int64  { return (w.Offset + w.Length - 1) / holdfast.ChunkSize }

// touched is how many chunks a write may map at most.
func (r *room) touched(w *Write) (n int64) {
	if w.Kind != OpWrite {
		return 0
	}
	if n = lastChunk(w) - firstChunk(w) + 1; r.sure == nil {
		return n
	}
	for c := firstChunk(w); c <= lastChunk(w); c++ {
		if r.isSure(c) {
			n--
		}
	}
	return n
}

// tell takes what a member says of its credit.
func (m *member) tell(chunks int64, at holdfast.Seq) {
	m.credit.chunks, m.credit.at = chunks, at
}

// pending is how many chunks the entries may map that m's credit is for.
func (c *Core) pending(m *member) int64 { return c.win.charged - c.win.chargedTo(m.credit.at) }

// verdict says what becomes of a write.
type verdict uint8

const (
	affordGoes    verdict = iota
	affordWaits           // for an answer, or for a full member to be taken out
	affordRefused         // it was answered
)

// afford says what becomes of the write at the head of the queue, and how many
// chunks it is to be charged with if it goes on.
func (c *Core) afford(w *Write) (charge int64, v verdict) {
	most := c.room.touched(w)
	short := false
	for _, m := range c.members {
		short = short || m.inAckset && c.pending(m)+most > m.credit.chunks
	}
	if !short || most == 0 {
		c.room.full = c.room.full && most == 0
		return most, affordGoes
	}
	// What is on its way to the same chunks may take their places from them.
	first := firstChunk(w) * holdfast.ChunkSize
	if c.win.overlap(c.acked, first, (lastChunk(w)+1)*holdfast.ChunkSize-first) != 0 {
		return 0, affordWaits
	}
	if c.room.asking != w.ID {
		c.room.asking, c.room.since = w.ID, c.now
	}
	if c.room.sure == nil {
		c.room.sure = []uint64{}
	}
	waits := false
	var full *member
	for _, m := range c.members {
		switch {
		case !m.inAckset:
		case !c.askedFor(m, w) || m.evicting:
			waits = true
		case c.pending(m)+m.credit.need > m.credit.chunks && m.credit.need > 0:
			full = m
		default:
			charge = max(charge, m.credit.need)
		}
	}
	switch {
	case waits:
		return 0, affordWaits
	case full == nil:
		c.room.full = c.room.full && charge == 0
		return charge, affordGoes
	case c.room.cleared > c.room.counted:
		// It may be given back by a trim that was acknowledged, but is applied only
		// once it is committed.
		if c.commit < c.room.cleared {
			c.wantFlush(min(c.room.cleared, c.acked))
			return 0, affordWaits
		}
		c.room.counted = c.commit
		for _, m := range c.members {
			m.credit.asked = 0
		}
		return c.afford(w)
	case c.canDoWithout(full):
		full.evicting = true
		full.holdDown(c.now)
		c.notice(NoticeEvicting, full, true, "its disk is full, and enough others are in sync: out for %v at least", full.pace.holdDown)
		return 0, affordWaits
	}
	c.refuseForSpace(w, full)
	return 0, affordRefused
}

// askedFor asks m what w takes, once unless the answer is overdue, and says
// whether it has answered.
func (c *Core) askedFor(m *member, w *Write) bool {
	if m.credit.asked == w.ID && (m.credit.answered || c.now-m.credit.askedAt < c.lim.Suspect) {
		return m.credit.answered
	}
	if m.streaming() {
		c.asks++
		m.credit.asked, m.credit.ask, m.credit.askedAt, m.credit.answered = w.ID, c.asks, c.now, false
		c.do(SendAfford{Replica: m.ID, Conn: m.conn, Epoch: c.opt.Epoch, Ask: c.asks, Offset: w.Offset, Length: w.Length, Pending: c.pending(m)})
	}
	return false
}

func (c *Core) onAfforded(m *member, e Afforded) {
	m.tell(e.Credit, e.Tail)
	if m.credit.asked != 0 && m.credit.ask == e.Ask {
		m.credit.answered, m.credit.need = true, e.Need
	}
}

// canDoWithout says whether so many others remain in sync as the volume demands.
func (c *Core) canDoWithout(m *member) bool {
	if !m.inISR {
		return true
	}
	others := 0
	for _, o := range c.members {
		if o != m && o.inISR && o.inAckset && o.streaming() && !o.suspect && !o.evicting && !o.hard {
			others++
		}
	}
	return others >= max(1, c.opt.MinCopies)
}

// refuseForSpace answers a write that full has no room for.
func (c *Core) refuseForSpace(w *Write, full *member) {
	if !c.room.full {
		c.room.full, c.room.fullAt = true, c.now
		c.notice(NoticeFull, full, true, "its disk is full: writes that need new space fail, overwrites go on")
	}
	c.room.refused++
	c.do(CompleteWrite{ID: w.ID, Err: holdfast.Errorf(holdfast.ErrNoSpace, "the disk of replica %v on node %v is full", full.ID, full.Node).
		WithRemedy("trim or delete what is not needed, or add a disk to that node; overwriting goes on")})
}
