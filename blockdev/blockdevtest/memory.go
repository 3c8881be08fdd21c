package blockdevtest

import (
	"context"
	"math/rand/v2"
	"sync"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev"
)

// memoryChunk is how Memory allocates; what was never written costs nothing.
const memoryChunk = 64 << 10

// Memory is the reference Device: sparse bytes in memory. A request is atomic
// within each 64 KiB chunk, and so for each block.
//
// With a volatile cache (NewVolatile) it remembers what each block held when it
// was last made durable, and Crash loses any of the later writes.
type Memory struct {
	size   int64
	chunks []chunk

	volatile bool
	mu       sync.Mutex // of volatile devices: one request at a time
	durable  map[int64]*[holdfast.BlockSize]byte
}

type chunk struct {
	mu   sync.RWMutex
	data []byte // nil: zeroes
}

// NewMemory returns a device of zeroes on which everything is durable at once.
func NewMemory(size int64) *Memory {
	return &Memory{size: size, chunks: make([]chunk, (size+memoryChunk-1)/memoryChunk)}
}

// NewVolatile returns a device of zeroes whose writes are durable only after a
// flush or with fua. It serves one request at a time.
func NewVolatile(size int64) *Memory {
	m := NewMemory(size)
	m.volatile = true
	m.durable = make(map[int64]*[holdfast.BlockSize]byte)
	return m
}

// Size implements blockdev.Device.
func (m *Memory) Size() int64 { return m.size }

// Blocks implements blockdev.Device.
func (m *Memory) Blocks() (logical, physical int) {
	return holdfast.LogicalBlockSize, holdfast.BlockSize
}

// ReadAt implements blockdev.Device.
func (m *Memory) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := m.begin(ctx, off, int64(len(p))); err != nil {
		return err
	}
	defer m.end()
	m.each(off, int64(len(p)), func(c *chunk, at, n, done int64) {
		c.mu.RLock()
		defer c.mu.RUnlock()
		if c.data == nil {
			clear(p[done : done+n])
		} else {
			copy(p[done:done+n], c.data[at:])
		}
	})
	return nil
}

// WriteAt implements blockdev.Device.
func (m *Memory) WriteAt(ctx context.Context, p []byte, off int64, fua bool) error {
	n := int64(len(p))
	if err := m.begin(ctx, off, n); err != nil {
		return err
	}
	defer m.end()
	m.keep(off, n)
	m.each(off, n, func(c *chunk, at, n, done int64) {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.data == nil {
			c.data = make([]byte, memoryChunk)
		}
		copy(c.data[at:at+n], p[done:])
	})
	m.settle(off, n, fua)
	return nil
}

// Flush implements blockdev.Device.
func (m *Memory) Flush(ctx context.Context) error {
	if err := m.begin(ctx, 0, 0); err != nil {
		return err
	}
	defer m.end()
	m.settle(0, m.size, true)
	return nil
}

// Trim implements blockdev.Device.
func (m *Memory) Trim(ctx context.Context, off, n int64, fua bool) error {
	if err := m.begin(ctx, off, n); err != nil {
		return err
	}
	defer m.end()
	r := blockdev.Range{Off: off, Len: n}.Inner(holdfast.BlockSize)
	m.zero(r.Off, r.Len, fua)
	return nil
}

// WriteZeroes implements blockdev.Device.
func (m *Memory) WriteZeroes(ctx context.Context, off, n int64, _, fua bool) error {
	if err := m.begin(ctx, off, n); err != nil {
		return err
	}
	defer m.end()
	m.zero(off, n, fua)
	return nil
}

func (m *Memory) zero(off, n int64, fua bool) {
	m.keep(off, n)
	m.each(off, n, func(c *chunk, at, n, _ int64) {
		c.mu.Lock()
		defer c.mu.Unlock()
		if n == memoryChunk {
			c.data = nil
		} else if c.data != nil {
			clear(c.data[at : at+n])
		}
	})
	m.settle(off, n, fua)
}

// begin checks a request and, on a volatile device, waits for its turn; end
// follows unless it fails.
func (m *Memory) begin(ctx context.Context, off, n int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := (blockdev.Range{Off: off, Len: n}).Check(m.size); err != nil {
		return err
	}
	if m.volatile {
		m.mu.Lock()
	}
	return nil
}

func (m *Memory) end() {
	if m.volatile {
		m.mu.Unlock()
	}
}

// each calls fn for the part of [off, off+n) in each chunk: n bytes at at, done
// bytes after off.
func (m *Memory) each(off, n int64, fn func(c *chunk, at, n, done int64)) {
	for done := int64(0); done < n; {
		at := (off + done) % memoryChunk
		part := min(memoryChunk-at, n-done)
		fn(&m.chunks[(off+done)/memoryChunk], at, part, done)
		done += part
	}
}

// keep saves what the blocks of [off, off+n) hold durably before they change.
func (m *Memory) keep(off, n int64) {
	if !m.volatile {
		return
	}
	r := blockdev.Range{Off: off, Len: n}.Outer(holdfast.BlockSize)
	for b := r.Off; b < r.End(); b += holdfast.BlockSize {
		if m.durable[b] == nil {
			m.durable[b] = m.block(b)
		}
	}
}

// settle makes the blocks of [off, off+n) durable if sync is set.
func (m *Memory) settle(off, n int64, sync bool) {
	if !m.volatile || !sync {
		return
	}
	r := blockdev.Range{Off: off, Len: n}
	if off == 0 && n == m.size {
		clear(m.durable)
		return
	}
	r = r.Outer(holdfast.BlockSize)
	for b := r.Off; b < r.End(); b += holdfast.BlockSize {
		delete(m.durable, b)
	}
}

// block returns a copy of the block at offset b.
func (m *Memory) block(b int64) *[holdfast.BlockSize]byte {
	var data [holdfast.BlockSize]byte
	if c := &m.chunks[b/memoryChunk]; c.data != nil {
		copy(data[:], c.data[b%memoryChunk:])
	}
	return &data
}

// Crash returns what a power loss leaves: each block that was changed since it
// was last durable holds, by the seed, either the new bytes or the durable
// ones. The old device is not to be used again.
func (m *Memory) Crash(seed uint64) *Memory {
	m.mu.Lock()
	defer m.mu.Unlock()
	after := NewVolatile(m.size)
	for i := range m.chunks {
		after.chunks[i].data = m.chunks[i].data
		m.chunks[i].data = nil
	}
	for b := int64(0); b < m.size; b += holdfast.BlockSize {
		old := m.durable[b]
		if old == nil || rand.New(rand.NewPCG(seed, uint64(b))).IntN(2) == 0 { //nolint:gosec // repeatable on purpose
			continue
		}
		c := &after.chunks[b/memoryChunk]
		if c.data == nil {
			c.data = make([]byte, memoryChunk)
		}
		copy(c.data[b%memoryChunk:], old[:])
	}
	return after
}
