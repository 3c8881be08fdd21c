package disk

import (
	"encoding/binary"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// slowLeaves is a file system on which reads of one map's leaves stop after some, until
// they are let go.
type slowLeaves struct {
	vfs.FS
	mu      sync.Mutex
	on      bool
	of      holdfast.ReplicaID
	left    int
	stopped chan struct{} // closed when a read has stopped
	goOn    chan struct{}
}

// stopAfter lets n leaves of a replica be read from now on.
func (s *slowLeaves) stopAfter(of *Replica, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.on, s.of, s.left, s.stopped, s.goOn = true, of.desc.Replica, n, make(chan struct{}), make(chan struct{})
}

func (s *slowLeaves) OpenFile(path string, flags vfs.Flag) (vfs.File, error) {
	f, err := s.FS.OpenFile(path, flags)
	return &slowFile{f, s}, err
}

type slowFile struct {
	vfs.File
	fs *slowLeaves
}

func (f *slowFile) ReadAt(p []byte, off int64) (int, error) {
	n, err := f.File.ReadAt(p, off)
	le := binary.LittleEndian
	if err != nil || len(p) != pageSize || le.Uint32(p) != pageMagic || le.Uint32(p[24:]) != 0 {
		return n, err
	}
	s := f.fs
	s.mu.Lock()
	on := s.on && holdfast.ReplicaID(p[8:24]) == s.of
	stop := on && s.left <= 0
	if on {
		if s.left--; s.left == -1 {
			close(s.stopped)
		}
	}
	goOn := s.goOn
	s.mu.Unlock()
	if stop {
		<-goOn
	}
	return n, err
}

// leafy makes a replica with a chunk in each of n leaves, as of a checkpoint.
func leafy(t *testing.T, d *Disk, n byte, leaves int64) *Replica {
	t.Helper()
	r := mustCreate(t, d, n, leaves*leafEntries*chunkSize)
	for i := range leaves {
		mustAppend(t, r, writeEntry(0, holdfast.Seq(i+1), i*leafEntries*chunkSize, blockSize))
	}
	mustSync(t, r)
	r.SetCommit(holdfast.Seq(leaves))
	if err := d.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	return r
}

// While the leaves of a large replica are read that was deleted, or begins anew, the
// others append, sync, apply and checkpoint, and replicas are made and deleted. A crash
// on the way loses nothing and leaks nothing.
func TestReleaseGivesWay(t *testing.T) {
	for _, what := range []string{"delete", "anew"} {
		t.Run(what, func(t *testing.T) {
			mem := vfs.NewMemory(1)
			fs := &slowLeaves{FS: mem}
			o := smallFormat()
			o.Size = 128 << 20
			mustFormat(t, fs, testPath, o)
			d, err := Open(t.Context(), fs, testPath, Options{ApplyEvery: -1, cacheLeaves: 5})
			if err != nil {
				t.Fatal(err)
			}
			other, small := leafy(t, d, 1, 3), leafy(t, d, 3, 2)
			used := d.Stat().Used
			large := leafy(t, d, 2, 300)
			fs.stopAfter(large, 20)
			var wg sync.WaitGroup
			wg.Go(func() {
				var err error
				if what == "delete" {
					err = d.DeleteReplica(large.Desc().Replica)
				} else {
					large.mu.Lock()
					large.damage("a test says so")
					large.mu.Unlock()
					err = large.Rebase(0, 1000)
				}
				if err != nil {
					t.Error(err)
				}
			})
			<-fs.stopped
			mustAppend(t, other, writeEntry(0, 4, 0, 8192))
			mustSync(t, other)
			other.SetCommit(4)
			if applied, err := other.Apply(t.Context(), 4); err != nil || applied != 4 {
				t.Fatalf("applied %d, %v", applied, err)
			}
			for range 2 {
				if err := d.Checkpoint(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			if st := other.Status(); st.Checkpoint != 4 {
				t.Fatalf("checkpoint at %d", st.Checkpoint)
			}
			if err := d.DeleteReplica(small.Desc().Replica); err != nil {
				t.Fatal(err)
			}
			mustCreate(t, d, 4, 1<<20)
			crash := mem.Crash(1)
			close(fs.goOn)
			wg.Wait()
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			for _, left := range []*vfs.Memory{mem, crash} {
				wantClean(t, "before", left, testPath)
				d, err := Open(t.Context(), left, testPath, Options{foreground: true, cacheLeaves: 5})
				if err != nil {
					t.Fatal(err)
				}
				other, _ := d.Replica(other.Desc().Replica)
				wantRead(t, other, 0, pattern(4, 8192))
				wantRead(t, other, leafEntries*chunkSize, pattern(2, blockSize))
				for d.releaseMore() {
				}
				if now := d.Stat(); now.Used >= used+used/4 || now.Reclaimable != 0 {
					t.Fatalf("%d bytes in use, %d to be freed; %d before", now.Used, now.Reclaimable, used)
				}
				if err := d.Close(); err != nil {
					t.Fatal(err)
				}
				wantClean(t, "after", left, testPath)
			}
		})
	}
}

// A trim or zero of a large volume is applied without its leaves being read, so it does
// not keep the log. What it does not cover, and what is written after it, is there.
func TestWideTrimReadsNoLeaves(t *testing.T) {
	for _, typ := range []OpType{OpTrim, OpZero} {
		mem := vfs.NewMemory(1)
		fs := &slowLeaves{FS: mem}
		o := smallFormat()
		o.Size = 128 << 20
		mustFormat(t, fs, testPath, o)
		d, err := Open(t.Context(), fs, testPath, Options{foreground: true, cacheLeaves: 5})
		if err != nil {
			t.Fatal(err)
		}
		const leaves, last = 300, 299 * leafEntries * chunkSize
		r := leafy(t, d, 2, leaves)
		used := d.Stat().Used
		// All but the first block and the last leaf; a block of a leaf is written after it.
		const again = 100 * leafEntries * chunkSize
		mustAppend(t, r, Entry{Seq: 301, Type: typ, Offset: blockSize, Length: last - blockSize}, writeEntry(0, 302, again, blockSize))
		mustSync(t, r)
		r.SetCommit(302)
		fs.stopAfter(r, 3) // the first, that with the write, and one to spare
		if applied, err := r.Apply(t.Context(), 302); err != nil || applied != 302 {
			t.Fatalf("applied %d, %v", applied, err)
		}
		if err := d.Checkpoint(t.Context()); err != nil {
			t.Fatal(err)
		}
		if st := r.Status(); st.Checkpoint != 302 || st.Used != 3*chunkSize {
			t.Fatalf("status %+v", st)
		}
		close(fs.goOn)
		check := func(r *Replica) {
			t.Helper()
			wantRead(t, r, 0, pattern(1, blockSize))
			wantRead(t, r, last, pattern(300, blockSize))
			wantRead(t, r, again, pattern(302, blockSize))
			for _, i := range []int64{1, 150, 298} {
				wantRead(t, r, i*leafEntries*chunkSize, make([]byte, blockSize))
			}
			refs, err := r.Chunks(300, -1, 20000) // a stale copy must hear of what is zero now
			if err != nil || len(refs) < 299 || refs[1].Index != leafEntries || refs[1].LastSeq != 301 || refs[1].Mapped {
				t.Fatalf("%d chunks changed, %v: %+v", len(refs), err, refs[:min(2, len(refs))])
			}
			if n := refs[len(refs)-1].Index; n >= last/chunkSize {
				t.Fatalf("chunk %d changed", n)
			}
		}
		check(r)
		d.closeFiles()
		for k, left := range []*vfs.Memory{mem.Restart(), mem.Crash(1)} {
			wantClean(t, "before", left, testPath)
			d, err := Open(t.Context(), left, testPath, Options{foreground: true, cacheLeaves: 5})
			if err != nil {
				t.Fatal(err)
			}
			r, _ := d.Replica(r.Desc().Replica)
			check(r)
			// A zero leaf is zeroed in part, written to and zeroed again.
			at := int64(200 * leafEntries * chunkSize)
			mustAppend(t, r, Entry{Seq: 303, Type: typ, Offset: at, Length: chunkSize}, writeEntry(0, 304, at+3*chunkSize, blockSize))
			r.SetCommit(304)
			if err := d.Checkpoint(t.Context()); err != nil {
				t.Fatal(err)
			}
			wantRead(t, r, at+3*chunkSize, pattern(304, blockSize))
			if k == 1 {
				mustAppend(t, r, Entry{Seq: 305, Type: typ, Offset: 0, Length: leaves * leafEntries * chunkSize})
				r.SetCommit(305)
			}
			for d.releaseMore() {
			}
			if now := d.Stat(); now.Used >= used/4 || now.Reclaimable != 0 {
				t.Fatalf("%d bytes in use, %d to be freed; %d before", now.Used, now.Reclaimable, used)
			}
			if st := r.Status(); k == 1 && st.Used != 0 || k == 0 && st.Used != 4*chunkSize {
				t.Fatalf("status %+v", st)
			}
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			wantClean(t, "after", left, testPath)
		}
	}
}

// Where the pages of used chunks are lost, what is being released is counted too, and is
// released then; of a leaf that cannot be read the next open finds the chunks.
func TestReleasedMapsAreCounted(t *testing.T) {
	fs := vfs.NewMemory(1)
	o := smallFormat()
	o.Size = 64 << 20
	mustFormat(t, fs, testPath, o)
	open := func() *Disk {
		t.Helper()
		d, err := Open(t.Context(), fs, testPath, Options{foreground: true, cacheLeaves: 5, releaseLeaves: -1})
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	d := open()
	other := leafy(t, d, 1, 3)
	used := d.Stat().Used
	large := leafy(t, d, 2, 100)
	lost := large.tree.ref(pageKey{0, 90}).page
	if err := d.DeleteReplica(large.Desc().Replica); err != nil {
		t.Fatal(err)
	}
	d.releaseSome(30)
	if err := d.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	left := d.released[0].tree.mapped
	if left == 0 || left > 70 {
		t.Fatalf("%d chunks are left to be released", left)
	}
	for _, page := range []int64{lost, d.space.refs[0].page} {
		if err := fs.FlipBit(testPath, d.pageOffset(page)+2000, 3); err != nil {
			t.Fatal(err)
		}
	}
	d.closeFiles()
	for life := range 3 {
		fs = fs.Restart()
		d = open()
		if (d.spaceLost != nil) != (life < 2) {
			t.Fatalf("life %d: used chunks: %v", life, d.spaceLost)
		}
		if now := d.Stat().Reclaimable / chunkSize; life == 0 && now != left || life > 0 && now != 0 {
			t.Fatalf("life %d: %d chunks are to be released, %d before", life, now, left)
		}
		for d.releaseMore() {
		}
		r, _ := d.Replica(other.Desc().Replica)
		for i := range int64(3) {
			wantRead(t, r, i*leafEntries*chunkSize, pattern(holdfast.Seq(i+1), blockSize))
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if now := d.Stat().Used; now > used+chunkSize {
		t.Fatalf("%d bytes in use, %d before", now, used)
	}
	wantClean(t, "at the end", fs, testPath)
}

// A write that finds the disk full waits for a leaf that is just being read: what it
// frees serves the write.
func TestFullDiskWaitsForALeaf(t *testing.T) {
	fs := &slowLeaves{FS: vfs.NewMemory(1)}
	mustFormat(t, fs, testPath, smallFormat())
	open := func() *Disk {
		t.Helper()
		d, err := Open(t.Context(), fs, testPath, Options{foreground: true, cacheLeaves: 8, releaseLeaves: -1})
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	d := open()
	leafy(t, d, 1, 4)
	mustCreate(t, d, 2, 1<<30)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = open() // no leaf is in memory
	defer d.Close()
	gone, _ := d.Replica(testDesc(1, 0).Replica)
	r, _ := d.Replica(testDesc(2, 0).Replica)
	write := func() error {
		seq := r.Status().Tail + 1
		e := writeEntry(0, seq, int64(seq)*chunkSize, blockSize)
		e.Commit = seq - 1
		return r.Append([]Entry{e})
	}
	err := error(nil)
	for err == nil {
		err = write()
	}
	wantKind(t, err, holdfast.ErrNoSpace)
	fs.stopAfter(gone, 0)
	if err := d.DeleteReplica(gone.desc.Replica); err != nil {
		t.Fatal(err)
	}
	released, done := make(chan struct{}), make(chan error)
	go func() {
		defer close(released)
		d.releasing.Lock()
		defer d.releasing.Unlock()
		d.releaseSome(4)
	}()
	<-fs.stopped
	go func() { done <- write() }()
	select {
	case err := <-done:
		t.Errorf("the write did not wait: %v", err)
		close(fs.goOn)
	case <-time.After(100 * time.Millisecond): // it waits, or has not come so far
		close(fs.goOn)
		if err := <-done; err != nil {
			t.Errorf("the write was refused, though four chunks came free: %v", err)
		}
	}
	<-released
}
