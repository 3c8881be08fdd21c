package disk

import (
	"testing"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

func mustAfford(t *testing.T, r *Replica, off, length, pending int64) Affordable {
	t.Helper()
	a, err := r.Afford(off, length, pending)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func fits(a Affordable, pending int64) bool { return a.Credit >= a.Need+pending }

// spend writes one block to each of n chunks that are new, from chunk on, after a
// writer's manner: it asks for each, and goes on only while it fits.
func spend(t *testing.T, r *Replica, chunk, n int64) (spent int64) {
	t.Helper()
	for ; spent < n; spent++ {
		if !fits(mustAfford(t, r, (chunk+spent)*chunkSize, blockSize, 0), 0) {
			return spent
		}
		seq := r.Status().Tail + 1
		e := writeEntry(0, seq, (chunk+spent)*chunkSize, blockSize)
		e.Commit = seq - 1
		mustAppend(t, r, e)
		if seq%64 == 0 {
			mustSync(t, r)
		}
	}
	return spent
}

func TestAfford(t *testing.T) {
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, smallFormat())
	d := mustOpen(t, fs, testPath)
	r := mustCreate(t, d, 1, 1<<30)
	a := mustAfford(t, r, chunkSize-blockSize, 2*blockSize, 0)
	if a != (Affordable{Need: 2, Credit: 2}) {
		t.Fatalf("over a border of two new chunks: %+v", a)
	}
	if a = mustAfford(t, r, 0, blockSize, 7); a != (Affordable{Need: 1, Credit: 8}) {
		t.Fatalf("behind entries that take seven: %+v", a)
	}
	mustAppend(t, r, writeEntry(0, 1, 0, blockSize))
	if a = mustAfford(t, r, 0, 2*chunkSize, 0); a != (Affordable{Need: 1, Credit: 7, Tail: 1}) {
		t.Fatalf("one logged, one new: %+v", a)
	}
	mustSync(t, r)
	r.SetCommit(1)
	if err := d.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	if a = mustAfford(t, r, 0, chunkSize, 0); a.Need != 0 {
		t.Fatalf("a chunk that is mapped: %+v", a)
	}
	// What a trim that is logged may take away counts as needed.
	mustAppend(t, r, Entry{Seq: 2, Type: OpTrim, Offset: 0, Length: chunkSize, Commit: 1})
	if a = mustAfford(t, r, 0, chunkSize, 0); a.Need != 1 {
		t.Fatalf("a chunk that is trimmed: %+v", a)
	}
	mustAppend(t, r, Entry{Seq: 3, Type: OpTrim, Offset: 0, Length: 1 << 29, Commit: 1}, writeEntry(0, 4, 2*chunkSize, chunkSize))
	if a = mustAfford(t, r, chunkSize, 2*chunkSize, 0); a.Need != 2 {
		t.Fatalf("within a long trim: %+v", a)
	}
	for _, bad := range [][3]int64{{-4096, 4096, 0}, {0, 0, 0}, {0, -1, 0}, {1 << 30, 4096, 0}, {0, 1<<30 + 4096, 0}, {0, 4096, -1}, {0, 4096, 1 << 40}} {
		_, err := r.Afford(bad[0], bad[1], bad[2])
		wantKind(t, err, holdfast.ErrInvalid)
	}
}

// On a full disk what needs nothing new goes on, what was promised is kept, and
// what a trim frees can be had at once.
func TestAffordWhenFull(t *testing.T) {
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, smallFormat())
	d := mustOpen(t, fs, testPath)
	mine, other := mustCreate(t, d, 1, 1<<30), mustCreate(t, d, 2, 1<<30)
	if err := mine.Ahead(1 << 20); err != nil || mine.Credit() != 16 {
		t.Fatalf("credit %d, %v", mine.Credit(), err)
	}
	took := spend(t, other, 0, 1<<20)
	st := d.Stat()
	if share := 100 * (st.Used + st.Reserved) / st.Capacity; share < 90 || share > refuseShare {
		t.Fatalf("refused with %d %% of the disk in use", share)
	}
	if err := other.Ahead(1 << 20); err != nil || other.Credit() != 0 {
		t.Fatalf("%d ahead of need on a full disk, %v", other.Credit(), err)
	}
	if n := spend(t, mine, 0, 1<<20); n != 16 {
		t.Fatalf("a credit of 16 chunks lasted for %d", n)
	}
	for c := range took {
		a := mustAfford(t, other, c*chunkSize, chunkSize, 0)
		if a.Need != 0 {
			t.Fatalf("overwrite of chunk %d: %+v", c, a)
		}
		seq := a.Tail + 1
		e := writeEntry(0, seq, c*chunkSize, chunkSize)
		e.Commit = seq - 1
		mustAppend(t, other, e)
	}
	seq := other.Status().Tail + 1
	mustAppend(t, other, Entry{Seq: seq, Type: OpTrim, Offset: 0, Length: 8 * chunkSize, Commit: seq - 1})
	mustSync(t, other)
	if n := spend(t, other, took, 1<<20); n != 0 {
		t.Fatalf("%d chunks given that a trim frees which is not committed", n)
	}
	other.SetCommit(seq)
	if n := spend(t, other, took, 1<<20); n < 4 || n > 8 { // the map took some
		t.Fatalf("%d chunks given after a trim of 8", n)
	}
	// What comes without asking, as to a copy that is being filled, has the same room.
	seq = other.Status().Tail + 1
	mustAppend(t, other, Entry{Seq: seq, Type: OpTrim, Offset: 8 * chunkSize, Length: 8 * chunkSize, Commit: seq - 1})
	mustSync(t, other)
	other.SetCommit(seq)
	var err error
	for c := int64(0); err == nil; c++ {
		seq++
		if err = other.Append([]Entry{writeEntry(0, seq, (1000+c)*chunkSize, blockSize)}); err != nil && c < 4 {
			t.Fatalf("entry %d after a trim of 8 chunks: %v", c, err)
		}
	}
	wantKind(t, err, holdfast.ErrNoSpace)
	if err := mine.Append([]Entry{writeEntry(0, mine.Status().Tail+1, 0, blockSize)}); err != nil {
		t.Fatalf("an overwrite on a full disk: %v", err)
	}
}

// What a damaged replica has logged is never applied: a full disk writes no checkpoint for
// its sake each time that it refuses somebody.
func TestDamagedReplicaFreesNothing(t *testing.T) {
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, smallFormat())
	d := mustOpen(t, fs, testPath)
	bad, r := mustCreate(t, d, 1, 1<<30), mustCreate(t, d, 2, 1<<30)
	mustAppend(t, bad, writeEntry(0, 1, 0, 8*chunkSize))
	mustCheckpoint(t, d, bad)
	mustAppend(t, bad, Entry{Seq: 2, Type: OpZero, Offset: 0, Length: 8 * chunkSize, Commit: 1})
	mustSync(t, bad)
	bad.SetCommit(2)
	bad.mu.Lock()
	bad.damage("a test")
	bad.mu.Unlock()
	spend(t, r, 0, 1<<20)
	mustCheckpoint(t, d, r)
	before := d.mapGen
	for range 5 {
		if n := spend(t, r, 10000, 1<<20); n != 0 {
			t.Fatalf("%d chunks given by a full disk", n)
		}
	}
	if d.mapGen != before {
		t.Errorf("%d checkpoints were written for what is never applied", d.mapGen-before)
	}
}
