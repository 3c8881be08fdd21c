package disk

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// A writer with credit whose entry does not match its checksums has nothing logged, and
// has its credit still (Reserve: "never refused for want of a chunk").
func TestBadChecksumKeepsCredit(t *testing.T) {
	for _, n := range []int{blockSize, 4 * chunkSize} {
		fs := vfs.NewMemory(1)
		mustFormat(t, fs, testPath, smallFormat())
		d, err := Open(t.Context(), fs, testPath, Options{foreground: true})
		if err != nil {
			t.Fatal(err)
		}
		r := mustCreate(t, d, 1, 1<<30)
		if _, err := r.Reserve(8 * chunkSize); err != nil {
			t.Fatal(err)
		}
		before, need := d.alloc.stat(), d.alloc.need
		e := writeEntry(0, 1, 0, n)
		e.CRC[len(e.CRC)-1]++
		wantKind(t, r.Append([]Entry{e}), holdfast.ErrIntegrity)
		if c := r.Credit(); c != 8 {
			t.Errorf("%d bytes: credit of %d chunks is left of 8", n, c)
		}
		if now := d.alloc.stat(); now != before || d.alloc.need != need {
			t.Errorf("%d bytes: %+v, needs %d, before %+v, %d", n, now, d.alloc.need, before, need)
		}
		d.closeFiles()
	}
}

// A full disk: the data of a deleted replica is behind more leaves without data than are
// given back at once. A writer gets its chunks all the same.
func TestSqueezeFindsChunksBehindEmptyLeaves(t *testing.T) {
	const leaves, data = 600, 60
	for _, empty := range []bool{false, true} {
		fs := vfs.NewMemory(1)
		o := smallFormat()
		o.Size = 64 << 20
		mustFormat(t, fs, testPath, o)
		d, err := Open(t.Context(), fs, testPath, Options{foreground: true, cacheLeaves: 5})
		if err != nil {
			t.Fatal(err)
		}
		big := leafy(t, d, 1, leaves)
		seq := holdfast.Seq(leaves)
		for i := int64(0); empty && i < leaves-data; i++ { // one by one, as a guest trims files
			seq++
			mustAppend(t, big, Entry{Seq: seq, Type: OpTrim, Offset: i * leafEntries * chunkSize, Length: chunkSize})
			big.SetCommit(seq)
		}
		for i := range 2 {
			if err := d.Checkpoint(t.Context()); err != nil {
				t.Fatal(i, err)
			}
		}
		r := mustCreate(t, d, 2, 1<<30)
		var n holdfast.Seq
		for range 3 {
			n = fillUp(t, r) - 1
			mustSync(t, r)
			r.SetCommit(n)
			if err := d.Checkpoint(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		n = fillUp(t, r) - 1
		if err := d.DeleteReplica(big.Desc().Replica); err != nil {
			t.Fatal(err)
		}
		more := fillUp(t, r) - 1 - n
		if left := d.Stat().Reclaimable / chunkSize; left > 0 || more < data {
			t.Errorf("%d writes more, and the disk refuses with %d chunks to give back", more, left)
		}
		d.closeFiles()
	}
}

// Passes of an eighth, with commits that lag, tails that nobody commits, large writes,
// trims, and crashes: nothing is lost, and a log whose entries are all committed always
// makes room.
var passSeeds = uint64(8)

func TestPasses(t *testing.T) {
	for seed := uint64(1); seed <= passSeeds; seed++ {
		passesSeed(t, seed)
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

type passReplica struct {
	seq, commit, synced holdfast.Seq
	hist                []map[int64][]byte // by seq
}

func passesSeed(t *testing.T, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 0xeed))
	fs := vfs.NewMemory(seed)
	o := smallFormat()
	o.Size, o.WALSize, o.slotSize = 128<<20, 4<<20, 256<<10
	if seed%2 == 0 {
		o.WALSize = 8 << 20
		o.slotSize = 1 << 20
	}
	mustFormat(t, fs, testPath, o)
	open := func() *Disk {
		d, err := Open(t.Context(), fs, testPath, Options{foreground: true, cacheLeaves: 3, releaseLeaves: -1})
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	d := open()
	const blocks = (5*leafEntries + 7) * blocksPerChunk
	var ms [4]passReplica
	for i := range ms {
		mustCreate(t, d, byte(i), blocks*blockSize)
		ms[i].hist = []map[int64][]byte{{}}
	}
	ids, lives := [4]byte{0, 1, 2, 3}, byte(3)
	rep := func(i int) *Replica { r, _ := d.Replica(testDesc(ids[i], 0).Replica); return r }
	refused, looks := 0, 0
	var pending *passReplica // of which an entry is being appended
	var next map[int64][]byte
	look := func(vfs.Op, string) {
		if rng.IntN(150) > 0 {
			return
		}
		looks++
		c := fs.Crash(rng.Uint64())
		wantClean(t, "in the middle", c, testPath)
		d, err := Open(t.Context(), c, testPath, Options{foreground: true, cacheLeaves: 3, releaseLeaves: -1})
		if err != nil {
			t.Fatal(err)
		}
		for j := range ms {
			m := &ms[j]
			r, ok := d.Replica(testDesc(ids[j], 0).Replica)
			if !ok {
				if m.synced > 0 {
					t.Fatalf("replica %d is gone", j)
				}
				continue
			}
			st := r.Status()
			want := next
			if st.Tail <= m.seq {
				want = m.hist[st.Tail]
			}
			if st.Damaged != nil || st.Tail < m.synced || st.Tail > m.seq && (st.Tail > m.seq+1 || pending != m) {
				t.Fatalf("replica %d, synced %d, tail %d: %+v", j, m.synced, m.seq, st)
			}
			passMatch(t, -2, r, want, blocks)
			if rng.IntN(2) == 0 {
				if err := d.Checkpoint(t.Context()); err != nil {
					t.Fatal(err)
				}
				passMatch(t, -3, r, want, blocks)
			}
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		wantClean(t, "after the middle", c, testPath)
	}
	fs.Before(look)
	for step := range 700 {
		i := rng.IntN(len(ms))
		m, r := &ms[i], rep(i)
		switch k := rng.IntN(100); {
		case k < 70:
			var e Entry
			b := rng.Int64N(blocks)
			switch rng.IntN(5) {
			case 0:
				e = Entry{Seq: m.seq + 1, Type: OpTrim, Offset: b * blockSize, Length: min(blocks-b, 1+rng.Int64N(1<<rng.IntN(13))) * blockSize}
			case 1, 2:
				n := min(blocks-b, 16+rng.Int64N(100))
				if o.slotSize < 1<<20 {
					n = min(n, 40)
				}
				e = writeEntry(0, m.seq+1, b*blockSize, int(n)*blockSize)
			default:
				e = writeEntry(0, m.seq+1, b*blockSize, int(min(blocks-b, 1+rng.Int64N(12)))*blockSize)
			}
			if rng.IntN(3) > 0 {
				e.Commit = m.commit
			}
			h := map[int64][]byte{}
			for k, v := range m.hist[len(m.hist)-1] {
				h[k] = v
			}
			for q := e.Offset / blockSize; q < (e.Offset+e.Length)/blockSize; q++ {
				delete(h, q)
				if e.Type == OpWrite {
					at := q*blockSize - e.Offset
					h[q] = e.Payload[at : at+blockSize]
				}
			}
			pending, next = m, h
			err := r.Append([]Entry{e})
			if errors.Is(err, holdfast.ErrNoSpace) {
				refused++
				uncommitted := int64(0)
				for j := range ms {
					rj := rep(j)
					for s := ms[j].commit + 1; s <= ms[j].seq; s++ {
						uncommitted += rj.index.get(s).recordBytes() + 4096
					}
				}
				if uncommitted < d.wal.size()/8 {
					t.Fatalf("step %d: refused with %d of %d bytes uncommitted, %d used: %v", step, uncommitted, d.wal.size(), d.wal.used(), err)
				}
				for j := range ms {
					ms[j].commit = ms[j].seq
					rep(j).SetCommit(ms[j].seq)
				}
				err = r.Append([]Entry{e})
				if err != nil {
					t.Fatalf("step %d: all is committed, and %v", step, err)
				}
			}
			if err != nil {
				t.Fatal(err)
			}
			m.seq++
			pending = nil
			m.hist = append(m.hist, h)
		case k < 80:
			if i > 0 || rng.IntN(20) == 0 { // the first is an orphan's
				m.commit += holdfast.Seq(rng.Int64N(int64(m.seq-m.commit) + 1))
				r.SetCommit(m.commit)
			}
		case k < 88:
			if _, err := d.reclaim(nil); err != nil && !errors.Is(err, holdfast.ErrNoSpace) { // not tend: see TestTendEnds
				t.Fatal(err)
			}
		case k < 92:
			if _, err := d.reclaim(nil); err != nil && !errors.Is(err, holdfast.ErrNoSpace) {
				t.Fatal(err)
			}
		case k < 95:
			mustSync(t, r)
			m.synced = m.seq
		case k < 96:
			d.releaseMore()
		case k < 97 && m.seq > m.commit:
			to := max(m.commit, r.Status().Floor)
			if to < m.seq {
				m.synced = min(m.synced, to)
				if err := r.Truncate(to); err != nil {
					t.Fatal(err)
				}
				m.seq, m.synced = to, to
				m.hist = m.hist[:to+1]
			}
		case k < 97 && rng.IntN(3) == 0: // another replica in its place
			m.synced = 0
			if err := d.DeleteReplica(r.desc.Replica); err != nil {
				t.Fatal(err)
			}
			lives++
			ids[i] = lives
			mustCreate(t, d, ids[i], blocks*blockSize)
			*m = passReplica{hist: []map[int64][]byte{{}}}
		case k < 99:
			applied := make([]holdfast.Seq, len(ms))
			for j := range ms {
				applied[j] = rep(j).Status().Applied
			}
			d.closeFiles()
			fs = fs.Crash(rng.Uint64())
			wantClean(t, "crash", fs, testPath)
			d = open()
			fs.Before(look)
			for j := range ms {
				m, r := &ms[j], rep(j)
				st := r.Status()
				if st.Damaged != nil || st.Tail < m.synced || st.Tail < applied[j] || st.Tail > m.seq {
					t.Fatalf("step %d: replica %d, synced %d, applied %d: %+v", step, j, m.synced, applied[j], st)
				}
				m.seq, m.synced = st.Tail, st.Tail
				m.commit = min(m.commit, m.seq)
				m.hist = m.hist[:m.seq+1]
				r.SetCommit(m.commit)
			}
			for j := range ms {
				passMatch(t, step, rep(j), ms[j].hist[ms[j].seq], blocks)
			}
		default:
			passMatch(t, step, r, m.hist[m.seq], blocks)
		}
		if e := d.failed(); e != nil {
			t.Fatal(e)
		}
	}
	fs.Before(nil)
	for j := range ms {
		rep(j).SetCommit(ms[j].seq)
		passMatch(t, -1, rep(j), ms[j].hist[ms[j].seq], blocks)
	}
	for range 60 {
		if _, err := d.reclaim(nil); err != nil {
			t.Fatal(err)
		}
	}
	if used := d.wal.used(); used > d.wal.size()/2 {
		t.Errorf("all is committed, and %d of %d bytes are used", used, d.wal.size())
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	wantClean(t, "end", fs, testPath)
	if testing.Verbose() && refused > 0 {
		t.Logf("seed %d: refused %d, crash points %d", seed, refused, looks)
	}
}

func passMatch(t *testing.T, step int, r *Replica, want map[int64][]byte, blocks int64) {
	t.Helper()
	p := make([]byte, 16*blockSize)
	for b := int64(0); b < blocks; b += 16 {
		if err := r.ReadAt(p, b*blockSize); err != nil {
			t.Fatal(err)
		}
		for i := range int64(16) {
			w := want[b+i]
			if w == nil {
				w = zeroPage[:]
			}
			if !bytes.Equal(p[i*blockSize:(i+1)*blockSize], w) {
				t.Fatalf("step %d: block %d of replica %v has other bytes", step, b+i, r.desc.Replica)
			}
		}
	}
}

// tails gives as many replicas an uncommitted tail of part of the log each, in turn.
func tails(t *testing.T, d *Disk, n byte, part float64) {
	t.Helper()
	for i := range n {
		mustCreate(t, d, i, 8<<20)
	}
	each := holdfast.Seq(float64(d.wal.size()) * part / (16 * blockSize))
	for seq := holdfast.Seq(1); seq <= each; seq++ {
		for i := range n {
			r, _ := d.Replica(testDesc(i, 0).Replica)
			if err := r.Append([]Entry{writeEntry(0, seq, int64(seq%60)*15*blockSize, 15*blockSize)}); err != nil {
				t.Fatalf("entry %d of replica %d: %v", seq, i, err)
			}
		}
	}
}

// Tails of several volumes that nobody commits are more than half the log together, each
// less than a quarter: the background comes to rest, for nothing it does makes room for
// long.
func TestTendEnds(t *testing.T) {
	for _, c := range []struct {
		wal, slot int64
		n         byte
		part      float64
	}{
		{4 << 20, 256 << 10, 4, 0.15}, {4 << 20, 256 << 10, 3, 0.18}, {4 << 20, 256 << 10, 3, 0.22}, {4 << 20, 256 << 10, 6, 0.1},
		{16 << 20, 4 << 20, 3, 0.18}, {16 << 20, 4 << 20, 3, 0.15}, {32 << 20, 4 << 20, 3, 0.2},
	} {
		fs := vfs.NewMemory(1)
		o := smallFormat()
		o.Size, o.WALSize, o.slotSize = 64<<20, c.wal, c.slot
		mustFormat(t, fs, testPath, o)
		d, err := Open(t.Context(), fs, testPath, Options{foreground: true})
		if err != nil {
			t.Fatal(err)
		}
		tails(t, d, c.n, c.part)
		before := d.wal.freedSlots()
		done := make(chan error, 1)
		go func() { done <- d.tend() }()
		for ends := false; !ends; {
			select {
			case err := <-done:
				if err != nil {
					t.Fatal(err)
				}
				t.Logf("%+v: ends after %d slots, %d of %d bytes are used", c, d.wal.freedSlots()-before, d.wal.used(), d.wal.size())
				ends = true
			default:
				if n := d.wal.freedSlots() - before; n > 20*int64(len(d.wal.slots)) {
					t.Errorf("%+v: the log was written anew %d times, nobody wrote to it, and %d of %d bytes are used", c, n/int64(len(d.wal.slots)), d.wal.used(), d.wal.size())
					_ = d.Close() // which stops it
					<-done
					ends = true
				}
			}
		}
		_ = d.Close()
	}
}

// As before, until the log is full: who appends is told so.
func TestAppendEnds(t *testing.T) {
	for _, n := range []byte{4, 5, 6} {
		fs := vfs.NewMemory(1)
		o := smallFormat()
		o.WALSize, o.slotSize = 4<<20, 256<<10
		mustFormat(t, fs, testPath, o)
		d, err := Open(t.Context(), fs, testPath, Options{foreground: true})
		if err != nil {
			t.Fatal(err)
		}
		for i := range n {
			mustCreate(t, d, i, 8<<20)
		}
		done := make(chan error, 1)
		go func() {
			for seq := holdfast.Seq(1); ; seq++ {
				for i := range n {
					r, _ := d.Replica(testDesc(i, 0).Replica)
					if err := r.Append([]Entry{writeEntry(0, seq, int64(seq%60)*15*blockSize, 15*blockSize)}); err != nil {
						done <- err
						return
					}
				}
			}
		}()
		for stop := false; !stop; {
			select {
			case err := <-done:
				wantKind(t, err, holdfast.ErrNoSpace)
				t.Logf("%d replicas: refused with %d of %d bytes used; written anew %d times", n, d.wal.used(), d.wal.size(), d.wal.freedSlots()/int64(len(d.wal.slots)))
				stop = true
			default:
				if w := d.wal.freedSlots() / int64(len(d.wal.slots)); w > 40 {
					t.Errorf("%d replicas: the log was written anew %d times, and the writer waits: %d of %d bytes are used", n, w, d.wal.used(), d.wal.size())
					stop = true
				}
			}
		}
		_ = d.Close()
	}
}

// Everything at once, in the background: for the race detector, and what is read is what
// was written.
func TestConcurrent(t *testing.T) {
	fs := vfs.NewMemory(9)
	o := smallFormat()
	o.Size, o.WALSize, o.slotSize = 96<<20, 16<<20, 2<<20
	mustFormat(t, fs, testPath, o)
	d, err := Open(t.Context(), fs, testPath, Options{ApplyEvery: 5 * time.Millisecond, cacheLeaves: 12})
	if err != nil {
		t.Fatal(err)
	}
	const size = 200 * leafEntries * chunkSize
	end := time.Now().Add(5 * time.Second)
	var wg sync.WaitGroup
	for i := range byte(4) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 3))
			for life := byte(0); time.Now().Before(end); life++ {
				id := i<<5 | life%32
				r, err := d.CreateReplica(testDesc(id, size))
				if err != nil {
					t.Error(err)
					return
				}
				want := map[int64]holdfast.Seq{} // first block of a leaf
				lens := map[int64]int{}
				seq := holdfast.Seq(0)
				for range 400 {
					if time.Now().After(end) {
						break
					}
					leaf := rng.Int64N(size / (leafEntries * chunkSize))
					off := leaf * leafEntries * chunkSize
					e := Entry{Seq: seq + 1, Type: OpTrim, Offset: off, Length: min(size-off, (1+rng.Int64N(120))*leafEntries*chunkSize)}
					switch rng.IntN(20) {
					case 0:
					case 1, 2, 3, 4:
						e = writeEntry(0, seq+1, off, (2+rng.IntN(6))*chunkSize)
					default:
						e = writeEntry(0, seq+1, off, blockSize)
					}
					err := r.Append([]Entry{e})
					if errors.Is(err, holdfast.ErrNoSpace) {
						if _, err := r.Sync(t.Context()); err != nil {
							t.Error(err)
						}
						r.SetCommit(seq)
						if err := d.Checkpoint(t.Context()); err != nil {
							t.Error(err)
						}
						continue
					}
					if err != nil {
						t.Error(err)
						return
					}
					seq++
					if e.Type == OpTrim {
						for o := range want {
							if o >= e.Offset && o < e.Offset+e.Length {
								delete(want, o)
								lens[o] = 0
							}
						}
					} else {
						want[off], lens[off] = seq, int(e.Length)
					}
					if rng.IntN(4) == 0 {
						r.SetCommit(seq)
					}
					for o, s := range want {
						p := make([]byte, min(lens[o], blockSize))
						if err := r.ReadAt(p, o); err != nil {
							t.Error(err)
							return
						}
						if !bytes.Equal(p, pattern(s, lens[o])[:len(p)]) {
							t.Errorf("replica %d: %d holds other bytes", id, o)
							return
						}
						break
					}
					_ = d.Stat()
				}
				if err := d.DeleteReplica(r.Desc().Replica); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	wantClean(t, "end", fs, testPath)
}

// Tails that nobody commits, one behind the other in the log, and a writer whose entries
// are not committed either: it is told when the log is full, and until then nobody writes
// the log anew for each of its entries.
func TestAppendEndsBehindTails(t *testing.T) {
	for _, slot := range []int64{256 << 10, 1 << 20, 4 << 20} {
		for _, part := range []float64{0.15, 0.2, 0.24} {
			fs := vfs.NewMemory(1)
			o := smallFormat()
			o.WALSize, o.slotSize = max(4<<20, 4*slot), slot
			o.Size = o.WALSize + 64<<20
			mustFormat(t, fs, testPath, o)
			d, err := Open(t.Context(), fs, testPath, Options{foreground: true})
			if err != nil {
				t.Fatal(err)
			}
			done := make(chan error, 1)
			wrote := int64(0) // anew, of entries that were appended behind half the log
			go func() {
				each := holdfast.Seq(float64(d.wal.size()) * part / (8 * blockSize))
				for i := range byte(40) {
					r := mustCreate(t, d, i, 8<<20)
					for seq := holdfast.Seq(1); seq <= each; seq++ {
						if err := r.Append([]Entry{writeEntry(0, seq, int64(seq%60)*7*blockSize, 7*blockSize)}); err != nil {
							done <- err
							return
						}
						wrote += 8 * blockSize
					}
				}
				done <- nil
			}()
			for stop := false; !stop; {
				select {
				case err := <-done:
					wantKind(t, err, holdfast.ErrNoSpace)
					t.Logf("slots of %d, tails of %v: refused with %d of %d bytes used, after %d; freed %d", slot, part, d.wal.used(), d.wal.size(), wrote, d.wal.freedSlots()*slot)
					stop = true
				default:
					if w := d.wal.freedSlots() * slot / d.wal.size(); w > 40 {
						t.Errorf("slots of %d, tails of %v: the log was written anew %d times, and the writer waits: %d of %d bytes are used", slot, part, w, d.wal.used(), d.wal.size())
						stop = true
					}
				}
			}
			_ = d.Close()
			if t.Failed() {
				select {
				case <-done:
				case <-time.After(5 * time.Second):
				}
			}
		}
	}
}
