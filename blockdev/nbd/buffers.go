package nbd

import (
	"math/bits"
	"sync"
)

const (
	// minBufferBits makes the smallest pooled buffer one block.
	minBufferBits = 12
	// maxBufferBits makes the largest pooled buffer 4 MiB: qemu-img sends 2 MiB
	// steadily, others less. Larger ones are rare enough to allocate.
	maxBufferBits = 22
)

// buffer is a payload on its way between a socket and a Device. data has the
// wanted length; its capacity is a power of two.
type buffer struct {
	data  []byte
	class int // index in bufferPool, or -1
}

// bufferPool hands out buffers by size class. Their contents are whatever was
// there before: the Device or the socket fills them in full, or they are not
// sent.
type bufferPool struct {
	classes [maxBufferBits - minBufferBits + 1]sync.Pool
}

func (p *bufferPool) get(n int) *buffer {
	class := max(bits.Len(uint(n-1)), minBufferBits) - minBufferBits
	if class >= len(p.classes) {
		return &buffer{data: make([]byte, n), class: -1}
	}
	b, _ := p.classes[class].Get().(*buffer)
	if b == nil {
		b = &buffer{data: make([]byte, 1<<(class+minBufferBits)), class: class}
	}
	b.data = b.data[:n]
	return b
}

func (p *bufferPool) put(b *buffer) {
	if b == nil || b.class < 0 {
		return
	}
	p.classes[b.class].Put(b)
}

// cost is what a payload of n bytes counts for in the server's budget: the
// capacity of the buffer that get returns.
func (p *bufferPool) cost(n int) int64 {
	if n == 0 {
		return 0
	}
	b := max(bits.Len(uint(n-1)), minBufferBits)
	if b > maxBufferBits {
		return int64(n)
	}
	return 1 << b
}
