package coordinator

import (
	"slices"

	"github.com/holdfast-storage/holdfast"
)

// What bad blocks of a chunk are made good from is decided here (protocol,
// sections 5 and 8); the bytes stay with the edge, which asks the members.

// BlockState says what a member holds of one block.
type BlockState uint8

// The states of a block.
const (
	BlockZero   BlockState = iota // reads as zeroes
	BlockData                     // bytes that match Sum
	BlockPoison                   // lost: reads fail until it is overwritten
	BlockBad                      // the bytes do not match Sum, which is what they should have
)

// Piece is one block of a chunk.
type Piece struct {
	State BlockState
	Sum   uint32 // of BlockData and BlockBad; else 0
	// From is, in what Mend returns, the content that has the bytes: 0 is the
	// chunk's own, n the nth that was given to Extra or Answer.
	From int
}

// ChunkContent is a chunk as one member holds it as of its applied seq AsOf.
// LastSeq is the entry that changed it last. All contents of one Mend have the
// same number of blocks.
type ChunkContent struct {
	LastSeq, AsOf holdfast.Seq
	Blocks        []Piece
}

// Missing says whether a block of it is bad or lost.
func (c *ChunkContent) Missing() bool {
	return slices.ContainsFunc(c.Blocks, func(p Piece) bool { return p.State == BlockBad || p.State == BlockPoison })
}

// Holder is an in-sync member on its connection.
type Holder struct {
	Replica holdfast.ReplicaID
	Conn    Conn
}

// Holders returns the in-sync members that can be asked what they hold, and
// whether these are all in-sync members there are.
func (c *Core) Holders() (list []Holder, all bool) {
	all = true
	for _, m := range c.members {
		switch {
		case !m.inISR:
		case m.streaming() && !m.joining:
			list = append(list, Holder{m.ID, m.conn})
		default:
			all = false
		}
	}
	return list, all && len(list) > 0
}

// ErrNotNow: what a chunk lacks can neither be had nor called lost now.
var ErrNotNow = holdfast.Errorf(holdfast.ErrUnavailable, "not every in-sync replica told what it holds of the chunk in this version")

// Mend makes good a chunk that was read from a member: by the blocks with the
// right sums that others hold, by the chunk of an in-sync member that has it whole,
// or by blocks of several. What none of them has becomes poison: only once every
// in-sync member was asked, and answered with the same version.
//
//	Extra*  Members  (Next (Answer | Silent))*  Done
type Mend struct {
	chunk    ChunkContent
	owner    Holder
	floor    holdfast.Seq
	contents int // given so far, the chunk itself not counted
	ask      []Holder
	all      bool // everybody answered with the same version
	self     bool // the owner is in sync
	changed  bool
}

// NewMend begins with the chunk as its owner holds it. Members are asked for theirs as of
// floor or later (R11).
func NewMend(chunk ChunkContent, owner Holder, floor holdfast.Seq) *Mend {
	chunk.Blocks = slices.Clone(chunk.Blocks)
	return &Mend{chunk: chunk, owner: owner, floor: floor}
}

// Extra takes blocks of a member that may be anything, so by their sums alone: of
// the target of a copy.
func (m *Mend) Extra(o ChunkContent) {
	m.contents++
	m.fill(o, false)
}

// Members says who is in sync, as Holders does.
func (m *Mend) Members(list []Holder, all bool) {
	m.all, m.self = all, slices.Contains(list, m.owner)
	m.ask = slices.DeleteFunc(slices.Clone(list), func(h Holder) bool { return h == m.owner })
}

// Next returns the member to ask next, and as of which entry at least; false if no
// more is needed, or there is none.
func (m *Mend) Next() (Holder, holdfast.Seq, bool) {
	if !m.chunk.Missing() || len(m.ask) == 0 {
		return Holder{}, 0, false
	}
	h := m.ask[0]
	m.ask = m.ask[1:]
	if Mutant == "repair_without_asof" {
		return h, 0, true
	}
	return h, m.floor, true
}

// Answer takes what the member holds that Next named.
func (m *Mend) Answer(o ChunkContent) {
	m.contents++
	switch {
	case o.AsOf < m.floor && Mutant != "repair_without_asof":
		m.all = false
	case !o.Missing():
		m.chunk = o
		m.chunk.Blocks = slices.Clone(o.Blocks)
		for i := range m.chunk.Blocks {
			m.chunk.Blocks[i].From = m.contents
		}
		m.changed = true
	default:
		m.fill(o, true)
		m.all = m.all && o.LastSeq == m.chunk.LastSeq
	}
}

// Silent: the member that Next named did not answer.
func (m *Mend) Silent() { m.all = false }

// fill takes blocks that the chunk lacks: those whose sum is the one that it should
// have; and any, if they are of the same version: the same entry changed the chunk
// last, so it holds the same.
func (m *Mend) fill(o ChunkContent, version bool) {
	same := version && o.LastSeq == m.chunk.LastSeq
	for i := range m.chunk.Blocks {
		p, q := &m.chunk.Blocks[i], o.Blocks[i]
		if p.State != BlockBad && p.State != BlockPoison {
			continue
		}
		if q.State == BlockData && (same || p.State == BlockBad && q.Sum == p.Sum) || q.State == BlockZero && same {
			*p = Piece{State: q.State, Sum: q.Sum, From: m.contents}
			m.changed = true
		}
	}
}

// Done returns the chunk, or ErrNotNow. News is false if all that it lacks is lost, and
// the owner knew.
func (m *Mend) Done() (chunk ChunkContent, news bool, err error) {
	if m.chunk.Missing() && (!m.all || !m.self) {
		return ChunkContent{}, false, ErrNotNow
	}
	for i := range m.chunk.Blocks {
		if p := &m.chunk.Blocks[i]; p.State == BlockBad {
			*p = Piece{State: BlockPoison}
			m.changed = true
		}
	}
	return m.chunk, m.changed, nil
}
