package attachment

import (
	"context"
	"sync"
)

// DefaultMemory bounds the payload that a node keeps for replay.
const DefaultMemory = 128 << 20

// segmentReserve is what a segment may hold however much the others do: two
// operations of the largest size.
const segmentReserve = 2 << 20

// Memory bounds the payload that all attachments of a node keep: bytes that
// were taken from clients and may have to be sent to a member again.
type Memory struct {
	limit int64

	mu    sync.Mutex
	used  int64
	freed chan struct{} // closed and replaced when bytes come back to waiters
	waits int
}

// NewMemory returns a bound of so many bytes; zero means DefaultMemory.
func NewMemory(limit int64) *Memory {
	if limit <= 0 {
		limit = DefaultMemory
	}
	return &Memory{limit: limit, freed: make(chan struct{})}
}

// Used returns the bytes in use and the limit.
func (m *Memory) Used() (used, limit int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.used, m.limit
}

// try takes n bytes for a segment that holds own bytes already, if they are
// free. A segment below its reserve never waits: one whose writes are held
// must not keep the others from going on.
func (m *Memory) try(n, own int64) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if own+n > segmentReserve && m.used+n > m.limit {
		return false
	}
	m.used += n
	return true
}

// take waits until try succeeds.
func (m *Memory) take(ctx context.Context, n, own int64) error {
	for {
		m.mu.Lock()
		m.waits++
		freed := m.freed
		m.mu.Unlock()
		if m.try(n, own) {
			return nil
		}
		select {
		case <-freed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// give returns n bytes.
func (m *Memory) give(n int64) {
	if n == 0 {
		return
	}
	m.mu.Lock()
	m.used -= n
	if m.waits > 0 {
		m.waits = 0
		close(m.freed)
		m.freed = make(chan struct{})
	}
	m.mu.Unlock()
}
