package wire

import "github.com/holdfast-storage/holdfast"

// Afford asks what logging a write of a range would take of the copy's disk now,
// and for credit to follow entries that may map Pending chunks more. It promises
// nothing by itself that Afforded does not name.
type Afford struct {
	bare
	Offset, Length int64 // whole blocks, at most holdfast.MaxOpSize
	Pending        uint32
}

// Type implements Message.
func (*Afford) Type() Type { return TypeAfford }

func (m *Afford) appendBody(b []byte) []byte {
	return putU32(putU64(putU64(b, uint64(m.Offset)), uint64(m.Length)), m.Pending)
}

func (m *Afford) decodeBody(f *fields, p *Buffer) {
	m.noPayload(f, p)
	m.Offset, m.Length = f.bytes(), f.bytes()
	m.Pending = f.u32()
	checkRange(f, m.Offset, m.Length)
	if m.Length > holdfast.MaxOpSize {
		f.fail("a write of %d bytes, at most %d", m.Length, holdfast.MaxOpSize)
	}
}

// Afforded answers Afford: the write would map Need chunks, and entries behind Tail
// may map Credit chunks without being refused. The disk is full for the write if
// Credit is less than Need and what is pending behind Tail.
type Afforded struct {
	bare
	Need, Credit uint32
	Tail         holdfast.Seq
}

// Type implements Message.
func (*Afforded) Type() Type { return TypeAfforded }

func (m *Afforded) appendBody(b []byte) []byte {
	return putU64(putU32(putU32(b, m.Need), m.Credit), uint64(m.Tail))
}

func (m *Afforded) decodeBody(f *fields, p *Buffer) {
	m.noPayload(f, p)
	m.Need, m.Credit = f.u32(), f.u32()
	m.Tail = holdfast.Seq(f.u64())
}
