package wire

import (
	"strings"

	"github.com/holdfast-storage/holdfast"
)

// Hello opens a session. The header's epoch is the writer's, its nonce is the
// connection's from here on. The other end serves only what every id names.
type Hello struct {
	bare
	Level    holdfast.ClusterLevel // the highest this writer writes at
	Cluster  holdfast.ClusterID
	From, To holdfast.NodeID
	Instance holdfast.InstanceID // of the writer's process
	Segment  holdfast.SegmentID
	Replica  holdfast.ReplicaID
	Lineage  holdfast.LineageID
	Session  holdfast.SessionID
}

// Type implements Message.
func (*Hello) Type() Type { return TypeHello }

func (m *Hello) appendBody(b []byte) []byte {
	b = putU32(b, uint32(m.Level))
	b = append(b, m.Cluster[:]...)
	b = append(b, m.From[:]...)
	b = append(b, m.To[:]...)
	b = append(b, m.Instance[:]...)
	b = append(b, m.Segment.Volume[:]...)
	b = putU32(b, m.Segment.Index)
	b = append(b, m.Replica[:]...)
	b = append(b, m.Lineage[:]...)
	return append(b, m.Session[:]...)
}

func (m *Hello) decodeBody(f *fields, p *Buffer) {
	m.noPayload(f, p)
	m.Level = holdfast.ClusterLevel(f.u32())
	f.id((*[16]byte)(&m.Cluster))
	f.id((*[16]byte)(&m.From))
	f.id((*[16]byte)(&m.To))
	f.id((*[16]byte)(&m.Instance))
	f.id((*[16]byte)(&m.Segment.Volume))
	m.Segment.Index = f.u32()
	f.id((*[16]byte)(&m.Replica))
	f.id((*[16]byte)(&m.Lineage))
	f.id((*[16]byte)(&m.Session))
}

// Welcome answers Hello: the session is open on this replica.
type Welcome struct {
	bare
	Level     holdfast.ClusterLevel
	Node      holdfast.NodeID
	Instance  holdfast.InstanceID // of the replica's process
	Disk      holdfast.DiskID
	OpenCount holdfast.OpenCount
}

// Type implements Message.
func (*Welcome) Type() Type { return TypeWelcome }

func (m *Welcome) appendBody(b []byte) []byte {
	b = putU32(b, uint32(m.Level))
	b = append(b, m.Node[:]...)
	b = append(b, m.Instance[:]...)
	b = append(b, m.Disk[:]...)
	return putU64(b, uint64(m.OpenCount))
}

func (m *Welcome) decodeBody(f *fields, p *Buffer) {
	m.noPayload(f, p)
	m.Level = holdfast.ClusterLevel(f.u32())
	f.id((*[16]byte)(&m.Node))
	f.id((*[16]byte)(&m.Instance))
	f.id((*[16]byte)(&m.Disk))
	m.OpenCount = holdfast.OpenCount(f.u64())
}

// Error says what cannot be done: of the request in the header, or, without
// one, of the whole session, which then ends.
type Error struct {
	bare
	Kind    holdfast.Kind
	Message string // at most MaxText bytes arrive
	Remedy  string // the same
}

// kindCodes are the kinds' numbers on the wire; they are never reused.
var kindCodes = []holdfast.Kind{
	1: holdfast.ErrInternal, 2: holdfast.ErrInvalid, 3: holdfast.ErrUnsupported, 4: holdfast.ErrNotFound,
	5: holdfast.ErrExists, 6: holdfast.ErrRefused, 7: holdfast.ErrUnavailable, 8: holdfast.ErrTimeout,
	9: holdfast.ErrFenced, 10: holdfast.ErrNoSpace, 11: holdfast.ErrIO, 12: holdfast.ErrIntegrity,
}

// ErrorOf makes the message for an error.
func ErrorOf(err error) *Error {
	remedy := holdfast.RemedyOf(err)
	text := err.Error()
	if remedy != "" {
		text = strings.TrimSuffix(text, " ("+remedy+")") // it travels in a field of its own
	}
	return &Error{Kind: holdfast.KindOf(err), Message: text, Remedy: remedy}
}

// Err returns the error as the other end meant it.
func (m *Error) Err() error {
	return &holdfast.Error{Kind: m.Kind, Message: m.Message, Remedy: m.Remedy}
}

// Type implements Message.
func (*Error) Type() Type { return TypeError }

func (m *Error) appendBody(b []byte) []byte {
	code := 1 // a kind that is not on the wire is internal
	for i, k := range kindCodes {
		if k == m.Kind && k != "" {
			code = i
		}
	}
	b = append(b, byte(code))
	b = putText(b, m.Message)
	return putText(b, m.Remedy)
}

func (m *Error) decodeBody(f *fields, p *Buffer) {
	m.noPayload(f, p)
	m.Kind = holdfast.ErrInternal
	if code := int(f.u8()); code > 0 && code < len(kindCodes) {
		m.Kind = kindCodes[code]
	}
	m.Message = f.text()
	m.Remedy = f.text()
	if len(m.Message) > MaxText || len(m.Remedy) > MaxText {
		f.fail("error text of %d and %d bytes, at most %d each", len(m.Message), len(m.Remedy), MaxText)
	}
}

// Failed says that this copy cannot go on: its disk failed (ErrIO), or the
// payload of the batch that starts at Seq does not match its sums
// (ErrIntegrity).
type Failed struct {
	bare
	Seq   holdfast.Seq
	Cause Error
}

// Type implements Message.
func (*Failed) Type() Type { return TypeFailed }

func (m *Failed) appendBody(b []byte) []byte { return m.Cause.appendBody(putU64(b, uint64(m.Seq))) }

func (m *Failed) decodeBody(f *fields, p *Buffer) {
	m.Seq = holdfast.Seq(f.u64())
	m.Cause.decodeBody(f, p)
}

// Close ends a session in order: the replica drops it once everything before
// was handled, and no frame follows.
type Close struct{ bare }

// Type implements Message.
func (*Close) Type() Type { return TypeClose }

func (*Close) appendBody(b []byte) []byte { return b }

func (m *Close) decodeBody(f *fields, p *Buffer) { m.noPayload(f, p) }
