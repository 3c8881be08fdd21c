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

const chunk = int64(chunkSize)

func freshDisk(t testing.TB, o FormatOptions) (*vfs.Memory, *Disk, *Replica) {
	t.Helper()
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, o)
	d := mustOpen(t, fs, testPath)
	return fs, d, mustCreate(t, d, 1, 1<<30)
}

// reopened opens what is there and returns the disk and its replica.
func reopened(t testing.TB, fs *vfs.Memory) (*Disk, *Replica) {
	t.Helper()
	d := mustOpen(t, fs, testPath)
	r, ok := d.Replica(testDesc(1, 0).Replica)
	if !ok {
		t.Fatal("the replica is gone")
	}
	return d, r
}

// wantFresh checks how many chunks of its own an entry has, and returns them.
func wantFresh(t testing.TB, r *Replica, seq holdfast.Seq, n int) []uint32 {
	t.Helper()
	e := entryAt(t, r, seq)
	if len(e.fresh) != n {
		t.Fatalf("entry %d: %+v, want %d fresh chunks", seq, e, n)
	}
	return e.fresh
}

func entryAt(t testing.TB, r *Replica, seq holdfast.Seq) logEntry {
	t.Helper()
	r.mu.RLock()
	defer r.mu.RUnlock()
	e := r.index.get(seq)
	if e == nil {
		t.Fatalf("entry %d is gone", seq)
	}
	return *e
}

func mustCheckpoint(t testing.TB, d *Disk, r *Replica) {
	t.Helper()
	r.SetCommit(mustSync(t, r))
	if err := d.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func mustApply(t testing.TB, r *Replica) {
	t.Helper()
	r.SetCommit(mustSync(t, r))
	if _, err := r.Apply(t.Context(), r.Status().Tail); err != nil {
		t.Fatal(err)
	}
}

// wantEntry checks what Entries returns of a write made by writeEntry.
func wantEntry(t testing.TB, r *Replica, seq holdfast.Seq, n int) {
	t.Helper()
	es, err := r.Entries(seq, 1)
	if err != nil || es[0].Seq != seq || !bytes.Equal(es[0].Payload, pattern(seq, n)) {
		t.Fatalf("entry %d: %d entries, %v", seq, len(es), err)
	}
}

// Which writes have their whole chunks written before the record, and that they are
// found everywhere: in the log, in the map, by Entries, after a death and after a crash.
func TestFreshWrites(t *testing.T) {
	for _, device := range []bool{false, true} {
		for _, c := range []struct {
			off    int64
			length int
			fresh  int
		}{
			{0, 1 << 20, 16},
			{4096, 1 << 20, 15},
			{61440, 1 << 20, 15},
			{chunk, 2 * chunkSize, 2},
			{chunk - 4096, 2*chunkSize + 4096, 2},
			{chunk, 2*chunkSize + 61440, 2},
			{chunk + 4096, 2 * chunkSize, 0}, // one whole chunk and two parts
			{chunk, 2*chunkSize - 4096, 0},
		} {
			t.Run(fmt.Sprintf("device %v, %d at %d", device, c.length, c.off), func(t *testing.T) {
				fs := vfs.NewMemory(1)
				if device {
					fs.AddDevice(testPath, 40<<20)
				}
				mustFormat(t, fs, testPath, smallFormat())
				d := mustOpen(t, fs, testPath)
				r := mustCreate(t, d, 1, 1<<30)
				mustAppend(t, r, writeEntry(0, 1, c.off, 4096), writeEntry(0, 2, c.off, c.length))
				wantFresh(t, r, 2, c.fresh)
				if got := d.wal.pos; c.fresh > 0 && got > int64(c.length)-int64(c.fresh)*chunk+5*vfs.PageSize {
					t.Fatalf("%d bytes of log", got)
				}
				if used := d.wal.used(); used < int64(c.length) {
					t.Fatalf("%d bytes count for the log", used)
				}
				look := func(r *Replica, where string) {
					t.Helper()
					if st := r.Status(); st.Tail != 2 || st.Damaged != nil || len(st.BadRanges) != 0 {
						t.Fatalf("%s: %+v", where, st)
					}
					wantRead(t, r, c.off, pattern(2, c.length))
				}
				look(r, "logged")
				wantEntry(t, r, 2, c.length)
				_, killed := reopened(t, fs.Restart())
				look(killed, "killed")
				wantEntry(t, killed, 2, c.length)
				mustSync(t, r)
				for seed := range uint64(4) {
					_, r := reopened(t, fs.Crash(seed))
					look(r, "crashed")
					wantEntry(t, r, 2, c.length)
				}
				mustApply(t, r)
				look(r, "applied")
				wantEntry(t, r, 2, c.length)
				for seed := range uint64(4) {
					_, r := reopened(t, fs.Crash(seed))
					look(r, "crashed when applied")
				}
				mustCheckpoint(t, d, r)
				look(r, "in a checkpoint")
				wantEntry(t, r, 2, c.length)
				_, r = reopened(t, fs.Crash(9))
				look(r, "crashed after the checkpoint")
				if report, err := Check(t.Context(), fs.Restart(), testPath, nil); err != nil || report.Found != 0 {
					t.Fatalf("check: %v, %+v", err, report)
				}
			})
		}
	}
}

// The order of one write's operations, and that a sync without fresh chunks is one of
// the log alone.
func TestFreshOrder(t *testing.T) {
	fs, _, r := freshDisk(t, smallFormat())
	var ops []string
	fs.Before(func(op vfs.Op, path string) {
		where := "log"
		if path == testPath {
			where = "image"
		}
		ops = append(ops, op.String()+" "+where)
	})
	want := func(expected ...string) {
		t.Helper()
		if fmt.Sprint(ops) != fmt.Sprint(expected) {
			t.Fatalf("got %q, want %q", ops, expected)
		}
		ops = nil
	}
	mustAppend(t, r, writeEntry(0, 1, 0, 2*chunkSize))
	want("write image", "write log")
	mustSync(t, r)
	want("sync image", "sync log")
	mustAppend(t, r, writeEntry(0, 2, 0, chunkSize))
	want("write log")
	mustSync(t, r)
	want("sync log")
}

// What comes upon a fresh write, applied in one go with it and after it, with a crash
// after each step: the fresh chunk stays what its record says until a checkpoint is
// durable that no longer needs the record.
func TestFreshOverlaps(t *testing.T) {
	write := func(off int64, n int) func(holdfast.Seq) Entry {
		return func(s holdfast.Seq) Entry { return writeEntry(0, s, off, n) }
	}
	other := func(typ OpType, off, n int64) func(holdfast.Seq) Entry {
		return func(s holdfast.Seq) Entry { return Entry{Seq: s, Type: typ, Offset: off, Length: n} }
	}
	for name, ops := range map[string][]func(holdfast.Seq) Entry{
		"a part":                  {write(chunk+8192, 4096)},
		"parts, twice":            {write(chunk+8192, 4096), write(chunk+4096, 8192)},
		"over a border":           {write(chunk-8192, 16384)},
		"a whole chunk":           {write(chunk, chunkSize)},
		"a fresh one":             {write(0, 2*chunkSize)},
		"fresh, part, fresh":      {write(chunk+8192, 4096), write(chunk, 2*chunkSize), write(chunk+4096, 4096)},
		"a trim of a part":        {other(OpTrim, chunk+4096, 8192), write(chunk+16384, 4096)},
		"a trim of all":           {other(OpTrim, 0, 4*chunk)},
		"a trim, a part":          {other(OpTrim, 0, 4*chunk), write(chunk+4096, 4096)},
		"a long trim":             {other(OpTrim, 0, 1<<29), write(2*chunk, 2*chunkSize)},
		"a long zero from within": {other(OpZero, chunk+4096, 1<<29), write(chunk+8192, 4096)},
	} {
		for _, mapped := range []bool{false, true} {
			for _, oneGo := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s, mapped %v, in one go %v", name, mapped, oneGo), func(t *testing.T) {
					fs, d, r := freshDisk(t, tinyFormat())
					want := make([]byte, 4*chunk)
					seq := holdfast.Seq(0)
					log := func(e Entry) {
						t.Helper()
						mustAppend(t, r, e)
						seq = e.Seq
						end := min(e.Offset+e.Length, int64(len(want)))
						if e.Type == OpWrite {
							copy(want[e.Offset:end], e.Payload)
						} else {
							clear(want[e.Offset:end])
						}
					}
					look := func() {
						t.Helper()
						wantRead(t, r, 0, want)
						for seed := range uint64(3) {
							d, r := reopened(t, fs.Crash(seed))
							wantRead(t, r, 0, want)
							wantEntry(t, r, max(1, r.Status().Checkpoint+1), chunkSize*3)
							mustCheckpoint(t, d, r)
							wantRead(t, r, 0, want)
							if st := d.Stat(); st.Reserved != 0 {
								t.Fatalf("reserved %d", st.Reserved)
							}
						}
					}
					if mapped {
						log(writeEntry(0, 1, chunk-4096, 3*chunkSize))
						mustCheckpoint(t, d, r)
					}
					log(writeEntry(0, seq+1, chunk, 3*chunkSize))
					first := seq
					fresh := wantFresh(t, r, seq, 3)
					raw := func() {
						t.Helper()
						for i, c := range fresh {
							b := make([]byte, chunkSize)
							if _, err := d.main.ReadAt(b, d.chunkOffset(c)); err != nil || !bytes.Equal(b, pattern(first, 3*chunkSize)[int64(i)*chunk:][:chunk]) {
								t.Fatalf("fresh chunk %d of entry %d was written again, %v", i, first, err)
							}
						}
					}
					mustSync(t, r)
					look()
					if !oneGo {
						mustApply(t, r)
						look()
					}
					for _, op := range ops {
						log(op(seq + 1))
						mustSync(t, r)
						look()
						raw()
						if !oneGo {
							mustApply(t, r)
							look()
							raw()
						}
					}
					mustApply(t, r)
					look()
					raw()
					wantEntry(t, r, first, 3*chunkSize)
					mustCheckpoint(t, d, r)
					wantRead(t, r, 0, want)
					mustAppend(t, r, Entry{Seq: seq + 1, Type: OpTrim, Offset: 0, Length: 1 << 30})
					mustCheckpoint(t, d, r)
					if err := d.Checkpoint(t.Context()); err != nil {
						t.Fatal(err)
					}
					if st := d.Stat(); st.Reserved != 0 || st.Used > 3*chunk || r.Status().Used != 0 {
						t.Fatalf("after a trim of all: %+v", st)
					}
				})
			}
		}
	}
}

// What drops an entry frees its chunks, after the next checkpoint.
func TestFreshDropped(t *testing.T) {
	for name, drop := range map[string]func(d *Disk, r *Replica) error{
		"truncate": func(_ *Disk, r *Replica) error { return r.Truncate(0) },
		"rebase":   func(_ *Disk, r *Replica) error { return r.Rebase(0, 7) },
		"delete":   func(d *Disk, r *Replica) error { return d.DeleteReplica(r.Desc().Replica) },
	} {
		t.Run(name, func(t *testing.T) {
			fs, d, r := freshDisk(t, smallFormat())
			if err := d.Checkpoint(t.Context()); err != nil {
				t.Fatal(err)
			}
			before := d.Stat()
			mustAppend(t, r, writeEntry(0, 1, 0, 1<<20), writeEntry(0, 2, 1<<19, 1<<20))
			mustSync(t, r)
			if used := d.Stat().Used - before.Used; used != 2<<20 {
				t.Fatalf("two writes of 1 MiB use %d bytes", used)
			}
			if err := drop(d, r); err != nil {
				t.Fatal(err)
			}
			if d.Stat().Used < 2<<20 {
				t.Fatal("the chunks are free before a checkpoint")
			}
			for range 2 {
				if err := d.Checkpoint(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			if st := d.Stat(); st.Used > before.Used+chunk || st.Reserved != 0 {
				t.Fatalf("before %+v, after %+v", before, st)
			}
			next := mustOpen(t, fs.Crash(1), testPath)
			if st := next.Stat(); st.Used > before.Used+chunk || st.Reserved != 0 {
				t.Fatalf("before %+v, after a crash %+v", before, st)
			}
		})
	}
}

// A second open must not give out chunks that only the log refers to.
func TestFreshChunksAreInUseAfterOpen(t *testing.T) {
	fs, _, r := freshDisk(t, tinyFormat())
	mustAppend(t, r, writeEntry(0, 1, 0, 4*chunkSize))
	mustSync(t, r)
	d, r := reopened(t, fs.Restart())
	taken := map[uint32]bool{}
	for _, c := range wantFresh(t, r, 1, 4) {
		taken[c] = true
	}
	for range 3 { // no checkpoint may free them either
		if err := d.Checkpoint(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	for {
		c, err := d.alloc.take(false)
		if err != nil {
			break
		}
		if taken[c] {
			t.Fatalf("chunk %d of entry 1 was given out", c)
		}
	}
	wantRead(t, r, 0, pattern(1, 4*chunkSize))
}

// Recovery may write to the chunks of an entry that was dropped. A crash there must not
// have the next scan take that for the end of a log that was durable beyond it.
func TestFreshReusedDuringOpen(t *testing.T) {
	fs := vfs.NewMemory(1)
	fs.AddDevice(testPath, 16<<20)
	mustFormat(t, fs, testPath, tinyFormat())
	d := mustOpen(t, fs, testPath)
	r, other := mustCreate(t, d, 1, 1<<20), mustCreate(t, d, 2, 1<<20)
	d.alloc.next = 100
	c := Chunk{Index: 9, Data: pattern(9, chunkSize)}
	for i, crc := range crcsOf(c.Data) {
		c.State[i], c.CRC[i] = BlockData, crc
	}
	c.State[15], c.CRC[15] = BlockZero, 0 // whole it would have a fresh chunk
	if err := r.InstallChunk(c); err != nil {
		t.Fatal(err)
	}
	d.alloc.next = 0
	mustAppend(t, r, writeEntry(0, 1, 0, 2*chunkSize))
	dropped := wantFresh(t, r, 1, 2)[0]
	mustAppend(t, other, writeEntry(0, 1, 0, 4096))
	if err := r.Truncate(0); err != nil { // syncs all
		t.Fatal(err)
	}
	next := fs.Restart()
	var crashes []*vfs.Memory
	next.Before(func(vfs.Op, string) {
		for seed := range uint64(4) {
			crashes = append(crashes, next.Crash(seed))
		}
	})
	d = mustOpen(t, next, testPath)
	next.Before(nil)
	if got := mapEntry(d.Replicas()[0], 9).phys; got != dropped {
		t.Fatalf("the install was done again to chunk %d, not %d: this proves nothing", got, dropped)
	}
	for i, fs := range crashes {
		d := mustOpen(t, fs, testPath)
		other, _ := d.Replica(testDesc(2, 0).Replica)
		if st := other.Status(); st.Tail != 1 {
			t.Fatalf("crash %d: tail %d of what was durable", i, st.Tail)
		}
		wantRead(t, other, 0, pattern(1, 4096))
	}
}

// Behind the durable point fresh chunks that do not match end the log, and the next
// record takes the place of the one that referred to them, also behind others that
// were written with it.
func TestFreshTornTail(t *testing.T) {
	fs, d, r := freshDisk(t, smallFormat())
	mustAppend(t, r, writeEntry(0, 1, 0, 4096))
	mustSync(t, r)
	mustAppend(t, r, writeEntry(0, 2, 0, 4096), writeEntry(0, 3, chunk, 3*chunkSize), writeEntry(0, 4, 0, 4096))
	fresh := wantFresh(t, r, 3, 3)
	for _, c := range fresh {
		after := fs.Restart()
		if err := after.FlipBit(testPath, d.chunkOffset(c)+7*4096+1, 2); err != nil {
			t.Fatal(err)
		}
		_, r := reopened(t, after)
		if st := r.Status(); st.Tail != 2 || st.Damaged != nil || len(st.BadRanges) != 0 || st.Intact {
			t.Fatalf("%+v", st)
		}
		wantRead(t, r, chunk, make([]byte, 3*chunk))
		mustAppend(t, r, writeEntry(0, 3, 0, 8192))
		_, r = reopened(t, after.Restart())
		if st := r.Status(); st.Tail != 3 || st.Damaged != nil {
			t.Fatalf("the record after: %+v", st)
		}
		wantRead(t, r, 0, pattern(3, 8192))
	}
}

// Before the durable point they are lost bytes: not the end of the log.
func TestFreshLost(t *testing.T) {
	fs, d, r := freshDisk(t, smallFormat())
	mustAppend(t, r, writeEntry(0, 1, chunk, 3*chunkSize), writeEntry(0, 2, 0, 4096))
	mustSync(t, r)
	if err := r.SetHint(1, 1); err != nil { // tells that all before was durable
		t.Fatal(err)
	}
	after := fs.Restart()
	if err := after.FlipBit(testPath, d.chunkOffset(wantFresh(t, r, 1, 3)[1])+4097, 0); err != nil {
		t.Fatal(err)
	}
	report, err := Check(t.Context(), after.Restart(), testPath, nil)
	if err != nil || report.Found != 1 || report.Findings[0].Where != "log" || report.Findings[0].Range != (Range{chunk, 3 * chunk}) {
		t.Fatalf("check: %v, %+v", err, report)
	}
	d, r = reopened(t, after)
	st := r.Status()
	if st.Tail != 2 || st.Damaged != nil || st.BadEntry != 1 || len(st.BadRanges) != 1 || st.BadRanges[0] != (Range{chunk, 3 * chunk}) {
		t.Fatalf("%+v", st)
	}
	wantKind(t, r.ReadAt(make([]byte, 4096), chunk), holdfast.ErrIntegrity)
	_, err = r.Entries(1, 1)
	wantKind(t, err, holdfast.ErrIntegrity)
	mustCheckpoint(t, d, r)
	if c, err := r.ReadChunk(2); err != nil || c.State[0] != BlockPoison {
		t.Fatalf("%v, %v", err, c.State)
	}
	mustAppend(t, r, writeEntry(0, 3, chunk, 3*chunkSize))
	mustCheckpoint(t, d, r)
	wantRead(t, r, chunk, pattern(3, 3*chunkSize))
	if n := r.Status().Poison; n != 0 {
		t.Fatalf("%d blocks are poison after they were written", n)
	}
}

// Old uncommitted entries move to the head of the log, their chunks stay.
func TestFreshTailMovesAlong(t *testing.T) {
	fs, d, orphan := freshDisk(t, tinyFormat())
	busy := mustCreate(t, d, 2, 4<<20)
	mustAppend(t, orphan, writeEntry(0, 1, 4096, 3*chunkSize), writeEntry(0, 2, chunk, 2*chunkSize))
	fresh := append([]uint32(nil), wantFresh(t, orphan, 1, 2)...)
	serial := entryAt(t, orphan, 1).serial
	for seq := holdfast.Seq(1); seq <= 200; seq++ {
		e := writeEntry(0, seq, int64(seq%40)*chunk, 3*chunkSize/2)
		e.Commit = seq - 1
		mustAppend(t, busy, e)
	}
	if now := wantFresh(t, orphan, 1, 2); entryAt(t, orphan, 1).serial == serial || now[0] != fresh[0] || now[1] != fresh[1] {
		t.Fatalf("record %d, chunks %v; they were %d, %v", entryAt(t, orphan, 1).serial, now, serial, fresh)
	}
	for _, next := range []*vfs.Memory{fs, fs.Restart(), fs.Crash(1), fs.Crash(2)} {
		r := orphan
		if next != fs {
			_, r = reopened(t, next)
		}
		wantEntry(t, r, 1, 3*chunkSize)
		wantEntry(t, r, 2, 2*chunkSize)
		wantRead(t, r, chunk, pattern(2, 2*chunkSize))
		if err := r.Truncate(1); err != nil {
			t.Fatal(err)
		}
		wantRead(t, r, 4096, pattern(1, 3*chunkSize))
	}
}

// Bytes in fresh chunks count as the log's: uncommitted ones fill it.
func TestFreshFillsTheLog(t *testing.T) {
	o := tinyFormat()
	o.Size = 64 << 20
	fs, d, r := freshDisk(t, o)
	logged := int64(0)
	err := error(nil)
	for seq := holdfast.Seq(1); err == nil; seq++ {
		if err = r.Append([]Entry{writeEntry(0, seq, int64(seq)*2*chunk, 2*chunkSize)}); err == nil {
			wantFresh(t, r, seq, 2)
			logged += 2 * chunk
		}
	}
	wantKind(t, err, holdfast.ErrNoSpace)
	if logged < o.WALSize/2 || logged > o.WALSize {
		t.Fatalf("%d bytes logged in a log of %d", logged, o.WALSize)
	}
	if used := d.Stat().Used; used > logged+2*chunk {
		t.Fatalf("%d bytes of chunks in use for %d logged", used, logged) // what was not logged has none
	}
	used := d.wal.used()
	next, r := reopened(t, fs.Restart())
	if got := next.wal.used(); got < used-2*chunk || got > used {
		t.Fatalf("%d bytes of the log in use after an open, %d before", got, used)
	}
	mustCheckpoint(t, next, r)
	mustAppend(t, r, writeEntry(0, r.Status().Tail+1, 0, 2*chunkSize))
}

// On a disk that is almost full a large write is written twice, and nothing is refused
// that would not be otherwise.
func TestFreshOnFullDisk(t *testing.T) {
	fs, d, r := freshDisk(t, tinyFormat())
	seq, twice := holdfast.Seq(0), 0
	write := func(off int64) error {
		e := writeEntry(0, seq+1, off, 3*chunkSize)
		e.Commit = seq
		err := r.Append([]Entry{e})
		if err == nil {
			seq++
			if entryAt(t, r, seq).fresh == nil {
				twice++
			}
		}
		return err
	}
	err := error(nil)
	for err == nil {
		err = write(int64(seq) * 3 * chunk)
	}
	wantKind(t, err, holdfast.ErrNoSpace)
	full := seq
	if share := 100 * int64(full) * 3 * chunk / d.Stat().Capacity; share < 85 {
		t.Fatalf("full with %d %%", share)
	}
	if twice == 0 || holdfast.Seq(twice) > full/2 {
		t.Fatalf("%d of %d writes were written twice", twice, full)
	}
	for q := range full {
		if err := write(int64(q) * 3 * chunk); err != nil {
			t.Fatalf("an overwrite: %v", err)
		}
	}
	mustCheckpoint(t, d, r)
	_, r = reopened(t, fs.Crash(1))
	for q := range full {
		wantRead(t, r, int64(q)*3*chunk, pattern(full+q+1, 3*chunkSize))
	}
}

// A host without room has none for fresh chunks, and that is no failure.
func TestFreshOnFullHost(t *testing.T) {
	fs := vfs.NewMemory(1)
	o := tinyFormat()
	o.Size = 64 << 20
	mustFormat(t, fs, testPath, o)
	fs.Limit(fs.Held() + 5<<20)
	d := mustOpen(t, fs, testPath)
	r := mustCreate(t, d, 1, 1<<30)
	seq := holdfast.Seq(0)
	for {
		e := writeEntry(0, seq+1, int64(seq)*3*chunk, 3*chunkSize)
		e.Commit = seq
		if err := r.Append([]Entry{e}); err != nil {
			wantKind(t, err, holdfast.ErrNoSpace)
			break
		}
		seq++
	}
	if seq < 10 {
		t.Fatalf("full after %d writes of 192 KiB in 5 MiB", seq)
	}
	full := seq
	for q := range full {
		e := writeEntry(0, seq+1, int64(q)*3*chunk, 3*chunkSize)
		e.Commit = seq
		mustAppend(t, r, e)
		seq++
	}
	mustCheckpoint(t, d, r)
	for q := range full {
		wantRead(t, r, int64(q)*3*chunk, pattern(full+q+1, 3*chunkSize))
	}
}

// Entries below the checkpoint are served for as long as their chunks hold what they
// wrote, and no longer.
func TestFreshEntriesStayForAWhile(t *testing.T) {
	for name, op := range map[string]Entry{
		"overwritten": writeEntry(0, 4, 4*chunk, 4096),
		"replaced":    writeEntry(0, 4, 4*chunk, 2*chunkSize),
		"trimmed":     {Seq: 4, Type: OpTrim, Offset: 4 * chunk, Length: 2 * chunk},
	} {
		t.Run(name, func(t *testing.T) {
			_, d, r := freshDisk(t, smallFormat())
			mustAppend(t, r, writeEntry(0, 1, 0, 2*chunkSize), writeEntry(0, 2, 4*chunk, 2*chunkSize), writeEntry(0, 3, 8*chunk, 2*chunkSize))
			mustCheckpoint(t, d, r)
			for q := holdfast.Seq(1); q <= 3; q++ {
				wantEntry(t, r, q, 2*chunkSize)
			}
			mustAppend(t, r, op)
			mustCheckpoint(t, d, r)
			var gap *GapError
			if _, err := r.Entries(2, 1); !errors.As(err, &gap) || gap.First != 3 || r.Status().First != 3 {
				t.Fatalf("first %d: %v", r.Status().First, err)
			}
			wantEntry(t, r, 3, 2*chunkSize)
		})
	}
}

// An entry that the map has nothing of is gone with the checkpoint.
func TestFreshEntryOverwrittenAtOnce(t *testing.T) {
	_, d, r := freshDisk(t, smallFormat())
	mustAppend(t, r, writeEntry(0, 1, 0, 2*chunkSize), writeEntry(0, 2, 0, 3*chunkSize))
	mustApply(t, r)
	wantEntry(t, r, 1, 2*chunkSize)
	mustCheckpoint(t, d, r)
	var gap *GapError
	if _, err := r.Entries(1, 1); !errors.As(err, &gap) || gap.First != 2 {
		t.Fatal(err)
	}
	wantEntry(t, r, 2, 3*chunkSize)
}

// An install over a chunk that an entry's fresh chunk holds, or will hold.
func TestFreshAndInstall(t *testing.T) {
	for _, applied := range []bool{false, true} {
		for asOf := holdfast.Seq(1); asOf <= 3; asOf++ {
			for kind := range 4 {
				zero, third := kind&1 == 0, int64(8192)
				if kind&2 == 0 {
					third += chunk // the whole chunk that is installed is the fresh write's
				}
				t.Run(fmt.Sprintf("applied %v, as of %d, zero %v, part at %d", applied, asOf, zero, third), func(t *testing.T) {
					fs, d, r := freshDisk(t, tinyFormat())
					mustAppend(t, r, writeEntry(0, 1, 0, 4096), writeEntry(0, 2, 0, 2*chunkSize), writeEntry(0, 3, third, 4096))
					if applied {
						mustApply(t, r)
					}
					c := Chunk{LastSeq: asOf, AsOf: asOf}
					want := make([]byte, chunkSize)
					next := pattern(2, 2*chunkSize)[chunk:]
					if !zero {
						c.Data = pattern(99, chunkSize)
						copy(want, c.Data)
						for i, crc := range crcsOf(c.Data) {
							c.State[i], c.CRC[i] = BlockData, crc
						}
					}
					if err := r.InstallChunk(c); err != nil {
						t.Fatal(err)
					}
					if asOf < 2 {
						copy(want, pattern(2, 2*chunkSize))
					}
					if third >= chunk {
						copy(next[8192:], pattern(3, 4096))
					} else if asOf < 3 {
						copy(want[8192:], pattern(3, 4096))
					}
					look := func(r *Replica) {
						t.Helper()
						wantRead(t, r, 0, want)
						wantRead(t, r, chunk, next)
					}
					look(r)
					mustSync(t, r)
					for seed := range uint64(4) {
						d, r := reopened(t, fs.Crash(seed))
						look(r)
						mustCheckpoint(t, d, r)
						look(r)
					}
					mustAppend(t, r, writeEntry(0, 4, 4096, 4096))
					copy(want[4096:], pattern(4, 4096))
					mustApply(t, r)
					look(r)
					_, again := reopened(t, fs.Crash(5))
					look(again)
					mustCheckpoint(t, d, r)
					look(r)
					if st := d.Stat(); st.Reserved != 0 {
						t.Fatalf("reserved %d", st.Reserved)
					}
				})
			}
		}
	}
}

// R12: an error of a fresh chunk's write or sync ends the disk, and no record refers
// to what was not written.
func TestFreshErrors(t *testing.T) {
	for _, op := range []vfs.Op{vfs.OpWrite, vfs.OpSync} {
		fs, _, r := freshDisk(t, smallFormat())
		mustAppend(t, r, writeEntry(0, 1, 0, 4096))
		mustSync(t, r)
		fs.Inject(vfs.Fault{Op: op, Path: testPath, Err: syscall.EIO})
		err := r.Append([]Entry{writeEntry(0, 2, 0, 2*chunkSize)})
		if op == vfs.OpSync && err == nil {
			_, err = r.Sync(t.Context())
		}
		wantKind(t, err, holdfast.ErrIO)
		wantKind(t, r.Append([]Entry{writeEntry(0, 3, 0, 4096)}), holdfast.ErrIO)
		if op == vfs.OpSync {
			continue
		}
		_, r = reopened(t, fs.Restart())
		if st := r.Status(); st.Tail != 1 || st.Damaged != nil {
			t.Fatalf("%+v", st)
		}
	}
}

func freshRecord() record {
	p := pattern(6, 2*chunkSize+8192)
	rec := record{
		typ: recWrite, flags: flagBatchEnd, serial: 0x0002030405060708, open: 3, durable: 0x0001121314151617,
		replica: testDesc(1, 0).Replica, epoch: 5, seq: 6, commit: 4, off: chunk - 4096, length: int64(len(p)),
		crc: crcsOf(p), payload: p,
	}
	rec.refer([]uint32{0x21, 0x31})
	return rec
}

// The bytes of a record with fresh chunks; no flipped bit of them, or of its payload,
// is accepted, and none whose list does not fit its range.
func TestFreshRecord(t *testing.T) {
	rec, seed := freshRecord(), seedOf(testDisk)
	if !bytes.Equal(rec.payload, append(pattern(6, 4096), pattern(6, 2*chunkSize+8192)[4096+2*chunkSize:]...)) {
		t.Fatal("the payload is not what the whole chunks leave")
	}
	b := make([]byte, rec.size())
	rec.encodeHead(b[:rec.headSize()], seed)
	copy(b[rec.headSize():], rec.payload)
	golden(t, "v1-fresh.txt", b[:rec.headSize()])
	got, ok := decodeHead(b, seed)
	if !ok || got.freshBytes() != 2*chunk || fmt.Sprint(got.freshChunks()) != "[33 49]" || !got.edgesMatch(b[got.headLen:]) {
		t.Fatalf("%v, %+v", ok, got)
	}
	for i := range b {
		if i > rec.headSize() && i%97 != 0 {
			continue
		}
		b[i] ^= 1 << (i % 8)
		if r, ok := decodeHead(b, seed); ok && r.edgesMatch(b[r.headLen:]) {
			t.Fatalf("bit %d of byte %d flipped and accepted", i%8, i)
		}
		b[i] ^= 1 << (i % 8)
	}
	for what, change := range map[string]func(*record){
		"one chunk too few": func(r *record) { r.extra = r.extra[:4] },
		"one too many":      func(r *record) { r.extra = append(r.extra, 1, 2, 3, 4) },
		"a byte too many":   func(r *record) { r.extra = append(r.extra, 1) },
		"none":              func(r *record) { r.extra = nil },
		"a trim":            func(r *record) { r.typ = recTrim },
		"another range":     func(r *record) { r.off += 8192 },
		"a range too long":  func(r *record) { r.length = 1 << 40 },
		"far away":          func(r *record) { r.off = 1<<63 - 1 },
		"a payload too few": func(r *record) { r.payload = r.payload[:4096] },
	} {
		r := freshRecord()
		change(&r)
		b := make([]byte, r.headSize())
		r.encodeHead(b, seed)
		if _, ok := decodeHead(b, seed); ok {
			t.Errorf("%s: accepted", what)
		}
	}
}

// FuzzFresh: whatever a record says of its fresh chunks, it is refused or can be used.
func FuzzFresh(f *testing.F) {
	rec := freshRecord()
	f.Add(rec.off, rec.length, rec.extra, uint8(len(rec.crc)), uint8(len(rec.payload)/blockSize))
	f.Fuzz(func(t *testing.T, off, length int64, extra []byte, crcs, blocks uint8) {
		rec := record{typ: recWrite, flags: flagFresh, serial: 1, off: off, length: length,
			crc: make([]uint32, crcs), extra: extra[:min(len(extra), 4096)], payload: make([]byte, int(blocks)*blockSize)}
		b := make([]byte, rec.headSize())
		rec.encodeHead(b, 1)
		r, ok := decodeHead(b, 1)
		if !ok {
			return
		}
		r.edgesMatch(rec.payload)
		if r.off%blockSize != 0 || r.length%blockSize != 0 || r.length != r.payloadLen+r.freshBytes() {
			return // the replay refuses it
		}
		e := &logEntry{typ: recWrite, off: r.off, length: r.length, crc: r.crc, fresh: r.freshChunks()}
		read := int64(0)
		for _, p := range e.parts(0, r.length/blockSize) {
			if p.from != read || p.to <= p.from || p.src.pos < 0 || p.src.kind == fromLog && p.src.pos+p.to-p.from > r.payloadLen {
				t.Fatalf("part %+v of %+v", p, e)
			}
			read = p.to
		}
		if read != r.length {
			t.Fatalf("%d of %d bytes", read, r.length)
		}
	})
}

// The same on a real file system, and on a real device, where chunks are written past
// the page cache.
func TestFreshOnFile(t *testing.T) { freshOn(t, t.TempDir()+"/image") }

func TestRootFreshOnDevice(t *testing.T) { freshOn(t, loopDevice(t, 64<<20)) }

func freshOn(t *testing.T, path string) {
	o := FormatOptions{Cluster: testCluster, Node: testNode, Size: 64 << 20, WALSize: MinWALSize}
	mustFormat(t, vfs.OS{}, path, o)
	open := func() (*Disk, *Replica) {
		t.Helper()
		d, err := Open(t.Context(), vfs.OS{}, path, Options{ApplyEvery: -1})
		if err != nil {
			t.Fatal(err)
		}
		r, err := d.CreateReplica(testDesc(1, 1<<30))
		if err != nil {
			t.Fatal(err)
		}
		return d, r
	}
	d, r := open()
	seq := holdfast.Seq(0)
	for range 3 {
		want := make([]byte, 12<<20)
		outside := 0
		for i := range int64(24) {
			seq++
			e := writeEntry(0, seq, i*(1<<19)-i%3*4096, 1<<19)
			e.Commit = seq - 1
			if e.Offset < 0 {
				e.Offset = 0
			}
			mustAppend(t, r, e)
			copy(want[e.Offset:], e.Payload)
			outside += len(entryAt(t, r, seq).fresh)
			wantRead(t, r, e.Offset, e.Payload)
		}
		if outside < 24*6 {
			t.Fatalf("%d chunks of 12 MiB were written before their records", outside)
		}
		mustAppend(t, r, writeEntry(0, seq+1, 3*chunk+4096, 4096))
		seq++
		copy(want[3*chunk+4096:], pattern(seq, 4096))
		mustSync(t, r)
		wantRead(t, r, 0, want)
		d.Abandon() // what was logged is found again
		d, r = open()
		if st := r.Status(); st.Tail != seq || st.Damaged != nil || len(st.BadRanges) != 0 {
			t.Fatalf("%+v", st)
		}
		wantRead(t, r, 0, want)
		mustCheckpoint(t, d, r)
		wantRead(t, r, 0, want)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if report, err := Check(t.Context(), vfs.OS{}, path, nil); err != nil || report.Found != 0 {
		t.Fatalf("%v, %+v", err, report)
	}
}
