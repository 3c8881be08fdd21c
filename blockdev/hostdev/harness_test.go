package hostdev

import (
	"context"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast"
)

// memory is a Device of plain memory that counts what reached it and can be
// told to fail or to wait.
type memory struct {
	mu    sync.RWMutex
	bytes []byte

	reads, writes, flushes, trims, zeroes atomic.Int64

	fail atomic.Pointer[holdfast.Error] // every request fails with it, if set
	hold atomic.Pointer[chan struct{}]  // every request waits for it, if set
	held atomic.Int64                   // requests that wait now
}

func newMemory(size int64) *memory { return &memory{bytes: make([]byte, size)} }

func (m *memory) enter(ctx context.Context, off, n int64) error {
	if hold := m.hold.Load(); hold != nil {
		m.held.Add(1)
		defer m.held.Add(-1)
		select {
		case <-*hold:
		case <-ctx.Done():
			return holdfast.Errorf(holdfast.ErrTimeout, "cancelled: %w", ctx.Err())
		}
	}
	if e := m.fail.Load(); e != nil {
		return e
	}
	if off < 0 || n < 0 || off+n > int64(len(m.bytes)) {
		return holdfast.Errorf(holdfast.ErrInvalid, "[%d,+%d) leaves the device", off, n)
	}
	return nil
}

func (m *memory) Size() int64                     { return int64(len(m.bytes)) }
func (m *memory) Blocks() (logical, physical int) { return 512, 4096 }

func (m *memory) ReadAt(ctx context.Context, p []byte, off int64) error {
	m.reads.Add(1)
	if err := m.enter(ctx, off, int64(len(p))); err != nil {
		return err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	copy(p, m.bytes[off:])
	return nil
}

func (m *memory) WriteAt(ctx context.Context, p []byte, off int64, fua bool) error {
	m.writes.Add(1)
	if err := m.enter(ctx, off, int64(len(p))); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	copy(m.bytes[off:], p)
	return nil
}

func (m *memory) Flush(ctx context.Context) error {
	m.flushes.Add(1)
	return m.enter(ctx, 0, 0)
}

func (m *memory) Trim(ctx context.Context, off, n int64, fua bool) error {
	m.trims.Add(1)
	const block = holdfast.BlockSize
	first, last := (off+block-1)/block*block, (off+n)/block*block
	return m.zero(ctx, first, max(last-first, 0))
}

func (m *memory) WriteZeroes(ctx context.Context, off, n int64, noHole, fua bool) error {
	m.zeroes.Add(1)
	return m.zero(ctx, off, n)
}

func (m *memory) zero(ctx context.Context, off, n int64) error {
	if err := m.enter(ctx, off, n); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.bytes[off : off+n])
	return nil
}

// content returns a copy of what the device holds in [from, to).
func (m *memory) content(from, to int) []byte {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return append([]byte(nil), m.bytes[from:to]...)
}

// needRoot skips a test that needs root and /dev/fuse, unless CI says that
// nothing may be skipped.
func needRoot(t testing.TB) {
	t.Helper()
	lack := ""
	if os.Getenv("HOLDFAST_UNIT") == "1" {
		t.Skip("HOLDFAST_UNIT=1: tests that need root are left out")
	}
	if os.Geteuid() != 0 {
		lack = "needs root"
	} else if _, err := os.Stat("/dev/fuse"); err != nil {
		lack = "needs /dev/fuse"
	}
	if lack == "" {
		return
	}
	if os.Getenv("CI") == "true" && os.Geteuid() == 0 {
		t.Fatal(lack)
	}
	t.Skip(lack)
}

// ctxFor bounds one test.
func ctxFor(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// device serves dev and puts a loop device on it; all is gone at the test's end.
func device(t testing.TB, dev *memory) (*Connection, *Server, *Loop) {
	t.Helper()
	ctx := ctxFor(t)
	c, err := Connect(ctx)
	if err != nil {
		t.Fatalf("connect: %v", err)
	}
	t.Cleanup(c.Close)
	fd, err := c.Dup()
	if err != nil {
		t.Fatalf("dup: %v", err)
	}
	s, err := Serve(dev, fd, c.Params(), Options{})
	if err != nil {
		t.Fatalf("serve: %v", err)
	}
	t.Cleanup(func() { _ = c.Abort(); s.Close(ctx) })
	f, err := OpenRoot(c.Root())
	if err != nil {
		t.Fatalf("open the file: %v", err)
	}
	defer f.Close()
	loop, err := ConfigureLoop(ctx, f, t.Name())
	if err != nil {
		t.Fatalf("loop: %v", err)
	}
	t.Cleanup(loop.Clear)
	c.Release()
	return c, s, loop
}
