package disk

import (
	"bytes"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// rewriteSuper changes the superblock of a disk that nobody has open, as another
// release would have written it.
func rewriteSuper(t testing.TB, fs vfs.FS, change func(*superblock)) {
	t.Helper()
	f, err := fs.OpenFile(testPath, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close() //nolint:errcheck // synced
	s, err := readSuperblock(f)
	if err != nil {
		t.Fatal(err)
	}
	change(s)
	if err := writeSuperblock(f, s); err != nil {
		t.Fatal(err)
	}
}

// bytesOf returns all bytes of a disk's files.
func bytesOf(t testing.TB, fs vfs.FS) map[string][]byte {
	t.Helper()
	all := map[string][]byte{}
	for _, path := range goldenFiles() {
		f, err := fs.OpenFile(path, 0)
		if err != nil {
			t.Fatal(err)
		}
		size, err := f.Size()
		if err != nil {
			t.Fatal(err)
		}
		all[path] = make([]byte, size)
		if _, err := f.ReadAt(all[path], 0); err != nil {
			t.Fatal(err)
		}
		_ = f.Close()
	}
	return all
}

// wantUntouched runs do and wants no write, no sync and no other byte after it.
func wantUntouched(t *testing.T, fs *vfs.Memory, do func()) {
	t.Helper()
	before, held := bytesOf(t, fs), fs.Held()
	var ops atomic.Int32
	fs.Before(func(vfs.Op, string) { ops.Add(1) })
	do()
	fs.Before(nil)
	if n := ops.Load(); n != 0 {
		t.Errorf("%d writes and syncs of a disk that is read alone", n)
	}
	for path, b := range bytesOf(t, fs) {
		if !bytes.Equal(b, before[path]) {
			t.Errorf("%s was changed", path)
		}
	}
	if fs.Held() != held {
		t.Errorf("%d bytes held, %d before", fs.Held(), held)
	}
}

// Unknown compat features: the disk is used, and the word is kept.
func TestUnknownCompat(t *testing.T) {
	fs := goldenDisk(t)
	rewriteSuper(t, fs, func(s *superblock) { s.compat = 1<<40 | 1 })
	d := mustOpen(t, fs, testPath)
	r, _ := d.Replica(testDesc(1, 0).Replica)
	mustAppend(t, r, writeEntry(2, 6, 0, 4096))
	mustSync(t, r)
	if d.Stat().ReadOnly != nil {
		t.Fatalf("read only: %v", d.Stat().ReadOnly)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	f, err := fs.OpenFile(testPath, 0)
	if err != nil {
		t.Fatal(err)
	}
	if s, err := readSuperblock(f); err != nil || s.compat != 1<<40|1 {
		t.Fatalf("the compat word after two opens: %+v, %v", s, err)
	}
}

// Unknown incompat features and other versions: not a byte is touched, and the
// error names what is unknown.
func TestUnknownIncompatAndVersion(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*superblock)
		want   string
	}{
		{"incompat", func(s *superblock) { s.incompat = 1 << 40 }, "incompat features 40 (0x10000000000)"},
		{"both words", func(s *superblock) { s.incompat, s.roCompat = 3, 4 }, "incompat features 0, 1 (0x3)"},
		{"version 2", func(s *superblock) { s.version = 2 }, "version 2, and this program reads version 1"},
		{"version 0", func(s *superblock) { s.version = 0 }, "version 0, and this program reads version 1"},
		{"version 2, changed layout", func(s *superblock) { s.version, s.slots, s.chunks = 2, 0, -1 }, "version 2, and this program reads version 1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			fs := goldenDisk(t)
			rewriteSuper(t, fs, c.change)
			wantUntouched(t, fs, func() {
				_, err := Open(t.Context(), fs, testPath, Options{})
				wantKind(t, err, holdfast.ErrUnsupported)
				if !strings.Contains(err.Error(), c.want) {
					t.Errorf("open: got %q, want it to name %q", err, c.want)
				}
				_, err = Check(t.Context(), fs, testPath, nil)
				wantKind(t, err, holdfast.ErrUnsupported)
				o := tinyFormat()
				wantKind(t, Format(t.Context(), fs, testPath, o), holdfast.ErrRefused)
			})
		})
	}
	// A copy of the next version beside one of this: an upgrade that was cut short
	// had begun, so this program must not go on.
	fs := goldenDisk(t)
	b := page(t, fs, testPath, superB, nil)
	s, err := decodeSuperblock(b)
	if err != nil {
		t.Fatal(err)
	}
	s.version = 2
	page(t, fs, testPath, superB, s.encode())
	_, err = Open(t.Context(), fs, testPath, Options{})
	wantKind(t, err, holdfast.ErrUnsupported)
}

// Unknown ro_compat features: read alone, with all that the log holds, and every
// call that would change something is refused and names the features.
func TestUnknownRoCompat(t *testing.T) {
	fs := goldenDisk(t) // with an install and entries beyond its checkpoint
	count := holdfast.OpenCount(0)
	rewriteSuper(t, fs, func(s *superblock) { s.roCompat = 1<<40 | 1; count = s.openCount })
	wantUntouched(t, fs, func() {
		d, err := Open(t.Context(), fs, testPath, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if st := d.Stat(); st.ReadOnly == nil || st.OpenCount != count || st.Replicas != 1 || st.Failed != nil {
			t.Errorf("stat %+v", st)
		}
		readsGolden(t, d)
		mutates(t, d)
		readsGolden(t, d)
		if err := d.Touch(); err != nil {
			t.Error(err)
		}
		if st := d.Stat(); st.Failed != nil {
			t.Errorf("failed: %v", st.Failed)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		c, err := Check(t.Context(), fs, testPath, nil)
		if err != nil || c.Found != 0 || c.ReadOnly == nil || c.Stat.Replicas != 1 {
			t.Errorf("check: %+v, %v", c, err)
		}
	})
	rewriteSuper(t, fs, func(s *superblock) { s.roCompat = 0 }) // nothing came in the way of the release that knows it
	readsGolden(t, mustOpen(t, fs, testPath))
}

// readsGolden reads what goldenDisk wrote.
func readsGolden(t *testing.T, d *Disk) {
	t.Helper()
	r, ok := d.Replica(testDesc(1, 0).Replica)
	if !ok {
		t.Fatal("the replica is gone")
	}
	if st := r.Status(); st.Fence != 2 || st.Tail != 5 || st.Checkpoint != 3 || st.HintISR != 9 || st.Damaged != nil || st.First != 1 {
		t.Errorf("%+v", st)
	}
	want := pattern(1, 65536)
	clear(want[4096:12288])
	wantRead(t, r, 7*65536, want) // the install, whose place is in the log
	copy(want[16384:], pattern(4, 4096))
	wantRead(t, r, 0, want)
	wantRead(t, r, 1<<29, make([]byte, 8192))
	es, err := r.Entries(1, 1<<20)
	if err != nil || len(es) != 5 || !bytes.Equal(es[3].Payload, pattern(4, 4096)) {
		t.Errorf("%d entries, %v", len(es), err)
	}
}

// mutates tries everything that would change a disk.
func mutates(t *testing.T, d *Disk) {
	t.Helper()
	r, _ := d.Replica(testDesc(1, 0).Replica)
	c := Chunk{Index: 1, AsOf: 5, LastSeq: 5}
	c.State[0] = BlockPoison
	for what, do := range map[string]func() error{
		"append":         func() error { return r.Append([]Entry{writeEntry(2, 6, 0, 4096)}) },
		"sync":           func() error { _, err := r.Sync(t.Context()); return err },
		"fence":          func() error { return r.Fence(9) },
		"truncate":       func() error { return r.Truncate(4) },
		"truncate (all)": func() error { return r.Truncate(5) },
		"rebase":         func() error { return r.Rebase(2, 9) },
		"install":        func() error { return r.InstallChunk(c) },
		"repair":         func() error { return r.Repair(c) },
		"hint":           func() error { return r.SetHint(9, 9) },
		"intact":         func() error { return r.DeclareIntact(2) },
		"reserve":        func() error { _, err := r.Reserve(1 << 20); return err },
		"apply":          func() error { r.SetCommit(5); _, err := r.Apply(t.Context(), 5); return err },
		"read chunk":     func() error { _, err := r.ReadChunk(0); return err },
		"chunks":         func() error { _, err := r.Chunks(0, -1, 9); return err },
		"create":         func() error { _, err := d.CreateReplica(testDesc(2, 1<<20)); return err },
		"delete":         func() error { return d.DeleteReplica(r.Desc().Replica) },
		"checkpoint":     func() error { return d.Checkpoint(t.Context()) },
	} {
		err := do()
		if holdfast.KindOf(err) != holdfast.ErrUnsupported || !strings.Contains(fmt.Sprint(err), "ro_compat features 0, 40 (0x10000000001)") {
			t.Errorf("%s: got %v", what, err)
		}
	}
	// Below them, no file of the disk takes a change.
	for _, f := range []vfs.File{d.main, d.base, d.wal.slots[1].file} {
		_, err := f.WriteAt(make([]byte, 4096), 0)
		for _, err := range []error{err, f.WritevAt([][]byte{zeroPage[:]}, 0), f.Sync(), f.Truncate(1), f.Allocate(0, 4096), f.PunchHole(0, 4096)} {
			wantKind(t, err, holdfast.ErrUnsupported)
		}
	}
}

// Damage is told of a disk that is read alone as of any other: a payload of the
// log, a block of an install that is read from there, or from its place.
func TestReadOnlyTellsOfDamage(t *testing.T) {
	var install, place int64
	for _, f := range scanSlot(logOf(t, goldenDisk(t)), 0, seedOf(testDisk)) {
		switch {
		case f.typ != recInstall:
		case f.flags&flagFresh == 0:
			install = f.pos
		default:
			place = headerArea + int64(f.freshChunks()[0])*chunkSize
		}
	}
	for _, c := range []struct {
		name  string
		file  string
		pos   int64
		where int64 // in the segment
	}{
		{"install", walName(testPath, 0), install + 3*blockSize + 5, 7*chunkSize + 5*blockSize}, // its blocks 1 and 2 are zero
		{"install in place", testPath, place + 3*blockSize + 5, 8*chunkSize + 3*blockSize},
		{"write", walName(testPath, 0), lastWrite(t, goldenDisk(t)), 16384},
	} {
		fs := goldenDisk(t)
		if err := fs.FlipBit(c.file, c.pos, 1); err != nil {
			t.Fatal(err)
		}
		rewriteSuper(t, fs, func(s *superblock) { s.roCompat = 2 })
		d := mustOpen(t, fs, testPath)
		r, _ := d.Replica(testDesc(1, 0).Replica)
		err := r.ReadAt(make([]byte, blockSize), c.where)
		wantKind(t, err, holdfast.ErrIntegrity)
		wantRead(t, r, 7*chunkSize+4*blockSize, pattern(1, 65536)[4*blockSize:5*blockSize])
	}
}

// lastWrite is the place in the first WAL file of entry 4's payload.
func lastWrite(t *testing.T, fs vfs.FS) int64 {
	for _, f := range scanSlot(logOf(t, fs), 0, seedOf(testDisk)) {
		if f.typ == recWrite && f.seq == 4 {
			return f.pos
		}
	}
	t.Fatal("entry 4 is not in the first file")
	return 0
}

// A superblock that both lost its last write, or was put back, is told by the log.
func TestSuperblockOlderThanLog(t *testing.T) {
	fs, d := twoReplicas(t)
	before := bytesOf(t, fs)[testPath]
	r, _ := d.Replica(testDesc(0, 0).Replica)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = mustOpen(t, fs, testPath)
	r, _ = d.Replica(r.Desc().Replica)
	mustAppend(t, r, writeEntry(0, 5, 0, 4096))
	mustSync(t, r)
	after := fs.Restart()
	page(t, after, testPath, superA, before[superA:][:superSize])
	mustOpen(t, after.Restart(), testPath) // one copy is of the last open
	page(t, after, testPath, superB, before[superB:][:superSize])
	_, err := Open(t.Context(), after, testPath, Options{})
	wantKind(t, err, holdfast.ErrIntegrity)
	_, err = Check(t.Context(), after, testPath, nil)
	wantKind(t, err, holdfast.ErrIntegrity)
}
