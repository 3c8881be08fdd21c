package wire

import (
	"encoding/binary"

	"github.com/holdfast-storage/holdfast"
)

// fields reads message fields from a body. The first short read sticks; the
// caller looks at err (or done) once at the end. All integers are big endian.
type fields struct {
	p   []byte
	err error
}

func (f *fields) fail(format string, args ...any) {
	if f.err == nil {
		f.err = holdfast.Errorf(holdfast.ErrInvalid, format, args...)
	}
}

// next returns the next n bytes, or nil after a failure.
func (f *fields) next(n int) []byte {
	if f.err != nil {
		return nil
	}
	if len(f.p) < n {
		f.fail("body ends %d bytes early", n-len(f.p))
		return nil
	}
	b := f.p[:n]
	f.p = f.p[n:]
	return b
}

func (f *fields) u8() uint8 {
	if b := f.next(1); b != nil {
		return b[0]
	}
	return 0
}

func (f *fields) u16() uint16 {
	if b := f.next(2); b != nil {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

func (f *fields) u32() uint32 {
	if b := f.next(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (f *fields) u64() uint64 {
	if b := f.next(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

// flag reads a byte that is 0 or 1.
func (f *fields) flag() bool {
	v := f.u8()
	if v > 1 {
		f.fail("flag is %d, neither 0 nor 1", v)
	}
	return v == 1
}

// bytes reads an offset or a length: 63 bits.
func (f *fields) bytes() int64 {
	v := f.u64()
	if v > 1<<63-1 {
		f.fail("%d bytes is out of range", v)
		return 0
	}
	return int64(v)
}

// count reads a u32 count of things of at least each bytes, at most limit.
func (f *fields) count(limit, each int) int {
	n := f.u32()
	if uint64(n) > uint64(limit) {
		f.fail("count %d, at most %d", n, limit)
		return 0
	}
	if f.err == nil && int(n)*each > len(f.p) {
		f.fail("count %d of %d bytes each in %d bytes", n, each, len(f.p))
		return 0
	}
	return int(n)
}

// id reads a UUID into the id that dst points at.
func (f *fields) id(dst *[16]byte) { copy(dst[:], f.next(16)) }

// text reads a u16 length and that many bytes.
func (f *fields) text() string { return string(f.next(int(f.u16()))) }

// sums reads n crc32c values.
func (f *fields) sums(n int) []uint32 {
	b := f.next(4 * n)
	if b == nil || n == 0 {
		return nil
	}
	s := make([]uint32, n)
	for i := range s {
		s[i] = binary.BigEndian.Uint32(b[4*i:])
	}
	return s
}

// done returns the first failure, or one for bytes left over.
func (f *fields) done() error {
	if f.err == nil && len(f.p) > 0 {
		f.fail("%d bytes behind the last field", len(f.p))
	}
	return f.err
}

func putU16(b []byte, v uint16) []byte { return binary.BigEndian.AppendUint16(b, v) }
func putU32(b []byte, v uint32) []byte { return binary.BigEndian.AppendUint32(b, v) }
func putU64(b []byte, v uint64) []byte { return binary.BigEndian.AppendUint64(b, v) }

func putFlag(b []byte, v bool) []byte {
	if v {
		return append(b, 1)
	}
	return append(b, 0)
}

// putText writes at most MaxText bytes of s.
func putText(b []byte, s string) []byte {
	s = s[:min(len(s), MaxText)]
	return append(putU16(b, uint16(len(s))), s...)
}

func putSums(b []byte, sums []uint32) []byte {
	for _, s := range sums {
		b = putU32(b, s)
	}
	return b
}
