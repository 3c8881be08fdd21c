package wire

import "github.com/holdfast-storage/holdfast"

// MaxDamaged bounds the chunks of one Damaged.
const MaxDamaged = 64

// Damaged tells the writer of chunks with blocks that are bad here. It has no
// answer, and is sent again while they are.
type Damaged struct {
	bare
	Chunks []int64
}

// Type implements Message.
func (*Damaged) Type() Type { return TypeDamaged }

func (m *Damaged) appendBody(b []byte) []byte {
	b = putU32(b, uint32(len(m.Chunks)))
	for _, c := range m.Chunks {
		b = putU64(b, uint64(c))
	}
	return b
}

func (m *Damaged) decodeBody(f *fields, p *Buffer) {
	m.noPayload(f, p)
	if n := f.count(MaxDamaged, 8); n > 0 {
		m.Chunks = make([]int64, n)
		for i := range m.Chunks {
			m.Chunks[i] = f.bytes()
		}
	}
}

// Repair puts the blocks of a chunk in the place of those that are bad on a
// replica in sync; what is good there stays. BlockPoison: no replica in sync has
// the block. Answered by Installed, received and not yet durable.
type Repair struct {
	held
	ChunkContent
}

// Type implements Message.
func (*Repair) Type() Type { return TypeRepair }

func (m *Repair) appendBody(b []byte) []byte { return m.put(b) }

func (m *Repair) payload(p [][]byte) [][]byte { return chunkPayload(p, m.Data) }

func (m *Repair) decodeBody(f *fields, p *Buffer) {
	m.ChunkContent = f.chunk(p, false)
	m.take(f, p)
}

// Missing says which blocks of a chunk a source could not give: bad or lost.
func (c *ChunkContent) Missing() (mask uint16) {
	for i, s := range c.States {
		if s == BlockBad || s == BlockPoison {
			mask |= 1 << i
		}
	}
	return mask
}

// Block returns the bytes of a block in state BlockData.
func (c *ChunkContent) Block(i int) []byte {
	n := 0
	for _, s := range c.States[:i] {
		if s == BlockData {
			n++
		}
	}
	return c.Data[n*holdfast.BlockSize : (n+1)*holdfast.BlockSize]
}
