package disk

import (
	"errors"
	"path/filepath"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// stream writes the same MiB so many times, each with a checkpoint behind it.
func stream(t testing.TB, d *Disk, r *Replica, times int) {
	t.Helper()
	for range times {
		mustAppend(t, r, writeEntry(0, r.Status().Tail+1, 0, 16*chunkSize))
		mustCheckpoint(t, d, r)
	}
}

func (d *Disk) spareCount() int64 {
	d.alloc.mu.Lock()
	defer d.alloc.mu.Unlock()
	return int64(len(d.alloc.stillSpare()))
}

// wantHeld checks that the file system counts for the image what the disk says it has
// allocated, and what stands before its first chunk.
func wantHeld(t testing.TB, fs *vfs.Memory, d *Disk, before int64) {
	t.Helper()
	if got, want := fs.Held()-d.Stat().Allocated, before; got != want {
		t.Fatalf("%d bytes are held beside what the disk has allocated, want %d", got, want)
	}
}

// Large writes over the same place take and free as many chunks: they keep their space,
// nothing is taken from the host, and each chunk is one of few.
func TestSparesAreUsedAgain(t *testing.T) {
	fs, d, r := freshDisk(t, smallFormat())
	stream(t, d, r, 3)
	held, seen := fs.Held(), map[uint32]bool{}
	for range 20 {
		mustAppend(t, r, writeEntry(0, r.Status().Tail+1, 0, 16*chunkSize))
		for _, c := range wantFresh(t, r, r.Status().Tail, 16) {
			seen[c] = true
		}
		mustCheckpoint(t, d, r)
		if n := d.spareCount(); n > 16 {
			t.Fatalf("%d spares, for writes that take 16 chunks between two checkpoints", n)
		}
	}
	if n := d.spareCount(); n != 16 {
		t.Errorf("%d spares after a stream that takes 16 at a time", n)
	}
	if more := fs.Held() - held; more > 4*pageSize {
		t.Errorf("%d bytes more are held for what was written over 20 times", more)
	}
	wantRead(t, r, 0, pattern(r.Status().Tail, 16*chunkSize))
}

// They go back with the second checkpoint of a time without large writes; all is as exact
// as if there had been none.
func TestSparesGoBack(t *testing.T) {
	fs, d, r := freshDisk(t, smallFormat())
	stream(t, d, r, 3)
	before := fs.Held() - d.Stat().Allocated
	allocated := d.Stat().Allocated
	for i, want := range []int64{16, 0} {
		mustCheckpoint(t, d, r)
		if got := d.spareCount(); got != want {
			t.Fatalf("%d spares after %d checkpoints without a large write, want %d", got, i+1, want)
		}
		wantHeld(t, fs, d, before)
	}
	if got := d.Stat().Allocated; got != allocated-16*chunk {
		t.Errorf("%d bytes allocated, %d with the spares", got, allocated)
	}
	stream(t, d, r, 1)
	wantRead(t, r, 0, pattern(r.Status().Tail, 16*chunkSize))
}

// When the host's space must be spared, or it is full, they go back at once.
func TestNoSparesOnAHostThatIsLow(t *testing.T) {
	low := false
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, smallFormat())
	d, err := Open(t.Context(), fs, testPath, Options{ApplyEvery: -1, MayGrow: func(bool) error {
		if low {
			return errors.New("low")
		}
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	r := mustCreate(t, d, 1, 1<<30)
	stream(t, d, r, 3)
	before := fs.Held() - d.Stat().Allocated
	low = true
	mustAppend(t, r, writeEntry(0, r.Status().Tail+1, 0, 16*chunkSize))
	mustCheckpoint(t, d, r)
	if got := d.spareCount(); got != 0 {
		t.Errorf("%d spares on a host that is low on space", got)
	}
	wantHeld(t, fs, d, before)
}

// What was promised keeps its space, though it is a spare's.
func TestSparesThatArePromisedStay(t *testing.T) {
	_, d, r := freshDisk(t, smallFormat())
	stream(t, d, r, 3)
	d.alloc.mu.Lock()
	ready := d.alloc.ready - d.alloc.reserved - d.alloc.kept()
	d.alloc.mu.Unlock()
	mustCreate(t, d, 2, 1<<30)
	other, _ := d.Replica(testDesc(2, 0).Replica)
	if got, err := other.Reserve((ready - 8) * chunk); err != nil || got < (ready-8)*chunk {
		t.Fatalf("reserved %d bytes: %v", got, err)
	}
	d.dropSpares(0)
	d.alloc.mu.Lock()
	left, promised := d.alloc.ready, d.alloc.reserved+d.alloc.kept()
	d.alloc.mu.Unlock()
	if left < promised {
		t.Fatalf("%d chunks have space, and %d are promised or kept", left, promised)
	}
	if n := d.spareCount(); n == 0 || n == 16 {
		t.Errorf("%d of 16 spares are left, though some are promised, and some are not", n)
	}
}

// A file system that cannot punch: they stay chunks with space, and nobody tries for ever.
func TestSparesThatCannotBePunched(t *testing.T) {
	fs, d, r := freshDisk(t, smallFormat())
	stream(t, d, r, 3)
	ready := d.alloc.stat()
	fs.Inject(vfs.Fault{Op: vfs.OpPunch, Err: errors.ErrUnsupported})
	d.dropSpares(0)
	if now := d.alloc.stat(); now != ready || d.spareCount() != 0 {
		t.Errorf("%+v and %d spares, want %+v and none", now, d.spareCount(), ready)
	}
	if err := d.Stat().Failed; err != nil {
		t.Error(err)
	}
	fs.ClearFaults()
	stream(t, d, r, 2)
	fs.Inject(vfs.Fault{Op: vfs.OpPunch, Err: syscall.EIO})
	d.dropSpares(0)
	if d.Stat().Failed == nil {
		t.Error("an I/O error of a punch did not fail the disk")
	}
}

// The background gives spares back once large writes have stopped for a while, and not
// before.
func TestSparesWatch(t *testing.T) {
	_, d, r := freshDisk(t, smallFormat())
	now := time.Now()
	var w sparesWatch
	wait := func(by time.Duration) bool { now = now.Add(by); return w.idle(d.alloc, now) }
	if wait(0) || wait(time.Hour) {
		t.Fatal("idle without a spare")
	}
	stream(t, d, r, 3)
	if wait(time.Hour) {
		t.Error("idle just after a large write")
	}
	if wait(sparesIdle - 1) {
		t.Error("idle too soon")
	}
	mustAppend(t, r, writeEntry(0, r.Status().Tail+1, 0, 16*chunkSize))
	if wait(2) || wait(sparesIdle-1) {
		t.Error("idle, and there was a large write meanwhile")
	}
	if !wait(1) {
		t.Error("never idle")
	}
	d.dropSpares(0)
	if wait(time.Hour) {
		t.Error("idle though nothing is left to give back")
	}
}

// A disk that does all this by itself, and one that is closed.
func TestSparesInTheBackground(t *testing.T) {
	for name, end := range map[string]func(d *Disk){
		"idle": func(d *Disk) {
			time.Sleep(sparesIdle + time.Second) // no time but the bubble's
			synctest.Wait()
			if n := d.spareCount(); n > 0 {
				t.Errorf("%d spares are left", n)
			}
		},
		"closed": func(d *Disk) {
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fs := vfs.NewMemory(1)
				mustFormat(t, fs, testPath, smallFormat())
				d, err := Open(t.Context(), fs, testPath, Options{ApplyEvery: 20 * time.Millisecond})
				if err != nil {
					t.Fatal(err)
				}
				defer d.Close()
				r := mustCreate(t, d, 1, 1<<30)
				stream(t, d, r, 4)
				held := fs.Held()
				end(d)
				if back := held - fs.Held(); back < 16*chunk {
					t.Errorf("%d bytes went back, want those of 16 spares", back)
				}
			})
		})
	}
}

// What a process that was killed had taken for free chunks goes back after the next open.
func TestSweepAfterOpen(t *testing.T) {
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, smallFormat())
	d, err := Open(t.Context(), fs, testPath, Options{ApplyEvery: -1})
	if err != nil {
		t.Fatal(err)
	}
	before := fs.Held() - d.Stat().Allocated
	r := mustCreate(t, d, 1, 1<<30)
	stream(t, d, r, 3)
	if d.spareCount() == 0 {
		t.Fatal("no spares")
	}
	// The kernel goes on with what the process had done.
	next := fs.Restart()
	d.Abandon()
	d = mustOpen(t, next, testPath)
	d.sweepAfterOpen() // until it is done, whoever did it
	r, _ = d.Replica(testDesc(1, 0).Replica)
	wantRead(t, r, 0, pattern(r.Status().Tail, 16*chunkSize))
	if got := next.Held() - d.Stat().Allocated; got != before {
		t.Errorf("%d bytes are held beside what the disk has allocated, %d when it was new", got, before)
	}
	stream(t, d, r, 2)
	wantRead(t, r, 0, pattern(r.Status().Tail, 16*chunkSize))
}

// On a real file system: what du says, after a stream, after a kill in one, and after
// that.
func TestSparesOnFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	o := smallFormat()
	o.Size = 256 << 20
	mustFormat(t, vfs.OS{}, path, o)
	var tail holdfast.Seq
	for life := range 3 {
		d, err := Open(t.Context(), vfs.OS{}, path, Options{ApplyEvery: -1})
		if err != nil {
			t.Fatal(err)
		}
		d.sweepAfterOpen() // until it is done, whoever did it
		check := func(when string) {
			t.Helper()
			var st syscall.Stat_t
			if err := syscall.Stat(path, &st); err != nil {
				t.Fatal(err)
			}
			if diff := st.Blocks*512 - d.Stat().Allocated; diff < -1<<20 || diff > 1<<20 {
				t.Errorf("life %d, %s: the file system counts %d bytes more than the disk", life, when, diff)
			}
		}
		check("opened")
		r := mustCreate(t, d, 1, 64<<20)
		if got := r.Status().Tail; got != tail {
			t.Fatalf("the tail is %d, want %d", got, tail)
		}
		stream(t, d, r, 8)
		check("in a stream")
		if d.spareCount() == 0 {
			t.Error("no spares in a stream")
		}
		tail = r.Status().Tail
		wantRead(t, r, 0, pattern(tail, 16*chunkSize))
		if life == 0 {
			d.Abandon()
		} else if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
