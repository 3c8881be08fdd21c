package blockdev

import (
	"errors"
	"math"
	"testing"

	"github.com/holdfast-storage/holdfast"
	"pgregory.net/rapid"
)

func TestRangeCheck(t *testing.T) {
	const size = 1 << 20
	for _, c := range []struct {
		r  Range
		ok bool
	}{
		{Range{0, 0}, true},
		{Range{0, size}, true},
		{Range{size, 0}, true},
		{Range{size - 1, 1}, true},
		{Range{size - 1, 2}, false},
		{Range{size, 1}, false},
		{Range{size + 1, 0}, false},
		{Range{-1, 1}, false},
		{Range{0, -1}, false},
		{Range{1, math.MaxInt64}, false},
		{Range{math.MaxInt64, math.MaxInt64}, false},
		{Range{math.MinInt64, math.MinInt64}, false},
	} {
		err := c.r.Check(size)
		if (err == nil) != c.ok {
			t.Errorf("Range{%d, %d}.Check(%d) = %v, want ok=%v", c.r.Off, c.r.Len, size, err, c.ok)
		}
		if err != nil && !errors.Is(err, holdfast.ErrInvalid) {
			t.Errorf("Range{%d, %d}.Check(%d) = %v, want kind %v", c.r.Off, c.r.Len, size, err, holdfast.ErrInvalid)
		}
	}
}

// TestRangeAlgebra compares the arithmetic with sets of bytes.
func TestRangeAlgebra(t *testing.T) {
	draw := rapid.Custom(func(t *rapid.T) Range {
		return Range{Off: rapid.Int64Range(0, 40).Draw(t, "off"), Len: rapid.Int64Range(0, 40).Draw(t, "len")}
	})
	has := func(r Range, i int64) bool { return i >= r.Off && i < r.End() }
	rapid.Check(t, func(t *rapid.T) {
		a, b := draw.Draw(t, "a"), draw.Draw(t, "b")
		unit := rapid.Int64Range(1, 9).Draw(t, "unit")
		both, inner, outer := a.Intersect(b), a.Inner(unit), a.Outer(unit)
		shared := false
		for i := int64(0); i < 100; i++ {
			if got, want := has(both, i), has(a, i) && has(b, i); got != want {
				t.Fatalf("%v.Intersect(%v) = %v: byte %d is in it: %v, want %v", a, b, both, i, got, want)
			}
			shared = shared || has(a, i) && has(b, i)
			first, whole, part := i/unit*unit, true, false
			for j := first; j < first+unit; j++ {
				whole, part = whole && has(a, j), part || has(a, j)
			}
			if got := has(inner, i); got != whole {
				t.Fatalf("%v.Inner(%d) = %v: byte %d is in it: %v, want %v", a, unit, inner, i, got, whole)
			}
			if got := has(outer, i); got != part {
				t.Fatalf("%v.Outer(%d) = %v: byte %d is in it: %v, want %v", a, unit, outer, i, got, part)
			}
		}
		if got := a.Overlaps(b); got != shared {
			t.Fatalf("%v.Overlaps(%v) = %v, want %v", a, b, got, shared)
		}
	})
}
