package latency

import (
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// TestMedian compares the counted median with the true one: never above it, and
// never more than a quarter below.
func TestMedian(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var h Histogram
		var all []time.Duration
		for range rapid.IntRange(1, 60).Draw(t, "samples") {
			d := time.Duration(rapid.Int64Range(0, int64(10*time.Minute)).Draw(t, "latency"))
			if rapid.Bool().Draw(t, "short") {
				d %= 5 * time.Millisecond
			}
			h.Add(d)
			all = append(all, d.Truncate(time.Microsecond))
		}
		slices.Sort(all)
		want := all[(len(all)-1)/2]
		if got := h.Median(); got > want || got < want-want/4-time.Microsecond {
			t.Fatalf("median of %v: got %v, want %v or up to a quarter less", all, got, want)
		}
	})
}

// TestSteps: each step begins where floorOf says, and none is left out.
func TestSteps(t *testing.T) {
	for i := range steps - 1 {
		us := uint64(floorOf(i) / time.Microsecond)
		if got := step(us); got != i {
			t.Errorf("step(%d us): got %d, want %d", us, got, i)
		}
		if next := uint64(floorOf(i+1) / time.Microsecond); next <= us || step(next-1) != i {
			t.Errorf("step %d: begins at %d us, the next at %d us, whose predecessor is of step %d", i, us, next, step(next-1))
		}
	}
	if got := step(1 << 63); got != steps-1 {
		t.Errorf("the longest: got step %d, want %d", got, steps-1)
	}
	if floorOf(steps-1) < 2*time.Hour {
		t.Errorf("the last step begins at %v", floorOf(steps-1))
	}
	if h := (&Histogram{}); h.Median() != 0 || h.P99() != 0 || h.N() != 0 {
		t.Errorf("no samples: %d, median %v, p99 %v", h.N(), h.Median(), h.P99())
	}
}

func TestP99(t *testing.T) {
	var h Histogram
	for us := range 10000 {
		h.Add(time.Duration(us) * time.Microsecond)
	}
	if got := h.P99(); got < 7500*time.Microsecond || got > 9900*time.Microsecond {
		t.Errorf("p99 of 0 to 10 ms: %v", got)
	}
	for d := time.Microsecond; d < time.Minute; d += d/7 + 1 {
		var one Histogram
		one.Add(d)
		if got := one.P99(); got > d || got < d*3/4-time.Microsecond {
			t.Fatalf("p99 of one sample of %v: %v", d, got)
		}
	}
}

func TestMergeAndForget(t *testing.T) {
	var a, b Histogram
	a.Add(-time.Second)
	for range 99 {
		a.Add(time.Millisecond)
	}
	for range 100 {
		b.Add(2 * time.Second)
	}
	a.Merge(&b)
	if a.N() != 200 || a.P99() < 1500*time.Millisecond {
		t.Fatalf("merged: %d, p99 %v", a.N(), a.P99())
	}
	a.Forget(time.Second)
	if a.N() != 100 || a.P99() > time.Millisecond || a.Median() > time.Millisecond {
		t.Fatalf("without the long ones: %d, p99 %v", a.N(), a.P99())
	}
}
