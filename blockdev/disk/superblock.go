package disk

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// formatVersion is the version of the disk's format; its history:
//
//	1  first
const formatVersion = 1

// Places of the superblock's copies and of what follows them.
const (
	superSize  = vfs.PageSize
	superA     = 0
	superB     = 512 << 10
	headerArea = 1 << 20 // the copies and what later versions put beside them
)

const superMagic = "HOLDFAST"

// superFailed in flags: an I/O error was seen; nothing here is intact again.
const superFailed = 1

// Feature words. A set bit that this version does not know means: compat, go
// on; roCompat, do not write (readonly.go); incompat, do not open.
const (
	knownRoCompat = 0
	knownIncompat = 0
)

// superblock is the disk's identity and geometry, 4096 bytes, little-endian. Bytes
// 0 to 47 mean the same in every version, so that any program can tell that it
// must not touch the rest:
//
//	  0  8  "HOLDFAST"
//	  8  4  crc32c of the 4096 bytes with this field zero
//	 12  4  format version
//	 16  8  generation: the valid copy with the higher one counts
//	 24  8  compat features
//	 32  8  ro_compat features
//	 40  8  incompat features
//	 48 16  cluster
//	 64 16  disk
//	 80 16  node
//	 96  8  openCount
//	104 40  boot id of the last open, text, zero padded
//	144  8  size of the disk in bytes
//	152  8  place of the WAL: 0, in files beside the image; else its offset
//	160  8  size of a WAL file
//	168  4  number of WAL files
//	172  4  flags: 1 failed
//	176  8  offset of chunk 0
//	184  8  number of chunks
//	192  8  walSerial up to which the log was durable when the disk was last opened
//	200     zero
type superblock struct {
	version                    uint32
	generation                 uint64
	compat, roCompat, incompat uint64
	cluster                    holdfast.ClusterID
	disk                       holdfast.DiskID
	node                       holdfast.NodeID
	openCount                  holdfast.OpenCount
	bootID                     string
	size                       int64
	walOffset                  int64
	slotSize                   int64
	slots                      uint32
	flags                      uint32
	dataOffset                 int64
	chunks                     int64
	walDurable                 uint64
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func (s *superblock) encode() []byte {
	b := vfs.AlignedBuffer(superSize)
	le := binary.LittleEndian
	copy(b, superMagic)
	le.PutUint32(b[12:], s.version)
	le.PutUint64(b[16:], s.generation)
	le.PutUint64(b[24:], s.compat)
	le.PutUint64(b[32:], s.roCompat)
	le.PutUint64(b[40:], s.incompat)
	copy(b[48:], s.cluster[:])
	copy(b[64:], s.disk[:])
	copy(b[80:], s.node[:])
	le.PutUint64(b[96:], uint64(s.openCount))
	copy(b[104:144], s.bootID)
	le.PutUint64(b[144:], uint64(s.size))
	le.PutUint64(b[152:], uint64(s.walOffset))
	le.PutUint64(b[160:], uint64(s.slotSize))
	le.PutUint32(b[168:], s.slots)
	le.PutUint32(b[172:], s.flags)
	le.PutUint64(b[176:], uint64(s.dataOffset))
	le.PutUint64(b[184:], uint64(s.chunks))
	le.PutUint64(b[192:], s.walDurable)
	le.PutUint32(b[8:], crc32.Checksum(b, castagnoli))
	return b
}

// Limits on what a superblock may say.
const (
	maxSlots  = 1 << 16
	maxChunks = 1 << 32 // phys is 32 bits
	// maxSerial and maxSeq are so far off that they are never reached, and that no
	// sum overflows.
	maxSerial = 1 << 62
	maxSeq    = 1 << 62
)

// decodeSuperblock reads one copy. The error says what is wrong with it.
func decodeSuperblock(b []byte) (*superblock, error) {
	if len(b) != superSize || string(b[:8]) != superMagic {
		return nil, holdfast.Errorf(holdfast.ErrIntegrity, "no holdfast superblock")
	}
	le := binary.LittleEndian
	c := make([]byte, superSize)
	copy(c, b)
	clear(c[8:12])
	if le.Uint32(b[8:]) != crc32.Checksum(c, castagnoli) {
		return nil, holdfast.Errorf(holdfast.ErrIntegrity, "superblock does not match its checksum")
	}
	s := &superblock{
		version:    le.Uint32(b[12:]),
		generation: le.Uint64(b[16:]),
		compat:     le.Uint64(b[24:]),
		roCompat:   le.Uint64(b[32:]),
		incompat:   le.Uint64(b[40:]),
		cluster:    holdfast.ClusterID(b[48:64]),
		disk:       holdfast.DiskID(b[64:80]),
		node:       holdfast.NodeID(b[80:96]),
		openCount:  holdfast.OpenCount(le.Uint64(b[96:])),
		size:       int64(le.Uint64(b[144:])),
		walOffset:  int64(le.Uint64(b[152:])),
		slotSize:   int64(le.Uint64(b[160:])),
		slots:      le.Uint32(b[168:]),
		flags:      le.Uint32(b[172:]),
		dataOffset: int64(le.Uint64(b[176:])),
		chunks:     int64(le.Uint64(b[184:])),
		walDurable: le.Uint64(b[192:]),
	}
	s.bootID = text(b[104:144])
	if s.version != formatVersion {
		return nil, holdfast.Errorf(holdfast.ErrUnsupported, "it has disk format version %d, and this program reads version %d", s.version, formatVersion).
			WithRemedy("run the release that wrote it, or a later one")
	}
	if unknown := s.incompat &^ knownIncompat; unknown != 0 {
		return nil, holdfast.Errorf(holdfast.ErrUnsupported, "its incompat features %s are not known to this program (format version %d)", bitsOf(unknown), formatVersion).
			WithRemedy("run the release that wrote it, or a later one")
	}
	switch {
	case s.slots < 2 || s.slots > maxSlots,
		s.slotSize < minSlotSize || s.slotSize > maxSlotSize || s.slotSize%vfs.PageSize != 0,
		s.chunks < 1 || s.chunks > maxChunks,
		s.walDurable > maxSerial,
		s.walOffset != 0 && (s.walOffset < headerArea || s.walOffset%vfs.PageSize != 0 || s.walOffset > s.dataOffset-int64(s.slots)*s.slotSize),
		s.dataOffset < headerArea || s.dataOffset > s.size || s.dataOffset%vfs.PageSize != 0,
		s.chunks > (s.size-s.dataOffset)/holdfast.ChunkSize:
		return nil, holdfast.Errorf(holdfast.ErrIntegrity, "superblock contradicts itself")
	}
	return s, nil
}

// text returns the bytes up to the first zero.
func text(b []byte) string {
	for i, c := range b {
		if c == 0 {
			return string(b[:i])
		}
	}
	return string(b)
}

// readSuperblock returns the newest valid copy. Damage to one copy is
// tolerated: the other is of this or the previous generation.
func readSuperblock(f vfs.File) (*superblock, error) {
	var best *superblock
	var firstErr error
	for _, off := range []int64{superA, superB} {
		b := vfs.AlignedBuffer(superSize)
		_, err := f.ReadDirectAt(b, off)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			firstErr = firstOf(firstErr, holdfast.Errorf(holdfast.ErrIntegrity, "no holdfast superblock: it ends before byte %d", off+superSize))
			continue
		}
		if err != nil {
			firstErr = firstOf(firstErr, holdfast.Errorf(holdfast.ErrIO, "read superblock at %d: %w", off, err))
			continue
		}
		s, err := decodeSuperblock(b)
		if err != nil {
			firstErr = firstOf(firstErr, err)
			if holdfast.KindOf(err) == holdfast.ErrUnsupported {
				return nil, err
			}
			continue
		}
		if best == nil || s.generation > best.generation {
			best = s
		}
	}
	if best == nil {
		return nil, firstErr
	}
	return best, nil
}

// writeSuperblock raises the generation and writes both copies, one durable
// before the other is touched.
func writeSuperblock(f vfs.File, s *superblock) error {
	s.generation++
	b := s.encode()
	for _, off := range []int64{superA, superB} {
		if _, err := f.WriteAt(b, off); err != nil {
			return holdfast.Errorf(holdfast.ErrIO, "write superblock at %d: %w", off, err)
		}
		if err := f.Sync(); err != nil {
			return holdfast.Errorf(holdfast.ErrIO, "sync superblock at %d: %w", off, err)
		}
	}
	return nil
}

func firstOf(a, b error) error {
	if a != nil {
		return a
	}
	return b
}
