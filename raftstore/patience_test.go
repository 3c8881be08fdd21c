package raftstore

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

// hang has every write of a member's log wait until release is called.
func (m *member) hang() (release func()) {
	free := make(chan struct{})
	m.timed.mu.Lock()
	m.timed.hold = func() { <-free }
	m.timed.mu.Unlock()
	return func() { close(free) }
}

// unavailable proposes something that must be answered, and not with a result.
func (m *member) unavailable(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var not *NotLeader
	_, err := m.Propose(ctx, &state.DeleteVolume{Volume: holdfast.NewID[holdfast.VolumeID]()})
	if !errors.Is(err, holdfast.ErrUnavailable) || !errors.As(err, &not) || ctx.Err() != nil {
		t.Fatalf("propose at a member whose log is stuck: got %v, want %s and another leader to ask", err, holdfast.ErrUnavailable)
	}
}

// TestAHungDiskDoesNotLead: the leader's log hangs in a write; the others choose
// another leader, and what was asked of the old one is answered.
func TestAHungDiskDoesNotLead(t *testing.T) {
	ms := three(t)
	old := ms[0]
	release := old.hang()
	t.Cleanup(func() {
		select {
		case <-old.ctx.Done():
		default:
			release()
		}
	})
	old.unavailable(t)
	if old.IsLeader() {
		t.Error("a member whose log is stuck says that it leads")
	}
	if id, ok := old.Leader(); ok && id == old.Node() {
		t.Error("a member whose log is stuck names itself as the leader")
	}
	if _, err := old.ReadIndex(within(t)); !errors.Is(err, holdfast.ErrUnavailable) {
		t.Errorf("read index at a member whose log is stuck: got %v", err)
	}
	var led *member
	for deadline := within(t); led == nil; {
		for _, m := range ms[1:] {
			if m.IsLeader() {
				led = m
			}
		}
		if led == nil {
			select {
			case <-time.After(10 * time.Millisecond):
			case <-deadline.Done():
				t.Fatal("nobody took the lead")
			}
		}
	}
	id := holdfast.NewID[holdfast.NodeID]()
	propose(t, led.Store, &state.NodeJoin{Node: state.Node{ID: id, Name: "later", Instance: holdfast.NewID[holdfast.InstanceID](), Version: "test",
		MaxLevel: holdfast.Level1, Addresses: state.Addresses{API: "127.0.0.1:1", Data: "127.0.0.1:2", Raft: "127.0.0.1:3"}}})
	release()
	release = func() {}
	eventually(t, old.Store, "what was decided meanwhile", func(v *state.View) bool { _, ok := v.Node(id); return ok })
	if old.IsLeader() {
		t.Error("the old leader leads again beside another")
	}
}

// TestAHungDiskAlone: with nobody else to lead, the member leads again when its
// disk does, and until then answers that it cannot.
func TestAHungDiskAlone(t *testing.T) {
	m := bootstrap(t)
	release := m.hang()
	m.unavailable(t)
	if m.IsLeader() {
		t.Error("a member whose log is stuck says that it leads")
	}
	release()
	for deadline := within(t); !m.IsLeader(); {
		moved := m.LeaderChanged()
		if m.IsLeader() {
			break
		}
		select {
		case <-moved:
		case <-deadline.Done():
			t.Fatal("it does not lead again")
		}
	}
	propose(t, m.Store, &state.NodeUpdate{Node: func() state.Node {
		n := m.node()
		have, _ := m.View().Node(m.Node())
		n.Revision = have.Revision
		return n
	}()})
}

// TestAFullFileSystemDoesNotLead: while its log must be spared another member leads,
// what that one says it still takes, and afterwards it may lead again.
func TestAFullFileSystemDoesNotLead(t *testing.T) {
	ms := three(t)
	old := ms[0]
	old.Spare(holdfast.Errorf(holdfast.ErrNoSpace, "8 MiB free"))
	led := eventuallyLeads(t, ms[1:])
	var not *NotLeader
	_, err := old.Propose(within(t), &state.DeleteVolume{Volume: holdfast.NewID[holdfast.VolumeID]()})
	if !errors.As(err, &not) {
		t.Fatalf("propose at a member whose file system is full: %v", err)
	}
	if old.IsLeader() {
		t.Fatal("a member whose file system is full says that it leads")
	}
	if _, err := led.Propose(within(t), &state.DeleteVolume{Volume: holdfast.NewID[holdfast.VolumeID]()}); holdfast.KindOf(err) == holdfast.ErrUnavailable {
		t.Fatalf("propose at the other: %v", err)
	}
	index := led.View().Index()
	eventually(t, old.Store, "the full one follows", func(v *state.View) bool { return v.Index() >= index })
	old.Spare(nil)
	for ctx := within(t); ; {
		moved := old.LeaderChanged()
		if !old.isStuckNow() {
			break
		}
		select {
		case <-moved:
		case <-ctx.Done():
			t.Fatal("its log is spared for ever")
		}
	}
}

// TestAFullFileSystemAlone: with nobody else to lead, changes are refused, and say why.
func TestAFullFileSystemAlone(t *testing.T) {
	m := bootstrap(t)
	m.Spare(holdfast.Errorf(holdfast.ErrNoSpace, "8 MiB free"))
	for ctx := within(t); !m.isStuckNow() && ctx.Err() == nil; {
		<-m.LeaderChanged()
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	_, err := m.Propose(ctx, &state.DeleteVolume{Volume: holdfast.NewID[holdfast.VolumeID]()})
	if !errors.Is(err, holdfast.ErrNoSpace) || !strings.Contains(err.Error(), "8 MiB free") {
		t.Fatalf("propose: got %v, want %v and why", err, holdfast.ErrNoSpace)
	}
	if _, err := m.ReadIndex(ctx); !errors.Is(err, holdfast.ErrNoSpace) {
		t.Fatalf("read index: got %v, want %v", err, holdfast.ErrNoSpace)
	}
	// What was under way may have been done.
	if err := m.stuckError(); !errors.Is(err, holdfast.ErrUnavailable) || !strings.Contains(err.Error(), "8 MiB free") {
		t.Fatalf("it does not say why: %v", err)
	}
	m.Spare(nil)
	if err := m.Refuses(); err != nil {
		t.Fatalf("with space: %v", err)
	}
	eventuallyLeads(t, []*member{m})
}
