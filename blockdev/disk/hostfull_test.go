package disk

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// wantClean checks a disk that nobody has open and wants nothing found.
func wantClean(t *testing.T, what string, fs vfs.FS, path string) {
	t.Helper()
	c, err := Check(t.Context(), fs, path, nil)
	if err != nil {
		t.Fatalf("%s: check: %v", what, err)
	}
	if c.Found != 0 {
		t.Fatalf("%s: check finds %+v", what, c.Findings)
	}
}

// host is a disk on a file system that fills and empties while it is used.
type host struct {
	t       *testing.T
	rng     *rand.Rand
	fs      *vfs.Memory
	d       *Disk
	replica byte             // its life: each has another id
	seq     holdfast.Seq     // the log's tail
	blocks  map[int64][]byte // what was written; all else is zero
	refused int
}

const hostBlocks = 150 * blocksPerChunk // more chunks than the file system ever has room for

func (h *host) r() *Replica {
	r, ok := h.d.Replica(testDesc(h.replica, 0).Replica)
	if !ok {
		h.t.Fatal("the replica is gone")
	}
	return r
}

// append logs an entry; it may be refused only if it needs a new chunk.
func (h *host) append(e Entry) {
	h.t.Helper()
	r := h.r()
	needs, err := r.need(e.Offset, e.Length)
	if err != nil {
		h.t.Fatal(err)
	}
	e.Seq, e.Commit = h.seq+1, h.seq
	switch err := r.Append([]Entry{e}); {
	case err == nil:
	case errors.Is(err, holdfast.ErrNoSpace) && e.Type == OpWrite && needs.Need > 0:
		h.refused++
		if tail := r.Status().Tail; tail != h.seq {
			h.t.Fatalf("refused, and the tail went from %d to %d", h.seq, tail)
		}
		return
	default:
		h.t.Fatalf("%v of %d bytes at %d, which needs %d chunks: %v", e.Type, e.Length, e.Offset, needs.Need, err)
	}
	h.seq++
	for b := e.Offset / blockSize; b < (e.Offset+e.Length)/blockSize; b++ {
		delete(h.blocks, b)
		if e.Type == OpWrite {
			h.blocks[b] = e.Payload[b*blockSize-e.Offset:][:blockSize]
		}
	}
}

func (h *host) step() {
	h.t.Helper()
	first := int64(h.rng.IntN(hostBlocks - 16))
	n := 1 + h.rng.IntN(16)
	switch k := h.rng.IntN(100); {
	case k < 60:
		// Without a zero: the file system in memory, unlike others, frees a page of
		// the log that is overwritten with zeroes.
		p := bytes.ReplaceAll(pattern(h.seq+1, n*blockSize), []byte{0}, []byte{0xee})
		h.append(Entry{Type: OpWrite, Offset: first * blockSize, Length: int64(len(p)), CRC: crcsOf(p), Payload: p})
	case k < 72:
		off := first / blocksPerChunk * chunkSize
		h.append(Entry{Type: OpTrim, Offset: off, Length: min(chunkSize*int64(1+h.rng.IntN(20)), hostBlocks*blockSize-off)})
	case k < 80:
		mustSync(h.t, h.r())
		h.r().SetCommit(h.seq)
	case k < 86:
		if err := h.d.Checkpoint(h.t.Context()); err != nil && !errors.Is(err, holdfast.ErrNoSpace) {
			h.t.Fatal(err)
		}
	case k < 94: // somebody takes all the rest, most of it, or gives it back
		switch h.rng.IntN(8) {
		case 0:
			h.fs.Limit(0)
		case 1, 2:
			h.fs.Limit(h.fs.Held())
		default:
			h.fs.Limit(h.fs.Held() + h.rng.Int64N(1<<20))
		}
	case k < 98:
		h.again()
	default:
		h.remove()
	}
	if err := h.d.Stat().Failed; err != nil {
		h.t.Fatalf("the disk failed: %v", err)
	}
}

// again kills the process, or closes, checks, and opens once more.
func (h *host) again() {
	h.t.Helper()
	if h.rng.IntN(2) == 0 {
		if err := h.d.Close(); err != nil && !errors.Is(err, holdfast.ErrNoSpace) {
			h.t.Fatal(err)
		}
	} else {
		h.d.closeFiles()
	}
	h.fs = h.fs.Restart()
	wantClean(h.t, "between two lives", h.fs, testPath)
	h.open()
	h.match()
}

func (h *host) open() {
	h.t.Helper()
	d, err := Open(h.t.Context(), h.fs, testPath, Options{foreground: true})
	if err != nil {
		h.t.Fatal(err)
	}
	h.d = d
}

// remove deletes the replica and makes another: neither needs room.
func (h *host) remove() {
	h.t.Helper()
	if err := h.d.DeleteReplica(h.r().Desc().Replica); err != nil {
		h.t.Fatal(err)
	}
	h.replica++
	mustCreate(h.t, h.d, h.replica, hostBlocks*blockSize)
	h.seq, h.blocks = 0, map[int64][]byte{}
}

// match reads everything.
func (h *host) match() {
	h.t.Helper()
	p := make([]byte, 16*blockSize)
	for b := int64(0); b < hostBlocks; b += 16 {
		if err := h.r().ReadAt(p, b*blockSize); err != nil {
			h.t.Fatal(err)
		}
		for i := range int64(16) {
			want := h.blocks[b+i]
			if want == nil {
				want = zeroPage[:]
			}
			if !bytes.Equal(p[i*blockSize:(i+1)*blockSize], want) {
				h.t.Fatalf("block %d has other bytes", b+i)
			}
		}
	}
}

// A host whose file system fills at any moment costs new chunks and nothing else:
// overwrites, trims, deletes and checkpoints go on, the disk never fails, every
// byte is as it was written, and a check finds nothing.
func TestHostFillsAndEmpties(t *testing.T) {
	refused := 0
	for seed := range uint64(hostSeeds) {
		h := &host{t: t, rng: rand.New(rand.NewPCG(seed, 0xf011)), fs: vfs.NewMemory(seed), blocks: map[int64][]byte{}}
		mustFormat(t, h.fs, testPath, tinyFormat())
		h.open()
		mustCreate(t, h.d, 0, hostBlocks*blockSize)
		h.fs.Limit(h.fs.Held() + 3<<20)
		for range 250 {
			h.step()
		}
		h.again()
		h.d.closeFiles()
		refused += h.refused
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
	if refused < 5*hostSeeds {
		t.Errorf("only %d writes were refused: the host was never full", refused)
	}
	t.Logf("%d writes refused on %d hosts", refused, hostSeeds)
}

// ENOSPC where no call of ours should meet it, in the middle of everything: the disk
// fails rather than go on (R12), and what it holds is whole.
func TestENOSPCNeverCorrupts(t *testing.T) {
	for after := range 40 {
		fs := vfs.NewMemory(uint64(after))
		mustFormat(t, fs, testPath, tinyFormat())
		d, err := Open(t.Context(), fs, testPath, Options{foreground: true})
		if err != nil {
			t.Fatal(err)
		}
		r := mustCreate(t, d, 1, 4<<20)
		fs.Inject(vfs.Fault{Op: vfs.OpWrite, After: after, Err: syscall.ENOSPC})
		good := holdfast.Seq(0)
		for seq := holdfast.Seq(1); seq <= 60; seq++ {
			if err = r.Append([]Entry{writeEntry(0, seq, int64(seq%13)*chunkSize, 3*blockSize)}); err != nil {
				break
			}
			if _, err = r.Sync(t.Context()); err != nil {
				break
			}
			good = seq
			r.SetCommit(seq)
			if seq%7 == 0 {
				if err = d.Checkpoint(t.Context()); err != nil {
					break
				}
			}
		}
		if after < 20 && err == nil {
			t.Fatalf("after %d writes: nobody noticed", after)
		}
		d.wg.Wait()
		d.closeFiles()
		fs.ClearFaults()
		next := fs.Restart()
		c, err := Check(t.Context(), next, testPath, nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range c.Findings {
			if !strings.Contains(f.What, "marked as failed") && f.Where != "superblock" { // the mark's first copy may have met it
				t.Fatalf("after %d writes: check finds %+v", after, f)
			}
		}
		d = mustOpen(t, next, testPath)
		r, _ = d.Replica(testDesc(1, 0).Replica)
		if st := r.Status(); st.Tail < good || st.Damaged != nil {
			t.Fatalf("after %d writes: %d were durable: %+v", after, good, st)
		}
		for seq := max(good, 13) - 12; seq <= good; seq++ {
			if seq+13 > r.Status().Tail {
				wantRead(t, r, int64(seq%13)*chunkSize, pattern(seq, 3*blockSize))
			}
		}
	}
}

// A host that was full and has room again: large writes go to fresh chunks as before,
// after the next checkpoint.
func TestHostFullAndRoomAgain(t *testing.T) {
	for _, refused := range []bool{false, true} {
		fs := vfs.NewMemory(1)
		mustFormat(t, fs, testPath, smallFormat())
		d, err := Open(t.Context(), fs, testPath, Options{foreground: true})
		if err != nil {
			t.Fatal(err)
		}
		r := mustCreate(t, d, 1, 1<<30)
		seq := holdfast.Seq(0)
		write := func(chunk int64) (fresh bool, err error) {
			if err := r.Append([]Entry{writeEntry(0, seq+1, chunk*chunkSize, 2*chunkSize)}); err != nil {
				return false, err
			}
			seq++
			return r.index.get(seq).fresh != nil, nil
		}
		if fresh, err := write(0); !fresh || err != nil {
			t.Fatalf("fresh chunks: %v, %v", fresh, err)
		}
		fs.Limit(fs.Held())
		for fresh := true; fresh; { // as long as there are chunks with space
			if fresh, err = write(0); err != nil {
				t.Fatal(err)
			}
		}
		for chunk := int64(2); refused && err == nil; chunk += 2 {
			_, err = write(chunk)
		}
		if refused {
			wantKind(t, err, holdfast.ErrNoSpace)
		}
		fs.Limit(1 << 40)
		r.SetCommit(seq)
		if err := d.Checkpoint(t.Context()); err != nil {
			t.Fatal(err)
		}
		if spare := d.alloc.short(1000, 0); spare == 0 {
			t.Fatal("there was room all the time")
		}
		for i := range 200 { // more than the checkpoint has made free
			if fresh, err := write(0); !fresh || err != nil {
				t.Fatalf("write %d after there was room: fresh chunks: %v, %v", i, fresh, err)
			}
			if i%50 == 0 {
				r.SetCommit(seq)
			}
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestRootFullHosts is TestFullHost on real file systems that run full: overwrites,
// trims, deletes, reopening; nothing is found by a check before or after.
func TestRootFullHosts(t *testing.T) {
	run := func(t *testing.T, args ...string) {
		t.Helper()
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, out)
		}
	}
	for _, c := range []struct {
		name  string
		mount func(t *testing.T, dir string)
	}{
		{"ext4", func(t *testing.T, dir string) {
			dev := loopDevice(t, 48<<20)
			run(t, "mkfs.ext4", "-q", "-m", "0", dev)
			run(t, "mount", dev, dir)
		}},
		{"tmpfs", func(t *testing.T, dir string) {
			run(t, "mount", "-t", "tmpfs", "-o", "size=48m", "holdfast-test", dir)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if os.Geteuid() != 0 || os.Getenv("HOLDFAST_UNIT") == "1" {
				if os.Getenv("CI") == "true" && os.Getenv("HOLDFAST_UNIT") != "1" {
					t.Fatal("a mount needs root")
				}
				t.Skip("a mount needs root")
			}
			for _, tool := range []string{"mkfs.ext4", "mount", "umount"} {
				if _, err := exec.LookPath(tool); err != nil {
					t.Skip(err)
				}
			}
			dir := t.TempDir()
			c.mount(t, dir)
			t.Cleanup(func() { run(t, "umount", dir) })
			fillHost(t, dir)
		})
	}
}

// fillHost fills the file system of a directory with a disk and then with another
// file to the last block, and uses the disk.
func fillHost(t *testing.T, dir string) {
	t.Helper()
	path := dir + "/image"
	o := smallFormat()
	o.Size = 256 << 20 // far more than there is
	mustFormat(t, vfs.OS{}, path, o)
	d := mustOpen(t, vfs.OS{}, path)
	r := mustCreate(t, d, 1, 1<<30)
	full := fillUp(t, r)
	f, err := os.Create(dir + "/other")
	if err != nil {
		t.Fatal(err)
	}
	for err = nil; err == nil; {
		_, err = f.Write(make([]byte, 4096))
	}
	_ = f.Close()
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	var last *Disk
	useFull(t, d, r, full, func() *Disk {
		wantClean(t, "full", vfs.OS{}, path)
		last = mustOpen(t, vfs.OS{}, path)
		return last
	})
	if err := last.Close(); err != nil {
		t.Fatal(err)
	}
	wantClean(t, "at the end", vfs.OS{}, path)
}
