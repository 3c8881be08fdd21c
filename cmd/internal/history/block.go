package history

import (
	"fmt"
	"slices"
	"time"

	"github.com/anishathalye/porcupine"
)

// block is the record of one block, with what concerns all blocks.
type block struct {
	number   int64
	ops      []Op      // reads and writes, by call
	flushes  []Op      // by call
	sessions []Session // by epoch
}

// check returns a violation, or whether porcupine came to an end.
func (b *block) check(limit time.Duration) (*Violation, bool) {
	if what := b.invented(); what != "" {
		return b.violation("C1", what), true
	}
	if what := b.outlived(); what != "" {
		return b.violation("C5", what), true
	}
	switch porcupine.CheckOperationsTimeout(register, b.operations(), limit) {
	case porcupine.Ok:
		return nil, true
	case porcupine.Illegal:
		return b.violation("C1 to C4", "no order of these operations explains what the reads returned"), true
	case porcupine.Unknown:
	}
	return nil, false
}

func (b *block) violation(rule, what string) *Violation {
	return &Violation{Rule: rule, Block: b.number, What: what, Log: Log(slices.Concat(b.ops, b.lossyFlushes()), b.sessions)}
}

// invented finds a read of a value that nobody had sent when it was answered.
// Porcupine would find it too, but cannot say it.
func (b *block) invented() string {
	sent := map[Value]Time{0: 0}
	for _, o := range b.ops {
		if o.Kind == Write {
			sent[o.Value] = o.Call
		}
	}
	for _, o := range b.ops {
		if at, ok := sent[o.Value]; o.Kind == Read && o.Return != Never && (!ok || at > o.Return) {
			return fmt.Sprintf("a read of client %d at %v returned %v, which nobody had written", o.Client, time.Duration(o.Call), o.Value)
		}
	}
	return ""
}

// outlived finds an operation that was sent to a session when a later one was
// ready, and had effect nevertheless: its writer was fenced before.
func (b *block) outlived() string {
	read := b.valuesRead()
	for _, o := range b.ops {
		if ready := b.readyAfter(o.Epoch); o.Call > ready && (o.Return != Never || o.Kind == Write && read[o.Value]) {
			return fmt.Sprintf("a %v of client %d was sent to epoch %d at %v, after a later epoch was ready at %v, and had effect", o.Kind, o.Client, o.Epoch, time.Duration(o.Call), time.Duration(ready))
		}
	}
	return ""
}

func (b *block) valuesRead() map[Value]bool {
	read := map[Value]bool{}
	for _, o := range b.ops {
		if o.Kind == Read && o.Return != Never {
			read[o.Value] = true
		}
	}
	return read
}

// operations translates the record for porcupine.
func (b *block) operations() []porcupine.Operation {
	read := b.valuesRead()
	var list []porcupine.Operation
	add := func(in input, call, ret Time) {
		list = append(list, porcupine.Operation{ClientId: len(list), Input: in, Call: int64(call), Return: int64(ret)})
	}
	loss := b.lastLoss()
	for _, o := range b.ops {
		switch {
		case o.Return != Never:
			add(input{step: stepOf(o, loss), value: o.Value}, o.Call, o.Return)
		case o.Kind == Write && read[o.Value]:
			// It took effect, and before the next session was ready. FUA was
			// not promised, for it was not answered.
			o.FUA = false
			add(input{step: stepOf(o, loss), value: o.Value}, o.Call, b.readyAfter(o.Epoch))
		}
		// An unanswered read says nothing. A write that was neither answered nor
		// read may have had no effect: if some order with it explains the reads,
		// so does the same order without it.
	}
	for _, o := range b.lossyFlushes() {
		add(input{step: stepFlush}, o.Call, o.Return)
	}
	for _, s := range b.sessions {
		if s.Lossy {
			add(input{step: stepLose}, s.Begin, s.Ready)
		}
	}
	return list
}

func stepOf(o Op, lastLoss Time) step {
	switch {
	case o.Kind == Read:
		return stepRead
	case o.FUA, o.Call >= lastLoss: // with no loss to come it is all the same
		return stepWriteFUA
	}
	return stepWrite
}

// lastLoss is when the last lossy session was ready; -1 if none was.
func (b *block) lastLoss() Time {
	last := Time(-1)
	for _, s := range b.sessions {
		if s.Lossy {
			last = max(last, s.Ready)
		}
	}
	return last
}

// readyAfter is when the first session after an epoch was ready.
func (b *block) readyAfter(epoch uint64) Time {
	ready := Never
	for _, s := range b.sessions {
		if s.Epoch > epoch {
			ready = min(ready, s.Ready)
		}
	}
	return ready
}

// reverted counts the lossy sessions whose first read of the block, before any
// write of theirs, showed something else than the write that was acknowledged
// last: losses that were allowed, and seen.
func (b *block) reverted() int {
	n := 0
	for i, s := range b.sessions {
		if !s.Lossy || i == 0 {
			continue
		}
		var last, first *Op
		for j := range b.ops {
			o := &b.ops[j]
			switch {
			case o.Call >= s.Ready:
				if first == nil {
					first = o
				}
			case o.Kind == Write && o.Return < s.Ready && (last == nil || o.Return > last.Return):
				last = o
			}
		}
		if first != nil && first.Kind == Read && first.Return != Never && last != nil && first.Value != last.Value {
			n++
		}
	}
	return n
}

// lossyFlushes are the answered flushes that matter: those before a lossy
// session. Where nothing is lost, a flush changes nothing.
func (b *block) lossyFlushes() []Op {
	last := b.lastLoss()
	var list []Op
	for _, o := range b.flushes {
		if o.Return != Never && o.Call < last {
			list = append(list, o)
		}
	}
	return list
}

// step is what happens to a block.
type step uint8

const (
	stepRead step = iota
	stepWrite
	stepWriteFUA
	stepFlush
	stepLose // a lossy session begins
)

type input struct {
	step  step
	value Value
}

// content is what a block may hold, and what it may go back to. There is more
// than one current value only right after a loss that nobody has looked at, and
// then they are the same list as survivors.
type content struct {
	current   []Value
	survivors []Value // the last flushed value, and those written since
}

// register is the block as a specification.
var register = porcupine.Model{
	Init: func() any { return content{current: []Value{0}, survivors: []Value{0}} },
	Step: func(state, in, _ any) (bool, any) {
		c, i := state.(content), in.(input)
		switch i.step {
		case stepRead:
			if !slices.Contains(c.current, i.value) {
				return false, c
			}
			if len(c.current) > 1 { // what was lost is decided now
				c = content{current: []Value{i.value}, survivors: []Value{i.value}}
			}
		case stepWrite:
			survivors := append(slices.Clone(c.survivors), i.value) // a new slice: states are shared
			slices.Sort(survivors)                                  // so that states which mean the same are the same
			c = content{current: []Value{i.value}, survivors: survivors}
		case stepWriteFUA:
			c = content{current: []Value{i.value}, survivors: []Value{i.value}}
		case stepFlush:
			c = content{current: c.current, survivors: c.current}
		case stepLose:
			c = content{current: c.survivors, survivors: c.survivors}
		}
		return true, c
	},
	Equal: func(a, b any) bool {
		x, y := a.(content), b.(content)
		return slices.Equal(x.current, y.current) && slices.Equal(x.survivors, y.survivors)
	},
	Hash: func(state any) uint64 {
		sum := uint64(14695981039346656037) // FNV-1a over whole values
		c := state.(content)
		for _, list := range [][]Value{c.current, c.survivors} {
			for _, v := range list {
				sum = (sum ^ uint64(v)) * 1099511628211
			}
		}
		return sum
	},
}
