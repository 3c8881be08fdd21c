package serve

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/disk"
	"github.com/holdfast-storage/holdfast/replication/replica"
	"github.com/holdfast-storage/holdfast/replication/wire"
)

// Options say who this node is.
type Options struct {
	Cluster  holdfast.ClusterID
	Node     holdfast.NodeID
	Instance holdfast.InstanceID // of this process
	Level    holdfast.ClusterLevel
	Logger   *slog.Logger // nil discards
	// PromiseLength is how long a read promise lasts, and how long a replica that
	// was just opened accepts no new fence. At most wire.MaxPromise. Zero:
	// replica.DefaultPromiseLength.
	PromiseLength time.Duration
}

const (
	// tickEvery is how often the cores are told the time; they ask for 250 ms.
	tickEvery = 100 * time.Millisecond
	// maxGreeting bounds the connections that have not said HELLO yet.
	maxGreeting = 256
)

// Server serves this node's replicas. All methods may be called concurrently.
type Server struct {
	o     Options
	stop  chan struct{}
	ended sync.WaitGroup

	// admin orders AddDisk, RemoveDisk, CreateReplica, DeleteReplica and Close.
	// It is held while they wait for disks, and by nobody else.
	admin sync.Mutex

	mu        sync.Mutex
	pools     map[holdfast.DiskID]*pool
	served    map[holdfast.ReplicaID]*served
	conns     replica.Conn // last number given
	listeners map[net.Listener]bool
	greeting  map[net.Conn]bool
	closed    bool
}

// pool is one disk.
type pool struct {
	id        holdfast.DiskID
	openCount holdfast.OpenCount
	logSize   int64
	disk      *disk.Disk
	touch     *toucher
	repairing sync.Mutex // one repair at a time
}

func (p *pool) failure() error { return p.disk.Stat().Failed }

// New returns a server without disks.
func New(o Options) (*Server, error) {
	if o.Cluster.IsZero() || o.Node.IsZero() || o.Instance.IsZero() {
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "serve replicas: cluster, node and instance are needed")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Level == 0 {
		o.Level = holdfast.Level1
	}
	if o.PromiseLength < 0 || o.PromiseLength > wire.MaxPromise {
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "serve replicas: promises of %v, at most %v", o.PromiseLength, wire.MaxPromise)
	}
	if o.PromiseLength == 0 {
		o.PromiseLength = replica.DefaultPromiseLength
	}
	s := &Server{
		o:         o,
		stop:      make(chan struct{}),
		pools:     map[holdfast.DiskID]*pool{},
		served:    map[holdfast.ReplicaID]*served{},
		listeners: map[net.Listener]bool{},
		greeting:  map[net.Conn]bool{},
	}
	s.ended.Add(1)
	go s.tick()
	return s, nil
}

// now is CLOCK_BOOTTIME: it goes on while the machine sleeps.
func now() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic("serve: no CLOCK_BOOTTIME: " + err.Error()) // Linux has it since 2.6.39
	}
	return time.Duration(ts.Nano())
}

func (s *Server) tick() {
	defer s.ended.Done()
	t := time.NewTicker(tickEvery)
	defer t.Stop()
	for count := 0; ; count++ {
		select {
		case <-t.C:
			failed := map[*pool]error{}
			for _, r := range s.all() {
				if _, known := failed[r.disk]; !known {
					failed[r.disk] = r.disk.failure()
				}
				r.tick(now(), count, failed[r.disk])
			}
		case <-s.stop:
			return
		}
	}
}

// all returns the replicas served, ordered by id.
func (s *Server) all() []*served {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.SortedFunc(maps.Values(s.served), func(a, b *served) int {
		return strings.Compare(string(a.desc.Replica[:]), string(b.desc.Replica[:]))
	})
}

// AddDisk serves the replicas of an open disk. The disk stays the caller's to
// close, after RemoveDisk or Close.
func (s *Server) AddDisk(d *disk.Disk) error {
	s.admin.Lock()
	defer s.admin.Unlock()
	st := d.Stat()
	p := &pool{id: st.Disk, openCount: st.OpenCount, logSize: st.WALSize, disk: d, touch: newToucher(d)}
	s.mu.Lock()
	closed, known := s.closed, s.pools[p.id] != nil
	s.mu.Unlock()
	switch {
	case closed:
		return errClosed()
	case known:
		return holdfast.Errorf(holdfast.ErrExists, "disk %v is served already", p.id)
	case st.Cluster != s.o.Cluster || st.Node != s.o.Node:
		return holdfast.Errorf(holdfast.ErrRefused, "disk %v belongs to node %v of cluster %v", p.id, st.Node, st.Cluster)
	}
	var opened []*served
	for _, r := range d.Replicas() {
		opened = append(opened, newServed(p, newDiskLog(r), s.o.Logger, s.o.PromiseLength, false))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pools[p.id] = p
	for _, r := range opened {
		s.served[r.desc.Replica] = r
	}
	return nil
}

func errClosed() error { return holdfast.Errorf(holdfast.ErrUnavailable, "the node is stopping") }

// RemoveDisk ends the sessions of a disk's replicas and returns when nothing
// uses the disk any more. An unknown disk is no error.
func (s *Server) RemoveDisk(ctx context.Context, id holdfast.DiskID) error {
	s.admin.Lock()
	defer s.admin.Unlock()
	s.mu.Lock()
	var gone []*served
	for _, r := range s.served {
		if r.disk.id == id {
			gone = append(gone, r)
			delete(s.served, r.desc.Replica)
		}
	}
	p := s.pools[id]
	delete(s.pools, id)
	s.mu.Unlock()
	return waitFor(ctx, func() {
		for _, r := range gone {
			r.close()
		}
		if p != nil {
			p.touch.wait()
		}
	})
}

// waitFor runs f, which ends by itself, and waits for it unless ctx ends first.
func waitFor(ctx context.Context, f func()) error {
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// CreateReplica creates a replica on a disk, durably, and serves it. One that
// exists alike is no error.
func (s *Server) CreateReplica(id holdfast.DiskID, desc disk.ReplicaDesc) error {
	s.admin.Lock()
	defer s.admin.Unlock()
	s.mu.Lock()
	p, old, closed := s.pools[id], s.served[desc.Replica], s.closed
	s.mu.Unlock()
	switch {
	case closed:
		return errClosed()
	case p == nil:
		return holdfast.Errorf(holdfast.ErrNotFound, "disk %v is not served here", id)
	case old != nil && old.desc == desc && old.disk == p:
		return nil
	case old != nil:
		return holdfast.Errorf(holdfast.ErrExists, "replica %v exists on disk %v as %+v", desc.Replica, old.disk.id, old.desc)
	}
	r, err := p.disk.CreateReplica(desc)
	if err != nil {
		return err
	}
	if st := r.Status(); st.Fence == 0 && st.Tail == 0 {
		// No writer was ever here: nothing that was acknowledged can be missing
		// (R7), so a first attach need not wait for every member.
		// ErrRefused: this disk is never intact.
		if err := r.DeclareIntact(0); err != nil && !errors.Is(err, holdfast.ErrRefused) {
			return err
		}
	}
	// It is new: nobody was ever promised anything.
	opened := newServed(p, newDiskLog(r), s.o.Logger, s.o.PromiseLength, true)
	s.mu.Lock()
	s.served[desc.Replica] = opened
	s.mu.Unlock()
	return nil
}

// DeleteReplica ends a replica's sessions and deletes it, durably. An unknown
// one is no error. After an error it may be called again.
func (s *Server) DeleteReplica(ctx context.Context, id holdfast.ReplicaID) error {
	s.admin.Lock()
	defer s.admin.Unlock()
	s.mu.Lock()
	r := s.served[id]
	delete(s.served, id)
	s.mu.Unlock()
	if r == nil {
		return s.deleteUnserved(id)
	}
	var err error
	if waited := waitFor(ctx, func() {
		r.close()
		err = r.disk.disk.DeleteReplica(id)
	}); waited != nil {
		return waited
	}
	return err
}

// deleteUnserved deletes what an earlier try closed and did not delete.
func (s *Server) deleteUnserved(id holdfast.ReplicaID) error {
	for _, d := range s.Disks() {
		if _, ok := d.Replica(id); ok {
			return d.DeleteReplica(id)
		}
	}
	return nil
}

// ReplicaStatus is what is known of one replica.
type ReplicaStatus struct {
	Disk   holdfast.DiskID
	Log    disk.Status    // what the disk says
	Core   replica.Status // what the protocol knows
	Writer holdfast.Epoch // of the open session; zero: none
	Remote string         // who the writer is
	Waits  []replica.Wait
	Failed error // why it cannot go on
	// PingsDropped counts the pings of all writers to this disk that were not
	// answered, since as many as may wait waited for the disk already.
	PingsDropped uint64
}

// Replicas returns the state of all replicas, ordered by id.
func (s *Server) Replicas() []ReplicaStatus {
	var out []ReplicaStatus
	for _, r := range s.all() {
		out = append(out, r.status())
	}
	return out
}

// Replica returns the state of one.
func (s *Server) Replica(id holdfast.ReplicaID) (ReplicaStatus, bool) {
	s.mu.Lock()
	r := s.served[id]
	s.mu.Unlock()
	if r == nil {
		return ReplicaStatus{}, false
	}
	return r.status(), true
}

// Disks returns the disks served, by id.
func (s *Server) Disks() map[holdfast.DiskID]*disk.Disk {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[holdfast.DiskID]*disk.Disk{}
	for id, p := range s.pools {
		out[id] = p.disk
	}
	return out
}

// Serve takes connections from a listener of the node's data address until it
// is closed or the server is: then it returns nil. The listener is closed.
func (s *Server) Serve(l net.Listener) error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		_ = l.Close()
		return nil
	}
	s.listeners[l] = true
	s.ended.Add(1)
	s.mu.Unlock()
	defer s.ended.Done()
	defer func() {
		_ = l.Close()
		s.mu.Lock()
		delete(s.listeners, l)
		s.mu.Unlock()
	}()
	for {
		c, err := l.Accept()
		switch {
		case errors.Is(err, net.ErrClosed):
			return nil
		case err != nil:
			var temporary interface{ Temporary() bool }
			if errors.As(err, &temporary) && temporary.Temporary() {
				s.o.Logger.Warn("accept failed", "error", err)
				select { // out of descriptors, say: the only cure is time
				case <-time.After(tickEvery):
					continue
				case <-s.stop:
					return nil
				}
			}
			return err
		}
		s.greet(c)
	}
}

// greet takes HELLO from a fresh connection, in a goroutine of its own.
func (s *Server) greet(c net.Conn) {
	s.mu.Lock()
	if s.closed || len(s.greeting) >= maxGreeting {
		s.mu.Unlock()
		_ = c.Close()
		return
	}
	s.greeting[c] = true
	s.ended.Add(1)
	s.mu.Unlock()
	go func() {
		defer s.ended.Done()
		defer func() {
			s.mu.Lock()
			delete(s.greeting, c)
			s.mu.Unlock()
		}()
		link, epoch, hello, err := wire.Accept(c)
		if err != nil {
			s.o.Logger.Debug("no session", "remote", c.RemoteAddr().String(), "error", err)
			return
		}
		r, welcome, err := s.admit(hello)
		if err != nil {
			link.Refuse(epoch, err)
			return
		}
		conn := s.number()
		if err := r.open(conn, link, epoch, hello); err != nil {
			link.Refuse(epoch, err)
			return
		}
		if err := link.Welcome(epoch, welcome); err != nil {
			r.abandon(conn, err)
			return
		}
		r.start(conn, link)
	}()
}

func (s *Server) number() replica.Conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conns++
	return s.conns
}

// admit checks every id of HELLO: an address may have come to belong to another
// node, another cluster, or another life of this one.
func (s *Server) admit(h *wire.Hello) (*served, *wire.Welcome, error) {
	switch {
	case h.Cluster != s.o.Cluster:
		return nil, nil, holdfast.Errorf(holdfast.ErrRefused, "this is cluster %v, not %v", s.o.Cluster, h.Cluster)
	case h.To != s.o.Node:
		return nil, nil, holdfast.Errorf(holdfast.ErrRefused, "this is node %v, not %v", s.o.Node, h.To)
	case h.Level > s.o.Level:
		return nil, nil, holdfast.Errorf(holdfast.ErrUnsupported, "the writer is at cluster level %d, this node at %d", h.Level, s.o.Level)
	}
	s.mu.Lock()
	r, closed := s.served[h.Replica], s.closed
	s.mu.Unlock()
	switch {
	case closed:
		return nil, nil, errClosed()
	case r == nil:
		return nil, nil, holdfast.Errorf(holdfast.ErrNotFound, "replica %v is not on this node", h.Replica)
	case h.Segment != r.desc.Segment || h.Lineage != r.desc.Lineage:
		return nil, nil, holdfast.Errorf(holdfast.ErrRefused, "replica %v is of segment %v, lineage %v", h.Replica, r.desc.Segment, r.desc.Lineage)
	}
	return r, &wire.Welcome{Level: s.o.Level, Node: s.o.Node, Instance: s.o.Instance, Disk: r.disk.id, OpenCount: r.disk.openCount}, nil
}

// Connect opens a session in process. The caller starts the link.
func (s *Server) Connect(epoch holdfast.Epoch, hello *wire.Hello) (*Session, *wire.Welcome, error) {
	r, welcome, err := s.admit(hello)
	if err != nil {
		return nil, nil, err
	}
	near, far := wire.Pipe("in process")
	conn := s.number()
	if err := r.open(conn, far, epoch, hello); err != nil {
		return nil, nil, err
	}
	r.start(conn, far)
	return &Session{Link: near, served: r, conn: conn, epoch: epoch}, welcome, nil
}

// Close ends all sessions and returns when nothing runs any more. Disks are
// left open.
func (s *Server) Close() error {
	s.admin.Lock()
	defer s.admin.Unlock()
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	for l := range s.listeners {
		_ = l.Close()
	}
	for c := range s.greeting {
		_ = c.Close()
	}
	gone := slices.Collect(maps.Values(s.served))
	pools := slices.Collect(maps.Values(s.pools))
	clear(s.served)
	clear(s.pools)
	s.mu.Unlock()
	close(s.stop)
	for _, r := range gone {
		r.close()
	}
	for _, p := range pools {
		p.touch.wait()
	}
	s.ended.Wait()
	return nil
}
