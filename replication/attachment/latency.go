package attachment

import (
	"math/bits"
	"time"
)

// opKind is what a request does; each kind has its own latencies, since a change
// of the mix must not look like a change of the disks.
type opKind uint8

const (
	opRead opKind = iota
	opWrite
	opFlush
	opKinds
)

var opKindNames = [opKinds]string{"read", "write", "flush"}

// latency counts durations in steps of a quarter of a power of two: a quantile
// is known to 20 %, and adding one costs a few instructions.
type latency struct {
	n      uint32
	counts [latencySteps]uint32
}

// latencySteps reach beyond a minute, where every request has been answered.
const latencySteps = 112

func (l *latency) add(d time.Duration) {
	l.n++
	l.counts[latencyStep(uint64(max(d, 0)/time.Microsecond))]++
}

// latencyStep is 4 log2(us), rounded down, at most the last.
func latencyStep(us uint64) int {
	if us < 4 {
		return int(us)
	}
	power := bits.Len64(us) - 1
	return min(4*(power-1)+int(us>>(power-2)&3), latencySteps-1)
}

// latencyFloor is the least duration that is counted in a step.
func latencyFloor(step int) time.Duration {
	if step < 4 {
		return time.Duration(step) * time.Microsecond
	}
	power := step/4 + 1
	return time.Duration((4+uint64(step%4))<<(power-2)) * time.Microsecond
}

func (l *latency) merge(o *latency) {
	l.n += o.n
	for i, c := range o.counts {
		l.counts[i] += c
	}
}

// forget drops what took d or more.
func (l *latency) forget(d time.Duration) {
	for i := latencySteps - 1; i >= 0 && latencyFloor(i) >= d; i-- {
		l.n -= l.counts[i]
		l.counts[i] = 0
	}
}

// p99 returns a lower bound of the duration that one in a hundred exceeds; zero
// without samples.
func (l *latency) p99() time.Duration {
	above := l.n / 100
	for i := latencySteps - 1; i >= 0; i-- {
		if l.counts[i] > above {
			return latencyFloor(i)
		}
		above -= l.counts[i]
	}
	return 0
}

// foreground is what clients' requests took, by kind.
type foreground [opKinds]latency

func (f *foreground) merge(o *foreground) {
	for k := range f {
		if o[k].n > 0 {
			f[k].merge(&o[k])
		}
	}
}

func (f *foreground) count() (n int) {
	for k := range f {
		n += int(f[k].n)
	}
	return n
}
