package peer

import (
	"slices"
	"sync"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

const (
	// HeartbeatEvery is the pace of heartbeats: ten may be lost before a node is gone.
	HeartbeatEvery = 500 * time.Millisecond
	// GoneAfter is the silence after which a node is gone.
	GoneAfter = 5 * time.Second
	// lookEvery is the pace at which the record looks for nodes that went silent.
	lookEvery = 100 * time.Millisecond
	// maxStall: when two looks are further apart, this process did not run in
	// between and heard nobody; all silences begin anew.
	maxStall = time.Second
	// keptInstances bounds the superseded instances remembered per node, whose
	// late heartbeats are ignored.
	keptInstances = 8
	// maxHeard bounds the nodes in the record: more than any cluster has.
	maxHeard = 4096
)

// Alive is what the record knows of one node.
type Alive struct {
	Node     holdfast.NodeID
	Instance holdfast.InstanceID // of the newest process heard of; zero if none was
	Silence  time.Duration       // since the last heartbeat, or since the record began
	Applied  uint64              // metadata index the node told last
	Gone     bool
}

// record is one node's own record of heartbeats. It is used by voters, leader or
// not, so that a new leader knows at once who has been silent for how long.
type record struct {
	now      Clock
	mu       sync.Mutex    // of the fields below
	began    time.Duration // when it began to listen without a break
	complete bool          // it has listened for GoneAfter
	looked   time.Duration
	heard    map[holdfast.NodeID]*heard
	changed  chan struct{} // closed and replaced when a node goes, comes back or is new
}

type heard struct {
	at       time.Duration
	instance holdfast.InstanceID
	old      []holdfast.InstanceID
	applied  uint64
	gone     bool // as last announced through changed
}

func newRecord(now Clock) *record {
	t := now()
	return &record{now: now, began: t, looked: t, heard: map[holdfast.NodeID]*heard{}, changed: make(chan struct{})}
}

// arrive notes a heartbeat.
func (r *record) arrive(node holdfast.NodeID, instance holdfast.InstanceID, applied uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.catchUp()
	h := r.heard[node]
	if h == nil {
		if len(r.heard) >= maxHeard {
			return
		}
		h = &heard{instance: instance}
		r.heard[node] = h
		r.announce()
	}
	if slices.Contains(h.old, instance) {
		return // a late one of a process that is over
	}
	if h.instance != instance {
		if !h.instance.IsZero() {
			h.old = append(h.old, h.instance)
		}
		if len(h.old) > keptInstances {
			h.old = h.old[1:]
		}
		h.instance = instance
		r.announce()
	}
	h.at, h.applied = r.now(), applied
	if h.gone {
		h.gone = false
		r.announce()
	}
}

// expect notes a node that stands in the tables: the silence of one that was
// never heard of begins here, since it cannot have sent to this node before it
// was a node.
func (r *record) expect(node holdfast.NodeID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.heard[node] == nil && len(r.heard) < maxHeard {
		r.heard[node] = &heard{at: r.now()}
	}
}

// listenAnew restarts all silences: this node has just become one that
// heartbeats are sent to.
func (r *record) listenAnew() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.began, r.looked, r.complete = r.now(), r.now(), false
}

// look announces the nodes that went silent. It must be called every lookEvery.
func (r *record) look() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.catchUp()
	r.looked = r.now()
	went := false
	for _, h := range r.heard {
		if !h.gone && r.silence(h) >= GoneAfter {
			h.gone, went = true, true
		}
	}
	// The nodes never heard of go when the record is old enough.
	if !r.complete && r.looked-r.began >= GoneAfter {
		r.complete, went = true, true
	}
	if went {
		r.announce()
	}
}

// catchUp restarts all silences if this process did not run for a while.
func (r *record) catchUp() {
	if now := r.now(); now-r.looked > maxStall {
		r.began, r.looked, r.complete = now, now, false
	}
}

func (r *record) silence(h *heard) time.Duration {
	since := r.began
	if h != nil {
		since = max(since, h.at)
	}
	return r.now() - since
}

// gone reports whether a holder is gone: its node is silent, or runs another process.
func (r *record) gone(holder state.Holder) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.catchUp()
	h := r.heard[holder.Node]
	if r.silence(h) >= GoneAfter {
		return true
	}
	// A process that is older than what this record has heard of.
	return h != nil && h.instance != holder.Instance && slices.Contains(h.old, holder.Instance)
}

// of returns what is known of a node.
func (r *record) of(node holdfast.NodeID) Alive {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.catchUp()
	h := r.heard[node]
	a := Alive{Node: node, Silence: r.silence(h)}
	a.Gone = a.Silence >= GoneAfter
	if h != nil {
		a.Instance, a.Applied = h.instance, h.applied
	}
	return a
}

// silent returns the nodes that are gone by this record, at most maxHeard.
func (r *record) silent() []holdfast.NodeID {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.catchUp()
	var gone []holdfast.NodeID
	for node, h := range r.heard {
		if r.silence(h) >= GoneAfter {
			gone = append(gone, node)
		}
	}
	return gone
}

// next returns a channel that is closed when somebody goes, comes back or is new.
func (r *record) next() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.changed
}

// wake wakes who waits for a change of liveness.
func (r *record) wake() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.announce()
}

// announce wakes who waits. r.mu is held.
func (r *record) announce() {
	close(r.changed)
	r.changed = make(chan struct{})
}
