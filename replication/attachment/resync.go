package attachment

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/replication/coordinator"
	"github.com/holdfast-storage/holdfast/replication/wire"
)

const (
	// chunksAtOnce bounds the chunks of one copy that are under way: enough to
	// keep both disks busy, half a MiB of memory.
	chunksAtOnce = 8
	// chunkPause is how long a chunk waits that the target could not take yet.
	chunkPause = 100 * time.Millisecond
	// stalledAfter is how many tries of one chunk show that the target takes none.
	stalledAfter = 10
	// joinRetry lies between two asks of raft before a copy begins.
	joinRetry = 500 * time.Millisecond
	// progressEvery is how many chunks lie between two reports.
	progressEvery = 64
)

// copyRun is one copy under way.
type copyRun struct {
	source, target holdfast.ReplicaID
	stop           context.CancelFunc
	resync         *resync // nil while it waits for room on its disks
}

// startCopy runs a copy, once there is room on the disks, until it ends or is
// stopped.
func (s *segment) startCopy(id uint64, source, target holdfast.ReplicaID, hurry func() bool, run func(ctx context.Context, r *resync)) {
	if s.closed {
		return
	}
	ctx, stop := context.WithCancel(s.ctx)
	c := &copyRun{source: source, target: target, stop: stop}
	s.copies[id] = c
	s.running.Add(1)
	go func() {
		defer s.running.Done()
		defer stop()
		r, err := s.a.o.Throttle.begin(ctx, hurry, s.diskOf(source), s.diskOf(target))
		if err != nil {
			return // stopped
		}
		defer r.end()
		s.mu.Lock()
		c.resync = r
		s.mu.Unlock()
		run(ctx, r)
	}()
}

// diskOf is where a replica lies; zero if nobody knows.
func (s *segment) diskOf(id holdfast.ReplicaID) holdfast.DiskID {
	if s.a.o.Disk == nil {
		return holdfast.DiskID{}
	}
	return s.a.o.Disk(id)
}

// mustHurry says whether a copy of log is what clients wait for: at a takeover,
// or when the window that is kept for the copy leaves them little room. To hold
// the copy back then would hold them.
func (s *segment) mustHurry() bool {
	limit := s.a.o.Limits.WindowBytes
	if limit == 0 {
		limit = maxWindow
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.activated == nil || s.queued > 0 || s.window.bytes > limit/2
}

// join sends JOIN once raft knows that the replica is being filled: without raft
// none begins, and nobody takes for a state of the volume what is half a copy.
func (s *segment) join(ctx context.Context, a coordinator.SendJoin) {
	var err error
	for {
		if err = s.a.o.Meta.StartSync(ctx, s.id, a.Epoch, a.Replica); err == nil || outcome(err) != coordinator.OutcomeUnknown {
			break
		}
		s.logger.Warn("raft did not answer before a copy", "replica", a.Replica, "error", err)
		select {
		case <-time.After(joinRetry):
			continue
		case <-ctx.Done():
		}
		break
	}
	s.mu.Lock()
	defer s.unlock()
	c := s.connOf(a.Replica, a.Conn)
	switch {
	case c == nil: // the core gave up waiting
	case err != nil:
		c.peer.lastError = err.Error()
		s.closeLater(c) // the core tries again
	default:
		c.sent, c.want = a.At, a.At
		c.send(0, &wire.Join{At: a.At, ISRVersion: a.ISRVersion})
	}
}

// copied reports the end of a copy, unless it was stopped.
func (s *segment) copied(ctx context.Context, id uint64, ev coordinator.Event) {
	s.mu.Lock()
	delete(s.copies, id)
	if ctx.Err() == nil {
		s.stepLocked(ev)
	}
	s.unlock()
}

// copyLog brings entries that the window no longer holds from one member's log
// to another.
func (s *segment) copyLog(ctx context.Context, r *resync, a coordinator.CopyLog) {
	from := a.From
	for from <= a.To {
		if r.wait(ctx) != nil {
			s.copied(ctx, a.Copy, coordinator.CopiedLog{Copy: a.Copy, Err: ctx.Err()})
			return
		}
		m, err := s.ask(ctx, a.Source, a.SourceConn, &wire.Fetch{From: from, To: a.To})
		if errors.Is(err, holdfast.ErrIntegrity) {
			// The source lost the payload of one of them: as if it had let go of it.
			s.copied(ctx, a.Copy, coordinator.CopiedLog{Copy: a.Copy, Gap: true})
			return
		}
		if err != nil {
			s.copied(ctx, a.Copy, coordinator.CopiedLog{Copy: a.Copy, Err: err})
			return
		}
		es, ok := m.(*wire.Entries)
		switch {
		case !ok:
			err = holdfast.Errorf(holdfast.ErrInvalid, "replica %v answered FETCH with %v", a.Source, m.Type())
		case len(es.Entries) == 0:
			s.copied(ctx, a.Copy, coordinator.CopiedLog{Copy: a.Copy, Gap: true})
			return
		case es.Entries[0].Seq != from:
			err = holdfast.Errorf(holdfast.ErrInvalid, "replica %v sent entry %d, asked for %d", a.Source, es.Entries[0].Seq, from)
		default:
			from = es.Entries[len(es.Entries)-1].Seq + 1
			err = s.handOn(ctx, r, a, es)
		}
		m.Release()
		if err != nil {
			s.copied(ctx, a.Copy, coordinator.CopiedLog{Copy: a.Copy, Err: err})
			return
		}
	}
	s.copied(ctx, a.Copy, coordinator.CopiedLog{Copy: a.Copy})
}

// handOn sends fetched entries to the target, one message per epoch, as far as
// its credit reaches.
func (s *segment) handOn(ctx context.Context, r *resync, a coordinator.CopyLog, es *wire.Entries) error {
	for rest := es.Entries; len(rest) > 0; {
		n, bytes := 0, int64(0)
		for n < len(rest) && rest[n].Epoch == rest[0].Epoch {
			bytes += int64(len(rest[n].Data))
			n++
		}
		m := &wire.Append{Entries: rest[:n:n]}
		for _, b := range es.Buffers() {
			b.Retain()
			m.Hold(b)
		}
		rest = rest[n:]
		for {
			s.mu.Lock()
			c := s.connOf(a.Target, a.TargetConn)
			if c == nil {
				s.mu.Unlock()
				m.Release()
				return errSessionOver
			}
			if c.unacked < maxUnacked {
				c.flying = append(c.flying, flight{last: m.Entries[n-1].Seq, bytes: bytes})
				c.unacked += bytes
				s.resent += bytes
				c.send(0, m)
				s.unlock()
				r.stall(false)
				r.spend(bytes)
				break
			}
			s.mu.Unlock()
			select {
			case <-time.After(stalledAfter * chunkPause):
				r.stall(true)
			case <-c.room:
			case <-c.over:
			case <-ctx.Done():
				m.Release()
				return ctx.Err()
			}
		}
	}
	return nil
}

// copyChunks brings a target's chunks up to the source's, under R11: the
// source lists once it has applied a.At, and every chunk is as of that or later.
func (s *segment) copyChunks(ctx context.Context, r *resync, a coordinator.StartCopy) {
	maxAsOf, err := s.copyListed(ctx, r, a)
	s.copied(ctx, a.Copy, coordinator.Copied{Copy: a.Copy, MaxAsOf: maxAsOf, Err: err})
}

func (s *segment) copyListed(ctx context.Context, r *resync, a coordinator.StartCopy) (holdfast.Seq, error) {
	want, err := s.chunksToCopy(ctx, a)
	if err != nil {
		return 0, err
	}
	s.step(coordinator.CopyProgress{Copy: a.Copy, Total: int64(len(want))})
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var (
		mu      sync.Mutex
		next    int
		done    int
		maxAsOf = a.At // what is listed is as of this at least
		failed  error
		workers sync.WaitGroup
	)
	for range min(chunksAtOnce, len(want)) {
		workers.Add(1)
		go func() {
			defer workers.Done()
			for {
				mu.Lock()
				if failed != nil || next == len(want) {
					mu.Unlock()
					return
				}
				index := want[next]
				next++
				mu.Unlock()
				asOf, err := s.copyChunk(ctx, r, a, index)
				mu.Lock()
				if err != nil && failed == nil {
					failed = err
					cancel()
				}
				maxAsOf = max(maxAsOf, asOf)
				done++
				report, n := done%progressEvery == 0, done
				mu.Unlock()
				if report {
					s.step(coordinator.CopyProgress{Copy: a.Copy, Done: int64(n), Total: int64(len(want))})
				}
			}
		}()
	}
	workers.Wait()
	return maxAsOf, failed
}

// copyChunk brings one chunk, again while the target cannot take it. Most of the
// time that is since the source's chunks are as of an entry before the target's
// checkpoint: it is asked for them as of the latest commit then, at once. What is
// not cured by that waits.
func (s *segment) copyChunk(ctx context.Context, r *resync, a coordinator.StartCopy, index int64) (holdfast.Seq, error) {
	floor := a.At
	for retries := 0; ; retries++ {
		if retries > 1 {
			if retries == stalledAfter {
				r.stall(true)
			}
			select {
			case <-time.After(chunkPause):
			case <-ctx.Done():
				return 0, ctx.Err()
			}
		}
		if err := r.wait(ctx); err != nil {
			return 0, err
		}
		in, err := s.readChunk(ctx, a, index, floor)
		if err != nil {
			return 0, err
		}
		size := int64(len(in.Data))
		r.spend(size)
		reply, err := s.ask(ctx, a.Target, a.TargetConn, in)
		if err != nil {
			return 0, err
		}
		installed, ok := reply.(*wire.Installed)
		if !ok {
			reply.Release()
			return 0, holdfast.Errorf(holdfast.ErrInvalid, "replica %v answered INSTALL with %v", a.Target, reply.Type())
		}
		s.mu.Lock()
		if !installed.Retry {
			s.resent += size
			s.mu.Unlock()
			r.stall(false)
			return installed.AsOf, nil
		}
		floor = max(floor, s.commit)
		s.mu.Unlock()
	}
}

// readChunk asks the source for a chunk as of floor or later, to be installed.
func (s *segment) readChunk(ctx context.Context, a coordinator.StartCopy, index int64, floor holdfast.Seq) (*wire.Install, error) {
	m, err := s.ask(ctx, a.Source, a.SourceConn, &wire.ReadChunk{Index: index, Floor: floor})
	if err != nil {
		return nil, err
	}
	defer m.Release()
	c, ok := m.(*wire.Chunk)
	if !ok || c.Index != index {
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "replica %v answered READ_CHUNK %d with %v", a.Source, index, m.Type())
	}
	return s.installOf(ctx, a, c)
}

// installOf makes what the target is sent out of what the source sent, which it
// mends where the source has bad blocks: by the target's own if they have the
// sums that the source's should have, then by other members'.
func (s *segment) installOf(ctx context.Context, a coordinator.StartCopy, c *wire.Chunk) (*wire.Install, error) {
	if c.Missing() == 0 {
		in := &wire.Install{ChunkContent: c.ChunkContent}
		for _, b := range c.Buffers() {
			b.Retain()
			in.Hold(b)
		}
		return in, nil
	}
	p, err := unpack(&c.ChunkContent)
	if err != nil {
		return nil, err
	}
	p, _, err = s.mend(ctx, p, coordinator.Holder{Replica: a.Source, Conn: a.SourceConn}, a.At, coordinator.Holder{Replica: a.Target, Conn: a.TargetConn})
	if err != nil {
		return nil, err
	}
	if lost := p.Missing(); lost != 0 {
		s.logger.Warn("lost blocks copied as lost", "replica", a.Target, "chunk", c.Index, "lost", fmt.Sprintf("%016b", lost))
	}
	content, buf := p.pack()
	in := &wire.Install{ChunkContent: content}
	if buf != nil {
		in.Hold(buf)
	}
	return in, nil
}

// chunksToCopy lists what the source changed after a.After, and what the
// target holds and the source does not: that is freed.
func (s *segment) chunksToCopy(ctx context.Context, a coordinator.StartCopy) ([]int64, error) {
	source, err := s.chunkList(ctx, a.Source, a.SourceConn, a.At)
	if err != nil {
		return nil, err
	}
	target, err := s.chunkList(ctx, a.Target, a.TargetConn, 0)
	if err != nil {
		return nil, err
	}
	var want []int64
	for len(source) > 0 || len(target) > 0 {
		switch {
		case len(source) == 0 || len(target) > 0 && target[0].Index < source[0].Index:
			want = append(want, target[0].Index)
			target = target[1:]
		default:
			if source[0].LastSeq > a.After || a.After == 0 {
				want = append(want, source[0].Index)
			}
			if len(target) > 0 && target[0].Index == source[0].Index {
				target = target[1:]
			}
			source = source[1:]
		}
	}
	return want, nil
}

// chunkList returns all chunks of a member, 16 bytes each: 16 MiB for a full
// segment of 64 GiB.
func (s *segment) chunkList(ctx context.Context, id holdfast.ReplicaID, conn coordinator.Conn, applied holdfast.Seq) ([]wire.ChunkRef, error) {
	var refs []wire.ChunkRef
	limit := (s.size + holdfast.ChunkSize - 1) / holdfast.ChunkSize
	for from := int64(0); ; {
		m, err := s.ask(ctx, id, conn, &wire.List{From: from, Max: wire.MaxChunkRefs, Applied: applied})
		if err != nil {
			return nil, err
		}
		page, ok := m.(*wire.Chunks)
		if !ok {
			m.Release()
			return nil, holdfast.Errorf(holdfast.ErrInvalid, "replica %v answered LIST with %v", id, m.Type())
		}
		for _, r := range page.Refs {
			if r.Index < from || r.Index >= limit {
				return nil, holdfast.Errorf(holdfast.ErrInvalid, "replica %v lists chunk %d of %d", id, r.Index, limit)
			}
			from = r.Index + 1
		}
		refs = append(refs, page.Refs...)
		if !page.More {
			return refs, nil
		}
	}
}
