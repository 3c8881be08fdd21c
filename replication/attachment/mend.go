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

// source is a member to read a chunk from.
type source struct {
	replica holdfast.ReplicaID
	conn    coordinator.Conn
}

// pieces is a chunk as one member holds it, block by block: what it calls data
// matches its sums.
type pieces struct {
	wire.ChunkContent // without Data
	blocks            [holdfast.BlocksPerChunk][]byte
}

// inSync returns the in-sync members that can be asked, and whether these are
// all there are. Under mu.
func (s *segment) inSync() (list []source, all bool) {
	all = true
	for _, m := range s.core.State().Members {
		if !m.InSync {
			continue
		}
		p := s.peers[m.Replica]
		if p == nil || p.conn == nil || p.conn.ended || m.Link != "streaming" && m.Link != "replaying" {
			all = false
			continue
		}
		list = append(list, source{m.Replica, p.conn.number})
	}
	return list, all && len(list) > 0
}

// readPieces reads a chunk as of an applied entry of at least floor.
func (s *segment) readPieces(ctx context.Context, from source, index int64, floor holdfast.Seq) (*pieces, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	m, err := s.ask(ctx, from.replica, from.conn, &wire.ReadChunk{Index: index, Floor: floor})
	if err != nil {
		return nil, err
	}
	defer m.Release()
	c, ok := m.(*wire.Chunk)
	if !ok || c.Index != index {
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "replica %v answered READ_CHUNK %d with %v", from.replica, index, m.Type())
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

// fill takes blocks that p lacks from another member's pieces: those whose sum
// is the one that p should have; and any, if they are of the same version: the
// same entry changed the chunk last, so it holds the same.
func (p *pieces) fill(o *pieces, version bool) {
	for i, st := range p.States {
		if st != wire.BlockBad && st != wire.BlockPoison {
			continue
		}
		same := version && o.LastSeq == p.LastSeq
		switch {
		case o.States[i] == wire.BlockData && (same || st == wire.BlockBad && o.Sums[i] == p.Sums[i]):
			p.States[i], p.Sums[i], p.blocks[i] = wire.BlockData, o.Sums[i], o.blocks[i]
		case o.States[i] == wire.BlockZero && same:
			p.States[i], p.Sums[i], p.blocks[i] = wire.BlockZero, 0, nil
		}
	}
}

// errNotNow: what a chunk lacks can neither be had nor called lost now.
var errNotNow = holdfast.Errorf(holdfast.ErrUnavailable, "not every in-sync replica told what it holds of the chunk in this version")

// mend completes a chunk that was read from a member: by what of it the members
// of extra hold with the right sums, by the chunk of an in-sync one that has it
// whole, or by blocks of several. What none of them has becomes poison: only
// once every in-sync member was asked, and answered with the same version.
func (s *segment) mend(ctx context.Context, p *pieces, from source, floor holdfast.Seq, extra ...source) (*pieces, error) {
	for _, e := range extra {
		if o, err := s.readPieces(ctx, e, p.Index, 0); err == nil {
			p.fill(o, false)
		}
	}
	if p.Missing() == 0 {
		return p, nil
	}
	s.mu.Lock()
	members, all := s.inSync()
	s.mu.Unlock()
	self := false
	for _, m := range members {
		if m == from {
			self = true
			continue
		}
		o, err := s.readPieces(ctx, m, p.Index, floor)
		switch {
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case err != nil:
			all = false
			continue
		case o.Missing() == 0:
			return o, nil
		}
		p.fill(o, true)
		all = all && o.LastSeq == p.LastSeq
	}
	switch {
	case p.Missing() == 0:
		return p, nil
	case !all || !self:
		return nil, errNotNow
	}
	for i, st := range p.States {
		if st == wire.BlockBad {
			p.States[i], p.Sums[i] = wire.BlockPoison, 0
		}
	}
	return p, nil
}
