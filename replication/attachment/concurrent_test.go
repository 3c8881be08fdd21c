package attachment

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast"
)

// Writers that share blocks but no bytes: each owns every fourth 512-byte
// sector. No update is lost, whatever read-modify-write meets what.
func TestSectorsOfSharedBlocks(t *testing.T) {
	const writers, sector = 4, 512
	c := newCluster(t, 3, 1<<20, 1<<20)
	a := c.attach(c.hosts[0])
	want := make([]byte, c.size)
	sectors := c.size / sector / 16 // few blocks, many meetings
	var mu sync.Mutex
	var running sync.WaitGroup
	for w := range writers {
		running.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 3))
			for range 120 {
				i := rng.Int64N(sectors/writers)*writers + int64(w)
				p := make([]byte, sector)
				random(rng, p)
				if err := a.WriteAt(context.Background(), p, i*sector, false); err != nil {
					t.Errorf("write: %v", err)
					return
				}
				mu.Lock()
				copy(want[i*sector:], p)
				mu.Unlock()
			}
		})
	}
	// A fifth one writes whole blocks elsewhere, and one reads everything.
	running.Go(func() {
		for i := range 100 {
			off := c.size/2 + int64(i%7)*holdfast.BlockSize
			p := bytes.Repeat([]byte{byte(i + 1)}, holdfast.BlockSize)
			if err := a.WriteAt(context.Background(), p, off, false); err != nil {
				t.Errorf("write: %v", err)
				return
			}
			mu.Lock()
			copy(want[off:], p)
			mu.Unlock()
			if err := a.ReadAt(context.Background(), make([]byte, 100_000), 1000); err != nil {
				t.Errorf("read: %v", err)
				return
			}
		}
	})
	running.Wait()
	got := make([]byte, c.size)
	if err := a.ReadAt(t.Context(), got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatal(difference(got, want))
	}
}

// A whole-block write and a write of a part of it, both in flight: either may
// be last, but the part's neighbours are never those from before the whole.
func TestPartMeetsWhole(t *testing.T) {
	c := newCluster(t, 1, 1<<20, 1<<20)
	a := c.attach(c.hosts[0])
	for i := range 200 {
		old, whole, part := byte(3*i), byte(3*i+1), byte(3*i+2)
		if err := a.WriteAt(t.Context(), bytes.Repeat([]byte{old}, 4096), 0, false); err != nil {
			t.Fatal(err)
		}
		var both sync.WaitGroup
		both.Go(func() { _ = a.WriteAt(context.Background(), bytes.Repeat([]byte{whole}, 4096), 0, false) })
		both.Go(func() { _ = a.WriteAt(context.Background(), bytes.Repeat([]byte{part}, 512), 512, false) })
		both.Wait()
		got := make([]byte, 4096)
		if err := a.ReadAt(t.Context(), got, 0); err != nil {
			t.Fatal(err)
		}
		if got[0] != whole || got[4095] != whole || got[600] != part && got[600] != whole {
			t.Fatalf("round %d: got %d %d %d, want whole %d around part %d or whole", i, got[0], got[600], got[4095], whole, part)
		}
	}
}

// Reads under writes see a whole old or a whole new block, and never go back.
func TestReadsGoForward(t *testing.T) {
	c := newCluster(t, 3, 1<<20, 1<<20)
	a := c.attach(c.hosts[0])
	done := make(chan struct{})
	var running sync.WaitGroup
	running.Go(func() {
		defer close(done)
		for i := range 250 {
			if err := a.WriteAt(context.Background(), bytes.Repeat([]byte{byte(i)}, 4096), 4096, false); err != nil {
				t.Errorf("write: %v", err)
				return
			}
		}
	})
	for range 3 {
		running.Go(func() {
			last := byte(0)
			p := make([]byte, 4096)
			for {
				select {
				case <-done:
					return
				default:
				}
				if err := a.ReadAt(context.Background(), p, 4096); err != nil {
					t.Errorf("read: %v", err)
					return
				}
				if p[0] != p[4095] || p[0] < last {
					t.Errorf("read %d..%d after %d", p[0], p[4095], last)
					return
				}
				last = p[0]
			}
		})
	}
	running.Wait()
}

// Requests that are given up leave the device in order, and their buffers
// alone; what was issued takes effect or not, as a whole.
func TestGivenUpRequests(t *testing.T) {
	c := newCluster(t, 3, 1<<20, 1<<20)
	a := c.attach(c.hosts[0])
	old := bytes.Repeat([]byte{1}, int(c.size))
	if err := a.WriteAt(t.Context(), old, 0, false); err != nil {
		t.Fatal(err)
	}
	c.meta.setQuorum(false)
	c.hosts[2].reach(false)
	var running sync.WaitGroup
	for i := range 20 {
		running.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Duration(i)*3*time.Millisecond)
			defer cancel()
			p := bytes.Repeat([]byte{2}, 3000)
			if err := a.WriteAt(ctx, p, int64(i)*3000, false); err == nil || !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("a held write that was given up: %v", err)
			}
			clear(p) // the caller's again: it must not reach a disk
			q := make([]byte, 4096)
			if err := a.ReadAt(ctx, q, 0); err == nil {
				t.Errorf("a read that cannot be confirmed was answered")
			}
		})
	}
	running.Wait()
	c.meta.setQuorum(true)
	c.hosts[2].reach(true)
	c.waitInSync(a, 3)
	got := make([]byte, c.size)
	if err := a.ReadAt(t.Context(), got, 0); err != nil {
		t.Fatal(err)
	}
	for i, b := range got {
		if b != 1 && b != 2 {
			t.Fatalf("byte %d is %d, which nobody wrote", i, b)
		}
	}
	if err := a.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.compare(got, c.hosts...)
}

// A volume whose writes are held must not take the memory of the others; when
// it goes on, or ends, it gives all back.
func TestMemoryIsBounded(t *testing.T) {
	memory := NewMemory(3 << 20)
	c := newCluster(t, 2, 8<<20, 8<<20)
	o := c.options(c.hosts[0])
	o.Memory = memory
	a, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	c.waitAttached(a)
	c.meta.setQuorum(false)
	c.hosts[1].reach(false)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := a.WriteAt(ctx, make([]byte, 8<<20), 0, false); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("held write: %v", err)
	}
	used, limit := memory.Used()
	if used == 0 || used > limit {
		t.Errorf("%d bytes of %d in use while writes are held", used, limit)
	}
	c.meta.setQuorum(true)
	c.hosts[1].reach(true)
	c.waitInSync(a, 2)
	if err := a.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.eventually("all memory is given back", a, func() bool { used, _ := memory.Used(); return used == 0 })
	c.meta.setQuorum(false)
	c.hosts[1].reach(false)
	again, stop := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer stop()
	_ = a.WriteAt(again, make([]byte, 1<<20), 0, false)
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if used, _ := memory.Used(); used != 0 {
		t.Errorf("%d bytes in use after Close", used)
	}
}

// Close ends everything that New began.
func TestCloseLeavesNothing(t *testing.T) {
	c := newCluster(t, 3, 4<<20, 1<<20)
	before := runtime.NumGoroutine()
	for range 3 {
		a := c.attach(c.hosts[0])
		newModel(1, c.size).mutate(t, a, 20)
		if err := a.Close(); err != nil {
			t.Fatal(err)
		}
		if err := a.WriteAt(t.Context(), make([]byte, 4096), 0, false); !errors.Is(err, holdfast.ErrFenced) {
			t.Errorf("write after Close: %v", err)
		}
	}
	// The servers' ends of the connections end by themselves.
	for deadline := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > before; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			buf := make([]byte, 1<<20)
			t.Fatalf("%d goroutines, %d before\n%s", runtime.NumGoroutine(), before, buf[:runtime.Stack(buf, true)])
		}
	}
}

// Bad options and bad requests are refused, and change nothing.
func TestRefused(t *testing.T) {
	c := newCluster(t, 1, 1<<20, 1<<20)
	good := c.options(c.hosts[0])
	for name, change := range map[string]func(o *Options){
		"size":         func(o *Options) { o.Size = 1000 },
		"no size":      func(o *Options) { o.Size = 0 },
		"segment size": func(o *Options) { o.SegmentSize = 5000 },
		"segments":     func(o *Options) { o.Segments = nil },
		"epoch":        func(o *Options) { o.Epoch = 0 },
		"meta":         func(o *Options) { o.Meta = nil },
		"dial":         func(o *Options) { o.Dial = nil },
	} {
		o := good
		change(&o)
		if _, err := New(o); !errors.Is(err, holdfast.ErrInvalid) {
			t.Errorf("bad %s: %v, want ErrInvalid", name, err)
		}
	}
	a := c.attach(c.hosts[0])
	p := make([]byte, 4096)
	for _, off := range []int64{-1, c.size - 4095, c.size, 1<<63 - 1} {
		for name, err := range map[string]error{
			"read": a.ReadAt(t.Context(), p, off), "write": a.WriteAt(t.Context(), p, off, false),
			"trim": a.Trim(t.Context(), off, 4096, false), "zero": a.WriteZeroes(t.Context(), off, 4096, false, false),
		} {
			if !errors.Is(err, holdfast.ErrInvalid) {
				t.Errorf("%s at %d of %d: %v, want ErrInvalid", name, off, c.size, err)
			}
		}
	}
	if err := a.Trim(t.Context(), 0, -1, false); !errors.Is(err, holdfast.ErrInvalid) {
		t.Errorf("trim of -1 bytes: %v", err)
	}
}

// A core that contradicts itself ends its attachment with an error, and
// nothing else: the process, and other volumes, go on.
func TestBrokenInvariant(t *testing.T) {
	c := newCluster(t, 3, 4<<20, 2<<20)
	a := c.attach(c.hosts[0])
	c.meta.setQuorum(false)
	c.hosts[2].reach(false)
	held := make(chan error, 2)
	go func() { held <- a.WriteAt(context.Background(), make([]byte, 8192), 2<<20-4096, false) }()
	go func() { held <- a.ReadAt(context.Background(), make([]byte, 4096), 0) }()
	c.eventually("both requests wait", a, func() bool { return a.Status().Segments[0].Requests == 2 })
	s := a.segments[0]
	s.mu.Lock()
	s.core = nil // the next step fails
	s.mu.Unlock()
	for range 2 {
		if err := <-held; err == nil {
			t.Error("a request of a broken session succeeded")
		}
	}
	<-a.Done()
	if err := a.Err(); !errors.Is(err, holdfast.ErrInternal) {
		t.Errorf("the attachment ended with %v, want ErrInternal", err)
	}
	if err := a.WriteAt(t.Context(), make([]byte, 4096), 0, false); !errors.Is(err, holdfast.ErrInternal) {
		t.Errorf("write afterwards: %v, want ErrInternal", err)
	}
	a.Status()
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	c.meta.setQuorum(true)
	c.hosts[2].reach(true)
	b := c.attach(c.hosts[0])
	newModel(1, c.size).mutate(t, b, 20)
}
