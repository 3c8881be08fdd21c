package disk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"sync/atomic"
	"testing"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

const testPath = "/disks/a"

var (
	testCluster = holdfast.ClusterID{0xc1}
	testNode    = holdfast.NodeID{0x0d}
	testDisk    = holdfast.DiskID{0xd1}
)

// smallFormat is a disk of 40 MiB with a WAL of 16 MiB.
func smallFormat() FormatOptions {
	return FormatOptions{Cluster: testCluster, Node: testNode, Disk: testDisk, Size: 40 << 20, WALSize: MinWALSize}
}

// tinyFormat has a WAL of 2 MiB in four files, so that it goes round soon.
func tinyFormat() FormatOptions {
	o := smallFormat()
	o.Size, o.WALSize, o.slotSize = 16<<20, 2<<20, 512<<10
	return o
}

func mustFormat(t testing.TB, fs vfs.FS, path string, o FormatOptions) {
	t.Helper()
	if err := Format(t.Context(), fs, path, o); err != nil {
		t.Fatalf("format: %v", err)
	}
}

func mustOpen(t testing.TB, fs vfs.FS, path string) *Disk {
	t.Helper()
	d, err := Open(t.Context(), fs, path, Options{ApplyEvery: -1})
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	t.Cleanup(func() { _ = d.Close() })
	return d
}

func testDesc(n byte, size int64) ReplicaDesc {
	return ReplicaDesc{
		Segment: holdfast.SegmentID{Volume: holdfast.VolumeID{0xee, n}, Index: uint32(n)},
		Replica: holdfast.ReplicaID{0xaa, n}, Lineage: holdfast.LineageID{1}, Size: size,
	}
}

func mustCreate(t testing.TB, d *Disk, n byte, size int64) *Replica {
	t.Helper()
	r, err := d.CreateReplica(testDesc(n, size))
	if err != nil {
		t.Fatalf("create replica %d: %v", n, err)
	}
	return r
}

func crcsOf(p []byte) []uint32 {
	var crcs []uint32
	for i := 0; i < len(p); i += blockSize {
		crcs = append(crcs, crc32.Checksum(p[i:i+blockSize], castagnoli))
	}
	return crcs
}

// pattern fills n bytes that tell seq and place.
func pattern(seq holdfast.Seq, n int) []byte {
	r := rand.New(rand.NewPCG(uint64(seq), 7))
	p := make([]byte, n)
	for i := 0; i < n; i += 512 {
		copy(p[i:], fmt.Sprintf("seq %d at %d: %x", seq, i, r.Uint64()))
	}
	return p
}

func writeEntry(epoch holdfast.Epoch, seq holdfast.Seq, off int64, n int) Entry {
	p := pattern(seq, n)
	return Entry{Epoch: epoch, Seq: seq, Type: OpWrite, Offset: off, Length: int64(n), CRC: crcsOf(p), Payload: p}
}

func mustAppend(t testing.TB, r *Replica, entries ...Entry) {
	t.Helper()
	if err := r.Append(entries); err != nil {
		t.Fatalf("append entry %d: %v", entries[0].Seq, err)
	}
}

func mustSync(t testing.TB, r *Replica) holdfast.Seq {
	t.Helper()
	dur, err := r.Sync(t.Context())
	if err != nil {
		t.Fatalf("sync: %v", err)
	}
	return dur
}

func mustRead(t testing.TB, r *Replica, off int64, n int) []byte {
	t.Helper()
	p := make([]byte, n)
	if err := r.ReadAt(p, off); err != nil {
		t.Fatalf("read %d bytes at %d: %v", n, off, err)
	}
	return p
}

func wantRead(t testing.TB, r *Replica, off int64, want []byte) {
	t.Helper()
	if got := mustRead(t, r, off, len(want)); !bytes.Equal(got, want) {
		t.Fatalf("read at %d: got %.40q, want %.40q", off, got, want)
	}
}

func wantKind(t testing.TB, err error, kind holdfast.Kind) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Fatalf("got error %v, want kind %q", err, kind)
	}
}

func TestWriteApplyReopen(t *testing.T) {
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, smallFormat())
	d := mustOpen(t, fs, testPath)
	r := mustCreate(t, d, 1, 1<<40)
	if err := r.Fence(3); err != nil {
		t.Fatal(err)
	}
	mustAppend(t, r, writeEntry(3, 1, 0, 8192), writeEntry(3, 2, 4096, 4096), writeEntry(3, 3, 1<<30, 1<<20))
	check := func(r *Replica) {
		t.Helper()
		wantRead(t, r, 0, pattern(1, 8192)[:4096])
		wantRead(t, r, 4096, pattern(2, 4096))
		wantRead(t, r, 1<<30, pattern(3, 1<<20))
		wantRead(t, r, 1<<20, make([]byte, 65536))
	}
	check(r)
	if dur := mustSync(t, r); dur != 3 {
		t.Fatalf("durable up to %d, want 3", dur)
	}
	r.SetCommit(2)
	if err := d.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	check(r)
	if st := r.Status(); st.Applied != 2 || st.Checkpoint != 2 || st.Tail != 3 || st.Dur != 3 {
		t.Fatalf("status %+v", st)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = mustOpen(t, fs, testPath)
	r, ok := d.Replica(testDesc(1, 0).Replica)
	if !ok {
		t.Fatal("the replica is gone")
	}
	check(r)
	st := r.Status()
	if st.Fence != 3 || st.Tail != 3 || st.Dur != 3 || st.Applied != 2 || st.Commit != 2 || len(st.EpochTails) != 1 || st.EpochTails[0] != (EpochStart{3, 1}) {
		t.Fatalf("status after reopening %+v", st)
	}
	if d.Stat().OpenCount != 2 {
		t.Fatalf("open count %d, want 2", d.Stat().OpenCount)
	}
	got, err := r.Entries(1, 1<<30)
	if err != nil || len(got) != 3 || !bytes.Equal(got[2].Payload, pattern(3, 1<<20)) {
		t.Fatalf("entries: %d of 3, %v", len(got), err)
	}
}

func TestOSFiles(t *testing.T) {
	path := t.TempDir() + "/image"
	mustFormat(t, vfs.OS{}, path, smallFormat())
	d := mustOpen(t, vfs.OS{}, path)
	if _, err := Open(t.Context(), vfs.OS{}, path, Options{}); !errors.Is(err, holdfast.ErrRefused) {
		t.Fatalf("second open: got %v, want refused", err)
	}
	r := mustCreate(t, d, 1, 1<<30)
	for seq := holdfast.Seq(1); seq <= 3000; seq++ {
		e := writeEntry(0, seq, int64(seq%300)*16384, 16384)
		e.Commit = seq - 1
		mustAppend(t, r, e)
	}
	mustSync(t, r)
	if st := r.Status(); st.Tail != 3000 || st.Dur != 3000 || st.Checkpoint == 0 {
		t.Fatalf("status %+v", st)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = mustOpen(t, vfs.OS{}, path)
	r, _ = d.Replica(testDesc(1, 0).Replica)
	for seq := holdfast.Seq(2701); seq <= 3000; seq++ {
		wantRead(t, r, int64(seq%300)*16384, pattern(seq, 16384))
	}
}

func TestTruncateBringsBackWhatWasThere(t *testing.T) {
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, smallFormat())
	d := mustOpen(t, fs, testPath)
	r := mustCreate(t, d, 1, 1<<30)
	mustAppend(t, r, writeEntry(0, 1, 0, 8192), writeEntry(0, 2, 4096, 8192), Entry{Seq: 3, Type: OpTrim, Offset: 0, Length: 1 << 30})
	wantRead(t, r, 0, make([]byte, 16384))
	if err := r.Truncate(2); err != nil {
		t.Fatal(err)
	}
	wantRead(t, r, 4096, pattern(2, 8192))
	if err := r.Truncate(1); err != nil {
		t.Fatal(err)
	}
	wantRead(t, r, 0, pattern(1, 8192))
	wantRead(t, r, 8192, make([]byte, 4096))
	r.SetCommit(1)
	if _, err := r.Apply(context.Background(), 1); err != nil {
		t.Fatal(err)
	}
	wantKind(t, r.Truncate(0), holdfast.ErrRefused)
	for _, again := range []*vfs.Memory{fs.Restart(), fs.Crash(5)} {
		d := mustOpen(t, again, testPath)
		r, _ := d.Replica(testDesc(1, 0).Replica)
		wantRead(t, r, 0, pattern(1, 8192))
		wantRead(t, r, 8192, make([]byte, 4096))
		if st := r.Status(); st.Tail != 1 {
			t.Fatalf("tail %d, want 1", st.Tail)
		}
	}
}

// A disk that is abandoned is not written to any more, and loses nothing.
func TestAbandon(t *testing.T) {
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, smallFormat())
	d, err := Open(t.Context(), fs, testPath, Options{ApplyEvery: -1})
	if err != nil {
		t.Fatal(err)
	}
	r := mustCreate(t, d, 1, 1<<20)
	mustAppend(t, r, writeEntry(0, 1, 0, 8192))
	mustSync(t, r)
	r.SetCommit(1)
	var writes atomic.Int32
	fs.Before(func(op vfs.Op, _ string) {
		if op == vfs.OpWrite || op == vfs.OpSync {
			writes.Add(1)
		}
	})
	d.Abandon()
	d.Abandon()
	if n := writes.Load(); n != 0 {
		t.Errorf("%d writes and syncs of a disk that is abandoned", n)
	}
	wantKind(t, r.Append([]Entry{writeEntry(0, 2, 0, 4096)}), holdfast.ErrUnavailable)
	if err := d.Close(); err != nil {
		t.Errorf("close after it: %v", err)
	}
	fs.Before(nil)
	back := mustOpen(t, fs, testPath)
	wantRead(t, back.Replicas()[0], 0, pattern(1, 8192))
}
