package attachment

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/disk"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
	"github.com/holdfast-storage/holdfast/replication/coordinator"
	"github.com/holdfast-storage/holdfast/replication/serve"
)

const diskPath = "/disks/a"

var (
	testCluster = holdfast.ClusterID{0xc1}
	testVolume  = holdfast.VolumeID{0xee}
	testLineage = holdfast.LineageID{1}
)

// testLimits are short, so that failures are noticed soon, and generous where
// a slow machine must not make a healthy member look dead.
var testLimits = coordinator.Limits{
	Tick: 10 * time.Millisecond, PromiseLength: 600 * time.Millisecond, Suspect: 300 * time.Millisecond, Evict: 600 * time.Millisecond, OpAge: 20 * time.Second,
	AttachGrace: 200 * time.Millisecond, FlushEvery: 20 * time.Millisecond, RetryRaft: 20 * time.Millisecond,
}

func testLogger(t testing.TB) *slog.Logger {
	if os.Getenv("HOLDFAST_TEST_LOG") == "" {
		return nil
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// host is one node: a disk in memory, a server, and a data address.
type host struct {
	t    testing.TB
	node holdfast.NodeID
	id   holdfast.DiskID

	promise    time.Duration // set before start; newHost sets none to speak of
	applyEvery time.Duration // the same; 20 ms if zero

	mu     sync.Mutex
	fs     *vfs.Memory
	disk   *disk.Disk
	server *serve.Server
	addr   string
	conns  []net.Conn // taken by the data address
	cut    bool       // nobody reaches it

	gate atomic.Pointer[gate]
}

// gate holds up an operation of the disk.
type gate struct {
	op   vfs.Op
	open chan struct{}
}

// hang makes an operation of the disk wait until the returned function is called.
func (h *host) hang(op vfs.Op) (release func()) {
	g := &gate{op: op, open: make(chan struct{})}
	h.gate.Store(g)
	var once sync.Once
	release = func() {
		once.Do(func() {
			h.gate.Store(nil)
			close(g.open)
		})
	}
	h.t.Cleanup(release)
	return release
}

func newHost(t testing.TB, n byte, size int64) *host {
	h := &host{t: t, node: holdfast.NodeID{0x0d, n}, id: holdfast.DiskID{0xd1, n}, fs: vfs.NewMemory(uint64(n))}
	h.fs.Before(func(op vfs.Op, _ string) {
		if g := h.gate.Load(); g != nil && g.op == op {
			<-g.open
		}
	})
	h.fs.BeforeDirectRead(func(string) {
		if g := h.gate.Load(); g != nil && g.op == vfs.OpRead {
			<-g.open
		}
	})
	err := disk.Format(context.Background(), h.fs, diskPath, disk.FormatOptions{Cluster: testCluster, Node: h.node, Disk: h.id, Size: size, WALSize: disk.MinWALSize})
	if err != nil {
		t.Fatalf("format disk of node %d: %v", n, err)
	}
	h.start()
	t.Cleanup(h.kill)
	return h
}

// start opens the disk and serves it.
func (h *host) start() {
	h.t.Helper()
	every := h.applyEvery
	if every == 0 {
		every = 20 * time.Millisecond
	}
	d, err := disk.Open(context.Background(), h.fs, diskPath, disk.Options{ApplyEvery: every, Logger: testLogger(h.t)})
	if err != nil {
		h.t.Fatalf("open disk of node %v: %v", h.node, err)
	}
	s, err := serve.New(serve.Options{Cluster: testCluster, Node: h.node, Instance: holdfast.NewID[holdfast.InstanceID](), PromiseLength: max(1, h.promise), Logger: testLogger(h.t)})
	if err != nil {
		h.t.Fatal(err)
	}
	if err := s.AddDisk(d); err != nil {
		h.t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		h.t.Fatal(err)
	}
	h.mu.Lock()
	h.disk, h.server, h.addr = d, s, l.Addr().String()
	h.mu.Unlock()
	go func() {
		if err := s.Serve(&trackingListener{Listener: l, h: h}); err != nil {
			h.t.Errorf("serve node %v: %v", h.node, err)
		}
	}()
}

type trackingListener struct {
	net.Listener
	h *host
}

func (l *trackingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		l.h.mu.Lock()
		l.h.conns = append(l.h.conns, c)
		l.h.mu.Unlock()
	}
	return c, err
}

// kill ends the process: what is written to the operating system stays.
func (h *host) kill() {
	h.mu.Lock()
	s, d := h.server, h.disk
	h.server, h.disk, h.addr = nil, nil, ""
	h.mu.Unlock()
	if s == nil {
		return
	}
	if err := s.Close(); err != nil {
		h.t.Errorf("close server: %v", err)
	}
	// The file system in memory is cloned before the disk is closed, so that
	// nothing that Close does counts.
	fs := h.fs.Restart()
	_ = d.Close()
	h.fs = fs
}

// powerLoss ends the machine: unsynced pages are lost, the boot id changes.
func (h *host) powerLoss(seed uint64) {
	h.mu.Lock()
	s, d := h.server, h.disk
	h.server, h.disk, h.addr = nil, nil, ""
	h.mu.Unlock()
	fs := h.fs.Crash(seed)
	if s != nil {
		_ = s.Close()
		_ = d.Close()
	}
	h.fs = fs
}

// sever breaks every connection of the data address.
func (h *host) sever() {
	h.mu.Lock()
	conns := h.conns
	h.conns = nil
	h.mu.Unlock()
	for _, c := range conns {
		_ = c.Close()
	}
}

// reach sets whether the data address can be reached.
func (h *host) reach(ok bool) {
	h.mu.Lock()
	h.cut = !ok
	h.mu.Unlock()
	if !ok {
		h.sever()
	}
}

// cluster is a volume on some hosts, and what raft would know of it.
type cluster struct {
	t           testing.TB
	meta        *fakeMeta
	size        int64
	segmentSize int64

	mu    sync.Mutex // only the test's goroutine writes hosts; others read them
	hosts []*host
}

// all returns the hosts for goroutines other than the test's.
func (c *cluster) all() []*host {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.hosts)
}

func newCluster(t testing.TB, hosts int, size, segmentSize int64) *cluster {
	c := &cluster{t: t, size: size, segmentSize: segmentSize}
	for n := range hosts {
		c.hosts = append(c.hosts, newHost(t, byte(n+1), 96<<20))
	}
	segments := segmentCount(size, segmentSize)
	c.meta = &fakeMeta{segments: make([]metaSegment, segments)}
	for i := range segments {
		for n, h := range c.hosts {
			id := holdfast.ReplicaID{0xaa, byte(n + 1), byte(i)}
			c.create(h, i, id)
			c.meta.segments[i].replicas = append(c.meta.segments[i].replicas, coordinator.Replica{ID: id, Node: h.node, Role: holdfast.RoleInSync, Lineage: testLineage})
		}
	}
	return c
}

func (c *cluster) create(h *host, segment int, id holdfast.ReplicaID) {
	c.t.Helper()
	desc := disk.ReplicaDesc{
		Segment: holdfast.SegmentID{Volume: testVolume, Index: uint32(segment)}, Replica: id, Lineage: testLineage,
		Size: min(c.segmentSize, c.size-int64(segment)*c.segmentSize),
	}
	if err := h.server.CreateReplica(h.id, desc); err != nil {
		c.t.Fatalf("create replica: %v", err)
	}
}

// replace gives up a host's replica of segment 0 for a new one on another host.
func (c *cluster) replace(a *Attachment, i int, h *host) {
	c.t.Helper()
	id := holdfast.NewID[holdfast.ReplicaID]()
	c.create(h, 0, id)
	c.meta.mu.Lock()
	s := &c.meta.segments[0]
	for j := range s.replicas {
		if s.replicas[j].Node == c.hosts[i].node {
			s.replicas[j] = coordinator.Replica{ID: id, Node: h.node, Role: holdfast.RoleSyncing, Lineage: testLineage}
		}
	}
	c.meta.mu.Unlock()
	c.mu.Lock()
	c.hosts[i] = h
	c.mu.Unlock()
	c.grow(a, 0)
}

// options begin an attachment on a host: raft issues the next epoch.
func (c *cluster) options(on *host) Options {
	o := Options{
		Cluster: testCluster, Node: on.node, Instance: holdfast.NewID[holdfast.InstanceID](),
		Volume: testVolume, Size: c.size, SegmentSize: c.segmentSize, Policy: Policy{Copies: len(c.hosts)},
		Session: holdfast.NewID[holdfast.SessionID](), Meta: c.meta, Local: on.server, Limits: testLimits, Logger: testLogger(c.t),
		Dial: c.dial,
		Gone: func(n holdfast.NodeID) bool { return c.down(n) },
	}
	c.meta.begin(&o)
	return o
}

func (c *cluster) down(n holdfast.NodeID) bool {
	for _, h := range c.all() {
		h.mu.Lock()
		down := h.node == n && h.server == nil
		h.mu.Unlock()
		if down {
			return true
		}
	}
	return false
}

func (c *cluster) dial(ctx context.Context, n holdfast.NodeID) (net.Conn, error) {
	for _, h := range c.all() {
		if h.node != n {
			continue
		}
		h.mu.Lock()
		addr, cut := h.addr, h.cut
		h.mu.Unlock()
		if addr == "" || cut {
			return nil, holdfast.Errorf(holdfast.ErrUnavailable, "node %v does not answer", n)
		}
		var d net.Dialer
		return d.DialContext(ctx, "tcp", addr)
	}
	return nil, holdfast.Errorf(holdfast.ErrNotFound, "no node %v", n)
}

// attach makes an attachment on a host and waits until it serves.
func (c *cluster) attach(on *host) *Attachment {
	c.t.Helper()
	a, err := New(c.options(on))
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { _ = a.Close() })
	c.waitAttached(a)
	return a
}

func (c *cluster) waitAttached(a *Attachment) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := a.Attach(ctx); err != nil {
		c.t.Fatalf("attach: %v\n%+v", err, a.Status())
	}
}

// eventually waits for a condition, which must come true.
func (c *cluster) eventually(what string, a *Attachment, ok func() bool) {
	c.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			c.t.Fatalf("did not happen: %s\n%+v\nraft: %+v", what, a.Status(), c.meta.segments)
		}
	}
}

// waitInSync waits until raft and the writer count n members of each segment
// as in sync, and these hold everything.
func (c *cluster) waitInSync(a *Attachment, n int) {
	c.t.Helper()
	c.eventually(fmt.Sprintf("%d members in sync", n), a, func() bool {
		for i, s := range a.Status().Segments {
			in := 0
			for _, m := range s.State.Members {
				if m.InSync && m.InAckset && m.Tail == s.State.Tail {
					in++
				}
			}
			if in != n || len(c.meta.isr(i)) != n {
				return false
			}
		}
		return true
	})
}

// compare checks that all hosts hold the same bytes, and that these are want.
func (c *cluster) compare(want []byte, hosts ...*host) {
	c.t.Helper()
	for _, h := range hosts {
		got := make([]byte, 0, c.size)
		for i := range segmentCount(c.size, c.segmentSize) {
			for _, r := range h.disk.Replicas() {
				if st := r.Status(); st.Segment == (holdfast.SegmentID{Volume: testVolume, Index: uint32(i)}) {
					p := make([]byte, st.Size)
					if err := r.ReadAt(p, 0); err != nil {
						c.t.Fatalf("read replica %v of node %v: %v", st.Replica, h.node, err)
					}
					got = append(got, p...)
				}
			}
		}
		if !bytes.Equal(got, want) {
			c.t.Fatalf("node %v: %s", h.node, difference(got, want))
		}
	}
}

func difference(got, want []byte) string {
	if len(got) != len(want) {
		return fmt.Sprintf("%d bytes, want %d", len(got), len(want))
	}
	first, blocks := -1, 0
	for off := 0; off < len(got); off += holdfast.BlockSize {
		end := min(off+holdfast.BlockSize, len(got))
		if !bytes.Equal(got[off:end], want[off:end]) {
			if first < 0 {
				first = off
			}
			blocks++
		}
	}
	if first < 0 {
		return "no difference"
	}
	return fmt.Sprintf("%d blocks differ, the first at %d: got %x.., want %x..", blocks, first, got[first:first+8], want[first:first+8])
}

// noise is what random copies from.
var noise = sync.OnceValue(func() []byte {
	p := make([]byte, 1<<20)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(p)
	return p
})

// random fills p, a block at a time from anywhere in noise: the race detector takes
// long over bytes that are drawn one by one.
func random(rng *rand.Rand, p []byte) {
	for len(p) > 0 {
		from := rng.IntN(len(noise()) - holdfast.BlockSize)
		p = p[copy(p, noise()[from:from+holdfast.BlockSize]):]
	}
}

// model is what the volume must hold.
type model struct {
	rng  *rand.Rand
	data []byte
}

func newModel(seed uint64, size int64) *model {
	return &model{rng: rand.New(rand.NewPCG(seed, 1)), data: make([]byte, size)}
}

// mutate does n random changes, and to the model alike.
func (m *model) mutate(t testing.TB, a *Attachment, n int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for range n {
		off := m.rng.Int64N(int64(len(m.data)))
		length := 1 + m.rng.Int64N(min(int64(len(m.data))-off, 64<<10))
		if m.rng.IntN(4) > 0 { // most are whole blocks
			off, length = alignDown(off), alignUp(length)
			length = min(length, int64(len(m.data))-off)
		}
		part := m.data[off : off+length]
		var err error
		switch m.rng.IntN(10) {
		case 0:
			err = a.Trim(ctx, off, length, false)
			if from, to := alignUp(off), alignDown(off+length); from < to {
				clear(m.data[from:to])
			}
		case 1:
			err = a.WriteZeroes(ctx, off, length, m.rng.IntN(2) == 0, false)
			clear(part)
		case 2:
			err = a.Flush(ctx)
		default:
			random(m.rng, part)
			err = a.WriteAt(ctx, part, off, m.rng.IntN(8) == 0)
		}
		if err != nil {
			t.Fatalf("change of %d bytes at %d: %v\n%+v", length, off, err, a.Status())
		}
	}
}

// verify reads everything, in pieces of any alignment.
func (m *model) verify(t testing.TB, a *Attachment) {
	t.Helper()
	got := make([]byte, len(m.data))
	for off := int64(0); off < int64(len(got)); {
		n := min(1+m.rng.Int64N(3<<20), int64(len(got))-off)
		if err := a.ReadAt(context.Background(), got[off:off+n], off); err != nil {
			t.Fatalf("read %d bytes at %d: %v", n, off, err)
		}
		off += n
	}
	if !bytes.Equal(got, m.data) {
		t.Fatal(difference(got, m.data))
	}
}

// fakeMeta is raft as one compare-and-set register per segment.
type fakeMeta struct {
	mu       sync.Mutex
	epoch    holdfast.Epoch
	segments []metaSegment
	detached bool
	noQuorum bool
	forget   int // so many commands are applied, and answered by an error
	log      []string
}

type metaSegment struct {
	activated holdfast.Epoch
	version   holdfast.ISRVersion
	replicas  []coordinator.Replica
	history   []coordinator.Start
	floor     holdfast.Seq
	end       holdfast.Seq
	last      string // the last command applied, for repeats
}

// begin is AttachBegin.
func (m *fakeMeta) begin(o *Options) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.epoch++
	o.Epoch, o.Detached = m.epoch, m.detached
	m.detached = false
	for _, s := range m.segments {
		o.Segments = append(o.Segments, Segment{
			ISRVersion: s.version, Replicas: slices.Clone(s.replicas), History: slices.Clone(s.history), Floor: s.floor, End: s.end,
		})
	}
}

// commands are those applied so far.
func (m *fakeMeta) commands() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.log)
}

func (m *fakeMeta) isr(i int) []holdfast.ReplicaID {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.segments[i].isr()
}

func (s *metaSegment) isr() (ids []holdfast.ReplicaID) {
	for _, r := range s.replicas {
		if r.Role == holdfast.RoleInSync {
			ids = append(ids, r.ID)
		}
	}
	return ids
}

var errNoQuorum = errors.New("no quorum")

// apply is compare-and-set: the same command again answers as before.
func (m *fakeMeta) apply(seg holdfast.SegmentID, epoch holdfast.Epoch, v holdfast.ISRVersion, command string, f func(s *metaSegment) error) (holdfast.ISRVersion, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := &m.segments[seg.Index]
	command = fmt.Sprintf("epoch %d version %d: %s", epoch, v, command)
	switch {
	case m.noQuorum:
		return 0, errNoQuorum
	case epoch != m.epoch:
		return 0, holdfast.Errorf(holdfast.ErrFenced, "epoch is %d", m.epoch)
	case command == s.last:
		return s.version, nil
	case v != s.version:
		return 0, fmt.Errorf("%s: %w %d", command, ErrConflict, s.version)
	}
	if err := f(s); err != nil {
		return 0, err
	}
	s.version++
	s.last = command
	m.log = append(m.log, command)
	if m.forget > 0 {
		m.forget--
		return 0, errors.New("the answer was lost")
	}
	return s.version, nil
}

func (m *fakeMeta) Activate(_ context.Context, seg holdfast.SegmentID, epoch holdfast.Epoch, v holdfast.ISRVersion, start holdfast.Seq, members []holdfast.ReplicaID, continuous bool) (holdfast.ISRVersion, error) {
	return m.apply(seg, epoch, v, fmt.Sprintf("activate at %d with %d, continuous %v", start, len(members), continuous), func(s *metaSegment) error {
		if start < s.floor {
			return errRegression
		}
		for i, r := range s.replicas {
			in := slices.Contains(members, r.ID)
			if in && r.Role != holdfast.RoleInSync {
				return holdfast.Errorf(holdfast.ErrRefused, "replica %v is %s", r.ID, r.Role)
			}
			if !in && r.Role == holdfast.RoleInSync {
				s.replicas[i].Role = holdfast.RoleStale
			}
		}
		s.activated, s.floor = epoch, start
		s.history = append(s.history, coordinator.Start{Epoch: epoch, S: start})
		return nil
	})
}

func (m *fakeMeta) ShrinkISR(_ context.Context, seg holdfast.SegmentID, epoch holdfast.Epoch, v holdfast.ISRVersion, id holdfast.ReplicaID, commit holdfast.Seq) (holdfast.ISRVersion, error) {
	return m.apply(seg, epoch, v, fmt.Sprintf("shrink %v", id), func(s *metaSegment) error {
		if len(s.isr()) < 2 {
			return holdfast.Errorf(holdfast.ErrRefused, "the in-sync set would be empty")
		}
		s.floor = max(s.floor, commit)
		return s.setRole(id, holdfast.RoleStale)
	})
}

func (m *fakeMeta) GrowISR(_ context.Context, seg holdfast.SegmentID, epoch holdfast.Epoch, v holdfast.ISRVersion, id holdfast.ReplicaID, commit holdfast.Seq) (holdfast.ISRVersion, error) {
	return m.apply(seg, epoch, v, fmt.Sprintf("grow %v", id), func(s *metaSegment) error {
		s.floor = max(s.floor, commit)
		return s.setRole(id, holdfast.RoleInSync)
	})
}

func (m *fakeMeta) StartSync(_ context.Context, seg holdfast.SegmentID, epoch holdfast.Epoch, id holdfast.ReplicaID) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := &m.segments[seg.Index]
	switch {
	case m.noQuorum:
		return errNoQuorum
	case epoch != m.epoch:
		return holdfast.Errorf(holdfast.ErrFenced, "epoch is %d", m.epoch)
	case slices.Contains(s.isr(), id):
		return holdfast.Errorf(holdfast.ErrRefused, "replica %v is in sync", id)
	}
	m.log = append(m.log, fmt.Sprintf("sync %v", id))
	return s.setRole(id, holdfast.RoleSyncing)
}

func (s *metaSegment) setRole(id holdfast.ReplicaID, role holdfast.ReplicaRole) error {
	for i := range s.replicas {
		if s.replicas[i].ID == id {
			s.replicas[i].Role = role
			return nil
		}
	}
	return holdfast.Errorf(holdfast.ErrRefused, "no replica %v", id)
}

func (m *fakeMeta) Segment(_ context.Context, seg holdfast.SegmentID) (Record, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.noQuorum {
		return Record{}, errNoQuorum
	}
	s := &m.segments[seg.Index]
	return Record{Epoch: m.epoch, Activated: s.activated == m.epoch, ISRVersion: s.version, ISR: s.isr()}, nil
}

// errRegression has the kind that the state machine gives it.
var errRegression = holdfast.Errorf(holdfast.ErrIntegrity, "REPLICA_REGRESSION")

func (m *fakeMeta) Detach(_ context.Context, _ holdfast.VolumeID, epoch holdfast.Epoch, ends []SegmentEnd) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.noQuorum:
		return errNoQuorum
	case epoch != m.epoch:
		return holdfast.Errorf(holdfast.ErrFenced, "epoch is %d", m.epoch)
	}
	for _, e := range ends {
		s := &m.segments[e.Segment.Index]
		if e.End < s.floor {
			return errRegression
		}
		s.end, s.floor = e.End, max(s.floor, e.End)
	}
	m.detached = true
	return nil
}

func (m *fakeMeta) setQuorum(ok bool) {
	m.mu.Lock()
	m.noQuorum = !ok
	m.mu.Unlock()
}

// fill promises all of a host's disk, but for some room, to another replica, and
// returns it. What is promised for its map is room too once it is given back.
func (h *host) fill(t *testing.T, room int64) *disk.Replica {
	t.Helper()
	r, err := h.disk.CreateReplica(disk.ReplicaDesc{
		Segment: holdfast.SegmentID{Volume: holdfast.VolumeID{0xfe}}, Replica: holdfast.NewID[holdfast.ReplicaID](), Lineage: testLineage, Size: 1 << 40,
	})
	if err != nil {
		t.Fatal(err)
	}
	for more := true; more; {
		before := r.Credit()
		_, _ = r.Reserve(1 << 40)
		more = r.Credit() > before
	}
	if _, err := r.Reserve(r.Credit()*holdfast.ChunkSize - room); err != nil {
		t.Fatal(err)
	}
	return r
}
