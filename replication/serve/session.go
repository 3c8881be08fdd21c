package serve

import (
	"context"
	"errors"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/disk"
	"github.com/holdfast-storage/holdfast/replication/replica"
	"github.com/holdfast-storage/holdfast/replication/wire"
)

// open begins a session on a link. It fails if the replica is being closed.
func (s *served) open(conn replica.Conn, link wire.Link, epoch holdfast.Epoch, hello *wire.Hello) error {
	c := &session{conn: conn, link: link, epoch: epoch, hello: hello}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return holdfast.Errorf(holdfast.ErrUnavailable, "replica %v is being closed here", s.desc.Replica)
	}
	s.sessions[conn] = c
	s.linked.Add(1) // start or abandon follows
	s.mu.Unlock()
	return nil
}

// abandon takes back an open whose link could not be started.
func (s *served) abandon(conn replica.Conn, err error) {
	s.receive(conn, nil, err)
	s.linked.Done()
}

// start begins to take the session's messages. The replica is not closed
// before the link has ended.
func (s *served) start(conn replica.Conn, link wire.Link) {
	link.Start(func(batch []wire.Received, err error) { s.receive(conn, batch, err) })
	go func() {
		defer s.linked.Done()
		link.Wait()
	}()
}

// receive takes what arrived on a session's link.
func (s *served) receive(conn replica.Conn, batch []wire.Received, err error) {
	s.mu.Lock()
	c := s.sessions[conn]
	for _, r := range batch {
		if c == nil {
			r.Message.Release()
			continue
		}
		if bad := s.take(c, r.Header, r.Message); bad != nil {
			s.logger.Warn("session refused", "remote", c.link.Remote(), "message", r.Header.Type, "error", bad)
			s.send(conn, 0, 0, wire.ErrorOf(bad))
			s.flushLater(c.link, true)
			s.end(c)
			c = nil
		}
	}
	if err != nil && c != nil {
		s.end(c)
	}
	s.unlock()
}

// end forgets a session.
func (s *served) end(c *session) {
	s.stepLocked(replica.Closed{Conn: c.conn})
	delete(s.sessions, c.conn)
}

// take turns one message into an event. It owns the message. An error is a
// broken writer's, and ends the session.
func (s *served) take(c *session, h wire.Header, m wire.Message) error {
	if h.Epoch != c.epoch {
		m.Release()
		return holdfast.Errorf(holdfast.ErrInvalid, "%v of epoch %d in a session of epoch %d", h.Type, h.Epoch, c.epoch)
	}
	switch m := m.(type) {
	case *wire.Append:
		return s.takeAppend(c, m)
	case *wire.Install:
		return s.takeInstall(c, h, m)
	case *wire.Read:
		if m.Offset+m.Length > s.desc.Size {
			return holdfast.Errorf(holdfast.ErrInvalid, "read of %d bytes at %d of a segment of %d", m.Length, m.Offset, s.desc.Size)
		}
		return s.takeRequest(c, h, m, replica.Read{Conn: c.conn, Epoch: h.Epoch, ID: uint64(h.Request)})
	case *wire.Fetch:
		return s.takeRequest(c, h, m, replica.Fetch{Conn: c.conn, Epoch: h.Epoch, ID: uint64(h.Request), From: m.From, To: m.To})
	case *wire.List:
		return s.takeRequest(c, h, m, replica.Fetch{Conn: c.conn, Epoch: h.Epoch, ID: uint64(h.Request), Chunks: true, From: m.Above, To: m.Applied})
	case *wire.ReadChunk:
		return s.takeRequest(c, h, m, replica.Fetch{Conn: c.conn, Epoch: h.Epoch, ID: uint64(h.Request), Chunks: true, To: m.Floor})
	case *wire.Fence:
		s.stepLocked(replica.Fence{Conn: c.conn, Epoch: h.Epoch})
	case *wire.Open:
		s.stepLocked(replica.Open{Conn: c.conn, Epoch: h.Epoch, CutTo: m.Start, ISRVersion: m.ISRVersion})
	case *wire.Join:
		s.stepLocked(replica.Join{Conn: c.conn, Epoch: h.Epoch, At: m.At, ISRVersion: m.ISRVersion})
	case *wire.Flush:
		s.stepLocked(replica.Flush{Conn: c.conn, Epoch: h.Epoch, ID: uint64(h.Request)})
	case *wire.Commit:
		s.stepLocked(replica.Commit{Conn: c.conn, Epoch: h.Epoch, Seq: m.Seq})
	case *wire.Ping:
		s.stepLocked(replica.Ping{Conn: c.conn, Epoch: h.Epoch, Nonce: uint64(h.Request)})
	case *wire.Intact:
		s.stepLocked(replica.Intact{Conn: c.conn, Epoch: h.Epoch})
	case *wire.Whole:
		s.stepLocked(replica.Whole{Conn: c.conn, Epoch: h.Epoch})
	case *wire.Close:
		s.flushLater(c.link, true)
	default:
		m.Release()
		return holdfast.Errorf(holdfast.ErrInvalid, "%v is not for a replica", h.Type)
	}
	return nil
}

func (s *served) takeAppend(c *session, m *wire.Append) error {
	k := &kept{message: m}
	for i := range m.Entries {
		k.size += len(m.Entries[i].Data)
	}
	if s.keptSize+k.size > maxKept {
		m.Release()
		return holdfast.Errorf(holdfast.ErrInvalid, "%d bytes of entries are not logged yet, %d more came", s.keptSize, k.size)
	}
	var err error
	if k.entries, err = toDisk(m.Entries, m.Commit, s.desc.Size); err != nil {
		m.Release()
		return err
	}
	first, last := m.Entries[0], m.Entries[len(m.Entries)-1]
	s.stepLocked(replica.Append{Conn: c.conn, Epoch: c.epoch, EntryEpoch: first.Epoch, First: first.Seq, Last: last.Seq, Batch: s.keep(k)})
	return nil
}

func (s *served) takeInstall(c *session, h wire.Header, m *wire.Install) error {
	k := &kept{message: m, request: h.Request, size: len(m.Data)}
	if s.keptSize+k.size > maxKept {
		m.Release()
		return holdfast.Errorf(holdfast.ErrInvalid, "%d bytes are not logged yet, %d more came", s.keptSize, k.size)
	}
	var err error
	if k.chunk, err = chunkToDisk(&m.ChunkContent, s.desc.Size); err != nil {
		m.Release()
		return err
	}
	s.stepLocked(replica.Install{Conn: c.conn, Epoch: c.epoch, AsOf: m.AsOf, Batch: s.keep(k)})
	return nil
}

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
	if to <= s.applied || s.closed {
		return
	}
	s.copies = true
	s.ended.Add(1)
	go func() {
		defer s.ended.Done()
		// An error is the disk's, which tells it by itself; one for want of a
		// commit is cured by the next tick.
		_, _ = s.log.Apply(s.ctx, to)
		s.tellApplied()
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

// list pages through the chunks that changed above a seq. Pages without one
// are skipped here.
func (s *served) list(m *wire.List) (wire.Message, error) {
	limit := min(int(m.Max), wire.MaxChunkRefs)
	if limit <= 0 {
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "a list of at most %d chunks", m.Max)
	}
	out := &wire.Chunks{}
	after := m.From - 1
	for {
		refs, err := s.log.Chunks(after, limit)
		if err != nil {
			return nil, err
		}
		for _, r := range refs {
			if r.LastSeq > m.Above || m.Above == 0 {
				if len(out.Refs) == limit {
					out.More = true
					return out, nil
				}
				out.Refs = append(out.Refs, wire.ChunkRef{Index: r.Index, LastSeq: r.LastSeq})
			}
			after = r.Index
		}
		if len(refs) < limit {
			return out, nil
		}
	}
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
const directBit = 1 << 63
