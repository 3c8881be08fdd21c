package coordinator

import (
	"errors"
	"testing"

	"pgregory.net/rapid"

	"github.com/holdfast-storage/holdfast"
)

// spaced is a member with a small disk, as the core meets it: it takes messages in
// order, some time later, and maps a chunk at the first write to it.
type spaced struct {
	id     holdfast.ReplicaID
	conn   Conn
	free   int64
	credit int64
	mapped map[int64]bool
	tail   holdfast.Seq
	inbox  []Action
	lost   bool // out of the ackset: what it lacks is nobody's business
}

// take works on its oldest message and returns what it answers.
func (m *spaced) take(t *rapid.T, writes map[holdfast.Seq]Write, ahead bool) []Event {
	a := m.inbox[0]
	m.inbox = m.inbox[1:]
	switch a := a.(type) {
	case SendAppend:
		for s := a.First; s <= a.Last; s++ {
			w := writes[s]
			for c := w.Offset / holdfast.ChunkSize; c <= (w.Offset+w.Length-1)/holdfast.ChunkSize; c++ {
				switch {
				case m.lost:
				case w.Kind != OpWrite:
					if m.mapped[c] {
						delete(m.mapped, c)
						m.free++
					}
				case m.mapped[c]:
				case m.credit == 0:
					t.Fatalf("%s has no credit for seq %d, which maps chunk %d", name(m.id), s, c)
				default:
					m.credit--
					m.mapped[c] = true
				}
			}
			m.tail = s
		}
		if ahead {
			m.raise(4)
		}
		return []Event{Acked{m.id, m.conn, m.tail, m.credit}}
	case SendAfford:
		need := int64(0)
		for c := a.Offset / holdfast.ChunkSize; c <= (a.Offset+a.Length-1)/holdfast.ChunkSize; c++ {
			if !m.mapped[c] {
				need++
			}
		}
		if need > 0 {
			m.raise(a.Pending + need)
		}
		return []Event{Afforded{m.id, m.conn, a.Ask, need, m.credit, m.tail}}
	case SendFlush:
		return []Event{Flushed{m.id, m.conn, a.ID, m.tail}}
	}
	return nil
}

func (m *spaced) raise(to int64) {
	if more := min(to-m.credit, m.free); more > 0 {
		m.credit += more
		m.free -= more
	}
}

// TestCreditCovers: whatever is written, to disks of whatever room, a member that
// must acknowledge never gets an entry that it has no room for; a write that maps
// nothing is never refused; and one is refused only if a disk is full for it.
func TestCreditCovers(t *testing.T) {
	refusals, evictions := 0, 0
	rapid.Check(t, func(t *rapid.T) {
		o := Options{Epoch: 3, ISRVersion: 1, Copies: 3, MinCopies: rapid.IntRange(1, 3).Draw(t, "min"), Node: nod("1"), History: []Start{{Epoch: 1}}}
		members := []*spaced{}
		for i, n := range []string{"a", "b", "c"} {
			o.Replicas = append(o.Replicas, Replica{ID: rep(n), Node: nod(string(rune('1' + i))), Role: holdfast.RoleInSync})
			members = append(members, &spaced{id: rep(n), conn: Conn(i + 1), mapped: map[int64]bool{}, free: int64(rapid.IntRange(0, 40).Draw(t, "room"))})
		}
		c := New(o)
		writes := map[holdfast.Seq]Write{}
		asked := map[OpID]Write{}
		done := map[OpID]error{}
		var events []Event
		step := func(ev Event) {
			for _, a := range c.Step(0, ev) {
				switch a := a.(type) {
				case Sequence:
					writes[a.Seq] = asked[a.ID]
				case CompleteWrite:
					done[a.ID] = a.Err
					if errors.Is(a.Err, holdfast.ErrNoSpace) {
						refusals++
						fits := true
						for _, m := range members {
							for ch := asked[a.ID].Offset / holdfast.ChunkSize; ch <= (asked[a.ID].Offset+asked[a.ID].Length-1)/holdfast.ChunkSize; ch++ {
								fits = fits && m.mapped[ch]
							}
						}
						if fits {
							t.Fatalf("write %d maps nothing and was refused", a.ID)
						}
					}
				case Propose:
					if a.Command == CommandShrink {
						evictions++
					}
					events = append(events, Proposed{ID: a.ID, Outcome: OutcomeApplied, ISRVersion: a.ISRVersion + 1})
				case CloseConn:
					for _, m := range members {
						if m.conn == a.Conn {
							m.inbox, m.lost = nil, true
							events = append(events, LinkDown{m.id, m.conn})
						}
					}
				case SendAppend:
					members[a.Conn-1].inbox = append(members[a.Conn-1].inbox, a)
				case SendAfford:
					members[a.Conn-1].inbox = append(members[a.Conn-1].inbox, a)
				case SendFlush:
					members[a.Conn-1].inbox = append(members[a.Conn-1].inbox, a)
				}
			}
		}
		settle := func() {
			for len(events) > 0 {
				ev := events[0]
				events = events[1:]
				step(ev)
			}
		}
		c.Start()
		for _, m := range members {
			step(LinkUp{m.id, m.conn})
		}
		for _, m := range members {
			step(FenceOK{m.id, m.conn, 3, Status{Fence: 3, Intact: true}})
		}
		for _, m := range members {
			m.raise(int64(rapid.IntRange(0, 3).Draw(t, "first credit")))
			step(Opened{m.id, m.conn, 0, 0, 0, m.credit})
		}
		settle()
		if c.State().Phase != PhaseActive {
			t.Fatalf("not active: %+v", c.State())
		}
		var id OpID
		for range rapid.IntRange(1, 150).Draw(t, "steps") {
			m := members[rapid.IntRange(0, 2).Draw(t, "member")]
			switch {
			case rapid.Bool().Draw(t, "write"):
				id++
				chunk := int64(rapid.IntRange(0, 60).Draw(t, "chunk"))
				blocks := int64(rapid.SampledFrom([]int{1, 2, 16, 33}).Draw(t, "blocks"))
				asked[id] = Write{ID: id, Kind: OpWrite, Offset: chunk*holdfast.ChunkSize + int64(rapid.IntRange(0, 15).Draw(t, "block"))*4096, Length: blocks * 4096}
				if rapid.IntRange(0, 4).Draw(t, "trim") == 0 {
					asked[id] = Write{ID: id, Kind: OpTrim, Offset: chunk * holdfast.ChunkSize, Length: 2 * holdfast.ChunkSize}
				}
				step(asked[id])
			case len(m.inbox) > 0:
				for _, ev := range m.take(t, writes, rapid.Bool().Draw(t, "ahead")) {
					if !m.lost {
						step(ev)
					}
				}
			}
			settle()
		}
		for busy := 3; busy > 0; busy-- {
			step(Tick{})
			settle()
			for _, m := range members {
				for len(m.inbox) > 0 {
					busy = 3
					for _, ev := range m.take(t, writes, false) {
						if !m.lost {
							step(ev)
						}
					}
					settle()
				}
			}
		}
		for w := range asked {
			if _, ok := done[w]; !ok && c.inSyncCount() >= o.MinCopies {
				t.Fatalf("write %d was never answered", w)
			}
		}
		for s := holdfast.Seq(1); s <= c.State().Tail; s++ {
			if _, ok := writes[s]; !ok {
				t.Fatalf("seq %d is nobody's", s)
			}
		}
	})
	if refusals == 0 || evictions == 0 {
		t.Fatalf("%d refusals and %d evictions of full members: the test sees nothing", refusals, evictions)
	}
}
