package hostdev

import (
	"encoding/binary"
	"fmt"

	"github.com/holdfast-storage/holdfast"
)

// The FUSE protocol, as far as one regular file needs it. All numbers are in
// host byte order: the peer is this machine's kernel.

type opcode uint32

const (
	opForget      opcode = 2
	opGetattr     opcode = 3
	opSetattr     opcode = 4
	opOpen        opcode = 14
	opRead        opcode = 15
	opWrite       opcode = 16
	opStatfs      opcode = 17
	opRelease     opcode = 18
	opFsync       opcode = 20
	opFlush       opcode = 25
	opInit        opcode = 26
	opInterrupt   opcode = 36
	opDestroy     opcode = 38
	opBatchForget opcode = 42
	opFallocate   opcode = 43
)

// Flags of INIT. The kernel's 64 flags travel as two words.
const (
	initAsyncRead uint64 = 1 << 0
	initBigWrites uint64 = 1 << 5
	initAsyncDIO  uint64 = 1 << 15
	initMaxPages  uint64 = 1 << 22
	initExt       uint64 = 1 << 30
	initHasResend uint64 = 1 << 39

	wantedFlags = initAsyncRead | initBigWrites | initAsyncDIO | initMaxPages | initExt | initHasResend
	// neededFlags are those without which the file is not served at all.
	neededFlags = initAsyncRead | initBigWrites | initMaxPages
)

const (
	protocolMajor = 7
	// protocolMinor is what this server was written against; the kernel
	// answers to the lower of the two.
	protocolMinor = 45
	// minProtocolMinor is the first with max_pages (Linux 4.20).
	minProtocolMinor = 28

	// maxWrite is the largest payload of one request: one operation of a volume.
	maxWrite = holdfast.MaxOpSize
	maxPages = maxWrite / 4096
	// maxBackground is how many asynchronous requests the kernel sends at a
	// time; its default of 12 halves the speed of the loop device.
	maxBackground = 256
	congestion    = 192

	rootNode = 1
	// notifyResend is FUSE_NOTIFY_RESEND (Linux 6.9).
	notifyResend = 7

	inHeaderSize  = 40
	outHeaderSize = 16
	writeInSize   = 40
	// requestHead is the fixed part of a WRITE request: what precedes its payload.
	requestHead = inHeaderSize + writeInSize
	attrOutSize = 104
	statfsSize  = 80
	openOutSize = 16
	initOutSize = 64

	fattrSize = 1 << 3 // FATTR_SIZE

	fallocKeepSize  = 0x01
	fallocPunchHole = 0x02
	fallocZeroRange = 0x10

	// attrValidSeconds is how long the kernel may keep the file's attributes;
	// only the size matters, and nobody but this server changes it.
	attrValidSeconds = 3600
)

var order = binary.NativeEndian

// inHeader is the first 40 bytes of every request.
//
//	0 len u32 | 4 opcode u32 | 8 unique u64 | 16 nodeid u64 | 24 uid u32 |
//	28 gid u32 | 32 pid u32 | 36 extension length u16, padding u16
type inHeader struct {
	Len    uint32
	Op     opcode
	Unique uint64 // bit 63 marks a resent request; it is echoed as it came
	Node   uint64
}

func parseInHeader(b []byte) (inHeader, error) {
	if len(b) < inHeaderSize {
		return inHeader{}, holdfast.Errorf(holdfast.ErrInternal, "request of %d bytes is shorter than its header", len(b))
	}
	h := inHeader{
		Len:    order.Uint32(b[0:]),
		Op:     opcode(order.Uint32(b[4:])),
		Unique: order.Uint64(b[8:]),
		Node:   order.Uint64(b[16:]),
	}
	if int(h.Len) != len(b) {
		return inHeader{}, holdfast.Errorf(holdfast.ErrInternal, "request says %d bytes, %d were read", h.Len, len(b))
	}
	return h, nil
}

// putOutHeader writes the 16 bytes before every reply: len u32, error i32
// (zero or a negated errno), unique u64.
func putOutHeader(b []byte, length int, errno int32, unique uint64) {
	order.PutUint32(b[0:], uint32(length))
	order.PutUint32(b[4:], uint32(errno))
	order.PutUint64(b[8:], unique)
}

// ioIn is the argument of READ and WRITE: fh u64 | offset u64 | size u32 |
// flags u32 | lock owner u64 | open flags u32 | padding u32.
type ioIn struct {
	Offset uint64
	Size   uint32
}

func parseIOIn(b []byte) (ioIn, bool) {
	if len(b) < writeInSize {
		return ioIn{}, false
	}
	return ioIn{Offset: order.Uint64(b[8:]), Size: order.Uint32(b[16:])}, true
}

// fallocateIn is fh u64 | offset u64 | length u64 | mode u32 | padding u32.
type fallocateIn struct {
	Offset, Length uint64
	Mode           uint32
}

func parseFallocateIn(b []byte) (fallocateIn, bool) {
	if len(b) < 32 {
		return fallocateIn{}, false
	}
	return fallocateIn{Offset: order.Uint64(b[8:]), Length: order.Uint64(b[16:]), Mode: order.Uint32(b[24:])}, true
}

// parseSetattrIn returns which attributes are to change and the new size:
// valid u32 | padding u32 | fh u64 | size u64 | ...
func parseSetattrIn(b []byte) (valid uint32, size uint64, ok bool) {
	if len(b) < 24 {
		return 0, 0, false
	}
	return order.Uint32(b[0:]), order.Uint64(b[16:]), true
}

// initIn is major u32 | minor u32 | max_readahead u32 | flags u32 | flags2 u32 | ...
type initIn struct {
	Major, Minor, ReadAhead uint32
	Flags                   uint64
}

func parseInitIn(b []byte) (initIn, error) {
	if len(b) < 16 {
		return initIn{}, holdfast.Errorf(holdfast.ErrUnsupported, "the kernel's FUSE INIT has %d bytes", len(b))
	}
	in := initIn{
		Major:     order.Uint32(b[0:]),
		Minor:     order.Uint32(b[4:]),
		ReadAhead: order.Uint32(b[8:]),
		Flags:     uint64(order.Uint32(b[12:])),
	}
	if in.Flags&initExt != 0 && len(b) >= 20 {
		in.Flags |= uint64(order.Uint32(b[16:])) << 32
	}
	return in, nil
}

// Params are what INIT settled for one connection; they travel with its
// descriptor when a daemon takes it over.
type Params struct {
	// Minor is the protocol's minor version in use.
	Minor uint32 `json:"minor"`
	// Flags are the INIT flags that both sides have.
	Flags uint64 `json:"flags"`
	// MaxWrite is the largest payload of one request, in bytes.
	MaxWrite uint32 `json:"max_write"`
}

// CanResend says whether the kernel can repeat what a dead server had read
// (Linux 6.9 and later). Without it a device does not outlive its daemon.
func (p Params) CanResend() bool { return p.Flags&initHasResend != 0 }

// settle answers the kernel's INIT.
//
//	reply: major u32 | minor u32 | max_readahead u32 | flags u32 |
//	max_background u16 | congestion u16 | max_write u32 | time_gran u32 |
//	max_pages u16 | map_alignment u16 | flags2 u32 | 28 bytes of zeroes
func settle(in initIn) (Params, []byte, error) {
	remedy := "holdfast needs Linux 5.8 for kernel devices; export the volume over NBD instead"
	if in.Major != protocolMajor || in.Minor < minProtocolMinor {
		return Params{}, nil, holdfast.Errorf(holdfast.ErrUnsupported, "this kernel speaks FUSE %d.%d", in.Major, in.Minor).WithRemedy("%s", remedy)
	}
	if in.Flags&neededFlags != neededFlags {
		return Params{}, nil, holdfast.Errorf(holdfast.ErrUnsupported, "this kernel's FUSE lacks flags %#x", neededFlags&^in.Flags).WithRemedy("%s", remedy)
	}
	p := Params{Minor: min(in.Minor, protocolMinor), Flags: in.Flags & wantedFlags, MaxWrite: maxWrite}
	out := make([]byte, initOutSize)
	order.PutUint32(out[0:], protocolMajor)
	order.PutUint32(out[4:], p.Minor)
	order.PutUint32(out[8:], in.ReadAhead)
	order.PutUint32(out[12:], uint32(p.Flags))
	order.PutUint16(out[16:], maxBackground)
	order.PutUint16(out[18:], congestion)
	order.PutUint32(out[20:], p.MaxWrite)
	order.PutUint32(out[24:], 1)
	order.PutUint16(out[28:], maxPages)
	order.PutUint32(out[32:], uint32(p.Flags>>32))
	return p, out, nil
}

// putAttr writes the reply to GETATTR and SETATTR.
//
//	valid u64 | valid_nsec u32 | pad u32 | ino u64 | size u64 | blocks u64 |
//	atime mtime ctime u64 | their nanoseconds 3 u32 | mode u32 | nlink u32 |
//	uid u32 | gid u32 | rdev u32 | blksize u32 | flags u32
func putAttr(b []byte, size int64) {
	clear(b[:attrOutSize])
	order.PutUint64(b[0:], attrValidSeconds)
	a := b[16:]
	order.PutUint64(a[0:], rootNode)
	order.PutUint64(a[8:], uint64(size))
	order.PutUint64(a[16:], uint64(size)/512)
	order.PutUint32(a[60:], fileMode)
	order.PutUint32(a[64:], 1)
	order.PutUint32(a[80:], holdfast.BlockSize)
}

// fileMode is a regular file that only root opens.
const fileMode = 0o100600

// putStatfs writes the reply to STATFS: blocks, bfree, bavail, files, ffree
// u64 | bsize u32 | namelen u32 | frsize u32 | 28 bytes of zeroes. The loop
// device takes bsize as its discard granularity.
func putStatfs(b []byte, size int64) {
	clear(b[:statfsSize])
	order.PutUint64(b[0:], uint64(size)/holdfast.BlockSize)
	order.PutUint64(b[24:], 1)
	order.PutUint32(b[40:], holdfast.BlockSize)
	order.PutUint32(b[44:], 255)
	order.PutUint32(b[48:], holdfast.BlockSize)
}

func (op opcode) String() string {
	names := map[opcode]string{
		opForget: "FORGET", opGetattr: "GETATTR", opSetattr: "SETATTR", opOpen: "OPEN", opRead: "READ", opWrite: "WRITE",
		opStatfs: "STATFS", opRelease: "RELEASE", opFsync: "FSYNC", opFlush: "FLUSH", opInit: "INIT", opInterrupt: "INTERRUPT",
		opDestroy: "DESTROY", opBatchForget: "BATCH_FORGET", opFallocate: "FALLOCATE",
	}
	if n, ok := names[op]; ok {
		return n
	}
	return fmt.Sprintf("opcode %d", uint32(op))
}
