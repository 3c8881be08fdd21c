package attachment

import (
	"encoding/binary"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/holdfast-storage/holdfast"
)

// ledger writes numbered blocks, one after the other, and remembers which
// block each number went to. What survives of it must be a prefix.
type ledger struct {
	blocks int64
	rng    *rand.Rand
	at     []int64 // block of write n+1
}

func (l *ledger) write(t testing.TB, a *Attachment, n int) {
	t.Helper()
	p := make([]byte, holdfast.BlockSize)
	for range n {
		b := l.rng.Int64N(l.blocks)
		l.at = append(l.at, b)
		for i := 0; i < len(p); i += 16 {
			binary.BigEndian.PutUint64(p[i:], uint64(len(l.at)))
			binary.BigEndian.PutUint64(p[i+8:], uint64(b))
		}
		if err := a.WriteAt(t.Context(), p, b*holdfast.BlockSize, false); err != nil {
			t.Fatalf("write %d: %v", len(l.at), err)
		}
	}
}

// check reads the volume and returns the number of the last write it holds,
// after making sure that it holds all before it and whole blocks only.
func (l *ledger) check(t testing.TB, a *Attachment) (last int, data []byte) {
	t.Helper()
	data = make([]byte, l.blocks*holdfast.BlockSize)
	if err := a.ReadAt(t.Context(), data, 0); err != nil {
		t.Fatalf("read: %v", err)
	}
	got := make([]int, l.blocks)
	for b := range l.blocks {
		p := data[b*holdfast.BlockSize : (b+1)*holdfast.BlockSize]
		got[b] = int(binary.BigEndian.Uint64(p))
		for i := 0; i < len(p); i += 16 {
			n, of := int(binary.BigEndian.Uint64(p[i:])), int64(binary.BigEndian.Uint64(p[i+8:]))
			if n != got[b] || n != 0 && of != b {
				t.Fatalf("block %d, byte %d: write %d of block %d beside write %d", b, i, n, of, got[b])
			}
		}
		last = max(last, got[b])
	}
	if last > len(l.at) {
		t.Fatalf("the volume holds write %d, only %d were issued", last, len(l.at))
	}
	want := make([]int, l.blocks)
	for n, b := range l.at[:last] {
		want[b] = n + 1
	}
	for b := range want {
		if got[b] != want[b] {
			t.Fatalf("the volume holds write %d, but block %d is as of write %d, want %d", last, b, got[b], want[b])
		}
	}
	return last, data
}

// All hosts lose power at once: unsynced pages are dropped, boot ids change.
// Flushed data is there, what survives is a prefix of one order, the session
// is not continued, and all replicas are byte-identical afterwards.
func TestPowerLossOfAll(t *testing.T) {
	for seed := range uint64(8) {
		c := newCluster(t, 3, 4<<20, 4<<20)
		a := c.attach(c.hosts[0])
		l := &ledger{blocks: c.size / holdfast.BlockSize, rng: rand.New(rand.NewPCG(seed, 9))}
		l.write(t, a, 150)
		if err := a.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		flushed := len(l.at)
		l.write(t, a, int(20+seed*10))
		powerLoss(c, a, seed)

		for round := range 2 { // the second time nothing may have changed
			for _, h := range c.hosts {
				h.start()
			}
			b := c.attach(c.hosts[1+round])
			if b.Continuous() {
				t.Errorf("seed %d: continuous after every member lost power", seed)
			}
			last, data := l.check(t, b)
			if last < flushed {
				t.Fatalf("seed %d: write %d of %d flushed ones is the last that survived", seed, last, flushed)
			}
			l.at = l.at[:last]
			flushed = last
			c.waitInSync(b, 3)
			if err := b.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
			c.compare(data, c.hosts...)
			powerLoss(c, b, seed+100)
		}
	}
}

// powerLoss takes the power of all hosts while the attachment lives.
func powerLoss(c *cluster, a *Attachment, seed uint64) {
	var off sync.WaitGroup
	for i, h := range c.hosts {
		off.Go(func() { h.powerLoss(seed*10 + uint64(i)) })
	}
	off.Wait()
	_ = a.Close()
}

// One host loses power and comes back: its unflushed entries are replayed, the
// session goes on, nobody notices.
func TestPowerLossOfOne(t *testing.T) {
	for seed := range uint64(4) {
		c := newCluster(t, 3, 4<<20, 4<<20)
		a := c.attach(c.hosts[0])
		m := newModel(seed, c.size)
		m.mutate(t, a, 60)
		c.hosts[2].powerLoss(seed)
		c.hosts[2].start()
		m.mutate(t, a, 60)
		c.waitInSync(a, 3)
		m.verify(t, a)
		if err := a.Detach(t.Context()); err != nil {
			t.Fatal(err)
		}
		c.compare(m.data, c.hosts...)
	}
}
