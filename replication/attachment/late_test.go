package attachment

import (
	"testing"

	"github.com/holdfast-storage/holdfast/replication/coordinator"
	"github.com/holdfast-storage/holdfast/replication/wire"
)

// An acknowledgement arrives on a session that the core has closed, and whose
// entries have left the window since (the member was put out): the credit it
// brings must not send them.
func TestLateAck(t *testing.T) {
	c := newCluster(t, 2, 4<<20, 4<<20)
	a := c.attach(c.hosts[0])
	m := newModel(41, c.size)
	m.mutate(t, a, 10)
	if err := a.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	s := a.segments[0]
	c.eventually("the window is empty", a, func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.window.n == 0
	})
	s.mu.Lock()
	for _, p := range s.peers {
		if p.conn == nil || p.conn.local != nil {
			continue
		}
		n := p.conn
		n.flying = append(n.flying, flight{last: n.sent, bytes: maxUnacked})
		n.unacked += maxUnacked
		n.want = n.sent + 1 // to be sent once there is credit
		n.later = append(n.later, late{after: n.want, m: &wire.Flush{}})
		s.do(coordinator.CloseConn{Replica: p.id, Conn: n.number})
		s.take(n, wire.Header{Type: wire.TypeAck, Epoch: a.o.Epoch}, &wire.Ack{Tail: n.sent})
	}
	broken := s.broken
	s.unlock()
	if broken != nil {
		t.Fatalf("got %v, want the session to go on", broken)
	}
	m.verify(t, a)
}
