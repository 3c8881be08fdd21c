package badgerlog

import (
	"encoding/binary"
	"hash/crc32"
	"time"

	"github.com/hashicorp/raft"

	"github.com/holdfast-storage/holdfast"
)

// Keys: 'l' and the index, big endian, so that they sort; 's' and raft's key.
const (
	logPrefix    = 'l'
	stablePrefix = 's'
)

func logKey(index uint64) []byte {
	return binary.BigEndian.AppendUint64([]byte{logPrefix}, index)
}

func stableKey(k []byte) []byte { return append([]byte{stablePrefix}, k...) }

func indexOf(key []byte) (uint64, error) {
	if len(key) != 9 {
		return 0, holdfast.Errorf(holdfast.ErrIntegrity, "a log key of %d bytes", len(key))
	}
	return binary.BigEndian.Uint64(key[1:]), nil
}

// formatVersion is the first byte of every value.
//
//	1: the first.
const formatVersion = 1

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// sealed puts a version before and a crc32c behind a value:
//
//	version u8 | value | crc32c u32 of all before
func sealed(v []byte) []byte {
	b := append(make([]byte, 0, len(v)+5), formatVersion)
	b = append(b, v...)
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// unseal returns a copy of the value.
func unseal(b []byte) ([]byte, error) {
	if len(b) < 5 {
		return nil, holdfast.Errorf(holdfast.ErrIntegrity, "a value of %d bytes", len(b))
	}
	body, sum := b[:len(b)-4], binary.LittleEndian.Uint32(b[len(b)-4:])
	if got := crc32.Checksum(body, castagnoli); got != sum {
		return nil, holdfast.Errorf(holdfast.ErrIntegrity, "the checksum is %08x, not %08x", got, sum)
	}
	if body[0] != formatVersion {
		return nil, holdfast.Errorf(holdfast.ErrUnsupported, "format version %d: this version reads %d", body[0], formatVersion)
	}
	return append([]byte(nil), body[1:]...), nil
}

// A log entry, sealed, little endian:
//
//	index u64 | term u64 | type u8 | appendedAt i64 (Unix ns, 0 unset) | extensions length u32 | extensions | data
const logHeader = 8 + 8 + 1 + 8 + 4

func encodeLog(l *raft.Log) []byte {
	b := make([]byte, 0, logHeader+len(l.Extensions)+len(l.Data))
	b = binary.LittleEndian.AppendUint64(b, l.Index)
	b = binary.LittleEndian.AppendUint64(b, l.Term)
	b = append(b, byte(l.Type))
	var at int64
	if !l.AppendedAt.IsZero() {
		at = l.AppendedAt.UnixNano()
	}
	b = binary.LittleEndian.AppendUint64(b, uint64(at))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(l.Extensions)))
	b = append(b, l.Extensions...)
	b = append(b, l.Data...)
	return sealed(b)
}

// decodeLog reads the entry that must be at index into l.
func decodeLog(index uint64, sealedBytes []byte, l *raft.Log) error {
	b, err := unseal(sealedBytes)
	if err != nil {
		return err
	}
	if len(b) < logHeader {
		return holdfast.Errorf(holdfast.ErrIntegrity, "a log entry of %d bytes", len(b))
	}
	if got := binary.LittleEndian.Uint64(b); got != index {
		return holdfast.Errorf(holdfast.ErrIntegrity, "the entry at %d says it is entry %d", index, got)
	}
	n := binary.LittleEndian.Uint32(b[25:])
	rest := b[logHeader:]
	if uint64(n) > uint64(len(rest)) {
		return holdfast.Errorf(holdfast.ErrIntegrity, "extensions of %d bytes in an entry of %d", n, len(b))
	}
	*l = raft.Log{Index: index, Term: binary.LittleEndian.Uint64(b[8:]), Type: raft.LogType(b[16])}
	if at := int64(binary.LittleEndian.Uint64(b[17:])); at != 0 {
		l.AppendedAt = time.Unix(0, at)
	}
	if n > 0 {
		l.Extensions = rest[:n:n]
	}
	if len(rest) > int(n) {
		l.Data = rest[n:]
	}
	return nil
}
