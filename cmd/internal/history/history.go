package history

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
)

// Time orders events: each has its own, and one that ended before another began
// has the lower. Nanoseconds, for the reader.
type Time int64

// Never is the time of an answer that did not come.
const Never Time = math.MaxInt64

// Kind is what an operation asked for.
type Kind uint8

// The kinds of operations.
const (
	Read  Kind = 1
	Write Kind = 2
	Flush Kind = 3 // of the whole volume; its Block is 0
)

// String is the kind's name.
func (k Kind) String() string {
	switch k {
	case Read:
		return "read"
	case Write:
		return "write"
	case Flush:
		return "flush"
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// Op is one operation on one block, as its client saw it. A request for several
// blocks is as many operations: nothing promises that it is one.
type Op struct {
	Client int
	Epoch  uint64 // of the session that it was sent to
	Kind   Kind
	Block  int64
	Value  Value // written, or read
	FUA    bool  // of a write: flushed once answered
	Call   Time  // when it was sent
	Return Time  // when it was answered with success, or Never
}

// Session is one attachment of the volume.
type Session struct {
	Epoch uint64
	Node  string
	// Begin is a time before which the attachment was not active, Ready one at
	// which it surely was, and before any operation of it was sent.
	Begin, Ready Time
	// Lossy: it did not go on from where the session before it ended.
	Lossy bool
	// PowerLost: every in-sync replica had lost power since the session before
	// it; only then may it be lossy.
	PowerLost bool
}

// History is a record of what the clients of one volume saw. The volume was all
// zero when it began.
type History struct {
	Sessions []Session
	Ops      []Op
}

// Violation is a guarantee that does not hold.
type Violation struct {
	Rule  string // C1 to C5
	Block int64  // -1: of no block
	What  string
	// Log is the block's history, a line for each operation.
	Log string
}

// String is one line.
func (v Violation) String() string {
	if v.Block < 0 {
		return fmt.Sprintf("%s: %s", v.Rule, v.What)
	}
	return fmt.Sprintf("%s: block %d: %s", v.Rule, v.Block, v.What)
}

// Report is what a check found.
type Report struct {
	Blocks     int     // whose histories were judged
	Sound      int     // of them, those without a violation
	Undecided  []int64 // of them, those for which the time limit was too short
	Reverted   int     // times that a read showed what a lossy session took from a block
	Violations []Violation
}

// Check judges the record. The limit is for each block; one that needs longer is
// undecided, which is not sound.
func (h *History) Check(limit time.Duration) Report {
	var rep Report
	rep.Violations = h.checkSessions()
	sessions := slices.SortedFunc(slices.Values(h.Sessions), func(a, b Session) int { return cmp.Compare(a.Epoch, b.Epoch) })
	blocks, flushes := h.split()
	for _, ops := range blocks {
		rep.Blocks++
		b := block{number: ops[0].Block, ops: ops, flushes: flushes, sessions: sessions}
		rep.Reverted += b.reverted()
		v, decided := b.check(limit)
		switch {
		case v != nil:
			rep.Violations = append(rep.Violations, *v)
		case !decided:
			rep.Undecided = append(rep.Undecided, b.number)
		default:
			rep.Sound++
		}
	}
	return rep
}

// checkSessions looks at the sessions alone: one writer for each epoch (C5), and
// nothing lossy without a reason (C2).
func (h *History) checkSessions() []Violation {
	var found []Violation
	for i, s := range h.Sessions {
		for _, other := range h.Sessions[:i] {
			if s.Epoch == other.Epoch {
				found = append(found, Violation{Rule: "C5", Block: -1, What: fmt.Sprintf("epoch %d was given to node %s and again to node %s", s.Epoch, other.Node, s.Node)})
			}
		}
		if s.Lossy && !s.PowerLost {
			found = append(found, Violation{Rule: "C2", Block: -1, What: fmt.Sprintf("epoch %d on node %s is lossy, although an in-sync replica kept its memory", s.Epoch, s.Node)})
		}
	}
	return found
}

// split sorts the operations by block, and puts the flushes aside.
func (h *History) split() (blocks [][]Op, flushes []Op) {
	all := slices.Clone(h.Ops)
	slices.SortStableFunc(all, func(a, b Op) int { return cmp.Or(cmp.Compare(a.Block, b.Block), cmp.Compare(a.Call, b.Call)) })
	for _, o := range all {
		switch last := len(blocks) - 1; {
		case o.Kind == Flush:
			flushes = append(flushes, o)
		case last >= 0 && blocks[last][0].Block == o.Block:
			blocks[last] = append(blocks[last], o)
		default:
			blocks = append(blocks, []Op{o})
		}
	}
	return blocks, flushes
}

// Log writes operations and sessions in the order of their calls, for people.
func Log(ops []Op, sessions []Session) string {
	type line struct {
		at   Time
		text string
	}
	var lines []line
	for _, o := range ops {
		answer := "no answer"
		if o.Return != Never {
			answer = fmt.Sprintf("to %v", time.Duration(o.Return))
		}
		what := o.Kind.String()
		if o.Kind != Flush {
			what += " " + o.Value.String()
		}
		if o.FUA {
			what += " fua"
		}
		lines = append(lines, line{o.Call, fmt.Sprintf("%14v %-24s client %d, epoch %d: %s", time.Duration(o.Call), answer, o.Client, o.Epoch, what)})
	}
	for _, s := range sessions {
		kind := "continuous"
		if s.Lossy {
			kind = "lossy"
		}
		lines = append(lines, line{s.Ready, fmt.Sprintf("%14v epoch %d on node %s is ready, %s", time.Duration(s.Ready), s.Epoch, s.Node, kind)})
	}
	slices.SortStableFunc(lines, func(a, b line) int { return cmp.Compare(a.at, b.at) })
	var out strings.Builder
	for _, l := range lines {
		out.WriteString(l.text + "\n")
	}
	return out.String()
}
