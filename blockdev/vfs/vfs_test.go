package vfs

import (
	"bytes"
	"errors"
	"io"
	iofs "io/fs"
	"path/filepath"
	"syscall"
	"testing"
	"unsafe"
)

// both runs a test on the real files and on those in memory.
func both(t *testing.T, f func(t *testing.T, fs FS, dir string)) {
	t.Run("os", func(t *testing.T) { f(t, OS{}, t.TempDir()) })
	t.Run("memory", func(t *testing.T) { f(t, NewMemory(1), "/dir") })
}

func mustOpen(t *testing.T, fs FS, path string, flags Flag) File {
	t.Helper()
	f, err := fs.OpenFile(path, flags)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func mustWrite(t *testing.T, f File, p []byte, off int64) {
	t.Helper()
	if n, err := f.WriteAt(p, off); err != nil || n != len(p) {
		t.Fatalf("write %d bytes at %d: %d, %v", len(p), off, n, err)
	}
}

func mustRead(t *testing.T, f File, off int64, n int) []byte {
	t.Helper()
	p := make([]byte, n)
	if m, err := f.ReadAt(p, off); err != nil || m != n {
		t.Fatalf("read %d bytes at %d: %d, %v", n, off, m, err)
	}
	return p
}

func filled(c byte, n int) []byte { return bytes.Repeat([]byte{c}, n) }

func TestFiles(t *testing.T) {
	both(t, func(t *testing.T, fs FS, dir string) {
		path := filepath.Join(dir, "sub", "a")
		if err := fs.Mkdir(filepath.Dir(path)); err != nil {
			t.Fatal(err)
		}
		if err := fs.Mkdir(filepath.Dir(path)); err != nil {
			t.Fatalf("mkdir again: %v", err)
		}
		if _, err := fs.OpenFile(path, 0); !errors.Is(err, iofs.ErrNotExist) {
			t.Fatalf("open of nothing: got %v", err)
		}
		f := mustOpen(t, fs, path, Create|Exclusive)
		if _, err := fs.OpenFile(path, Create|Exclusive); !errors.Is(err, iofs.ErrExist) {
			t.Fatalf("exclusive again: got %v", err)
		}
		mustWrite(t, f, []byte("hello"), 5000)
		if err := f.WritevAt([][]byte{[]byte("one"), {}, []byte("two"), filled('x', 9000)}, 100); err != nil {
			t.Fatal(err)
		}
		if got := string(mustRead(t, f, 98, 10)); got != "\x00\x00onetwoxx" {
			t.Fatalf("got %q", got)
		}
		if size, err := f.Size(); err != nil || size != 9106 {
			t.Fatalf("size %d, %v", size, err)
		}
		p := make([]byte, 20)
		if n, err := f.ReadAt(p, 9100); n != 6 || err != io.ErrUnexpectedEOF {
			t.Fatalf("read over the end: %d, %v", n, err)
		}
		if n, err := f.ReadAt(p, 10000); n != 0 || err != io.EOF {
			t.Fatalf("read behind the end: %d, %v", n, err)
		}
		if err := f.Truncate(16384); err != nil {
			t.Fatal(err)
		}
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
		b := AlignedBuffer(8192)
		if n, err := f.ReadDirectAt(b, 0); n != 8192 || err != nil || string(b[100:106]) != "onetwo" {
			t.Fatalf("direct read: %d, %v", n, err)
		}
		if err := f.PunchHole(0, 4096); err != nil && !errors.Is(err, errors.ErrUnsupported) {
			t.Fatal(err)
		} else if err == nil && !bytes.Equal(mustRead(t, f, 0, 4096), make([]byte, 4096)) {
			t.Fatal("a hole is not zero")
		}
		if err := f.Allocate(0, 16384); err != nil && !errors.Is(err, errors.ErrUnsupported) {
			t.Fatal(err)
		}
		if err := errors.Join(f.DropCache(), f.AdviseRandom(), fs.SyncDir(filepath.Dir(path))); err != nil {
			t.Fatal(err)
		}
		st, err := fs.Stat(path)
		own, err2 := f.Stat()
		if err != nil || err2 != nil || st != own || st.Kind != KindRegular || st.Size != 16384 || st.Identity == "" {
			t.Fatalf("stat %+v %v, %+v %v", st, err, own, err2)
		}
		if st, err := fs.Stat(filepath.Dir(path)); err != nil || st.Kind != KindDirectory {
			t.Fatalf("stat of the directory: %+v, %v", st, err)
		}
		if names, err := fs.ReadDir(filepath.Dir(path)); err != nil || len(names) != 1 || names[0] != "a" {
			t.Fatalf("readdir: %v, %v", names, err)
		}
		if err := fs.Remove(path); err != nil {
			t.Fatal(err)
		}
		if _, err := fs.Stat(path); !errors.Is(err, iofs.ErrNotExist) {
			t.Fatalf("stat of a removed file: got %v", err)
		}
		if id, err := fs.BootID(); err != nil || len(id) != 36 {
			t.Fatalf("boot id %q, %v", id, err)
		}
	})
}

func TestLock(t *testing.T) {
	both(t, func(t *testing.T, fs FS, dir string) {
		path := filepath.Join(dir, "a")
		f, g := mustOpen(t, fs, path, Create), mustOpen(t, fs, path, 0)
		if err := f.Lock(); err != nil {
			t.Fatal(err)
		}
		if err := g.Lock(); !errors.Is(err, ErrLocked) {
			t.Fatalf("second lock: got %v", err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		if err := g.Lock(); err != nil {
			t.Fatalf("lock after close: %v", err)
		}
	})
}

func TestManyBuffers(t *testing.T) {
	both(t, func(t *testing.T, fs FS, dir string) {
		f := mustOpen(t, fs, filepath.Join(dir, "a"), Create)
		var bufs [][]byte
		var want []byte
		for i := range 3*maxIovecs + 7 {
			b := filled(byte(i), i%5)
			bufs, want = append(bufs, b), append(want, b...)
		}
		if err := f.WritevAt(bufs, 3); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(mustRead(t, f, 3, len(want)), want) {
			t.Fatal("the buffers did not arrive in order")
		}
	})
}

func TestDirectWrites(t *testing.T) {
	f := mustOpen(t, OS{}, filepath.Join(t.TempDir(), "a"), Create|Direct)
	b := AlignedBuffer(8192)
	copy(b, "direct")
	mustWrite(t, f, b, 4096)
	if got := mustRead(t, f, 4096, 8192); !bytes.Equal(got[:6], []byte("direct")) {
		// Reads through this handle are direct too, so the buffer of mustRead may
		// not be aligned; the kernel refuses that rather than return other bytes.
		t.Fatalf("got %q", got[:6])
	}
}

func TestAlignedBuffer(t *testing.T) {
	for _, n := range []int{1, 512, 4096, 100000} {
		b := AlignedBuffer(n)
		if len(b) != n || cap(b) != n || uintptr(unsafe.Pointer(&b[0]))%PageSize != 0 {
			t.Fatalf("%d bytes: %d at %p", n, len(b), &b[0])
		}
	}
}

// A crash keeps what was synced, and of the rest some; of every page of a file
// the old or the new bytes, of at most one a mix.
func TestCrashKeepsWhatWasSynced(t *testing.T) {
	m := NewMemory(1)
	f := mustOpen(t, m, "/d/a", Create)
	const pages = 64
	mustWrite(t, f, filled('o', pages*PageSize), 0)
	if err := errors.Join(f.Sync(), m.SyncDir("/d")); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, f, filled('n', pages*PageSize/2), 0)
	seenOld, seenNew, seenTorn, seenAll := false, false, false, false
	for seed := range uint64(60) {
		c := m.Crash(seed)
		g := mustOpen(t, c, "/d/a", 0)
		b := mustRead(t, g, 0, pages*PageSize)
		torn, fresh := 0, 0
		for i := range pages {
			p := b[i*PageSize : (i+1)*PageSize]
			n := bytes.Count(p, []byte{'n'})
			if n+bytes.Count(p, []byte{'o'}) != PageSize {
				t.Fatalf("seed %d: page %d holds bytes from nowhere", seed, i)
			}
			switch {
			case i >= pages/2 && n > 0:
				t.Fatalf("seed %d: page %d was never written anew", seed, i)
			case n == PageSize:
				fresh++
			case n > 0:
				torn++
			}
		}
		if torn > 1 {
			t.Fatalf("seed %d: %d torn pages", seed, torn)
		}
		seenOld = seenOld || fresh == 0
		seenAll = seenAll || fresh == pages/2
		seenNew = seenNew || fresh > 0 && fresh < pages/2
		seenTorn = seenTorn || torn == 1
		again, _ := m.Crash(seed).OpenFile("/d/a", 0)
		if !bytes.Equal(b, mustRead(t, again, 0, len(b))) {
			t.Fatalf("seed %d: two crashes of one seed differ", seed)
		}
		old, _ := m.BootID()
		if id, _ := c.BootID(); id == old {
			t.Fatal("the boot id stays over a crash")
		}
	}
	if !seenOld || !seenNew || !seenTorn || !seenAll {
		t.Fatalf("60 seeds show too little: none kept %v, some %v, all %v, torn %v", seenOld, seenNew, seenAll, seenTorn)
	}
}

func TestRestartKeepsAll(t *testing.T) {
	m := NewMemory(1)
	f := mustOpen(t, m, "/d/a", Create)
	if err := f.Lock(); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, f, filled('n', 5000), 0)
	r := m.Restart()
	g := mustOpen(t, r, "/d/a", 0)
	if err := g.Lock(); err != nil {
		t.Fatalf("a dead process holds its lock: %v", err)
	}
	if !bytes.Equal(mustRead(t, g, 0, 5000), filled('n', 5000)) {
		t.Fatal("bytes were lost")
	}
	a, _ := m.BootID()
	if b, _ := r.BootID(); a != b {
		t.Fatal("the boot id changed")
	}
	mustWrite(t, g, filled('x', 100), 0) // the restarted one is its own
	if mustRead(t, f, 0, 1)[0] != 'n' {
		t.Fatal("the clone shares its pages")
	}
	// What was not synced is still not synced.
	lost := false
	for seed := range uint64(20) {
		if _, err := r.Crash(seed).Stat("/d/a"); errors.Is(err, iofs.ErrNotExist) {
			lost = true
		}
	}
	if !lost {
		t.Fatal("an entry that was never synced survived 20 crashes")
	}
}

// After a failed sync, reads still show the pages, the medium does not have
// them, and the next sync says that all is well.
func TestFailedSyncLosesPages(t *testing.T) {
	m := NewMemory(1)
	f := mustOpen(t, m, "/d/a", Create)
	mustWrite(t, f, filled('o', PageSize), 0)
	if err := errors.Join(f.Sync(), m.SyncDir("/d")); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, f, filled('n', PageSize), 0)
	m.Inject(Fault{Op: OpSync, Path: "a", Times: 1, Err: syscall.EIO})
	if err := f.Sync(); !errors.Is(err, syscall.EIO) {
		t.Fatalf("got %v", err)
	}
	if err := f.Sync(); err != nil {
		t.Fatalf("second sync: %v", err)
	}
	if mustRead(t, f, 0, 1)[0] != 'n' {
		t.Fatal("the cache forgot")
	}
	b := AlignedBuffer(PageSize)
	if _, err := f.ReadDirectAt(b, 0); err != nil || b[0] != 'o' {
		t.Fatalf("the medium has %q, %v", b[0], err)
	}
}

func TestFaults(t *testing.T) {
	m := NewMemory(1)
	f := mustOpen(t, m, "/d/a", Create)
	m.Inject(Fault{Op: OpWrite, Path: "/d/a", After: 1, Times: 1, Err: syscall.EIO})
	m.Inject(Fault{Op: OpRead, Path: "other", Err: syscall.EIO})
	mustWrite(t, f, []byte("a"), 0)
	if _, err := f.WriteAt([]byte("b"), 0); !errors.Is(err, syscall.EIO) {
		t.Fatalf("second write: got %v", err)
	}
	mustWrite(t, f, []byte("c"), 0)
	if got := mustRead(t, f, 0, 1)[0]; got != 'c' {
		t.Fatalf("got %q", got)
	}
	if err := m.FlipBit("/d/a", 0, 1); err != nil {
		t.Fatal(err)
	}
	if got := mustRead(t, f, 0, 1)[0]; got != 'c'^2 {
		t.Fatalf("after a flip: got %q", got)
	}
	m.Limit(m.Held() + PageSize)
	mustWrite(t, f, filled('x', PageSize), PageSize)
	if _, err := f.WriteAt(filled('x', PageSize), 2*PageSize); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("beyond the limit: got %v", err)
	}
	mustWrite(t, f, filled('y', PageSize), PageSize) // an overwrite needs no space
	if err := f.PunchHole(PageSize, PageSize); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, f, filled('x', PageSize), 2*PageSize)
}

func TestDeviceInMemory(t *testing.T) {
	m := NewMemory(1)
	m.AddDevice("/dev/x", 1<<20)
	f := mustOpen(t, m, "/dev/x", Exclusive)
	st, err := f.Stat()
	if err != nil || st.Kind != KindBlockDevice || st.Size != 1<<20 {
		t.Fatalf("stat %+v, %v", st, err)
	}
	if _, err := f.WriteAt(filled(1, 4096), 1<<20-100); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("write over the end: got %v", err)
	}
	if err := f.Truncate(1); err == nil {
		t.Fatal("a device was truncated")
	}
	m.Foreign("/dev/x")
	if st, _ := f.Stat(); st.KeepsPages {
		t.Fatal("a foreign file keeps pages")
	}
}

// TestInPlace decides what is set on a file of btrfs.
func TestInPlace(t *testing.T) {
	const other = 0x40
	for _, c := range []struct {
		flags int
		size  int64
		want  int
		err   error
	}{
		{0, 0, flagNoCOW, nil},
		{other, 0, other | flagNoCOW, nil},
		{flagCompressed, 0, flagNoCOW, nil},
		{flagNoCOW, 0, flagNoCOW, nil},
		{flagNoCOW, 1 << 30, flagNoCOW, nil}, // made so before
		{0, 1, 0, ErrCopyOnWrite},
	} {
		if got, err := inPlace(c.flags, c.size); got != c.want || !errors.Is(err, c.err) {
			t.Errorf("flags %#x of %d bytes: got %#x, %v; want %#x, %v", c.flags, c.size, got, err, c.want, c.err)
		}
	}
}
