package blockdevtest

import (
	"context"
	"sync"

	"github.com/holdfast-storage/holdfast/blockdev"
)

// Method is a method of Device that does I/O.
type Method string

// The methods.
const (
	Read   Method = "ReadAt"
	Write  Method = "WriteAt"
	Flush  Method = "Flush"
	Trim   Method = "Trim"
	Zeroes Method = "WriteZeroes"
)

// Call is one call of a method.
type Call struct {
	Method Method
	Off    int64
	Len    int64
	FUA    bool
	NoHole bool
	Nth    int // among the calls of this method, from 1
}

// A Hook stands before the calls of a Device. It may wait, and when it returns
// an error the call fails with it and does not reach the device.
type Hook func(ctx context.Context, c Call) error

// Hooked calls hook before every call of dev. hook may be called concurrently.
func Hooked(dev blockdev.Device, hook Hook) blockdev.Device {
	return &hooked{dev: dev, hook: hook, calls: make(map[Method]int)}
}

type hooked struct {
	dev  blockdev.Device
	hook Hook

	mu    sync.Mutex
	calls map[Method]int
}

func (h *hooked) before(ctx context.Context, c Call) error {
	h.mu.Lock()
	h.calls[c.Method]++
	c.Nth = h.calls[c.Method]
	h.mu.Unlock()
	return h.hook(ctx, c)
}

func (h *hooked) Size() int64                     { return h.dev.Size() }
func (h *hooked) Blocks() (logical, physical int) { return h.dev.Blocks() }

func (h *hooked) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := h.before(ctx, Call{Method: Read, Off: off, Len: int64(len(p))}); err != nil {
		return err
	}
	return h.dev.ReadAt(ctx, p, off)
}

func (h *hooked) WriteAt(ctx context.Context, p []byte, off int64, fua bool) error {
	if err := h.before(ctx, Call{Method: Write, Off: off, Len: int64(len(p)), FUA: fua}); err != nil {
		return err
	}
	return h.dev.WriteAt(ctx, p, off, fua)
}

func (h *hooked) Flush(ctx context.Context) error {
	if err := h.before(ctx, Call{Method: Flush}); err != nil {
		return err
	}
	return h.dev.Flush(ctx)
}

func (h *hooked) Trim(ctx context.Context, off, n int64, fua bool) error {
	if err := h.before(ctx, Call{Method: Trim, Off: off, Len: n, FUA: fua}); err != nil {
		return err
	}
	return h.dev.Trim(ctx, off, n, fua)
}

func (h *hooked) WriteZeroes(ctx context.Context, off, n int64, noHole, fua bool) error {
	if err := h.before(ctx, Call{Method: Zeroes, Off: off, Len: n, NoHole: noHole, FUA: fua}); err != nil {
		return err
	}
	return h.dev.WriteZeroes(ctx, off, n, noHole, fua)
}

// FailNth fails the nth call of a method, from 1, with err, and every later
// call of any method too if lasting is set, as a disk that died would.
func FailNth(dev blockdev.Device, method Method, nth int, err error, lasting bool) blockdev.Device {
	var mu sync.Mutex
	failed := false
	return Hooked(dev, func(_ context.Context, c Call) error {
		mu.Lock()
		defer mu.Unlock()
		if c.Method == method && c.Nth == nth || failed {
			failed = lasting
			return err
		}
		return nil
	})
}

// Short tears the nth write, from 1: its first n bytes reach dev, the rest does
// not, and it fails with err.
func Short(dev blockdev.Device, nth, n int, err error) blockdev.Device {
	return &short{Device: dev, nth: nth, n: n, err: err}
}

type short struct {
	blockdev.Device
	n   int
	err error

	mu  sync.Mutex
	nth int
}

func (s *short) WriteAt(ctx context.Context, p []byte, off int64, fua bool) error {
	s.mu.Lock()
	s.nth--
	now := s.nth == 0
	s.mu.Unlock()
	if !now {
		return s.Device.WriteAt(ctx, p, off, fua)
	}
	if err := s.Device.WriteAt(ctx, p[:min(s.n, len(p))], off, fua); err != nil {
		return err
	}
	return s.err
}

// Gate holds calls back until they are let through, so that a test decides
// what is in flight and in which order it is done.
type Gate struct {
	arrived chan *Held
}

// Held is a call that waits at a gate.
type Held struct {
	Call
	through chan error
}

// Let lets the call through to the device, or fails it if err is not nil.
func (h *Held) Let(err error) { h.through <- err }

// Gated returns dev behind a gate. Every call that match accepts waits there
// until it is let through or its context ends, which fails it.
func Gated(dev blockdev.Device, match func(Call) bool) (blockdev.Device, *Gate) {
	g := &Gate{arrived: make(chan *Held)}
	return Hooked(dev, func(ctx context.Context, c Call) error {
		if !match(c) {
			return nil
		}
		h := &Held{Call: c, through: make(chan error)}
		select {
		case g.arrived <- h:
		case <-ctx.Done():
			return ctx.Err()
		}
		select {
		case err := <-h.through:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}), g
}

// Next returns the next call to arrive; it waits for one.
func (g *Gate) Next() *Held { return <-g.arrived }

// Arrived is the channel on which calls arrive, for select.
func (g *Gate) Arrived() <-chan *Held { return g.arrived }

// Counts are the calls that a Counted device has seen.
type Counts struct {
	Calls    map[Method]int
	Bytes    map[Method]int64
	FUA      int // calls with fua
	InFlight int // calls that have not returned
	Most     int // the largest InFlight there was
}

// Counted counts the calls of a device.
type Counted struct {
	dev blockdev.Device

	mu     sync.Mutex
	counts Counts
}

// NewCounted returns dev with its calls counted.
func NewCounted(dev blockdev.Device) *Counted {
	return &Counted{dev: dev, counts: Counts{Calls: make(map[Method]int), Bytes: make(map[Method]int64)}}
}

// Counts returns the counts up to now.
func (d *Counted) Counts() Counts {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := d.counts
	c.Calls, c.Bytes = make(map[Method]int), make(map[Method]int64)
	for m, n := range d.counts.Calls {
		c.Calls[m], c.Bytes[m] = n, d.counts.Bytes[m]
	}
	return c
}

// count notes a call; the returned function notes its end.
func (d *Counted) count(m Method, n int64, fua bool) (end func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := &d.counts
	c.Calls[m]++
	c.Bytes[m] += n
	if fua {
		c.FUA++
	}
	c.InFlight++
	c.Most = max(c.Most, c.InFlight)
	return func() {
		d.mu.Lock()
		d.counts.InFlight--
		d.mu.Unlock()
	}
}

// Size implements blockdev.Device.
func (d *Counted) Size() int64 { return d.dev.Size() }

// Blocks implements blockdev.Device.
func (d *Counted) Blocks() (logical, physical int) { return d.dev.Blocks() }

// ReadAt implements blockdev.Device.
func (d *Counted) ReadAt(ctx context.Context, p []byte, off int64) error {
	defer d.count(Read, int64(len(p)), false)()
	return d.dev.ReadAt(ctx, p, off)
}

// WriteAt implements blockdev.Device.
func (d *Counted) WriteAt(ctx context.Context, p []byte, off int64, fua bool) error {
	defer d.count(Write, int64(len(p)), fua)()
	return d.dev.WriteAt(ctx, p, off, fua)
}

// Flush implements blockdev.Device.
func (d *Counted) Flush(ctx context.Context) error {
	defer d.count(Flush, 0, false)()
	return d.dev.Flush(ctx)
}

// Trim implements blockdev.Device.
func (d *Counted) Trim(ctx context.Context, off, n int64, fua bool) error {
	defer d.count(Trim, n, fua)()
	return d.dev.Trim(ctx, off, n, fua)
}

// WriteZeroes implements blockdev.Device.
func (d *Counted) WriteZeroes(ctx context.Context, off, n int64, noHole, fua bool) error {
	defer d.count(Zeroes, n, fua)()
	return d.dev.WriteZeroes(ctx, off, n, noHole, fua)
}
