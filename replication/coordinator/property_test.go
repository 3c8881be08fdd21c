package coordinator

import (
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/holdfast-storage/holdfast"
)

// madhouse feeds a core with events in any order, true and false, and checks
// what may never happen whatever the others do.
type madhouse struct {
	t   *rapid.T
	c   *Core
	now time.Duration

	asked     map[OpID]int // completions of each request
	sequenced holdfast.Seq
	released  holdfast.Seq
	conns     map[string]Conn // the open connection of each member
	acks      map[string]holdfast.Seq
	proposals []Propose
	metas     []ReadMeta
	samples   []SampleRead
	ended     bool
	writes    map[OpID]holdfast.Seq
}

func (m *madhouse) step(ev Event) {
	before := m.c.State()
	for _, a := range m.c.Step(m.now, ev) {
		m.act(a, ev)
	}
	s := m.c.State()
	switch {
	case s.Phase == PhaseActive && (s.Commit > s.Acked || s.Acked > s.Tail):
		m.t.Fatalf("after %#v: commit %d, acked %d, tail %d", ev, s.Commit, s.Acked, s.Tail)
	case before.Phase == PhaseActive && (s.Commit < before.Commit || s.Acked < before.Acked):
		m.t.Fatalf("after %#v: commit fell from %d to %d, or acked from %d to %d", ev, before.Commit, s.Commit, before.Acked, s.Acked)
	}
	inSync := 0
	for _, x := range s.Members {
		if x.InSync {
			inSync++
		}
		if s.Phase == PhaseActive && x.InSync && !x.InAckset {
			m.t.Fatalf("after %#v: %v is in sync and its acks are not required (R2)", ev, x.Replica)
		}
	}
	if s.Phase == PhaseActive && inSync == 0 {
		m.t.Fatalf("after %#v: the in-sync set is empty", ev)
	}
	if len(m.proposals) > 1 {
		m.t.Fatalf("after %#v: %d commands at once", ev, len(m.proposals))
	}
}

func (m *madhouse) open(r holdfast.ReplicaID, c Conn, what string) {
	if m.conns[name(r)] != c {
		m.t.Fatalf("%s to %s#%d, open is #%d", what, name(r), c, m.conns[name(r)])
	}
}

func (m *madhouse) complete(id OpID) {
	m.asked[id]++
	if m.asked[id] != 1 {
		m.t.Fatalf("request %d was completed %d times", id, m.asked[id])
	}
}

func (m *madhouse) act(a Action, ev Event) {
	if m.ended {
		switch a.(type) {
		case CompleteWrite, CompleteRead, CompleteFlush, CloseConn:
		default:
			m.t.Fatalf("%T after the end", a)
		}
	}
	switch a := a.(type) {
	case CompleteWrite:
		m.complete(a.ID)
		if n := m.c.inSyncCount(); a.Err == nil && n < m.c.opt.MinCopies {
			m.t.Fatalf("write %d completed with %d copies in sync, fewer than min_copies %d", a.ID, n, m.c.opt.MinCopies)
		}
		if seq := m.writes[a.ID]; a.Err == nil {
			for _, x := range m.c.State().Members {
				if x.InAckset && m.acks[name(x.Replica)] < seq {
					m.t.Fatalf("write %d (seq %d) completed without %s, which acknowledged %d on its connection (R2, R8)", a.ID, seq, name(x.Replica), m.acks[name(x.Replica)])
				}
			}
		}
	case CompleteRead:
		m.complete(a.ID)
	case CompleteFlush:
		m.complete(a.ID)
	case Sequence:
		m.sequenced++
		m.writes[a.ID] = a.Seq
	case ReleaseWindow:
		m.released = a.UpTo
		if a.UpTo > m.c.State().Commit {
			m.t.Fatalf("seq %d released, commit is %d", a.UpTo, m.c.State().Commit)
		}
	case SendAppend:
		m.open(a.Replica, a.Conn, "APPEND")
		if a.First <= m.released || a.Last > m.c.State().Tail || a.First > a.Last {
			m.t.Fatalf("append %d..%d, window %d..%d", a.First, a.Last, m.released+1, m.c.State().Tail)
		}
	case SendFence:
		m.open(a.Replica, a.Conn, "FENCE")
	case SendOpen:
		m.open(a.Replica, a.Conn, "OPEN")
	case SendFlush:
		m.open(a.Replica, a.Conn, "FLUSH")
	case SendPing:
		m.open(a.Replica, a.Conn, "PING")
	case CloseConn:
		if m.conns[name(a.Replica)] == a.Conn {
			delete(m.conns, name(a.Replica))
			delete(m.acks, name(a.Replica))
		}
	case Propose:
		m.proposals = append(m.proposals, a)
	case ReadMeta:
		m.metas = append(m.metas, a)
	case SampleRead:
		m.open(a.Replica, a.Conn, "READ")
		m.samples = append(m.samples, a)
	case EndSession:
		m.ended = true
	}
}

// TestMadhouse: whatever comes in whatever order, requests are completed once,
// acknowledged and committed never fall, the in-sync set stays within the
// ackset, and nothing panics.
func TestMadhouse(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		names := []string{"a", "b", "c"}
		o := Options{Epoch: 3, ISRVersion: 1, Copies: 3, Node: nod("1"), History: []Start{{Epoch: 1, S: 0}}, Limits: Limits{WindowOps: 8}}
		policy := func() Policy {
			return Policy{Copies: rapid.IntRange(1, 4).Draw(t, "copies"), MinCopies: rapid.IntRange(0, 3).Draw(t, "min copies"), FailHeldAfter: time.Duration(rapid.IntRange(0, 4).Draw(t, "fail after")) * time.Second}
		}
		p := policy()
		o.MinCopies, o.FailHeldAfter = p.MinCopies, p.FailHeldAfter
		for i, n := range names {
			role := holdfast.RoleInSync
			if i > 0 && rapid.Bool().Draw(t, "stale") {
				role = holdfast.RoleStale
			}
			o.Replicas = append(o.Replicas, Replica{ID: rep(n), Node: nod(string(rune('1' + i))), Role: role})
		}
		m := &madhouse{t: t, c: New(o), asked: map[OpID]int{}, conns: map[string]Conn{}, acks: map[string]holdfast.Seq{}, writes: map[OpID]holdfast.Seq{}}
		for _, a := range m.c.Start() {
			m.act(a, nil)
		}
		var conn Conn
		var id OpID
		for range rapid.IntRange(1, 200).Draw(t, "steps") {
			n := names[rapid.IntRange(0, 2).Draw(t, "member")]
			r, c := rep(n), m.conns[n]
			if rapid.IntRange(0, 15).Draw(t, "stale conn") == 0 {
				c = Conn(rapid.IntRange(0, int(conn)).Draw(t, "conn"))
			}
			tail := m.c.State().Tail
			seq := holdfast.Seq(rapid.IntRange(0, int(tail)+1).Draw(t, "seq"))
			credit := func() int64 {
				return rapid.SampledFrom([]int64{0, 1, 3, Unlimited, Unlimited, Unlimited}).Draw(t, "credit")
			}
			switch rapid.IntRange(0, 21).Draw(t, "event") {
			case 21:
				m.step(Afforded{r, c, m.c.asks - min(m.c.asks, uint64(rapid.IntRange(0, 2).Draw(t, "ask"))), int64(rapid.IntRange(0, 2).Draw(t, "need")), credit(), seq})
			case 20:
				if rapid.IntRange(0, 3).Draw(t, "policy") == 0 {
					m.step(policy())
				}
			case 0, 1:
				m.now += time.Duration(rapid.IntRange(1, 3000).Draw(t, "ms")) * time.Millisecond
				m.step(Tick{})
			case 2, 3:
				if m.conns[n] == 0 && m.c.member(r).link == linkDialing {
					conn++
					m.conns[n] = conn
					m.step(LinkUp{r, conn})
				}
			case 4:
				if rapid.IntRange(0, 3).Draw(t, "down") == 0 && m.conns[n] == c && c != 0 {
					delete(m.conns, n)
					delete(m.acks, n)
					m.step(LinkDown{r, c})
				}
			case 5, 6:
				m.step(FenceOK{r, c, 3, Status{
					Fence: 3, Tail: seq, TailEpoch: holdfast.Epoch(rapid.IntRange(0, 3).Draw(t, "of")), Dur: seq,
					Intact: rapid.Bool().Draw(t, "intact"), Syncing: rapid.IntRange(0, 5).Draw(t, "syncing") == 0,
				}})
			case 7, 8:
				cut := seq
				if x := m.c.member(r); x != nil && x.link == linkOpening && rapid.IntRange(0, 9).Draw(t, "true") > 0 {
					cut = x.cut
				}
				if c == m.conns[n] && c != 0 && m.c.member(r).link == linkOpening && cut == m.c.member(r).cut {
					m.acks[n] = cut
				}
				m.step(Opened{r, c, cut, cut, 0, credit()})
			case 9, 10, 11:
				if c == m.conns[n] && c != 0 {
					m.acks[n] = max(m.acks[n], seq)
				}
				m.step(Acked{r, c, seq, credit()})
			case 12:
				if c == m.conns[n] && c != 0 {
					m.acks[n] = max(m.acks[n], seq)
				}
				m.step(Flushed{r, c, m.c.flushIDs, seq})
			case 13:
				m.step(Pong{r, c, m.c.round, time.Duration(rapid.IntRange(0, 2000).Draw(t, "promise")) * time.Millisecond})
			case 14, 15:
				id++
				m.asked[id] = 0
				m.step(Write{ID: id, Kind: OpWrite, Offset: int64(id%4) * 4096, Length: 4096, FUA: id%5 == 0})
			case 16:
				id++
				m.asked[id] = 0
				if id%2 == 0 {
					m.step(Flush{ID: id})
				} else {
					m.step(Read{ID: id, Offset: int64(id%4) * 4096, Length: 8192})
				}
			case 17:
				if len(m.samples) > 0 {
					s := m.samples[0]
					m.samples = m.samples[1:]
					m.step(Sampled{ID: s.ID, Sample: s.Sample, Replica: s.Replica, Conn: s.Conn})
				}
			case 18:
				m.raft()
			case 19:
				if len(m.metas) > 0 {
					q := m.metas[0]
					m.metas = m.metas[1:]
					s := m.c.State()
					e := Meta{ID: q.ID, Epoch: 3, Activated: s.Phase == PhaseActive, ISRVersion: s.ISRVersion}
					for _, x := range s.Members {
						if x.InSync {
							e.ISR = append(e.ISR, x.Replica)
						}
					}
					m.step(e)
				}
			}
		}
		m.step(Stop{})
		for id, n := range m.asked {
			if n != 1 {
				t.Fatalf("request %d was completed %d times, want once", id, n)
			}
		}
		m.asked[id+1] = 0
		m.step(Read{ID: id + 1})
		if m.asked[id+1] != 1 {
			t.Fatalf("a request after the end was not refused")
		}
	})
}

func (m *madhouse) raft() {
	if len(m.proposals) == 0 {
		return
	}
	p := m.proposals[0]
	m.proposals = nil
	o := rapid.SampledFrom([]Outcome{OutcomeApplied, OutcomeApplied, OutcomeApplied, OutcomeUnknown, OutcomeConflict}).Draw(m.t, "outcome")
	m.step(Proposed{ID: p.ID, Outcome: o, ISRVersion: p.ISRVersion + 1})
}
