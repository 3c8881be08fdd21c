package serve

import (
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/replication/replica"
	"github.com/holdfast-storage/holdfast/replication/wire"
)

// Space promised ahead of need: little at first, for most volumes of a disk write
// little, and twice as much each time that half of it is used up.
const (
	firstCredit = 4 << 20
	mostCredit  = 64 << 20
	// spacePause is how long a disk is left alone that had no more to give.
	spacePause = time.Second
)

// space is what the log goroutine knows of the credit it keeps up.
type space struct {
	want  int64         // bytes
	given bool          // once; the next time it is to be more
	not   time.Duration // before this
}

// credit is what the log's entries may still map, as the wire counts it.
func (s *served) credit() uint32 { return uint32(min(max(s.log.Credit(), 0), 1<<32-1)) }

// ahead keeps the credit up and tells an open writer of it. Only the log goroutine
// calls it: the tail stands still.
func (s *served) ahead() {
	if s.space.want == 0 {
		s.space.want = firstCredit
	}
	before := s.log.Credit()
	if before*holdfast.ChunkSize > s.space.want/2 {
		return
	}
	at := now()
	if at < s.space.not {
		return
	}
	if s.space.given {
		s.space.want = min(2*s.space.want, mostCredit)
	}
	s.space.given = true
	if err := s.log.Ahead(s.space.want); err != nil {
		return // the disk's failure, which it tells by itself
	}
	after := s.log.Credit()
	if after*holdfast.ChunkSize <= s.space.want/2 {
		s.space.not = at + spacePause
	}
	if after <= before {
		return
	}
	s.mu.Lock()
	if !s.broken {
		if conn, epoch, ok := s.core.Writer(); ok {
			s.send(conn, epoch, 0, &wire.Ack{Tail: s.core.Status().Tail, Credit: s.credit()})
		}
	}
	s.unlock()
}

// left notes that a writer left in order: the space it was promised is free again,
// unless another one opened meanwhile.
func (s *served) left(conn replica.Conn) {
	if s.broken {
		return
	}
	if writer, _, ok := s.core.Writer(); !ok || writer == conn {
		s.giveBack = true
	}
}

// release gives the credit back. On the log goroutine.
func (s *served) release() {
	_, _ = s.log.Reserve(0) // an error is the disk's, which tells it by itself
	s.space = space{}
}

// afford answers AFFORD.
func (s *served) afford(m *wire.Afford) (wire.Message, error) {
	a, err := s.log.Afford(m.Offset, m.Length, int64(m.Pending))
	if err != nil {
		return nil, err
	}
	return &wire.Afforded{Need: uint32(a.Need), Credit: uint32(min(a.Credit, 1<<32-1)), Tail: a.Tail}, nil
}
