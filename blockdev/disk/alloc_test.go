package disk

import (
	"errors"
	"testing"

	"github.com/holdfast-storage/holdfast"
)

// A freed chunk or page is not given out again before the checkpoint that no
// longer refers to it is durable.
func TestFreedChunksWait(t *testing.T) {
	a := newAllocator(64)
	var all []uint32
	for {
		c, err := a.take(false)
		if err != nil {
			break
		}
		all = append(all, c)
	}
	if len(all) != 64 {
		t.Fatalf("took %d of 64 chunks", len(all))
	}
	a.later(all[5])
	if c, err := a.take(false); !errors.Is(err, holdfast.ErrNoSpace) {
		t.Fatalf("took chunk %d, which waits", c)
	}
	chunks, pages := a.capture()
	a.later(all[9]) // freed while the checkpoint is written: waits for the next
	if c, err := a.take(false); !errors.Is(err, holdfast.ErrNoSpace) {
		t.Fatalf("took chunk %d before the checkpoint was durable", c)
	}
	a.keepWaiting(chunks, pages) // it did not come about
	chunks, pages = a.capture()
	if len(chunks) != 2 {
		t.Fatalf("%d chunks wait, want 2", len(chunks))
	}
	a.settled(chunks[:1], pages)
	if c, err := a.take(false); err != nil || c != chunks[0] {
		t.Fatalf("took %d, %v, want %d", c, err, chunks[0])
	}
}

func TestMapPagesShareChunks(t *testing.T) {
	a := newAllocator(64)
	seen := map[int64]bool{}
	var first []int64
	for range 2*pagesPerChunk + 1 {
		p, err := a.page()
		if err != nil || seen[p] {
			t.Fatalf("page %d: %v, seen %v", p, err, seen[p])
		}
		seen[p] = true
		if p/pagesPerChunk == 0 {
			first = append(first, p)
		}
	}
	if free := a.stat().free; free != 61 {
		t.Fatalf("%d chunks free, want 61", free)
	}
	for _, p := range first {
		a.laterPage(p)
	}
	chunks, pages := a.capture()
	a.settled(chunks, pages)
	if free := a.stat().free; free != 62 {
		t.Fatalf("%d chunks free after a map chunk emptied, want 62", free)
	}
}

func TestReservations(t *testing.T) {
	a := newAllocator(64)
	room := a.free - a.kept()
	if err := a.reserve(room, 0); err != nil {
		t.Fatal(err)
	}
	if err := a.reserve(1, 0); !errors.Is(err, holdfast.ErrNoSpace) {
		t.Fatalf("beyond the disk: got %v", err)
	}
	if _, err := a.take(true); err != nil {
		t.Fatal(err)
	}
	a.release(room - 1)
	if s := a.stat(); s.free != 63 || s.reserved != 0 {
		t.Fatalf("free %d, reserved %d", s.free, s.reserved)
	}
}
