package attachment

import (
	"context"
	"fmt"
	"net"
	"sync"
	"testing"

	"github.com/holdfast-storage/holdfast"
)

// meter counts the bytes that pass between a writer and each node, at its sockets.
type meter struct {
	mu         sync.Mutex
	sent, got  map[holdfast.NodeID]int64
	underneath func(ctx context.Context, n holdfast.NodeID) (net.Conn, error)
}

func newMeter(dial func(ctx context.Context, n holdfast.NodeID) (net.Conn, error)) *meter {
	return &meter{sent: map[holdfast.NodeID]int64{}, got: map[holdfast.NodeID]int64{}, underneath: dial}
}

func (m *meter) dial(ctx context.Context, n holdfast.NodeID) (net.Conn, error) {
	c, err := m.underneath(ctx, n)
	if err != nil {
		return nil, err
	}
	return &meteredConn{Conn: c, m: m, node: n}, nil
}

// to is what was sent to a node; from is what came from it.
func (m *meter) to(n holdfast.NodeID) int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.sent[n]
}

func (m *meter) from(n holdfast.NodeID) int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.got[n]
}

type meteredConn struct {
	net.Conn
	m    *meter
	node holdfast.NodeID
}

func (c *meteredConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.m.mu.Lock()
	c.m.sent[c.node] += int64(n)
	c.m.mu.Unlock()
	return n, err
}

func (c *meteredConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.m.mu.Lock()
	c.m.got[c.node] += int64(n)
	c.m.mu.Unlock()
	return n, err
}

// absence is a member that is away while a writer makes a known amount of changes.
type absence struct {
	*cluster
	a      *Attachment
	m      *model
	meter  *meter
	victim *host
}

// newAbsence attaches a volume that is full of data, on a host with a replica or
// without, and ends the victim once its chunks hold all that was written; with
// settled they do so in a checkpoint, else what its log still holds is applied
// again after the restart.
func newAbsence(t *testing.T, seed uint64, hosts int, local bool, windowOps int, settled bool) *absence {
	c := newCluster(t, hosts, 8<<20, 8<<20)
	holder := c.hosts[0]
	if !local {
		holder = newHost(t, 9, 96<<20)
	}
	o := c.options(holder)
	o.Limits.WindowOps = windowOps
	x := &absence{cluster: c, m: newModel(seed, c.size), meter: newMeter(c.dial), victim: c.hosts[1]}
	o.Dial = x.meter.dial
	a, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = a.Close() })
	x.a = a
	c.waitAttached(a)
	x.write(t, 0, c.size)
	if err := a.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.eventually("the victim applied everything", a, func() bool {
		st := x.victim.disk.Replicas()[0].Status()
		return st.Applied == a.Status().Segments[0].State.Tail
	})
	if settled {
		if err := x.victim.disk.Checkpoint(t.Context()); err != nil {
			t.Fatal(err)
		}
	} else if st := x.victim.disk.Replicas()[0].Status(); st.Checkpoint == st.Applied {
		t.Fatal("the victim wrote a checkpoint by itself: this shows nothing")
	}
	x.victim.kill()
	return x
}

// write fills a range with new bytes, a MiB at a time.
func (x *absence) write(t *testing.T, off, n int64) {
	t.Helper()
	part := x.m.data[off : off+n]
	random(x.m.rng, part)
	for at := int64(0); at < n; at += 1 << 20 {
		end := min(at+1<<20, n)
		if err := x.a.WriteAt(t.Context(), part[at:end], off+at, false); err != nil {
			t.Fatal(err)
		}
	}
}

// comeBack starts the victim and returns what was sent to it until it was in
// sync, and what the writer got from the other members for that.
func (x *absence) comeBack(t *testing.T) (sent, got int64) {
	t.Helper()
	if err := x.a.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	others := func() (n int64) {
		for _, h := range x.hosts {
			if h != x.victim {
				n += x.meter.from(h.node)
			}
		}
		return n
	}
	sent, got = x.meter.to(x.victim.node), others()
	x.victim.start()
	x.waitInSync(x.a, len(x.hosts))
	sent, got = x.meter.to(x.victim.node)-sent, others()-got
	x.m.verify(t, x.a)
	if err := x.a.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	x.compare(x.m.data, x.hosts...)
	return sent, got
}

// within fails when more than share of amount went over the wire, or less than
// it: then it went another way and the test measures nothing.
func within(t *testing.T, what string, n, amount int64, share float64) {
	t.Helper()
	t.Logf("%s: %d bytes for %d, %.3f of it", what, n, amount, float64(n)/float64(amount))
	if n < amount || float64(n) > share*float64(amount) {
		t.Errorf("%s: %d bytes at the wire for %d, want at most %.1f of it", what, n, amount, share)
	}
}

// What a member missed and the logs still hold comes as it was written, and little
// else: at most 1.1 of it, from the window as from another member's log.
func TestBytesOfTheLog(t *testing.T) {
	for _, v := range []struct {
		name   string
		ops    int // of the window
		local  bool
		writes int
	}{
		{"window", 0, true, 600},
		{"local log", 16, true, 600},
		{"another's log", 16, false, 600},
	} {
		t.Run(v.name, func(t *testing.T) {
			x := newAbsence(t, 40, 3, v.local, v.ops, true)
			for range v.writes {
				block := x.m.rng.Int64N(x.size / holdfast.BlockSize)
				x.write(t, block*holdfast.BlockSize, holdfast.BlockSize)
			}
			missed := int64(v.writes) * holdfast.BlockSize
			sent, got := x.comeBack(t)
			within(t, "to the member", sent, missed, 1.1)
			if !v.local {
				within(t, "from the others", got, missed, 1.1)
			}
		})
	}
}

// What the logs no longer hold comes as chunks: at most 1.3 of those that changed.
func TestBytesOfChunks(t *testing.T) {
	for _, local := range []bool{true, false} {
		for _, dense := range []bool{true, false} {
			t.Run(fmt.Sprintf("local=%v dense=%v", local, dense), func(t *testing.T) {
				x := newAbsence(t, 41, 3, local, 0, true)
				chunks := int64(32)
				for range 16 { // 32 MiB, or more than as much in entries of one block, through logs of 16
					if dense {
						x.write(t, 2<<20, chunks*holdfast.ChunkSize)
						continue
					}
					for i := range chunks {
						for range 16 {
							x.write(t, 2*i*holdfast.ChunkSize+x.m.rng.Int64N(16)*holdfast.BlockSize, holdfast.BlockSize)
						}
					}
				}
				dirty := chunks * holdfast.ChunkSize
				sent, got := x.comeBack(t)
				within(t, "to the member", sent, dirty, 1.3)
				if !local {
					within(t, "from the others", got, dirty, 1.3)
				}
			})
		}
	}
}

// The same for a member that was killed with no checkpoint of what it had last
// applied: what its log holds of that is applied before JOIN drops the log.
func TestBytesOfChunksWithoutCheckpoint(t *testing.T) {
	for _, local := range []bool{true, false} {
		t.Run(fmt.Sprintf("local=%v", local), func(t *testing.T) {
			x := newAbsence(t, 42, 3, local, 0, false)
			x.victim.applyEvery = -1 // nothing is applied by chance between the start and JOIN
			chunks := int64(32)
			for range 16 {
				x.write(t, 0, chunks*holdfast.ChunkSize) // not what was written last before
			}
			dirty := chunks * holdfast.ChunkSize
			sent, got := x.comeBack(t)
			within(t, "to the member", sent, dirty, 1.3)
			if !local {
				within(t, "from the others", got, dirty, 1.3)
			}
		})
	}
}
