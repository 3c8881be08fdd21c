package serve

import (
	"errors"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/disk"
	"github.com/holdfast-storage/holdfast/replication/replica"
	"github.com/holdfast-storage/holdfast/replication/wire"
)

// runLog makes the changes of the log, in order, one at a time, but appends
// that wait together in one write.
func (s *served) runLog() {
	defer s.ended.Done()
	var queue []replica.Action
	for {
		s.mu.Lock()
		queue, s.work = s.work, queue[:0]
		release := s.giveBack
		s.giveBack = false
		s.mu.Unlock()
		if release {
			s.release()
		}
		if len(queue) == 0 {
			select {
			case <-s.wake:
				continue
			case <-s.ctx.Done():
				return
			}
		}
		for n := 0; n < len(queue); {
			if s.ctx.Err() != nil {
				return
			}
			if _, ok := queue[n].(replica.LogAppend); ok {
				n += s.append(queue[n:])
				s.ahead()
				continue
			}
			s.change(queue[n])
			n++
		}
		clear(queue)
	}
}

// append logs the first appends of queue with one write and returns how many.
func (s *served) append(queue []replica.Action) int {
	var entries []disk.Entry
	var group []replica.Batch
	var conn replica.Conn
	size := 0
	s.mu.Lock()
	for _, a := range queue {
		la, ok := a.(replica.LogAppend)
		if !ok {
			break
		}
		k := s.batches[la.Batch]
		if len(group) > 0 && (size+k.size > maxCoalesced || k.conn != conn) {
			break
		}
		conn = k.conn
		size += k.size
		group = append(group, la.Batch)
		if len(group) == 1 {
			entries = k.entries
		} else {
			entries = append(entries, k.entries...)
		}
	}
	s.mu.Unlock()
	err := s.logEntries(conn, entries)
	if err != nil && len(group) > 1 && errors.Is(err, holdfast.ErrIntegrity) {
		// One bad payload must not cost the others: they were sent apart.
		for i, b := range group {
			s.mu.Lock()
			k := s.batches[b]
			s.mu.Unlock()
			if err := s.logEntries(conn, k.entries); err != nil {
				s.appended(group[i:i+1], err)
				continue
			}
			s.appended(group[i:i+1], nil)
		}
		return len(group)
	}
	s.appended(group, err)
	return len(group)
}

// logEntries appends for a session. A log that is full of entries that are not
// committed gets room by their commit, for which the writer must learn what is
// durable here: its FLUSH waits behind these very entries, so it is told
// unasked. This goes on for as long as the session does: the writer decides how
// long it waits for a copy. On error nothing of the entries is in the log.
func (s *served) logEntries(conn replica.Conn, entries []disk.Entry) error {
	before := entries[0].Seq - 1
	err := s.log.Append(entries)
	for errors.Is(err, holdfast.ErrNoSpace) {
		dur, failed := s.log.Sync(s.ctx)
		if failed != nil {
			return failed
		}
		s.mu.Lock()
		writer, epoch, ok := s.core.Writer()
		alive := ok && writer == conn && s.sessions[conn] != nil
		if alive {
			s.send(conn, epoch, 0, &wire.Flushed{Durable: dur})
		}
		s.unlock()
		if !alive {
			if err := s.log.Truncate(before); err != nil {
				return err
			}
			// The core takes every other kind for the end of the disk (R12).
			return holdfast.Errorf(holdfast.ErrIntegrity, "entries given up with their session: %w", err)
		}
		select {
		case <-time.After(fullPause):
		case <-s.ctx.Done():
			return err
		}
		for tail := s.log.Status().Tail; len(entries) > 0 && entries[0].Seq <= tail; {
			entries = entries[1:] // logged before the room ended
		}
		err = s.log.Append(entries)
	}
	return err
}

func (s *served) appended(group []replica.Batch, err error) {
	s.mu.Lock()
	for i, b := range group {
		s.drop(b)
		s.stepLocked(replica.Appended{Batch: group[i], Err: err})
	}
	s.unlock()
}

// change makes one other change.
func (s *served) change(a replica.Action) {
	switch a := a.(type) {
	case replica.LogFence:
		err := s.log.Fence(a.Epoch)
		var fenced *disk.FenceError
		if errors.As(err, &fenced) && fenced.Present == a.Epoch {
			_, err = s.log.Sync(s.ctx) // fenced before: only the tail is sealed
		}
		s.step(replica.Fenced{Err: err})
		s.ahead() // a takeover does not wait for it
	case replica.LogTruncate:
		s.step(replica.Opened{Err: s.log.Truncate(a.To)})
	case replica.LogRebase:
		held, err := s.log.Rebase(s.ctx, a.Epoch, a.To)
		s.mu.Lock()
		s.copies = err == nil
		s.stepLocked(replica.Opened{Held: held, Err: err})
		s.unlock()
		s.tellApplied()
	case replica.LogInstall:
		s.mu.Lock()
		k := s.batches[a.Batch]
		s.mu.Unlock()
		err := s.log.InstallChunk(k.chunk)
		if errors.Is(err, holdfast.ErrNoSpace) {
			// The core takes a refusal for "not now", and the writer tries again.
			err = holdfast.Errorf(holdfast.ErrRefused, "install chunk %d: %w", k.chunk.Index, err)
		}
		s.step(replica.Installed{Batch: a.Batch, Err: err})
		s.mu.Lock()
		s.drop(a.Batch)
		s.mu.Unlock()
	case replica.LogRepair:
		s.repair(a)
	case replica.LogWhole:
		s.step(replica.WholeDone{Err: s.log.MarkWhole()})
	case replica.LogIntact:
		// A disk that is never intact refuses; that costs continuity alone.
		if err := s.log.DeclareIntact(a.Epoch); err != nil && !errors.Is(err, holdfast.ErrRefused) {
			s.step(replica.Failed{Err: err})
		}
	case replica.LogHint:
		if err := s.log.SetHint(a.Epoch, a.ISR); err != nil {
			s.step(replica.Failed{Err: err})
		}
	}
}

// repair replaces what is bad of a chunk, one at a time per disk: beside what
// clients do it is in no hurry.
func (s *served) repair(a replica.LogRepair) {
	s.mu.Lock()
	k := s.batches[a.Batch]
	s.mu.Unlock()
	s.disk.repairing.Lock()
	err := s.log.Repair(k.chunk)
	s.disk.repairing.Unlock()
	if errors.Is(err, holdfast.ErrNoSpace) {
		err = holdfast.Errorf(holdfast.ErrRefused, "repair chunk %d: %w", k.chunk.Index, err) // not now
	}
	s.step(replica.Repaired{Batch: a.Batch, Err: err})
	s.mu.Lock()
	s.drop(a.Batch)
	s.mu.Unlock()
}

func (s *served) runSyncs() {
	defer s.ended.Done()
	for {
		select {
		case id := <-s.syncs:
			_, err := s.log.Sync(s.ctx)
			if s.ctx.Err() != nil {
				return
			}
			s.step(replica.Synced{ID: id, Err: err})
		case <-s.ctx.Done():
			return
		}
	}
}
