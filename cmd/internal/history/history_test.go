package history

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast"
)

const limit = 20 * time.Second

// ops builds a record of one block from lines "CLIENT EPOCH KIND VALUE CALL RETURN",
// where KIND is r, w, f (flush) or wf (write with FUA) and RETURN may be never.
func ops(t *testing.T, text string) []Op {
	t.Helper()
	var list []Op
	for line := range strings.Lines(text) {
		if strings.TrimSpace(line) == "" {
			continue
		}
		var client, value, call int
		var epoch uint64
		var kind, ret string
		if _, err := fmt.Sscan(line, &client, &epoch, &kind, &value, &call, &ret); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		o := Op{Client: client, Epoch: epoch, Kind: map[string]Kind{"r": Read, "w": Write, "wf": Write, "f": Flush}[kind], FUA: kind == "wf", Call: Time(call), Return: Never}
		if value > 0 {
			o.Value = NewValue(1, uint32(value))
		}
		if ret != "never" {
			if _, err := fmt.Sscan(ret, &o.Return); err != nil {
				t.Fatalf("%q: %v", line, err)
			}
		}
		list = append(list, o)
	}
	return list
}

func sessions(lossy ...bool) []Session {
	var list []Session
	for i, l := range lossy {
		at := Time(i * 100)
		list = append(list, Session{Epoch: uint64(i + 1), Node: "n1", Begin: at - 10, Ready: at, Lossy: l, PowerLost: l})
	}
	return list
}

func TestHistories(t *testing.T) {
	continuous, lossy := sessions(false, false), sessions(false, true)
	for _, c := range []struct {
		name     string
		sessions []Session
		ops      string
		sound    bool
	}{
		{"a read sees the write before it", continuous, `
			1 1 w 1 10 20
			1 1 r 1 30 40`, true},
		{"a block is zero before the first write", continuous, `
			1 1 r 0 5 6
			1 1 w 1 10 20`, true},
		{"a read returns what was overwritten before it began", continuous, `
			1 1 w 1 10 20
			1 1 w 2 30 40
			2 1 r 1 50 60`, false},
		{"reads beside a write may see either, in order", continuous, `
			1 1 w 1 10 20
			1 1 w 2 30 60
			2 1 r 1 32 34
			2 1 r 2 36 38`, true},
		{"reads beside a write may not go back", continuous, `
			1 1 w 1 10 20
			1 1 w 2 30 60
			2 1 r 2 32 34
			2 1 r 1 36 38`, false},
		{"a value that nobody wrote", continuous, `
			1 1 w 1 10 20
			1 1 r 7 30 40`, false},
		{"a value before it was sent", continuous, `
			1 1 r 1 5 8
			1 1 w 1 10 20`, false},
		{"an unanswered write had effect", continuous, `
			1 1 w 1 10 20
			1 1 w 2 30 never
			2 2 r 2 110 120
			2 2 r 2 130 140`, true},
		{"an unanswered write had none", continuous, `
			1 1 w 1 10 20
			1 1 w 2 30 never
			2 2 r 1 110 120`, true},
		{"an unanswered write takes effect after the next session has begun", continuous, `
			1 1 w 1 10 20
			1 1 w 2 30 never
			2 2 r 1 110 120
			2 2 r 2 130 140`, false},
		{"an unanswered write of the last session may take effect late", continuous, `
			1 2 w 1 110 120
			1 2 w 2 130 never
			2 2 r 1 140 150
			2 2 r 2 160 170`, true},
		{"a continuous session loses an acknowledged write", continuous, `
			1 1 w 1 10 20
			1 1 w 2 30 40
			2 2 r 1 110 120`, false},
		{"the writer before acknowledges after the takeover what the next does not see", continuous, `
			1 1 w 1 10 20
			2 2 w 2 110 120
			1 1 w 3 130 140
			2 2 r 2 150 160`, false},
		{"the writer before answers a read after the takeover", continuous, `
			1 1 w 1 10 20
			1 1 r 1 110 120`, false},
		{"a write that the writer before never answered has effect after the takeover", continuous, `
			1 1 w 1 10 20
			1 1 w 2 110 never
			2 2 r 2 130 140`, false},
		{"the writer before answers what it was asked before the takeover", continuous, `
			1 1 w 1 10 20
			1 1 r 1 90 120`, true},
		{"a lossy session may lose what was not flushed", lossy, `
			1 1 w 1 10 20
			1 1 w 2 30 40
			2 2 r 1 110 120
			2 2 r 1 130 140`, true},
		{"a lossy session may keep it too", lossy, `
			1 1 w 1 10 20
			1 1 w 2 30 40
			2 2 r 2 110 120`, true},
		{"a lossy session may not lose what was flushed", lossy, `
			1 1 w 1 10 20
			1 1 w 2 30 40
			1 1 f 0 50 60
			2 2 r 1 110 120`, false},
		{"nor what was written with FUA", lossy, `
			1 1 w 1 10 20
			1 1 wf 2 30 40
			2 2 r 1 110 120`, false},
		{"an unanswered FUA promises nothing", lossy, `
			1 1 w 1 10 20
			1 1 wf 2 30 never
			2 1 r 2 34 36
			2 2 r 1 110 120`, true},
		{"a flush that was not answered promises nothing", lossy, `
			1 1 w 1 10 20
			1 1 w 2 30 40
			1 1 f 0 50 never
			2 2 r 1 110 120`, true},
		{"a flush covers what was acknowledged before it, not what came after", lossy, `
			1 1 w 1 10 20
			1 1 f 0 25 50
			1 1 w 2 30 40
			2 2 r 1 110 120`, true},
		{"what a lossy session decided does not change by itself", lossy, `
			1 1 w 1 10 20
			1 1 w 2 30 40
			2 2 r 2 110 120
			2 2 r 1 130 140`, false},
		{"nothing older than the flushed value comes back", lossy, `
			1 1 w 1 10 20
			1 1 w 2 30 40
			1 1 f 0 50 60
			1 1 w 3 70 80
			2 2 r 1 110 120`, false},
		{"a second loss may go back to what the first one left", sessions(false, true, true), `
			1 1 w 1 10 20
			1 1 w 2 30 40
			2 2 w 3 110 120
			3 3 r 1 210 220`, true},
		{"but not behind what was read between them", sessions(false, true, true), `
			1 1 w 1 10 20
			1 1 w 2 30 40
			2 2 r 2 105 108
			2 2 w 3 110 120
			3 3 r 1 210 220`, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := History{Sessions: c.sessions, Ops: ops(t, c.ops)}
			rep := h.Check(limit)
			if sound := len(rep.Violations) == 0 && len(rep.Undecided) == 0; sound != c.sound {
				t.Errorf("sound: %v, want %v; %v", sound, c.sound, rep.Violations)
			}
			if rep.Blocks != 1 || (rep.Sound == 1) != c.sound {
				t.Errorf("report %+v", rep)
			}
			if !c.sound && !strings.Contains(rep.Violations[0].Log, "epoch 2 on node n1 is ready") {
				t.Errorf("the log lacks the sessions:\n%s", rep.Violations[0].Log)
			}
		})
	}
}

func TestSessionsAlone(t *testing.T) {
	h := History{Sessions: []Session{{Epoch: 1, Node: "n1"}, {Epoch: 2, Node: "n2"}, {Epoch: 2, Node: "n3"}, {Epoch: 3, Node: "n1", Lossy: true}}}
	rep := h.Check(limit)
	if len(rep.Violations) != 2 || rep.Violations[0].Rule != "C5" || rep.Violations[1].Rule != "C2" {
		t.Errorf("violations %v, want one of C5 and one of C2", rep.Violations)
	}
}

func TestLossesThatWereSeen(t *testing.T) {
	for _, c := range []struct {
		lossy bool
		ops   string
		want  int
	}{
		{true, `
			1 1 w 1 10 20
			1 1 w 2 30 40
			2 2 r 1 110 120
			2 2 r 1 130 140`, 1},
		{true, `
			1 1 w 1 10 20
			1 1 w 2 30 40
			2 2 r 2 110 120`, 0},
		{true, `
			1 1 w 1 10 20
			2 2 w 2 110 120
			2 2 r 2 130 140`, 0},
		{false, `
			1 1 w 1 10 20
			1 1 w 2 30 40
			2 2 r 1 110 120`, 0},
	} {
		h := History{Sessions: sessions(false, c.lossy), Ops: ops(t, c.ops)}
		if rep := h.Check(limit); rep.Reverted != c.want {
			t.Errorf("lossy %v, %s\n%d reverted, want %d", c.lossy, c.ops, rep.Reverted, c.want)
		}
	}
}

func TestEachBlockIsJudged(t *testing.T) {
	h := History{Sessions: sessions(false), Ops: ops(t, `
		1 1 w 1 10 20
		1 1 r 1 30 40`)}
	for _, o := range ops(t, `
		1 1 w 2 10 20
		1 1 r 0 30 40`) {
		o.Block = 9
		h.Ops = append(h.Ops, o)
	}
	rep := h.Check(limit)
	if rep.Blocks != 2 || rep.Sound != 1 || len(rep.Violations) != 1 || rep.Violations[0].Block != 9 {
		t.Errorf("report %+v, want block 9 of two unsound", rep)
	}
}

func TestTooShortALimitIsUndecided(t *testing.T) {
	// Sixteen writes at once and reads that no order explains: porcupine has to
	// try them all.
	var list []Op
	for i := range 16 {
		list = append(list, Op{Client: i, Epoch: 1, Kind: Write, Value: NewValue(1, uint32(i+1)), Call: 10, Return: 1000})
	}
	for i := range 16 {
		list = append(list, Op{Client: 20 + i, Epoch: 1, Kind: Read, Value: NewValue(1, uint32(i+1)), Call: 10, Return: 1000})
	}
	list = append(list, Op{Client: 50, Epoch: 1, Kind: Read, Value: 0, Call: 1001, Return: 1002})
	h := History{Sessions: sessions(false), Ops: list}
	if rep := h.Check(time.Millisecond); len(rep.Undecided) != 1 || rep.Sound != 0 {
		t.Errorf("report %+v, want one undecided block", rep)
	}
}

func TestFillAndParse(t *testing.T) {
	p, v := make([]byte, holdfast.BlockSize), NewValue(3, 17)
	if got, err := Parse(p, 5); err != nil || got != 0 {
		t.Errorf("a block of zeroes: %v, %v", got, err)
	}
	Fill(p, 5, v)
	if got, err := Parse(p, 5); err != nil || got != v {
		t.Errorf("filled: %v, %v, want %v", got, err, v)
	}
	if v.String() != "w3#17" || v.Writer() != 3 || Value(0).String() != "zero" {
		t.Errorf("value prints as %v", v)
	}
	if _, err := Parse(p, 6); err == nil {
		t.Error("another block's bytes were taken")
	}
	for bit := range holdfast.BlockSize * 8 {
		p[bit/8] ^= 1 << (bit % 8)
		if got, err := Parse(p, 5); err == nil {
			t.Fatalf("with bit %d flipped: %v", bit, got)
		}
		p[bit/8] ^= 1 << (bit % 8)
	}
	clear(p[2048:])
	if _, err := Parse(p, 5); err == nil {
		t.Error("half a block was taken")
	}
}

func TestCompare(t *testing.T) {
	whole := func(node string) Copy { return Copy{Node: node, Tail: 7, Sums: [][32]byte{{1}, {2}, {3}}} }
	if v := Compare([]Copy{whole("n1"), whole("n2"), whole("n3")}); len(v) != 0 {
		t.Errorf("equal copies: %v", v)
	}
	if v := Compare(nil); len(v) != 0 {
		t.Errorf("no copies: %v", v)
	}
	for name, change := range map[string]func(*Copy){
		"another tail":    func(c *Copy) { c.Tail = 8 },
		"another block":   func(c *Copy) { c.Sums[1] = [32]byte{9} },
		"a shorter copy":  func(c *Copy) { c.Sums = c.Sums[:2] },
		"the last block":  func(c *Copy) { c.Sums[2] = [32]byte{} },
		"the first block": func(c *Copy) { c.Sums[0] = [32]byte{} },
	} {
		odd := whole("n3")
		change(&odd)
		if v := Compare([]Copy{whole("n1"), whole("n2"), odd}); len(v) != 1 {
			t.Errorf("%s: %v, want one violation", name, v)
		}
	}
}

// store is a volume in memory that clients work on one step at a time, with one
// thing wrong with it, or none.
type store struct {
	rng     *rand.Rand
	wrong   string
	log     [][]Value // of each block: what it held, in order; the last is current
	flushed []int     // of each block: the index of the last flushed value
	late    []late    // writes that come again
}

type late struct {
	block int
	value Value
}

const storeBlocks = 3

func newStore(rng *rand.Rand, wrong string) *store {
	s := &store{rng: rng, wrong: wrong, flushed: make([]int, storeBlocks)}
	for range storeBlocks {
		s.log = append(s.log, []Value{0})
	}
	return s
}

func (s *store) rarely() bool { return s.rng.IntN(8) == 0 }

func (s *store) write(b int, v Value) {
	l := len(s.log[b])
	switch {
	case s.wrong == "loses writes" && s.rarely():
		return
	case s.wrong == "reorders writes" && l > 1 && s.rarely():
		s.log[b] = append(s.log[b][:l-1], v, s.log[b][l-1])
		return
	case s.wrong == "repeats writes" && s.rarely():
		s.late = append(s.late, late{b, v})
	}
	s.log[b] = append(s.log[b], v)
	if len(s.late) > 0 && s.rarely() {
		s.log[s.late[0].block] = append(s.log[s.late[0].block], s.late[0].value)
		s.late = s.late[1:]
	}
}

func (s *store) read(b int) Value {
	l := s.log[b]
	if s.wrong == "serves stale data" && len(l) > 1 && s.rarely() {
		return l[len(l)-2]
	}
	if s.wrong == "changes by itself" && s.rarely() && len(l) > 1 {
		s.log[b], s.flushed[b] = l[:len(l)-1], min(s.flushed[b], len(l)-2)
	}
	return l[len(l)-1]
}

func (s *store) flush() {
	if s.wrong == "lies about flushes" {
		return
	}
	for b := range s.log {
		s.flushed[b] = len(s.log[b]) - 1
	}
}

// lose takes power away: each block goes back to some value from the flushed one on.
func (s *store) lose() {
	for b, l := range s.log {
		keep := s.flushed[b] + s.rng.IntN(len(l)-s.flushed[b])
		s.log[b], s.flushed[b] = l[:keep+1], keep
	}
}

// play lets clients work on a store over some sessions, the losses at every
// second one if power is lost, and returns what they saw.
func play(seed uint64, wrong string, power bool) History {
	rng := rand.New(rand.NewPCG(seed, 1))
	s := newStore(rng, wrong)
	var h History
	var now Time
	tick := func() Time { now++; return now }
	type client struct {
		op    int // index of its operation, -1 if none
		done  bool
		count uint32
	}
	const clients, steps, epochs = 4, 250, 5
	unanswered := []int{}
	for epoch := uint64(1); epoch <= epochs; epoch++ {
		begin := tick()
		lossy := power && epoch%2 == 0
		// What the session before did not answer has effect now, or never.
		for _, i := range unanswered {
			if o := h.Ops[i]; o.Kind == Write && rng.IntN(2) == 0 {
				s.write(int(o.Block), o.Value)
			}
		}
		forgotten := unanswered
		unanswered = nil
		if lossy || wrong == "loses power in silence" && epoch > 1 {
			s.lose()
		}
		h.Sessions = append(h.Sessions, Session{Epoch: epoch, Node: "n1", Begin: begin, Ready: tick(), Lossy: lossy, PowerLost: lossy})
		team := make([]client, clients)
		for i := range team {
			team[i].op = -1
		}
		for step := range steps {
			if wrong == "replays late" && step == steps/2 {
				for _, i := range forgotten {
					if o := h.Ops[i]; o.Kind == Write {
						s.write(int(o.Block), o.Value)
					}
				}
			}
			n := rng.IntN(clients)
			c := &team[n]
			if c.op < 0 {
				c.count++
				o := Op{Client: n, Epoch: epoch, Kind: Write, Block: int64(rng.IntN(storeBlocks)), Call: tick(), Return: Never}
				switch k := rng.IntN(20); {
				case k == 0:
					o.Kind, o.Block = Flush, 0
				case k < 11:
					o.Kind = Read
				default:
					o.Value = NewValue(uint32(epoch)*100+uint32(n), c.count)
					o.FUA = k == 12
				}
				h.Ops = append(h.Ops, o)
				c.op, c.done = len(h.Ops)-1, false
				continue
			}
			o := &h.Ops[c.op]
			if !c.done {
				switch o.Kind {
				case Read:
					o.Value = s.read(int(o.Block))
				case Write:
					s.write(int(o.Block), o.Value)
					if o.FUA && wrong != "lies about flushes" {
						s.flushed[o.Block] = len(s.log[o.Block]) - 1
					}
				case Flush:
					s.flush()
				}
				c.done = true
				continue
			}
			o.Return, c.op = tick(), -1
		}
		for _, c := range team {
			if c.op < 0 {
				continue
			}
			if o := &h.Ops[c.op]; o.Kind == Read {
				o.Value = 0 // it was not answered
			} else if !c.done {
				unanswered = append(unanswered, c.op)
			}
		}
	}
	return h
}

const seeds = 40

// TestTrueStore: whatever the order, a store that does as promised is sound.
func TestTrueStore(t *testing.T) {
	for seed := range uint64(seeds) {
		for _, power := range []bool{false, true} {
			h := play(seed, "", power)
			rep := h.Check(limit)
			if rep.Sound != rep.Blocks || rep.Blocks != storeBlocks || len(rep.Violations) > 0 {
				t.Fatalf("seed %d, power loss %v: %d of %d blocks sound, undecided %v\n%v", seed, power, rep.Sound, rep.Blocks, rep.Undecided, rep.Violations)
			}
		}
	}
}

// TestFalseStores: each way to break a promise is seen on most seeds.
func TestFalseStores(t *testing.T) {
	for _, c := range []struct {
		wrong string
		power bool
	}{
		{"loses writes", false},
		{"loses writes", true},
		{"reorders writes", false},
		{"repeats writes", false},
		{"serves stale data", false},
		{"serves stale data", true},
		{"changes by itself", false},
		{"changes by itself", true},
		{"lies about flushes", true},
		{"loses power in silence", false},
		{"replays late", false},
	} {
		caught := 0
		for seed := range uint64(seeds) {
			h := play(seed, c.wrong, c.power)
			if rep := h.Check(limit); len(rep.Violations) > 0 {
				caught++
			}
		}
		t.Logf("%s, power loss %v: seen on %d of %d seeds", c.wrong, c.power, caught, seeds)
		if caught < seeds/2 {
			t.Errorf("a store that %s (power loss %v) was caught on %d of %d seeds", c.wrong, c.power, caught, seeds)
		}
	}
}
