package disk

import (
	"strings"
	"syscall"
	"testing"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// fillUp appends writes to fresh chunks until the disk refuses, all committed,
// and returns the first entry that was refused.
func fillUp(t *testing.T, r *Replica) holdfast.Seq {
	t.Helper()
	for seq := r.Status().Tail + 1; ; seq++ {
		e := writeEntry(0, seq, int64(seq)*65536, 4096)
		e.Commit = seq - 1
		if err := r.Append([]Entry{e}); err != nil {
			wantKind(t, err, holdfast.ErrNoSpace)
			return seq
		}
		if seq%64 == 0 {
			mustSync(t, r)
		}
	}
}

// useFull does on a full disk all that must go on: overwrites of all, a trim,
// fences, checkpoints, reopening, a delete.
func useFull(t *testing.T, d *Disk, r *Replica, full holdfast.Seq, again func() *Disk) {
	t.Helper()
	if st := r.Status(); st.Tail != full-1 {
		t.Fatalf("tail %d after entry %d was refused", st.Tail, full)
	}
	seq := full
	write := func(off int64, n int) {
		e := writeEntry(0, seq, off, n)
		e.Commit = seq - 1
		mustAppend(t, r, e)
		seq++
	}
	for range 2 {
		for q := holdfast.Seq(1); q < full; q++ {
			write(int64(q)*65536, 65536) // blocks of the chunk that were never written
		}
		mustSync(t, r)
		r.SetCommit(seq - 1)
		if err := d.Checkpoint(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Fence(1); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = again()
	r, _ = d.Replica(r.Desc().Replica)
	for q := holdfast.Seq(1); q < full; q++ {
		wantRead(t, r, int64(q)*65536, pattern(seq-full+q, 65536))
	}
	mustAppend(t, r, Entry{Seq: seq, Commit: seq - 1, Type: OpTrim, Offset: 0, Length: 1 << 29})
	mustSync(t, r)
	r.SetCommit(seq)
	if err := d.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	seq++
	if st := d.Stat(); st.Used > 1<<20 || st.Reserved != 0 {
		t.Fatalf("after a trim of all: %+v", st)
	}
	write(65536, 65536) // there is room again
	if err := d.DeleteReplica(r.Desc().Replica); err != nil {
		t.Fatal(err)
	}
	if err := d.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	if st := d.Stat(); st.Failed != nil || st.Reserved != 0 {
		t.Fatalf("at the end: %+v", st)
	}
}

// A full file system below an image is not a failure of the disk.
func TestFullHost(t *testing.T) {
	fs := vfs.NewMemory(1)
	o := tinyFormat()
	o.Size = 64 << 20
	mustFormat(t, fs, testPath, o)
	fs.Limit(fs.Held() + 6<<20) // of the 64
	d := mustOpen(t, fs, testPath)
	r := mustCreate(t, d, 1, 1<<30)
	full := fillUp(t, r)
	if full < 30 || full > 100 {
		t.Fatalf("full after %d chunks of 64 KiB in 6 MiB", full)
	}
	if free := d.Stat().Capacity - d.Stat().Used; free < 32<<20 {
		t.Fatalf("the disk itself has %d bytes free", free)
	}
	useFull(t, d, r, full, func() *Disk { return mustOpen(t, fs, testPath) })
}

// After a crash on a full host logged entries find the space that the earlier
// life had taken for them, wherever it was.
func TestFullHostCrash(t *testing.T) {
	for seed := range uint64(8) {
		fs := vfs.NewMemory(seed)
		o := tinyFormat()
		o.Size = 64 << 20
		mustFormat(t, fs, testPath, o)
		fs.Limit(fs.Held() + 4<<20)
		d := mustOpen(t, fs, testPath)
		r := mustCreate(t, d, 1, 1<<30)
		full := fillUp(t, r)
		mustSync(t, r)
		for _, next := range []*vfs.Memory{fs.Restart(), fs.Crash(seed)} {
			d := mustOpen(t, next, testPath)
			r, _ := d.Replica(testDesc(1, 0).Replica)
			r.SetCommit(full - 1)
			if err := d.Checkpoint(t.Context()); err != nil {
				t.Fatal(err)
			}
			if st := r.Status(); st.Applied != full-1 {
				t.Fatalf("applied %d of %d", st.Applied, full-1)
			}
			for q := holdfast.Seq(1); q < full; q++ {
				wantRead(t, r, int64(q)*65536, pattern(q, 4096))
			}
		}
	}
}

// Credit is held for its replica alone, and what it covers is never refused.
func TestReserve(t *testing.T) {
	fs := vfs.NewMemory(1)
	o := tinyFormat()
	o.Size = 64 << 20
	mustFormat(t, fs, testPath, o)
	fs.Limit(fs.Held() + 6<<20)
	d := mustOpen(t, fs, testPath)
	mine, other := mustCreate(t, d, 1, 1<<30), mustCreate(t, d, 2, 1<<30)
	_, err := mine.Reserve(-1)
	wantKind(t, err, holdfast.ErrInvalid)
	if got, err := mine.Reserve(1<<20 + 1); err != nil || got != 1<<20+chunkSize {
		t.Fatalf("granted %d, %v", got, err)
	}
	if got, err := mine.Reserve(1 << 20); err != nil || got != 1<<20 {
		t.Fatalf("less: granted %d, %v", got, err)
	}
	fillUp(t, other)
	for seq := holdfast.Seq(1); seq <= 16; seq++ { // 16 chunks are 1 MiB
		e := writeEntry(0, seq, int64(seq)*65536*leafEntries, 4096)
		e.Commit = seq - 1
		mustAppend(t, mine, e)
	}
	if full := fillUp(t, mine); full > 17+16 { // what the credit held for the map is left over
		t.Fatalf("%d chunks beyond a credit of 16 on a full host", full-17)
	}
	got, err := mine.Reserve(32 << 20)
	wantKind(t, err, holdfast.ErrNoSpace)
	if got > 1<<20 {
		t.Fatalf("granted %d on a full host", got)
	}
	if got, err := mine.Reserve(0); err != nil || got != 0 {
		t.Fatalf("nothing: granted %d, %v", got, err)
	}
	fs.Limit(0)
	got, err = mine.Reserve(1 << 40)
	wantKind(t, err, holdfast.ErrNoSpace)
	if got < 16<<20 {
		t.Fatalf("granted %d of what is left of 64 MiB", got)
	}
	before := d.Stat().Reserved
	if err := d.DeleteReplica(mine.Desc().Replica); err != nil {
		t.Fatal(err)
	}
	if after := d.Stat().Reserved; after > before-got {
		t.Fatalf("%d bytes promised before the replica with a credit of %d was deleted, %d after", before, got, after)
	}
	_, err = mine.Reserve(1)
	wantKind(t, err, holdfast.ErrNotFound)
}

// Where space cannot be set aside, chunks are written without; an error of the
// call is an error of the disk.
func TestAllocateRefused(t *testing.T) {
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, smallFormat())
	fs.Inject(vfs.Fault{Op: vfs.OpAllocate, Err: syscall.EOPNOTSUPP})
	d := mustOpen(t, fs, testPath)
	r := mustCreate(t, d, 1, 1<<20)
	mustAppend(t, r, writeEntry(0, 1, 0, 65536))
	wantRead(t, r, 0, pattern(1, 65536))
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	fs.ClearFaults()
	fs.Inject(vfs.Fault{Op: vfs.OpAllocate, Err: syscall.EIO})
	_, err := Open(t.Context(), fs, testPath, Options{foreground: true})
	wantKind(t, err, holdfast.ErrIO)
}

// While the host's space must be spared, what needs a new chunk is refused before it is
// logged, and all else goes on; afterwards it is as before.
func TestMayGrow(t *testing.T) {
	fs := vfs.NewMemory(1)
	o := smallFormat()
	o.Size = 256 << 20
	mustFormat(t, fs, testPath, o)
	var low error
	d, err := Open(t.Context(), fs, testPath, Options{foreground: true, MayGrow: func(bool) error { return low }})
	if err != nil {
		t.Fatal(err)
	}
	r := mustCreate(t, d, 1, 128<<20)
	mustAppend(t, r, writeEntry(0, 1, 0, 4096))
	low = holdfast.Errorf(holdfast.ErrNoSpace, "8 MiB free")
	q := holdfast.Seq(2)
	for ; ; q++ { // what was taken already is used up
		err := r.Append([]Entry{writeEntry(0, q, int64(q)*chunkSize, 4096)})
		if err != nil {
			wantKind(t, err, holdfast.ErrNoSpace)
			if !strings.Contains(err.Error(), "8 MiB free") {
				t.Fatalf("it does not say why: %v", err)
			}
			break
		}
		if q > 1200 {
			t.Fatal("more was taken than had space")
		}
	}
	mustAppend(t, r, writeEntry(0, q, 0, 4096), Entry{Seq: q + 1, Type: OpTrim, Offset: chunkSize * 4, Length: chunkSize})
	mustSync(t, r)
	r.SetCommit(q + 1)
	if err := d.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	low = nil
	mustAppend(t, r, writeEntry(0, q+2, 100<<20, 1<<20))
	wantRead(t, r, 100<<20, pattern(q+2, 1<<20))
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// While the host's space must not be taken ahead of need, what has space is promised and
// no more; large writes take no fresh chunks that have none, and what needs a new chunk
// gets it.
func TestMayGrowAhead(t *testing.T) {
	fs := vfs.NewMemory(1)
	o := smallFormat()
	o.Size = 256 << 20
	mustFormat(t, fs, testPath, o)
	full := false
	d, err := Open(t.Context(), fs, testPath, Options{foreground: true, MayGrow: func(ahead bool) error {
		if ahead && full {
			return holdfast.Errorf(holdfast.ErrNoSpace, "93 %% in use")
		}
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	r := mustCreate(t, d, 1, 200<<20)
	mustAppend(t, r, writeEntry(0, 1, 0, 4096))
	full = true
	if err := r.Ahead(1 << 20); err != nil || r.Credit() != 16 {
		t.Fatalf("credit %d, %v: there was space for it", r.Credit(), err)
	}
	held := fs.Held()
	if err := r.Ahead(128 << 20); err != nil || r.Credit() != 16 {
		t.Fatalf("credit %d, %v: space was taken ahead of need", r.Credit(), err)
	}
	if more := fs.Held() - held; more != 0 {
		t.Errorf("%d bytes were taken ahead of need", more)
	}
	twice := 0
	for seq := holdfast.Seq(2); seq < 130; seq++ {
		e := writeEntry(0, seq, int64(seq)<<20, 1<<20)
		e.Commit = seq - 1
		mustAppend(t, r, e)
		if entryAt(t, r, seq).fresh == nil {
			twice++
		}
		if seq%8 == 0 {
			mustCheckpoint(t, d, r)
		}
		wantRead(t, r, e.Offset, e.Payload)
	}
	if twice == 0 {
		t.Error("fresh chunks were taken all the time")
	}
	full = false
	if err := r.Ahead(4 << 20); err != nil || r.Credit() != 64 {
		t.Fatalf("credit %d, %v", r.Credit(), err)
	}
}
