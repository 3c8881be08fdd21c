package coordinator

import (
	"testing"

	"github.com/holdfast-storage/holdfast"
)

// activeCore returns a core of three members that serves requests.
func activeCore(b *testing.B) *Core {
	o := Options{Epoch: 3, ISRVersion: 1, Copies: 3, Node: nod("1")}
	for i, n := range []string{"a", "b", "c"} {
		o.Replicas = append(o.Replicas, Replica{ID: rep(n), Node: nod(string(rune('1' + i))), Role: holdfast.RoleInSync})
	}
	c := New(o)
	c.Start()
	for i, r := range o.Replicas {
		c.Step(0, LinkUp{r.ID, Conn(i + 1)})
	}
	for i, r := range o.Replicas {
		c.Step(0, FenceOK{r.ID, Conn(i + 1), 3, Status{Fence: 3, Intact: true}})
	}
	for i, r := range o.Replicas {
		c.Step(0, Opened{r.ID, Conn(i + 1), 0, 0, 0, Unlimited})
	}
	c.Step(0, Proposed{ID: 1, Outcome: OutcomeApplied, ISRVersion: 2})
	if c.State().Phase != PhaseActive {
		b.Fatalf("not active: %+v", c.State())
	}
	return c
}

// BenchmarkWrite is one write of 4 KiB to three copies, 32 in flight, with the
// flushes that the window asks for.
func BenchmarkWrite(b *testing.B) {
	c := activeCore(b)
	members := []holdfast.ReplicaID{rep("a"), rep("b"), rep("c")}
	var seq holdfast.Seq
	var id OpID
	take := func(actions []Action) {
		var flushed [3]uint64
		for _, a := range actions {
			if f, ok := a.(SendFlush); ok {
				flushed[f.Conn-1] = f.ID
			}
		}
		for i, f := range flushed {
			if f != 0 {
				c.Step(0, Flushed{members[i], Conn(i + 1), f, seq})
			}
		}
	}
	b.ReportAllocs()
	for b.Loop() {
		id++
		c.Step(0, Write{ID: id, Kind: OpWrite, Offset: int64(id%1024) * 4096, Length: 4096})
		if id > 32 {
			seq++
			for i, m := range members {
				take(c.Step(0, Acked{m, Conn(i + 1), seq, 1024}))
			}
		}
	}
}

// BenchmarkRead is one read of 4 KiB, sampled at home and confirmed by two
// pings, with 32 other reads under way.
func BenchmarkRead(b *testing.B) {
	c := activeCore(b)
	var id OpID
	pending := []SampleRead{}
	b.ReportAllocs()
	for b.Loop() {
		id++
		var nonce uint64
		for _, a := range c.Step(0, Read{ID: id, Offset: int64(id%1024) * 4096, Length: 4096}) {
			switch a := a.(type) {
			case SampleRead:
				pending = append(pending, a)
			case SendPing:
				nonce = a.Nonce
			}
		}
		if nonce > 0 {
			c.Step(0, Pong{rep("b"), 2, nonce, 0})
			c.Step(0, Pong{rep("c"), 3, nonce, 0})
			c.Step(0, Pong{rep("a"), 1, nonce, 0})
		}
		if len(pending) > 32 {
			s := pending[0]
			pending = append(pending[:0], pending[1:]...)
			c.Step(0, Sampled{ID: s.ID, Sample: s.Sample, Replica: s.Replica, Conn: s.Conn})
		}
	}
}
