package disk

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// harmed is a disk with data in chunks and log, closed or killed, and what each
// block of its two replicas must read as.
func harmed(t *testing.T) (fs *vfs.Memory, want [2][]byte, tails [2]holdfast.Seq) {
	t.Helper()
	fs = vfs.NewMemory(1)
	mustFormat(t, fs, testPath, tinyFormat())
	d := mustOpen(t, fs, testPath)
	for n := range byte(2) {
		r := mustCreate(t, d, n, 1<<20)
		want[n] = make([]byte, 1<<20)
		for q := holdfast.Seq(1); q <= 40; q++ {
			e := writeEntry(0, q, int64(q*5%60)*16384, 16384)
			copy(want[n][e.Offset:], e.Payload)
			mustAppend(t, r, e)
			if q == 25 {
				mustSync(t, r)
				r.SetCommit(q)
				if err := d.Checkpoint(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
		}
		tails[n] = 40
		mustSync(t, r)
	}
	if err := d.Replicas()[0].SetHint(1, 1); err != nil { // says that all before was durable
		t.Fatal(err)
	}
	mustSync(t, d.Replicas()[0])
	return fs.Restart(), want, tails
}

// verdicts of a disk that was harmed.
type verdicts struct{ refused, told, whole int }

// judge opens a harmed disk. It may be refused as corrupt, or open and say for
// each block that it is lost, or that its replica is damaged, or return it as it
// was. It must never return other bytes, or a shorter log as if it were whole.
func (v *verdicts) judge(t *testing.T, what string, fs *vfs.Memory, want [2][]byte, tails [2]holdfast.Seq) {
	t.Helper()
	d, err := Open(t.Context(), fs, testPath, Options{foreground: true})
	if err != nil {
		if !errors.Is(err, holdfast.ErrIntegrity) {
			t.Fatalf("%s: open: %v", what, err)
		}
		v.refused++
		return
	}
	defer d.closeFiles()
	told := false
	for round := range 2 { // as it is found, and once all is applied
		for n := range byte(2) {
			r, ok := d.Replica(testDesc(n, 0).Replica)
			if !ok {
				t.Fatalf("%s: replica %d is gone and nobody says so", what, n)
			}
			st := r.Status()
			if st.Damaged != nil {
				told = true
				wantKind(t, r.ReadAt(make([]byte, blockSize), 0), holdfast.ErrIntegrity)
				continue
			}
			if st.Tail != tails[n] {
				t.Fatalf("%s: the log of replica %d ends at %d, not %d, and it says it is sound", what, n, st.Tail, tails[n])
			}
			p := make([]byte, blockSize)
			for off := int64(0); off < 1<<20; off += blockSize {
				switch err := r.ReadAt(p, off); {
				case errors.Is(err, holdfast.ErrIntegrity):
					told = true
				case err != nil:
					t.Fatalf("%s: read: %v", what, err)
				case !bytes.Equal(p, want[n][off:off+blockSize]):
					t.Fatalf("%s: round %d: wrong bytes at %d of replica %d", what, round, off, n)
				}
			}
			r.SetCommit(st.Tail)
		}
		if err := d.Checkpoint(t.Context()); err != nil {
			t.Fatalf("%s: checkpoint: %v", what, err)
		}
	}
	if told {
		v.told++
	} else {
		v.whole++
	}
}

// pagesOf lists the pages of a file that are not all zero.
func pagesOf(t *testing.T, fs vfs.FS, path string) (pages []int64) {
	t.Helper()
	f, err := fs.OpenFile(path, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close() //nolint:errcheck // for reading
	size, err := f.Size()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, size)
	if _, err := f.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	for off := int64(0); off < size; off += vfs.PageSize {
		if !bytes.Equal(b[off:off+vfs.PageSize], zeroPage[:]) {
			pages = append(pages, off)
		}
	}
	return pages
}

func page(t *testing.T, fs vfs.FS, path string, off int64, write []byte) []byte {
	t.Helper()
	f, err := fs.OpenFile(path, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close() //nolint:errcheck // memory
	old := make([]byte, vfs.PageSize)
	if _, err := f.ReadAt(old, off); err != nil {
		t.Fatal(err)
	}
	if write != nil {
		if _, err := f.WriteAt(write, off); err != nil {
			t.Fatal(err)
		}
	}
	return old
}

// TestHarm does one harm at a time to each page that the disk wrote: superblock,
// map, directory, chunks and log. A flipped bit; a lost write, which leaves
// zeroes or what another page holds (a misdirected write); never wrong bytes.
func TestHarm(t *testing.T) {
	fs, want, tails := harmed(t)
	files := []string{testPath}
	for i := range 4 {
		files = append(files, walName(testPath, i))
	}
	rng := rand.New(rand.NewPCG(1, 2))
	type place struct {
		path string
		off  int64
	}
	var all []place
	for _, path := range files {
		for _, off := range pagesOf(t, fs, path) {
			all = append(all, place{path, off})
		}
	}
	var flips, lost, misdirected verdicts
	for i, p := range all {
		if raceEnabled && i%4 != 0 {
			continue // all of them without the race detector, which makes this ten times as long
		}
		for range 3 {
			next := fs.Restart()
			at, bit := p.off+rng.Int64N(vfs.PageSize), uint(rng.IntN(8))
			if err := next.FlipBit(p.path, at, bit); err != nil {
				t.Fatal(err)
			}
			flips.judge(t, fmt.Sprintf("bit %d of %s at %d flipped", bit, p.path, at), next, want, tails)
		}
		next := fs.Restart()
		page(t, next, p.path, p.off, zeroPage[:])
		lost.judge(t, fmt.Sprintf("%s at %d lost", p.path, p.off), next, want, tails)

		next = fs.Restart()
		from := all[rng.IntN(len(all))]
		page(t, next, p.path, p.off, page(t, next, from.path, from.off, nil))
		misdirected.judge(t, fmt.Sprintf("%s at %d written to %s at %d", from.path, from.off, p.path, p.off), next, want, tails)
	}
	t.Logf("%d pages: bits flipped %+v, writes lost %+v, misdirected %+v", len(all), flips, lost, misdirected)
	if raceEnabled {
		return // too few for every kind of verdict
	}
	if flips.told == 0 || flips.refused == 0 || flips.whole == 0 || lost.told == 0 || misdirected.told == 0 {
		t.Error("a kind of verdict never came: the harm misses its aim")
	}
}

// Either copy of the superblock may be lost, and the next open mends it.
func TestOneSuperblockIsEnough(t *testing.T) {
	for _, off := range []int64{superA, superB} {
		fs, want, tails := harmed(t)
		page(t, fs, testPath, off, zeroPage[:])
		var v verdicts
		v.judge(t, "one copy lost", fs.Restart(), want, tails)
		if v.whole != 1 {
			t.Fatalf("copy at %d lost: %+v", off, v)
		}
		d := mustOpen(t, fs, testPath)
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(page(t, fs, testPath, superA, nil), page(t, fs, testPath, superB, nil)) {
			t.Fatal("the copies still differ")
		}
	}
}
