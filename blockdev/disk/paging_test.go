package disk

import (
	"bytes"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// sparse is a replica of many leaves, of which few fit in memory, and what it
// should hold.
type sparse struct {
	t     *testing.T
	rng   *rand.Rand
	fs    *vfs.Memory
	d     *Disk
	r     *Replica
	seq   holdfast.Seq
	want  map[int64]holdfast.Seq // written blocks, by the entry; 0: zeroed
	saved map[int64]holdfast.Seq // as of the last sync
	last  holdfast.Seq           // its tail
	shed  bool                   // what is zeroed or deleted is released later

	readers int // beside: each may hold one leaf more for a moment
}

const sparseSize = 64 << 30

func newSparse(t *testing.T, seed uint64) *sparse {
	s := &sparse{t: t, rng: rand.New(rand.NewPCG(seed, 0x5a)), fs: vfs.NewMemory(seed), want: map[int64]holdfast.Seq{}, shed: seed%2 == 1}
	o := smallFormat()
	o.Size, o.WALSize = 512<<20, MinWALSize
	mustFormat(t, s.fs, testPath, o)
	s.open()
	s.r = mustCreate(t, s.d, 1, sparseSize)
	return s
}

func (s *sparse) open() {
	o := Options{foreground: true, cacheLeaves: 5}
	if s.shed {
		o.releaseLeaves = -1
	}
	d, err := Open(s.t.Context(), s.fs, testPath, o)
	if err != nil {
		s.t.Fatal(err)
	}
	s.d = d
	if r, ok := d.Replica(testDesc(1, 0).Replica); ok {
		s.r = r
	}
}

// place returns one of 300 blocks of 100 leaves.
func (s *sparse) place() int64 {
	n := s.rng.Int64N(300)
	return (n/3*leafEntries*7+n%3*11)*blocksPerChunk + n%blocksPerChunk
}

func (s *sparse) step() {
	s.seq++
	b := s.place()
	e := writeEntry(0, s.seq, b*blockSize, blockSize)
	switch s.rng.IntN(12) {
	case 0:
		e = Entry{Seq: s.seq, Type: OpTrim, Offset: b * blockSize, Length: blockSize}
	case 1: // over several leaves
		e = Entry{Seq: s.seq, Type: OpZero, Offset: b * blockSize, Length: 40 * leafEntries * chunkSize}
		e.Length = min(e.Length, sparseSize-e.Offset)
	}
	mustAppend(s.t, s.r, e)
	if e.Type == OpWrite {
		s.want[b] = s.seq
	}
	for at := range s.want {
		if e.Type != OpWrite && at*blockSize >= e.Offset && at*blockSize < e.Offset+e.Length {
			s.want[at] = 0
		}
	}
	s.r.SetCommit(s.seq - min(s.seq, 3))
	if s.rng.IntN(10) == 0 {
		mustSync(s.t, s.r)
		s.saved, s.last = map[int64]holdfast.Seq{}, s.seq
		for b, q := range s.want {
			s.saved[b] = q
		}
	}
	if s.shed {
		s.d.releaseSome(1)
	}
	switch s.rng.IntN(30) {
	case 0:
		if err := s.d.Checkpoint(s.t.Context()); err != nil {
			s.t.Fatal(err)
		}
	case 1, 2:
		if _, err := s.r.Apply(s.t.Context(), s.seq); err != nil {
			s.t.Fatal(err)
		}
	}
	s.r.mu.RLock()
	n, dirty := len(s.r.tree.leaves), s.d.cache.dirty.Load()
	s.r.mu.RUnlock()
	if n > s.d.cache.limit+int(dirty)+s.readers {
		s.t.Fatalf("%d leaves in memory, %d of them changed, of %d", n, dirty, s.d.cache.limit)
	}
	for range 3 {
		s.check(s.place())
	}
}

func (s *sparse) check(b int64) {
	s.t.Helper()
	want := make([]byte, blockSize)
	if q := s.want[b]; q != 0 {
		want = pattern(q, blockSize)
	}
	wantRead(s.t, s.r, b*blockSize, want)
}

func (s *sparse) checkAll() {
	s.t.Helper()
	for b := range s.want {
		s.check(b)
	}
	dirty := int64(0)
	for _, l := range s.r.tree.leaves {
		if l.dirty.Load() {
			dirty++
		}
	}
	if got := s.d.cache.dirty.Load(); got != dirty {
		s.t.Fatalf("%d changed leaves are counted as %d", dirty, got)
	}
}

// sound checks what is on the medium, checksums and counts.
func (s *sparse) sound() {
	s.t.Helper()
	c, err := Check(s.t.Context(), s.fs, testPath, nil)
	if err != nil || c.Found > torn(c) {
		s.t.Fatalf("check: %v, %+v", err, c)
	}
}

// count returns how many chunks maps refer to.
func (s *space) count() (n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, w := range s.mapped {
		n += int64(bits.OnesCount64(w))
	}
	return n
}

// Many leaves with room for few: what is read is what was written, after
// restarts and crashes too.
func TestMapPaging(t *testing.T) {
	for seed := range uint64(12) {
		t.Run(strconv.FormatUint(seed, 10), func(t *testing.T) {
			t.Parallel()
			s := newSparse(t, seed)
			for range 4 {
				for range 250 {
					s.step()
				}
				s.checkAll()
				s.d.closeFiles()
				if s.rng.IntN(2) == 0 {
					s.fs = s.fs.Restart()
				} else {
					s.fs = s.fs.Crash(s.rng.Uint64())
				}
				s.sound()
				s.open()
				if tail := s.r.Status().Tail; tail < s.seq { // of a crash: go on from what is left for certain
					if tail < s.last {
						t.Fatalf("tail %d, and %d was durable", tail, s.last)
					}
					if err := s.r.Truncate(max(s.last, s.r.Status().Floor)); err != nil {
						t.Fatal(err)
					}
					if s.seq = s.r.Status().Tail; s.seq != s.last {
						t.Log("entries that were not synced are in chunks: what they were is not known")
						return
					}
					s.want = map[int64]holdfast.Seq{}
					for b, q := range s.saved {
						s.want[b] = q
					}
				}
				s.checkAll()
			}
			for s.d.releaseMore() {
			}
			if s.r.Status().Used != s.d.space.count()*chunkSize {
				t.Fatalf("the map has %d bytes, and %d chunks count as used", s.r.Status().Used, s.d.space.count())
			}
			if err := s.d.DeleteReplica(s.r.Desc().Replica); err != nil {
				t.Fatal(err)
			}
			for s.d.releaseMore() {
			}
			if err := s.d.Close(); err != nil {
				t.Fatal(err)
			}
			if n := s.d.space.count(); n != 0 {
				t.Fatalf("%d chunks count as used after all was deleted", n)
			}
			s.sound()
		})
	}
}

// A read over the end of a leaf needs both, and gets them where none can be kept.
func TestReadOverTwoLeaves(t *testing.T) {
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, smallFormat())
	d, err := Open(t.Context(), fs, testPath, Options{foreground: true, cacheLeaves: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer d.closeFiles()
	r := mustCreate(t, d, 1, 1<<30)
	mustAppend(t, r, writeEntry(0, 1, leafEntries*chunkSize-blockSize, 2*blockSize))
	r.SetCommit(1)
	if err := d.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	// Changed leaves of another, which stay.
	other := mustCreate(t, d, 2, 1<<30)
	mustAppend(t, other, writeEntry(0, 1, 0, blockSize))
	mustSync(t, other)
	other.SetCommit(1)
	if _, err := other.Apply(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	wantRead(t, r, leafEntries*chunkSize-blockSize, pattern(1, 2*blockSize))
}

// Readers beside a writer whose leaves come and go.
func TestMapPagingConcurrent(t *testing.T) {
	s := newSparse(t, 1)
	for range 400 {
		s.step()
	}
	if err := s.d.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.readers = 3
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range s.readers {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 1))
			p := make([]byte, 4*blockSize)
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				q := rng.Int64N(300)
				b := (q/3*leafEntries*7 + q%3*11) * blocksPerChunk
				if err := s.r.ReadAt(p, b*blockSize); err != nil {
					t.Error(err)
					return
				}
				for i := range 4 { // each block is of one entry, or zero
					one := p[i*blockSize : (i+1)*blockSize]
					if !bytes.Equal(one, make([]byte, blockSize)) && !ofOneEntry(one) {
						t.Errorf("block %d is of no entry", b+int64(i))
						return
					}
				}
				if n%50 == 0 {
					if _, err := s.r.Chunks(0, rng.Int64N(10000), 100); err != nil {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	for range 600 {
		s.step()
	}
	close(stop)
	wg.Wait()
	s.checkAll()
	_ = s.d.Close()
}

// ofOneEntry says whether a block is what pattern makes of some entry.
func ofOneEntry(p []byte) bool {
	for q := holdfast.Seq(1); q < 3000; q++ {
		if want := pattern(q, 16); bytes.Equal(want, p[:16]) {
			return bytes.Equal(pattern(q, blockSize), p)
		}
	}
	return false
}

// A leaf that does not match damages its replica, when it is first needed and
// not before, and no other.
func TestLostLeaf(t *testing.T) {
	for _, what := range []string{"read", "apply", "list", "install", "delete"} {
		t.Run(what, func(t *testing.T) {
			fs, d := twoReplicas(t)
			r, _ := d.Replica(testDesc(0, 0).Replica)
			page := r.tree.ref(pageKey{0, 0}).page
			mustSync(t, r)
			d.closeFiles()
			fs = fs.Restart()
			if err := fs.FlipBit(testPath, d.pageOffset(page)+2000, 3); err != nil {
				t.Fatal(err)
			}
			if c, err := Check(t.Context(), fs, testPath, nil); err != nil || c.Found == 0 || c.Findings[0].Where != "map" {
				t.Fatalf("check: %v, %+v", err, c)
			}
			d, err := Open(t.Context(), fs, testPath, Options{foreground: true})
			if err != nil {
				t.Fatal(err)
			}
			defer d.closeFiles()
			r, _ = d.Replica(testDesc(0, 0).Replica)
			other, _ := d.Replica(testDesc(1, 0).Replica)
			if st := r.Status(); st.Damaged != nil {
				t.Fatalf("damaged before anybody looked: %v", st.Damaged)
			}
			tail := r.Status().Tail
			switch what {
			case "read":
				wantKind(t, r.ReadAt(make([]byte, blockSize), 0), holdfast.ErrIntegrity)
			case "apply":
				mustAppend(t, r, writeEntry(0, tail+1, 0, 4096))
				mustSync(t, r)
				r.SetCommit(tail + 1)
				_, err := r.Apply(t.Context(), tail+1)
				wantKind(t, err, holdfast.ErrIntegrity)
			case "list":
				_, err := r.Chunks(0, -1, 10)
				wantKind(t, err, holdfast.ErrIntegrity)
			case "install":
				err := r.InstallChunk(Chunk{Index: 0, AsOf: tail})
				wantKind(t, err, holdfast.ErrIntegrity)
			case "delete":
				used := d.Stat().Used
				if err := d.DeleteReplica(r.Desc().Replica); err != nil {
					t.Fatal(err)
				}
				if err := d.Checkpoint(t.Context()); err != nil {
					t.Fatal(err)
				}
				if now := d.Stat().Used; now > used {
					t.Fatalf("%d bytes in use, %d before", now, used)
				}
				return
			}
			if st := r.Status(); holdfast.KindOf(st.Damaged) != holdfast.ErrIntegrity {
				t.Fatalf("not damaged: %v", st.Damaged)
			}
			// The others go on, checkpoints too.
			last := other.Status().Tail
			mustAppend(t, other, writeEntry(0, last+1, 3*chunkSize, 4096))
			mustSync(t, other)
			other.SetCommit(last + 1)
			if err := d.Checkpoint(t.Context()); err != nil {
				t.Fatal(err)
			}
			if st := other.Status(); st.Applied != last+1 {
				t.Fatalf("applied %d of %d", st.Applied, last+1)
			}
			wantRead(t, other, 3*chunkSize, pattern(last+1, 4096))
			// What the damaged one had logged does not keep the log from the others.
			for q := last + 2; q < last+600; q++ {
				mustAppend(t, other, writeEntry(0, q, int64(q%4)*chunkSize, chunkSize))
				other.SetCommit(q)
			}
		})
	}
}

// The pages that say which chunks are used follow from the maps: one that is
// lost is made anew, and found by a check.
func TestLostSpacePage(t *testing.T) {
	fs, d := twoReplicas(t)
	r, _ := d.Replica(testDesc(0, 0).Replica)
	used, page := d.Stat().Used, d.space.refs[0].page
	mustSync(t, r)
	d.closeFiles()
	fs = fs.Restart()
	if err := fs.FlipBit(testPath, d.pageOffset(page)+100, 3); err != nil {
		t.Fatal(err)
	}
	c, err := Check(t.Context(), fs, testPath, nil)
	if err != nil || c.Found != 1 || !strings.Contains(c.Findings[0].What, "used chunks") {
		t.Fatalf("check: %v, %+v", err, c)
	}
	d, err = Open(t.Context(), fs, testPath, Options{foreground: true})
	if err != nil {
		t.Fatal(err)
	}
	if now := d.Stat().Used; now != used {
		t.Fatalf("%d bytes in use, %d before", now, used)
	}
	r, _ = d.Replica(testDesc(0, 0).Replica)
	wantRead(t, r, 8192+4096, pattern(1, 8192)[4096:])
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if c, err := Check(t.Context(), fs, testPath, nil); err != nil || c.Found != 0 {
		t.Fatalf("check of what was made anew: %v, %+v", err, c)
	}
}

// What a check says of a map that does not agree with what is stored beside it.
func TestCheckSpace(t *testing.T) {
	for what, harm := range map[string]func(d *Disk, r *Replica){
		"no map refers": func(d *Disk, r *Replica) { d.space.move(&chunkEntry{}, &chunkEntry{typ: chunkMapped, phys: 77}) },
		"do not count":  func(d *Disk, r *Replica) { e := mapEntry(r, 0); d.space.move(&e, &chunkEntry{}) },
		"the page above says": func(d *Disk, r *Replica) {
			r.tree.child(0).mapped ^= 1 << 20
			r.tree.levels[0][0].dirty = true
		},
	} {
		t.Run(what, func(t *testing.T) {
			fs, d := twoReplicas(t)
			r, _ := d.Replica(testDesc(0, 0).Replica)
			harm(d, r)
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			c, err := Check(t.Context(), fs, testPath, nil)
			if err != nil || c.Found == 0 || !strings.Contains(fmt.Sprint(c.Findings), what) {
				t.Fatalf("check: %v, %+v", err, c)
			}
		})
	}
}

// A damaged replica begins anew by Rebase: empty, sound, and nothing of it leaks,
// whether its log or its map was unreadable, and wherever a crash comes.
func TestDamagedBeginsAnew(t *testing.T) {
	for _, what := range []string{"map", "log"} {
		t.Run(what, func(t *testing.T) {
			fs, d := twoReplicas(t)
			r, _ := d.Replica(testDesc(0, 0).Replica)
			id, tail := r.Desc().Replica, r.Status().Tail
			mustSync(t, r)
			for q := tail + 1; q <= tail+2; q++ { // the second says that the first was durable
				mustAppend(t, r, writeEntry(0, q, 0, 4096))
				mustSync(t, r)
			}
			page, entry := r.tree.ref(pageKey{0, 0}).page, entryOf(t, d, 0, tail+1)
			d.closeFiles()
			fs = fs.Restart()
			var err error
			if what == "map" {
				err = fs.FlipBit(testPath, d.pageOffset(page)+2000, 3)
			} else {
				err = fs.FlipBit(walName(testPath, int(entry.slot)), entry.pos-20, 3)
			}
			if err != nil {
				t.Fatal(err)
			}
			open := func(fs *vfs.Memory) (*Disk, *Replica) {
				t.Helper()
				d, err := Open(t.Context(), fs, testPath, Options{foreground: true})
				if err != nil {
					t.Fatal(err)
				}
				r, ok := d.Replica(id)
				if !ok {
					t.Fatal("the replica is gone")
				}
				return d, r
			}
			d, r = open(fs)
			_ = r.ReadAt(make([]byte, blockSize), 0)
			if r.Status().Damaged == nil {
				t.Fatal("not damaged")
			}
			if err := r.Fence(3); err != nil {
				t.Fatal(err)
			}
			if err := r.SetHint(3, 7); err != nil {
				t.Fatal(err)
			}
			wantKind(t, r.Rebase(4, 50), holdfast.ErrInvalid)
			var crashes []*vfs.Memory
			fs.Before(func(vfs.Op, string) { crashes = append(crashes, fs.Crash(uint64(len(crashes)))) })
			if err := r.Rebase(3, 50); err != nil {
				t.Fatal(err)
			}
			fs.Before(nil)
			check := func(r *Replica) {
				t.Helper()
				if st := r.Status(); st.Damaged != nil || st.Tail != 50 || st.Applied != 50 || st.Used != 0 || st.Intact || st.Fence != 3 || st.BadEntry != 0 {
					t.Fatalf("begun anew: %+v", st)
				}
				wantRead(t, r, 0, make([]byte, 65536))
			}
			check(r)
			var c Chunk
			c.AsOf, c.LastSeq, c.Data = 50, 9, make([]byte, chunkSize)
			copy(c.Data, pattern(9, blockSize))
			c.State[0], c.CRC[0] = BlockData, crcsOf(c.Data[:blockSize])[0]
			if err := r.InstallChunk(c); err != nil {
				t.Fatal(err)
			}
			mustAppend(t, r, writeEntry(3, 51, 65536, 4096))
			mustSync(t, r)
			want := pattern(9, blockSize)
			wantRead(t, r, 0, want)
			for _, crash := range []bool{true, false} { // before a checkpoint, and after
				if !crash {
					if err := d.Close(); err != nil {
						t.Fatal(err)
					}
				} else {
					d.closeFiles()
				}
				fs = fs.Restart()
				d, r = open(fs)
				wantRead(t, r, 0, want)
				wantRead(t, r, 65536, pattern(51, 4096))
				for d.releaseMore() {
				}
				if other, _ := d.Replica(testDesc(1, 0).Replica); what == "map" {
					mustRead(t, other, 0, 4096) // a hole in the log may concern anybody
				}
			}
			if err := d.Close(); err != nil { // what leaked was counted anew
				t.Fatal(err)
			}
			if c, err := Check(t.Context(), fs, testPath, nil); err != nil || c.Found != 0 && what == "map" {
				t.Fatalf("check: %v, %+v", err, c)
			}
			if len(crashes) == 0 {
				t.Fatal("nothing was written")
			}
			for _, fs := range crashes { // damaged as before, or begun anew
				d, r := open(fs)
				if err := r.ReadAt(make([]byte, blockSize), 0); err == nil {
					check(r)
				} else if r.Status().Damaged == nil {
					t.Fatalf("not damaged: %v", err)
				}
				d.closeFiles()
			}
		})
	}
}

// Chunks of leaves that could not be counted are given to others, and are not taken
// from them when their first owner begins anew, or can be read again.
func TestUncountedChunks(t *testing.T) {
	for _, again := range []bool{false, true} {
		fs := vfs.NewMemory(1)
		o := smallFormat()
		o.Size = 64 << 20
		mustFormat(t, fs, testPath, o)
		open := func() (d *Disk, a, b *Replica) {
			t.Helper()
			d, err := Open(t.Context(), fs, testPath, Options{foreground: true})
			if err != nil {
				t.Fatal(err)
			}
			a, _ = d.Replica(testDesc(1, 0).Replica)
			b, _ = d.Replica(testDesc(2, 0).Replica)
			return d, a, b
		}
		d, _, _ := open()
		a, b := mustCreate(t, d, 1, 1<<30), mustCreate(t, d, 2, 1<<30)
		for q := holdfast.Seq(1); q <= 60; q++ { // in three leaves
			e := writeEntry(0, q, int64(q%3)*leafEntries*chunkSize+int64(q/3)*chunkSize, 4096)
			mustAppend(t, a, e)
		}
		mustAppend(t, b, writeEntry(0, 1, 0, 4096))
		a.SetCommit(60)
		b.SetCommit(1)
		if err := d.Checkpoint(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := b.Fence(2); err != nil {
			t.Fatal(err)
		}
		if err := a.Fence(2); err != nil {
			t.Fatal(err)
		}
		first, used := d.pageOffset(a.tree.ref(pageKey{0, 0}).page), d.pageOffset(d.space.refs[0].page)
		d.closeFiles()
		for _, off := range []int64{first, used} {
			if err := fs.FlipBit(testPath, off+1000, 3); err != nil {
				t.Fatal(err)
			}
		}
		d, a, b = open()
		if a.Status().Damaged == nil || b.Status().Damaged != nil {
			t.Fatalf("damaged: %v, %v", a.Status().Damaged, b.Status().Damaged)
		}
		q := holdfast.Seq(2)
		for ; q < 400; q++ {
			mustAppend(t, b, writeEntry(2, q, int64(q)*chunkSize, 4096))
		}
		b.SetCommit(q - 1)
		if again { // the page can be read after all, at the next open
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			if err := fs.FlipBit(testPath, first+1000, 3); err != nil {
				t.Fatal(err)
			}
			d, a, b = open()
		}
		if err := a.Rebase(2, 100); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := d.Checkpoint(t.Context()); err != nil {
				t.Fatal(err)
			}
			for q := holdfast.Seq(2); q < 400; q++ {
				wantRead(t, b, int64(q)*chunkSize, pattern(q, 4096))
			}
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			d, a, b = open()
		}
		if st := a.Status(); st.Damaged != nil || st.Used != 0 {
			t.Fatalf("begun anew: %+v", st)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		if c, err := Check(t.Context(), fs, testPath, nil); err != nil || c.Found != 0 {
			t.Fatalf("check: %v, %+v", err, c)
		}
	}
}

// What was installed before a replica began anew is not installed again after a crash.
func TestInstallBeforeAnew(t *testing.T) {
	fs, d := twoReplicas(t)
	r, _ := d.Replica(testDesc(0, 0).Replica)
	tail := r.Status().Tail
	mustSync(t, r)
	r.SetCommit(tail)
	var c Chunk
	c.Index, c.AsOf, c.LastSeq, c.Data = 2, tail, 1, make([]byte, chunkSize)
	copy(c.Data, pattern(9, blockSize))
	c.State[0], c.CRC[0] = BlockData, crcsOf(c.Data[:blockSize])[0]
	if err := r.InstallChunk(c); err != nil {
		t.Fatal(err)
	}
	mustSync(t, r)
	if err := r.Fence(3); err != nil {
		t.Fatal(err)
	}
	r.mu.Lock()
	r.damage("a test says so")
	r.mu.Unlock()
	if err := r.Rebase(3, 50); err != nil {
		t.Fatal(err)
	}
	d.closeFiles()
	d = mustOpen(t, fs.Restart(), testPath)
	r, _ = d.Replica(testDesc(0, 0).Replica)
	if st := r.Status(); st.Used != 0 || st.Floor != 50 || st.Tail != 50 {
		t.Fatalf("after a crash: %+v", st)
	}
	wantRead(t, r, 2*chunkSize, make([]byte, chunkSize))
	_ = d.Close()
}
