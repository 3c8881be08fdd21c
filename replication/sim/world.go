package sim

import (
	"container/heap"
	"fmt"
	"math/rand"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/replication/replica"
)

// world is one simulated cluster. Everything in it happens in one goroutine,
// in the order of (time, number).
type world struct {
	cfg    Config
	rng    *rand.Rand
	now    time.Duration
	events eventHeap
	number uint64
	steps  int

	nodes []*node                      // every host
	reps  []*node                      // those with a replica that counts: none that is an orphan, or to be deleted
	where map[holdfast.ReplicaID]*node // of every replica that ever was
	ids   int                          // replicas ever made
	raft  *register
	check *checker
	ctl   *controller
	links []*link

	copies   int // replicas the volume is to have
	relaying bool
	focus    int // the chunk that most writes go to; -1: none

	cut     [][]bool // cut[a][b]: nothing travels from a to b
	rates   rates
	healing bool // the faults are over
	stop    bool
}

type event struct {
	at     time.Duration
	number uint64
	do     func()
}

type eventHeap []event

func (h eventHeap) Len() int { return len(h) }
func (h eventHeap) Less(i, j int) bool {
	return h[i].at < h[j].at || h[i].at == h[j].at && h[i].number < h[j].number
}
func (h eventHeap) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h *eventHeap) Push(x any)   { *h = append(*h, x.(event)) }
func (h *eventHeap) Pop() any {
	old := *h
	e := old[len(old)-1]
	old[len(old)-1] = event{}
	*h = old[:len(old)-1]
	return e
}

func (w *world) at(when time.Duration, do func()) {
	w.number++
	heap.Push(&w.events, event{at: max(when, w.now), number: w.number, do: do})
}

func (w *world) after(d time.Duration, do func()) { w.at(w.now+d, do) }

// run executes events until the time, or until a check failed.
func (w *world) run(until time.Duration) {
	for len(w.events) > 0 && w.events[0].at <= until && w.check.failure == "" && !w.stop {
		e := heap.Pop(&w.events).(event)
		w.now = e.at
		w.steps++
		e.do()
	}
	w.now = max(w.now, until)
}

// between returns a random duration in [lo, hi).
func (w *world) between(lo, hi time.Duration) time.Duration {
	return lo + time.Duration(w.rng.Int63n(int64(hi-lo)))
}

// chance is true with probability p.
func (w *world) chance(p float64) bool { return w.rng.Float64() < p }

// cover counts what the cores came through.
func (w *world) cover(format string, args ...any) {
	if w.cfg.Cover != nil {
		w.cfg.Cover(fmt.Sprintf(format, args...))
	}
}

func (w *world) log(format string, args ...any) {
	if w.cfg.Trace == nil {
		return
	}
	w.cfg.Trace(fmt.Sprintf("%12v %s", w.now, fmt.Sprintf(format, args...)))
}

// node is one host: its process, its disk, its writers.
type node struct {
	w       *world
	index   int
	id      holdfast.NodeID
	replica holdfast.ReplicaID

	up     bool
	life   int // counts processes
	boot   int // counts boots
	downAt time.Duration

	// Its CLOCK_BOOTTIME: skew + rate*world time, and what it jumped ahead.
	rate float64
	skew time.Duration

	pausedUntil time.Duration
	doubtedAt   time.Duration // last stall or jump
	inbox       []func()      // what arrived while paused

	disk *disk // nil on a host without a replica
	host *host

	rots         int           // counts blocks that rotted
	slowUntil    time.Duration // its disk is slow
	slowedAt     time.Duration
	relay        *relay        // waits for this replica to be copied to
	ambush       bool          // the writer's host fails when this replica is open again
	ambushIntact bool          // ... when it is declared intact
	raftCutUntil time.Duration // this host does not reach raft
	writers      []*writer
}

// clock is what the node's clock shows.
func (n *node) clock() time.Duration {
	return n.skew + time.Duration(n.rate*float64(n.w.now))
}

// jump puts the clock ahead. The claim is limited: one jump, of more than half
// a promise, within ten seconds in which the process ran all along.
func (n *node) jump(d time.Duration) {
	if n.w.now < n.pausedUntil || n.w.now-n.doubtedAt < 10*time.Second {
		return
	}
	n.w.cover("fault jump")
	n.w.log("the clock of n%d jumps ahead by %v", n.index, d)
	n.skew += d
	n.doubtedAt = n.w.now
}

// run has do executed by this process life of the node: not at all if it died,
// later if it stands still.
func (n *node) run(life int, do func()) {
	if !n.up || n.life != life {
		return
	}
	if n.w.now < n.pausedUntil || len(n.inbox) > 0 {
		n.inbox = append(n.inbox, do)
		return
	}
	do()
}

// after has do executed by this process life of the node, later.
func (n *node) after(d time.Duration, do func()) {
	life := n.life
	n.w.after(d, func() { n.run(life, do) })
}

func (n *node) pause(d time.Duration) {
	if !n.up || n.w.now < n.pausedUntil {
		return
	}
	if d > replica.DefaultPromiseLength/2 {
		n.w.cover("fault stall")
	}
	n.w.log("n%d stands still for %v", n.index, d)
	n.pausedUntil = n.w.now + d
	n.doubtedAt = n.pausedUntil
	life := n.life
	n.w.at(n.pausedUntil, func() {
		if n.life != life || !n.up {
			return
		}
		for len(n.inbox) > 0 && n.up && n.life == life {
			do := n.inbox[0]
			n.inbox = n.inbox[1:]
			do()
		}
	})
}

// crash ends the process; with power, the page cache too.
func (n *node) crash(power bool) {
	if !n.up {
		if power {
			n.losePower()
		}
		return
	}
	n.w.log("n%d %s", n.index, map[bool]string{false: "process dies", true: "loses power"}[power])
	n.up, n.downAt = false, n.w.now
	n.inbox, n.pausedUntil = nil, 0
	for _, wr := range n.writers {
		wr.die()
	}
	n.writers, n.host = nil, nil
	if power {
		n.losePower()
	}
	for _, l := range n.w.links {
		l.nodeDied(n, power)
	}
	n.w.ctl.livenessChanged()
}

func (n *node) losePower() {
	n.boot++
	if n.disk != nil {
		n.disk.powerLoss()
	}
}

func (n *node) start() {
	if n.up {
		return
	}
	n.w.log("n%d starts (boot %d)", n.index, n.boot)
	n.up = true
	n.life++
	if n.disk != nil {
		n.disk.open()
		n.host = newHost(n)
	}
	n.tick()
	n.w.ctl.livenessChanged()
}

// serve makes the host's new, empty replica and serves it.
func (n *node) serve(id holdfast.ReplicaID) {
	n.replica = id
	n.disk = newDisk(n)
	n.disk.ckpt.intactBoot, n.disk.ckpt.st.Intact = -1, false
	n.disk.mem = n.disk.ckpt.clone()
	if n.up {
		n.host = newHost(n)
	}
}

// drop deletes the host's replica, with all that is on it.
func (n *node) drop() {
	n.replica, n.disk, n.host, n.relay = holdfast.ReplicaID{}, nil, nil, nil
	n.ambush, n.ambushIntact = false, false
	for _, l := range n.w.links {
		if l.host == n && l.rOpen {
			l.sendToWriter(fin{})
			l.rOpen = false
		}
	}
}

// slow has the host's disk take long over everything for a while.
func (n *node) slow(d time.Duration) {
	n.w.cover("fault slow-disk")
	n.w.log("the disk of n%d is slow for %v", n.index, d)
	n.slowedAt, n.slowUntil = n.w.now, n.w.now+d
}

// tick drives the timers of everything in the process.
func (n *node) tick() {
	if n.host != nil {
		n.host.tick()
	}
	for _, wr := range n.writers {
		wr.tick()
	}
	n.after(n.w.between(90*time.Millisecond, 110*time.Millisecond), n.tick)
}
