package attachment

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/disk"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
	"github.com/holdfast-storage/holdfast/replication/wire"
)

// A member is away for longer than the window reaches: it is brought back by
// another member's log.
func TestLongAbsence(t *testing.T) {
	c := newCluster(t, 3, 8<<20, 8<<20)
	o := c.options(c.hosts[0])
	o.Limits.WindowOps = 16
	a, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = a.Close() })
	c.waitAttached(a)
	m := newModel(20, c.size)
	m.mutate(t, a, 30)
	c.hosts[1].kill()
	m.mutate(t, a, 150) // the log of 16 MiB still holds them all
	c.hosts[1].start()
	c.waitInSync(a, 3)
	m.mutate(t, a, 30)
	m.verify(t, a)
	if got := a.Status().Segments[0].BytesResynced; got == 0 {
		t.Error("nothing was sent to bring the member back")
	}
	if err := a.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.compare(m.data, c.hosts...)
}

// Away for longer than the logs reach: only chunks bring it back. What was
// trimmed meanwhile must be gone there, too.
func TestAbsenceBeyondTheLog(t *testing.T) {
	c := newCluster(t, 3, 8<<20, 8<<20)
	a := c.attach(c.hosts[0])
	m := newModel(21, c.size)
	m.mutate(t, a, 100)
	if err := a.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.hosts[1].kill()
	if err := a.Trim(t.Context(), 0, 4<<20, false); err != nil {
		t.Fatal(err)
	}
	clear(m.data[:4<<20])
	big := m.data[4<<20:]
	for round := range 12 { // 48 MiB through logs of 16
		for i := range big {
			big[i] = byte(round + i>>10)
		}
		if err := a.WriteAt(t.Context(), big, 4<<20, false); err != nil {
			t.Fatal(err)
		}
	}
	c.hosts[1].start()
	c.grow(a, 0)
	m.mutate(t, a, 30)
	c.waitInSync(a, 3)
	m.mutate(t, a, 30)
	m.verify(t, a)
	if err := a.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.compare(m.data, c.hosts...)
}

// The target of a whole copy dies in the middle, with its process or its
// power, and the source's connections break: the copy is begun again until it
// is whole.
func TestCopyInterrupted(t *testing.T) {
	for _, power := range []bool{false, true} {
		c := newCluster(t, 3, 16<<20, 16<<20)
		a := c.attach(c.hosts[0])
		m := newModel(22, c.size)
		for off := int64(0); off < c.size; off += 1 << 20 {
			for i := range int64(1 << 20) {
				m.data[off+i] = byte(off>>16 + i>>9)
			}
			if err := a.WriteAt(t.Context(), m.data[off:off+1<<20], off, false); err != nil {
				t.Fatal(err)
			}
		}
		c.hosts[2].kill()
		m.mutate(t, a, 10)
		// It comes back with an empty disk, as another replica would.
		h := newHost(t, 7, 96<<20)
		c.replace(a, 2, h)
		for i := range 3 {
			c.eventually("some chunks are copied", a, func() bool {
				for _, s := range a.Status().Segments[0].State.Members {
					if s.Node == h.node && (s.CopyDone > 0 || s.InSync) {
						return true
					}
				}
				return false
			})
			if power {
				h.powerLoss(uint64(i))
			} else {
				h.kill()
			}
			m.mutate(t, a, 10)
			h.start()
		}
		c.waitInSync(a, 3)
		m.mutate(t, a, 10)
		m.verify(t, a)
		if err := a.Detach(t.Context()); err != nil {
			t.Fatal(err)
		}
		c.compare(m.data, c.hosts...)
	}
}

// Chunks are copied over what a replica holds only once raft calls it syncing:
// without raft, not one.
func TestNoCopyWithoutRaft(t *testing.T) {
	c := newCluster(t, 3, 16<<20, 16<<20)
	a := c.attach(c.hosts[0])
	m := newModel(29, c.size)
	m.mutate(t, a, 20)
	c.hosts[1].reach(false)
	c.eventually("it is put out", a, func() bool { return len(c.meta.isr(0)) == 2 })
	for off := int64(0); off < c.size; off += 1 << 20 { // more than the logs keep for it
		for range 2 {
			for i := range int64(1 << 20) {
				m.data[off+i] = byte(off>>18 + i>>9)
			}
			if err := a.WriteAt(t.Context(), m.data[off:off+1<<20], off, false); err != nil {
				t.Fatal(err)
			}
		}
	}
	c.meta.setQuorum(false)
	c.hosts[1].reach(true)
	id := c.meta.segments[0].replicas[1].ID
	asked := func() bool {
		for _, s := range a.Status().Segments[0].State.Members {
			if s.Replica == id {
				return s.Link == "opening"
			}
		}
		return false
	}
	c.eventually("the core wants to copy", a, asked)
	for range 100 {
		time.Sleep(5 * time.Millisecond) // long enough for a copy of this size, were one begun
		for _, r := range c.hosts[1].server.Replicas() {
			if r.Core.Syncing {
				t.Fatal("a copy began without raft")
			}
		}
	}
	c.meta.setQuorum(true)
	c.waitInSync(a, 3)
	if log := c.meta.commands(); !slices.Contains(log, fmt.Sprintf("sync %v", id)) {
		t.Errorf("raft was never told: %q", log)
	}
	m.verify(t, a)
	if err := a.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.compare(m.data, c.hosts...)
}

// A member whose disk hangs is put out like one that is dead, by its silence: its
// acknowledgements still come, from memory, but it answers no ping.
func TestDiskLooksAlive(t *testing.T) {
	c := newCluster(t, 3, 8<<20, 8<<20)
	a := c.attach(c.hosts[0]) // entries may wait for 20 s
	m := newModel(24, c.size)
	m.mutate(t, a, 20)
	release := c.hosts[1].hang(vfs.OpRead)
	patience, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for len(c.meta.isr(0)) == 3 {
		m.mutate(t, a, 5)
		if patience.Err() != nil {
			t.Fatal("a member whose disk hangs is still in sync after a minute")
		}
	}
	m.mutate(t, a, 20)
	release()
	c.waitInSync(a, 3)
	m.verify(t, a)
	if err := a.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.compare(m.data, c.hosts...)
}

// A member that does not acknowledge for want of its disk is put out too.
func TestDiskHangs(t *testing.T) {
	c := newCluster(t, 3, 8<<20, 8<<20)
	o := c.options(c.hosts[0])
	o.Limits.OpAge = 500 * time.Millisecond
	a, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = a.Close() })
	c.waitAttached(a)
	m := newModel(23, c.size)
	m.mutate(t, a, 20)
	release := c.hosts[1].hang(vfs.OpWrite)
	m.mutate(t, a, 40)
	if got := len(c.meta.isr(0)); got != 2 {
		t.Errorf("%d members in sync while one hangs, want 2", got)
	}
	release()
	c.waitInSync(a, 3)
	m.verify(t, a)
	if err := a.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.compare(m.data, c.hosts...)
}

// fillLog fills a host's log, but for room bytes, with entries of another replica
// that nobody ever commits.
func (h *host) fillLog(t *testing.T, room int64) {
	t.Helper()
	r, err := h.disk.CreateReplica(disk.ReplicaDesc{
		Segment: holdfast.SegmentID{Volume: holdfast.VolumeID{0xff}}, Replica: holdfast.NewID[holdfast.ReplicaID](), Lineage: testLineage, Size: 64 << 20,
	})
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 256<<10)
	sums := wire.BlockSums(nil, p)
	for seq := holdfast.Seq(1); ; seq++ {
		if st := h.disk.Stat(); st.WALSize-st.WALUsed < room {
			return
		}
		e := disk.Entry{Seq: seq, Type: disk.OpWrite, Length: int64(len(p)), CRC: sums, Payload: p}
		if err := r.Append([]disk.Entry{e}); err != nil {
			t.Fatal(err)
		}
	}
}

// Members are put out while their logs are full of entries whose commit they
// were never told. What they lack fits in only once they are told.
func TestPutOutWithFullLogs(t *testing.T) {
	c := newCluster(t, 3, 16<<20, 16<<20)
	for _, h := range c.hosts[1:] {
		h.fillLog(t, 12<<20)
	}
	o := c.options(c.hosts[0])
	o.Limits.WindowBytes = 64 << 20
	o.Limits.FlushEvery = time.Hour
	o.Limits.FlushBytes = 64 << 20
	a, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = a.Close() })
	c.waitAttached(a)
	m := newModel(24, c.size)
	write := func(from, to int64) {
		for off := from; off < to; off += 1 << 20 {
			for i := range int64(1 << 20) {
				m.data[off+i] = byte(off>>18 + i>>10)
			}
			if err := a.WriteAt(t.Context(), m.data[off:off+1<<20], off, false); err != nil {
				t.Fatal(err)
			}
		}
	}
	const end = 1 << 20 // the window of a segment takes no more of a log of 16 MiB
	write(0, end)
	if got := a.Status().Segments[0].State.Commit; got != 0 {
		t.Fatalf("commit is %d before anything was flushed, want 0", got)
	}
	for _, h := range c.hosts[1:] {
		h.reach(false)
	}
	c.eventually("the writer is alone", a, func() bool { return len(c.meta.isr(0)) == 1 })
	write(end, 16<<20)
	write(0, 2<<20)
	for _, h := range c.hosts[1:] {
		h.reach(true)
	}
	c.waitInSync(a, 3)
	m.verify(t, a)
	if err := a.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.compare(m.data, c.hosts...)
}
