package disk

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// This file walks all structures of a disk after a workload and does one harm at a
// time to each: a flipped bit, a write that was lost (what was there before stays,
// page by page or the whole write), a write that went to another place (the right
// bytes at the wrong place, and the old ones where they belong). Every harm must be
// noticed, and no wrong byte returned.

// place is one page of one file.
type place struct {
	path string
	page int64
}

// past is a file system that remembers what each page held before each write.
type past struct {
	vfs.FS
	old    map[place][][]byte // distinct, oldest first, the present one not among them
	writes map[place][]place  // the pages of the write that made the present version
}

func (p *past) OpenFile(path string, flags vfs.Flag) (vfs.File, error) {
	f, err := p.FS.OpenFile(path, flags)
	return &pastFile{File: f, past: p, path: path}, err
}

type pastFile struct {
	vfs.File
	past *past
	path string
}

func (f *pastFile) note(off, n int64) {
	var all []place
	for i := off / vfs.PageSize; i <= (off+n-1)/vfs.PageSize; i++ {
		b := make([]byte, vfs.PageSize)
		if _, err := f.ReadAt(b, i*vfs.PageSize); err != nil {
			continue // beyond the end
		}
		at := place{f.path, i}
		f.past.old[at] = append(f.past.old[at], b)
		all = append(all, at)
	}
	for _, at := range all {
		f.past.writes[at] = all
	}
}

func (f *pastFile) WriteAt(p []byte, off int64) (int, error) {
	f.note(off, int64(len(p)))
	return f.File.WriteAt(p, off)
}

func (f *pastFile) WritevAt(bufs [][]byte, off int64) error {
	n := int64(0)
	for _, b := range bufs {
		n += int64(len(b))
	}
	f.note(off, n)
	return f.File.WritevAt(bufs, off)
}

func (f *pastFile) PunchHole(off, n int64) error {
	f.note(off, n)
	return f.File.PunchHole(off, n)
}

// subject is a disk after a workload, and what it must say.
type subject struct {
	fs      *vfs.Memory
	past    *past
	logs    [subjectReplicas][]Entry
	durable [subjectReplicas]holdfast.Seq // known to the log as durable
	vouched uint64                        // several records say that all up to here was durable
	serial  uint64                        // of the last record
	all     []structure
}

// Two replicas with data; others fill the directory.
const (
	subjectReplicas = 2
	subjectOthers   = 22
	subjectSize     = 1 << 30 // two levels of inner pages
)

// subjectChunks are the chunks that are written: several leaves, two inner pages.
var subjectChunks = []int64{0, 1, 2, 38, 39, 40, 500, 5000, 9866, 9867, 9868, 16383}

func newSubject(t *testing.T, seed uint64) *subject {
	t.Helper()
	s := &subject{fs: vfs.NewMemory(seed)}
	s.past = &past{FS: s.fs, old: map[place][][]byte{}, writes: map[place][]place{}}
	mustFormat(t, s.past, testPath, tinyFormat())
	rng := rand.New(rand.NewPCG(seed, 0x1213))
	for life := range 3 {
		d, err := Open(t.Context(), s.past, testPath, Options{foreground: true})
		if err != nil {
			t.Fatal(err)
		}
		if life == 0 {
			for n := range byte(subjectReplicas + subjectOthers) {
				mustCreate(t, d, n, subjectSize)
			}
		}
		for range 60 {
			s.write(t, d, rng)
			if rng.IntN(15) == 0 {
				s.settle(t, d)
			}
		}
		s.settle(t, d)
		if life < 2 {
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			continue
		}
		s.finish(t, d, rng)
		s.walk(t, d)
		d.closeFiles()
	}
	s.fs = s.fs.Restart()
	return s
}

func (s *subject) replica(t *testing.T, d *Disk, n int) *Replica {
	t.Helper()
	r, ok := d.Replica(testDesc(byte(n), 0).Replica)
	if !ok {
		t.Fatalf("replica %d is gone", n)
	}
	return r
}

// write appends one entry to one of the replicas.
func (s *subject) write(t *testing.T, d *Disk, rng *rand.Rand) {
	t.Helper()
	n := rng.IntN(subjectReplicas)
	seq := holdfast.Seq(len(s.logs[n]) + 1)
	off := subjectChunks[rng.IntN(len(subjectChunks))]*chunkSize + int64(rng.IntN(8))*blockSize
	e := writeEntry(0, seq, off, blockSize*(1+rng.IntN(8)))
	if rng.IntN(12) == 0 {
		e = Entry{Seq: seq, Type: OpTrim, Offset: off / chunkSize * chunkSize, Length: chunkSize}
	}
	mustAppend(t, s.replica(t, d, n), e)
	s.logs[n] = append(s.logs[n], e)
}

// settle commits all and writes a checkpoint.
func (s *subject) settle(t *testing.T, d *Disk) {
	t.Helper()
	for n := range s.logs {
		r := s.replica(t, d, n)
		mustSync(t, r)
		r.SetCommit(holdfast.Seq(len(s.logs[n])))
	}
	if err := d.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// finish leaves records of all kinds behind the last checkpoint, and a tail behind
// what is known to be durable.
func (s *subject) finish(t *testing.T, d *Disk, rng *rand.Rand) {
	t.Helper()
	for range 25 {
		s.write(t, d, rng)
	}
	for n := range s.logs {
		r := s.replica(t, d, n)
		// A chunk as it is, installed once more: no other content, one more record.
		c, err := r.ReadChunk(subjectChunks[0])
		if err != nil {
			t.Fatal(err)
		}
		for _, err := range []error{r.InstallChunk(c), r.Fence(holdfast.Epoch(n + 1)), r.SetHint(1, 1), r.DeclareIntact(1)} {
			if err != nil {
				t.Fatal(err)
			}
		}
		r.SetCommit(holdfast.Seq(len(s.logs[n])))
	}
	if err := d.applyAll(); err != nil { // COMMIT records; the chunks are ahead of the map
		t.Fatal(err)
	}
	for range 10 {
		s.write(t, d, rng)
	}
	for n := range s.logs {
		mustSync(t, s.replica(t, d, n))
		s.durable[n] = holdfast.Seq(len(s.logs[n]))
	}
	// This record and those behind it say so. What only the last of them says, when
	// the log moved on to another file, may be lost together with it.
	s.vouched = d.wal.written()
	if err := s.replica(t, d, 0).SetHint(1, 2); err != nil {
		t.Fatal(err)
	}
	for range 10 {
		s.write(t, d, rng)
	}
}

// structure is one thing on the disk that has a checksum of its own.
type structure struct {
	kind string
	path string
	off  int64
	n    int64
	// must is what a reader must find out if it is harmed.
	must must
}

type must int

const (
	mustTell    must = iota // an error, a damaged replica, lost blocks
	mustSurvive             // there is a second copy
	mayCut                  // behind the durable point: the log ends before it
)

// walk lists all structures that count.
func (s *subject) walk(t *testing.T, d *Disk) {
	t.Helper()
	add := func(kind, path string, off, n int64, m must) {
		s.all = append(s.all, structure{kind, path, off, n, m})
	}
	add("superblock A", testPath, superA, superSize, mustSurvive)
	add("superblock B", testPath, superB, superSize, mustSurvive)
	for _, p := range d.dirPages {
		add("directory", testPath, d.pageOffset(p), pageSize, mustTell)
	}
	for _, ref := range d.space.refs {
		add("used chunks", testPath, d.pageOffset(ref.page), pageSize, mustSurvive)
	}
	for n := range s.logs {
		r := s.replica(t, d, n)
		s.walkMap(t, d, r, func(kind string, off, size int64) { add(kind, testPath, off, size, mustTell) })
	}
	log, err := d.scan(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var body ckptBody
	for i := range log.recs {
		if log.recs[i].typ == recCkpt {
			body, _ = decodeCkpt(log.recs[i].extra)
		}
	}
	for i := range log.recs {
		f := &log.recs[i]
		needed := f.serial > body.upTo
		if r, ok := d.Replica(f.replica); ok && (f.typ == recWrite || f.typ == recZero || f.typ == recTrim) {
			needed = f.seq > r.Status().Checkpoint
		}
		if !needed {
			continue
		}
		m, tail := mustTell, ""
		if f.serial > s.vouched {
			m, tail = mayCut, " (tail)"
		}
		path := walName(testPath, int(f.slot))
		add("log head"+tail, path, f.pos-f.headLen, f.headLen, m)
		if f.payloadLen > 0 {
			add("log payload"+tail, path, f.pos, f.payloadLen, m)
		}
		s.serial = f.serial
	}
}

// walkMap lists a replica's map pages and the blocks of its chunks that nothing
// newer in the log stands for.
func (s *subject) walkMap(t *testing.T, d *Disk, r *Replica, add func(kind string, off, n int64)) {
	t.Helper()
	var down func(ref pageRef, level int, index int64)
	down = func(ref pageRef, level int, index int64) {
		b, err := d.readPage(ref.page, true)
		if err != nil || !checkPage(b, r.desc.Replica, uint32(level), index, ref.crc, d.seed) {
			t.Fatalf("page %d of the map: %v", ref.page, err)
		}
		if level > 0 {
			add("inner page", d.pageOffset(ref.page), pageSize)
			for i, child := range childrenOf(b) {
				if child.page >= 0 {
					down(child, level-1, index*nodeEntries+int64(i))
				}
			}
			return
		}
		add("leaf page", d.pageOffset(ref.page), pageSize)
		var l leaf
		if !l.decode(b, d.alloc.chunks) {
			t.Fatalf("page %d of the map contradicts itself", ref.page)
		}
		for i := range l.entries {
			e := &l.entries[i]
			for k := range int64(blocksPerChunk) {
				block := (index*leafEntries+int64(i))*blocksPerChunk + k
				now := mapEntry(r, block/blocksPerChunk)
				if e.typ == chunkMapped && e.state(k) == BlockData && now.phys == e.phys && r.index.newest(block) == nil {
					add("data block", d.chunkOffset(e.phys)+k*blockSize, blockSize)
				}
			}
		}
	}
	down(r.tree.root, len(r.tree.levels), 0)
}

// childrenOf decodes an inner page.
func childrenOf(b []byte) []pageRef {
	n := &node{}
	n.decode(b)
	var refs []pageRef
	for i := range n.refs {
		refs = append(refs, n.refs[i].pageRef)
	}
	return refs
}

// contentAt is what the written chunks of a replica hold as of an entry.
func (s *subject) contentAt(n int, tail holdfast.Seq) map[int64][]byte {
	m := map[int64][]byte{}
	for _, c := range subjectChunks {
		m[c] = make([]byte, chunkSize)
	}
	for _, e := range s.logs[n][:tail] {
		p := m[e.Offset/chunkSize][e.Offset%chunkSize:]
		if e.Type == OpWrite {
			copy(p, e.Payload)
		} else {
			clear(p[:e.Length])
		}
	}
	return m
}

// outcome is what a reader of a harmed disk finds.
type outcome int

const (
	whole   outcome = iota // all as it was
	cut                    // the log ends earlier, and says so
	told                   // a replica is damaged, or blocks are lost
	refused                // the disk does not open
)

func (o outcome) String() string { return [...]string{"whole", "cut", "told", "refused"}[o] }

// judge opens a harmed disk, reads it all, applies and checkpoints, reads again,
// writes, is killed, opens and reads once more. Wrong bytes at any time, or a log
// that is shorter than what was durable and claims to be sound, end the test.
func (s *subject) judge(t *testing.T, what string, fs *vfs.Memory) outcome {
	t.Helper()
	worst := whole
	note := func(o outcome) { worst = max(worst, o) }
	more := map[int]Entry{}
	for life := range 2 {
		d, err := Open(t.Context(), fs, testPath, Options{foreground: true})
		if err != nil {
			if !errors.Is(err, holdfast.ErrIntegrity) {
				t.Fatalf("%s: open: %v", what, err)
			}
			note(refused)
			return worst
		}
		if life == 0 && d.wal.serial < s.serial {
			note(cut)
		}
		note(s.read(t, what, d, more))
		for _, r := range d.Replicas() {
			r.SetCommit(r.Status().Tail)
		}
		if err := d.Checkpoint(t.Context()); errors.Is(err, holdfast.ErrIntegrity) {
			note(told)
		} else if err != nil {
			t.Fatalf("%s: checkpoint: %v", what, err)
		}
		note(s.read(t, what, d, more))
		for n := range s.logs {
			r := s.replica(t, d, n)
			st := r.Status()
			if life > 0 || st.Damaged != nil {
				continue
			}
			// A block of its own, so that the lost ones stay lost.
			e := writeEntry(0, st.Tail+1, 7000*chunkSize, blockSize)
			if err := r.Append([]Entry{e}); err == nil {
				mustSync(t, r)
				more[n] = e
			} else if !errors.Is(err, holdfast.ErrIntegrity) && !errors.Is(err, holdfast.ErrInvalid) { // epochs must not fall
				t.Fatalf("%s: append: %v", what, err)
			}
		}
		d.closeFiles()
	}
	return worst
}

// read compares everything with the model.
func (s *subject) read(t *testing.T, what string, d *Disk, more map[int]Entry) outcome {
	t.Helper()
	worst := whole
	for n := range s.logs {
		r := s.replica(t, d, n)
		st := r.Status()
		if st.Damaged != nil {
			wantKind(t, r.ReadAt(make([]byte, blockSize), 0), holdfast.ErrIntegrity)
			worst = max(worst, told)
			continue
		}
		if st.BadEntry > 0 || len(st.BadRanges) > 0 || st.Bad+st.Poison > 0 {
			worst = max(worst, told) // also where nothing reads it: newer bytes stand for it
		}
		tail := st.Tail
		if e, ok := more[n]; ok {
			if tail != e.Seq {
				t.Fatalf("%s: replica %d ends at entry %d, and %d was synced", what, n, tail, e.Seq)
			}
			tail--
			wantRead(t, r, e.Offset, e.Payload)
		}
		if tail < s.durable[n] || tail > holdfast.Seq(len(s.logs[n])) {
			t.Fatalf("%s: replica %d ends at entry %d, was durable up to %d, and says it is sound", what, n, tail, s.durable[n])
		}
		for chunk, want := range s.contentAt(n, tail) {
			p := make([]byte, blockSize)
			for off := int64(0); off < chunkSize; off += blockSize {
				switch err := r.ReadAt(p, chunk*chunkSize+off); {
				case errors.Is(err, holdfast.ErrIntegrity):
					worst = max(worst, told)
				case err != nil:
					t.Fatalf("%s: read: %v", what, err)
				case !bytes.Equal(p, want[off:off+blockSize]):
					t.Fatalf("%s: wrong bytes at %d of chunk %d of replica %d", what, off, chunk, n)
				}
			}
		}
	}
	for n := subjectReplicas; n < subjectReplicas+subjectOthers; n++ {
		if s.replica(t, d, n).Status().Damaged != nil {
			worst = max(worst, told)
		}
	}
	return worst
}

// differs says whether a structure has other bytes than before.
func (s *subject) differs(t *testing.T, fs *vfs.Memory, x structure) bool {
	t.Helper()
	return !bytes.Equal(rangeOf(t, fs, x), rangeOf(t, s.fs, x))
}

func rangeOf(t *testing.T, fs vfs.FS, x structure) []byte {
	t.Helper()
	f, err := fs.OpenFile(x.path, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close() //nolint:errcheck // memory
	b := make([]byte, x.n)
	if _, err := f.ReadAt(b, x.off); err != nil {
		t.Fatal(err)
	}
	return b
}

// pagesIn are the places that a structure touches.
func (x *structure) pagesIn() (all []place) {
	for i := x.off / vfs.PageSize; i <= (x.off+x.n-1)/vfs.PageSize; i++ {
		all = append(all, place{x.path, i})
	}
	return all
}

// harm is one way of harming a structure; it returns false if there is none such.
type harm struct {
	name string
	do   func(t *testing.T, s *subject, fs *vfs.Memory, x structure, rng *rand.Rand) bool
}

var harms = []harm{
	{"bit flip", func(t *testing.T, _ *subject, fs *vfs.Memory, x structure, rng *rand.Rand) bool {
		if err := fs.FlipBit(x.path, x.off+rng.Int64N(x.n), uint(rng.IntN(8))); err != nil {
			t.Fatal(err)
		}
		return true
	}},
	{"lost write, one page", func(t *testing.T, s *subject, fs *vfs.Memory, x structure, rng *rand.Rand) bool {
		at := x.pagesIn()[rng.IntN(len(x.pagesIn()))]
		return s.lose(t, fs, at, 1)
	}},
	{"lost write, whole", func(t *testing.T, s *subject, fs *vfs.Memory, x structure, rng *rand.Rand) bool {
		ok := false
		for _, at := range s.past.writes[x.pagesIn()[0]] {
			ok = s.lose(t, fs, at, 1) || ok
		}
		return ok
	}},
	{"lost writes, several", func(t *testing.T, s *subject, fs *vfs.Memory, x structure, rng *rand.Rand) bool {
		at := x.pagesIn()[rng.IntN(len(x.pagesIn()))]
		n := len(s.past.old[at])
		return n > 1 && s.lose(t, fs, at, 2+rng.IntN(n-1))
	}},
	{"misdirected, same kind", func(t *testing.T, s *subject, fs *vfs.Memory, x structure, rng *rand.Rand) bool {
		var same []structure
		for _, y := range s.all {
			if strings.HasPrefix(y.kind, x.kind[:4]) && y != x {
				same = append(same, y)
			}
		}
		return len(same) > 0 && s.misdirect(t, fs, same[rng.IntN(len(same))], x, rng)
	}},
	{"misdirected, any", func(t *testing.T, s *subject, fs *vfs.Memory, x structure, rng *rand.Rand) bool {
		return s.misdirect(t, fs, s.all[rng.IntN(len(s.all))], x, rng)
	}},
}

// lose puts a page back to what it held some writes ago.
func (s *subject) lose(t *testing.T, fs *vfs.Memory, at place, writes int) bool {
	t.Helper()
	old := s.past.old[at]
	if len(old) < writes {
		return false
	}
	page(t, fs, at.path, at.page*vfs.PageSize, old[len(old)-writes])
	return true
}

// misdirect writes a page of y to a page of x, and not where it belongs.
func (s *subject) misdirect(t *testing.T, fs *vfs.Memory, y, x structure, rng *rand.Rand) bool {
	t.Helper()
	from, to := y.pagesIn()[rng.IntN(len(y.pagesIn()))], x.pagesIn()[rng.IntN(len(x.pagesIn()))]
	if from == to {
		return false
	}
	b := page(t, fs, from.path, from.page*vfs.PageSize, nil)
	s.lose(t, fs, from, 1)
	page(t, fs, to.path, to.page*vfs.PageSize, b)
	return true
}

// TestInject does every harm to every structure and wants each noticed: 100 %.
func TestInject(t *testing.T) {
	for seed := uint64(1); seed <= injectSeeds; seed++ {
		s := newSubject(t, seed)
		rng := rand.New(rand.NewPCG(seed, 9))
		counts := map[string]map[outcome]int{}
		count := func(x structure, h string, o outcome) {
			key := fmt.Sprintf("%-18s %s", x.kind, h)
			if counts[key] == nil {
				counts[key] = map[outcome]int{}
			}
			counts[key][o]++
		}
		for i, x := range s.all {
			if i%injectEvery != 0 && x.kind == "data block" {
				continue
			}
			for _, h := range harms {
				fs := s.fs.Restart()
				if !h.do(t, s, fs, x, rng) || !s.differs(t, fs, x) {
					continue // it holds what it held
				}
				what := fmt.Sprintf("seed %d: %s of %s at %d of %s", seed, h.name, x.kind, x.off, x.path)
				var found int
				if x.must == mustSurvive {
					c, err := Check(context.Background(), fs, testPath, nil)
					if err == nil {
						found = c.Found
					}
				}
				o := s.judge(t, what, fs)
				count(x, h.name, o)
				switch {
				case x.must == mustTell && o < told, x.must == mayCut && o < cut:
					t.Fatalf("%s: nobody noticed (%v)", what, o)
				case x.must == mustSurvive && o == refused && !strings.HasPrefix(h.name, "misdirected") &&
					(x.kind != "used chunks" || h.name != "lost write, whole"): // whose neighbours were of the same write
					t.Fatalf("%s: the other copy did not do", what)
				case x.must == mustSurvive && found == 0 && o == whole && !strings.HasPrefix(h.name, "lost"):
					t.Fatalf("%s: a check finds nothing", what)
				}
			}
		}
		total := 0
		for _, key := range slices.Sorted(maps.Keys(counts)) {
			t.Logf("seed %d: %-50s %v", seed, key, counts[key])
			for _, n := range counts[key] {
				total += n
			}
		}
		for _, kind := range []string{"superblock A", "superblock B", "directory", "inner page", "leaf page", "used chunks", "data block", "log head", "log payload", "log head (tail)", "log payload (tail)"} {
			for _, h := range harms {
				if h.name == "lost writes, several" || (strings.HasPrefix(kind, "superblock") || kind == "used chunks") && h.name == "misdirected, same kind" {
					continue // not every place was written twice; the copies are the same bytes; there is one page
				}
				if counts[fmt.Sprintf("%-18s %s", kind, h.name)] == nil {
					t.Errorf("seed %d: no %s of a %s was tried", seed, h.name, kind)
				}
			}
		}
		t.Logf("seed %d: %d harms of %d structures, all of them noticed", seed, total, len(s.all))
	}
}

// Both superblocks harmed: the disk is refused, whatever the harm.
func TestInjectBothSuperblocks(t *testing.T) {
	s := newSubject(t, 1)
	rng := rand.New(rand.NewPCG(1, 1))
	for _, h := range harms {
		for range 20 {
			fs := s.fs.Restart()
			if !h.do(t, s, fs, s.all[0], rng) || !h.do(t, s, fs, s.all[1], rng) || !s.differs(t, fs, s.all[0]) || !s.differs(t, fs, s.all[1]) {
				continue
			}
			if o := s.judge(t, h.name+" of both superblocks", fs); o != refused {
				t.Errorf("%s of both superblocks: %v", h.name, o)
			}
		}
	}
}

// A page that claims to be what it is not is not believed because its own checksum
// holds: pages of other replicas, levels, places and times, each whole, in the place
// of another. The crc that the parent holds is what tells.
func TestStalePageOfTheSamePlace(t *testing.T) {
	s := newSubject(t, 2)
	n := 0
	for _, x := range s.all {
		if x.kind != "leaf page" && x.kind != "inner page" && x.kind != "directory" {
			continue
		}
		for _, y := range s.all {
			if x.kind != y.kind || x == y {
				continue
			}
			b := rangeOf(t, s.fs, y)
			if binary.LittleEndian.Uint32(b) != pageMagic {
				t.Fatal("not a page")
			}
			fs := s.fs.Restart()
			page(t, fs, x.path, x.off, b)
			if o := s.judge(t, "another whole page", fs); o < told {
				t.Fatalf("%s at %d with the bytes of the one at %d: %v", x.kind, x.off, y.off, o)
			}
			n++
		}
	}
	t.Logf("%d pages put in the place of others", n)
}
