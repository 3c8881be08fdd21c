package disk

import (
	"errors"
	"maps"
	"syscall"
	"testing"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// The tests of this file each hold one finding of a review of the crash, error
// and concurrency paths.

// After Close everything is refused as closed. It must not look like a failure
// of the disk: OnFail would have the disk recorded as FAILED for good.
func TestClosedIsNotFailed(t *testing.T) {
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, smallFormat())
	failed := make(chan error, 1)
	d, err := Open(t.Context(), fs, testPath, Options{ApplyEvery: -1, OnFail: func(err error) { failed <- err }})
	if err != nil {
		t.Fatal(err)
	}
	r := mustCreate(t, d, 1, 1<<20)
	mustAppend(t, r, writeEntry(0, 1, 0, 4096))
	mustSync(t, r)
	r.SetCommit(1)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	wantKind(t, d.Checkpoint(t.Context()), holdfast.ErrUnavailable)
	wantKind(t, r.Append([]Entry{writeEntry(0, 2, 0, 4096)}), holdfast.ErrUnavailable)
	wantKind(t, r.ReadAt(make([]byte, 4096), 0), holdfast.ErrUnavailable)
	wantKind(t, r.InstallChunk(Chunk{AsOf: 1}), holdfast.ErrUnavailable)
	wantKind(t, r.Fence(3), holdfast.ErrUnavailable)
	wantKind(t, r.Rebase(0, 1), holdfast.ErrUnavailable)
	wantKind(t, d.DeleteReplica(r.Desc().Replica), holdfast.ErrUnavailable)
	_, err = r.Apply(t.Context(), 1)
	wantKind(t, err, holdfast.ErrUnavailable)
	_, err = r.Sync(t.Context())
	wantKind(t, err, holdfast.ErrUnavailable)
	_, err = r.ReadChunk(0)
	wantKind(t, err, holdfast.ErrUnavailable)
	_, err = d.CreateReplica(testDesc(2, 1<<20))
	wantKind(t, err, holdfast.ErrUnavailable)
	if st := d.Stat(); st.Failed != nil {
		t.Fatalf("a closed disk says that it failed: %v", st.Failed)
	}
	if err := d.Close(); err != nil {
		t.Fatalf("close again: %v", err)
	}
	select {
	case err := <-failed:
		t.Fatalf("OnFail was called: %v", err)
	default:
	}
	if d := mustOpen(t, fs, testPath); d.Stat().MarkedFailed {
		t.Fatal("the disk is marked as failed")
	}
}

// A read that looked a block up before its replica was deleted, and whose chunk
// was given to another since, must not take the empty map for zeroes.
func TestReadBesideDelete(t *testing.T) {
	_, d := twoReplicas(t)
	r, _ := d.Replica(testDesc(0, 0).Replica)
	r.mu.RLock()
	src, _ := r.lookup(2)
	r.mu.RUnlock()
	if src.kind != fromChunk {
		t.Fatalf("block 2 is in no chunk: %+v", src)
	}
	if err := d.DeleteReplica(r.Desc().Replica); err != nil {
		t.Fatal(err)
	}
	if err := d.Checkpoint(t.Context()); err != nil { // punches its chunks
		t.Fatal(err)
	}
	wantKind(t, r.readRun(make([]byte, blockSize), []source{src}, 2), holdfast.ErrNotFound)
}

// A sync of the log that fails while the disk is opened has lost pages that the
// dead process had been promised: they are clean in the page cache now, and the
// next open's sync succeeds. What was acknowledged as received is gone, in the
// same boot; nothing may claim to be intact (R7, R12; ATC'20).
func TestFailedSyncAtOpenEndsIntact(t *testing.T) {
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, smallFormat())
	d := mustOpen(t, fs, testPath)
	r := mustCreate(t, d, 1, 1<<20)
	mustAppend(t, r, writeEntry(0, 1, 0, 4096))
	if err := r.DeclareIntact(0); err != nil {
		t.Fatal(err)
	}
	mustSync(t, r)
	mustAppend(t, r, writeEntry(0, 2, 0, 4096)) // received, not durable
	next := fs.Restart()
	next.Inject(vfs.Fault{Op: vfs.OpSync, Path: walDirSuffix, Times: 1, Err: syscall.EIO})
	_, err := Open(t.Context(), next, testPath, Options{foreground: true, OnFail: func(error) { t.Error("OnFail of a disk that was never opened") }})
	wantKind(t, err, holdfast.ErrIO)
	d = mustOpen(t, next, testPath)
	r, _ = d.Replica(testDesc(1, 0).Replica)
	if st := r.Status(); st.Intact || !d.Stat().MarkedFailed {
		t.Fatalf("entry 2 was received and the tail is %d, intact %v, marked %v", st.Tail, st.Intact, d.Stat().MarkedFailed)
	}
}

// In the boot that wrote it the log has no torn records but one: an unreadable
// record with others behind it is corruption, also where nothing says that it
// was durable. The log ends there, but it is not intact.
func TestCutInTheSameBootIsNotIntact(t *testing.T) {
	fs, d := twoReplicas(t)
	r, _ := d.Replica(testDesc(0, 0).Replica)
	if err := r.DeclareIntact(0); err != nil {
		t.Fatal(err)
	}
	mustSync(t, r)
	mustAppend(t, r, writeEntry(0, 5, 0, 8192))
	mustAppend(t, r, writeEntry(0, 6, 0, 8192))
	five, six := entryOf(t, d, 0, 5), entryOf(t, d, 0, 6)
	for _, c := range []struct {
		what   string
		e      *logEntry
		off    int64
		tail   holdfast.Seq
		intact bool
	}{
		{"head of 5", five, -20, 4, false},
		{"payload of 5", five, 5000, 4, false},
		// As the death of a process in the middle of its write leaves it.
		{"payload of 6", six, 5000, 5, true},
	} {
		after := fs.Restart()
		if err := after.FlipBit(walName(testPath, int(c.e.slot)), c.e.pos+c.off, 1); err != nil {
			t.Fatal(err)
		}
		d := mustOpen(t, after, testPath)
		r, _ := d.Replica(testDesc(0, 0).Replica)
		if st := r.Status(); st.Tail != c.tail || st.Intact != c.intact {
			t.Errorf("%s: tail %d, intact %v, want %d, %v", c.what, st.Tail, st.Intact, c.tail, c.intact)
		}
	}
}

// COMMIT records written by the background must leave what fences need: here
// the commit of one volume trickles while the uncommitted tail of another
// keeps the log full.
func TestTricklingCommitsLeaveRoomForFences(t *testing.T) {
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, tinyFormat())
	d := mustOpen(t, fs, testPath)
	orphan, busy := mustCreate(t, d, 1, 1<<20), mustCreate(t, d, 2, 1<<20)
	for seq := holdfast.Seq(1); seq <= 10; seq++ { // more than a quarter of the log: it stays
		mustAppend(t, orphan, writeEntry(0, seq, 0, 65536))
	}
	seq, err := holdfast.Seq(0), error(nil)
	for err == nil {
		seq++
		err = busy.Append([]Entry{writeEntry(0, seq, 0, 4096)})
	}
	wantKind(t, err, holdfast.ErrNoSpace)
	mustSync(t, busy)
	for c := holdfast.Seq(1); c < seq; c++ {
		busy.SetCommit(c)
		if _, err := busy.Apply(t.Context(), c); err != nil && !errors.Is(err, holdfast.ErrNoSpace) {
			t.Fatal(err)
		}
	}
	if err := orphan.Fence(1); err != nil {
		t.Fatalf("fence in a full log: %v", err)
	}
	if err := orphan.Truncate(0); err != nil {
		t.Fatalf("truncate in a full log: %v", err)
	}
	for range 2 { // the first makes the room for the commit, the second applies
		if err := d.Checkpoint(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if st := busy.Status(); st.Applied != seq-1 {
		t.Fatalf("applied %d of %d", st.Applied, seq-1)
	}
	mustAppend(t, busy, writeEntry(0, seq, 0, 4096))
}

// A sparse volume has a map page, and pages above it, for each chunk. What a
// write promises must include them: a checkpoint that finds no page for the map
// would end the disk.
func TestSparseWritesFillTheDisk(t *testing.T) {
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, tinyFormat())
	d := mustOpen(t, fs, testPath)
	r := mustCreate(t, d, 1, 1<<44)
	const stride = leafEntries * nodeEntries * chunkSize // each write in a leaf and a node of its own
	seq, err := holdfast.Seq(0), error(nil)
	for err == nil {
		seq++
		e := writeEntry(0, seq, int64(seq)*stride, 4096)
		e.Commit = seq - 1
		err = r.Append([]Entry{e})
	}
	wantKind(t, err, holdfast.ErrNoSpace)
	if seq < 100 {
		t.Fatalf("full after %d sparse writes", seq)
	}
	mustSync(t, r)
	r.SetCommit(seq - 1)
	for range 3 { // with the disk full: overwrites of all, each dirties the whole map
		if err := d.Checkpoint(t.Context()); err != nil {
			t.Fatal(err)
		}
		tail := r.Status().Tail
		for q := holdfast.Seq(1); q < seq; q++ {
			mustAppend(t, r, writeEntry(0, tail+q, int64(q)*stride, 4096))
		}
		mustSync(t, r)
		r.SetCommit(tail + seq - 1)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = mustOpen(t, fs, testPath)
	r, _ = d.Replica(testDesc(1, 0).Replica)
	tail := r.Status().Tail
	for q := holdfast.Seq(1); q < seq; q++ {
		wantRead(t, r, int64(q)*stride, pattern(tail-seq+1+q, 4096))
	}
}

// A punch that the host's file system has no room for costs space, not the disk.
func TestPunchWithoutRoom(t *testing.T) {
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, smallFormat())
	d := mustOpen(t, fs, testPath)
	r := mustCreate(t, d, 1, 1<<20)
	mustAppend(t, r, writeEntry(0, 1, 0, 65536))
	mustSync(t, r)
	r.SetCommit(1)
	if err := d.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	mustAppend(t, r, Entry{Seq: 2, Type: OpTrim, Offset: 0, Length: 65536})
	mustSync(t, r)
	r.SetCommit(2)
	fs.Inject(vfs.Fault{Op: vfs.OpPunch, Err: syscall.ENOSPC})
	if err := d.Checkpoint(t.Context()); err != nil {
		t.Fatalf("a punch refused for want of space: %v", err)
	}
	mustAppend(t, r, writeEntry(0, 3, 0, 65536))
	wantRead(t, r, 0, pattern(3, 65536))
}

// A disk of another cluster or node is refused with every byte as it was, on
// its image and its log.
func TestForeignDiskIsUntouched(t *testing.T) {
	for _, o := range []Options{
		{Cluster: holdfast.ClusterID{0xfe}},
		{Cluster: testCluster, Node: holdfast.NodeID{0xfe}},
		{Node: holdfast.NodeID{0xfe}},
	} {
		fs, d := twoReplicas(t)
		before := fs.Restart()
		_ = d
		wrote := 0
		before.Before(func(vfs.Op, string) { wrote++ })
		want := contents(t, before)
		_, err := Open(t.Context(), before, testPath, o)
		wantKind(t, err, holdfast.ErrRefused)
		if got := contents(t, before); wrote != 0 || !maps.Equal(got, want) {
			t.Fatalf("%+v: %d writes and syncs, same bytes %v", o, wrote, maps.Equal(got, want))
		}
		o = Options{Cluster: testCluster, Node: testNode, ApplyEvery: -1}
		ours, err := Open(t.Context(), before, testPath, o)
		if err != nil {
			t.Fatalf("our own disk: %v", err)
		}
		if err := ours.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// contents returns the bytes of a disk's files.
func contents(t *testing.T, fs vfs.FS) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, path := range []string{testPath, walName(testPath, 0), walName(testPath, 1), walName(testPath, 2), walName(testPath, 3)} {
		f, err := fs.OpenFile(path, 0)
		if err != nil {
			t.Fatal(err)
		}
		n, err := f.Size()
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, n)
		if _, err := f.ReadAt(b, 0); err != nil {
			t.Fatal(err)
		}
		all[path] = string(b)
		_ = f.Close()
	}
	return all
}

// While an apply maps a chunk its promise is taken and the map does not have it
// yet: an overwrite that comes just then is not one of a new chunk, which a full
// disk would refuse.
func TestOverwriteWhileItsChunkIsMapped(t *testing.T) {
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, tinyFormat())
	d, err := Open(t.Context(), fs, testPath, Options{foreground: true}) // nothing is applied unasked
	if err != nil {
		t.Fatal(err)
	}
	defer d.Abandon()
	r := mustCreate(t, d, 1, 1<<30)
	full := fillUp(t, r)
	chunk := int64(full - 1)
	if _, ok := r.reserved[chunk]; !ok {
		t.Fatal("the last chunk is not promised")
	}
	r.applying.Lock()
	defer r.applying.Unlock()
	e := mapEntry(r, chunk)
	if err := r.mapChunk(chunk, &e); err != nil {
		t.Fatal(err)
	}
	if _, _, err := r.admit([]Entry{writeEntry(0, full, chunk*chunkSize, 4096)}); err != nil {
		t.Fatalf("overwrite of the last chunk: %v", err)
	}
}
