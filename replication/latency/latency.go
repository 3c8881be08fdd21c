// Package latency counts how long things took, in steps of a quarter of a power of
// two: a quantile is known to 20 %, adding one costs a few instructions, and the
// memory is the same for one sample and for four billion. It is pure: no clock.
package latency

import (
	"math/bits"
	"time"
)

// steps reach beyond two hours; what takes longer is counted in the last one.
const steps = 128

// Histogram counts durations by microseconds. The zero value is empty. It is not
// safe for concurrent use.
type Histogram struct {
	n      uint32
	counts [steps]uint32
}

// Add counts one duration; a negative one counts as none.
func (h *Histogram) Add(d time.Duration) {
	h.n++
	h.counts[step(uint64(max(d, 0)/time.Microsecond))]++
}

// N returns how many durations were counted.
func (h *Histogram) N() int { return int(h.n) }

// Merge counts all that another one counted.
func (h *Histogram) Merge(o *Histogram) {
	h.n += o.n
	for i, c := range o.counts {
		h.counts[i] += c
	}
}

// Forget drops what took d or more, as far as the steps tell.
func (h *Histogram) Forget(d time.Duration) {
	for i := steps - 1; i >= 0 && floorOf(i) >= d; i-- {
		h.n -= h.counts[i]
		h.counts[i] = 0
	}
}

// Median returns a lower bound of the median; zero without samples.
func (h *Histogram) Median() time.Duration {
	var below uint32
	for i, n := range h.counts {
		if below += n; n > 0 && 2*below >= h.n {
			return floorOf(i)
		}
	}
	return 0
}

// P99 returns a lower bound of the duration that one in a hundred exceeds; zero
// without samples.
func (h *Histogram) P99() time.Duration {
	above := h.n / 100
	for i := steps - 1; i >= 0; i-- {
		if h.counts[i] > above {
			return floorOf(i)
		}
		above -= h.counts[i]
	}
	return 0
}

// step is 4 log2(us), rounded down, at most the last.
func step(us uint64) int {
	if us < 4 {
		return int(us)
	}
	power := bits.Len64(us) - 1
	return min(4*(power-1)+int(us>>(power-2)&3), steps-1)
}

// floorOf is the least duration that is counted in a step.
func floorOf(step int) time.Duration {
	if step < 4 {
		return time.Duration(step) * time.Microsecond
	}
	power := step/4 + 1
	return time.Duration((4+uint64(step%4))<<(power-2)) * time.Microsecond
}
