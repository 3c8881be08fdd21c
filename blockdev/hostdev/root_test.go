package hostdev

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
)

// aligned returns memory that direct I/O takes.
func aligned(t *testing.T, n int) []byte {
	t.Helper()
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(b) })
	return b
}

// openDirect opens a loop device past the page cache.
func openDirect(t *testing.T, loop *Loop) int {
	t.Helper()
	fd, err := unix.Open(loop.Path(), unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

func TestRootLoopReadsAndWrites(t *testing.T) {
	needRoot(t)
	dev := newMemory(64 << 20)
	_, s, loop := device(t, dev)
	f, err := os.OpenFile(loop.Path(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	rng := rand.New(rand.NewPCG(1, 2))
	want := make([]byte, 3<<20)
	for i := range want {
		want[i] = byte(rng.Uint32())
	}
	if _, err := f.WriteAt(want, 1<<20); err != nil {
		t.Fatal(err)
	}
	before := dev.flushes.Load()
	for range 5 {
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			t.Fatal(err)
		}
	}
	if got := dev.flushes.Load() - before; got != 5 {
		t.Errorf("flushes at the device: got %d, want 5", got)
	}
	if !bytes.Equal(dev.content(1<<20, 4<<20), want) {
		t.Error("the device holds other bytes than were written")
	}
	got := make([]byte, len(want))
	if err := unix.IoctlSetInt(int(f.Fd()), unix.BLKFLSBUF, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := f.ReadAt(got, 1<<20); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("other bytes were read than were written")
	}
	if !s.MemoryLocked() {
		t.Error("the requests' memory is not locked")
	}
}

// TestRootErrorsReachTheUser: what a Device says becomes the errno of the
// program's call on the loop device.
func TestRootErrorsReachTheUser(t *testing.T) {
	needRoot(t)
	dev := newMemory(16 << 20)
	_, _, loop := device(t, dev)
	fd := openDirect(t, loop)
	block := aligned(t, 4096)
	for kind, want := range map[holdfast.Kind]unix.Errno{holdfast.ErrNoSpace: unix.ENOSPC, holdfast.ErrIO: unix.EIO, holdfast.ErrFenced: unix.EIO, holdfast.ErrIntegrity: unix.EIO} {
		dev.fail.Store(holdfast.Errorf(kind, "told to"))
		if _, err := unix.Pwrite(fd, block, 0); !errors.Is(err, want) {
			t.Errorf("write that fails with %s: got %v, want %v", kind, err, want)
		}
		if _, err := unix.Pread(fd, block, 0); !errors.Is(err, want) {
			t.Errorf("read that fails with %s: got %v, want %v", kind, err, want)
		}
		if err := unix.Fsync(fd); err == nil {
			t.Errorf("flush that fails with %s: got success", kind)
		}
	}
	for _, kind := range []holdfast.Kind{holdfast.ErrInvalid, holdfast.ErrUnsupported} {
		dev.fail.Store(holdfast.Errorf(kind, "told to"))
		if err := unix.Fsync(fd); err == nil {
			t.Errorf("flush that fails with %s: got success", kind)
		}
	}
	dev.fail.Store(nil)
	before := dev.flushes.Load()
	if err := unix.Fsync(fd); err != nil {
		t.Errorf("flush after the errors: %v", err)
	}
	if got := dev.flushes.Load() - before; got != 1 {
		t.Errorf("flushes after the errors: got %d, want 1", got)
	}
}

// TestRootDiscardAndZero: the block layer's discard and zeroing arrive as trim
// and zeroing of exactly the range.
func TestRootDiscardAndZero(t *testing.T) {
	needRoot(t)
	dev := newMemory(16 << 20)
	want := pattern(16<<20, 3)
	copy(dev.bytes, want)
	_, _, loop := device(t, dev)
	fd := openDirect(t, loop)
	for _, c := range []struct {
		name   string
		ioctl  uintptr
		off, n uint64
	}{{"discard", unix.BLKDISCARD, 1 << 20, 4 << 20}, {"zero", unix.BLKZEROOUT, 8<<20 + 512, 1<<20 + 1024}} {
		r := [2]uint64{c.off, c.n}
		if err := ioctlRange(fd, c.ioctl, &r); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		clear(want[c.off : c.off+c.n])
		if !bytes.Equal(dev.content(0, len(want)), want) {
			t.Errorf("%s: other bytes than the range became zero", c.name)
		}
	}
	if dev.trims.Load() == 0 || dev.writes.Load() != 0 {
		t.Errorf("got %d trims and %d writes, want some and none", dev.trims.Load(), dev.writes.Load())
	}
	name := fmt.Sprintf("/sys/block/loop%d/queue/", loop.Number())
	for file, want := range map[string]string{"discard_granularity": "4096", "logical_block_size": "512"} {
		if b, err := os.ReadFile(filepath.Join(name, file)); err != nil || strings.TrimSpace(string(b)) != want {
			t.Errorf("%s: got %q, %v, want %s", file, b, err, want)
		}
	}
}

// TestRootTakeover closes a server that holds requests; the next one gets them
// again, and the program that waits sees no error.
func TestRootTakeover(t *testing.T) {
	needRoot(t)
	dev := newMemory(16 << 20)
	c, s, loop := device(t, dev)
	if !c.Params().CanResend() {
		t.Skip("this kernel cannot resend")
	}
	fd := openDirect(t, loop)
	hold := make(chan struct{})
	dev.hold.Store(&hold)
	block := aligned(t, 1<<20)
	copy(block, pattern(1<<20, 9))
	wrote := make(chan error, 1)
	go func() {
		_, err := unix.Pwrite(fd, block, 1<<20)
		wrote <- err
	}()
	for dev.held.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	now, cancel := context.WithCancel(context.Background())
	cancel()
	s.Close(now)
	select {
	case err := <-wrote:
		t.Fatalf("the write ended without a server: %v", err)
	default:
	}
	dev.hold.Store(nil)
	next, err := c.Dup()
	if err != nil {
		t.Fatal(err)
	}
	second, err := Serve(dev, next, c.Params(), Options{Resend: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Abort(); second.Close(context.Background()) })
	if err := <-wrote; err != nil {
		t.Errorf("write across the takeover: %v", err)
	}
	if !bytes.Equal(dev.content(1<<20, 2<<20), block) {
		t.Error("the device has other bytes than were written")
	}
}

// TestRootAbort: an abort ends who waits, with an error, and every server.
func TestRootAbort(t *testing.T) {
	needRoot(t)
	dev := newMemory(16 << 20)
	c, s, loop := device(t, dev)
	fd := openDirect(t, loop)
	hold := make(chan struct{})
	defer close(hold)
	dev.hold.Store(&hold)
	wrote := make(chan error, 1)
	block := aligned(t, 4096)
	go func() {
		_, err := unix.Pwrite(fd, block, 0)
		wrote <- err
	}()
	for dev.held.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	if c.Ended() {
		t.Fatal("the connection has ended already")
	}
	if err := c.Abort(); err != nil {
		t.Fatal(err)
	}
	if err := <-wrote; err == nil {
		t.Error("the write succeeded")
	}
	<-s.Done()
	if err := s.Err(); err != nil || !c.Ended() {
		t.Errorf("after the abort: got %v, ended %v, want no error and an end", err, c.Ended())
	}
	if err := c.Abort(); err != nil {
		t.Errorf("second abort: %v", err)
	}
	now, cancel := context.WithCancel(context.Background())
	cancel()
	s.Close(now)
}

// TestRootNothingLeft: when the loop device is cleared, the connection goes.
func TestRootNothingLeft(t *testing.T) {
	needRoot(t)
	c, s, loop := device(t, newMemory(16<<20))
	if inUse, err := loop.InUse(); inUse || err != nil {
		t.Errorf("in use: got %v, %v, want no", inUse, err)
	}
	loop.Clear()
	<-s.Done()
	for {
		ids, err := Connections()
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Contains(ids, c.ID()) {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if !c.Ended() {
		t.Error("the connection has not ended")
	}
}

func TestRootProbe(t *testing.T) {
	needRoot(t)
	ways := Probe(ctxFor(t))
	if len(ways) != 2 || ways[0].Name != KernelNBD || ways[0].Works || ways[0].Lack == "" || ways[1].Name != FuseLoop {
		t.Fatalf("ways: got %+v, want nbd, which does not work, and fuse-loop", ways)
	}
	if !ways[1].Works {
		t.Errorf("fuse-loop does not work here: %s (%s)", ways[1].Lack, ways[1].Remedy)
	}
}

// TestProbeWithoutPrivilege: a lack has a reason and a remedy.
func TestProbeWithoutPrivilege(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Skip("runs as root")
	}
	for _, w := range Probe(t.Context()) {
		if w.Works || w.Lack == "" || w.Remedy == "" {
			t.Errorf("got %+v, want a lack with a remedy", w)
		}
	}
}
