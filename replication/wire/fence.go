package wire

import "github.com/holdfast-storage/holdfast"

// Fence asks a replica to accept no epoch below the header's, durably, and to
// seal its log: fdatasync the whole tail (R4, R5).
type Fence struct{ bare }

// Type implements Message.
func (*Fence) Type() Type { return TypeFence }

func (*Fence) appendBody(b []byte) []byte { return b }

func (m *Fence) decodeBody(f *fields, p *Buffer) { m.noPayload(f, p) }

// EpochStart says at which seq a replica's entries of an epoch begin.
type EpochStart struct {
	Epoch holdfast.Epoch
	First holdfast.Seq
}

// Fenced answers Fence: the epoch is durable and the tail sealed. It says what
// the copy holds.
type Fenced struct {
	bare
	Tail       holdfast.Seq   // last logged
	TailEpoch  holdfast.Epoch // of the entry at Tail
	Durable    holdfast.Seq
	Commit     holdfast.Seq
	Applied    holdfast.Seq // the chunks hold the prefix up to here
	Checkpoint holdfast.Seq // the log no longer holds entries up to here
	Held       holdfast.Seq // while Syncing: the chunks were whole up to here when the log was dropped
	Intact     bool         // nothing acknowledged can be missing (R7)
	Syncing    bool         // being filled: the tail proves nothing
	Damaged    bool         // an unreadable record in the durable part
	Lost       holdfast.Seq // first logged entry whose bytes are lost; 0: none
	OpenCount  holdfast.OpenCount
	HintEpoch  holdfast.Epoch // highest (epoch, isr version) this copy was told
	HintISR    holdfast.ISRVersion
	LogSize    int64        // bytes of the log of its disk, which all copies there share
	Epochs     []EpochStart // ascending
}

// Type implements Message.
func (*Fenced) Type() Type { return TypeFenced }

func (m *Fenced) appendBody(b []byte) []byte {
	for _, v := range []uint64{uint64(m.Tail), uint64(m.TailEpoch), uint64(m.Durable), uint64(m.Commit), uint64(m.Applied),
		uint64(m.Checkpoint), uint64(m.Held), uint64(m.Lost)} {
		b = putU64(b, v)
	}
	b = putFlag(putFlag(putFlag(b, m.Intact), m.Syncing), m.Damaged)
	b = putU64(b, uint64(m.OpenCount))
	b = putU64(b, uint64(m.HintEpoch))
	b = putU64(b, uint64(m.HintISR))
	b = putU64(b, uint64(m.LogSize))
	b = putU32(b, uint32(len(m.Epochs)))
	for _, e := range m.Epochs {
		b = putU64(b, uint64(e.Epoch))
		b = putU64(b, uint64(e.First))
	}
	return b
}

func (m *Fenced) decodeBody(f *fields, p *Buffer) {
	m.noPayload(f, p)
	m.Tail = holdfast.Seq(f.u64())
	m.TailEpoch = holdfast.Epoch(f.u64())
	m.Durable, m.Commit = f.seqs()
	m.Applied, m.Checkpoint = f.seqs()
	m.Held, m.Lost = f.seqs()
	m.Intact, m.Syncing, m.Damaged = f.flag(), f.flag(), f.flag()
	m.OpenCount = holdfast.OpenCount(f.u64())
	m.HintEpoch = holdfast.Epoch(f.u64())
	m.HintISR = holdfast.ISRVersion(f.u64())
	m.LogSize = f.bytes()
	if n := f.count(MaxEpochTails, 16); n > 0 {
		m.Epochs = make([]EpochStart, n)
		for i := range m.Epochs {
			m.Epochs[i] = EpochStart{Epoch: holdfast.Epoch(f.u64()), First: holdfast.Seq(f.u64())}
		}
	}
}

// Refused answers any message whose epoch is below the one accepted here. The
// sender has lost the right to write.
type Refused struct {
	bare
	Accepted holdfast.Epoch // the epoch that holds here
}

// Type implements Message.
func (*Refused) Type() Type { return TypeRefused }

func (m *Refused) appendBody(b []byte) []byte { return putU64(b, uint64(m.Accepted)) }

func (m *Refused) decodeBody(f *fields, p *Buffer) {
	m.noPayload(f, p)
	m.Accepted = holdfast.Epoch(f.u64())
}

// Open cuts the log beyond Start and takes the epoch's entries from there on.
type Open struct {
	bare
	Start      holdfast.Seq
	ISRVersion holdfast.ISRVersion // kept as a hint
}

// Type implements Message.
func (*Open) Type() Type { return TypeOpen }

func (m *Open) appendBody(b []byte) []byte {
	return putU64(putU64(b, uint64(m.Start)), uint64(m.ISRVersion))
}

func (m *Open) decodeBody(f *fields, p *Buffer) {
	m.noPayload(f, p)
	m.Start = holdfast.Seq(f.u64())
	m.ISRVersion = holdfast.ISRVersion(f.u64())
}

// Join makes a copy that is being filled drop its log, keep its chunks, and
// follow the live stream from At+1.
type Join struct {
	bare
	At         holdfast.Seq
	ISRVersion holdfast.ISRVersion
}

// Type implements Message.
func (*Join) Type() Type { return TypeJoin }

func (m *Join) appendBody(b []byte) []byte {
	return putU64(putU64(b, uint64(m.At)), uint64(m.ISRVersion))
}

func (m *Join) decodeBody(f *fields, p *Buffer) {
	m.noPayload(f, p)
	m.At = holdfast.Seq(f.u64())
	m.ISRVersion = holdfast.ISRVersion(f.u64())
}

// Opened answers Open and Join: the cut is durable.
type Opened struct {
	bare
	Tail, Durable holdfast.Seq
	Credit        uint32       // chunks, as in Ack
	Held          holdfast.Seq // of a Join: that of Fenced, after it
}

// Type implements Message.
func (*Opened) Type() Type { return TypeOpened }

func (m *Opened) appendBody(b []byte) []byte {
	return putU64(putU32(putSeqs(b, m.Tail, m.Durable), m.Credit), uint64(m.Held))
}

func (m *Opened) decodeBody(f *fields, p *Buffer) {
	m.noPayload(f, p)
	m.Tail, m.Durable = f.seqs()
	m.Credit = f.u32()
	m.Held = holdfast.Seq(f.u64())
}

// Intact tells a copy that it holds everything it ever acknowledged; it
// remembers this together with its boot id (R7). It has no answer.
type Intact struct{ bare }

// Type implements Message.
func (*Intact) Type() Type { return TypeIntact }

func (*Intact) appendBody(b []byte) []byte { return b }

func (m *Intact) decodeBody(f *fields, p *Buffer) { m.noPayload(f, p) }

func putSeqs(b []byte, tail, durable holdfast.Seq) []byte {
	return putU64(putU64(b, uint64(tail)), uint64(durable))
}

// seqs reads a tail and a durable seq.
func (f *fields) seqs() (tail, durable holdfast.Seq) {
	return holdfast.Seq(f.u64()), holdfast.Seq(f.u64())
}
