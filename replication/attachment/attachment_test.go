package attachment

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/replication/coordinator"
)

func TestOneReplica(t *testing.T) {
	c := newCluster(t, 1, 8<<20, 8<<20)
	a := c.attach(c.hosts[0])
	m := newModel(1, c.size)
	m.mutate(t, a, 200)
	m.verify(t, a)
	if err := a.Detach(t.Context()); err != nil {
		t.Fatalf("detach: %v", err)
	}
	c.compare(m.data, c.hosts...)
}

func TestThreeReplicas(t *testing.T) {
	c := newCluster(t, 3, 8<<20, 3<<20)
	a := c.attach(c.hosts[0])
	if !a.Continuous() {
		t.Error("a first attach is not continuous")
	}
	m := newModel(2, c.size)
	m.mutate(t, a, 300)
	m.verify(t, a)
	if err := a.Detach(t.Context()); err != nil {
		t.Fatalf("detach: %v", err)
	}
	c.compare(m.data, c.hosts...)

	// Attached again, on another node: the session goes on where it was.
	b := c.attach(c.hosts[1])
	if !b.Continuous() {
		t.Error("an attach after a clean detach is not continuous")
	}
	m.verify(t, b)
	m.mutate(t, b, 50)
	m.verify(t, b)
}

// A member dies: writes are held until raft has put it out, then go on. It
// returns and is brought back by replay or by the others' log.
func TestMemberDiesAndReturns(t *testing.T) {
	c := newCluster(t, 3, 8<<20, 8<<20)
	a := c.attach(c.hosts[0])
	m := newModel(3, c.size)
	m.mutate(t, a, 50)
	c.hosts[2].kill()
	m.mutate(t, a, 100) // the first of them waits for the eviction
	if got := len(c.meta.isr(0)); got != 2 {
		t.Fatalf("%d members are in sync after the writes, want 2", got)
	}
	m.verify(t, a)
	c.hosts[2].start()
	c.waitInSync(a, 3)
	m.mutate(t, a, 50)
	m.verify(t, a)
	if got := a.Status().Segments[0].BytesResynced; got == 0 || got > c.size {
		t.Errorf("%d bytes were sent to bring the member back", got)
	}
	if err := a.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.compare(m.data, c.hosts...)
}

// The local member's disk is no better than another: it is evicted, and reads
// come from the others.
func TestLocalMemberEvicted(t *testing.T) {
	c := newCluster(t, 3, 8<<20, 8<<20)
	a := c.attach(c.hosts[0])
	m := newModel(4, c.size)
	m.mutate(t, a, 50)
	if err := c.hosts[0].server.RemoveDisk(t.Context(), c.hosts[0].id); err != nil {
		t.Fatal(err)
	}
	m.mutate(t, a, 50)
	m.verify(t, a)
	if got := len(c.meta.isr(0)); got != 2 {
		t.Fatalf("%d members are in sync, want 2", got)
	}
	if err := c.hosts[0].server.AddDisk(c.hosts[0].disk); err != nil {
		t.Fatal(err)
	}
	c.waitInSync(a, 3)
	m.verify(t, a)
}

// Connections break under load: nothing is lost, nobody is evicted.
func TestConnectionsBreak(t *testing.T) {
	c := newCluster(t, 3, 8<<20, 4<<20)
	a := c.attach(c.hosts[0])
	stop := make(chan struct{})
	var breaking sync.WaitGroup
	breaking.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case <-time.After(15 * time.Millisecond):
				c.hosts[1+i%2].sever()
			}
		}
	})
	m := newModel(5, c.size)
	m.mutate(t, a, 400)
	m.verify(t, a)
	close(stop)
	breaking.Wait()
	c.waitInSync(a, 3)
	if err := a.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.compare(m.data, c.hosts...)
}

// Another node takes over from a writer that is alive: the old one is fenced,
// every write it acknowledged is there, none of its later ones ever is.
func TestTakeover(t *testing.T) {
	c := newCluster(t, 3, 8<<20, 4<<20)
	a := c.attach(c.hosts[0])
	m := newModel(6, c.size)
	m.mutate(t, a, 100)
	b := c.attach(c.hosts[1])
	if !b.Continuous() {
		t.Error("a takeover with every member intact is not continuous")
	}
	m.verify(t, b)
	err := a.WriteAt(t.Context(), make([]byte, 4096), 0, false)
	if !errors.Is(err, holdfast.ErrFenced) {
		t.Errorf("write of the fenced writer: %v, want ErrFenced", err)
	}
	if err := a.ReadAt(t.Context(), make([]byte, 4096), 0); !errors.Is(err, holdfast.ErrFenced) {
		t.Errorf("read of the fenced writer: %v, want ErrFenced", err)
	}
	<-a.Done()
	if err := a.Err(); !errors.Is(err, holdfast.ErrFenced) {
		t.Errorf("the fenced attachment ended with %v, want ErrFenced", err)
	}
	m.mutate(t, b, 50)
	m.verify(t, b)
	if err := b.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.compare(m.data, c.hosts...)
}

// The writer's host dies with its replica while writes run. Elsewhere every
// acknowledged write is there.
func TestTakeoverAfterDeath(t *testing.T) {
	c := newCluster(t, 3, 8<<20, 8<<20)
	a := c.attach(c.hosts[0])
	m := newModel(7, c.size)
	m.mutate(t, a, 100)
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	c.hosts[0].kill()
	b := c.attach(c.hosts[1])
	if !b.Continuous() {
		t.Error("one host of three died: not continuous")
	}
	m.verify(t, b)
	m.mutate(t, b, 50)
	c.hosts[0].start()
	c.grow(b, 0)
	c.waitInSync(b, 3)
	m.verify(t, b)
	if err := b.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.compare(m.data, c.hosts...)
}

// grow tells the attachment of raft's replicas, as a watch would, with every
// stale one to be filled.
func (c *cluster) grow(a *Attachment, segment int) {
	c.meta.mu.Lock()
	s := &c.meta.segments[segment]
	for i := range s.replicas {
		if s.replicas[i].Role == holdfast.RoleStale {
			s.replicas[i].Role = holdfast.RoleSyncing
		}
	}
	list := append([]coordinator.Replica(nil), s.replicas...)
	c.meta.mu.Unlock()
	a.UpdateReplicas(uint32(segment), list)
}

// A new replica is added and filled with a whole copy, while writes go on.
func TestWholeCopy(t *testing.T) {
	c := newCluster(t, 2, 8<<20, 8<<20)
	a := c.attach(c.hosts[0])
	m := newModel(8, c.size)
	m.mutate(t, a, 200)
	h := newHost(t, 9, 96<<20)
	c.hosts = append(c.hosts, h)
	id := holdfast.ReplicaID{0xaa, 9}
	c.create(h, 0, id)
	c.meta.mu.Lock()
	c.meta.segments[0].replicas = append(c.meta.segments[0].replicas, coordinator.Replica{ID: id, Node: h.node, Role: holdfast.RoleSyncing, Lineage: testLineage})
	c.meta.mu.Unlock()
	c.grow(a, 0)
	m.mutate(t, a, 200)
	c.waitInSync(a, 3)
	m.mutate(t, a, 50)
	m.verify(t, a)
	if err := a.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.compare(m.data, c.hosts...)
}

// Without quorum nothing changes while all members answer; when one dies,
// requests are held, and go on when raft is back. No answer of raft is lost on
// the way by being lost.
func TestNoQuorum(t *testing.T) {
	c := newCluster(t, 3, 8<<20, 8<<20)
	a := c.attach(c.hosts[0])
	m := newModel(10, c.size)
	c.meta.setQuorum(false)
	m.mutate(t, a, 50)
	m.verify(t, a)
	c.hosts[1].kill()
	want := bytes.Repeat([]byte{7}, 4096)
	ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
	defer cancel()
	if err := a.WriteAt(ctx, want, 0, false); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("a write that lacks a member, without quorum: %v, want it held", err)
	}
	copy(m.data, want) // given up by its caller, not by the volume
	c.meta.mu.Lock()
	c.meta.noQuorum, c.meta.forget = false, 1
	c.meta.mu.Unlock()
	m.mutate(t, a, 20)
	m.verify(t, a)
	c.hosts[1].start()
	c.waitInSync(a, 3)
	if err := a.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.compare(m.data, c.hosts...)
}

// More is written than the log holds: the writer waits for the log to be
// recycled, and only for that. A window larger than the log makes it fill
// with entries that are not committed.
func TestMoreThanTheLog(t *testing.T) {
	for _, hosts := range []int{1, 3} {
		for _, window := range []int64{0, 64 << 20} {
			c := newCluster(t, hosts, 16<<20, 16<<20)
			o := c.options(c.hosts[0])
			o.Limits.WindowBytes = window
			o.Limits.FlushEvery = time.Hour
			a, err := New(o)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = a.Close() })
			c.waitAttached(a)
			m := newModel(11, c.size)
			for round := range 4 { // 64 MiB into a log of 16
				var all sync.WaitGroup
				for i := range 16 {
					all.Go(func() {
						p := m.data[i<<20 : (i+1)<<20]
						for j := range p {
							p[j] = byte(round*31 + i + j>>12)
						}
						if err := a.WriteAt(context.Background(), p, int64(i)<<20, false); err != nil {
							t.Errorf("write: %v", err)
						}
					})
				}
				all.Wait()
			}
			m.verify(t, a)
			c.waitInSync(a, hosts)
		}
	}
}

// TestRegressionIsTold: when raft knows of entries that no replica has, neither an
// attach nor a detach asks again and again; a person is told.
func TestRegressionIsTold(t *testing.T) {
	c := newCluster(t, 2, 8<<20, 8<<20)
	raise := func(to holdfast.Seq) {
		c.meta.mu.Lock()
		defer c.meta.mu.Unlock()
		c.meta.segments[0].floor = to
	}
	a := c.attach(c.hosts[0])
	raise(1000)
	if err := a.Detach(t.Context()); !errors.Is(err, holdfast.ErrIntegrity) {
		t.Errorf("detach: got %v, want %v", err, holdfast.ErrIntegrity)
	}
	a.Close()
	raise(0)
	o := c.options(c.hosts[0])
	raise(1000) // raft's floor rises while it attaches
	b, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if err := b.Attach(t.Context()); !errors.Is(err, holdfast.ErrIntegrity) {
		t.Errorf("attach: got %v, want %v", err, holdfast.ErrIntegrity)
	}
}
