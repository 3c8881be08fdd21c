package attachment

import (
	"context"
	"errors"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/replication/coordinator"
	"github.com/holdfast-storage/holdfast/replication/wire"
)

// opOverhead is what an operation costs of the node's memory beside its payload.
const opOverhead = 512

// Size implements blockdev.Device.
func (a *Attachment) Size() int64 { return a.o.Size }

// Blocks implements blockdev.Device.
func (a *Attachment) Blocks() (logical, physical int) {
	return holdfast.LogicalBlockSize, holdfast.BlockSize
}

// check refuses a request that leaves the volume, or comes after the end.
func (a *Attachment) check(what string, off, n int64) error {
	if off < 0 || n < 0 || off > a.o.Size-n {
		return holdfast.Errorf(holdfast.ErrInvalid, "%s of %d bytes at %d: the volume has %d", what, n, off, a.o.Size)
	}
	a.mu.Lock()
	detaching := a.detaching
	a.mu.Unlock()
	if detaching {
		return errEnded(a.o.Volume)
	}
	return a.Err()
}

// piece is a part of a request that lies within one segment.
type piece struct {
	s      *segment
	off, n int64 // within the segment
	at     int64 // within the request
}

// each calls f for the pieces of [off, off+n), each at most limit bytes long.
func (a *Attachment) each(off, n, limit int64, f func(p piece) error) error {
	for at := int64(0); at < n; {
		s := a.segments[(off+at)/a.o.SegmentSize]
		in := (off + at) % a.o.SegmentSize
		m := min(n-at, limit, s.size-in)
		if err := f(piece{s: s, off: in, n: m, at: at}); err != nil {
			return err
		}
		at += m
	}
	return nil
}

func alignDown(n int64) int64 { return n &^ (holdfast.BlockSize - 1) }
func alignUp(n int64) int64   { return alignDown(n + holdfast.BlockSize - 1) }

// ReadAt implements blockdev.Device.
func (a *Attachment) ReadAt(ctx context.Context, p []byte, off int64) error {
	n := int64(len(p))
	if err := a.check("read", off, n); err != nil || n == 0 {
		return err
	}
	if from, to := alignDown(off), alignUp(off+n); from != off || to != off+n {
		whole := make([]byte, to-from)
		if err := a.read(ctx, whole, from); err != nil {
			return err
		}
		copy(p, whole[off-from:])
		return nil
	}
	return a.read(ctx, p, off)
}

// read reads whole blocks.
func (a *Attachment) read(ctx context.Context, p []byte, off int64) error {
	return a.each(off, int64(len(p)), holdfast.MaxOpSize, func(c piece) error {
		return c.s.read(ctx, p[c.at:c.at+c.n], c.off)
	})
}

// WriteAt implements blockdev.Device.
func (a *Attachment) WriteAt(ctx context.Context, p []byte, off int64, fua bool) error {
	n := int64(len(p))
	if err := a.check("write", off, n); err != nil || n == 0 {
		return err
	}
	from, to := alignDown(off), alignUp(off+n)
	partial := from != off || to != off+n
	hold, err := a.ranges.acquire(ctx, from, to-from, partial)
	if err != nil {
		return err
	}
	r := newRequest(&a.ranges, hold)
	if partial {
		p, err = a.complete(ctx, p, off)
	}
	if err == nil {
		err = a.each(from, to-from, holdfast.MaxOpSize, func(c piece) error {
			return c.s.write(ctx, r, coordinator.OpWrite, c.off, c.n, p[c.at:c.at+c.n], fua)
		})
	}
	r.finish(err)
	return r.wait(ctx)
}

// complete returns p with the rest of the blocks at its edges around it. The
// caller has claimed these blocks for itself.
func (a *Attachment) complete(ctx context.Context, p []byte, off int64) ([]byte, error) {
	from, end := alignDown(off), off+int64(len(p))
	to := alignUp(end)
	whole := make([]byte, to-from)
	if from != off {
		if err := a.read(ctx, whole[:holdfast.BlockSize], from); err != nil {
			return nil, err
		}
	}
	if last := to - holdfast.BlockSize; to != end && (last != from || from == off) {
		if err := a.read(ctx, whole[last-from:], last); err != nil {
			return nil, err
		}
	}
	copy(whole[off-from:], p)
	return whole, nil
}

// Flush implements blockdev.Device.
func (a *Attachment) Flush(ctx context.Context) error {
	if err := a.check("flush", 0, 0); err != nil {
		return err
	}
	r := newRequest(&a.ranges, nil)
	for _, s := range a.segments {
		s.flush(r)
	}
	r.finish(nil)
	return r.wait(ctx)
}

// Trim implements blockdev.Device.
func (a *Attachment) Trim(ctx context.Context, off, n int64, fua bool) error {
	if err := a.check("trim", off, n); err != nil {
		return err
	}
	from, to := alignUp(off), alignDown(off+n)
	if to <= from {
		return nil
	}
	return a.clear(ctx, coordinator.OpTrim, from, to, fua)
}

// clear trims or zeroes whole blocks.
func (a *Attachment) clear(ctx context.Context, kind coordinator.OpKind, from, to int64, fua bool) error {
	hold, err := a.ranges.acquire(ctx, from, to-from, false)
	if err != nil {
		return err
	}
	r := newRequest(&a.ranges, hold)
	err = a.each(from, to-from, maxClear, func(c piece) error {
		return c.s.write(ctx, r, kind, c.off, c.n, nil, fua)
	})
	r.finish(err)
	return r.wait(ctx)
}

// maxClear bounds one trim or zeroing, so that a replica's work for one entry
// is bounded too: 1024 chunks.
const maxClear = 64 << 20

// WriteZeroes implements blockdev.Device. Blocks that are not zeroed whole are
// written. noHole makes no difference: a chunk that is zeroed keeps no promise
// of space here.
func (a *Attachment) WriteZeroes(ctx context.Context, off, n int64, noHole, fua bool) error {
	if err := a.check("zeroing", off, n); err != nil || n == 0 {
		return err
	}
	kind := coordinator.OpTrim
	if noHole {
		kind = coordinator.OpZero
	}
	from, to := alignUp(off), alignDown(off+n)
	if to <= from { // within one block, or two
		return a.WriteAt(ctx, make([]byte, n), off, fua)
	}
	if off < from {
		if err := a.WriteAt(ctx, make([]byte, from-off), off, fua); err != nil {
			return err
		}
	}
	if to < off+n {
		if err := a.WriteAt(ctx, make([]byte, off+n-to), to, fua); err != nil {
			return err
		}
	}
	return a.clear(ctx, kind, from, to, fua)
}

// write issues one mutation of whole blocks. p is copied: it is the caller's
// again when the request returns, while the payload stays in the window.
func (s *segment) write(ctx context.Context, r *request, kind coordinator.OpKind, off, n int64, p []byte, fua bool) error {
	o := &op{request: r, entry: wire.Entry{Offset: off, Length: n}, cost: int64(len(p)) + opOverhead}
	s.mu.Lock()
	own := s.window.bytes + s.queued
	s.mu.Unlock()
	if err := s.takeMemory(ctx, o, own); err != nil {
		return err
	}
	switch kind {
	case coordinator.OpWrite:
		o.entry.Kind = wire.KindWrite
		o.buffer = wire.NewBuffer(len(p))
		o.entry.Data = o.buffer.Bytes()
		copy(o.entry.Data, p)
		o.entry.Sums = wire.BlockSums(make([]uint32, 0, len(p)/holdfast.BlockSize), o.entry.Data)
	case coordinator.OpZero:
		o.entry.Kind = wire.KindZero
	case coordinator.OpTrim:
		o.entry.Kind = wire.KindTrim
	}
	r.add()
	s.mu.Lock()
	s.lastOp++
	id := s.lastOp
	s.ops[id] = o
	s.queued += o.cost
	s.takeLocked(o, opWrite, coordinator.Write{ID: id, Kind: kind, Offset: off, Length: n, FUA: fua})
	s.unlock()
	return nil
}

// takeMemory takes what an operation costs of the node's memory, unless the
// session ends.
func (s *segment) takeMemory(ctx context.Context, o *op, own int64) error {
	if s.a.memory.try(o.cost, own) {
		return nil
	}
	o.began = now()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(s.a.ctx, cancel)
	defer stop()
	err := s.a.memory.take(ctx, o.cost, own)
	if err != nil && s.a.ctx.Err() != nil {
		return s.a.endedErr()
	}
	return err
}

// flush issues a flush.
func (s *segment) flush(r *request) {
	r.add()
	s.mu.Lock()
	s.lastOp++
	id := s.lastOp
	o := &op{request: r}
	s.ops[id] = o
	s.takeLocked(o, opFlush, coordinator.Flush{ID: id})
	s.unlock()
}

// read reads whole blocks, at most holdfast.MaxOpSize. What no member can read
// in one piece is read in parts: each may have lost another block of it.
func (s *segment) read(ctx context.Context, p []byte, off int64) error {
	err := s.readOnce(ctx, p, off)
	if len(p) <= holdfast.BlockSize || !errors.Is(err, holdfast.ErrIntegrity) {
		return err
	}
	half := alignUp(int64(len(p)) / 2)
	if err := s.read(ctx, p[:half], off); err != nil {
		return err
	}
	return s.read(ctx, p[half:], off+half)
}

func (s *segment) readOnce(ctx context.Context, p []byte, off int64) error {
	r := &readOp{wake: make(chan struct{}, 1)}
	s.mu.Lock()
	s.lastOp++
	id := s.lastOp
	o := &op{read: r}
	s.ops[id] = o
	s.takeLocked(o, opRead, coordinator.Read{ID: id, Offset: off, Length: int64(len(p))})
	s.unlock()
	for failures := 0; ; {
		s.mu.Lock()
		sample, done, err := r.sample, r.done, r.err
		r.sample = nil
		s.mu.Unlock()
		switch {
		case done:
			return err
		case sample != nil:
			err := s.sample(ctx, sample, p)
			if err != nil {
				failures++
				pauseAfter(ctx, failures)
			}
			s.mu.Lock()
			if ctx.Err() == nil {
				s.stepLocked(coordinator.Sampled{ID: id, Sample: sample.Sample, Replica: sample.Replica, Conn: sample.Conn, Err: err})
			} else {
				r.sample = sample // given up below
			}
			s.unlock()
			if ctx.Err() == nil {
				continue
			}
		}
		select {
		case <-r.wake:
		case <-ctx.Done():
			return s.giveUpRead(id, r, ctx.Err())
		}
	}
}

// samplePause is how long a read that failed again and again waits between
// two samples: the core learns of what failed through other ways, too.
const samplePause = 10 * time.Millisecond

// pauseAfter pauses from the third failure on.
func pauseAfter(ctx context.Context, failures int) {
	if failures < 3 {
		return
	}
	select {
	case <-time.After(samplePause):
	case <-ctx.Done():
	}
}

// maxRemoteReads bounds the reads that members are asked at a time, and with
// them the memory for their answers: 64 MiB at the most.
const maxRemoteReads = 64

// giveUpRead leaves a read to the core: whatever it still wants sampled is
// answered without touching the caller's memory.
func (s *segment) giveUpRead(id coordinator.OpID, r *readOp, err error) error {
	s.mu.Lock()
	defer s.unlock()
	if r.done {
		return r.err
	}
	r.returned = true
	if a := r.sample; a != nil {
		r.sample = nil
		s.stepLocked(coordinator.Sampled{ID: id, Sample: a.Sample, Replica: a.Replica, Conn: a.Conn})
	}
	return err
}

// sample takes the bytes from a member: straight from this node's disk, or by
// READ.
func (s *segment) sample(ctx context.Context, a *coordinator.SampleRead, p []byte) error {
	s.mu.Lock()
	c := s.connOf(a.Replica, a.Conn)
	s.mu.Unlock()
	if c == nil {
		return errSessionOver
	}
	if c.local != nil {
		return c.local.ReadAt(ctx, p, a.Offset)
	}
	select {
	case s.remoteReads <- struct{}{}:
		defer func() { <-s.remoteReads }()
	case <-ctx.Done():
		return ctx.Err()
	}
	m, err := s.ask(ctx, a.Replica, a.Conn, &wire.Read{Offset: a.Offset, Length: a.Length})
	if err != nil {
		return err
	}
	defer m.Release()
	d, ok := m.(*wire.Data)
	if !ok || len(d.Bytes) != len(p) {
		return holdfast.Errorf(holdfast.ErrInvalid, "replica %v answered READ with %v", a.Replica, m.Type())
	}
	if err := wire.Verify(d.Bytes, d.Sums); err != nil {
		return err
	}
	copy(p, d.Bytes)
	return nil
}
