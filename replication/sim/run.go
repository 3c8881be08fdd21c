package sim

import (
	"fmt"
	"math/rand"
	"strings"
	"time"

	"github.com/holdfast-storage/holdfast"
)

// Config is one run.
type Config struct {
	Seed  int64
	Nodes int           // 0: by the seed, 1 to 3
	Chaos time.Duration // simulated time with faults; 0 is 40 s
	Plain bool          // the volume demands nothing: no min_copies, no failing of held requests, no eviction for slowness
	Trace func(string)  // a line per event of note; may be nil
	Cover func(string)  // told each event, action and change of state; may be nil
}

// Report is what became of a run.
type Report struct {
	Seed      int64
	Failure   string // "" if every promise was kept
	Stuck     string // "" if the cluster found back to full strength; else what everybody waits for
	Steps     int
	Completed int // requests answered without error
	Reads     int
	Epochs    int // activated
	Lossy     int // of them
	Nodes     int
	Simulated time.Duration
}

// maxDrift is how fast or slow a clock may run. The margin of a promise allows
// 11 % between two clocks.
const maxDrift = 0.05

// recovery is how long a healed cluster may take until every copy is in sync
// again. The longest wait of the protocol is T_wait, 30 s.
const recovery = 4 * time.Minute

// Run simulates one seed.
func Run(cfg Config) Report {
	if cfg.Chaos == 0 {
		cfg.Chaos = 40 * time.Second
	}
	w := newWorld(cfg)
	w.begin()
	w.faults()
	w.sweep()
	w.run(cfg.Chaos)

	w.heal()
	rep := Report{Seed: cfg.Seed, Nodes: len(w.nodes)}
	for w.check.failure == "" && w.now < cfg.Chaos+recovery && !w.settled() {
		w.run(w.now + 200*time.Millisecond)
	}
	if w.check.failure == "" && !w.settled() {
		rep.Stuck = w.explain()
	}
	if w.check.failure == "" && rep.Stuck == "" {
		w.finish(&rep)
	}
	rep.Failure = w.check.failure
	rep.Steps, rep.Completed, rep.Reads = w.steps, w.check.completed, w.check.readsSeen
	rep.Epochs, rep.Lossy, rep.Simulated = w.check.epochs, w.check.lossy, w.now
	return rep
}

// newWorld makes the hosts of a world, drawn from its seed; nothing runs yet.
func newWorld(cfg Config) *world {
	w := &world{cfg: cfg, rng: rand.New(rand.NewSource(cfg.Seed))}
	n := cfg.Nodes
	if n == 0 {
		n = []int{3, 3, 2, 3, 2, 3, 3, 1}[w.rng.Intn(8)]
	}
	copies := n
	if w.chance(0.3) {
		n++ // a host without a replica, where the writer may run
	}
	w.drawRates()
	w.rates.minCopies = 1
	if cfg.Seed%3 == 2 && !cfg.Plain {
		w.drawPolicies()
	}
	w.check = newChecker(w)
	w.raft = &register{w: w}
	w.ctl = &controller{w: w, lastReach: make([]time.Duration, n)}
	for i := range n {
		x := &node{w: w, index: i, id: idOf[holdfast.NodeID](1, i), rate: 1, doubtedAt: -time.Hour}
		x.skew = w.between(0, time.Hour)
		switch w.rng.Intn(4) {
		case 0:
			x.rate += maxDrift * (2*w.rng.Float64() - 1)
		case 1:
			x.rate += maxDrift
		case 2:
			x.rate -= maxDrift
		}
		w.nodes = append(w.nodes, x)
		w.cut = append(w.cut, make([]bool, n))
		if i < copies {
			x.replica = idOf[holdfast.ReplicaID](2, i)
			x.disk = newDisk(x)
			w.reps = append(w.reps, x)
			w.raft.isr = append(w.raft.isr, x.replica)
		}
	}
	return w
}

// begin starts every host and whoever attaches the volume.
func (w *world) begin() {
	for _, x := range w.nodes {
		x.start()
	}
	w.ctl.watch()
}

// idOf makes the ids of a run the same every time.
func idOf[T ~[16]byte](kind, i int) T {
	var id T
	id[0], id[15] = byte(kind), byte(i)
	return id
}

// sweep forgets connections that are over.
func (w *world) sweep() {
	kept := w.links[:0]
	for _, l := range w.links {
		if !l.dead() {
			kept = append(kept, l)
		}
	}
	clear(w.links[len(kept):])
	w.links = kept
	w.after(time.Second, w.sweep)
}

// settled says whether every replica is in sync and every block was read.
func (w *world) settled() bool {
	h := w.ctl.holder
	return len(w.raft.isr) == len(w.reps) && w.raft.active && w.ctl.readAll && h != nil && h.active && h.epoch == w.raft.epoch
}

// finish detaches and compares the replicas byte by byte.
func (w *world) finish(rep *Report) {
	w.ctl.finished = true
	w.ctl.detach()
	end := w.now + time.Minute
	for w.check.failure == "" && w.now < end && !w.raft.detached {
		w.run(w.now + 100*time.Millisecond)
	}
	if w.check.failure != "" {
		return
	}
	if !w.raft.detached {
		rep.Stuck = "detach: " + w.explain()
		return
	}
	// What was flushed survives every host's loss of power (C3).
	for _, n := range w.nodes {
		n.crash(true)
	}
	for _, n := range w.nodes {
		n.start()
	}
	first := &w.nodeOf(w.raft.isr[0]).disk.mem
	for _, n := range w.reps {
		if !w.raft.inISR(n.replica) {
			continue // a stall that outlasted the faults cost it its place
		}
		m := &n.disk.mem
		if m.st.Tail != w.raft.end {
			w.check.fail("agreement: n%d ends at %d, but the volume was detached at %d", n.index, m.st.Tail, w.raft.end)
		}
		for b := range blocks {
			if m.block(b) != first.block(b) {
				w.check.fail("agreement: block %d is %d on n%d and %d on n%d", b, m.block(b), n.index, first.block(b), w.indexOf(w.raft.isr[0]))
			}
		}
	}
}

// explain asks every core what it waits for.
func (w *world) explain() string {
	var b strings.Builder
	fmt.Fprintf(&b, "at %v: in sync %v, epoch %d active %v\n", w.now, w.raft.indexes(), w.raft.epoch, w.raft.active)
	for _, n := range w.nodes {
		if !n.up {
			fmt.Fprintf(&b, "  n%d is down\n", n.index)
			continue
		}
		if n.host != nil {
			fmt.Fprintf(&b, "  n%d %+v\n", n.index, n.host.core.Status())
			for _, x := range n.host.core.Explain() {
				fmt.Fprintf(&b, "  n%d waits since %v for %s\n", n.index, x.Since, x.For)
			}
		}
		for _, wr := range n.writers {
			if wr.ended {
				continue
			}
			s := wr.core.State()
			fmt.Fprintf(&b, "  n%d e%d %+v\n", n.index, wr.epoch, s)
			for _, x := range wr.core.Explain() {
				fmt.Fprintf(&b, "  n%d e%d waits since %v for %s\n", n.index, wr.epoch, x.Since, x.For)
			}
		}
	}
	return b.String()
}
