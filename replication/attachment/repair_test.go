package attachment

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
	"github.com/holdfast-storage/holdfast/replication/coordinator"
)

// fileOf reads a file of a host's disk whole.
func (h *host) fileOf(path string) []byte {
	h.t.Helper()
	f, err := h.fs.OpenFile(path, 0)
	if err != nil {
		h.t.Fatal(err)
	}
	defer f.Close() //nolint:errcheck // for reading
	size, err := f.Size()
	if err != nil {
		h.t.Fatal(err)
	}
	all := make([]byte, min(size, 24<<20)) // chunks are given out from the beginning
	if _, err := f.ReadAt(all, 0); err != nil {
		h.t.Fatal(err)
	}
	return all
}

// rot flips a bit of the last place of a file that holds these bytes.
func (h *host) rot(path string, what []byte) {
	h.t.Helper()
	off := bytes.LastIndex(h.fileOf(path), what)
	if off < 0 {
		h.t.Fatalf("%s of node %v does not hold %x..", path, h.node, what[:8])
	}
	if err := h.fs.FlipBit(path, int64(off)+77, 2); err != nil {
		h.t.Fatal(err)
	}
}

// own reads a block of a host's own replica of segment 0.
func (h *host) own(block int64) ([]byte, error) {
	p := make([]byte, holdfast.BlockSize)
	return p, h.disk.Replicas()[0].ReadAt(p, block*holdfast.BlockSize)
}

// blocks writes n blocks of random bytes, and waits until they are in the
// chunks of every host.
func (c *cluster) blocks(a *Attachment, n int64, hosts ...*host) *model {
	c.t.Helper()
	m := newModel(77, c.size)
	for i := range m.data[:n*holdfast.BlockSize] {
		m.data[i] = byte(m.rng.Uint32())
	}
	for off := int64(0); off < n*holdfast.BlockSize; off += holdfast.ChunkSize {
		if err := a.WriteAt(c.t.Context(), m.data[off:off+holdfast.ChunkSize], off, false); err != nil {
			c.t.Fatal(err)
		}
	}
	c.applied(a, hosts...)
	return m
}

// applied flushes, and waits until all is in the chunks.
func (c *cluster) applied(a *Attachment, hosts ...*host) {
	c.t.Helper()
	if err := a.Flush(c.t.Context()); err != nil {
		c.t.Fatal(err)
	}
	c.eventually("everything applied", a, func() bool {
		for _, h := range hosts {
			if st := h.disk.Replicas()[0].Status(); st.Applied != a.Status().Segments[0].State.Tail {
				return false
			}
		}
		return true
	})
}

func (m *model) block(i int64) []byte {
	return m.data[i*holdfast.BlockSize : (i+1)*holdfast.BlockSize]
}

// goodAgain waits until a host's own replica has the block, by itself.
func (c *cluster) goodAgain(a *Attachment, m *model, h *host, block int64) {
	c.t.Helper()
	c.eventually("block repaired", a, func() bool {
		p, err := h.own(block)
		return err == nil && bytes.Equal(p, m.block(block))
	})
	if !bytes.Contains(h.fileOf(diskPath), m.block(block)) {
		c.t.Fatalf("block %d is not on the disk of node %v", block, h.node)
	}
}

// Blocks rot under a running attachment, on the disk that is read, on one that
// is not, and on two at a time: every read is right, and each disk has its block
// again by itself.
func TestRotIsRepaired(t *testing.T) {
	c := newCluster(t, 3, 4<<20, 4<<20)
	a := c.attach(c.hosts[0])
	m := c.blocks(a, 64, c.hosts...)
	c.hosts[0].rot(diskPath, m.block(5))
	m.verify(t, a) // finds it
	c.goodAgain(a, m, c.hosts[0], 5)

	c.hosts[0].rot(diskPath, m.block(20))
	c.hosts[1].rot(diskPath, m.block(20))
	c.hosts[1].rot(diskPath, m.block(21))
	m.verify(t, a)
	for _, h := range c.hosts[:2] { // whoever looks at it tells
		c.goodAgain(a, m, h, 20)
	}
	c.goodAgain(a, m, c.hosts[1], 21)
	// All three lost another block of one chunk: it is pieced together.
	for i, h := range c.hosts {
		h.rot(diskPath, m.block(int64(40+i)))
	}
	m.verify(t, a)
	for i, h := range c.hosts {
		_, _ = h.own(int64(40 + i))
		c.goodAgain(a, m, h, int64(40+i))
	}
	for i, want := range []uint64{3, 3, 1} {
		st := c.hosts[i].disk.Stat().Repair
		if st.Repaired < want-1 || st.Repaired != st.Found || st.Poisoned != 0 {
			t.Errorf("node %d counts %+v", i, st)
		}
	}
	if got := len(c.meta.isr(0)); got != 3 {
		t.Errorf("%d members in sync", got)
	}
	c.compare(m.data, c.hosts...)
}

// The same beside writes to the same chunks.
func TestRotBesideWrites(t *testing.T) {
	c := newCluster(t, 3, 1<<20, 1<<20)
	a := c.attach(c.hosts[0])
	m := c.blocks(a, 64, c.hosts...)
	for round := range int64(8) {
		h := c.hosts[round%3]
		c.applied(a, c.hosts...)
		for b := int64(64); b < 80; b++ { // these are not written beside
			if round == 0 {
				for i := range m.block(b) {
					m.block(b)[i] = byte(m.rng.Uint32())
				}
				if err := a.WriteAt(t.Context(), m.block(b), b*holdfast.BlockSize, false); err != nil {
					t.Fatal(err)
				}
			}
		}
		c.applied(a, c.hosts...)
		b := 64 + round
		h.rot(diskPath, m.block(b))
		_, err := h.own(b)
		if !errors.Is(err, holdfast.ErrIntegrity) {
			t.Fatalf("rot was not found: %v", err)
		}
		deadline := time.Now().Add(20 * time.Second)
		for {
			for i := range int64(8) { // the other half of the chunk
				o := 72 + i
				for k := range m.block(o) {
					m.block(o)[k] = byte(m.rng.Uint32())
				}
				if err := a.WriteAt(t.Context(), m.block(o), o*holdfast.BlockSize, false); err != nil {
					t.Fatal(err)
				}
			}
			if p, err := h.own(b); err == nil && bytes.Equal(p, m.block(b)) {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("not repaired beside writes: %+v", a.Status())
			}
		}
		m.verify(t, a)
	}
	c.compare(m.data, c.hosts...)
}

// A payload rots in the log, before it is moved into place: that member's chunk
// comes from another, and all is well again.
func TestRotInTheLog(t *testing.T) {
	c := newCluster(t, 3, 4<<20, 4<<20)
	a := c.attach(c.hosts[0])
	m := c.blocks(a, 32, c.hosts...)
	release := c.hosts[1].hang(vfs.OpSync) // nothing is applied without a sync
	for i := range m.block(3) {
		m.block(3)[i] = byte(m.rng.Uint32())
	}
	if err := a.WriteAt(t.Context(), m.block(3), 3*holdfast.BlockSize, false); err != nil {
		t.Fatal(err)
	}
	found := false
	for i := range 4 {
		path := diskPath + ".wal/0000" + string(rune('0'+i))
		if bytes.Contains(c.hosts[1].fileOf(path), m.block(3)) {
			c.hosts[1].rot(path, m.block(3))
			found = true
		}
	}
	if !found {
		t.Fatal("the entry is in no log")
	}
	release()
	c.eventually("the entry applied", a, func() bool {
		st := c.hosts[1].disk.Replicas()[0].Status()
		return st.Applied == a.Status().Segments[0].State.Tail
	})
	c.goodAgain(a, m, c.hosts[1], 3)
	if st := c.hosts[1].disk.Stat().Repair; st.Found != 1 || st.Repaired != 1 || st.Poisoned != 0 {
		t.Errorf("counts %+v", st)
	}
	m.verify(t, a)
	c.compare(m.data, c.hosts...)
}

// wantLost reads a block that nobody has.
func wantLost(t *testing.T, a *Attachment, block int64) {
	t.Helper()
	p := make([]byte, holdfast.BlockSize)
	if err := a.ReadAt(t.Context(), p, block*holdfast.BlockSize); !errors.Is(err, holdfast.ErrIntegrity) {
		t.Fatalf("a read of lost block %d: %v", block, err)
	}
}

// poisoned waits until a host's replica has so many poisoned blocks.
func (c *cluster) poisoned(a *Attachment, n int64, hosts ...*host) {
	c.t.Helper()
	c.eventually("poisoned", a, func() bool {
		for _, h := range hosts {
			if h.disk.Replicas()[0].Status().Poison != n {
				return false
			}
		}
		return true
	})
}

// The only copy of a block rots, or all of them: it is poison, an error for
// every reader, through restarts, until it is written again.
func TestOnlyCopyRots(t *testing.T) {
	for _, n := range []int{1, 3} {
		c := newCluster(t, n, 4<<20, 4<<20)
		a := c.attach(c.hosts[0])
		m := c.blocks(a, 32, c.hosts...)
		for _, h := range c.hosts {
			h.rot(diskPath, m.block(7))
		}
		wantLost(t, a, 7)
		c.poisoned(a, 1, c.hosts...)
		wantLost(t, a, 7)
		if err := a.ReadAt(t.Context(), make([]byte, holdfast.BlockSize), 8*holdfast.BlockSize); err != nil {
			t.Fatalf("the block beside it: %v", err)
		}
		if err := a.Detach(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, h := range c.hosts {
			h.kill()
			h.start()
		}
		b := c.attach(c.hosts[0])
		wantLost(t, b, 7)
		c.poisoned(b, 1, c.hosts...)
		if err := b.WriteAt(t.Context(), m.block(7)[:512], 7*holdfast.BlockSize, false); !errors.Is(err, holdfast.ErrIntegrity) {
			t.Fatalf("a write of a part of it: %v", err)
		}
		if err := b.WriteAt(t.Context(), m.block(7), 7*holdfast.BlockSize, true); err != nil {
			t.Fatal(err)
		}
		m.verify(t, b)
		c.poisoned(b, 0, c.hosts...)
	}
}

// Every in-sync member must have been asked: while one does not answer, a block
// that the others lost is no poison, and comes back with that member.
func TestNoPoisonWhileAMemberIsAway(t *testing.T) {
	c := newCluster(t, 2, 4<<20, 4<<20)
	a := c.attach(c.hosts[0])
	m := c.blocks(a, 32, c.hosts...)
	release := c.hosts[1].hang(vfs.OpRead)
	c.hosts[0].rot(diskPath, m.block(7))
	if _, err := c.hosts[0].own(7); !errors.Is(err, holdfast.ErrIntegrity) {
		t.Fatalf("rot was not found: %v", err)
	}
	time.Sleep(500 * time.Millisecond)
	if st := c.hosts[0].disk.Replicas()[0].Status(); st.Poison != 0 {
		t.Fatalf("poison although a member was not asked: %+v", st)
	}
	release()
	c.goodAgain(a, m, c.hosts[0], 7)
	m.verify(t, a)
}

// A member is filled from a source with bad blocks: by its own bytes if they
// are those that the source should have, by another member's, and what nobody
// has is poison there too.
func TestCopyFromARottenSource(t *testing.T) {
	c := newCluster(t, 3, 4<<20, 4<<20)
	a := c.attach(c.hosts[0])
	m := c.blocks(a, 64, c.hosts...)
	c.churn(a, m, 40<<20) // no log holds the blocks any more
	c.applied(a, c.hosts...)
	fresh := newHost(t, 9, 96<<20)
	c.hosts[2].kill()
	c.eventually("evicted", a, func() bool { return len(c.meta.isr(0)) == 2 })
	c.hosts[0].rot(diskPath, m.block(3))
	c.hosts[1].rot(diskPath, m.block(4))
	for _, h := range c.hosts[:2] {
		h.rot(diskPath, m.block(30))
	}
	c.replace(a, 2, fresh)
	c.waitInSync(a, 3)
	c.wantCopied(a, fresh)
	wantLost(t, a, 30)
	c.poisoned(a, 1, c.hosts...)
	for _, h := range c.hosts {
		for _, b := range []int64{3, 4} {
			c.goodAgain(a, m, h, b)
		}
		if _, err := h.own(30); !errors.Is(err, holdfast.ErrIntegrity) {
			t.Fatalf("node %v reads lost block 30: %v", h.node, err)
		}
	}
	if err := a.WriteAt(t.Context(), m.block(30), 30*holdfast.BlockSize, false); err != nil {
		t.Fatal(err)
	}
	m.verify(t, a)
	if err := a.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.compare(m.data, c.hosts...)
}

// The only source has a bad block, and the member that comes back has it: its
// own bytes stay, and the source gets them back.
func TestTargetKeepsItsOwn(t *testing.T) {
	c := newCluster(t, 2, 4<<20, 4<<20)
	o := testLimits
	o.WindowOps = 16
	a := c.attachWith(c.hosts[0], o)
	m := c.blocks(a, 64, c.hosts...)
	c.hosts[1].kill()
	// More than the window and the log keep: it is brought back by chunks, and
	// among them that of block 3, whose chunk changed.
	for i := range m.block(9) {
		m.block(9)[i] = byte(m.rng.Uint32())
	}
	if err := a.WriteAt(t.Context(), m.block(9), 9*holdfast.BlockSize, false); err != nil {
		t.Fatal(err)
	}
	c.churn(a, m, 40<<20)
	c.applied(a, c.hosts[0])
	c.hosts[0].rot(diskPath, m.block(3))
	c.hosts[1].start()
	c.waitInSync(a, 2)
	c.wantCopied(a, c.hosts[1])
	m.verify(t, a)
	_, _ = c.hosts[0].own(3)
	c.goodAgain(a, m, c.hosts[0], 3)
	if err := a.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.compare(m.data, c.hosts...)
}

// wantCopied checks that a host's replica was brought back by chunks.
func (c *cluster) wantCopied(a *Attachment, h *host) {
	c.t.Helper()
	for _, m := range a.Status().Segments[0].State.Members {
		if m.Node == h.node && m.CopyTotal == 0 {
			c.t.Fatalf("node %v was brought back without chunks", h.node)
		}
	}
}

// churn writes so many bytes to the upper half of the volume.
func (c *cluster) churn(a *Attachment, m *model, n int) {
	c.t.Helper()
	half := c.size / 2
	p := m.data[half : half+1<<20]
	for ; n > 0; n -= len(p) {
		for i := 0; i < len(p); i += 64 {
			p[i] = byte(m.rng.Uint32())
		}
		if err := a.WriteAt(c.t.Context(), p, half, false); err != nil {
			c.t.Fatal(err)
		}
	}
}

func (c *cluster) attachWith(on *host, l coordinator.Limits) *Attachment {
	c.t.Helper()
	o := c.options(on)
	o.Limits = l
	a, err := New(o)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { _ = a.Close() })
	c.waitAttached(a)
	return a
}

// rottenLog is a volume of n members that stopped at once, each of hosts with a
// payload of its log that rotted when it was durable and not yet in a chunk.
func rottenLog(t *testing.T, n int, which ...int) (*cluster, *model) {
	t.Helper()
	c := newCluster(t, n, 4<<20, 4<<20)
	for _, h := range c.hosts { // again, with a disk that applies nothing by itself
		h.kill()
		h.applyEvery = -1
		h.start()
	}
	a := c.attach(c.hosts[0])
	m := newModel(5, c.size)
	for b := range int64(8) {
		for i := range m.block(b) {
			m.block(b)[i] = byte(m.rng.Uint32())
		}
		if err := a.WriteAt(t.Context(), m.block(b), b*holdfast.BlockSize, true); err != nil {
			t.Fatal(err)
		}
	}
	c.waitInSync(a, n)
	_ = a.Close()
	for i, h := range c.hosts {
		h.kill()
		h.applyEvery = 20 * time.Millisecond
		if slices.Contains(which, i) {
			h.rot(diskPath+".wal/00000", m.block(2))
		}
		h.start()
		if got := h.disk.Replicas()[0].Status().BadEntry; (got != 0) != slices.Contains(which, i) {
			t.Fatalf("node %d: the last bad entry is %d", i, got)
		}
	}
	return c, m
}

// A member whose log rotted is not intact and not among those that begin; it
// comes back by a copy, whole.
func TestRottenLogIsLeftOut(t *testing.T) {
	c, m := rottenLog(t, 3, 1)
	a := c.attach(c.hosts[0])
	if !a.Continuous() {
		t.Error("two members were intact, and the start is not continuous")
	}
	if log := c.meta.commands(); !slices.ContainsFunc(log, func(s string) bool { return strings.Contains(s, "with 2, continuous true") }) {
		t.Errorf("activated with: %q", log)
	}
	m.verify(t, a)
	c.waitInSync(a, 3)
	if err := a.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.compare(m.data, c.hosts...)
}

// Where every log lost the bytes, they are poison, the old sessions are void,
// and everything else is there.
func TestRottenLogOfTheOnlyCopy(t *testing.T) {
	for _, n := range []int{1, 2} {
		which := []int{0, 1}[:n]
		c, m := rottenLog(t, n, which...)
		a := c.attach(c.hosts[0])
		if a.Continuous() {
			t.Error("acknowledged bytes are lost, and the start is continuous")
		}
		wantLost(t, a, 2)
		c.poisoned(a, 1, c.hosts...)
		wantLost(t, a, 2)
		if err := a.WriteAt(t.Context(), m.block(2), 2*holdfast.BlockSize, false); err != nil {
			t.Fatal(err)
		}
		m.verify(t, a)
		if err := a.Detach(t.Context()); err != nil {
			t.Fatal(err)
		}
		c.compare(m.data, c.hosts...)
	}
}

// A head that cannot be read could have been anything: with no other copy the
// volume is refused.
func TestUnreadableLogOfTheOnlyCopy(t *testing.T) {
	c := newCluster(t, 1, 4<<20, 4<<20)
	a := c.attach(c.hosts[0])
	m := newModel(5, c.size)
	for b := range int64(8) {
		for i := range m.block(b) {
			m.block(b)[i] = byte(m.rng.Uint32())
		}
		if err := a.WriteAt(t.Context(), m.block(b), b*holdfast.BlockSize, true); err != nil {
			t.Fatal(err)
		}
	}
	_ = a.Close()
	h := c.hosts[0]
	h.kill()
	off := bytes.LastIndex(h.fileOf(diskPath+".wal/00000"), m.block(2))
	if err := h.fs.FlipBit(diskPath+".wal/00000", int64(off)-20, 1); err != nil {
		t.Fatal(err)
	}
	h.start()
	b, err := New(c.options(h))
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close() //nolint:errcheck // ended
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := b.Attach(ctx); !errors.Is(err, holdfast.ErrIntegrity) || !bytes.Contains([]byte(err.Error()), []byte("NO_IN_SYNC_REPLICA")) {
		t.Fatalf("attach: %v", err)
	}
}

// A page of a member's map rots: what it says of its chunks is gone, so the
// member is put out and brought back whole, from nothing.
func TestMapPageRots(t *testing.T) {
	c := newCluster(t, 3, 4<<20, 4<<20)
	a := c.attach(c.hosts[0])
	m := c.blocks(a, 64, c.hosts...)
	h := c.hosts[1]
	if err := h.disk.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.kill()
	rotten := 0
	for off := 1 << 20; ; { // every leaf, also those that a checkpoint left behind
		all := h.fileOf(diskPath)
		i := bytes.Index(all[off:], []byte("HFMP"))
		if i < 0 {
			break
		}
		off += i
		if off%4096 == 0 && all[off+24] == 0 && all[off+25] == 0 {
			if err := h.fs.FlipBit(diskPath, int64(off)+1000, 1); err != nil {
				t.Fatal(err)
			}
			rotten++
		}
		off += 4
	}
	if rotten == 0 {
		t.Fatal("no leaf found")
	}
	h.start()
	if st := h.disk.Replicas()[0].Status(); st.Damaged != nil {
		t.Fatalf("damaged before the page was needed: %v", st.Damaged)
	}
	c.waitInSync(a, 3)
	for i := range m.block(3) { // a write needs the page when it is applied
		m.block(3)[i] = byte(m.rng.Uint32())
	}
	if err := a.WriteAt(t.Context(), m.block(3), 3*holdfast.BlockSize, true); err != nil {
		t.Fatal(err)
	}
	c.eventually("rebuilt from nothing", a, func() bool {
		p, err := h.own(3)
		return err == nil && bytes.Equal(p, m.block(3)) && len(c.meta.isr(0)) == 3
	})
	m.verify(t, a)
	if err := a.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.compare(m.data, c.hosts...)
}

// A chunk that cannot be repaired is not tried again and again.
func TestRepairsThatFailPause(t *testing.T) {
	c := newCluster(t, 1, 1<<20, 1<<20)
	a := c.attach(c.hosts[0])
	c.blocks(a, 16, c.hosts...)
	s := a.segments[0]
	s.mu.Lock()
	defer s.mu.Unlock()
	key := repairKey{s.core.State().Members[0].Replica, 3}
	conn := s.peers[key.replica].conn
	s.repairs[key] = &repair{active: true}
	for want := minRepairPause; want < maxRepairPause; want *= 2 {
		s.repaired(key, coordinator.ErrNotNow)
		if r := s.repairs[key]; r.active || r.pause != want || r.next < now()+want-time.Second {
			t.Fatalf("after a failure: %+v", r)
		}
		s.damaged(conn, []int64{3})
		if r := s.repairs[key]; r.active || len(conn.peer.repairs) != 0 {
			t.Fatalf("tried at once: %+v", r)
		}
	}
	s.damaged(conn, []int64{16, 1 << 40}) // beyond the end
	if len(s.repairs) != 1 {
		t.Fatalf("%d repairs", len(s.repairs))
	}
	if w := s.repairWaits(); len(w) != 1 {
		t.Fatalf("waits %+v", w)
	}
	for i := range maxRepairs - 1 {
		s.repairs[repairKey{key.replica, int64(1000 + i)}] = &repair{active: i%2 == 0}
	}
	s.dropOldRepairs()
	if n := len(s.repairs); n != maxRepairs/2+1 {
		t.Fatalf("%d repairs are left", n)
	}
}
