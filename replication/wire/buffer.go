package wire

import (
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"
)

// Buffer is payload memory that several parties may refer to: the writer's
// replay window and the connections that still send it. It goes back to a pool
// when the last of them lets go. The bytes must not change after they were
// handed to a second party.
type Buffer struct {
	bytes []byte
	refs  atomic.Int32
	class int // index into pools, -1 for memory that is not pooled
}

// Smallest and largest pooled buffer: one block, and the largest payload.
const (
	minBufferBits = 12
	maxBufferBits = 20
)

var pools [maxBufferBits - minBufferBits + 1]sync.Pool

// NewBuffer returns a buffer of n bytes with one reference, its content
// unspecified. Sizes up to MaxPayload come from a pool.
func NewBuffer(n int) *Buffer {
	class := 0
	if n > 1<<minBufferBits {
		class = bits.Len(uint(n-1)) - minBufferBits
	}
	if class >= len(pools) {
		b := &Buffer{bytes: make([]byte, n), class: -1}
		b.refs.Store(1)
		return b
	}
	b, _ := pools[class].Get().(*Buffer)
	if b == nil {
		b = &Buffer{bytes: make([]byte, 1<<(class+minBufferBits)), class: class}
	}
	b.bytes = b.bytes[:n]
	b.refs.Store(1)
	return b
}

// Bytes returns the buffer's memory, valid while the caller holds a reference.
func (b *Buffer) Bytes() []byte { return b.bytes }

// Retain adds a reference; the caller must hold one.
func (b *Buffer) Retain() {
	if b != nil {
		b.refs.Add(1)
	}
}

// Release gives one reference back. A nil buffer is allowed.
func (b *Buffer) Release() {
	if b == nil {
		return
	}
	switch n := b.refs.Add(-1); {
	case n > 0:
	case n < 0:
		panic(fmt.Sprintf("wire: buffer of %d bytes released more often than retained", len(b.bytes)))
	case b.class >= 0:
		b.bytes = b.bytes[:cap(b.bytes)]
		pools[b.class].Put(b)
	}
}
