package coordinator

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
		var l latency
		var all []time.Duration
		for range rapid.IntRange(1, 60).Draw(t, "samples") {
			d := time.Duration(rapid.Int64Range(0, int64(10*time.Minute)).Draw(t, "latency"))
			if rapid.Bool().Draw(t, "short") {
				d %= 5 * time.Millisecond
			}
			l.add(d)
			all = append(all, d.Truncate(time.Microsecond))
		}
		slices.Sort(all)
		want := all[(len(all)-1)/2]
		if got := l.median(); got > want || got < want-want/4-time.Microsecond {
			t.Fatalf("median of %v: got %v, want %v or up to a quarter less", all, got, want)
		}
	})
}

// TestSteps: each step begins where floorOf says, and none is left out.
func TestSteps(t *testing.T) {
	for i := range 127 {
		us := uint64(floorOf(i) / time.Microsecond)
		if got := step(us); got != i {
			t.Errorf("step(%d us): got %d, want %d", us, got, i)
		}
		if next := uint64(floorOf(i+1) / time.Microsecond); next <= us || step(next-1) != i {
			t.Errorf("step %d: begins at %d us, the next at %d us, whose predecessor is of step %d", i, us, next, step(next-1))
		}
	}
	if got := step(1 << 63); got != 127 {
		t.Errorf("the longest: got step %d, want 127", got)
	}
	if got := (&latency{}).median(); got != 0 {
		t.Errorf("no samples: got median %v, want 0", got)
	}
}
