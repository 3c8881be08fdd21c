package disk

import (
	"encoding/binary"
	"hash/crc32"

	"github.com/holdfast-storage/holdfast"
)

// recordType is the type of a WAL record; numbers are never reused.
type recordType uint8

// The record types.
const (
	recWrite   recordType = 1 // entry: OpWrite
	recZero    recordType = 2 // entry: OpZero
	recTrim    recordType = 3 // entry: OpTrim
	recSnap    recordType = 4 // entry: cut a snapshot; not written by version 1
	recResize  recordType = 5 // entry: grow the segment; not written by version 1
	recFence   recordType = 6 // fence = epoch
	recTrunc   recordType = 7 // drop entries above seq
	recInstall recordType = 8 // CHUNK_INSTALL: replace a chunk
	recCommit  recordType = 9 // commit is all it says
	recCkpt    recordType = 10
	recCreate  recordType = 11 // a replica is born
	recDelete  recordType = 12 // a replica is gone
	recRebase  recordType = 13 // drop the log, tail = seq, last epoch = epoch
	recHint    recordType = 14 // highest (epoch, ISR version = seq) told
	recIntact  recordType = 15 // declared intact at epoch
)

// Flags of a record.
const (
	flagBatchEnd = 1 << 0 // the next record starts on a fresh page
	flagRelogged = 1 << 1 // the entry was logged before, and is moved to the head of the log
	flagFresh    = 1 << 2 // whole chunks of a WRITE, or that of an INSTALL, are not in the payload, but in the chunks that extra lists; see fresh.go
	flagAnew     = 1 << 3 // a REBASE that drops the chunks too: the replica was damaged
)

const (
	recordMagic   = 0x31574648 // "HFW1"
	recordFixed   = 128
	recordVersion = 1
	// maxRecordHead bounds what a decoder believes: 1 MiB of crcs and the
	// largest extra.
	maxRecordHead = recordFixed + 4*(holdfast.MaxOpSize/holdfast.BlockSize) + maxExtra
	maxExtra      = 4 << 10
)

// record is one WAL record. Its head, little-endian, is
//
//	  0  4  magic "HFW1"
//	  4  4  crc32c, seeded with the disk id, of bytes 8 to the end of the head
//	  8  2  record version
//	 10  1  type
//	 11  1  flags
//	 12  4  length of the head: 128 + extra + 4 n, rounded up to 8
//	 16  8  walSerial: one more than the record before it
//	 24  8  openCount of the disk when it was written: never falls along the log
//	 32  8  durable: every record up to this walSerial was durable by then
//	 40 16  replica
//	 56  8  epoch
//	 64  8  seq
//	 72  8  commit
//	 80  8  offset of the range in the segment, bytes
//	 88  8  length of the range, bytes
//	 96  4  n: number of block crcs
//	100  4  payload length, bytes: n blocks, less those in fresh chunks
//	104  4  extra length, bytes
//	108  4  key id (0: not encrypted)
//	112 16  zero
//	128     crc[n], each crc32c of one block of the payload, or of a fresh chunk, unseeded
//	        extra: what the type needs beside
//
// and the payload follows the head. The crc of the head covers crc[n], so a
// record whose blocks match is whole. Seeding it with the disk id, with serials
// that rise for ever and openCounts that never fall, keeps stale bytes of a
// recycled or torn log from ever being taken for records (see scan).
type record struct {
	typ     recordType
	flags   uint8
	serial  uint64
	open    uint64
	durable uint64
	replica holdfast.ReplicaID
	epoch   holdfast.Epoch
	seq     holdfast.Seq
	commit  holdfast.Seq
	off     int64
	length  int64
	crc     []uint32
	extra   []byte
	payload []byte // when encoding

	payloadLen int64 // when decoded
	headLen    int64
}

func (r *record) headSize() int {
	return (recordFixed + 4*len(r.crc) + len(r.extra) + 7) &^ 7
}

// size is the record's length in the log.
func (r *record) size() int64 { return int64(r.headSize()) + int64(len(r.payload)) }

// encodeHead writes the head into b, which is headSize() bytes.
func (r *record) encodeHead(b []byte, seed uint32) {
	le := binary.LittleEndian
	clear(b)
	le.PutUint32(b[0:], recordMagic)
	le.PutUint16(b[8:], recordVersion)
	b[10], b[11] = byte(r.typ), r.flags
	le.PutUint32(b[12:], uint32(len(b)))
	le.PutUint64(b[16:], r.serial)
	le.PutUint64(b[24:], r.open)
	le.PutUint64(b[32:], r.durable)
	copy(b[40:], r.replica[:])
	le.PutUint64(b[56:], uint64(r.epoch))
	le.PutUint64(b[64:], uint64(r.seq))
	le.PutUint64(b[72:], uint64(r.commit))
	le.PutUint64(b[80:], uint64(r.off))
	le.PutUint64(b[88:], uint64(r.length))
	le.PutUint32(b[96:], uint32(len(r.crc)))
	le.PutUint32(b[100:], uint32(len(r.payload)))
	le.PutUint32(b[104:], uint32(len(r.extra)))
	for i, c := range r.crc {
		le.PutUint32(b[recordFixed+4*i:], c)
	}
	copy(b[recordFixed+4*len(r.crc):], r.extra)
	le.PutUint32(b[4:], crc32.Update(seed, castagnoli, b[8:]))
}

// decodeHead reads a head from the start of b, which may be longer. ok is
// false for anything that is not wholly a head of this disk.
func decodeHead(b []byte, seed uint32) (r record, ok bool) {
	le := binary.LittleEndian
	if len(b) < recordFixed || le.Uint32(b) != recordMagic || le.Uint16(b[8:]) != recordVersion {
		return r, false
	}
	head := int64(le.Uint32(b[12:]))
	if head < recordFixed || head > maxRecordHead || head > int64(len(b)) || head%8 != 0 {
		return r, false
	}
	if crc32.Update(seed, castagnoli, b[8:head]) != le.Uint32(b[4:]) {
		return r, false
	}
	n, extra := int64(le.Uint32(b[96:])), int64(le.Uint32(b[104:]))
	r = record{
		typ: recordType(b[10]), flags: b[11],
		serial: le.Uint64(b[16:]), open: le.Uint64(b[24:]), durable: le.Uint64(b[32:]),
		replica: holdfast.ReplicaID(b[40:56]),
		epoch:   holdfast.Epoch(le.Uint64(b[56:])), seq: holdfast.Seq(le.Uint64(b[64:])), commit: holdfast.Seq(le.Uint64(b[72:])),
		off: int64(le.Uint64(b[80:])), length: int64(le.Uint64(b[88:])),
		payloadLen: int64(le.Uint32(b[100:])), headLen: head,
	}
	if n > holdfast.MaxOpSize/holdfast.BlockSize || extra > maxExtra ||
		(recordFixed+4*n+extra+7)&^7 != head || r.off < 0 || r.length < 0 ||
		r.serial == 0 || r.serial > maxSerial || r.durable >= r.serial {
		return r, false
	}
	if n > 0 {
		r.crc = make([]uint32, n)
		for i := range r.crc {
			r.crc[i] = le.Uint32(b[recordFixed+4*i:])
		}
	}
	if extra > 0 {
		r.extra = append([]byte(nil), b[recordFixed+4*n:][:extra]...)
	}
	return r, r.payloadLen == n*holdfast.BlockSize-r.freshBytes() && r.freshFits()
}

// payloadMatches reports whether the payload's blocks match their crcs.
func payloadMatches(crc []uint32, payload []byte) bool {
	for i, c := range crc {
		if crc32.Checksum(payload[i*holdfast.BlockSize:(i+1)*holdfast.BlockSize], castagnoli) != c {
			return false
		}
	}
	return true
}

// The extra of CREATE is the replica's descriptor, 48 bytes:
//
//	 0 16  volume
//	16  4  segment index
//	20  2  width of the per-block metadata, bytes (4: the crc)
//	22  2  zero
//	24 16  lineage
//	40  8  size, bytes
const descSize = 48

func encodeDesc(d ReplicaDesc) []byte {
	b := make([]byte, descSize)
	le := binary.LittleEndian
	copy(b, d.Segment.Volume[:])
	le.PutUint32(b[16:], d.Segment.Index)
	le.PutUint16(b[20:], metaWidth)
	copy(b[24:], d.Lineage[:])
	le.PutUint64(b[40:], uint64(d.Size))
	return b
}

func decodeDesc(id holdfast.ReplicaID, b []byte) (ReplicaDesc, bool) {
	if len(b) < descSize {
		return ReplicaDesc{}, false
	}
	le := binary.LittleEndian
	d := ReplicaDesc{
		Segment: holdfast.SegmentID{Volume: holdfast.VolumeID(b[:16]), Index: le.Uint32(b[16:])},
		Replica: id,
		Lineage: holdfast.LineageID(b[24:40]),
		Size:    int64(le.Uint64(b[40:])),
	}
	return d, d.Size > 0 && d.Size <= maxSegment && d.Size%holdfast.BlockSize == 0 && le.Uint16(b[20:]) == metaWidth
}

// metaWidth is the width of the per-block metadata in version 1: the crc.
const metaWidth = 4

// The extra of CHUNK_INSTALL, 24 bytes, or 28 with flag 4:
//
//	 0  8  lastSeq
//	 8  8  asOf
//	16  8  state[16], 4 bits each, block 0 in the low bits
//	24  4  with flag 4, all states data: number of the fresh chunk that holds it
//
// Its range is the chunk; crc and payload hold the blocks of state data alone, in
// order.
const installSize = 24

func encodeInstall(c *Chunk) []byte {
	b := make([]byte, installSize)
	le := binary.LittleEndian
	le.PutUint64(b, uint64(c.LastSeq))
	le.PutUint64(b[8:], uint64(c.AsOf))
	le.PutUint64(b[16:], packStates(&c.State))
	return b
}

// decodeInstall reads an install's extra and shares out the record's crcs.
func decodeInstall(r *record) (Chunk, bool) {
	c := Chunk{Index: r.off / holdfast.ChunkSize}
	if len(r.extra)-len(r.freshList()) != installSize || r.off%holdfast.ChunkSize != 0 {
		return c, false
	}
	le := binary.LittleEndian
	c.LastSeq, c.AsOf = holdfast.Seq(le.Uint64(r.extra)), holdfast.Seq(le.Uint64(r.extra[8:]))
	if !unpackStates(le.Uint64(r.extra[16:]), &c.State) {
		return c, false
	}
	n := 0
	for i, s := range c.State {
		if s == BlockData {
			if n == len(r.crc) {
				return c, false
			}
			c.CRC[i] = r.crc[n]
			n++
		}
	}
	return c, n == len(r.crc)
}

func packStates(s *[holdfast.BlocksPerChunk]BlockState) uint64 {
	var v uint64
	for i, b := range s {
		v |= uint64(b) << (4 * i)
	}
	return v
}

func unpackStates(v uint64, s *[holdfast.BlocksPerChunk]BlockState) bool {
	for i := range s {
		s[i] = BlockState(v >> (4 * i) & 15)
		if s[i] > BlockPoison {
			return false
		}
	}
	return true
}

// The extra of CKPT, 40 bytes:
//
//	 0  8  number of the directory's first page; -1: no replica, no directory
//	 8  4  its crc
//	12  4  zero
//	16  8  walSerial from which on records must be replayed
//	24  8  walSerial up to which births and deaths of replicas are in the directory
//	32  8  number of replicas in it
const ckptSize = 40

type ckptBody struct {
	page       int64 // -1: no replica, no directory
	crc        uint32
	replayFrom uint64
	upTo       uint64
	replicas   uint64
}

func (c *ckptBody) encode() []byte {
	b := make([]byte, ckptSize)
	le := binary.LittleEndian
	le.PutUint64(b, uint64(c.page))
	le.PutUint32(b[8:], c.crc)
	le.PutUint64(b[16:], c.replayFrom)
	le.PutUint64(b[24:], c.upTo)
	le.PutUint64(b[32:], c.replicas)
	return b
}

func decodeCkpt(b []byte) (ckptBody, bool) {
	if len(b) != ckptSize {
		return ckptBody{}, false
	}
	le := binary.LittleEndian
	return ckptBody{
		page: int64(le.Uint64(b)), crc: le.Uint32(b[8:]),
		replayFrom: le.Uint64(b[16:]), upTo: le.Uint64(b[24:]), replicas: le.Uint64(b[32:]),
	}, true
}
