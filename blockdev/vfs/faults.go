package vfs

import (
	iofs "io/fs"
	"strings"
)

// Op is an operation that a Fault can hit.
type Op int

// The operations.
const (
	OpOpen Op = iota
	OpRead
	OpWrite
	OpSync
	OpSyncDir
	OpAllocate
	OpPunch
)

// String returns the operation's name.
func (op Op) String() string {
	return [...]string{"open", "read", "write", "sync", "syncdir", "allocate", "punch"}[op]
}

// Fault makes operations of a Memory fail.
type Fault struct {
	Op   Op
	Path string // a part of the path; "" hits all
	// After lets this many matching operations pass first.
	After int
	// Times is how many fail then; 0 for all.
	Times int
	Err   error // syscall.EIO, syscall.ENOSPC, ...

	seen int
}

// Inject arms a fault.
func (m *Memory) Inject(f Fault) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.faults = append(m.faults, &f)
}

// ClearFaults disarms all faults.
func (m *Memory) ClearFaults() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.faults = nil
}

// Before sets a function that is called before each write and sync, without
// any lock held, so that it may call Crash. Set it before the files are used.
func (m *Memory) Before(fn func(op Op, path string)) {
	m.before = fn
}

// BeforeDirectRead sets a function that is called before each direct read, without
// any lock held. Set it before the files are used.
func (m *Memory) BeforeDirectRead(fn func(path string)) {
	m.beforeRead = fn
}

// fault returns the error that an armed fault gives, if any. Under mu.
func (m *Memory) fault(op Op, path string) error {
	for _, f := range m.faults {
		if f.Op != op || !strings.Contains(path, f.Path) {
			continue
		}
		f.seen++
		if f.seen > f.After && (f.Times == 0 || f.seen <= f.After+f.Times) {
			return &iofs.PathError{Op: op.String(), Path: path, Err: f.Err}
		}
	}
	return nil
}
