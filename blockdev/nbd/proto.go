package nbd

import (
	"encoding/binary"
	"strconv"
	"syscall"

	"github.com/holdfast-storage/holdfast/blockdev"
)

// Magic numbers, proto.md "Newstyle negotiation" and "Transmission phase".
const (
	magicInit       uint64 = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption     uint64 = 0x49484156454f5054 // "IHAVEOPT"
	magicOptReply   uint64 = 0x0003e889045565a9
	magicRequest    uint32 = 0x25609513
	magicSimple     uint32 = 0x67446698
	magicStructured uint32 = 0x668e33ef
)

// Handshake flags (server) and client flags.
const (
	flagFixedNewstyle uint16 = 1 << 0
	flagNoZeroes      uint16 = 1 << 1

	clientFixedNewstyle uint32 = 1 << 0
	clientNoZeroes      uint32 = 1 << 1
)

// option is what a client asks for while negotiating.
type option uint32

const (
	optExportName      option = 1
	optAbort           option = 2
	optList            option = 3
	optStartTLS        option = 5
	optInfo            option = 6
	optGo              option = 7
	optStructuredReply option = 8
	optListMetaContext option = 10
	optSetMetaContext  option = 11
)

// optReply is how the server answers an option.
type optReply uint32

const (
	repAck         optReply = 1
	repServer      optReply = 2
	repInfo        optReply = 3
	repErrUnsup    optReply = 1<<31 + 1
	repErrPolicy   optReply = 1<<31 + 2
	repErrInvalid  optReply = 1<<31 + 3
	repErrUnknown  optReply = 1<<31 + 6
	repErrShutdown optReply = 1<<31 + 7
	repErrTooBig   optReply = 1<<31 + 9
)

// Kinds of information in NBD_REP_INFO.
const (
	infoExport      uint16 = 0
	infoName        uint16 = 1
	infoDescription uint16 = 2
	infoBlockSize   uint16 = 3
)

// Transmission flags.
const (
	transHasFlags        uint16 = 1 << 0
	transReadOnly        uint16 = 1 << 1
	transSendFlush       uint16 = 1 << 2
	transSendFUA         uint16 = 1 << 3
	transSendTrim        uint16 = 1 << 5
	transSendWriteZeroes uint16 = 1 << 6
	transSendDF          uint16 = 1 << 7
	transCanMultiConn    uint16 = 1 << 8
)

// command is the type of a request.
type command uint16

const (
	cmdRead        command = 0
	cmdWrite       command = 1
	cmdDisc        command = 2
	cmdFlush       command = 3
	cmdTrim        command = 4
	cmdWriteZeroes command = 6
)

// String returns the command as proto.md calls it.
func (c command) String() string {
	switch c {
	case cmdRead:
		return "READ"
	case cmdWrite:
		return "WRITE"
	case cmdDisc:
		return "DISC"
	case cmdFlush:
		return "FLUSH"
	case cmdTrim:
		return "TRIM"
	case cmdWriteZeroes:
		return "WRITE_ZEROES"
	default:
		return "command " + strconv.Itoa(int(c))
	}
}

// Command flags.
const (
	cmdFlagFUA    uint16 = 1 << 0
	cmdFlagNoHole uint16 = 1 << 1
	cmdFlagDF     uint16 = 1 << 2
)

// Structured replies.
const (
	replyFlagDone uint16 = 1 << 0

	replyTypeNone       uint16 = 0
	replyTypeOffsetData uint16 = 1
	replyTypeError      uint16 = 1<<15 + 1
)

// wireError is an error number as NBD writes it, proto.md "Error values". They
// equal Linux's on most architectures, but are the protocol's own.
type wireError uint32

const (
	wireOK       wireError = 0
	wirePerm     wireError = 1
	wireIO       wireError = 5
	wireNoMem    wireError = 12
	wireInvalid  wireError = 22
	wireNoSpace  wireError = 28
	wireOverflow wireError = 75
	wireNotSup   wireError = 95
	wireShutdown wireError = 108
)

// toWire maps what a Device returned to what its client is told.
func toWire(err error) wireError {
	switch blockdev.Errno(err) {
	case 0:
		return wireOK
	case syscall.EPERM, syscall.EACCES, syscall.EROFS:
		return wirePerm
	case syscall.ENOMEM:
		return wireNoMem
	case syscall.EINVAL:
		return wireInvalid
	case syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG:
		return wireNoSpace
	case syscall.EOVERFLOW:
		return wireOverflow
	case syscall.ENOTSUP:
		return wireNotSup
	case syscall.ESHUTDOWN:
		return wireShutdown
	default:
		return wireIO
	}
}

// Sizes and limits of the protocol.
const (
	// minBlock is the smallest block size announced; requests of any alignment
	// are served nevertheless.
	minBlock = 512
	// preferredBlock is the size below which a write costs a read as well.
	preferredBlock = 4096
	// maxPayload is the largest payload of one READ or WRITE. proto.md has
	// clients assume 32 MiB where a server says nothing.
	maxPayload = 32 << 20
	// maxName bounds export names; proto.md limits strings to 4096 bytes.
	maxName = 4096
	// maxOptionData bounds the data of one option: a name, a few queries or
	// information requests. Longer data ends the connection.
	maxOptionData = 64 << 10
	// maxOptions bounds how often one connection may ask before it enters
	// transmission; clients send fewer than ten.
	maxOptions = 128
	// zeroPadding follows EXPORT_NAME's answer unless NO_ZEROES was agreed.
	zeroPadding = 124
)

// request is the header of a request in transmission.
//
//	0         4       6      8                16               24       28
//	+---------+-------+------+----------------+----------------+--------+
//	| magic   | flags | type | handle         | offset         | length | payload of a WRITE
//	+---------+-------+------+----------------+----------------+--------+
type request struct {
	flags  uint16
	cmd    command
	handle uint64
	offset uint64
	length uint32
}

const requestSize = 28

// decodeRequest reads a header of requestSize bytes; ok is false if the magic
// is wrong, after which the stream cannot be followed.
func decodeRequest(b []byte) (r request, ok bool) {
	be := binary.BigEndian
	if be.Uint32(b) != magicRequest {
		return r, false
	}
	return request{
		flags:  be.Uint16(b[4:]),
		cmd:    command(be.Uint16(b[6:])),
		handle: be.Uint64(b[8:]),
		offset: be.Uint64(b[16:]),
		length: be.Uint32(b[24:]),
	}, true
}

// appendSimpleReply appends the header of a simple reply; the data of a
// successful READ follows it.
//
//	0         4       8                16
//	+---------+-------+----------------+
//	| magic   | error | handle         | data
//	+---------+-------+----------------+
func appendSimpleReply(b []byte, handle uint64, e wireError) []byte {
	be := binary.BigEndian
	b = be.AppendUint32(b, magicSimple)
	b = be.AppendUint32(b, uint32(e))
	return be.AppendUint64(b, handle)
}

// appendChunk appends the header of a structured reply chunk.
//
//	0         4       6      8                16       20
//	+---------+-------+------+----------------+--------+
//	| magic   | flags | type | handle         | length | payload
//	+---------+-------+------+----------------+--------+
func appendChunk(b []byte, flags, typ uint16, handle uint64, length uint32) []byte {
	be := binary.BigEndian
	b = be.AppendUint32(b, magicStructured)
	b = be.AppendUint16(b, flags)
	b = be.AppendUint16(b, typ)
	b = be.AppendUint64(b, handle)
	return be.AppendUint32(b, length)
}

// appendDataChunk appends the header of the one content chunk that answers a
// READ; n bytes of data, n > 0, follow it.
func appendDataChunk(b []byte, handle, offset uint64, n uint32) []byte {
	b = appendChunk(b, replyFlagDone, replyTypeOffsetData, handle, n+8)
	return binary.BigEndian.AppendUint64(b, offset)
}

// appendErrorChunk appends a whole reply that says e, and message if any.
//
//	after the header:  0       4        6
//	                   +-------+--------+
//	                   | error | length | message
//	                   +-------+--------+
func appendErrorChunk(b []byte, handle uint64, e wireError, message string) []byte {
	b = appendChunk(b, replyFlagDone, replyTypeError, handle, uint32(6+len(message)))
	b = binary.BigEndian.AppendUint32(b, uint32(e))
	b = binary.BigEndian.AppendUint16(b, uint16(len(message)))
	return append(b, message...)
}
