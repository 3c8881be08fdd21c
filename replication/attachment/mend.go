package attachment

import (
	"context"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/replication/coordinator"
	"github.com/holdfast-storage/holdfast/replication/wire"
)

// askTime bounds one question for a chunk: the member may have to apply entries
// first, and one that left its session does not answer at all.
const askTime = 10 * time.Second

// pieces is a chunk as one member holds it, block by block: what it calls data
// matches its sums.
type pieces struct {
	wire.ChunkContent // without Data
	blocks            [holdfast.BlocksPerChunk][]byte
}

// readPieces reads a chunk as of an applied entry of at least floor.
func (s *segment) readPieces(ctx context.Context, from coordinator.Holder, index int64, floor holdfast.Seq) (*pieces, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	m, err := s.ask(ctx, from.Replica, from.Conn, &wire.ReadChunk{Index: index, Floor: floor})
	if err != nil {
		return nil, err
	}
	defer m.Release()
	c, ok := m.(*wire.Chunk)
	if !ok || c.Index != index {
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "replica %v answered READ_CHUNK %d with %v", from.Replica, index, m.Type())
	}
	return unpack(&c.ChunkContent)
}

// unpack copies a chunk's blocks, and compares them with their sums.
func unpack(c *wire.ChunkContent) (*pieces, error) {
	p := &pieces{ChunkContent: *c}
	p.Data = nil
	for i, st := range c.States {
		if st != wire.BlockData {
			continue
		}
		b := c.Block(i)
		if err := wire.Verify(b, c.Sums[i:i+1]); err != nil {
			return nil, holdfast.Errorf(holdfast.ErrIntegrity, "chunk %d, block %d: %w", c.Index, i, err)
		}
		p.blocks[i] = append([]byte(nil), b...)
	}
	return p, nil
}

// pack returns the chunk with its data in a buffer, which the message that
// carries it is to hold.
func (p *pieces) pack() (wire.ChunkContent, *wire.Buffer) {
	c, n := p.ChunkContent, 0
	for _, b := range p.blocks {
		n += len(b)
	}
	if n == 0 {
		return c, nil
	}
	buf := wire.NewBuffer(n)
	c.Data = buf.Bytes()
	n = 0
	for _, b := range p.blocks {
		n += copy(c.Data[n:], b)
	}
	return c, buf
}

// content is what the core learns of it. The states have the same numbers.
func (p *pieces) content() coordinator.ChunkContent {
	c := coordinator.ChunkContent{LastSeq: p.LastSeq, AsOf: p.AsOf, Blocks: make([]coordinator.Piece, len(p.States))}
	for i, st := range p.States {
		c.Blocks[i] = coordinator.Piece{State: coordinator.BlockState(st), Sum: p.Sums[i]}
	}
	return c
}

// assemble makes the chunk that the core decided on, out of what was read.
func assemble(c coordinator.ChunkContent, index int64, read []*pieces) *pieces {
	p := &pieces{}
	p.Index, p.LastSeq, p.AsOf = index, c.LastSeq, c.AsOf
	for i, b := range c.Blocks {
		p.States[i], p.Sums[i] = wire.BlockState(b.State), b.Sum
		if b.State == coordinator.BlockData {
			p.blocks[i] = read[b.From].blocks[i]
		}
	}
	return p
}

// mend completes a chunk that was read from a member, out of what others hold of
// it: first those of extra, then the in-sync ones. News is false if all that it lacks
// is lost, and from knew.
func (s *segment) mend(ctx context.Context, p *pieces, from coordinator.Holder, floor holdfast.Seq, extra ...coordinator.Holder) (good *pieces, news bool, err error) {
	m := coordinator.NewMend(p.content(), from, floor)
	read := []*pieces{p}
	for _, e := range extra {
		if o, err := s.readPieces(ctx, e, p.Index, 0); err == nil {
			read = append(read, o)
			m.Extra(o.content())
		}
	}
	s.mu.Lock()
	m.Members(s.core.Holders())
	s.mu.Unlock()
	for h, floor, ok := m.Next(); ok; h, floor, ok = m.Next() {
		o, err := s.readPieces(ctx, h, p.Index, floor)
		switch {
		case ctx.Err() != nil:
			return nil, false, ctx.Err()
		case err != nil:
			m.Silent()
		default:
			read = append(read, o)
			m.Answer(o.content())
		}
	}
	c, news, err := m.Done()
	if err != nil {
		return nil, false, err
	}
	return assemble(c, p.Index, read), news, nil
}
