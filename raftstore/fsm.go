package raftstore

import (
	"fmt"
	"io"
	"runtime/debug"
	"sync"
	"sync/atomic"

	"github.com/hashicorp/raft"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

// maxSnapshot bounds a snapshot that is restored, in bytes: ten times what
// 10,000 volumes with full histories take.
const maxSnapshot = 4 << 30

// fsm applies the log to the tables. Raft calls Apply, Snapshot and Restore from
// one goroutine; everybody else reads.
type fsm struct {
	onFatal func(error)
	view    atomic.Pointer[state.View]
	// apply is state's Apply; a test puts a panic here.
	apply func(v *state.View, index uint64, cmd state.Command) (*state.View, state.Result, error)

	mu      sync.Mutex    // of the fields below
	changed chan struct{} // closed and replaced at every change of view
	dead    error         // why nothing is applied any more
}

// answer is what Apply returns for one entry.
type answer struct {
	res state.Result
	err error
}

func newFSM(onFatal func(error)) *fsm {
	f := &fsm{onFatal: onFatal, changed: make(chan struct{}), apply: (*state.View).Apply}
	f.view.Store(&state.View{})
	return f
}

// Apply applies one entry. What it cannot understand, and a panic, end the
// node: to skip an entry would make this member's tables differ from the others'.
func (f *fsm) Apply(l *raft.Log) any {
	if err := f.death(); err != nil {
		return answer{err: err}
	}
	res, err, fatal := f.applyOne(l)
	if fatal != nil {
		f.die(fatal)
		return answer{err: f.death()}
	}
	return answer{res, err}
}

func (f *fsm) applyOne(l *raft.Log) (res state.Result, err, fatal error) {
	defer func() {
		if p := recover(); p != nil {
			fatal = holdfast.Errorf(holdfast.ErrInternal, "panic while applying raft entry %d: %v\n%s", l.Index, p, debug.Stack())
		}
	}()
	cmd, err := state.DecodeCommand(l.Data)
	if err != nil {
		return res, nil, fmt.Errorf("apply raft entry %d: %w", l.Index, err)
	}
	next, res, err := f.apply(f.view.Load(), l.Index, cmd)
	f.show(next)
	return res, err, nil
}

// Snapshot takes the tables as they are; it costs nothing, as a View does not change.
func (f *fsm) Snapshot() (raft.FSMSnapshot, error) {
	if err := f.death(); err != nil {
		return nil, err
	}
	return snapshot{f.view.Load()}, nil
}

// Restore replaces the tables by a snapshot's.
func (f *fsm) Restore(r io.ReadCloser) error {
	defer r.Close()
	b, err := io.ReadAll(io.LimitReader(r, maxSnapshot+1))
	if err != nil {
		return holdfast.Errorf(holdfast.ErrIO, "read snapshot: %w", err)
	}
	if len(b) > maxSnapshot {
		return holdfast.Errorf(holdfast.ErrIntegrity, "a snapshot of more than %d bytes", maxSnapshot)
	}
	v, err := state.DecodeSnapshot(b)
	if err != nil {
		return err
	}
	if at := f.view.Load().Index(); v.Index() < at {
		return holdfast.Errorf(holdfast.ErrIntegrity, "a snapshot at index %d, behind %d", v.Index(), at)
	}
	f.show(v)
	return nil
}

// show publishes a View and wakes who waits for a change.
func (f *fsm) show(v *state.View) {
	f.view.Store(v)
	f.mu.Lock()
	close(f.changed)
	f.changed = make(chan struct{})
	f.mu.Unlock()
}

// next returns a channel that is closed at the next change.
func (f *fsm) next() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.changed
}

func (f *fsm) death() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.dead
}

func (f *fsm) die(err error) {
	f.mu.Lock()
	f.dead = err
	f.mu.Unlock()
	f.onFatal(err)
}

// snapshot is a View on its way to a snapshot file.
type snapshot struct{ view *state.View }

func (s snapshot) Persist(sink raft.SnapshotSink) error {
	b, err := state.EncodeSnapshot(s.view)
	if err == nil {
		_, err = sink.Write(b)
	}
	if err != nil {
		sink.Cancel()
		return fmt.Errorf("persist snapshot at index %d: %w", s.view.Index(), err)
	}
	return sink.Close()
}

func (snapshot) Release() {}
