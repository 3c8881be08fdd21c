package disk

import (
	"errors"
	"testing"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// twoReplicas is a disk whose log holds, durably, four entries of each of two
// replicas, the first two of each applied and checkpointed.
func twoReplicas(t testing.TB) (*vfs.Memory, *Disk) {
	t.Helper()
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, smallFormat())
	d := mustOpen(t, fs, testPath)
	for n := range byte(2) {
		r := mustCreate(t, d, n, 1<<20)
		for q := holdfast.Seq(1); q <= 2; q++ {
			mustAppend(t, r, writeEntry(0, q, int64(q)*8192, 8192))
		}
		r.SetCommit(2)
	}
	if err := d.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	for n := range byte(2) {
		r, _ := d.Replica(testDesc(n, 0).Replica)
		for q := holdfast.Seq(3); q <= 4; q++ {
			mustAppend(t, r, writeEntry(0, q, int64(q)*8192, 8192))
			mustSync(t, r)
		}
	}
	r, _ := d.Replica(testDesc(0, 0).Replica)
	if err := r.SetHint(1, 1); err != nil { // tells that all before was durable
		t.Fatal(err)
	}
	return fs, d
}

func entryOf(t testing.TB, d *Disk, n byte, seq holdfast.Seq) *logEntry {
	t.Helper()
	r, _ := d.Replica(testDesc(n, 0).Replica)
	return r.index.get(seq)
}

// A payload that was durable and does not match any more is lost bytes, not the
// end of the log.
func TestLostPayload(t *testing.T) {
	fs, d := twoReplicas(t)
	e := entryOf(t, d, 0, 3)
	after := fs.Restart()
	if err := after.FlipBit(walName(testPath, int(e.slot)), e.pos+5000, 3); err != nil {
		t.Fatal(err)
	}
	d = mustOpen(t, after, testPath)
	r, _ := d.Replica(testDesc(0, 0).Replica)
	st := r.Status()
	if st.Tail != 4 || st.Damaged != nil || len(st.BadRanges) != 1 || st.BadRanges[0] != (Range{3 * 8192, 8192}) || st.Intact {
		t.Fatalf("status %+v", st)
	}
	wantKind(t, r.ReadAt(make([]byte, 4096), 3*8192), holdfast.ErrIntegrity)
	wantRead(t, r, 4*8192, pattern(4, 8192))
	_, err := r.Entries(3, 1)
	wantKind(t, err, holdfast.ErrIntegrity)
	// Applied, the blocks are poison until they are written again.
	r.SetCommit(4)
	if err := d.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantKind(t, r.ReadAt(make([]byte, 4096), 3*8192), holdfast.ErrIntegrity)
	c, err := r.ReadChunk(0)
	if err != nil || c.State[6] != BlockPoison || c.State[7] != BlockPoison || c.State[8] != BlockData {
		t.Fatalf("chunk: %v, states %v", err, c.State)
	}
	mustAppend(t, r, writeEntry(0, 5, 3*8192, 8192))
	wantRead(t, r, 3*8192, pattern(5, 8192))
	r, _ = d.Replica(testDesc(1, 0).Replica)
	if st := r.Status(); st.Tail != 4 || st.Damaged != nil || len(st.BadRanges) != 0 {
		t.Fatalf("the other replica: %+v", st)
	}
}

// A durable record whose head is unreadable could have been anything: every
// replica that it may have concerned is damaged, and stays so; nothing is cut.
func TestLostRecord(t *testing.T) {
	fs, d := twoReplicas(t)
	e := entryOf(t, d, 0, 3)
	after := fs.Restart()
	if err := after.FlipBit(walName(testPath, int(e.slot)), e.pos-20, 0); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time, the superblock tells of it
		d = mustOpen(t, after, testPath)
		for n := range byte(2) {
			r, _ := d.Replica(testDesc(n, 0).Replica)
			st := r.Status()
			if st.Damaged == nil || st.Intact || n == 1 && st.Tail != 4 {
				t.Fatalf("replica %d: %+v", n, st)
			}
			wantKind(t, r.Append([]Entry{writeEntry(0, st.Tail+1, 0, 4096)}), holdfast.ErrIntegrity)
			if err := r.Fence(st.Fence + 1); err != nil { // so that a writer hears of it
				t.Fatal(err)
			}
			wantKind(t, r.ReadAt(make([]byte, 4096), 0), holdfast.ErrIntegrity)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
	d = mustOpen(t, after, testPath)
	if err := d.DeleteReplica(testDesc(0, 0).Replica); err != nil {
		t.Fatal(err)
	}
	desc := testDesc(0, 1<<20)
	desc.Replica[5] = 9
	r, err := d.CreateReplica(desc)
	if err != nil {
		t.Fatal(err)
	}
	mustAppend(t, r, writeEntry(0, 1, 0, 4096))
	wantRead(t, r, 0, pattern(1, 4096))
}

// Behind the durable point, an unreadable record is the end of the log.
func TestTornTail(t *testing.T) {
	fs, d := twoReplicas(t)
	r, _ := d.Replica(testDesc(0, 0).Replica)
	mustAppend(t, r, writeEntry(0, 5, 0, 8192))
	e := entryOf(t, d, 0, 5)
	for _, off := range []int64{-20, 5000} {
		after := fs.Restart()
		if err := after.FlipBit(walName(testPath, int(e.slot)), e.pos+off, 1); err != nil {
			t.Fatal(err)
		}
		d := mustOpen(t, after, testPath)
		r, _ := d.Replica(testDesc(0, 0).Replica)
		if st := r.Status(); st.Tail != 4 || st.Damaged != nil || len(st.BadRanges) != 0 {
			t.Fatalf("flip at %d: %+v", off, st)
		}
		mustAppend(t, r, writeEntry(0, 5, 0, 4096))
	}
}

// Chunks: a flipped bit is found at each read, and never returned.
func TestFlippedChunk(t *testing.T) {
	fs, d := twoReplicas(t)
	r, _ := d.Replica(testDesc(0, 0).Replica)
	if err := fs.FlipBit(testPath, d.chunkOffset(mapEntry(r, 0).phys)+8192+77, 5); err != nil {
		t.Fatal(err)
	}
	wantKind(t, r.ReadAt(make([]byte, 8192), 8192), holdfast.ErrIntegrity)
	if c, err := r.ReadChunk(0); err != nil || c.State[2] != BlockBad || c.State[3] != BlockData {
		t.Fatalf("chunk: %v, states %v", err, c.State)
	}
	wantRead(t, r, 8192+4096, pattern(1, 8192)[4096:])
	mustAppend(t, r, writeEntry(0, 5, 8192, 4096))
	wantRead(t, r, 8192, pattern(5, 4096))
}

// Every bit of the map pages, the directory, the last checkpoint and one copy
// of the superblock: opening either fails with ErrIntegrity or, where there is
// a second copy, goes on.
func TestFlippedMetadata(t *testing.T) {
	fs, d := twoReplicas(t)
	r, _ := d.Replica(testDesc(0, 0).Replica)
	open := func(path string, off int64) error {
		after := fs.Restart()
		if err := after.FlipBit(path, off, uint(off)); err != nil {
			t.Fatal(err)
		}
		d, err := Open(t.Context(), after, testPath, Options{foreground: true})
		if err == nil {
			d.closeFiles()
		}
		return err
	}
	for off := int64(0); off < pageSize; off += 97 {
		for _, page := range append([]int64{r.tree.root.page}, d.dirPages...) {
			if err := open(testPath, d.pageOffset(page)+off); !errors.Is(err, holdfast.ErrIntegrity) {
				t.Fatalf("map page %d, byte %d: got %v", page, off, err)
			}
		}
		for _, copy := range []int64{superA, superB} {
			if err := open(testPath, copy+off); err != nil {
				t.Fatalf("superblock copy at %d, byte %d: got %v", copy, off, err)
			}
		}
	}
	after := fs.Restart()
	for _, off := range []int64{superA, superB} {
		if err := after.FlipBit(testPath, off+100, 0); err != nil {
			t.Fatal(err)
		}
	}
	_, err := Open(t.Context(), after, testPath, Options{})
	wantKind(t, err, holdfast.ErrIntegrity)
}

// A log that is gone is not an empty disk.
func TestLostLog(t *testing.T) {
	fs, d := twoReplicas(t)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = mustOpen(t, fs, testPath) // the superblock now knows that there was a log
	_ = d.Close()
	for i := range 4 {
		f, err := fs.OpenFile(walName(testPath, i), 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := f.PunchHole(0, 4<<20); err != nil {
			t.Fatal(err)
		}
	}
	_, err := Open(t.Context(), fs, testPath, Options{})
	wantKind(t, err, holdfast.ErrIntegrity)
}
