package serve

import (
	"github.com/holdfast-storage/holdfast"
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
	if s.broken {
		s.mu.Unlock()
		return s.failed
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
	s.copies = false
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
	case *wire.Repair:
		return s.takeRepair(c, h, m)
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
	case *wire.Afford:
		if m.Offset+m.Length > s.desc.Size {
			return holdfast.Errorf(holdfast.ErrInvalid, "a write of %d bytes at %d of a segment of %d", m.Length, m.Offset, s.desc.Size)
		}
		return s.takeRequest(c, h, m, replica.Fetch{Conn: c.conn, Epoch: h.Epoch, ID: uint64(h.Request), Chunks: true})
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
	case *wire.Promise:
		s.stepLocked(replica.Ping{Conn: c.conn, Epoch: h.Epoch, Nonce: uint64(h.Request), Promise: true, Now: now()})
	case *wire.Intact:
		s.stepLocked(replica.Intact{Conn: c.conn, Epoch: h.Epoch})
	case *wire.Whole:
		s.stepLocked(replica.Whole{Conn: c.conn, Epoch: h.Epoch})
	case *wire.Close:
		s.stepLocked(replica.Left{Conn: c.conn})
		s.left(c.conn)
		s.flushLater(c.link, true)
	default:
		m.Release()
		return holdfast.Errorf(holdfast.ErrInvalid, "%v is not for a replica", h.Type)
	}
	return nil
}

func (s *served) takeAppend(c *session, m *wire.Append) error {
	k := &kept{conn: c.conn, message: m}
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
	k, err := s.keepChunk(c, h, m, &m.ChunkContent)
	if err != nil {
		return err
	}
	s.stepLocked(replica.Install{Conn: c.conn, Epoch: c.epoch, AsOf: m.AsOf, Batch: s.keep(k)})
	return nil
}

func (s *served) takeRepair(c *session, h wire.Header, m *wire.Repair) error {
	k, err := s.keepChunk(c, h, m, &m.ChunkContent)
	if err != nil {
		return err
	}
	s.stepLocked(replica.Repair{Conn: c.conn, Epoch: c.epoch, AsOf: m.AsOf, Batch: s.keep(k)})
	return nil
}

// keepChunk takes a message with a chunk; on error it is released.
func (s *served) keepChunk(c *session, h wire.Header, m wire.Message, content *wire.ChunkContent) (*kept, error) {
	k := &kept{conn: c.conn, message: m, request: h.Request, size: len(content.Data)}
	if s.keptSize+k.size > maxKept {
		m.Release()
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "%d bytes are not logged yet, %d more came", s.keptSize, k.size)
	}
	var err error
	if k.chunk, err = chunkToDisk(content, s.desc.Size); err != nil {
		m.Release()
		return nil, err
	}
	return k, nil
}
