package blockdevtest

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev"
)

// A mutant is a device with one mistake. The suite must fail on it, in the
// part named.
type mutant struct {
	name string
	part string
	make func(*Memory) blockdev.Device
}

func mutants() []mutant {
	return []mutant{
		{"keeps_the_buffer", "BuffersStayTheCallers", func(m *Memory) blockdev.Device { return &keepsBuffer{Memory: m} }},
		{"late_write", "CancelledRequests", func(m *Memory) blockdev.Device { return &lateWrite{Memory: m} }},
		{"torn_write", "Concurrent", func(m *Memory) blockdev.Device { return tornWrite{m} }},
		{"lost_neighbour", "ConcurrentNeighbours", func(m *Memory) blockdev.Device { return lostNeighbour{m} }},
		{"trim_takes_edges", "Trim", func(m *Memory) blockdev.Device { return trimEdges{m} }},
		{"trim_does_nothing", "Trim", func(m *Memory) blockdev.Device { return trimNothing{m} }},
		{"zeroes_keep_edges", "WriteZeroes", func(m *Memory) blockdev.Device { return zeroInner{m} }},
		{"write_past_end", "Bounds", func(m *Memory) blockdev.Device { return clipsWrites{m} }},
		{"short_read", "Model", func(m *Memory) blockdev.Device { return shortRead{m} }},
	}
}

type keepsBuffer struct {
	*Memory
	mu   sync.Mutex
	p    []byte
	off  int64
	some bool
}

func (k *keepsBuffer) WriteAt(ctx context.Context, p []byte, off int64, fua bool) error {
	if err := k.Memory.WriteAt(ctx, p, off, fua); err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.p, k.off, k.some = p, off, true
	return nil
}

func (k *keepsBuffer) Flush(ctx context.Context) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.some {
		k.some = false
		if err := k.Memory.WriteAt(ctx, k.p, k.off, true); err != nil {
			return err
		}
	}
	return k.Memory.Flush(ctx)
}

// lateWrite does a cancelled write after the next write.
type lateWrite struct {
	*Memory
	mu   sync.Mutex
	late []byte
	off  int64
}

func (l *lateWrite) WriteAt(ctx context.Context, p []byte, off int64, fua bool) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := ctx.Err(); err != nil && len(p) > 0 {
		l.late, l.off = bytes.Clone(p), off
		return err
	}
	if err := l.Memory.WriteAt(ctx, p, off, fua); err != nil {
		return err
	}
	if l.late != nil {
		late := l.late
		l.late = nil
		return l.Memory.WriteAt(ctx, late, l.off, fua)
	}
	return nil
}

type tornWrite struct{ *Memory }

func (d tornWrite) WriteAt(ctx context.Context, p []byte, off int64, fua bool) error {
	if len(p) == 0 {
		return d.Memory.WriteAt(ctx, p, off, fua)
	}
	for i := 0; i < len(p); i += 512 {
		if err := d.Memory.WriteAt(ctx, p[i:min(i+512, len(p))], off+int64(i), fua); err != nil {
			return err
		}
	}
	return nil
}

// lostNeighbour reads, changes and writes back blocks without a lock.
type lostNeighbour struct{ *Memory }

func (d lostNeighbour) WriteAt(ctx context.Context, p []byte, off int64, fua bool) error {
	r := blockdev.Range{Off: off, Len: int64(len(p))}
	if r.Check(d.size) != nil || r.Empty() || r.Outer(holdfast.BlockSize).End() > d.size {
		return d.Memory.WriteAt(ctx, p, off, fua)
	}
	r = r.Outer(holdfast.BlockSize)
	whole := make([]byte, r.Len)
	if err := d.ReadAt(ctx, whole, r.Off); err != nil {
		return err
	}
	copy(whole[off-r.Off:], p)
	return d.Memory.WriteAt(ctx, whole, r.Off, fua)
}

type trimEdges struct{ *Memory }

func (d trimEdges) Trim(ctx context.Context, off, n int64, fua bool) error {
	return d.Memory.WriteZeroes(ctx, off, n, false, fua)
}

type trimNothing struct{ *Memory }

func (d trimNothing) Trim(_ context.Context, off, n int64, _ bool) error {
	return blockdev.Range{Off: off, Len: n}.Check(d.size)
}

type zeroInner struct{ *Memory }

func (d zeroInner) WriteZeroes(ctx context.Context, off, n int64, _, fua bool) error {
	return d.Memory.Trim(ctx, off, n, fua)
}

type clipsWrites struct{ *Memory }

func (d clipsWrites) WriteAt(ctx context.Context, p []byte, off int64, fua bool) error {
	if off >= 0 && off < d.size && int64(len(p)) > d.size-off {
		p = p[:d.size-off]
	}
	return d.Memory.WriteAt(ctx, p, off, fua)
}

type shortRead struct{ *Memory }

func (d shortRead) ReadAt(ctx context.Context, p []byte, off int64) error {
	if len(p) > 100<<10 {
		p = p[:len(p)-1]
	}
	return d.Memory.ReadAt(ctx, p, off)
}

type ignoresFUA struct{ *Memory }

func (d ignoresFUA) WriteAt(ctx context.Context, p []byte, off int64, _ bool) error {
	return d.Memory.WriteAt(ctx, p, off, false)
}

type ignoresFlush struct{ *Memory }

func (d ignoresFlush) Flush(context.Context) error { return nil }

// crashMutants fail RunCrash.
func crashMutants() map[string]func(*Memory) blockdev.Device {
	return map[string]func(*Memory) blockdev.Device{
		"ignores_fua":   func(m *Memory) blockdev.Device { return ignoresFUA{m} },
		"ignores_flush": func(m *Memory) blockdev.Device { return ignoresFlush{m} },
	}
}

const mutantEnv = "HOLDFAST_BLOCKDEV_MUTANT"

// TestMutant runs the suite on the mutant that the environment names; only
// TestSuiteCatchesMutants sets it.
func TestMutant(t *testing.T) {
	name := os.Getenv(mutantEnv)
	if name == "" {
		t.Skip("runs only as a child of TestSuiteCatchesMutants")
	}
	for _, m := range mutants() {
		if m.name == name {
			Run(t, func(*testing.T) blockdev.Device { return m.make(NewMemory(2 << 20)) })
		}
	}
	if wrap := crashMutants()[name]; wrap != nil {
		RunCrash(t, 20, openVolatile(wrap))
	}
}

// TestSuiteCatchesMutants: the suite is worth nothing if it cannot fail.
func TestSuiteCatchesMutants(t *testing.T) {
	want := make(map[string]string)
	for _, m := range mutants() {
		want[m.name] = "TestMutant/" + m.part
	}
	for name := range crashMutants() {
		want[name] = "TestMutant/seed"
	}
	for name, part := range want {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command(os.Args[0], "-test.run=^TestMutant$")
			cmd.Env = append(os.Environ(), mutantEnv+"="+name)
			cmd.Dir = t.TempDir() // rapid writes the failure it found there
			out, err := cmd.CombinedOutput()
			if err == nil || !strings.Contains(string(out), "--- FAIL: "+part) {
				t.Errorf("the suite ended with %v on a device that %s, want it to fail in %s:\n%s", err, name, part, out)
			}
		})
	}
}

// openVolatile opens devices that crash, wrapped.
func openVolatile(wrap func(*Memory) blockdev.Device) func(t *testing.T) (blockdev.Device, Crash) {
	return func(*testing.T) (blockdev.Device, Crash) {
		m := NewVolatile(MinSize)
		return wrap(m), func(_ *testing.T, seed uint64) blockdev.Device {
			m = m.Crash(seed)
			return wrap(m)
		}
	}
}

func TestMemoryCrash(t *testing.T) {
	RunCrash(t, 200, openVolatile(func(m *Memory) blockdev.Device { return m }))
}

// TestCrashLosesSomething: a crash that keeps everything would hide mistakes.
func TestCrashLosesSomething(t *testing.T) {
	const blocks = 64
	m := NewVolatile(MinSize)
	d := &device{m}
	for b := range int64(blocks) {
		d.write(t, random(1, holdfast.BlockSize), b*holdfast.BlockSize, false)
	}
	after := &device{m.Crash(1)}
	lost := 0
	for b := range int64(blocks) {
		if after.read(t, b*holdfast.BlockSize, 1)[0] == 0 {
			lost++
		}
	}
	if lost == 0 || lost == blocks {
		t.Errorf("the crash lost %d of %d unflushed blocks, want some and not all", lost, blocks)
	}
}
