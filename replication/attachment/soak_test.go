package attachment

import (
	"bytes"
	"context"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/replication/latency"
)

// soakCycles is how often TestEvictAndRejoin does it.
func soakCycles(t *testing.T) int {
	t.Helper()
	if os.Getenv("HOLDFAST_SOAK") == "" {
		return 10
	}
	if n, err := strconv.Atoi(os.Getenv("HOLDFAST_SOAK_CYCLES")); err == nil {
		return n
	}
	return 200
}

// client writes blocks one after the other until it is stopped, notes what each
// took, and mirrors them.
type client struct {
	a    *Attachment
	data []byte // what the volume must hold; the test's while the client stands still
	stop chan struct{}
	done sync.WaitGroup
	err  error

	mu    sync.Mutex
	calm  latency.Histogram // while every replica is in sync
	busy  latency.Histogram // while one is brought back
	apart bool              // neither: one is away, or being put out
	sync  bool              // one is brought back
	count int
}

func (c *client) phase(apart, sync bool) {
	c.mu.Lock()
	c.apart, c.sync = apart, sync
	c.mu.Unlock()
}

func (c *client) writes() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.count
}

// run begins to write.
func (c *client) run(seed uint64) {
	c.stop = make(chan struct{})
	c.done.Go(func() {
		rng := rand.New(rand.NewPCG(seed, 5))
		for {
			select {
			case <-c.stop:
				return
			default:
			}
			off := rng.Int64N(int64(len(c.data))/holdfast.BlockSize) * holdfast.BlockSize
			p := c.data[off : off+holdfast.BlockSize]
			random(rng, p)
			began := time.Now()
			if c.err = c.a.WriteAt(context.Background(), p, off, false); c.err != nil {
				return
			}
			c.mu.Lock()
			c.count++
			switch {
			case c.sync:
				c.busy.Add(time.Since(began))
			case !c.apart:
				c.calm.Add(time.Since(began))
			}
			c.mu.Unlock()
		}
	})
}

// still stops the client and fails if a write did.
func (c *client) still(t *testing.T) {
	t.Helper()
	close(c.stop)
	c.done.Wait()
	if c.err != nil {
		t.Fatalf("a write failed: %v\n%+v", c.err, c.a.Status())
	}
}

// TestEvictAndRejoin puts a member out again and again, under a client that writes
// all along, and brings it back while the member that it is brought back from dies
// in the middle: by log, or by chunks where the logs do not reach. The writer has
// no replica of its own, so that a source is always another node. After each cycle
// the replicas are the same, byte for byte. HOLDFAST_SOAK=1 does it 200 times.
func TestEvictAndRejoin(t *testing.T) {
	cl := newCluster(t, 3, 16<<20, 16<<20)
	holder := newHost(t, 9, 96<<20)
	o := cl.options(holder)
	o.Limits.WindowOps = 256
	a, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = a.Close() })
	cl.waitAttached(a)
	c := &client{a: a, data: make([]byte, cl.size)}
	rng := rand.New(rand.NewPCG(6, 6))
	random(rng, c.data)
	for off := int64(0); off < cl.size; off += 1 << 20 {
		if err := a.WriteAt(t.Context(), c.data[off:off+1<<20], off, false); err != nil {
			t.Fatal(err)
		}
	}
	cycles := soakCycles(t)
	var killed, chunks int
	for cycle := range cycles {
		victim := cl.hosts[cycle%3]
		byChunks := cycle%2 == 1
		half := int64(2 << 20) // of the 4 MiB whose chunks changed
		c.phase(false, false)
		c.run(uint64(cycle))
		until(t, cl, c, 200)
		c.phase(true, false)
		victim.kill()
		cl.eventually("the victim is put out", a, func() bool { return len(cl.meta.isr(0)) == 2 })
		if byChunks {
			c.still(t)
			for range 8 { // 32 MiB through logs of 16
				if err := a.WriteAt(t.Context(), c.data[:4<<20], 0, false); err != nil {
					t.Fatal(err)
				}
			}
			c.run(uint64(cycle) << 32)
		} else {
			from := c.writes()
			until(t, cl, c, 1000)
			half = int64(c.writes()-from) * holdfast.BlockSize / 2
		}
		before := a.Status().Segments[0].BytesResynced
		c.phase(true, true)
		victim.start()
		if byChunks {
			cl.grow(a, 0)
		}
		if source := cl.sourceHalfWay(a, victim, before+half); source != nil {
			// No other is in sync but the third: the victim comes back from it.
			source.kill()
			killed++
			cl.eventually("the victim is back without the source", a, func() bool { return len(cl.meta.isr(0)) == 2 && inSync(a, victim) })
			source.start()
		}
		cl.waitBack(a)
		c.phase(true, false)
		if byChunks {
			chunks++
		}
		c.still(t)
		if err := a.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		cl.waitInSync(a, 3)
		cl.compare(c.data, cl.hosts...)
	}
	got := make([]byte, cl.size)
	for off := int64(0); off < cl.size; off += 1 << 20 {
		if err := a.ReadAt(t.Context(), got[off:off+1<<20], off); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(got, c.data) {
		t.Error(difference(got, c.data))
	}
	t.Logf("%d cycles, %d of them by chunks, the source killed half-way in %d; %d writes; p99 without resync %v (of %d writes), with resync %v (of %d)",
		cycles, chunks, killed, c.count, c.calm.P99(), c.calm.N(), c.busy.P99(), c.busy.N())
	if killed < cycles/2 {
		t.Errorf("the source was killed half-way in %d of %d cycles: the resync is over before the test sees it", killed, cycles)
	}
}

// until waits for so many more writes of the client.
func until(t *testing.T, cl *cluster, c *client, n int) {
	t.Helper()
	from := c.writes()
	cl.eventually("the client writes", c.a, func() bool { return c.writes() >= from+n })
}

// sourceHalfWay waits until half of what the victim lacks has been sent, and returns
// the host that it comes from; nil if the victim was back before.
func (cl *cluster) sourceHalfWay(a *Attachment, victim *host, half int64) (source *host) {
	cl.t.Helper()
	s := a.segments[0]
	cl.eventually("half of what the victim lacks is sent", a, func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.resent >= half {
			for _, run := range s.copies {
				source = cl.hostOf(run.source)
			}
		}
		return source != nil || len(cl.meta.isr(0)) == 3
	})
	return source
}

// hostOf is where a replica lies.
func (cl *cluster) hostOf(id holdfast.ReplicaID) *host {
	cl.meta.mu.Lock()
	defer cl.meta.mu.Unlock()
	for _, r := range cl.meta.segments[0].replicas {
		for _, h := range cl.hosts {
			if r.ID == id && r.Node == h.node {
				return h
			}
		}
	}
	return nil
}

func inSync(a *Attachment, h *host) bool {
	for _, m := range a.Status().Segments[0].State.Members {
		if m.Node == h.node {
			return m.InSync
		}
	}
	return false
}

// waitBack waits until three are in sync, whatever is being written.
func (cl *cluster) waitBack(a *Attachment) {
	cl.t.Helper()
	cl.eventually("three members in sync", a, func() bool { return len(cl.meta.isr(0)) == 3 })
}
