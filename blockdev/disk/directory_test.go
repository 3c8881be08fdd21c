package disk

import (
	"testing"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// Pages that a directory took whose checkpoint did not come about, for want of more,
// are the next one's.
func TestDirectoryOfFailedCheckpoints(t *testing.T) {
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, smallFormat())
	d, err := Open(t.Context(), fs, testPath, Options{foreground: true})
	if err != nil {
		t.Fatal(err)
	}
	for n := range 370 { // a directory of 20 pages
		desc := testDesc(byte(n), 1<<20)
		desc.Replica[2] = byte(n >> 8)
		if _, err := d.CreateReplica(desc); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(d.dirPages) != 20 {
		t.Fatalf("%d pages", len(d.dirPages))
	}
	d.alloc.solid()
	var taken []uint32
	for c, err := d.alloc.take(false); err == nil; c, err = d.alloc.take(false) {
		taken = append(taken, c)
	}
	left := len(d.alloc.freePages) - 5
	d.alloc.freePages = d.alloc.freePages[left:]
	for range 3 {
		wantKind(t, d.Checkpoint(t.Context()), holdfast.ErrNoSpace)
	}
	d.alloc.giveBack(taken[:1]) // 16 pages, and the five
	for range 3 {
		if err := d.Checkpoint(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	d.alloc.giveBack(taken[1:])
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	wantClean(t, "at the end", fs, testPath)
}
