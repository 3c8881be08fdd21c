package disk

import (
	"bytes"
	"errors"
	"fmt"
	"syscall"
	"testing"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// alike is a disk with two replicas that hold the same 16 blocks of one chunk,
// applied and checkpointed.
func alike(t *testing.T) (fs *vfs.Memory, d *Disk, good, bad *Replica) {
	t.Helper()
	fs = vfs.NewMemory(1)
	mustFormat(t, fs, testPath, tinyFormat())
	d = mustOpen(t, fs, testPath)
	for n := range byte(2) {
		r := mustCreate(t, d, n+1, 1<<20)
		for q := holdfast.Seq(1); q <= 16; q++ {
			mustAppend(t, r, writeEntry(0, q, int64(q-1)*blockSize, blockSize))
		}
		mustSync(t, r)
		r.SetCommit(16)
	}
	if err := d.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	good, _ = d.Replica(testDesc(1, 0).Replica)
	bad, _ = d.Replica(testDesc(2, 0).Replica)
	return fs, d, good, bad
}

// rot flips a bit of a block of chunk 0, on the medium and in the page cache.
func rot(t *testing.T, fs *vfs.Memory, r *Replica, block int64) {
	t.Helper()
	if err := fs.FlipBit(testPath, r.d.chunkOffset(mapEntry(r, 0).phys)+block*blockSize+99, 3); err != nil {
		t.Fatal(err)
	}
}

func mustReadChunk(t *testing.T, r *Replica) Chunk {
	t.Helper()
	c, err := r.ReadChunk(0)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// wantBlocks checks the 16 blocks: lost ones must fail with ErrIntegrity, doubtful
// ones may, and all others are what was written.
func wantBlocks(t *testing.T, what string, r *Replica, lost, doubtful uint16) {
	t.Helper()
	p := make([]byte, blockSize)
	for i := range int64(blocksPerChunk) {
		err := r.ReadAt(p, i*blockSize)
		is := uint16(1) << i
		switch {
		case errors.Is(err, holdfast.ErrIntegrity) && (lost|doubtful)&is != 0:
		case err != nil:
			t.Fatalf("%s: read block %d: %v", what, i, err)
		case lost&is != 0:
			t.Fatalf("%s: block %d reads as %x, want an error", what, i, p[:8])
		case !bytes.Equal(p, pattern(holdfast.Seq(i+1), blockSize)):
			t.Fatalf("%s: block %d has wrong bytes", what, i)
		}
	}
}

// A block whose bytes changed is written in its place; no chunk is taken and
// nothing is logged.
func TestRepairInPlace(t *testing.T) {
	fs, d, good, bad := alike(t)
	phys, serial := mapEntry(bad, 0).phys, d.wal.written()
	rot(t, fs, bad, 3)
	rot(t, fs, bad, 15)
	wantKind(t, bad.ReadAt(make([]byte, blockSize), 3*blockSize), holdfast.ErrIntegrity)
	c := mustReadChunk(t, bad)
	if c.State[3] != BlockBad || c.State[15] != BlockBad || c.State[4] != BlockData || c.CRC[3] != mustReadChunk(t, good).CRC[3] {
		t.Fatalf("states %v", c.State)
	}
	if got := bad.Bad(10, 0, 1); len(got) != 1 || got[0] != 0 || len(bad.Bad(10, 0, 1)) != 0 || len(bad.Bad(10, 1, 1)) != 1 {
		t.Fatalf("bad chunks %v", got)
	}
	if st := bad.Status(); st.Bad != 2 || st.Poison != 0 {
		t.Fatalf("status %+v", st)
	}
	if err := bad.Repair(mustReadChunk(t, good)); err != nil {
		t.Fatal(err)
	}
	wantBlocks(t, "repaired", bad, 0, 0)
	if got := mapEntry(bad, 0).phys; got != phys || d.wal.written() != serial {
		t.Fatalf("chunk %d, log at %d; want chunk %d, log at %d", got, d.wal.written(), phys, serial)
	}
	if st := d.Stat().Repair; st != (RepairStat{Found: 2, Repaired: 2}) || bad.Status().Bad != 0 {
		t.Fatalf("counts %+v, %d still bad", st, bad.Status().Bad)
	}
	if err := d.Close(); err != nil { // what the close syncs is on the medium
		t.Fatal(err)
	}
	d = mustOpen(t, fs.Crash(5), testPath)
	bad, _ = d.Replica(testDesc(2, 0).Replica)
	wantBlocks(t, "opened again", bad, 0, 0)
	wantRead(t, bad, 0, mustRead(t, bad, 0, chunkSize))
}

// Bytes of another version never get into a block by its checksum alone: they
// come as a whole chunk, as of an entry that its log can be played upon.
func TestRepairOfAnotherVersion(t *testing.T) {
	fs, d, good, bad := alike(t)
	mustAppend(t, good, writeEntry(0, 17, 3*blockSize, blockSize))
	mustSync(t, good)
	good.SetCommit(17)
	if _, err := good.Apply(t.Context(), 17); err != nil {
		t.Fatal(err)
	}
	rot(t, fs, bad, 3)
	wantKind(t, bad.Repair(mustReadChunk(t, good)), holdfast.ErrRefused) // as of 17, its log ends at 16
	wantBlocks(t, "refused", bad, 1<<3, 0)
	mustAppend(t, bad, writeEntry(0, 17, 3*blockSize, blockSize), writeEntry(0, 18, 5*blockSize, blockSize))
	wantRead(t, bad, 3*blockSize, pattern(17, blockSize)) // in the log
	phys := mapEntry(bad, 0).phys
	if err := bad.Repair(mustReadChunk(t, good)); err != nil {
		t.Fatal(err)
	}
	if mapEntry(bad, 0).phys == phys {
		t.Fatal("another version was written in place")
	}
	mustSync(t, bad)
	for _, again := range []*vfs.Memory{fs.Restart(), fs.Crash(3)} {
		d := mustOpen(t, again, testPath)
		r, _ := d.Replica(testDesc(2, 0).Replica)
		r.SetCommit(18)
		for range 2 {
			wantRead(t, r, 3*blockSize, pattern(17, blockSize))
			wantRead(t, r, 5*blockSize, pattern(18, blockSize))
			wantRead(t, r, 0, pattern(1, blockSize))
			if err := d.Checkpoint(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	if d.failed() != nil {
		t.Fatal(d.failed())
	}
}

// Where the map itself calls a block lost, or the place does not keep what is
// written to it, the chunk gets a fresh place.
func TestRepairByInstall(t *testing.T) {
	t.Run("lost in the log", func(t *testing.T) {
		fs, d, good, bad := alike(t)
		for _, r := range []*Replica{good, bad} {
			mustAppend(t, r, writeEntry(0, 17, 16*blockSize, blockSize))
			mustSync(t, r)
		}
		e := bad.index.get(17)
		if err := fs.FlipBit(walName(testPath, int(e.slot)), e.pos+7, 1); err != nil {
			t.Fatal(err)
		}
		for _, r := range []*Replica{good, bad} {
			r.SetCommit(17)
			if _, err := r.Apply(t.Context(), 17); err != nil {
				t.Fatal(err)
			}
		}
		if got := bad.Bad(10, 0, 1); len(got) != 1 || got[0] != 1 || bad.Status().Poison != 1 {
			t.Fatalf("bad chunks %v, status %+v", got, bad.Status())
		}
		c, err := good.ReadChunk(1)
		if err != nil {
			t.Fatal(err)
		}
		if err := bad.Repair(c); err != nil {
			t.Fatal(err)
		}
		wantRead(t, bad, 16*blockSize, pattern(17, blockSize))
		if st := d.Stat().Repair; st != (RepairStat{Found: 1, Repaired: 1}) || bad.Status().Poison != 0 {
			t.Fatalf("counts %+v, status %+v", st, bad.Status())
		}
	})
	t.Run("a place that forgets", func(t *testing.T) {
		fs, _, good, bad := alike(t)
		c := mustReadChunk(t, good)
		phys, reads := mapEntry(bad, 0).phys, 0
		rot(t, fs, bad, 7)
		fs.BeforeDirectRead(func(string) {
			if reads++; reads == 2 { // the look at what was written
				rot(t, fs, bad, 7)
			}
		})
		if err := bad.Repair(c); err != nil {
			t.Fatal(err)
		}
		if reads != 2 || mapEntry(bad, 0).phys == phys {
			t.Fatalf("%d direct reads, chunk still at %d", reads, phys)
		}
		wantBlocks(t, "installed", bad, 0, 0)
	})
	t.Run("a sector that cannot be read", func(t *testing.T) {
		fs, _, good, bad := alike(t)
		c := mustReadChunk(t, good)
		fs.Inject(vfs.Fault{Op: vfs.OpRead, Path: testPath, Err: syscall.EIO, Times: 2})
		wantKind(t, bad.ReadAt(make([]byte, blockSize), 2*blockSize), holdfast.ErrIO)
		if got := bad.Bad(10, 0, 1); len(got) != 1 {
			t.Fatalf("bad chunks %v", got)
		}
		fs.ClearFaults()
		fs.Inject(vfs.Fault{Op: vfs.OpRead, Path: testPath, Err: syscall.EIO, Times: 2}) // the chunk, and its first block
		if err := bad.Repair(c); err != nil {
			t.Fatal(err)
		}
		wantBlocks(t, "repaired", bad, 0, 0)
	})
}

// A good block is never given up for poison, and poison becomes neither zeroes
// nor good again by itself; only a write ends it.
func TestPoison(t *testing.T) {
	fs, d, _, bad := alike(t)
	rot(t, fs, bad, 3)
	c := mustReadChunk(t, bad)
	c.State[3], c.CRC[3] = BlockPoison, 0
	c.State[4], c.CRC[4] = BlockPoison, 0 // good here
	clear(c.Data[4*blockSize : 5*blockSize])
	older := c
	older.LastSeq--
	wantKind(t, bad.Repair(older), holdfast.ErrRefused)
	if err := bad.Repair(c); err != nil {
		t.Fatal(err)
	}
	mustSync(t, bad)
	look := func(what string, r *Replica) {
		t.Helper()
		wantBlocks(t, what, r, 1<<3, 0)
		if c := mustReadChunk(t, r); c.State[3] != BlockPoison || r.Status().Poison != 1 {
			t.Fatalf("%s: states %v, status %+v", what, c.State, r.Status())
		}
	}
	if st := d.Stat().Repair; st != (RepairStat{Found: 1, Poisoned: 1}) {
		t.Fatalf("counts %+v", st)
	}
	look("poisoned", bad)
	for _, again := range []*vfs.Memory{fs.Restart(), fs.Crash(3)} {
		d := mustOpen(t, again, testPath)
		r, _ := d.Replica(testDesc(2, 0).Replica)
		look("opened again", r)
		if err := d.Checkpoint(t.Context()); err != nil {
			t.Fatal(err)
		}
		look("checkpointed", r)
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		d = mustOpen(t, again, testPath)
		r, _ = d.Replica(testDesc(2, 0).Replica)
		look("from the map", r)
		mustAppend(t, r, writeEntry(0, 17, 3*blockSize, blockSize))
		wantRead(t, r, 3*blockSize, pattern(17, blockSize))
		mustSync(t, r)
		r.SetCommit(17)
		if _, err := r.Apply(t.Context(), 17); err != nil {
			t.Fatal(err)
		}
		wantRead(t, r, 3*blockSize, pattern(17, blockSize))
		if got := r.Status().Poison; got != 0 {
			t.Fatalf("%d blocks are poison after the write", got)
		}
	}
}

// At every write and sync of a repair, and of the checkpoint behind it, the
// machine loses power: a block is then good, or known to be bad, and the same
// repair makes it good. A block that is poisoned is never anything but lost.
func TestCrashesInRepair(t *testing.T) {
	const rotten = 1<<2 | 1<<3 | 1<<9
	for _, mode := range []string{"in place", "by install", "poison"} {
		t.Run(mode, func(t *testing.T) {
			fs, d, good, bad := alike(t)
			c := mustReadChunk(t, good)
			for _, i := range []int64{2, 3, 9} {
				rot(t, fs, bad, i)
			}
			switch mode {
			case "by install": // the map cannot say what block 9 should be
				e := mapEntry(bad, 0)
				e.crc[9] ^= 1
				l, err := bad.leaf(0)
				if err != nil {
					t.Fatal(err)
				}
				bad.tree.set(l, 0, e)
				if err := d.Checkpoint(t.Context()); err != nil {
					t.Fatal(err)
				}
			case "poison":
				c.State[9], c.CRC[9] = BlockPoison, 0
				clear(c.Data[9*blockSize : 10*blockSize])
			}
			clones, nested := 0, false
			fs.Before(func(op vfs.Op, path string) {
				if nested {
					return
				}
				nested = true
				defer func() { nested = false }()
				for seed := range uint64(6) {
					clones++
					afterCrash(t, fmt.Sprintf("%s, crash %d before %v of %s", mode, clones, op, path), fs.Crash(seed), c, rotten)
				}
			})
			if err := bad.Repair(c); err != nil {
				t.Fatal(err)
			}
			mustSync(t, bad)
			if err := d.Checkpoint(t.Context()); err != nil {
				t.Fatal(err)
			}
			fs.Before(nil)
			if clones < 12 {
				t.Fatalf("only %d crashes", clones)
			}
			lost := uint16(0)
			if mode == "poison" {
				lost = 1 << 9
			}
			for seed := range uint64(6) {
				d := mustOpen(t, fs.Crash(seed), testPath)
				r, _ := d.Replica(testDesc(2, 0).Replica)
				wantBlocks(t, "after all", r, lost, 0)
			}
		})
	}
}

func afterCrash(t *testing.T, what string, fs *vfs.Memory, c Chunk, rotten uint16) {
	t.Helper()
	d := mustOpen(t, fs, testPath)
	r, _ := d.Replica(testDesc(2, 0).Replica)
	lost := uint16(0)
	if c.State[9] == BlockPoison {
		lost = 1 << 9
	}
	wantBlocks(t, what, r, lost, rotten)
	if err := r.Repair(c); err != nil {
		t.Fatalf("%s: repair: %v", what, err)
	}
	wantBlocks(t, what+", repaired", r, lost, 0)
	d.closeFiles()
}

// An old entry whose bytes are lost cannot be moved to the head of the log; that
// is no error of the disk, and not one of the writer's.
func TestLostEntryIsNotLoggedAgain(t *testing.T) {
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, tinyFormat())
	d := mustOpen(t, fs, testPath)
	r, other := mustCreate(t, d, 1, 1<<20), mustCreate(t, d, 2, 8<<20)
	mustAppend(t, r, writeEntry(0, 1, 0, blockSize))
	e := r.index.get(1)
	if err := fs.FlipBit(walName(testPath, int(e.slot)), e.pos+7, 1); err != nil {
		t.Fatal(err)
	}
	for q := holdfast.Seq(1); !d.wal.isOld(e); q++ {
		mustAppend(t, other, writeEntry(0, q, 0, 256<<10))
		mustSync(t, other)
		other.SetCommit(q)
	}
	if err := d.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantKind(t, r.ReadAt(make([]byte, blockSize), 0), holdfast.ErrIntegrity)
	if st := r.Status(); len(st.BadRanges) != 1 || st.Tail != 1 {
		t.Fatalf("status %+v", st)
	}
}
