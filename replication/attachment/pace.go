package attachment

import "time"

const mib = 1 << 20

// How fast members are brought back (protocol section 8). The rate is that of
// each resync, in bytes a second.
const (
	// resyncFloor is what a resync always gets, or a busy volume would never have
	// all its copies again.
	resyncFloor = 10 * mib
	// resyncStart is where one begins beside a busy foreground.
	resyncStart = 4 * resyncFloor
	// resyncStep is added after each window in which the foreground did not
	// suffer; resyncCut multiplies after one in which it did (AIMD; as gentle as
	// CUBIC's, since a p99 is noisy).
	resyncStep = resyncFloor
	resyncCut  = 0.7
	// resyncMost ends the growth of a rate that limits nothing.
	resyncMost = 4096 * mib
)

// The foreground suffers when its p99 is above sufferFactor times the one
// without resync, by sufferLeast at least: less nobody feels.
const (
	sufferFactor = 1.5
	sufferLeast  = 200 * time.Microsecond
)

// A window of measuring ends with enough requests for a p99, or after a second;
// it is not shorter than what makes a rate.
const (
	windowLeast    = 200 * time.Millisecond
	windowMost     = time.Second
	windowRequests = 500
)

// The p99 without resync is that of the last one or two generations: recent, and
// of enough requests that one slow moment is not the measure.
const (
	generation = 10 * time.Second
	// heldLeast is what makes a request a held one, for the baseline: it waited for
	// an eviction or for copies, not for disks.
	heldLeast = time.Second
	// baselineLeast is how many requests make a baseline.
	baselineLeast = 50
)

// Verdicts on a window, for people.
const (
	paceNone      = "no foreground to spare"  // full speed
	paceLearning  = "learning the foreground" // at the floor, for want of a baseline
	paceGrowing   = "foreground does not notice"
	paceShrinking = "foreground suffers"
	paceFloor     = "foreground is slow at the floor" // its p99 there becomes the baseline
)

// pace decides how fast resyncs may be, from what the foreground's requests
// took. It has no clock of its own and is guarded by the Throttle's mu.
type pace struct {
	rate    float64 // of each resync; zero: no limit
	verdict string

	from   time.Duration // when the present window began
	quiet  bool          // no resync ran in it
	window foreground
	sent   int64 // by all resyncs in it

	idle         bool // the last window had no request
	measured     bool // some window has ended
	base, before foreground
	learned      time.Duration          // time in base
	last         [opKinds]time.Duration // p99 in the last window that had one
	lastRate     float64                // bytes a second of all resyncs in the last window
}

// begin notes that a resync begins while no other runs.
func (p *pace) begin() {
	p.quiet = false
	if (p.idle || !p.measured) && p.window.count() == 0 {
		p.rate, p.verdict = 0, paceNone
		return
	}
	p.rate, p.verdict = resyncStart, paceGrowing
}

// look ends the window if it is time. resyncs is how many run now. It reports
// whether it did.
func (p *pace) look(now time.Duration, resyncs int) bool {
	took, n := now-p.from, p.window.count()
	if took < windowLeast || n < windowRequests && took < windowMost {
		return false
	}
	if took > 2*windowMost {
		// This process did not run, or nobody told the time: what was measured
		// says nothing.
		p.next(now, resyncs)
		return true
	}
	p.measured, p.idle = true, n == 0
	p.lastRate = float64(p.sent) / took.Seconds()
	for k := range p.window {
		p.last[k] = p.window[k].P99()
	}
	switch {
	case p.quiet && n > 0:
		p.learn(took)
	case n == 0:
		// Nobody works, or all requests are held: then more copies end it.
		p.rate, p.verdict = 0, paceNone
	default:
		p.judge(took, resyncs)
	}
	p.next(now, resyncs)
	return true
}

// next begins a window.
func (p *pace) next(now time.Duration, resyncs int) {
	p.from, p.sent, p.quiet = now, 0, resyncs == 0
	p.window = foreground{}
}

// judge sets the rate after a window in which resyncs and requests ran.
func (p *pace) judge(took time.Duration, resyncs int) {
	sent := p.lastRate / float64(max(resyncs, 1))
	if p.rate == 0 {
		p.rate = max(sent, resyncFloor)
	}
	suffers, better, known := p.compare()
	atFloor := p.rate == resyncFloor
	switch {
	case !known:
		// Measured at the floor from here on: near to without.
		p.rate, p.verdict = resyncFloor, paceLearning
		if atFloor {
			p.learn(took)
		}
	case suffers && atFloor:
		// The load is another than it was, or the floor alone is felt: what it
		// takes now is the measure, or a long resync would stay at the floor for
		// ever.
		p.verdict = paceFloor
		p.learn(took)
	case suffers:
		p.rate, p.verdict = max(resyncCut*p.rate, resyncFloor), paceShrinking
	default:
		// A rate that limits nothing does not grow, or it would take long to
		// shrink to where it does.
		if sent >= p.rate/2 {
			p.rate = min(p.rate+resyncStep, resyncMost)
		}
		p.verdict = paceGrowing
		if atFloor || better {
			p.learn(took)
		}
	}
}

// compare looks at the window beside the baseline: whether a kind of request
// suffers; whether all are at least as fast; whether there is a baseline for all.
func (p *pace) compare() (suffers, better, known bool) {
	better, known = true, true
	for k := range p.window {
		if p.window[k].N() == 0 {
			continue
		}
		base, ok := p.baseline(opKind(k))
		if !ok {
			known = false
			continue
		}
		suffers = suffers || p.last[k] > max(time.Duration(sufferFactor*float64(base)), base+sufferLeast)
		better = better && p.last[k] <= base
	}
	return suffers, better, known
}

// baseline is the p99 of a kind of request without resync.
func (p *pace) baseline(k opKind) (time.Duration, bool) {
	if p.before[k].N() == 0 {
		return p.base[k].P99(), p.base[k].N() >= baselineLeast
	}
	both := p.before[k]
	both.Merge(&p.base[k])
	return both.P99(), both.N() >= baselineLeast
}

// learn takes the window into the baseline.
func (p *pace) learn(took time.Duration) {
	if p.learned >= generation {
		p.before, p.base, p.learned = p.base, foreground{}, 0
	}
	for k := range p.window {
		p.window[k].Forget(heldLeast)
	}
	p.base.merge(&p.window)
	p.learned += took
}
