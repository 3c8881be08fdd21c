package serve

import (
	"context"
	"errors"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/disk"
	"github.com/holdfast-storage/holdfast/replication/replica"
	"github.com/holdfast-storage/holdfast/replication/wire"
)

func (s *served) takeRequest(c *session, h wire.Header, m wire.Message, ev replica.Event) error {
	key := readKey{c.conn, uint64(h.Request)}
	if s.reads[key] != nil || h.Request == 0 {
		return holdfast.Errorf(holdfast.ErrInvalid, "%v with request number %d, which is in use", h.Type, h.Request)
	}
	if c.reads == maxReads {
		return holdfast.Errorf(holdfast.ErrInvalid, "more than %d requests at a time", maxReads)
	}
	c.reads++
	s.reads[key] = &request{message: m}
	if list, ok := m.(*wire.List); ok {
		s.hurryApply(list.Applied)
	} else if chunk, ok := m.(*wire.ReadChunk); ok {
		s.hurryApply(chunk.Floor)
	}
	s.stepLocked(ev)
	return nil
}

// hurryApply has the chunks brought up to a seq now, for a list that waits.
func (s *served) hurryApply(to holdfast.Seq) {
	if to <= max(s.applied, s.hurry) || s.closed {
		return
	}
	s.copies = true
	running := s.hurry != 0
	s.hurry = to
	if running {
		return // the one that runs goes on to there
	}
	s.ended.Add(1)
	go func() {
		defer s.ended.Done()
		for done := holdfast.Seq(0); ; {
			s.mu.Lock()
			to := s.hurry
			if to == done {
				s.hurry = 0
				s.mu.Unlock()
				return
			}
			s.mu.Unlock()
			// An error is the disk's, which tells it by itself; one for want of
			// a commit is cured by the next tick.
			_, _ = s.log.Apply(s.ctx, to)
			s.tellApplied()
			done = to
		}
	}()
}

// dropRead forgets a request without an answer.
func (s *served) dropRead(key readKey) {
	r := s.reads[key]
	if r == nil {
		return
	}
	delete(s.reads, key)
	if r.reply != nil {
		r.reply.Release()
	}
	if r.direct != nil {
		r.direct.done, r.direct.err = true, holdfast.Errorf(holdfast.ErrFenced, "read from replica %v: the session is over", s.desc.Replica)
	}
	if c := s.sessions[key.conn]; c != nil {
		c.reads--
	}
}

// startRead begins to answer a request that the core allowed.
func (s *served) startRead(conn replica.Conn, id uint64) {
	key := readKey{conn, id}
	r := s.reads[key]
	switch {
	case r == nil:
	case r.direct != nil:
		r.direct.sample = true
	case s.closed:
		s.dropRead(key)
	default:
		s.ended.Add(1)
		go s.answer(key, r)
	}
}

// answer reads from the log, and hands a sample back to the core; fetched
// entries, lists and chunks go out as they are.
func (s *served) answer(key readKey, r *request) {
	defer s.ended.Done()
	var reply wire.Message
	var err error
	switch m := r.message.(type) {
	case *wire.Read:
		reply, err = s.sample(m)
		s.mu.Lock()
		if s.reads[key] == r {
			r.reply = reply
			s.stepLocked(replica.Sampled{Conn: key.conn, ID: key.id, Err: err})
		} else if reply != nil {
			reply.Release()
		}
		s.unlock()
		return
	case *wire.Fetch:
		reply, err = s.entries(m)
	case *wire.List:
		reply, err = s.list(m)
	case *wire.Afford:
		reply, err = s.afford(m)
	case *wire.ReadChunk:
		var c disk.Chunk
		if c, err = s.log.ReadChunk(m.Index); err == nil {
			reply = chunkToWire(c)
		}
	}
	if err != nil {
		reply = wire.ErrorOf(err)
	}
	s.mu.Lock()
	if s.reads[key] == r {
		r.reply = nil
		s.send(key.conn, 0, wire.RequestID(key.id), reply)
		s.dropRead(key)
	} else {
		reply.Release()
	}
	s.unlock()
}

// sample reads a range as it is now.
func (s *served) sample(m *wire.Read) (wire.Message, error) {
	b := wire.NewBuffer(int(m.Length))
	if err := s.log.ReadAt(b.Bytes(), m.Offset); err != nil {
		b.Release()
		return nil, err
	}
	d := &wire.Data{Bytes: b.Bytes(), Sums: wire.BlockSums(make([]uint32, 0, m.Length/holdfast.BlockSize), b.Bytes())}
	d.Hold(b)
	return d, nil
}

func (s *served) sendSample(a replica.SendSample) {
	key := readKey{a.Conn, a.ID}
	r := s.reads[key]
	if r == nil {
		return
	}
	if r.direct != nil {
		r.direct.done, r.direct.err = true, a.Err
		s.forget(key)
		return
	}
	reply := r.reply
	r.reply = nil
	if a.Err != nil {
		if reply != nil {
			reply.Release()
		}
		reply = wire.ErrorOf(a.Err)
	}
	s.send(a.Conn, 0, wire.RequestID(a.ID), reply)
	s.forget(key)
}

func (s *served) forget(key readKey) {
	delete(s.reads, key)
	if c := s.sessions[key.conn]; c != nil {
		c.reads--
	}
}

func (s *served) entries(m *wire.Fetch) (wire.Message, error) {
	es, err := s.log.Entries(m.From, wire.MaxPayload)
	var gap *disk.GapError
	if errors.As(err, &gap) {
		return &wire.Entries{}, nil
	}
	if err != nil {
		return nil, err
	}
	return toWire(es, m.To), nil
}

// list pages through the chunks that changed above a seq.
func (s *served) list(m *wire.List) (wire.Message, error) {
	limit := min(int(m.Max), wire.MaxChunkRefs)
	if limit <= 0 {
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "a list of at most %d chunks", m.Max)
	}
	refs, err := s.log.Chunks(m.Above, m.From-1, limit+1)
	if err != nil {
		return nil, err
	}
	out := &wire.Chunks{More: len(refs) > limit}
	for _, r := range refs[:min(len(refs), limit)] {
		out.Refs = append(out.Refs, wire.ChunkRef{Index: r.Index, LastSeq: r.LastSeq})
	}
	return out, nil
}

// directRead is a read in process: the caller samples into its own memory.
type directRead struct {
	sample bool // the core allowed it
	done   bool
	err    error
}

// Session is a session in process: a link, and reads that go straight to the
// disk without passing through it.
type Session struct {
	wire.Link
	served *served
	conn   replica.Conn
	epoch  holdfast.Epoch
}

// ReadAt fills p from byte off of the segment as READ does: whole blocks, the
// newest logged bytes, only while this session's epoch is the highest accepted
// before and after (R10). It may be called concurrently.
func (c *Session) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	s := c.served
	r := &directRead{}
	s.mu.Lock()
	if s.sessions[c.conn] == nil {
		s.mu.Unlock()
		return holdfast.Errorf(holdfast.ErrUnavailable, "read from replica %v: the session is over", s.desc.Replica)
	}
	s.directID++
	key := readKey{c.conn, s.directID | directBit}
	s.reads[key] = &request{direct: r}
	s.sessions[c.conn].reads++
	s.stepLocked(replica.Read{Conn: c.conn, Epoch: c.epoch, ID: key.id})
	s.unlock()
	if r.sample {
		err := s.log.ReadAt(p, off)
		s.mu.Lock()
		if !r.done {
			s.stepLocked(replica.Sampled{Conn: c.conn, ID: key.id, Err: err})
		}
		s.unlock()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !r.done {
		s.dropRead(key)
	}
	return r.err
}

// directBit keeps the numbers of reads in process apart from those of frames.
const directBit = 1 << 62
