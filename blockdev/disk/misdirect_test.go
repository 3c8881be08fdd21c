package disk

import (
	"fmt"
	"testing"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// A record that was written to a file of the log that is free, and not where it belongs,
// counts where it is. It keeps that file no longer than the entry would have kept its
// own: the log goes round, also while the entry waits for its commit.
func TestMisdirectedRecord(t *testing.T) {
	for entry := holdfast.Seq(171); entry <= 174; entry++ {
		for ahead := 1; ahead <= 3; ahead++ {
			misdirectRecord(t, fmt.Sprintf("entry %d to the file %d ahead", entry, ahead), entry, ahead)
		}
	}
}

// misdirectRecord moves the record of an entry, one of those behind a checkpoint, to the
// beginning of a file: elsewhere it may be taken for part of an older record's payload,
// and is lost.
func misdirectRecord(t *testing.T, what string, entry holdfast.Seq, ahead int) {
	t.Helper()
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, tinyFormat())
	open := func() (*Disk, *Replica) {
		t.Helper()
		d, err := Open(t.Context(), fs, testPath, Options{foreground: true})
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		r, _ := d.Replica(testDesc(1, 0).Replica)
		return d, r
	}
	d, _ := open()
	r := mustCreate(t, d, 1, 4<<20)
	write := func(q holdfast.Seq) {
		mustAppend(t, r, writeEntry(0, q, int64(q%13)*chunkSize, 4*blockSize))
		mustSync(t, r)
	}
	for q := holdfast.Seq(1); q <= 170; q++ { // twice round
		write(q)
		r.SetCommit(q)
	}
	if err := d.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	for q := holdfast.Seq(171); q <= 174; q++ {
		write(q)
	}
	if free := d.wal.freeSlots(); free != 3 {
		t.Fatalf("%d files are free", free)
	}
	e := r.index.get(entry)
	from := e.pos / vfs.PageSize * vfs.PageSize
	b := make([]byte, pageUp(e.recordBytes()))
	right, wrong := d.wal.slots[e.slot].file, d.wal.slots[(int(e.slot)+ahead)%4].file
	if _, err := right.ReadAt(b, from); err != nil {
		t.Fatal(err)
	}
	if _, err := wrong.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := right.WriteAt(make([]byte, len(b)), from); err != nil {
		t.Fatal(err)
	}
	d.closeFiles()
	fs = fs.Restart()
	d, r = open()
	want := func() {
		t.Helper()
		if st := r.Status(); st.Damaged != nil || st.Tail != 174 || st.BadEntry != 0 {
			t.Fatalf("%s: %+v", what, st)
		}
		for q := holdfast.Seq(171); q <= 174; q++ {
			wantRead(t, r, int64(q%13)*chunkSize, pattern(q, 4*blockSize))
		}
	}
	want()
	other := mustCreate(t, d, 2, 4<<20)
	for q := holdfast.Seq(1); q <= 400; q++ { // the others go on, five times round
		if err := other.Append([]Entry{writeEntry(0, q, int64(q%13)*chunkSize, 4*blockSize)}); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		mustSync(t, other)
		other.SetCommit(q)
	}
	want()
	d.closeFiles()
	fs = fs.Restart()
	d, r = open()
	want()
	r.SetCommit(174)
	other, _ = d.Replica(other.desc.Replica)
	other.SetCommit(400)
	if err := d.Checkpoint(t.Context()); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	if free := d.wal.freeSlots(); free != 3 {
		t.Fatalf("%s: %d files are free of what is applied", what, free)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	wantClean(t, what, fs, testPath)
}

// A log that has no room for commits, since what was kept for them is taken, is no
// dead end: a checkpoint tells them.
func TestCommitsWithoutRoom(t *testing.T) {
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, tinyFormat())
	d, err := Open(t.Context(), fs, testPath, Options{foreground: true})
	if err != nil {
		t.Fatal(err)
	}
	r := mustCreate(t, d, 1, 4<<20)
	full := holdfast.Seq(0)
	for err == nil {
		full++
		err = r.Append([]Entry{writeEntry(0, full, int64(full%13)*chunkSize, 4*blockSize)})
	}
	wantKind(t, err, holdfast.ErrNoSpace)
	mustSync(t, r)
	r.SetCommit(full - 1)
	reserve := d.wal.reserve
	d.wal.reserve = d.wal.size() * 8
	var crashes []*vfs.Memory
	fs.Before(func(vfs.Op, string) { crashes = append(crashes, fs.Crash(uint64(len(crashes)))) })
	if err := d.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	fs.Before(nil)
	d.wal.reserve = reserve
	if st := r.Status(); st.Checkpoint != full-1 || d.wal.freeSlots() != 3 {
		t.Fatalf("%d files are free, status %+v", d.wal.freeSlots(), st)
	}
	mustAppend(t, r, writeEntry(0, full, int64(full%13)*chunkSize, 4*blockSize))
	for i, fs := range append(crashes, fs.Restart()) {
		d := mustOpen(t, fs, testPath)
		r, _ := d.Replica(testDesc(1, 0).Replica)
		st := r.Status()
		if st.Tail < full-1 || st.Damaged != nil || st.Applied > st.Commit {
			t.Fatalf("crash %d: %+v", i, st)
		}
		for q := full - 13; q < full; q++ {
			if q > st.Tail-13 {
				wantRead(t, r, int64(q%13)*chunkSize, pattern(q, 4*blockSize))
			}
		}
		// What a checkpoint has called committed may be in chunks, and is not cut off.
		if err := r.Truncate(full - 2); (err != nil) != (st.Commit == full-1) {
			t.Fatalf("crash %d: commit %d, cut to %d: %v", i, st.Commit, full-2, err)
		}
	}
}
