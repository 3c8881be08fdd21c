package hostdev

import (
	"bytes"
	"math/rand/v2"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

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
	if !bytes.Equal(dev.bytes[1<<20:4<<20], want) {
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
	t.Logf("stats %+v, memory locked %v", s.Stats(), s.MemoryLocked())
}
