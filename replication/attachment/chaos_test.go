package attachment

import (
	"context"
	"errors"
	"flag"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/replication/coordinator"
)

var (
	chaosSeed   = flag.Uint64("chaos.seed", 1, "first seed of TestChaos")
	chaosRounds = flag.Int("chaos.rounds", 4, "seeds of TestChaos")
	chaosEvents = flag.Int("chaos.events", 15, "failures per seed")
)

// Random failures under a writer that is checked all along: at least one
// in-sync member keeps its memory at any time, so not one acknowledged write
// may be lost (C2). A failure is replayed by
//
//	go test -run TestChaos ./replication/attachment -chaos.seed N -chaos.rounds 1
func TestChaos(t *testing.T) {
	for i := range *chaosRounds {
		chaos(t, *chaosSeed+uint64(i))
		if t.Failed() {
			t.Fatalf("seed %d", *chaosSeed+uint64(i))
		}
	}
}

func chaos(t *testing.T, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 77))
	c := newCluster(t, 3, 4<<20, 2<<20)
	if seed%2 == 0 { // reads by promise
		for _, h := range c.hosts {
			h.promise = 300 * time.Millisecond
			h.kill()
			h.start()
		}
	}
	holder := 0
	a := c.attach(c.hosts[holder])
	m := newModel(seed, c.size)
	for range *chaosEvents {
		m.mutate(t, a, 1+rng.IntN(30))
		victim := rng.IntN(3)
		h := c.hosts[victim]
		what := rng.IntN(8)
		t.Logf("seed %d: event %d on host %d, writer on %d", seed, what, victim, holder)
		switch what {
		case 0: // connections break
			h.sever()
		case 1: // out of reach, for a while that may or may not be long enough to be evicted
			h.reach(false)
			m.mutate(t, a, rng.IntN(5))
			time.Sleep(time.Duration(rng.IntN(700)) * time.Millisecond)
			h.reach(true)
		case 2, 3: // a process dies; the writer with it if it lives there
			c.waitAnother(a, h)
			if victim == holder {
				_ = a.Close()
				h.kill()
				holder = (victim + 1 + rng.IntN(2)) % 3
				a = c.takeover(a, holder)
				m.verify(t, a)
				h.start()
			} else {
				h.kill()
				m.mutate(t, a, rng.IntN(10))
				h.start()
			}
		case 4: // a machine dies, with what it had not synced
			c.waitInSync(a, 3) // so that the others have everything
			if victim == holder {
				_ = a.Close()
				h.powerLoss(rng.Uint64())
				holder = (victim + 1 + rng.IntN(2)) % 3
				a = c.takeover(a, holder)
				m.verify(t, a)
			} else {
				h.powerLoss(rng.Uint64())
				m.mutate(t, a, rng.IntN(10))
			}
			h.start()
		case 5: // another node takes over from a writer that lives
			holder = victim
			a = c.takeover(a, holder)
			m.verify(t, a)
		case 6: // raft is away for a moment, and forgets an answer
			c.meta.setQuorum(false)
			h.sever()
			time.Sleep(time.Duration(rng.IntN(100)) * time.Millisecond)
			c.meta.mu.Lock()
			c.meta.noQuorum, c.meta.forget = false, rng.IntN(2)
			c.meta.mu.Unlock()
		case 7: // a clean detach, and an attach somewhere
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			if err := a.Detach(ctx); err != nil {
				t.Fatalf("detach: %v", err)
			}
			cancel()
			holder = victim
			a = c.takeover(a, holder)
			m.verify(t, a)
		}
		c.growAll(a)
	}
	c.growAll(a)
	c.waitInSync(a, 3)
	m.verify(t, a)
	if err := a.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.compare(m.data, c.hosts...)
}

// takeover attaches on another host, as often as the in-sync set changes in
// the meantime, and closes the old writer only then.
func (c *cluster) takeover(old *Attachment, holder int) *Attachment {
	c.t.Helper()
	defer func() { _ = old.Close() }()
	for {
		a, err := New(c.options(c.hosts[holder]))
		if err != nil {
			c.t.Fatal(err)
		}
		c.t.Cleanup(func() { _ = a.Close() })
		ctx, cancel := context.WithTimeout(context.Background(), 40*time.Second)
		err = a.Attach(ctx)
		cancel()
		if err == nil {
			return a
		}
		if !errors.Is(err, holdfast.ErrUnavailable) {
			c.t.Fatalf("take over: %v\n%+v\nraft: %+v", err, a.Status(), c.meta.segments)
		}
		_ = a.Close()
	}
}

func (c *cluster) growAll(a *Attachment) {
	for i := range a.segments {
		c.grow(a, i)
	}
}

// waitAnother waits until each segment has an in-sync member that is not on h.
func (c *cluster) waitAnother(a *Attachment, h *host) {
	c.t.Helper()
	c.eventually("another member is in sync", a, func() bool {
		c.meta.mu.Lock()
		defer c.meta.mu.Unlock()
		for _, s := range c.meta.segments {
			if !slices.ContainsFunc(s.replicas, func(r coordinator.Replica) bool { return r.Role == holdfast.RoleInSync && r.Node != h.node }) {
				return false
			}
		}
		return true
	})
}
