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
	Nodes int           // that have a replica at first; 0: by the seed, 1 to 5
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
	for try := 1; ; try++ {
		end := w.now + recovery
		for w.check.failure == "" && w.now < end && !w.settled() {
			w.tend()
			w.run(w.now + 200*time.Millisecond)
		}
		if w.check.failure == "" && !w.settled() {
			rep.Stuck = w.explain()
		}
		if w.check.failure != "" || rep.Stuck != "" || w.finish(&rep) || try == tries {
			break
		}
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
		n = []int{3, 3, 2, 3, 2, 3, 3, 1, 3, 5}[w.rng.Intn(10)]
	}
	w.copies, w.focus, w.where = n, -1, map[holdfast.ReplicaID]*node{}
	// Hosts without a replica, where the writer may run, and new ones are placed.
	n += []int{0, 0, 0, 1, 1, 2}[w.rng.Intn(6)]
	w.drawRates()
	w.rates.minCopies = 1
	if cfg.Seed%3 == 2 && !cfg.Plain {
		w.drawPolicies()
	}
	w.check = newChecker(w)
	w.raft = &register{w: w, gone: map[holdfast.ReplicaID]bool{}}
	w.ctl = &controller{w: w, lastReach: make([]time.Duration, n)}
	for i := range n {
		x := &node{w: w, index: i, id: idOf[holdfast.NodeID](1, i), rate: 1, doubtedAt: -time.Hour}
		x.skew = w.between(0, time.Hour)
		drift := w.rng.Intn(4)
		if w.rates.apart {
			drift = 1 + drift%2
		}
		switch drift {
		case 0:
			x.rate += maxDrift * (2*w.rng.Float64() - 1)
		case 1:
			x.rate += maxDrift
		case 2:
			x.rate -= maxDrift
		}
		w.nodes = append(w.nodes, x)
		w.cut = append(w.cut, make([]bool, n))
		if i < w.copies {
			x.replica = w.raft.place(x, holdfast.RoleInSync).id
			x.disk = newDisk(x)
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
	return len(w.raft.members) == w.copies && len(w.raft.isr()) == w.copies && w.raft.active && w.ctl.readAll && h != nil && h.active && h.epoch == w.raft.epoch && !w.anyBad()
}

// tries is how often the end is tried: a replica that a stall which outlasted
// the faults cost its place is brought back once more.
const tries = 3

// finish detaches and compares the replicas byte by byte. It says false if not
// all of them were in sync by then.
func (w *world) finish(rep *Report) bool {
	w.ctl.finished = true
	w.ctl.detach()
	end := w.now + time.Minute
	for w.check.failure == "" && w.now < end && !w.raft.detached {
		w.run(w.now + 100*time.Millisecond)
	}
	if w.check.failure != "" {
		return true
	}
	if !w.raft.detached {
		rep.Stuck = "detach: " + w.explain()
		return true
	}
	if len(w.raft.isr()) < w.copies {
		w.ctl.finished, w.ctl.readAll = false, false
		return false
	}
	w.agree(false)
	// What was flushed survives every host's loss of power (C3).
	for _, n := range w.nodes {
		n.crash(true)
	}
	for _, n := range w.nodes {
		n.start()
	}
	w.check.atRest(w.raft)
	w.agree(true)
	return true
}

// agree compares the replicas block by block. A repair that was not durable when the
// power failed is undone: the block is lost again, there.
func (w *world) agree(powerLost bool) {
	for _, n := range w.reps {
		if m := &n.disk.mem; m.st.Tail != w.raft.end {
			w.check.fail("agreement: n%d ends at %d, but the volume was detached at %d", n.index, m.st.Tail, w.raft.end)
		}
	}
	for b := range blocks {
		var first *node
		for _, n := range w.reps {
			m := &n.disk.mem
			switch {
			case m.lost(b) && !powerLost:
				w.check.fail("agreement: block %d is lost on n%d", b, n.index)
			case m.lost(b):
			case first == nil:
				first = n
			case m.block(b) != first.disk.mem.block(b):
				w.check.fail("agreement: block %d is %d on n%d and %d on n%d", b, m.block(b), n.index, first.disk.mem.block(b), first.index)
			}
		}
		if first == nil {
			w.check.fail("agreement: every replica lost block %d with its power", b)
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
