package wire

import "github.com/holdfast-storage/holdfast"

// List asks a source for a page of the chunks it holds whose last change is
// above Above, in order, from index From on. It answers only once it has
// applied Applied: a list made before could miss chunks.
type List struct {
	bare
	From    int64 // chunk index
	Max     uint32
	Above   holdfast.Seq
	Applied holdfast.Seq
}

// Type implements Message.
func (*List) Type() Type { return TypeList }

func (m *List) appendBody(b []byte) []byte {
	b = putU32(putU64(b, uint64(m.From)), m.Max)
	return putU64(putU64(b, uint64(m.Above)), uint64(m.Applied))
}

func (m *List) decodeBody(f *fields, p *Buffer) {
	m.noPayload(f, p)
	m.From = f.bytes()
	m.Max = f.u32()
	m.Above = holdfast.Seq(f.u64())
	m.Applied = holdfast.Seq(f.u64())
}

// ChunkRef names a chunk and the seq that changed it last.
type ChunkRef struct {
	Index   int64
	LastSeq holdfast.Seq
}

// Chunks answers List.
type Chunks struct {
	bare
	More bool // chunks behind the last one listed
	Refs []ChunkRef
}

// Type implements Message.
func (*Chunks) Type() Type { return TypeChunks }

func (m *Chunks) appendBody(b []byte) []byte {
	b = putU32(putFlag(b, m.More), uint32(len(m.Refs)))
	for _, r := range m.Refs {
		b = putU64(putU64(b, uint64(r.Index)), uint64(r.LastSeq))
	}
	return b
}

func (m *Chunks) decodeBody(f *fields, p *Buffer) {
	m.noPayload(f, p)
	m.More = f.flag()
	if n := f.count(MaxChunkRefs, 16); n > 0 {
		m.Refs = make([]ChunkRef, n)
		for i := range m.Refs {
			m.Refs[i] = ChunkRef{Index: f.bytes(), LastSeq: holdfast.Seq(f.u64())}
			if i > 0 && m.Refs[i].Index <= m.Refs[i-1].Index {
				f.fail("chunk %d behind chunk %d", m.Refs[i].Index, m.Refs[i-1].Index)
			}
		}
	}
	if m.More && len(m.Refs) == 0 {
		f.fail("an empty page with more behind it")
	}
}

// ReadChunk asks a source for one chunk as of an applied seq of at least Floor (R11).
type ReadChunk struct {
	bare
	Index int64
	Floor holdfast.Seq
}

// Type implements Message.
func (*ReadChunk) Type() Type { return TypeReadChunk }

func (m *ReadChunk) appendBody(b []byte) []byte {
	return putU64(putU64(b, uint64(m.Index)), uint64(m.Floor))
}

func (m *ReadChunk) decodeBody(f *fields, p *Buffer) {
	m.noPayload(f, p)
	m.Index = f.bytes()
	m.Floor = holdfast.Seq(f.u64())
}

// BlockState says what a chunk holds of one block; the values stand on the wire.
type BlockState uint8

// The states of a block.
const (
	BlockZero   BlockState = 0 // reads as zeroes; no payload
	BlockData   BlockState = 1 // one block of payload
	BlockPoison BlockState = 2 // lost: reads fail until it is overwritten; no payload
	BlockBad    BlockState = 3 // the source's bytes do not match the sum given; no payload. In CHUNK alone
)

// ChunkContent is a chunk as of one applied seq of its source. Data holds the
// blocks in state BlockData one behind the other.
type ChunkContent struct {
	Index   int64
	LastSeq holdfast.Seq // the source's, of this chunk
	AsOf    holdfast.Seq // the source had applied exactly this
	States  [holdfast.BlocksPerChunk]BlockState
	Sums    [holdfast.BlocksPerChunk]uint32 // of BlockData and BlockBad blocks; zero elsewhere
	Data    []byte
}

func (c *ChunkContent) put(b []byte) []byte {
	b = putU64(putU64(putU64(b, uint64(c.Index)), uint64(c.LastSeq)), uint64(c.AsOf))
	for _, s := range c.States {
		b = append(b, byte(s))
	}
	return putSums(b, c.Sums[:])
}

func (f *fields) chunk(p *Buffer, mayBeBad bool) (c ChunkContent) {
	c.Index = f.bytes()
	c.LastSeq, c.AsOf = f.seqs()
	blocks := 0
	for i := range c.States {
		c.States[i] = BlockState(f.u8())
		switch c.States[i] {
		case BlockData:
			blocks++
		case BlockZero, BlockPoison:
		case BlockBad:
			if !mayBeBad {
				f.fail("block %d of chunk %d is bad, and that is no state to put it in", i, c.Index)
			}
		default:
			f.fail("block %d of chunk %d: state %d is not known", i, c.Index, c.States[i])
		}
	}
	for i := range c.Sums {
		if c.Sums[i] = f.u32(); c.Sums[i] != 0 && c.States[i] != BlockData && c.States[i] != BlockBad {
			f.fail("block %d of chunk %d: a sum without data", i, c.Index)
		}
	}
	if p != nil {
		c.Data = p.Bytes()
	}
	if len(c.Data) != blocks*holdfast.BlockSize {
		f.fail("chunk %d: %d bytes for %d blocks of data", c.Index, len(c.Data), blocks)
	}
	return c
}

// Chunk answers ReadChunk.
type Chunk struct {
	held
	ChunkContent
}

// Type implements Message.
func (*Chunk) Type() Type { return TypeChunk }

func (m *Chunk) appendBody(b []byte) []byte { return m.put(b) }

func (m *Chunk) payload(p [][]byte) [][]byte { return chunkPayload(p, m.Data) }

func (m *Chunk) decodeBody(f *fields, p *Buffer) {
	m.ChunkContent = f.chunk(p, true)
	m.take(f, p)
}

// Install puts a chunk in place on a replica that is being filled, atomically.
type Install struct {
	held
	ChunkContent
}

// Type implements Message.
func (*Install) Type() Type { return TypeInstall }

func (m *Install) appendBody(b []byte) []byte { return m.put(b) }

func (m *Install) payload(p [][]byte) [][]byte { return chunkPayload(p, m.Data) }

func (m *Install) decodeBody(f *fields, p *Buffer) {
	m.ChunkContent = f.chunk(p, false)
	m.take(f, p)
}

func chunkPayload(p [][]byte, data []byte) [][]byte {
	if len(data) > 0 {
		p = append(p, data)
	}
	return p
}

// Installed answers Install and Repair: the record is logged, not yet durable; or, with
// Retry, nothing was done: the chunk must be read from the source again.
type Installed struct {
	bare
	AsOf  holdfast.Seq
	Retry bool
}

// Type implements Message.
func (*Installed) Type() Type { return TypeInstalled }

func (m *Installed) appendBody(b []byte) []byte { return putFlag(putU64(b, uint64(m.AsOf)), m.Retry) }

func (m *Installed) decodeBody(f *fields, p *Buffer) {
	m.noPayload(f, p)
	m.AsOf = holdfast.Seq(f.u64())
	m.Retry = f.flag()
}

// Whole tells a copy that was being filled that nothing is missing any more.
type Whole struct{ bare }

// Type implements Message.
func (*Whole) Type() Type { return TypeWhole }

func (*Whole) appendBody(b []byte) []byte { return b }

func (m *Whole) decodeBody(f *fields, p *Buffer) { m.noPayload(f, p) }

// WholeDone answers Whole, durably, with everything installed and appended before.
type WholeDone struct {
	bare
	Durable holdfast.Seq
}

// Type implements Message.
func (*WholeDone) Type() Type { return TypeWholeDone }

func (m *WholeDone) appendBody(b []byte) []byte { return putU64(b, uint64(m.Durable)) }

func (m *WholeDone) decodeBody(f *fields, p *Buffer) {
	m.noPayload(f, p)
	m.Durable = holdfast.Seq(f.u64())
}
