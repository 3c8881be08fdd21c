package disk

import (
	"testing"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// A whole copy: every chunk of the source as of its applied entry, beside a
// live stream; then target and source are alike.
func TestCopyBesideLiveStream(t *testing.T) {
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, smallFormat())
	d := mustOpen(t, fs, testPath)
	const size = 1 << 20
	src, dst := mustCreate(t, d, 1, size), mustCreate(t, d, 2, size)
	for _, r := range []*Replica{src, dst} {
		if err := r.Fence(1); err != nil {
			t.Fatal(err)
		}
	}
	// The target has chunks of its own past that the source does not have.
	mustAppend(t, dst, writeEntry(1, 1, 0, 65536), writeEntry(1, 2, 10*65536, 65536))
	mustSync(t, dst)
	dst.SetCommit(2)
	if err := d.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	seq := holdfast.Seq(0)
	write := func(n int, to ...*Replica) {
		for range n {
			seq++
			e := writeEntry(1, seq, int64(seq*5%16)*65536/2, 32768)
			if seq%7 == 0 {
				e = Entry{Epoch: 1, Seq: seq, Type: OpTrim, Offset: e.Offset, Length: 65536}
			}
			for _, r := range to {
				mustAppend(t, r, e)
			}
		}
	}
	write(20, src)
	join := seq
	if err := dst.Rebase(1, join); err != nil {
		t.Fatal(err)
	}
	write(5, src, dst)
	mustSync(t, src)
	mustSync(t, dst)
	src.SetCommit(seq)
	if applied, err := src.Apply(t.Context(), join); err != nil || applied != join {
		t.Fatalf("applied %d, %v; want %d", applied, err, join)
	}
	chunks, err := src.Chunks(0, -1, 1000)
	if err != nil || len(chunks) == 0 {
		t.Fatalf("chunks %v, %v", chunks, err)
	}
	have := map[int64]bool{}
	for i, ref := range chunks {
		have[ref.Index] = true
		if i == len(chunks)/2 { // the source moves on, and both apply, in the middle
			write(5, src, dst)
			mustSync(t, src)
			mustSync(t, dst)
			src.SetCommit(seq)
			dst.SetCommit(join + 3)
			if _, err := src.Apply(t.Context(), seq-2); err != nil {
				t.Fatal(err)
			}
			if _, err := dst.Apply(t.Context(), seq); err != nil {
				t.Fatal(err)
			}
		}
		c, err := src.ReadChunk(ref.Index)
		if err != nil {
			t.Fatal(err)
		}
		if err := dst.InstallChunk(c); err != nil {
			t.Fatalf("install chunk %d as of %d: %v", c.Index, c.AsOf, err)
		}
	}
	own, err := dst.Chunks(0, -1, 1000)
	if err != nil {
		t.Fatal(err)
	}
	for _, ref := range own {
		if !have[ref.Index] {
			if err := dst.InstallChunk(Chunk{Index: ref.Index, AsOf: join}); err != nil {
				t.Fatal(err)
			}
		}
	}
	write(3, src, dst)
	mustSync(t, dst)
	want := mustRead(t, src, 0, size)
	wantRead(t, dst, 0, want)
	for _, again := range []*vfs.Memory{fs.Restart(), fs.Crash(3)} {
		d := mustOpen(t, again, testPath)
		r, _ := d.Replica(testDesc(2, 0).Replica)
		wantRead(t, r, 0, want)
		r.SetCommit(seq)
		if err := d.Checkpoint(t.Context()); err != nil {
			t.Fatal(err)
		}
		wantRead(t, r, 0, want)
	}
}

// An install as of less than the last checkpoint would bring old bytes back
// that no entry in the log covers any more (mutant install_below_ckpt).
func TestInstallBelowCheckpointIsRefused(t *testing.T) {
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, smallFormat())
	d := mustOpen(t, fs, testPath)
	r := mustCreate(t, d, 1, 1<<20)
	mustAppend(t, r, writeEntry(0, 1, 0, 4096))
	r.SetCommit(1)
	if _, err := r.Apply(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	c, err := r.ReadChunk(0)
	if err != nil {
		t.Fatal(err)
	}
	mustAppend(t, r, writeEntry(0, 2, 0, 4096))
	r.SetCommit(2)
	if err := d.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantKind(t, r.InstallChunk(c), holdfast.ErrRefused)
	wantRead(t, r, 0, pattern(2, 4096))
	bad := c
	bad.AsOf, bad.Data = 2, append([]byte(nil), c.Data...)
	bad.Data[17] ^= 1
	wantKind(t, r.InstallChunk(bad), holdfast.ErrIntegrity)
	wantKind(t, r.InstallChunk(Chunk{Index: 16, AsOf: 2}), holdfast.ErrInvalid)
	wantKind(t, r.Rebase(9, 2), holdfast.ErrInvalid)
	wantKind(t, r.Rebase(0, 1), holdfast.ErrRefused)
}
