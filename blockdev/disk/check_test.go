package disk

import (
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// mustCheck checks a disk, and that this writes nothing.
func mustCheck(t *testing.T, fs *vfs.Memory) *CheckReport {
	t.Helper()
	var writes atomic.Int32
	fs.Before(func(op vfs.Op, _ string) {
		if op != vfs.OpRead {
			writes.Add(1)
		}
	})
	defer fs.Before(func(vfs.Op, string) {})
	c, err := Check(t.Context(), fs, testPath, nil)
	if err != nil {
		t.Fatal(err)
	}
	if n := writes.Load(); n != 0 {
		t.Errorf("a check made %d changes", n)
	}
	return c
}

// What a crash leaves is never taken for damage, and is left as it is: the disk
// opens afterwards as it would have before.
func TestCheckAfterACrash(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 5))
	for seed := range uint64(30) {
		fs := vfs.NewMemory(seed)
		mustFormat(t, fs, testPath, tinyFormat())
		d := mustOpen(t, fs, testPath)
		r := mustCreate(t, d, 1, 4<<20)
		for range 40 + rng.IntN(200) {
			seq := r.Status().Tail + 1
			switch rng.IntN(12) {
			case 0:
				mustSync(t, r)
				r.SetCommit(r.Status().Tail)
			case 1:
				if _, err := r.Apply(t.Context(), seq); err != nil {
					t.Fatal(err)
				}
			case 2:
				if err := d.Checkpoint(t.Context()); err != nil {
					t.Fatal(err)
				}
			case 3:
				mustAppend(t, r, Entry{Seq: seq, Type: OpTrim, Offset: int64(rng.IntN(32)) * chunkSize, Length: chunkSize})
			default:
				e := writeEntry(0, seq, int64(rng.IntN(900))*blockSize, blockSize*(1+rng.IntN(16)))
				if err := r.Append([]Entry{e}); err != nil {
					wantKind(t, err, holdfast.ErrNoSpace) // the log is full of what is not committed
					mustSync(t, r)
					r.SetCommit(r.Status().Tail)
				}
			}
		}
		after := fs.Crash(seed)
		c := mustCheck(t, after)
		if c.Found != 0 {
			t.Fatalf("seed %d: found %+v", seed, c.Findings)
		}
		if len(c.Replicas) > 1 {
			t.Fatalf("seed %d: %d replicas", seed, len(c.Replicas))
		}
		d = mustOpen(t, after, testPath)
		if len(c.Replicas) == 1 && d.Replicas()[0].Status().Tail != c.Replicas[0].Tail {
			t.Errorf("seed %d: checked up to entry %d, opened with %d", seed, c.Replicas[0].Tail, d.Replicas()[0].Status().Tail)
		}
	}
}

// Every place where a bit can fall over is seen, and named.
func TestCheckFindsDamage(t *testing.T) {
	find := func(where, text string, bad int64, flip func(t *testing.T, d *Disk, fs *vfs.Memory) error) {
		t.Run(where+" "+text, func(t *testing.T) {
			fs, d := twoReplicas(t)
			after := fs.Restart()
			if err := flip(t, d, after); err != nil {
				t.Fatal(err)
			}
			c := mustCheck(t, after)
			if c.Found == 0 || c.Findings[0].Where != where || !strings.Contains(c.Findings[0].What, text) {
				t.Fatalf("%d findings: %+v", c.Found, c.Findings)
			}
			sum := int64(0)
			for _, r := range c.Replicas {
				sum += r.Bad
			}
			if sum != bad {
				t.Errorf("%d bad blocks, want %d", sum, bad)
			}
		})
	}
	first := func(d *Disk) *Replica { r, _ := d.Replica(testDesc(0, 0).Replica); return r }
	find("superblock", "the copy at", 0, func(_ *testing.T, _ *Disk, fs *vfs.Memory) error { return fs.FlipBit(testPath, superB+100, 1) })
	find("log", "payload of record", 0, func(t *testing.T, d *Disk, fs *vfs.Memory) error {
		e := entryOf(t, d, 0, 3)
		return fs.FlipBit(walName(testPath, int(e.slot)), e.pos+5000, 3)
	})
	find("log", "unreadable", 0, func(t *testing.T, d *Disk, fs *vfs.Memory) error {
		e := entryOf(t, d, 0, 3)
		return fs.FlipBit(walName(testPath, int(e.slot)), e.pos-recordFixed, 3)
	})
	find("map", "map of replica", 0, func(_ *testing.T, d *Disk, fs *vfs.Memory) error {
		return fs.FlipBit(testPath, d.pageOffset(first(d).tree.root.page)+200, 0)
	})
	find("data", "block 2 of chunk", 1, func(_ *testing.T, d *Disk, fs *vfs.Memory) error {
		return fs.FlipBit(testPath, d.chunkOffset(mapEntry(first(d), 0).phys)+2*blockSize+77, 5)
	})
}

// A block that the map says is lost is counted, and is no new damage; what the log
// overwrites is not looked at; a disk in use, or none at all, is not checked.
func TestCheckRefuses(t *testing.T) {
	fs, d := twoReplicas(t)
	_, err := Check(t.Context(), fs, testPath, nil)
	wantKind(t, err, holdfast.ErrRefused)
	_, err = Check(t.Context(), fs, "/disks/none", nil)
	wantKind(t, err, holdfast.ErrNotFound)
	r, _ := d.Replica(testDesc(0, 0).Replica)
	phys := mapEntry(r, 0).phys
	mustAppend(t, r, writeEntry(0, 5, 8192, 4096))
	mustSync(t, r)
	if err := r.InstallChunk(Chunk{Index: 3, AsOf: 2, State: [16]BlockState{BlockPoison}}); err != nil {
		t.Fatal(err)
	}
	after := fs.Restart()
	if err := after.FlipBit(testPath, d.chunkOffset(phys)+2*blockSize, 1); err != nil {
		t.Fatal(err)
	}
	if c := mustCheck(t, after); c.Found != 0 || c.Replicas[0].Tail != 5 || c.Replicas[0].Blocks != 3 {
		t.Fatalf("found %d, %+v", c.Found, c.Replicas[0])
	}
	d = mustOpen(t, after, testPath)
	r, _ = d.Replica(testDesc(0, 0).Replica)
	r.SetCommit(5)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if c := mustCheck(t, after); c.Found != 0 || c.Replicas[0].Poisoned != 1 || c.Replicas[0].Logged != 0 {
		t.Fatalf("after a checkpoint: found %+v, %+v", c.Findings, c.Replicas[0])
	}
}
