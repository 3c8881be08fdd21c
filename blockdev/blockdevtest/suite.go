package blockdevtest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev"
	"pgregory.net/rapid"
)

// MinSize is the least size of a device under test.
const MinSize = 1 << 20

// span is how much of a device the suite works on, from its start and at its
// end; larger devices cost no more.
const span = 4 << 20

// Run checks that the devices that open returns, each blank and at least
// MinSize long, do what blockdev.Device says. open registers its clean-up with
// t and is called once for each part of the suite.
func Run(t *testing.T, open func(t *testing.T) blockdev.Device) {
	for _, part := range []struct {
		name string
		run  func(t *testing.T, d *device)
	}{
		{"Geometry", testGeometry},
		{"BlankReadsZero", testBlank},
		{"Bounds", testBounds},
		{"EmptyRequests", testEmpty},
		{"BuffersStayTheCallers", testBuffers},
		{"UnalignedEdges", testUnaligned},
		{"LargeRequests", testLarge},
		{"Trim", testTrim},
		{"WriteZeroes", testWriteZeroes},
		{"EndOfDevice", testEnd},
		{"Flush", testFlush},
		{"CancelledRequests", testCancelled},
		{"Model", testModel},
		{"ConcurrentVersions", testConcurrentVersions},
		{"ConcurrentOverlap", testConcurrentOverlap},
		{"ConcurrentNeighbours", testConcurrentNeighbours},
	} {
		t.Run(part.name, func(t *testing.T) {
			dev := open(t)
			if dev.Size() < MinSize {
				t.Fatalf("the device has %d bytes, the suite needs %d", dev.Size(), MinSize)
			}
			part.run(t, &device{dev})
		})
	}
}

// tester is what *testing.T and *rapid.T share.
type tester interface {
	Helper()
	Fatalf(format string, args ...any)
}

// device adds checks to a Device: a request that fails fails the test.
type device struct{ blockdev.Device }

func (d *device) read(t tester, off, n int64) []byte {
	t.Helper()
	p := make([]byte, n)
	if len(p) > 0 {
		p[0] = 0xee // what is not filled shows
	}
	for done := 1; done < len(p); done *= 2 {
		copy(p[done:], p[:done])
	}
	if err := d.ReadAt(context.Background(), p, off); err != nil {
		t.Fatalf("ReadAt(%d bytes, %d): %v", n, off, err)
	}
	return p
}

func (d *device) write(t tester, p []byte, off int64, fua bool) {
	t.Helper()
	if err := d.WriteAt(context.Background(), p, off, fua); err != nil {
		t.Fatalf("WriteAt(%d bytes, %d, fua=%v): %v", len(p), off, fua, err)
	}
}

func (d *device) flush(t tester) {
	t.Helper()
	if err := d.Flush(context.Background()); err != nil {
		t.Fatalf("Flush(): %v", err)
	}
}

func (d *device) trim(t tester, off, n int64, fua bool) {
	t.Helper()
	if err := d.Trim(context.Background(), off, n, fua); err != nil {
		t.Fatalf("Trim(%d, %d, fua=%v): %v", off, n, fua, err)
	}
}

func (d *device) zeroes(t tester, off, n int64, noHole, fua bool) {
	t.Helper()
	if err := d.WriteZeroes(context.Background(), off, n, noHole, fua); err != nil {
		t.Fatalf("WriteZeroes(%d, %d, noHole=%v, fua=%v): %v", off, n, noHole, fua, err)
	}
}

// expect compares [off, off+len(want)) with want.
func (d *device) expect(t tester, want []byte, off int64, what string) {
	t.Helper()
	got := d.read(t, off, int64(len(want)))
	if i := firstDifference(got, want); i >= 0 {
		t.Fatalf("%s: byte %d is %#02x, want %#02x (read %d bytes at %d)", what, off+int64(i), got[i], want[i], len(want), off)
	}
}

func firstDifference(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return len(a)
}

// random returns n bytes that depend on seed alone, none of them zero.
func random(seed uint64, n int64) []byte {
	rnd := rand.NewPCG(seed, 17)
	p := make([]byte, n, n+8)
	for i := int64(0); i < n; i += 8 {
		// The low bits make every byte odd, and so not zero.
		binary.LittleEndian.PutUint64(p[i:i+8], rnd.Uint64()|0x0101010101010101)
	}
	return p[:n:n]
}

func testGeometry(t *testing.T, d *device) {
	logical, physical := d.Blocks()
	powerOfTwo := func(n int) bool { return n > 0 && n&(n-1) == 0 }
	if !powerOfTwo(logical) || !powerOfTwo(physical) || logical > physical {
		t.Errorf("Blocks() = %d, %d, want powers of two, the logical not above the physical", logical, physical)
	}
	if d.Size()%int64(logical) != 0 {
		t.Errorf("Size() = %d, want a multiple of the logical block, %d", d.Size(), logical)
	}
	if a, b := d.Size(), d.Size(); b < a {
		t.Errorf("Size() shrank from %d to %d", a, b)
	}
}

func testBlank(t *testing.T, d *device) {
	n := min(d.Size(), span)
	d.expect(t, make([]byte, n), 0, "blank device")
	d.expect(t, make([]byte, n), d.Size()-n, "blank device")
}

func testBounds(t *testing.T, d *device) {
	ctx, size := context.Background(), d.Size()
	before := random(1, 8192)
	d.write(t, before, size-8192, false)
	for _, r := range []blockdev.Range{
		{Off: -1, Len: 1}, {Off: -4096, Len: 4096}, {Off: -4096, Len: 8192}, {Off: math.MinInt64, Len: 4096},
		{Off: size, Len: 1}, {Off: size - 1, Len: 2}, {Off: size - 4096, Len: 4097}, {Off: size - 4096, Len: 8192},
		{Off: size + 4096, Len: 4096}, {Off: math.MaxInt64, Len: 1}, {Off: math.MaxInt64 - 4095, Len: 4096},
		{Off: size + 1, Len: 0}, {Off: -1, Len: 0},
		// Only trim and zeroing can be asked for these.
		{Off: 0, Len: size + 1}, {Off: 4096, Len: math.MaxInt64}, {Off: 0, Len: -1}, {Off: 4096, Len: math.MinInt64},
		{Off: size, Len: -4096},
	} {
		wrong := func(what string, err error) {
			t.Helper()
			if !errors.Is(err, holdfast.ErrInvalid) {
				t.Errorf("%s of %d bytes at %d on a device of %d: %v, want kind %v", what, r.Len, r.Off, size, err, holdfast.ErrInvalid)
			}
		}
		if r.Len >= 0 && r.Len <= 8192 {
			p := random(2, r.Len)
			wrong("ReadAt", d.ReadAt(ctx, p, r.Off))
			wrong("WriteAt", d.WriteAt(ctx, p, r.Off, false))
			wrong("WriteAt with fua", d.WriteAt(ctx, p, r.Off, true))
		}
		wrong("Trim", d.Trim(ctx, r.Off, r.Len, false))
		wrong("WriteZeroes", d.WriteZeroes(ctx, r.Off, r.Len, false, false))
	}
	d.expect(t, before, size-8192, "after requests beyond the end")
	d.expect(t, make([]byte, 8192), 0, "after requests beyond the end")
}

func testEmpty(t *testing.T, d *device) {
	before := random(1, 4096)
	d.write(t, before, 0, false)
	for _, off := range []int64{0, 1, 512, d.Size() - 1, d.Size()} {
		d.read(t, off, 0)
		d.write(t, nil, off, true)
		d.trim(t, off, 0, true)
		d.zeroes(t, off, 0, false, true)
	}
	d.expect(t, before, 0, "after requests of no bytes")
}

// testBuffers: the caller may change a buffer as soon as the method returned.
func testBuffers(t *testing.T, d *device) {
	const n = 12 << 10
	want := random(1, n)
	p := bytes.Clone(want)
	d.write(t, p, 512, false)
	clear(p)
	d.expect(t, want, 512, "after the writer changed its buffer")
	d.flush(t)
	d.expect(t, want, 512, "after the writer changed its buffer and a flush")
	got := d.read(t, 512, n)
	clear(got)
	d.expect(t, want, 512, "after the reader changed its buffer")
}

func testUnaligned(t *testing.T, d *device) {
	const n = 64 << 10
	model := random(1, n)
	d.write(t, model, 0, false)
	seed := uint64(2)
	for _, off := range []int64{0, 1, 511, 512, 513, 4095, 4096, 4097, 8192 - 512, 12345} {
		for _, length := range []int64{1, 2, 511, 512, 513, 1024, 4095, 4096, 4097, 8191, 8192, 20000} {
			seed++
			p := random(seed, length)
			d.write(t, p, off, false)
			copy(model[off:], p)
			d.expect(t, model[off:off+length], off, "unaligned write")
		}
	}
	d.expect(t, model, 0, "after unaligned writes")
}

func testLarge(t *testing.T, d *device) {
	n := min(d.Size(), span) - 4096
	p := random(1, n)
	for _, off := range []int64{0, 512, 4096} {
		d.write(t, p, off, false)
		d.expect(t, p, off, "one large write")
	}
}

func testTrim(t *testing.T, d *device) {
	testGivenBack(t, d, func(off, n int64, fua bool) { d.trim(t, off, n, fua) }, func(r blockdev.Range) blockdev.Range {
		_, physical := d.Blocks()
		return r.Inner(int64(physical))
	})
}

func testWriteZeroes(t *testing.T, d *device) {
	for _, noHole := range []bool{false, true} {
		testGivenBack(t, d, func(off, n int64, fua bool) { d.zeroes(t, off, n, noHole, fua) }, func(r blockdev.Range) blockdev.Range {
			return r
		})
	}
}

// testGivenBack clears ranges with act and expects zeroes in what zeroed says,
// and nothing else changed.
func testGivenBack(t *testing.T, d *device, act func(off, n int64, fua bool), zeroed func(blockdev.Range) blockdev.Range) {
	const n = 512 << 10
	seed := uint64(1)
	for _, r := range []blockdev.Range{
		{Off: 0, Len: 4096}, {Off: 4096, Len: 8192}, {Off: 0, Len: n}, {Off: 64 << 10, Len: 64 << 10},
		{Off: 64<<10 - 4096, Len: 128<<10 + 8192}, {Off: 512, Len: 512}, {Off: 1, Len: 4096}, {Off: 4095, Len: 4098},
		{Off: 3584, Len: 9216}, {Off: 100, Len: 300 << 10}, {Off: 60 << 10, Len: 70<<10 + 1}, {Off: 4096, Len: 4095},
	} {
		for _, fua := range []bool{false, true} {
			seed++
			model := random(seed, n)
			d.write(t, model, 0, false)
			act(r.Off, r.Len, fua)
			if z := zeroed(r); !z.Empty() {
				clear(model[z.Off:z.End()])
			}
			d.expect(t, model, 0, "after clearing "+r.String())
			// A write into what was cleared brings back nothing of the old.
			p := random(seed+1000, 512)
			at := r.Off + r.Len/2
			d.write(t, p, at, false)
			copy(model[at:], p)
			d.expect(t, model, 0, "after writing into the cleared "+r.String())
			// Clearing what is clear already.
			act(r.Off, r.Len, fua)
			if z := zeroed(r); !z.Empty() {
				clear(model[z.Off:z.End()])
			}
			d.expect(t, model, 0, "after clearing twice "+r.String())
		}
	}
}

func testEnd(t *testing.T, d *device) {
	size := d.Size()
	for i, n := range []int64{1, 511, 512, 4096, 4097, 64 << 10, 65537} {
		p := random(uint64(i), n)
		d.write(t, p, size-n, i%2 == 0)
		d.expect(t, p, size-n, "at the end of the device")
		d.zeroes(t, size-n, n, false, false)
		d.expect(t, make([]byte, n), size-n, "zeroed at the end of the device")
	}
	want := random(9, 8192)
	d.write(t, want, size-8192, false)
	d.trim(t, 0, size, false)
	// A block that the end of the device cuts is not whole.
	_, physical := d.Blocks()
	clear(want[:8192-size%int64(physical)])
	d.expect(t, want, size-8192, "after trimming all of the device")
}

func testFlush(t *testing.T, d *device) {
	d.flush(t) // nothing to flush is no error
	want := random(1, 16<<10)
	d.write(t, want, 0, false)
	d.flush(t)
	d.flush(t)
	d.expect(t, want, 0, "after flush")
	d.write(t, want[:4096], 4096, true)
	d.trim(t, 8192, 4096, true)
	copy(want[4096:], want[:4096])
	clear(want[8192:12288])
	d.expect(t, want, 0, "after fua")
	d.flush(t)
	d.expect(t, want, 0, "after fua and flush")
}

// testCancelled: a request whose context has ended is refused or done, and
// either way it is over when its method returns: it never undoes what is
// written later. Servers rely on it when a client reconnects.
func testCancelled(t *testing.T, d *device) {
	for i := range uint64(32) {
		ctx, cancel := context.WithCancel(context.Background())
		old, fresh := random(i, 8192), random(i+100, 8192)
		returned := make(chan error)
		go func() { returned <- d.WriteAt(ctx, old, 0, i%2 == 0) }()
		cancel()
		err := <-returned
		got := d.read(t, 0, 8192)
		if err == nil && !bytes.Equal(got, old) {
			t.Fatalf("round %d: the write returned nil and is not there", i)
		}
		d.write(t, fresh, 0, false)
		d.expect(t, fresh, 0, "a write after a cancelled one")
		d.flush(t)
		d.expect(t, fresh, 0, "a write after a cancelled one, flushed")
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	// Whether these fail is the device's choice; that they return is not.
	_ = d.ReadAt(ctx, make([]byte, 4096), 0)
	_ = d.Flush(ctx)
	_ = d.Trim(ctx, 0, 4096, true)
	_ = d.WriteZeroes(ctx, 0, 4096, true, true)
}

// testModel runs random histories beside a plain slice of bytes.
func testModel(t *testing.T, d *device) {
	const n = 256 << 10
	_, physical := d.Blocks()
	rapid.Check(t, func(t *rapid.T) {
		model := make([]byte, n)
		d.zeroes(t, 0, n, false, false)
		requests := rapid.IntRange(1, 24).Draw(t, "requests")
		for range requests {
			r := drawRange(t, n)
			fua := rapid.Bool().Draw(t, "fua")
			switch rapid.SampledFrom([]string{"write", "write", "write", "read", "trim", "zeroes", "flush"}).Draw(t, "request") {
			case "write":
				p := random(rapid.Uint64Range(0, 1<<32).Draw(t, "seed"), r.Len)
				d.write(t, p, r.Off, fua)
				copy(model[r.Off:], p)
			case "read":
				d.expect(t, model[r.Off:r.End()], r.Off, "read")
			case "trim":
				d.trim(t, r.Off, r.Len, fua)
				if z := r.Inner(int64(physical)); !z.Empty() {
					clear(model[z.Off:z.End()])
				}
			case "zeroes":
				d.zeroes(t, r.Off, r.Len, rapid.Bool().Draw(t, "noHole"), fua)
				clear(model[r.Off:r.End()])
			case "flush":
				d.flush(t)
			}
		}
		d.expect(t, model, 0, "at the end of the history")
	})
}

// drawRange prefers ranges at, or one sector or byte off, the borders of
// blocks and chunks.
func drawRange(t *rapid.T, n int64) blockdev.Range {
	point := func(label string) int64 {
		unit := rapid.SampledFrom([]int64{1, 512, 4096, 64 << 10}).Draw(t, label+" unit")
		at := rapid.Int64Range(0, n/unit).Draw(t, label) * unit
		at += rapid.SampledFrom([]int64{0, 0, 0, -1, 1, -512, 512}).Draw(t, label+" shift")
		return min(max(at, 0), n)
	}
	a, b := point("from"), point("to")
	return blockdev.Range{Off: min(a, b), Len: max(a, b) - min(a, b)}
}
