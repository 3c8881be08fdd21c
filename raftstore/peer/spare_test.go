package peer

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

// await polls for what another goroutine does.
func await(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for ctx := within(t); !cond(); {
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// TestTheOnlyVoterSaysWhyItRefuses: it has no space to decide anything, and nobody
// else can. Who asks, there or from another node, is told so instead of waiting.
func TestTheOnlyVoterSaysWhyItRefuses(t *testing.T) {
	hosts := cluster(t, 2)
	voter, other := hosts[0], hosts[1]
	voter.store.Spare(holdfast.Errorf(holdfast.ErrNoSpace, "8 MiB free").WithRemedy("make room there"))
	await(t, "the log to be spared", func() bool { return voter.store.Refuses() != nil })
	await(t, "the other node to hear of no leader", func() bool { _, ok := other.store.Leader(); return !ok })
	told := func(from *host, err error) {
		t.Helper()
		if !errors.Is(err, holdfast.ErrNoSpace) || !strings.Contains(err.Error(), "node n1 takes no changes of the metadata: 8 MiB free") || holdfast.RemedyOf(err) != "make room there" {
			t.Errorf("through %s: got %v (%v), want why", from.name, err, holdfast.KindOf(err))
		}
	}
	for _, h := range hosts {
		ctx := within(t)
		_, err := h.Propose(ctx, &state.DeleteVolume{Volume: holdfast.NewID[holdfast.VolumeID]()})
		told(h, err)
		_, err = h.Read(ctx)
		told(h, err)
	}
	// A node that starts meanwhile waits for the space.
	announced := make(chan error, 1)
	go func() { announced <- other.Announce(within(t), other.Self()) }()
	select {
	case err := <-announced:
		t.Errorf("announced without space: %v", err)
	case <-time.After(300 * time.Millisecond): // for longer than one question takes
	}
	voter.store.Spare(nil)
	if err := <-announced; err != nil {
		t.Errorf("announced with space: %v", err)
	}
	for _, h := range hosts {
		h.disk(t)
	}
}

// TestOneOfThreeWithoutSpace: another voter decides, and the one without space passes
// on what it is asked.
func TestOneOfThreeWithoutSpace(t *testing.T) {
	hosts := cluster(t, 3)
	low := leader(t, hosts)
	low.store.Spare(holdfast.Errorf(holdfast.ErrNoSpace, "8 MiB free"))
	await(t, "another leader", func() bool {
		for _, h := range others(hosts, low) {
			if h.store.IsLeader() {
				return true
			}
		}
		return false
	})
	if err := low.store.Refuses(); err != nil {
		t.Errorf("it refuses, although others decide: %v", err)
	}
	low.disk(t)
}
