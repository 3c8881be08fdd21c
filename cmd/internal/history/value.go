package history

import (
	"encoding/binary"
	"fmt"

	"github.com/holdfast-storage/holdfast"
)

// Value names one write of one block. Zero is what a block holds that was never
// written.
type Value uint64

// NewValue names a writer's write; both count from 1.
func NewValue(writer, counter uint32) Value { return Value(writer)<<32 | Value(counter) }

// Writer is who wrote it.
func (v Value) Writer() uint32 { return uint32(v >> 32) }

// String is "w3#17", the 17th write of writer 3; "zero" for a block that was
// never written.
func (v Value) String() string {
	if v == 0 {
		return "zero"
	}
	return fmt.Sprintf("w%d#%d", v.Writer(), uint32(v))
}

// A block is filled with copies of these 16 bytes, big endian: the value, then
// the block's number plus one (so that no part of a written block is zero).
// Each part of a block that comes from elsewhere therefore shows.
const stampSize = 16

// Fill fills a block's holdfast.BlockSize bytes with a value.
func Fill(p []byte, block int64, v Value) {
	for i := 0; i < holdfast.BlockSize; i += stampSize {
		binary.BigEndian.PutUint64(p[i:], uint64(v))
		binary.BigEndian.PutUint64(p[i+8:], uint64(block)+1)
	}
}

// Parse returns the value that a block's bytes hold. An error says what is wrong
// with them: they are of another block, of two writes, or of none.
func Parse(p []byte, block int64) (Value, error) {
	v, at := stamp(p)
	for i := 0; i < holdfast.BlockSize; i += stampSize {
		if other, otherAt := stamp(p[i:]); other != v || otherAt != at {
			return 0, fmt.Errorf("block %d is torn: %v of block %d at byte 0, %v of block %d at byte %d", block, v, int64(at)-1, other, int64(otherAt)-1, i)
		}
	}
	switch {
	case v == 0 && at == 0:
		return 0, nil
	case at != uint64(block)+1 || v.Writer() == 0 || uint32(v) == 0:
		return 0, fmt.Errorf("block %d holds %v of block %d", block, v, int64(at)-1)
	}
	return v, nil
}

func stamp(p []byte) (Value, uint64) {
	return Value(binary.BigEndian.Uint64(p)), binary.BigEndian.Uint64(p[8:])
}
