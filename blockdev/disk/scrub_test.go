package disk

import (
	"context"
	"errors"
	"path/filepath"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

func mustScrub(t *testing.T, d *Disk) ScrubReport {
	t.Helper()
	got, err := d.Scrub(t.Context(), ScrubOptions{Rate: 1 << 40})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// TestScrub finds what changed on the medium, tells it as a read would, and finds
// nothing once it is mended.
func TestScrub(t *testing.T) {
	fs, d, good, bad := alike(t)
	want := ScrubReport{Total: 2 * chunkSize, Read: 2 * chunkSize}
	if got := mustScrub(t, d); got != want {
		t.Fatalf("a sound disk: %+v, want %+v", got, want)
	}
	rot(t, fs, bad, 3)
	rot(t, fs, bad, 15)
	if bad.Status().Bad != 0 {
		t.Fatal("found before anybody looked")
	}
	want.Bad = 2
	if got := mustScrub(t, d); got != want {
		t.Errorf("two blocks rotten: %+v, want %+v", got, want)
	}
	if bad.Status().Bad != 2 || good.Status().Bad != 0 || d.Stat().Repair.Found != 2 {
		t.Errorf("remembered: %d and %d, counted %d; want 2, 0, 2", bad.Status().Bad, good.Status().Bad, d.Stat().Repair.Found)
	}
	if told := bad.Bad(10, 0, time.Second); len(told) != 1 || told[0] != 0 {
		t.Errorf("to be told: %v, want chunk 0", told)
	}
	mustScrub(t, d)
	if n := d.Stat().Repair.Found; n != 2 {
		t.Errorf("found again, it counts as %d blocks", n)
	}
	if err := bad.Repair(mustReadChunk(t, good)); err != nil {
		t.Fatal(err)
	}
	want.Bad = 0
	if got := mustScrub(t, d); got != want || bad.Status().Bad != 0 {
		t.Errorf("mended: %+v, %d bad, want %+v", got, bad.Status().Bad, want)
	}

	// What nobody has is counted apart, and told too: a replica that was away may have it.
	lost := mustReadChunk(t, good)
	lost.State[7], lost.CRC[7] = BlockPoison, 0
	rot(t, fs, bad, 7)
	mustScrub(t, d)
	if err := bad.Repair(lost); err != nil {
		t.Fatal(err)
	}
	want.Lost = 1
	if got := mustScrub(t, d); got.Bad != 0 || got.Lost != 1 {
		t.Errorf("one block lost: %+v", got)
	}
}

// TestScrubUnreadable: sectors that cannot be read are bad blocks, and no failure of
// the disk.
func TestScrubUnreadable(t *testing.T) {
	fs, d, _, _ := alike(t)
	fs.Inject(vfs.Fault{Op: vfs.OpRead, Path: testPath, Err: syscall.EIO})
	got, err := d.Scrub(t.Context(), ScrubOptions{})
	if err != nil || got.Bad != 32 || d.Stat().Failed != nil {
		t.Errorf("got %+v, %v, failed %v; want 32 bad blocks", got, err, d.Stat().Failed)
	}
}

// TestScrubAfterACrash: chunks may hold more than the map says until the log is
// applied again: that is no damage.
func TestScrubAfterACrash(t *testing.T) {
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, tinyFormat())
	d := mustOpen(t, fs, testPath)
	r := mustCreate(t, d, 1, 1<<20)
	write := func(from holdfast.Seq) {
		for q := from; q < from+16; q++ {
			mustAppend(t, r, writeEntry(0, q, int64((q-from)*blockSize), blockSize))
		}
		mustSync(t, r)
		r.SetCommit(from + 15)
	}
	write(1)
	if err := d.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	write(17) // over the same blocks, in place
	if _, err := r.Apply(t.Context(), 32); err != nil {
		t.Fatal(err)
	}
	fs.Writeback(1)
	d = mustOpen(t, fs.Restart(), testPath)
	if got := mustScrub(t, d); got.Bad != 0 || got.Read == 0 {
		t.Errorf("after a crash: %+v", got)
	}
}

// TestScrubPace: a scrub keeps its rate, and ends when it is told to.
func TestScrubPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fs := vfs.NewMemory(1)
		mustFormat(t, fs, testPath, smallFormat())
		d, err := Open(t.Context(), fs, testPath, Options{foreground: true})
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		r := mustCreate(t, d, 1, 8<<20)
		for q := holdfast.Seq(1); q <= 64; q++ {
			mustAppend(t, r, writeEntry(0, q, int64(q-1)*chunkSize, blockSize))
		}
		mustSync(t, r)
		r.SetCommit(64)
		if err := d.Checkpoint(t.Context()); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		var last ScrubReport
		got, err := d.Scrub(t.Context(), ScrubOptions{Rate: 1 << 20, Progress: func(r ScrubReport) { last = r }})
		// The first chunk goes at once, and none is waited for behind the last.
		if took := time.Since(began); err != nil || got.Read != 4<<20 || took != 63*time.Second/16 || last != got {
			t.Errorf("4 MiB at 1 MiB/s: %+v after %v, %v; last told %+v", got, took, err, last)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 990*time.Millisecond)
		defer cancel()
		if got, err := d.Scrub(ctx, ScrubOptions{Rate: 1 << 20}); !errors.Is(err, holdfast.ErrTimeout) || got.Read != 1<<20 {
			t.Errorf("ended after a second: %+v, %v", got, err)
		}
		if _, err := d.Scrub(t.Context(), ScrubOptions{Rate: 1}); !errors.Is(err, holdfast.ErrInvalid) {
			t.Errorf("one byte a second: got %v", err)
		}
	})
}

// TestScrubBesideWork: replicas come, change and go while it runs.
func TestScrubBesideWork(t *testing.T) {
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, smallFormat())
	d, err := Open(t.Context(), fs, testPath, Options{ApplyEvery: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	done := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for ctx.Err() == nil {
			if got, err := d.Scrub(t.Context(), ScrubOptions{Rate: 1 << 40}); err != nil || got.Bad != 0 || got.Lost != 0 {
				done <- errors.Join(err, errors.New("bad blocks where there are none"))
				return
			}
		}
		done <- nil
	}()
	for n := range byte(20) {
		r := mustCreate(t, d, n, 4<<20)
		for q := holdfast.Seq(1); q <= 60; q++ {
			mustAppend(t, r, writeEntry(0, q, int64(q*7919%64)*chunkSize+int64(q%16)*blockSize, blockSize))
		}
		mustSync(t, r)
		r.SetCommit(60)
		if n%2 == 0 {
			if err := d.DeleteReplica(r.desc.Replica); err != nil {
				t.Fatal(err)
			}
		}
		if err := d.Checkpoint(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestAccounting: what a disk says it takes is what the file system counts for the
// image, within 1 MiB: the superblocks, and metadata that the file system counts
// with the file.
func TestAccounting(t *testing.T) {
	const tolerance = 1 << 20
	path := filepath.Join(t.TempDir(), "image")
	o := smallFormat()
	o.Size = 256 << 20
	mustFormat(t, vfs.OS{}, path, o)
	d, err := Open(t.Context(), vfs.OS{}, path, Options{ApplyEvery: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	r := mustCreate(t, d, 1, 64<<20)
	check := func(when string, mapped, reclaimable int64) {
		t.Helper()
		var st syscall.Stat_t
		if err := syscall.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		du, s := st.Blocks*512, d.Stat()
		if diff := du - s.Allocated; diff < -tolerance || diff > tolerance {
			t.Errorf("%s: the file system counts %d bytes, the disk %d", when, du, s.Allocated)
		}
		if s.Reclaimable != reclaimable || s.Used-s.Map-s.Reclaimable != mapped || r.Status().Used != mapped {
			t.Errorf("%s: %+v, replica uses %d; want %d mapped, %d reclaimable", when, s, r.Status().Used, mapped, reclaimable)
		}
	}
	seq := holdfast.Seq(0)
	apply := func() {
		t.Helper()
		mustSync(t, r)
		r.SetCommit(seq)
		if _, err := r.Apply(t.Context(), seq); err != nil {
			t.Fatal(err)
		}
	}
	check("new", 0, 0)
	for i := range int64(8) {
		for j := range int64(16) {
			seq++
			mustAppend(t, r, writeEntry(0, seq, i<<20+j*chunkSize, blockSize))
		}
	}
	apply()
	check("8 MiB mapped", 8<<20, 0)
	seq++
	mustAppend(t, r, Entry{Seq: seq, Type: OpTrim, Offset: 1 << 20, Length: 3 << 20})
	check("3 MiB trimmed and not applied", 8<<20, 0)
	apply()
	check("3 MiB trimmed", 5<<20, 3<<20)
	if err := d.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	check("given back", 5<<20, 0)
	if err := d.DeleteReplica(r.desc.Replica); err != nil {
		t.Fatal(err)
	}
	if s := d.Stat(); s.Reclaimable != 5<<20 {
		t.Errorf("the replica is deleted: %d bytes reclaimable, want 5 MiB", s.Reclaimable)
	}
}
