package disk

import (
	"bytes"
	"errors"
	"testing"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// openInParts opens a disk whose log is of sixteen files, and on which nothing is done
// but what a test does.
func openInParts(t *testing.T) (*vfs.Memory, *Disk) {
	t.Helper()
	fs := vfs.NewMemory(1)
	o := smallFormat()
	o.slotSize = 1 << 20
	mustFormat(t, fs, testPath, o)
	d, err := Open(t.Context(), fs, testPath, Options{foreground: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Abandon)
	return fs, d
}

// fillLog appends 64 KiB entries, all committed, until so many sixteenths of the log are
// used, and returns the last.
func fillLog(t *testing.T, r *Replica, sixteenths int64) holdfast.Seq {
	t.Helper()
	for r.d.wal.used() < r.d.wal.size()/16*sixteenths {
		seq := r.Status().Tail + 1
		mustAppend(t, r, writeEntry(0, seq, int64(seq%256)*chunkSize, chunkSize))
	}
	mustSync(t, r)
	r.SetCommit(r.Status().Tail)
	return r.Status().Tail
}

// A pass that makes room applies the oldest part of the log, not all of it; passes go on
// until the log is half full, and no further.
func TestRoomIsMadeInParts(t *testing.T) {
	fs, d := openInParts(t)
	r := mustCreate(t, d, 1, 16<<20)
	tail := fillLog(t, r, 12)
	before := d.wal.used()
	room, err := d.reclaim(nil)
	if err != nil || !room {
		t.Fatalf("made room: %v, %v", room, err)
	}
	freed := before - d.wal.used()
	if size := d.wal.size(); freed < size/16 || freed > size/4 {
		t.Errorf("one pass freed %d bytes of a log of %d", freed, size)
	}
	if at := r.Status().Applied; at == 0 || at >= tail/2 {
		t.Errorf("one pass applied up to %d of %d", at, tail)
	}
	if err := d.tend(); err != nil {
		t.Fatal(err)
	}
	if used, size := d.wal.used(), d.wal.size(); used > size/2 || used < size/4 {
		t.Errorf("%d bytes of a log of %d are used in the end", used, size)
	}
	want := writeEntry(0, tail, 0, chunkSize)
	got := make([]byte, chunkSize)
	if err := r.ReadAt(got, int64(tail%256)*chunkSize); err != nil || !bytes.Equal(got, want.Payload) {
		t.Errorf("the last write, not yet applied, does not read back: %v", err)
	}
	// And nothing of it is lost.
	d = mustOpen(t, fs.Crash(1), testPath)
	r = d.Replicas()[0]
	if st := r.Status(); st.Tail != tail {
		t.Errorf("tail %d after a crash, want %d", st.Tail, tail)
	}
	if err := r.ReadAt(got, int64(tail%256)*chunkSize); err != nil || !bytes.Equal(got, want.Payload) {
		t.Errorf("the last write does not read back after a crash: %v", err)
	}
}

// A replica of which nothing may be applied does not keep the passes from making room of
// what others have logged since.
func TestRoomBesideAnOrphanTail(t *testing.T) {
	_, d := openInParts(t)
	orphan, r := mustCreate(t, d, 1, 16<<20), mustCreate(t, d, 2, 16<<20)
	for seq := range holdfast.Seq(8) {
		mustAppend(t, orphan, writeEntry(0, seq+1, int64(seq)*chunkSize, chunkSize))
	}
	for range 4 { // round after round
		tail := fillLog(t, r, 10)
		if err := d.tend(); err != nil {
			t.Fatal(err)
		}
		if used, size := d.wal.used(), d.wal.size(); used > size/2 {
			t.Fatalf("%d bytes of a log of %d are still used, with entry %d applied of %d", used, size, r.Status().Applied, tail)
		}
	}
	if st := orphan.Status(); st.Applied != 0 || st.Tail != 8 {
		t.Errorf("the tail that nobody committed: %+v", st)
	}
}

// The fuller the log, the longer the delay; it is bounded.
func TestPaceCost(t *testing.T) {
	const size = 1 << 30
	last := paceCost(blockSize, 0, size)
	if last != 0 {
		t.Errorf("where it begins a write costs %v", last)
	}
	for above := int64(0); above <= size; above += size / 64 {
		cost := paceCost(blockSize, above, size-above)
		if cost < last || cost > paceMost {
			t.Errorf("above by %d: %v after %v", above, cost, last)
		}
		last = cost
	}
	if got := paceCost(blockSize, size/2, size/2); got != paceUnit {
		t.Errorf("half-way 4 KiB cost %v, want %v", got, paceUnit)
	}
	for _, below := range []int64{0, -size} {
		if got := paceCost(blockSize, size, below); got != paceMost {
			t.Errorf("below by %d: %v, want %v", below, got, paceMost)
		}
	}
}

// Nobody is delayed for entries that wait for their commit: that makes no room.
func TestNoDelayInVain(t *testing.T) {
	_, d := openInParts(t)
	r := mustCreate(t, d, 1, 16<<20)
	for d.wal.used() < d.wal.size()/16*(paceFrom+2) {
		seq := r.Status().Tail + 1
		mustAppend(t, r, writeEntry(0, seq, int64(seq%200)*chunkSize, chunkSize))
	}
	if d.paced == 0 {
		t.Fatal("no write was delayed at all")
	}
	// The oldest is moved to the head; that is no room for others, and is not done for ever.
	if err := d.tend(); err != nil {
		t.Fatal(err)
	}
	if d.stuck.Load() == 0 {
		t.Fatal("what is not committed counts as room")
	}
	before := d.paced
	mustAppend(t, r, writeEntry(0, r.Status().Tail+1, 0, chunkSize))
	if d.paced != before {
		t.Errorf("delayed by %v more", d.paced-before)
	}
	// It is committed: there is room again, and delays begin where they did.
	mustSync(t, r)
	r.SetCommit(r.Status().Tail)
	if room, err := d.reclaim(nil); !room || err != nil {
		t.Fatalf("made room: %v, %v", room, err)
	}
	if d.stuck.Load() != 0 {
		t.Errorf("still stuck at %d", d.stuck.Load())
	}
}

// A large write with a block that does not match its checksum is refused, wherever the
// block is; nothing is logged, and the chunks it was on its way to are free again.
func TestLargeWriteThatDoesNotMatch(t *testing.T) {
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, smallFormat())
	d := mustOpen(t, fs, testPath)
	r := mustCreate(t, d, 1, 16<<20)
	mustAppend(t, r, writeEntry(0, 1, 0, 1<<20))
	before := d.Stat()
	const off, length = 3 * blockSize, 1 << 20 // parts of chunks at both ends
	for _, block := range []int{0, 12, 13, 100, length/blockSize - 1} {
		good, bad := writeEntry(0, 2, 4<<20, 1<<20), writeEntry(0, 3, off, length)
		bad.Payload[block*blockSize+17] ^= 1
		err := r.Append([]Entry{good, bad})
		if !errors.Is(err, holdfast.ErrIntegrity) {
			t.Fatalf("block %d: got %v, want an integrity error", block, err)
		}
		if st := r.Status(); st.Tail != 1 {
			t.Fatalf("block %d: tail %d, want 1", block, st.Tail)
		}
		if now := d.Stat(); now.Used != before.Used || now.Reserved != before.Reserved || now.Failed != nil {
			t.Fatalf("block %d: used %d, reserved %d, failed %v; before %d and %d", block, now.Used, now.Reserved, now.Failed, before.Used, before.Reserved)
		}
	}
	mustAppend(t, r, writeEntry(0, 2, off, length))
	mustSync(t, r)
}
