package attachment

import (
	"errors"
	"testing"

	"github.com/holdfast-storage/holdfast"
)

// fillUp writes to the volume from byte off on until the disks are full, and
// returns where that was. What was refused left no trace, on no member.
func (m *model) fillUp(t *testing.T, a *Attachment, off int64) int64 {
	t.Helper()
	p := make([]byte, holdfast.ChunkSize)
	for ; off < int64(len(m.data)); off += int64(len(p)) {
		random(m.rng, p)
		err := a.WriteAt(t.Context(), p, off, false)
		if errors.Is(err, holdfast.ErrNoSpace) {
			return off
		}
		if err != nil {
			t.Fatalf("write at %d: %v", off, err)
		}
		copy(m.data[off:], p)
	}
	t.Fatalf("%d bytes were written to disks that hold less", len(m.data))
	return 0
}

// When the disks are full, and no member can be done without, writes that need new
// space fail, at once and without a trace; overwrites and trims go on, and what a
// trim frees is there for the next write.
func TestDisksFull(t *testing.T) {
	c := newCluster(t, 3, 128<<20, 128<<20)
	o := c.options(c.hosts[0])
	o.Policy.MinCopies = 3
	a, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = a.Close() })
	c.waitAttached(a)
	m := newModel(31, c.size)
	full := m.fillUp(t, a, 0)
	if full < 80<<20 {
		t.Errorf("full at %d bytes, of disks of 96 MiB", full)
	}
	if s := a.Status().Segments[0].State; s.Refused == 0 || len(c.meta.isr(0)) != 3 {
		t.Errorf("%d writes counted as refused, %d members in sync", s.Refused, len(c.meta.isr(0)))
	}
	part := newModel(32, full)
	part.data = m.data[:full]
	for i := range 200 { // overwrites of what is there, of every kind of alignment
		off := part.rng.Int64N(full - 70000)
		p := make([]byte, 1+part.rng.IntN(70000))
		for k := range p {
			p[k] = byte(i)
		}
		if err := a.WriteAt(t.Context(), p, off, i%16 == 0); err != nil {
			t.Fatalf("overwrite of %d bytes at %d: %v", len(p), off, err)
		}
		copy(part.data[off:], p)
	}
	m.verify(t, a)
	for round := range int64(3) {
		from := round * 8 << 20
		if err := a.Trim(t.Context(), from, 4<<20, false); err != nil {
			t.Fatal(err)
		}
		clear(m.data[from : from+4<<20])
		next := m.fillUp(t, a, full)
		if next < full+2<<20 {
			t.Fatalf("a trim of 4 MiB made room for %d bytes", next-full)
		}
		full = next
	}
	m.verify(t, a)
	if err := a.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.compare(m.data, c.hosts...)
}

// A member whose disk is full is taken out while enough others have room.
func TestOneDiskFull(t *testing.T) {
	c := newCluster(t, 3, 96<<20, 96<<20)
	other := c.hosts[1].fill(t, 20<<20)
	promised := other.Credit()
	a := c.attach(c.hosts[0])
	m := newModel(33, c.size)
	p := make([]byte, holdfast.ChunkSize)
	for off := int64(0); off < 40<<20; off += int64(len(p)) {
		for i := range p {
			p[i] = byte(off>>16) | 1
		}
		if err := a.WriteAt(t.Context(), p, off, false); err != nil {
			t.Fatalf("write at %d: %v", off, err)
		}
		copy(m.data[off:], p)
	}
	if got := len(c.meta.isr(0)); got != 2 {
		t.Fatalf("%d members in sync while one of three is full, want 2", got)
	}
	if other.Credit() != promised {
		t.Errorf("of %d chunks promised to another %d are left", promised, other.Credit())
	}
	m.verify(t, a)
	if err := a.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.compare(m.data, c.hosts[0], c.hosts[2])
}
