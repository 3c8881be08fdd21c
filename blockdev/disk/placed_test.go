package disk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"
	"testing"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// wholeChunk is a chunk that is data all over.
func wholeChunk(index int64, asOf holdfast.Seq, seed holdfast.Seq) Chunk {
	c := Chunk{Index: index, LastSeq: asOf, AsOf: asOf, Data: pattern(seed, chunkSize)}
	for i, crc := range crcsOf(c.Data) {
		c.State[i], c.CRC[i] = BlockData, crc
	}
	return c
}

func mustInstall(t testing.TB, r *Replica, c Chunk) {
	t.Helper()
	if err := r.InstallChunk(c); err != nil {
		t.Fatal(err)
	}
}

// logged is how much the log grew by what was done, in its files.
func logged(d *Disk, do func()) int64 {
	before := d.wal.used()
	do()
	return d.wal.used() - before
}

// An install of a whole chunk goes to its place, and not through the log as well; what
// follows on it, before a checkpoint and after one, is there after any crash.
func TestInstallInPlace(t *testing.T) {
	for _, was := range []string{"nothing", "data", "a fresh chunk", "an install", "a logged write"} {
		for _, then := range []string{"nothing", "a part", "all", "a trim", "an install", "zero", "a checkpoint and a part"} {
			t.Run(fmt.Sprintf("%s, then %s", was, then), func(t *testing.T) {
				fs, d, r := freshDisk(t, tinyFormat())
				other := mustCreate(t, d, 2, 1<<30)
				switch was {
				case "data":
					mustAppend(t, r, writeEntry(0, 1, 0, chunkSize))
					mustCheckpoint(t, d, r)
				case "a fresh chunk":
					mustAppend(t, r, writeEntry(0, 1, 0, 2*chunkSize))
					mustApply(t, r)
				case "an install":
					mustInstall(t, r, wholeChunk(0, 0, 77))
				}
				tail := r.Status().Tail
				want := pattern(99, chunkSize)
				place := uint32(0)
				files := logged(d, func() {
					mustInstall(t, r, wholeChunk(0, tail, 99))
					place = mapEntry(r, 0).phys
					if f := r.flips[0]; f.phys != place {
						t.Errorf("it is in chunk %d, and %d is the fresh one", place, f.phys)
					}
				})
				if files != pageSize+chunkSize {
					t.Errorf("it took %d bytes of the log, want a page, and a chunk beside", files)
				}
				if was == "a logged write" {
					mustAppend(t, r, writeEntry(0, tail+1, 8192, 4096))
					copy(want[8192:], pattern(tail+1, 4096))
				}
				tail = r.Status().Tail
				switch then {
				case "a checkpoint and a part":
					mustCheckpoint(t, d, r)
					fallthrough
				case "a part":
					mustAppend(t, r, writeEntry(0, tail+1, 4096, 4096))
					copy(want[4096:], pattern(tail+1, 4096))
					mustApply(t, r)
				case "all":
					mustAppend(t, r, writeEntry(0, tail+1, 0, 2*chunkSize))
					copy(want, pattern(tail+1, 2*chunkSize))
					mustApply(t, r)
				case "a trim":
					mustAppend(t, r, Entry{Seq: tail + 1, Type: OpTrim, Offset: 0, Length: chunkSize})
					clear(want)
					mustApply(t, r)
				case "an install":
					mustApply(t, r)
					mustInstall(t, r, wholeChunk(0, tail, 55))
					want = pattern(55, chunkSize)
				case "zero":
					mustApply(t, r)
					mustInstall(t, r, Chunk{Index: 0, AsOf: tail})
					clear(want)
				}
				wantRead(t, r, 0, want)
				if now := mapEntry(r, 0); then == "a part" && now.phys == place {
					t.Error("a part was written to the fresh chunk before a checkpoint")
				}
				mustSync(t, r)
				for seed := range uint64(4) {
					crashed := fs.Crash(seed)
					wantClean(t, "after a crash", crashed, testPath)
					ro, err := openReadOnly(t, crashed)
					if err != nil {
						t.Fatal(err)
					}
					wantRead(t, ro, 0, want)
					d, r := reopened(t, crashed)
					wantRead(t, r, 0, want)
					mustAppend(t, r, writeEntry(0, r.Status().Tail+1, 3*4096, 4096))
					mustCheckpoint(t, d, r)
					part := bytes.Clone(want)
					copy(part[3*4096:], pattern(r.Status().Tail, 4096))
					wantRead(t, r, 0, part)
				}
				mustCheckpoint(t, d, r)
				wantRead(t, r, 0, want)
				if st := d.Stat(); st.Reserved != 0 || st.Reclaimable != 0 {
					t.Errorf("%+v after a checkpoint", st)
				}
				mustAppend(t, other, writeEntry(0, 1, 0, 4*chunkSize)) // where it was
				mustCheckpoint(t, d, other)
				wantRead(t, r, 0, want)
				if err := d.DeleteReplica(r.desc.Replica); err != nil {
					t.Fatal(err)
				}
				mustCheckpoint(t, d, other)
				if st := d.Stat(); st.Used-st.Map != 4*chunk || st.Reserved != 0 {
					t.Errorf("%+v, want the other replica's 4 chunks", st)
				}
			})
		}
	}
}

// openReadOnly opens a copy of a disk that asks for what only a reader may ignore.
func openReadOnly(t testing.TB, fs *vfs.Memory) (*Replica, error) {
	t.Helper()
	copied := fs.Restart()
	f, err := copied.OpenFile(testPath, 0)
	if err != nil {
		return nil, err
	}
	for _, off := range []int64{superA, superB} {
		b := make([]byte, superSize)
		if _, err := f.ReadAt(b, off); err != nil {
			return nil, err
		}
		s, err := decodeSuperblock(b)
		if err != nil {
			continue
		}
		s.roCompat |= 1 << 40
		if err := writeSuperblock(f, s); err != nil {
			return nil, err
		}
		break
	}
	_ = f.Close()
	d, err := Open(t.Context(), copied, testPath, Options{foreground: true})
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { _ = d.Close() })
	if d.readOnly == nil {
		return nil, errors.New("it was opened for writing")
	}
	r, _ := d.Replica(testDesc(1, 0).Replica)
	return r, nil
}

// A chunk that was durable and does not match is lost, block by block; one that was not
// ends the log.
func TestInstallInPlaceLost(t *testing.T) {
	fs, d, r := freshDisk(t, tinyFormat())
	mustInstall(t, r, wholeChunk(3, 0, 99))
	place := mapEntry(r, 3).phys
	torn := fs.Restart() // what was not synced is there all the same
	mustSync(t, r)
	if err := r.SetHint(1, 1); err != nil { // a later record that tells
		t.Fatal(err)
	}
	synced := fs.Restart()
	for _, fs := range []*vfs.Memory{torn, synced} {
		if err := fs.FlipBit(testPath, d.chunkOffset(place)+5*blockSize+17, 3); err != nil {
			t.Fatal(err)
		}
	}
	_, lost := reopened(t, torn)
	wantRead(t, lost, 3*chunk, make([]byte, chunkSize))
	c, err := Check(t.Context(), synced.Restart(), testPath, nil)
	if err != nil || c.Found != 1 {
		t.Fatalf("the check found %+v, %v, want one thing", c, err)
	}
	d, r = reopened(t, synced)
	want := pattern(99, chunkSize)
	for i := range int64(blocksPerChunk) {
		b := make([]byte, blockSize)
		switch err := r.ReadAt(b, 3*chunk+i*blockSize); {
		case i == 5:
			wantKind(t, err, holdfast.ErrIntegrity)
		case err != nil || !bytes.Equal(b, want[i*blockSize:(i+1)*blockSize]):
			t.Errorf("block %d: %v", i, err)
		}
	}
	if st := r.Status(); st.Intact || st.Poison != 1 {
		t.Errorf("%+v, want one block of poison", st)
	}
	mustCheckpoint(t, d, r)
	d.Abandon()
	_, r = reopened(t, synced.Restart())
	if st := r.Status(); st.Poison != 1 {
		t.Errorf("%+v after another open, want one block of poison", st)
	}
}

// Where there is no chunk to spare, or an applied entry lies above it, the log takes it
// as before.
func TestInstallThroughTheLog(t *testing.T) {
	_, d, r := freshDisk(t, tinyFormat())
	mustAppend(t, r, writeEntry(0, 1, 0, 4096), writeEntry(0, 2, 4096, 4096))
	mustApply(t, r)
	free := d.Stat()
	if n := logged(d, func() { mustInstall(t, r, wholeChunk(0, 1, 99)) }); n < chunkSize || len(r.flips) != 0 {
		t.Errorf("it took %d bytes of the log, flips %v", n, r.flips)
	}
	want := pattern(99, chunkSize)
	copy(want[4096:], pattern(2, 4096))
	wantRead(t, r, 0, want)
	if now := d.Stat(); now.Used != free.Used+chunk || now.Reclaimable != chunk {
		t.Errorf("%+v, before %+v", now, free)
	}
	part := wholeChunk(1, 2, 98)
	part.State[15], part.CRC[15] = BlockZero, 0
	mustInstall(t, r, part)
	if len(r.flips) != 0 {
		t.Error("a chunk that is not data all over has a fresh place")
	}
	other := mustCreate(t, d, 2, 1<<30)
	for seq := holdfast.Seq(1); !d.alloc.above(creditShare, 1); seq++ {
		e := writeEntry(0, seq, int64(seq)*chunk, blockSize)
		e.Commit = seq - 1
		mustAppend(t, other, e)
	}
	mustCheckpoint(t, d, other)
	mustInstall(t, other, wholeChunk(1, other.Status().Applied, 97)) // over what it has
	if len(other.flips) != 0 {
		t.Error("a disk that is almost full gave a fresh place")
	}
	wantRead(t, other, chunk, pattern(97, chunkSize))
}

// R12, and nothing half done: an error of the chunk's write ends the disk, and nothing
// of the install is there after the next open.
func TestInstallInPlaceErrors(t *testing.T) {
	for what, fault := range map[string]vfs.Fault{
		"its chunk":   {Op: vfs.OpWrite, Path: testPath, Err: syscall.EIO},
		"its sync":    {Op: vfs.OpSync, Path: testPath, Err: syscall.EIO},
		"its record":  {Op: vfs.OpWrite, After: 1, Err: syscall.EIO},
		"log's space": {Op: vfs.OpWrite, After: 1, Err: syscall.ENOSPC},
	} {
		t.Run(what, func(t *testing.T) {
			fs, d, r := freshDisk(t, tinyFormat())
			mustInstall(t, r, wholeChunk(0, 0, 1))
			mustCheckpoint(t, d, r)
			fs.Inject(fault)
			err := r.InstallChunk(wholeChunk(0, 0, 2))
			if err == nil {
				_, err = r.Sync(t.Context())
			}
			wantKind(t, err, holdfast.ErrIO)
			if d.Stat().Failed == nil {
				t.Fatal("the disk goes on")
			}
			fs.ClearFaults()
			_, r = reopened(t, fs.Crash(1))
			got := mustRead(t, r, 0, chunkSize)
			if !bytes.Equal(got, pattern(1, chunkSize)) && !bytes.Equal(got, pattern(2, chunkSize)) {
				t.Error("neither the old nor the new chunk")
			}
		})
	}
}

// The record: what it says is read back, and what does not fit is no record.
func TestInstallInPlaceRecord(t *testing.T) {
	const seed = 7
	c := wholeChunk(9, 5, 1)
	make1 := func(change func(r *record)) record {
		rec := record{
			typ: recInstall, serial: 1, replica: holdfast.ReplicaID{1}, off: 9 * chunk, length: chunk, seq: 5,
			crc: c.CRC[:], extra: encodeInstall(&c),
		}
		rec.list([]uint32{33})
		change(&rec)
		return rec
	}
	read := func(rec record) (record, bool) {
		b := make([]byte, rec.headSize())
		rec.encodeHead(b, seed)
		return decodeHead(b, seed)
	}
	got, ok := read(make1(func(*record) {}))
	if !ok || got.freshBytes() != chunk || fmt.Sprint(got.freshChunks()) != "[33]" || !got.edgesMatch(nil) {
		t.Fatalf("%+v, %v", got, ok)
	}
	if again, ok := decodeInstall(&got); !ok || again.Index != 9 || again.CRC != c.CRC || again.State != c.State {
		t.Fatalf("%+v, %v", again, ok)
	}
	for what, change := range map[string]func(r *record){
		"two chunks":     func(r *record) { r.extra = binary.LittleEndian.AppendUint32(r.extra, 34) },
		"no chunk":       func(r *record) { r.extra = r.extra[:installSize] },
		"half a number":  func(r *record) { r.extra = r.extra[:installSize+2] },
		"short":          func(r *record) { r.extra = r.extra[:installSize-4] },
		"fewer blocks":   func(r *record) { r.crc = r.crc[:15] },
		"shorter":        func(r *record) { r.length -= blockSize; r.crc = r.crc[:15] },
		"not on a chunk": func(r *record) { r.off += blockSize },
		"with payload":   func(r *record) { r.payload = make([]byte, chunkSize) },
		"a FENCE":        func(r *record) { r.typ = recFence },
	} {
		if got, ok := read(make1(change)); ok {
			if _, ok := decodeInstall(&got); ok || what != "not on a chunk" {
				t.Errorf("%s: taken for a record: %+v", what, got)
			}
		}
	}
}

// The second place of a chunk that was installed where nothing was stays promised until
// a checkpoint, whatever becomes of entries on it.
func TestInstallInPlaceKeepsItsPromise(t *testing.T) {
	_, d, r := freshDisk(t, tinyFormat())
	mustInstall(t, r, wholeChunk(0, 0, 99))
	promised := func(when string, want int64) {
		t.Helper()
		r.mu.Lock()
		_, has := r.reserved[0]
		r.mu.Unlock()
		if got := d.Stat().Reserved / chunk; got != want || has != (want > 0) {
			t.Fatalf("%s: %d chunks are promised, this one: %v, want %d", when, got, has, want)
		}
	}
	promised("installed", 1)
	mustAppend(t, r, writeEntry(0, 1, 4096, 4096))
	if err := r.Truncate(0); err != nil {
		t.Fatal(err)
	}
	promised("an entry on it was dropped", 1)
	e := writeEntry(0, 1, 0, 2*chunkSize)
	e.CRC[20]++
	wantKind(t, r.Append([]Entry{e}), holdfast.ErrIntegrity)
	promised("an entry on it was refused", 1)
	mustInstall(t, r, wholeChunk(0, 0, 98))
	promised("installed again", 1)
	mustAppend(t, r, writeEntry(0, 1, 4096, 4096))
	mustApply(t, r)
	promised("a part moved it to its second place", 0)
	mustInstall(t, r, wholeChunk(5, 1, 97))
	mustInstall(t, r, Chunk{Index: 5, AsOf: 1})
	promised("installed, and zeroed", 0)
	mustInstall(t, r, wholeChunk(6, 1, 96))
	part := wholeChunk(6, 1, 95)
	part.State[3], part.CRC[3] = BlockZero, 0
	mustInstall(t, r, part)
	promised("installed, and again through the log", 0)
	mustInstall(t, r, wholeChunk(0, 1, 94))
	mustCheckpoint(t, d, r)
	promised("a checkpoint", 0)
	wantRead(t, r, 0, pattern(94, chunkSize))
}

// The place that a chunk had is not written while the install that replaced it can still
// be lost: an entry that was durable before it is applied then, and after a crash the
// chunk is what it was, or what was installed, with that entry upon it.
func TestInstallInPlaceNotYetDurable(t *testing.T) {
	for seed := range uint64(16) {
		fs, d, r := freshDisk(t, tinyFormat())
		mustAppend(t, r, writeEntry(0, 1, 0, chunkSize))
		mustCheckpoint(t, d, r)
		mustAppend(t, r, writeEntry(0, 2, 4096, 4096))
		mustSync(t, r)
		r.SetCommit(2)
		if err := d.settleCommits([]*Replica{r}); err != nil { // so that the apply need not
			t.Fatal(err)
		}
		mustInstall(t, r, wholeChunk(0, 1, 99))
		if _, err := r.Apply(t.Context(), 2); err != nil {
			t.Fatal(err)
		}
		was, is := pattern(1, chunkSize), pattern(99, chunkSize)
		for _, b := range [][]byte{was, is} {
			copy(b[4096:], pattern(2, 4096))
		}
		wantRead(t, r, 0, is)
		d, r = reopened(t, fs.Crash(seed))
		if got := mustRead(t, r, 0, chunkSize); !bytes.Equal(got, was) && !bytes.Equal(got, is) {
			t.Fatalf("seed %d: neither what it was nor what was installed", seed)
		}
		mustCheckpoint(t, d, r)
		if got := mustRead(t, r, 0, chunkSize); !bytes.Equal(got, was) && !bytes.Equal(got, is) {
			t.Fatalf("seed %d, after a checkpoint: neither what it was nor what was installed", seed)
		}
	}
}
