package wire

import (
	"encoding/binary"
	"time"

	"github.com/holdfast-storage/holdfast"
)

// EntryKind says what an entry does to its range.
type EntryKind uint8

// The kinds of entries; the values stand on the wire.
const (
	KindWrite EntryKind = 1 // the payload replaces the range
	KindZero  EntryKind = 2 // the range reads as zeroes and stays allocated
	KindTrim  EntryKind = 3 // the range reads as zeroes and is given back
)

// Entry is one mutation of a segment's log.
//
//	 0  epoch    u64
//	 8  seq      u64
//	16  offset   u64, bytes in the segment, of whole blocks
//	24  length   u64, the same
//	32  kind     u8, then three zero bytes
//	36  blocks   u32: of payload, length / 4096 for a write, otherwise 0
//	40  crc32c[blocks]  u32 each
type Entry struct {
	Epoch  holdfast.Epoch
	Seq    holdfast.Seq
	Kind   EntryKind
	Offset int64
	Length int64
	Sums   []uint32 // crc32c of each payload block
	Data   []byte   // Length bytes for a write, nil otherwise
}

const entrySize = 40

func putEntries(b []byte, es []Entry) []byte {
	b = putU32(b, uint32(len(es)))
	for i := range es {
		e := &es[i]
		var h [entrySize]byte
		be := binary.BigEndian
		be.PutUint64(h[0:], uint64(e.Epoch))
		be.PutUint64(h[8:], uint64(e.Seq))
		be.PutUint64(h[16:], uint64(e.Offset))
		be.PutUint64(h[24:], uint64(e.Length))
		h[32] = byte(e.Kind)
		be.PutUint32(h[36:], uint32(len(e.Sums)))
		b = append(b, h[:]...)
		b = putSums(b, e.Sums)
	}
	return b
}

// entries reads entries in seq order without gaps, whose payload is laid end
// to end in p.
func (f *fields) entries(p *Buffer) []Entry {
	n := f.count(MaxEntries, entrySize)
	var data []byte
	if p != nil {
		data = p.Bytes()
	}
	es := make([]Entry, n)
	for i := range es {
		e := &es[i]
		e.Epoch = holdfast.Epoch(f.u64())
		e.Seq = holdfast.Seq(f.u64())
		e.Offset, e.Length = f.bytes(), f.bytes()
		e.Kind = EntryKind(f.u8())
		for _, z := range f.next(3) {
			if z != 0 {
				f.fail("entry %d: bytes 33 to 35 are not zero", i)
			}
		}
		blocks := f.count(MaxEntries, 4)
		e.Sums = f.sums(blocks)
		if f.err != nil {
			return nil
		}
		checkRange(f, e.Offset, e.Length)
		switch {
		case i > 0 && (e.Seq != es[i-1].Seq+1 || e.Epoch < es[i-1].Epoch):
			f.fail("entry %d: seq %d of epoch %d behind seq %d of epoch %d", i, e.Seq, e.Epoch, es[i-1].Seq, es[i-1].Epoch)
		case e.Seq == 0:
			f.fail("entry %d: seq 0", i)
		case e.Kind == KindWrite && e.Length != int64(blocks)*holdfast.BlockSize:
			f.fail("entry %d: write of %d bytes with %d blocks", i, e.Length, blocks)
		case e.Kind == KindWrite && e.Length > int64(len(data)):
			f.fail("entry %d: write of %d bytes, %d of payload are left", i, e.Length, len(data))
		case e.Kind == KindWrite:
			e.Data, data = data[:e.Length:e.Length], data[e.Length:]
		case e.Kind != KindZero && e.Kind != KindTrim:
			f.fail("entry %d: kind %d is not known", i, e.Kind)
		case blocks != 0:
			f.fail("entry %d: %d blocks of payload with kind %d", i, blocks, e.Kind)
		}
		if f.err != nil {
			return nil
		}
	}
	if len(data) > 0 {
		f.fail("%d bytes of payload belong to no entry", len(data))
	}
	return es
}

func entryPayload(p [][]byte, es []Entry) [][]byte {
	for i := range es {
		if len(es[i].Data) > 0 {
			p = append(p, es[i].Data)
		}
	}
	return p
}

// held is embedded by messages with payload: the buffers it lies in.
type held struct{ buffers []*Buffer }

// Hold hands references to buffers over to the message, which gives them back
// when it is released.
func (h *held) Hold(bs ...*Buffer) { h.buffers = append(h.buffers, bs...) }

// Release implements Message.
func (h *held) Release() {
	for _, b := range h.buffers {
		b.Release()
	}
	h.buffers = nil
}

func (h *held) take(f *fields, p *Buffer) {
	if f.err == nil && len(f.p) == 0 && p != nil {
		h.buffers = []*Buffer{p}
	}
}

// Append carries entries in order, each seq one above the one before (R1).
// All are of one epoch: the header's, or a lower one where a writer hands on
// what an older writer logged.
type Append struct {
	held
	Commit  holdfast.Seq
	Entries []Entry
}

// Type implements Message.
func (*Append) Type() Type { return TypeAppend }

func (m *Append) appendBody(b []byte) []byte {
	return putEntries(putU64(b, uint64(m.Commit)), m.Entries)
}

func (m *Append) payload(p [][]byte) [][]byte { return entryPayload(p, m.Entries) }

func (m *Append) decodeBody(f *fields, p *Buffer) {
	m.Commit = holdfast.Seq(f.u64())
	m.Entries = f.entries(p)
	switch n := len(m.Entries); {
	case f.err != nil:
	case n == 0:
		f.fail("no entries")
	case m.Entries[n-1].Epoch != m.Entries[0].Epoch:
		f.fail("entries of epochs %d and %d", m.Entries[0].Epoch, m.Entries[n-1].Epoch)
	}
	m.take(f, p)
}

// Ack says that everything up to Tail is received, and that entries behind it may
// map Credit chunks that hold nothing yet without being refused for want of space.
type Ack struct {
	bare
	Tail   holdfast.Seq
	Credit uint32
}

// Type implements Message.
func (*Ack) Type() Type { return TypeAck }

func (m *Ack) appendBody(b []byte) []byte { return putU32(putU64(b, uint64(m.Tail)), m.Credit) }

func (m *Ack) decodeBody(f *fields, p *Buffer) {
	m.noPayload(f, p)
	m.Tail = holdfast.Seq(f.u64())
	m.Credit = f.u32()
}

// Flush asks that everything sent before it be made durable.
type Flush struct{ bare }

// Type implements Message.
func (*Flush) Type() Type { return TypeFlush }

func (*Flush) appendBody(b []byte) []byte { return b }

func (m *Flush) decodeBody(f *fields, p *Buffer) { m.noPayload(f, p) }

// Flushed answers Flush.
type Flushed struct {
	bare
	Durable holdfast.Seq
}

// Type implements Message.
func (*Flushed) Type() Type { return TypeFlushed }

func (m *Flushed) appendBody(b []byte) []byte { return putU64(b, uint64(m.Durable)) }

func (m *Flushed) decodeBody(f *fields, p *Buffer) {
	m.noPayload(f, p)
	m.Durable = holdfast.Seq(f.u64())
}

// Commit says that everything up to Seq is durable on every member the writer
// counts. It has no answer.
type Commit struct {
	bare
	Seq holdfast.Seq
}

// Type implements Message.
func (*Commit) Type() Type { return TypeCommit }

func (m *Commit) appendBody(b []byte) []byte { return putU64(b, uint64(m.Seq)) }

func (m *Commit) decodeBody(f *fields, p *Buffer) {
	m.noPayload(f, p)
	m.Seq = holdfast.Seq(f.u64())
}

// Ping asks whether the header's epoch is still the highest accepted (R10).
type Ping struct{ bare }

// Type implements Message.
func (*Ping) Type() Type { return TypePing }

func (*Ping) appendBody(b []byte) []byte { return b }

func (m *Ping) decodeBody(f *fields, p *Buffer) { m.noPayload(f, p) }

// Pong answers Ping: no higher fence was accepted here before this.
type Pong struct{ bare }

// Type implements Message.
func (*Pong) Type() Type { return TypePong }

func (*Pong) appendBody(b []byte) []byte { return b }

func (m *Pong) decodeBody(f *fields, p *Buffer) { m.noPayload(f, p) }

// Promise is a Ping that also asks for a read promise.
type Promise struct{ bare }

// Type implements Message.
func (*Promise) Type() Type { return TypePromise }

func (*Promise) appendBody(b []byte) []byte { return b }

func (m *Promise) decodeBody(f *fields, p *Buffer) { m.noPayload(f, p) }

// Promised answers Promise: a Pong, and no FENCE of a higher epoch is answered
// for Length from the arrival of the Promise. Whole milliseconds, rounded down,
// at least one and at most MaxPromise.
type Promised struct {
	bare
	Length time.Duration
}

// MaxPromise bounds a promise: a takeover may have to wait for as long.
const MaxPromise = time.Minute

// Type implements Message.
func (*Promised) Type() Type { return TypePromised }

func (m *Promised) appendBody(b []byte) []byte {
	return putU32(b, uint32(min(m.Length, MaxPromise)/time.Millisecond))
}

func (m *Promised) decodeBody(f *fields, p *Buffer) {
	m.noPayload(f, p)
	m.Length = time.Duration(f.u32()) * time.Millisecond
	if m.Length == 0 || m.Length > MaxPromise {
		f.fail("a promise of %v, at most %v", m.Length, MaxPromise)
	}
}

// Fetch asks for the logged entries From..To. As many as fit one answer come;
// the rest is asked for again.
type Fetch struct {
	bare
	From, To holdfast.Seq
}

// Type implements Message.
func (*Fetch) Type() Type { return TypeFetch }

func (m *Fetch) appendBody(b []byte) []byte { return putSeqs(b, m.From, m.To) }

func (m *Fetch) decodeBody(f *fields, p *Buffer) {
	m.noPayload(f, p)
	m.From, m.To = f.seqs()
}

// Entries answers Fetch: From and what follows it. None: the log does not
// reach back that far.
type Entries struct {
	held
	Entries []Entry
}

// Type implements Message.
func (*Entries) Type() Type { return TypeEntries }

func (m *Entries) appendBody(b []byte) []byte { return putEntries(b, m.Entries) }

func (m *Entries) payload(p [][]byte) [][]byte { return entryPayload(p, m.Entries) }

func (m *Entries) decodeBody(f *fields, p *Buffer) {
	m.Entries = f.entries(p)
	m.take(f, p)
}

// Buffers returns the buffers the message holds, for another message that
// refers to the same payload: it retains them.
func (h *held) Buffers() []*Buffer { return h.buffers }
