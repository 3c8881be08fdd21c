package wire

import "github.com/holdfast-storage/holdfast"

// Read asks for a range as it is now: the newest logged bytes.
type Read struct {
	bare
	Offset, Length int64
}

// Type implements Message.
func (*Read) Type() Type { return TypeRead }

func (m *Read) appendBody(b []byte) []byte {
	return putU64(putU64(b, uint64(m.Offset)), uint64(m.Length))
}

func (m *Read) decodeBody(f *fields, p *Buffer) {
	m.noPayload(f, p)
	m.Offset, m.Length = f.bytes(), f.bytes()
	checkRange(f, m.Offset, m.Length)
	if m.Length > MaxPayload {
		f.fail("read of %d bytes, at most %d", m.Length, MaxPayload)
	}
}

// Data answers Read.
type Data struct {
	held
	Sums  []uint32 // crc32c of each block
	Bytes []byte
}

// Type implements Message.
func (*Data) Type() Type { return TypeData }

func (m *Data) appendBody(b []byte) []byte { return putSums(putU32(b, uint32(len(m.Sums))), m.Sums) }

func (m *Data) payload(p [][]byte) [][]byte { return append(p, m.Bytes) }

func (m *Data) decodeBody(f *fields, p *Buffer) {
	m.Sums = f.sums(f.count(MaxEntries, 4))
	if p != nil {
		m.Bytes = p.Bytes()
	}
	if len(m.Bytes) != len(m.Sums)*holdfast.BlockSize || p == nil {
		f.fail("%d bytes of data with %d sums", len(m.Bytes), len(m.Sums))
	}
	m.take(f, p)
}
