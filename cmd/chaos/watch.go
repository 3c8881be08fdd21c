package main

import (
	"context"
	"sync"
	"time"

	"github.com/holdfast-storage/holdfast/cmd/internal/api/apipb"
	"github.com/holdfast-storage/holdfast/cmd/internal/history"
)

// lookEvery is how often each node is asked for the volume.
const lookEvery = 250 * time.Millisecond

// watch polls all nodes: it starts clients on new attachments, and counts what
// became of the replicas.
type watch struct {
	nodes []*node
	load  *load
	say   func(string, ...any)

	starting sync.Mutex // orders the starts of clients

	mu        sync.Mutex
	newest    *apipb.Volume // the latest look at the highest epoch
	at        time.Time
	evictions int // replicas that were in-sync and are no longer
	rejoins   int // and the other way
	// since is a time before which the next attachment had not begun.
	since history.Time
	// dark: all nodes lost power since the latest session began.
	dark bool
}

// run polls until ctx ends.
func (w *watch) run(ctx context.Context) {
	var all sync.WaitGroup
	for _, n := range w.nodes {
		all.Go(func() {
			tick := time.NewTicker(lookEvery)
			defer tick.Stop()
			for {
				select {
				case <-tick.C:
					w.look(ctx, n)
				case <-ctx.Done():
					return
				}
			}
		})
	}
	all.Wait()
}

func (w *watch) look(ctx context.Context, n *node) {
	v, err := n.inspect(ctx)
	if err != nil {
		return // it is down, or stopped, or has no quorum to ask
	}
	if !n.holds(v) {
		return // only the holder knows how its replicas are
	}
	w.note(v)
	if !w.load.wants(v.Epoch) {
		return
	}
	w.starting.Lock()
	defer w.starting.Unlock()
	w.mu.Lock()
	since, dark, before := w.since, w.dark, w.load.latest()
	w.mu.Unlock()
	err = w.load.begin(history.Session{Epoch: v.Epoch, Node: n.name, Begin: since, PowerLost: dark}, n, v.Uri, func() bool {
		again, err := n.inspect(ctx)
		return err == nil && again.Epoch == v.Epoch && n.holds(again)
	})
	if err != nil {
		w.say("no clients yet: %v", err)
		return
	}
	if w.load.latest() != before {
		w.mu.Lock()
		w.since, w.dark = w.load.rec.clock.now(), false
		w.mu.Unlock()
	}
}

// allLostPower notes that every node is about to lose power: the next attachment
// may be lossy.
func (w *watch) allLostPower() {
	w.starting.Lock() // an attachment that is being connected to is of before
	defer w.starting.Unlock()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.dark = true
}

// note takes a look at the volume and counts what changed since the last.
func (w *watch) note(v *apipb.Volume) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.newest != nil {
		if v.Epoch < w.newest.Epoch {
			return
		}
		before := map[string]string{}
		for _, r := range w.newest.Replicas {
			before[r.Node] = r.State
		}
		for _, r := range v.Replicas {
			const inSync = "in-sync"
			switch was := before[r.Node]; {
			case was == inSync && r.State != inSync:
				w.evictions++
			case was != "" && was != inSync && r.State == inSync:
				w.rejoins++
			}
		}
	}
	w.newest, w.at = v, time.Now()
}

// view returns the last look at the volume, nil if there was none within a
// second, and the counts of evictions and rejoins.
func (w *watch) view() (v *apipb.Volume, evictions, rejoins int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if time.Since(w.at) < time.Second {
		v = w.newest
	}
	return v, w.evictions, w.rejoins
}
