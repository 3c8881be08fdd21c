package blockdev

import (
	"fmt"

	"github.com/holdfast-storage/holdfast"
)

// Range is [Off, Off+Len) in bytes.
type Range struct {
	Off int64
	Len int64
}

// End is the first byte after the range.
func (r Range) End() int64 { return r.Off + r.Len }

// Empty reports whether the range holds no byte.
func (r Range) Empty() bool { return r.Len <= 0 }

// String returns [off, end).
func (r Range) String() string { return fmt.Sprintf("[%d, %d)", r.Off, r.End()) }

// Check returns an ErrInvalid error unless the range lies within [0, size). It
// is safe for any numbers, so it may be given what came from a network.
func (r Range) Check(size int64) error {
	if r.Off < 0 || r.Len < 0 || r.Off > size || r.Len > size-r.Off {
		return holdfast.Errorf(holdfast.ErrInvalid, "%d bytes at offset %d leave the device of %d bytes", r.Len, r.Off, size)
	}
	return nil
}

// Overlaps reports whether the two ranges share a byte.
func (r Range) Overlaps(o Range) bool {
	return !r.Empty() && !o.Empty() && r.Off < o.End() && o.Off < r.End()
}

// Intersect returns the bytes in both ranges; it is empty if there are none.
func (r Range) Intersect(o Range) Range {
	off, end := max(r.Off, o.Off), min(r.End(), o.End())
	if end <= off {
		return Range{Off: off}
	}
	return Range{Off: off, Len: end - off}
}

// Inner returns the largest range of whole units within r; it is empty if r
// holds no whole unit.
func (r Range) Inner(unit int64) Range {
	off := (r.Off + unit - 1) / unit * unit
	end := r.End() / unit * unit
	if end <= off {
		return Range{Off: off}
	}
	return Range{Off: off, Len: end - off}
}

// Outer returns the smallest range of whole units that contains r.
func (r Range) Outer(unit int64) Range {
	if r.Empty() {
		return Range{Off: r.Off / unit * unit}
	}
	off := r.Off / unit * unit
	end := (r.End() + unit - 1) / unit * unit
	return Range{Off: off, Len: end - off}
}
