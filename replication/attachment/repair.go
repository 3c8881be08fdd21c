package attachment

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/replication/coordinator"
	"github.com/holdfast-storage/holdfast/replication/wire"
)

// A member tells of chunks with bad blocks (DAMAGED), whoever found them: a
// read, an apply, a copy. The writer reads the chunk from the other in-sync
// members and sends it back to the one that told (REPAIR).
const (
	// repairsAtOnce bounds the repairs under way of one member.
	repairsAtOnce = 2
	// maxRepairs bounds the chunks of a segment that are being repaired or could
	// not be. What is beyond is told of again.
	maxRepairs = 1024
	// repairTries is how often a repair is tried in a row while writes to the
	// chunk come in between, repairRetry the pause between.
	repairTries = 5
	repairRetry = 200 * time.Millisecond
	// After a failure a chunk is left alone this long; twice as long each time.
	minRepairPause = 2 * time.Second
	maxRepairPause = time.Hour
)

// repairKey names a chunk of one copy.
type repairKey struct {
	replica holdfast.ReplicaID
	chunk   int64
}

// repair is a chunk with bad blocks. Everything in it is guarded by the
// segment's mu.
type repair struct {
	since  time.Duration
	active bool // waiting for its turn, or under way
	next   time.Duration
	pause  time.Duration
	err    error
}

// errLost: every in-sync replica lost these blocks; only a write helps.
var errLost = errors.New("blocks are lost on every in-sync replica")

// damaged takes what a member says of its disk. Under mu.
func (s *segment) damaged(c *conn, chunks []int64) {
	if s.activated == nil || s.ended || s.closed {
		return
	}
	limit := (s.size + holdfast.ChunkSize - 1) / holdfast.ChunkSize
	for _, chunk := range chunks {
		if chunk >= limit {
			s.logger.Warn("damage beyond the end of the segment", "replica", c.peer.id, "chunk", chunk)
			continue
		}
		key := repairKey{c.peer.id, chunk}
		r := s.repairs[key]
		if r == nil {
			if s.dropOldRepairs(); len(s.repairs) >= maxRepairs {
				return
			}
			r = &repair{since: now()}
			s.repairs[key] = r
		}
		if r.active || now() < r.next {
			continue
		}
		r.active = true
		c.peer.repairs = append(c.peer.repairs, chunk)
	}
	for c.peer.repairing < min(repairsAtOnce, len(c.peer.repairs)) {
		c.peer.repairing++
		s.running.Add(1)
		go func() {
			defer s.running.Done()
			s.repairMember(c.peer)
		}()
	}
}

// dropOldRepairs forgets failures that may be tried again, once there are many:
// what is still bad is told of again. Under mu.
func (s *segment) dropOldRepairs() {
	if len(s.repairs) < maxRepairs {
		return
	}
	at := now()
	for key, r := range s.repairs {
		if !r.active && at >= r.next {
			delete(s.repairs, key)
		}
	}
}

// repairMember repairs one chunk of a member after the other.
func (s *segment) repairMember(p *peer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(p.repairs) > 0 && s.ctx.Err() == nil {
		chunk := p.repairs[0]
		p.repairs = p.repairs[1:]
		s.mu.Unlock()
		err := s.repair(s.ctx, p, chunk)
		s.mu.Lock()
		s.repaired(repairKey{p.id, chunk}, err)
	}
	p.repairing--
}

// repaired notes how a repair went. Under mu.
func (s *segment) repaired(key repairKey, err error) {
	r := s.repairs[key]
	if err == nil {
		delete(s.repairs, key)
		return
	}
	r.active, r.err = false, err
	r.pause = min(max(2*r.pause, minRepairPause), maxRepairPause)
	r.next = now() + r.pause
	s.logger.Warn("chunk not repaired", "replica", key.replica, "chunk", key.chunk, "error", err)
}

// repair repairs one chunk of a member that is in sync.
func (s *segment) repair(ctx context.Context, p *peer, chunk int64) (err error) {
	for range repairTries {
		var done bool
		if done, err = s.repairOnce(ctx, p, chunk); done {
			return err
		}
		select {
		case <-time.After(repairRetry):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return err
}

// repairOnce tries once; not done, it may be tried again at once.
func (s *segment) repairOnce(ctx context.Context, p *peer, chunk int64) (done bool, err error) {
	s.mu.Lock()
	s.stepLocked(coordinator.Settle{})
	floor := s.core.State().Acked
	members, _ := s.core.Holders()
	s.unlock()
	i := slices.IndexFunc(members, func(h coordinator.Holder) bool { return h.Replica == p.id })
	if i < 0 {
		return true, holdfast.Errorf(holdfast.ErrUnavailable, "replica %v is not in sync now: what it lacks comes with the rest", p.id)
	}
	target := members[i]
	bad, err := s.readPieces(ctx, target, chunk, floor)
	if err != nil {
		return true, err
	}
	if bad.Missing() == 0 {
		return true, nil // written again, or good by now
	}
	good, news, err := s.mend(ctx, bad, target, bad.AsOf)
	switch {
	case errors.Is(err, coordinator.ErrNotNow):
		return false, err
	case err != nil:
		return true, err
	case !news:
		return true, errLost // called so before
	}
	content, buf := good.pack()
	m := &wire.Repair{ChunkContent: content}
	if buf != nil {
		m.Hold(buf)
	}
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	reply, err := s.ask(ctx, target.Replica, target.Conn, m)
	if err != nil {
		return true, err
	}
	defer reply.Release()
	installed, ok := reply.(*wire.Installed)
	switch {
	case !ok:
		return true, holdfast.Errorf(holdfast.ErrInvalid, "replica %v answered REPAIR with %v", p.id, reply.Type())
	case installed.Retry:
		return false, holdfast.Errorf(holdfast.ErrUnavailable, "replica %v could not take the chunk as of entry %d", p.id, content.AsOf)
	}
	s.logger.Warn("bad blocks repaired", "replica", p.id, "chunk", chunk, "lost", fmt.Sprintf("%016b", good.Missing()))
	return true, nil
}

// repairWaits says which damage waits to be repaired. Under mu.
func (s *segment) repairWaits() (waits []Wait) {
	at := now()
	chunks, lost := map[holdfast.ReplicaID]int{}, map[holdfast.ReplicaID]int{}
	since := map[holdfast.ReplicaID]time.Duration{}
	for key, r := range s.repairs {
		if errors.Is(r.err, errLost) {
			lost[key.replica]++
			continue
		}
		if chunks[key.replica]++; chunks[key.replica] == 1 || r.since < since[key.replica] {
			since[key.replica] = r.since
		}
	}
	for id, n := range chunks {
		waits = append(waits, Wait{For: fmt.Sprintf("bad blocks in %d chunks of replica %v to be repaired from another", n, id), Time: at - since[id]})
	}
	for id, n := range lost {
		waits = append(waits, Wait{For: fmt.Sprintf("a write to the lost blocks in %d chunks of replica %v: reads of them fail until then", n, id)})
	}
	return waits
}
