package serve

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/disk"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
	"github.com/holdfast-storage/holdfast/replication/wire"
)

const diskPath = "/disks/a"

var (
	testOptions = Options{Cluster: holdfast.ClusterID{0xc1}, Node: holdfast.NodeID{0x0d}, Instance: holdfast.InstanceID{1}, PromiseLength: 1}
	testDesc    = disk.ReplicaDesc{
		Segment: holdfast.SegmentID{Volume: holdfast.VolumeID{0xee}, Index: 2}, Replica: holdfast.ReplicaID{0xaa},
		Lineage: holdfast.LineageID{1}, Size: 4 << 20,
	}
	testHello = wire.Hello{
		Level: 1, Cluster: testOptions.Cluster, From: holdfast.NodeID{0x0e}, To: testOptions.Node, Instance: holdfast.InstanceID{2},
		Segment: testDesc.Segment, Replica: testDesc.Replica, Lineage: testDesc.Lineage, Session: holdfast.SessionID{3},
	}
)

// node is a server with one disk in memory and one replica, reached over TCP.
type node struct {
	t    testing.TB
	fs   *vfs.Memory
	disk *disk.Disk
	s    *Server
	addr string

	gates map[vfs.Op]*atomic.Pointer[chan struct{}]
}

func newNode(t testing.TB) *node { return newNodeOn(t, func(*vfs.Memory) {}) }

func newNodeOn(t testing.TB, prepare func(fs *vfs.Memory)) *node {
	t.Helper()
	n := &node{t: t, fs: vfs.NewMemory(1), gates: map[vfs.Op]*atomic.Pointer[chan struct{}]{vfs.OpWrite: {}, vfs.OpSync: {}}}
	n.fs.Before(func(op vfs.Op, _ string) {
		if gate := n.gates[op]; gate != nil {
			if c := gate.Load(); c != nil {
				<-*c
			}
		}
	})
	err := disk.Format(context.Background(), n.fs, diskPath, disk.FormatOptions{Cluster: testOptions.Cluster, Node: testOptions.Node, Size: 64 << 20, WALSize: disk.MinWALSize})
	if err != nil {
		t.Fatal(err)
	}
	prepare(n.fs)
	if n.disk, err = disk.Open(context.Background(), n.fs, diskPath, disk.Options{ApplyEvery: 5 * time.Millisecond}); err != nil {
		t.Fatal(err)
	}
	if n.s, err = New(testOptions); err != nil {
		t.Fatal(err)
	}
	if err := n.s.AddDisk(n.disk); err != nil {
		t.Fatal(err)
	}
	if err := n.s.CreateReplica(n.disk.Stat().Disk, testDesc); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n.addr = l.Addr().String()
	served := make(chan error, 1)
	go func() { served <- n.s.Serve(l) }()
	t.Cleanup(func() {
		if err := n.s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
		_ = n.disk.Close()
	})
	return n
}

// client is a writer's end of a session, answered message by message.
type client struct {
	t     testing.TB
	link  wire.Link
	local *Session
	epoch holdfast.Epoch
	in    chan wire.Received
	ended chan error

	tail   holdfast.Seq // of the last OPENED or ACK
	credit uint32       // that it or an ACK of the same tail told
}

func (n *node) client(epoch holdfast.Epoch, local bool) *client {
	n.t.Helper()
	c := &client{t: n.t, epoch: epoch, in: make(chan wire.Received, 1000), ended: make(chan error, 1)}
	hello := testHello
	if local {
		s, _, err := n.s.Connect(epoch, &hello)
		if err != nil {
			n.t.Fatal(err)
		}
		c.link, c.local = s, s
	} else {
		tcp, err := net.Dial("tcp", n.addr)
		if err != nil {
			n.t.Fatal(err)
		}
		link, _, err := wire.Connect(context.Background(), tcp, epoch, &hello)
		if err != nil {
			n.t.Fatal(err)
		}
		c.link = link
	}
	c.link.Start(func(batch []wire.Received, err error) {
		for _, r := range batch {
			c.in <- r
		}
		if err != nil {
			close(c.in)
			c.ended <- err
		}
	})
	n.t.Cleanup(func() { c.link.Close(); c.link.Wait() })
	return c
}

func (c *client) send(request wire.RequestID, m wire.Message) {
	c.link.Send(c.epoch, request, m)
	c.link.Flush()
}

// next returns the next message of a type; others before it are not expected, but
// an ACK that tells of credit alone may come at any time.
func next[M wire.Message](c *client) M {
	c.t.Helper()
	for {
		select {
		case r, ok := <-c.in:
			if !ok {
				c.t.Fatalf("the session ended: %v", <-c.ended)
			}
			if c.credited(r.Message) {
				continue
			}
			m, ok := r.Message.(M)
			if !ok {
				c.t.Fatalf("got %v %+v", r.Header, r.Message)
			}
			return m
		case <-time.After(20 * time.Second):
			c.t.Fatal("no answer")
		}
	}
}

// credited notes what a message says of credit, and whether it says no more.
func (c *client) credited(m wire.Message) bool {
	switch m := m.(type) {
	case *wire.Opened:
		c.tail, c.credit = m.Tail, m.Credit
	case *wire.Ack:
		again := m.Tail == c.tail
		c.tail, c.credit = m.Tail, m.Credit
		return again
	}
	return false
}

// open fences and opens at the tail.
func (c *client) open() *wire.Fenced {
	c.t.Helper()
	c.send(0, &wire.Fence{})
	f := next[*wire.Fenced](c)
	c.send(0, &wire.Open{Start: f.Tail})
	next[*wire.Opened](c)
	return f
}

func entry(epoch holdfast.Epoch, seq holdfast.Seq, fill byte) wire.Entry {
	p := bytes.Repeat([]byte{fill}, holdfast.BlockSize)
	return wire.Entry{Epoch: epoch, Seq: seq, Kind: wire.KindWrite, Offset: int64(seq) * holdfast.BlockSize, Length: holdfast.BlockSize, Sums: wire.BlockSums(nil, p), Data: p}
}

func both(t *testing.T, f func(t *testing.T, n *node, local bool)) {
	t.Run("tcp", func(t *testing.T) { f(t, newNode(t), false) })
	t.Run("in process", func(t *testing.T) { f(t, newNode(t), true) })
}

func TestSession(t *testing.T) {
	both(t, func(t *testing.T, n *node, local bool) {
		c := n.client(5, local)
		if f := c.open(); f.Tail != 0 || f.Syncing || f.Damaged {
			t.Errorf("a new replica says %+v", f)
		}
		c.send(0, &wire.Append{Entries: []wire.Entry{entry(5, 1, 1), entry(5, 2, 2)}})
		if a := next[*wire.Ack](c); a.Tail != 2 {
			t.Errorf("ack %d, want 2", a.Tail)
		}
		c.send(1, &wire.Flush{})
		if f := next[*wire.Flushed](c); f.Durable != 2 {
			t.Errorf("durable %d, want 2", f.Durable)
		}
		c.send(2, &wire.Ping{})
		next[*wire.Pong](c)
		c.send(3, &wire.Read{Offset: holdfast.BlockSize, Length: 2 * holdfast.BlockSize})
		d := next[*wire.Data](c)
		if err := wire.Verify(d.Bytes, d.Sums); err != nil || d.Bytes[0] != 1 || d.Bytes[len(d.Bytes)-1] != 2 {
			t.Errorf("read %x..%x: %v", d.Bytes[0], d.Bytes[len(d.Bytes)-1], err)
		}
		c.send(4, &wire.Fetch{From: 1, To: 2})
		if es := next[*wire.Entries](c); len(es.Entries) != 2 || es.Entries[1].Data[0] != 2 || es.Entries[1].Epoch != 5 {
			t.Errorf("fetched %+v", es.Entries)
		}
		c.send(5, &wire.Fetch{From: 1, To: 1})
		if es := next[*wire.Entries](c); len(es.Entries) != 1 {
			t.Errorf("fetched %d entries, want 1", len(es.Entries))
		}
		c.send(0, &wire.Commit{Seq: 2})
		c.send(6, &wire.List{Max: 10, Applied: 2}) // waits until the chunks are as of 2
		if l := next[*wire.Chunks](c); len(l.Refs) != 1 || l.Refs[0].Index != 0 || l.Refs[0].LastSeq != 2 || l.More {
			t.Errorf("listed %+v", l)
		}
		c.send(7, &wire.ReadChunk{Index: 0, Floor: 2})
		k := next[*wire.Chunk](c)
		if k.AsOf < 2 || len(k.Data) != 2*holdfast.BlockSize || k.States[1] != wire.BlockData || k.States[0] != wire.BlockZero {
			t.Errorf("chunk %+v with %d bytes", k.States, len(k.Data))
		}
		if local {
			p := make([]byte, holdfast.BlockSize)
			if err := c.local.ReadAt(t.Context(), p, 2*holdfast.BlockSize); err != nil || p[9] != 2 {
				t.Errorf("read in process: %x, %v", p[9], err)
			}
		}
		st, ok := n.s.Replica(testDesc.Replica)
		if !ok || st.Writer != 5 || st.Core.Tail != 2 || st.Log.Commit != 2 {
			t.Errorf("status %+v", st)
		}
		c.send(0, &wire.Close{})
		<-c.ended
	})
}

// A higher epoch closes the session of the lower one, which learns why; from
// then on it reads nothing.
func TestHigherEpoch(t *testing.T) {
	both(t, func(t *testing.T, n *node, local bool) {
		old := n.client(5, local)
		old.open()
		fresh := n.client(6, !local)
		fresh.open()
		if r := next[*wire.Refused](old); r.Accepted != 6 {
			t.Errorf("refused for epoch %d, want 6", r.Accepted)
		}
		<-old.ended
		if local {
			if err := old.local.ReadAt(t.Context(), make([]byte, holdfast.BlockSize), 0); err == nil {
				t.Error("a fenced writer reads")
			}
		}
		late := n.client(5, local)
		late.send(0, &wire.Fence{})
		if r := next[*wire.Refused](late); r.Accepted != 6 {
			t.Errorf("refused for epoch %d, want 6", r.Accepted)
		}
		fresh.send(1, &wire.Ping{})
		next[*wire.Pong](fresh)
	})
}

// Every id of HELLO must be this node's, this replica's.
func TestHelloChecked(t *testing.T) {
	n := newNode(t)
	for name, c := range map[string]struct {
		change func(h *wire.Hello)
		want   error
	}{
		"cluster": {func(h *wire.Hello) { h.Cluster = holdfast.ClusterID{9} }, holdfast.ErrRefused},
		"node":    {func(h *wire.Hello) { h.To = holdfast.NodeID{9} }, holdfast.ErrRefused},
		"replica": {func(h *wire.Hello) { h.Replica = holdfast.ReplicaID{9} }, holdfast.ErrNotFound},
		"volume":  {func(h *wire.Hello) { h.Segment.Volume = holdfast.VolumeID{9} }, holdfast.ErrRefused},
		"segment": {func(h *wire.Hello) { h.Segment.Index = 9 }, holdfast.ErrRefused},
		"lineage": {func(h *wire.Hello) { h.Lineage = holdfast.LineageID{9} }, holdfast.ErrRefused},
		"level":   {func(h *wire.Hello) { h.Level = 9 }, holdfast.ErrUnsupported},
	} {
		hello := testHello
		c.change(&hello)
		if _, _, err := n.s.Connect(5, &hello); !errors.Is(err, c.want) {
			t.Errorf("another %s in process: %v, want %v", name, err, c.want)
		}
		tcp, err := net.Dial("tcp", n.addr)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := wire.Connect(t.Context(), tcp, 5, &hello); !errors.Is(err, c.want) {
			t.Errorf("another %s over TCP: %v, want %v", name, err, c.want)
		}
	}
}

// A writer that breaks the protocol loses its session, and nothing else.
func TestBrokenWriter(t *testing.T) {
	n := newNode(t)
	wrongEpoch := func(c *client) { c.link.Send(99, 0, &wire.Ping{}); c.link.Flush() }
	for name, do := range map[string]func(c *client){
		"a gap": func(c *client) { c.send(0, &wire.Append{Entries: []wire.Entry{entry(c.epoch, 9, 1)}}) },
		"beyond the segment": func(c *client) {
			e := entry(c.epoch, 1, 1)
			e.Offset = testDesc.Size
			c.send(0, &wire.Append{Entries: []wire.Entry{e}})
		},
		"an unknown kind": func(c *client) {
			e := entry(c.epoch, 1, 1)
			e.Kind = 9
			c.link.(*Session).Send(c.epoch, 0, &wire.Append{Entries: []wire.Entry{e}})
			c.link.Flush()
		},
		"a read beyond":        func(c *client) { c.send(1, &wire.Read{Offset: testDesc.Size, Length: holdfast.BlockSize}) },
		"a request without id": func(c *client) { c.send(0, &wire.Read{Length: holdfast.BlockSize}) },
		"another epoch":        wrongEpoch,
		"an answer":            func(c *client) { c.send(0, &wire.Pong{}) },
		"a chunk beyond":       func(c *client) { c.send(1, &wire.Install{ChunkContent: wire.ChunkContent{Index: 1 << 40}}) },
		"too much at once": func(c *client) {
			// More than may be unacknowledged, while nothing can be logged.
			p := make([]byte, 1<<20)
			sums := wire.BlockSums(nil, p)
			for i := range maxKept>>20 + 2 {
				c.link.Send(c.epoch, 0, &wire.Append{Entries: []wire.Entry{{Epoch: c.epoch, Seq: holdfast.Seq(i + 1), Kind: wire.KindWrite, Length: 1 << 20, Sums: sums, Data: p}}})
			}
			c.link.Flush()
		},
	} {
		release := func() {}
		c := n.client(n.nextEpoch(), true)
		c.open()
		if name == "too much at once" {
			release = n.hang(vfs.OpWrite)
		}
		do(c)
		select {
		case <-c.ended:
		case <-time.After(20 * time.Second):
			t.Errorf("%s: the session goes on", name)
		}
		release()
	}
	c := n.client(n.nextEpoch(), false)
	c.open()
	c.send(1, &wire.Ping{})
	next[*wire.Pong](c)
}

func (n *node) nextEpoch() holdfast.Epoch {
	st, _ := n.s.Replica(testDesc.Replica)
	return st.Core.Fence + 1
}

// hang makes an operation of the disk wait until the returned function is called.
func (n *node) hang(op vfs.Op) (release func()) {
	gate := make(chan struct{})
	n.gates[op].Store(&gate)
	var once sync.Once
	release = func() {
		once.Do(func() {
			n.gates[op].Store(nil)
			close(gate)
		})
	}
	n.t.Cleanup(release)
	return release
}

// A ping is answered while the log hangs: it does not queue behind entries
// that cannot be taken yet. So is a read of what is there.
func TestPingWhileTheLogHangs(t *testing.T) {
	both(t, func(t *testing.T, n *node, local bool) {
		c := n.client(5, local)
		c.open()
		release := n.hang(vfs.OpWrite)
		for i := range holdfast.Seq(100) {
			c.send(0, &wire.Append{Entries: []wire.Entry{entry(5, i+1, byte(i))}})
		}
		c.send(1, &wire.Ping{})
		next[*wire.Pong](c)
		release()
		for tail := holdfast.Seq(0); tail < 100; {
			tail = next[*wire.Ack](c).Tail
		}
	})
}

// An ack does not wait for an fdatasync that hangs.
func TestAckWhileASyncHangs(t *testing.T) {
	n := newNode(t)
	c := n.client(5, false)
	c.open()
	c.send(0, &wire.Append{Entries: []wire.Entry{entry(5, 1, 1)}})
	next[*wire.Ack](c)
	release := n.hang(vfs.OpSync)
	c.send(1, &wire.Flush{})
	c.send(0, &wire.Append{Entries: []wire.Entry{entry(5, 2, 2)}})
	if a := next[*wire.Ack](c); a.Tail != 2 {
		t.Errorf("ack %d, want 2", a.Tail)
	}
	release()
	if f := next[*wire.Flushed](c); f.Durable < 1 {
		t.Errorf("durable %d, want 1 at least", f.Durable)
	}
}

// An I/O error ends the copy for this process life (R12), and is told as one.
func TestDiskFails(t *testing.T) {
	n := newNode(t)
	c := n.client(5, false)
	c.open()
	n.fs.Inject(vfs.Fault{Op: vfs.OpWrite, Err: errors.New("medium error")})
	c.send(0, &wire.Append{Entries: []wire.Entry{entry(5, 1, 1)}})
	if f := next[*wire.Failed](c); !errors.Is(f.Cause.Err(), holdfast.ErrIO) {
		t.Errorf("failed with %v, want ErrIO", f.Cause.Err())
	}
	<-c.ended
	n.fs.ClearFaults()
	again := n.client(6, false)
	again.send(0, &wire.Fence{})
	if f := next[*wire.Failed](again); !errors.Is(f.Cause.Err(), holdfast.ErrIO) {
		t.Errorf("failed with %v, want ErrIO", f.Cause.Err())
	}
	if st, _ := n.s.Replica(testDesc.Replica); st.Failed == nil {
		t.Error("the status does not say that the copy failed")
	}
}

// Payload that does not match its sums is refused; what came before counts.
func TestBadPayload(t *testing.T) {
	n := newNode(t)
	c := n.client(5, true)
	c.open()
	bad := entry(5, 3, 3)
	bad.Data[100] ^= 1
	for _, e := range []wire.Entry{entry(5, 1, 1), entry(5, 2, 2), bad, entry(5, 4, 4)} {
		c.link.Send(5, 0, &wire.Append{Entries: []wire.Entry{e}})
	}
	c.link.Flush()
	var tail holdfast.Seq
	for r := range c.in {
		switch m := r.Message.(type) {
		case *wire.Ack:
			tail = m.Tail
		case *wire.Failed:
			if m.Seq != 3 || !errors.Is(m.Cause.Err(), holdfast.ErrIntegrity) {
				t.Errorf("failed at %d: %v", m.Seq, m.Cause.Err())
			}
		default:
			t.Errorf("got %+v", m)
		}
	}
	if tail != 2 {
		t.Errorf("acknowledged up to %d, want 2", tail)
	}
	again := n.client(6, true)
	if f := again.open(); f.Tail != 2 {
		t.Errorf("tail %d, want 2", f.Tail)
	}
}

// A log full of entries that nobody commits waits for as long as the session
// lives, and is as before once it ended; the copy goes on with the next one.
func TestFullLog(t *testing.T) {
	both(t, func(t *testing.T, n *node, local bool) {
		c := n.client(5, local)
		c.open()
		p := make([]byte, 1<<20)
		sums := wire.BlockSums(nil, p)
		send := func(c *client, seq holdfast.Seq) {
			c.send(0, &wire.Append{Entries: []wire.Entry{{Epoch: c.epoch, Seq: seq, Kind: wire.KindWrite, Length: 1 << 20, Sums: sums, Data: p}}})
		}
		// Until it is told unasked what is durable, which it is only for want of room.
		var sent, tail, durable holdfast.Seq
		for durable == 0 {
			for sent < tail+4 {
				sent++
				send(c, sent)
			}
			r := <-c.in
			switch m := r.Message.(type) {
			case *wire.Ack:
				tail = m.Tail
			case *wire.Flushed:
				durable = m.Durable
				if r.Header.Request != 0 {
					t.Errorf("it answers request %d, which was not made", r.Header.Request)
				}
			default:
				t.Fatalf("got %+v", m)
			}
		}
		if tail < 8 || durable > tail {
			t.Errorf("full at %d, durable %d", tail, durable)
		}
		c.link.Close()
		<-c.ended

		next5 := n.client(6, local)
		f := next5.open()
		if f.Tail < tail {
			t.Fatalf("tail %d, acknowledged was %d", f.Tail, tail)
		}
		next5.send(0, &wire.Commit{Seq: f.Tail})
		send(next5, f.Tail+1)
		for r := range next5.in {
			if a, ok := r.Message.(*wire.Ack); ok {
				if a.Tail != f.Tail+1 {
					t.Errorf("ack %d, want %d", a.Tail, f.Tail+1)
				}
				return
			} else if _, ok := r.Message.(*wire.Flushed); !ok {
				t.Fatalf("got %+v", r.Message)
			}
		}
		t.Fatal("the session ended")
	})
}

func TestDisksComeAndGo(t *testing.T) {
	n := newNode(t)
	id := n.disk.Stat().Disk
	if err := n.s.AddDisk(n.disk); !errors.Is(err, holdfast.ErrExists) {
		t.Errorf("the same disk again: %v", err)
	}
	if err := n.s.CreateReplica(id, testDesc); err != nil {
		t.Errorf("the same replica again: %v", err)
	}
	other := testDesc
	other.Size *= 2
	if err := n.s.CreateReplica(id, other); !errors.Is(err, holdfast.ErrExists) {
		t.Errorf("the same replica with another size: %v", err)
	}
	if err := n.s.CreateReplica(holdfast.DiskID{9}, testDesc); !errors.Is(err, holdfast.ErrNotFound) {
		t.Errorf("a replica on an unknown disk: %v", err)
	}
	c := n.client(5, false)
	c.open()
	if err := n.s.RemoveDisk(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	<-c.ended
	if _, _, err := n.s.Connect(5, &testHello); !errors.Is(err, holdfast.ErrNotFound) {
		t.Errorf("a session with a removed disk: %v", err)
	}
	if err := n.s.AddDisk(n.disk); err != nil {
		t.Fatal(err)
	}
	if got := len(n.s.Replicas()); got != 1 {
		t.Fatalf("%d replicas after the disk is back, want 1", got)
	}
	c = n.client(6, true)
	c.open()
	if err := n.s.DeleteReplica(t.Context(), testDesc.Replica); err != nil {
		t.Fatal(err)
	}
	<-c.ended
	if err := n.s.DeleteReplica(t.Context(), testDesc.Replica); err != nil {
		t.Errorf("deleted twice: %v", err)
	}
	if got := len(n.disk.Replicas()); got != 0 {
		t.Errorf("%d replicas on the disk, want none", got)
	}
}

func TestForeignDisk(t *testing.T) {
	n := newNode(t)
	fs := vfs.NewMemory(2)
	err := disk.Format(t.Context(), fs, diskPath, disk.FormatOptions{Cluster: testOptions.Cluster, Node: holdfast.NodeID{9}, Size: 64 << 20, WALSize: disk.MinWALSize})
	if err != nil {
		t.Fatal(err)
	}
	d, err := disk.Open(t.Context(), fs, diskPath, disk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := n.s.AddDisk(d); !errors.Is(err, holdfast.ErrRefused) {
		t.Errorf("another node's disk: %v, want ErrRefused", err)
	}
}

// Noise on the data address harms nobody; Close leaves no goroutine.
func TestNoiseAndClose(t *testing.T) {
	before := runtime.NumGoroutine()
	t.Run("noise", func(t *testing.T) {
		n := newNode(t)
		c := n.client(5, false)
		c.open()
		var idle []net.Conn
		for i := range 20 {
			tcp, err := net.Dial("tcp", n.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer tcp.Close()
			switch i % 3 {
			case 0:
				_, _ = tcp.Write(bytes.Repeat([]byte("GET / HTTP/1.1\r\n"), 10))
				if _, err := io.ReadAll(tcp); err != nil {
					t.Logf("the server hung up: %v", err)
				}
			case 1:
				_ = tcp.Close()
			default:
				idle = append(idle, tcp) // says nothing; Close does not wait for it
			}
		}
		c.send(1, &wire.Ping{})
		next[*wire.Pong](c)
		_ = idle
	})
	for deadline := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > before; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			buf := make([]byte, 1<<20)
			t.Fatalf("%d goroutines, %d before\n%s", runtime.NumGoroutine(), before, buf[:runtime.Stack(buf, true)])
		}
	}
}

func TestBadOptions(t *testing.T) {
	if _, err := New(Options{}); !errors.Is(err, holdfast.ErrInvalid) {
		t.Errorf("New without ids: %v", err)
	}
}

// The mark of a replica that is being filled is kept over crashes, and hints
// stay what they were; only MarkWhole clears it.
func TestFillingMark(t *testing.T) {
	n := newNode(t)
	r, _ := n.disk.Replica(testDesc.Replica)
	l := newDiskLog(r)
	check := func(what string, syncing bool, epoch holdfast.Epoch, v holdfast.ISRVersion) {
		t.Helper()
		for _, l := range []*diskLog{l, newDiskLog(r)} {
			if st := l.Status(); l.Syncing() != syncing || st.HintEpoch != epoch || st.HintISR != v {
				t.Fatalf("%s: syncing %v, hint %d %d, want %v, %d %d", what, l.Syncing(), st.HintEpoch, st.HintISR, syncing, epoch, v)
			}
		}
	}
	check("new", false, 0, 0)
	if err := r.Fence(5); err != nil {
		t.Fatal(err)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	rebase := func(epoch holdfast.Epoch, to holdfast.Seq) {
		t.Helper()
		_, err := l.Rebase(t.Context(), epoch, to)
		must(err)
	}
	must(l.SetHint(5, 3))
	check("hint", false, 5, 3)
	for range 3 {
		rebase(5, 10)
		check("rebased", true, 5, 3)
		rebase(5, 10)
		check("rebased again", true, 5, 3)
		must(l.SetHint(5, 2)) // lower: nothing
		check("a lower hint", true, 5, 3)
		must(l.MarkWhole())
		check("whole", false, 5, 3)
		must(l.MarkWhole())
	}
	rebase(5, 10)
	must(l.SetHint(6, 1))
	check("a higher hint", true, 6, 1)
	rebase(5, 11)
	fs := n.fs.Crash(3) // as durable as the rebase
	d, err := disk.Open(t.Context(), fs, diskPath, disk.Options{})
	must(err)
	defer d.Close()
	back, _ := d.Replica(testDesc.Replica)
	if l := newDiskLog(back); !l.Syncing() || l.Status().Tail != 11 {
		t.Errorf("after a crash: syncing %v, tail %d", l.Syncing(), l.Status().Tail)
	}
}

// What a log that is dropped may have put into the chunks is there before, after a
// restart too, and nothing else of it is (R9). A copy in the making says only once
// what it held.
func TestRebaseAppliesFirst(t *testing.T) {
	fs := vfs.NewMemory(1)
	if err := disk.Format(t.Context(), fs, diskPath, disk.FormatOptions{Cluster: testOptions.Cluster, Node: testOptions.Node, Size: 64 << 20, WALSize: disk.MinWALSize}); err != nil {
		t.Fatal(err)
	}
	open := func() (*disk.Disk, *disk.Replica) {
		d, err := disk.Open(t.Context(), fs, diskPath, disk.Options{ApplyEvery: -1})
		if err != nil {
			t.Fatal(err)
		}
		r, _ := d.Replica(testDesc.Replica)
		return d, r
	}
	d, _ := open()
	r, err := d.CreateReplica(testDesc)
	if err == nil {
		err = r.Fence(5)
	}
	block := func(s holdfast.Seq) []byte { return bytes.Repeat([]byte{byte(s)}, holdfast.BlockSize) }
	const entries, commit = 9, 6
	for s := holdfast.Seq(1); s <= entries && err == nil; s++ {
		err = r.Append([]disk.Entry{{
			Type: disk.OpWrite, Epoch: 5, Seq: s, Offset: int64(s) * holdfast.ChunkSize, Length: holdfast.BlockSize,
			CRC: wire.BlockSums(nil, block(s)), Payload: block(s),
		}})
	}
	if err != nil {
		t.Fatal(err)
	}
	r.SetCommit(commit - 2)
	if _, err := r.Apply(t.Context(), commit-2); err != nil {
		t.Fatal(err)
	}
	r.SetCommit(commit)
	if err := r.Append([]disk.Entry{{Type: disk.OpTrim, Epoch: 5, Seq: entries + 1, Commit: commit, Offset: 0, Length: holdfast.BlockSize}}); err != nil {
		t.Fatal(err)
	}
	killed := fs.Restart()
	_ = d.Close()
	fs = killed
	d, r = open()
	defer d.Close()
	if st := r.Status(); st.Applied != 0 || st.Commit != commit {
		t.Fatalf("after the restart: applied %d, commit %d, want 0 and %d", st.Applied, st.Commit, commit)
	}
	l := newDiskLog(r)
	for what, want := range []holdfast.Seq{commit, 20} { // the second time the chunks are a mixture, and the core has the first answer
		if held, err := l.Rebase(t.Context(), 5, 20); held != want || err != nil {
			t.Errorf("rebase %d: held %d, %v, want %d", what, held, err, want)
		}
	}
	refs, err := l.Chunks(0, -1, 100)
	if err != nil || len(refs) != commit {
		t.Fatalf("%d chunks, %v, want %d", len(refs), err, commit)
	}
	for i, ref := range refs {
		s := holdfast.Seq(i + 1)
		c, err := l.ReadChunk(ref.Index)
		if err != nil || ref.Index != int64(s) || ref.LastSeq != s || !bytes.Equal(c.Data[:holdfast.BlockSize], block(s)) {
			t.Errorf("chunk %d: last seq %d, %v, want what entry %d wrote", ref.Index, ref.LastSeq, err, s)
		}
	}
}

// A core that contradicts itself ends its copy, and not the process.
func TestBrokenInvariant(t *testing.T) {
	n := newNode(t)
	c := n.client(5, false)
	c.open()
	c.wait(firstCredit / holdfast.ChunkSize) // the log goroutine is at rest
	r := n.s.all()[0]
	r.mu.Lock()
	r.core = nil // the next step fails
	r.mu.Unlock()
	<-c.ended
	if _, _, err := n.s.Connect(5, &testHello); !errors.Is(err, holdfast.ErrInternal) {
		t.Errorf("a session with a broken copy: %v, want ErrInternal", err)
	}
	if st, _ := n.s.Replica(testDesc.Replica); !errors.Is(st.Failed, holdfast.ErrInternal) {
		t.Errorf("status: failed %v, want ErrInternal", st.Failed)
	}
}

// On a file system where nothing is ever intact a copy serves all the same.
func TestNeverIntact(t *testing.T) {
	n := newNodeOn(t, func(fs *vfs.Memory) { fs.Foreign(diskPath) })
	c := n.client(5, false)
	if f := c.open(); f.Intact {
		t.Error("a copy on a foreign file system says that it is intact")
	}
	c.send(0, &wire.Intact{})
	c.send(0, &wire.Append{Entries: []wire.Entry{entry(5, 1, 1)}})
	if a := next[*wire.Ack](c); a.Tail != 1 {
		t.Errorf("ack %d, want 1", a.Tail)
	}
	c.send(1, &wire.Flush{})
	next[*wire.Flushed](c)
	if st, _ := n.s.Replica(testDesc.Replica); st.Failed != nil {
		t.Errorf("failed: %v", st.Failed)
	}
	ours := newNode(t).client(5, false)
	if f := ours.open(); !f.Intact {
		t.Error("a new copy on a local file system is not intact")
	}
}
