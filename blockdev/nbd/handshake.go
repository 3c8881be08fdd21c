package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"
)

// negotiation is the state of option haggling on one connection.
type negotiation struct {
	c          *conn
	fixed      bool // the client speaks fixed newstyle
	noZeroes   bool
	structured bool
	export     *export // entered; set by the option that ends haggling
}

// errEnd ends a connection with nothing to report: the client said goodbye, or
// it asked for what can only be answered by hanging up and was told why before.
var errEnd = errors.New("negotiation ended")

// negotiate runs the handshake and option haggling. On success the connection
// is in its export's set and n.export is set.
func (c *conn) negotiate() (*negotiation, error) {
	n := &negotiation{c: c}
	// One deadline for all of it: a client that dribbles bytes cannot hold a
	// connection longer than one that is silent.
	limit := time.Now().Add(c.s.opts.HandshakeTimeout)
	if err := c.setDeadlines(limit, limit); err != nil {
		return nil, err
	}
	hello := binary.BigEndian.AppendUint64(nil, magicInit)
	hello = binary.BigEndian.AppendUint64(hello, magicOption)
	hello = binary.BigEndian.AppendUint16(hello, flagFixedNewstyle|flagNoZeroes)
	if _, err := c.nc.Write(hello); err != nil {
		return nil, err
	}
	var word [4]byte
	if _, err := io.ReadFull(c.nc, word[:]); err != nil {
		return nil, err
	}
	flags := binary.BigEndian.Uint32(word[:])
	if unknown := flags &^ (clientFixedNewstyle | clientNoZeroes); unknown != 0 {
		return nil, fmt.Errorf("unknown client flags %#x", unknown)
	}
	n.fixed = flags&clientFixedNewstyle != 0
	n.noZeroes = flags&clientNoZeroes != 0

	for range maxOptions {
		opt, data, err := n.readOption()
		if err != nil {
			return nil, err
		}
		if !n.fixed && opt != optExportName {
			return nil, fmt.Errorf("option %d without fixed newstyle", opt)
		}
		if err := handlerOf(opt)(n, opt, data); err != nil {
			return nil, err
		}
		if n.export != nil {
			return n, nil
		}
	}
	return nil, fmt.Errorf("more than %d options", maxOptions)
}

// readOption reads one option.
//
//	0                8        12       16
//	+----------------+--------+--------+
//	| IHAVEOPT       | option | length | data
//	+----------------+--------+--------+
func (n *negotiation) readOption() (option, []byte, error) {
	var header [16]byte
	if _, err := io.ReadFull(n.c.nc, header[:]); err != nil {
		return 0, nil, err
	}
	if magic := binary.BigEndian.Uint64(header[:]); magic != magicOption {
		return 0, nil, fmt.Errorf("option magic is %#x", magic)
	}
	opt := option(binary.BigEndian.Uint32(header[8:]))
	length := binary.BigEndian.Uint32(header[12:])
	if length > maxOptionData {
		return 0, nil, fmt.Errorf("option %d has %d bytes of data, the limit is %d", opt, length, maxOptionData)
	}
	data := make([]byte, length)
	_, err := io.ReadFull(n.c.nc, data)
	return opt, data, err
}

// reply sends one option reply.
//
//	0                8        12       16       20
//	+----------------+--------+--------+--------+
//	| 3e889045565a9  | option | type   | length | data
//	+----------------+--------+--------+--------+
func (n *negotiation) reply(opt option, typ optReply, data []byte) error {
	b := make([]byte, 0, 20+len(data))
	b = binary.BigEndian.AppendUint64(b, magicOptReply)
	b = binary.BigEndian.AppendUint32(b, uint32(opt))
	b = binary.BigEndian.AppendUint32(b, uint32(typ))
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	_, err := n.c.nc.Write(append(b, data...))
	return err
}

// refuse sends an error reply with a message for people.
func (n *negotiation) refuse(opt option, typ optReply, format string, args ...any) error {
	return n.reply(opt, typ, fmt.Appendf(nil, format, args...))
}

// answer handles one option whose data has been read. After a nil error
// haggling goes on, unless n.export is set.
type answer func(n *negotiation, opt option, data []byte) error

// handlerOf is the table of options.
func handlerOf(opt option) answer {
	switch opt {
	case optExportName:
		return (*negotiation).exportName
	case optAbort:
		return (*negotiation).abort
	case optList:
		return (*negotiation).list
	case optStartTLS:
		return (*negotiation).startTLS
	case optInfo, optGo:
		return (*negotiation).infoOrGo
	case optStructuredReply:
		return (*negotiation).structuredReply
	case optListMetaContext, optSetMetaContext:
		return (*negotiation).metaContext
	default:
		return (*negotiation).unsupported
	}
}

func (n *negotiation) unsupported(opt option, _ []byte) error {
	return n.refuse(opt, repErrUnsup, "option %d is not supported", opt)
}

// startTLS is refused by policy: the server listens where clear text is right
// (a unix socket, loopback) or was asked for.
func (n *negotiation) startTLS(opt option, data []byte) error {
	if len(data) != 0 {
		return n.refuse(opt, repErrInvalid, "STARTTLS takes no data")
	}
	return n.refuse(opt, repErrPolicy, "TLS is not available on this server")
}

func (n *negotiation) abort(opt option, _ []byte) error {
	// The client may have gone already: the answer is a courtesy.
	_ = n.reply(opt, repAck, nil)
	return errEnd
}

func (n *negotiation) structuredReply(opt option, data []byte) error {
	if len(data) != 0 {
		return n.refuse(opt, repErrInvalid, "STRUCTURED_REPLY takes no data")
	}
	n.structured = true
	return n.reply(opt, repAck, nil)
}

func (n *negotiation) list(opt option, data []byte) error {
	if len(data) != 0 {
		return n.refuse(opt, repErrInvalid, "LIST takes no data")
	}
	for _, name := range n.c.s.Exports() {
		e := n.c.s.export(name)
		if e == nil {
			continue // removed meanwhile
		}
		b := appendString(nil, name)
		if err := n.reply(opt, repServer, append(b, e.Description...)); err != nil {
			return err
		}
	}
	return n.reply(opt, repAck, nil)
}

// exportName enters transmission at once. It knows no error: whatever is wrong
// ends the connection.
//
//	0      8       10
//	+------+-------+
//	| size | flags | 124 zeroes unless NO_ZEROES
//	+------+-------+
func (n *negotiation) exportName(_ option, data []byte) error {
	if len(data) > maxName {
		return fmt.Errorf("export name of %d bytes", len(data))
	}
	e := n.c.s.export(string(data))
	if e == nil {
		return fmt.Errorf("no export %q", data)
	}
	if err := n.enter(e); err != nil {
		return err
	}
	b := binary.BigEndian.AppendUint64(nil, uint64(e.dev.Size()))
	b = binary.BigEndian.AppendUint16(b, e.transmissionFlags(n.structured))
	if !n.noZeroes {
		b = append(b, make([]byte, zeroPadding)...)
	}
	_, err := n.c.nc.Write(b)
	return err
}

// infoOrGo tells of an export and, for GO, enters transmission.
//
//	0        4      4+L     6+L
//	+--------+------+-------+------------------+
//	| length | name | count | count kinds, u16 |
//	+--------+------+-------+------------------+
func (n *negotiation) infoOrGo(opt option, data []byte) error {
	name, rest, ok := cutString(data)
	if !ok || len(rest) < 2 || len(rest)-2 != 2*int(binary.BigEndian.Uint16(rest)) {
		return n.refuse(opt, repErrInvalid, "the lengths in the option disagree")
	}
	if len(name) > maxName {
		return n.refuse(opt, repErrTooBig, "the name has %d bytes, the limit is %d", len(name), maxName)
	}
	e := n.c.s.export(name)
	if e == nil {
		return n.refuse(opt, repErrUnknown, "no export %q", name)
	}
	wanted := make(map[uint16]bool)
	for kinds := rest[2:]; len(kinds) > 0; kinds = kinds[2:] {
		wanted[binary.BigEndian.Uint16(kinds)] = true
	}
	if opt == optGo {
		// Entering comes before the first reply, so that the size told is not
		// older than the wait.
		if err := n.enter(e); err != nil {
			_ = n.refuse(opt, repErrShutdown, "%v", err)
			return err
		}
	}
	if err := n.sendInfo(opt, e, wanted); err != nil {
		return err
	}
	return n.reply(opt, repAck, nil)
}

// sendInfo sends what there is to know of an export: EXPORT always, as proto.md
// demands, the rest if wanted.
func (n *negotiation) sendInfo(opt option, e *export, wanted map[uint16]bool) error {
	be := binary.BigEndian
	b := be.AppendUint16(nil, infoExport)
	b = be.AppendUint64(b, uint64(e.dev.Size()))
	b = be.AppendUint16(b, e.transmissionFlags(n.structured))
	if err := n.reply(opt, repInfo, b); err != nil {
		return err
	}
	if wanted[infoName] {
		if err := n.reply(opt, repInfo, append(be.AppendUint16(nil, infoName), e.Name...)); err != nil {
			return err
		}
	}
	if wanted[infoDescription] && e.Description != "" {
		if err := n.reply(opt, repInfo, append(be.AppendUint16(nil, infoDescription), e.Description...)); err != nil {
			return err
		}
	}
	if wanted[infoBlockSize] {
		least, preferred, most := e.blockSizes()
		b := be.AppendUint16(nil, infoBlockSize)
		b = be.AppendUint32(b, least)
		b = be.AppendUint32(b, preferred)
		b = be.AppendUint32(b, most)
		return n.reply(opt, repInfo, b)
	}
	return nil
}

// metaContext answers both meta context options: no context is offered, so
// every well-formed query selects none.
//
//	0        4      4+L     8+L
//	+--------+------+-------+-------------------------+
//	| length | name | count | count of (length, text) |
//	+--------+------+-------+-------------------------+
func (n *negotiation) metaContext(opt option, data []byte) error {
	if !n.structured {
		return n.refuse(opt, repErrInvalid, "meta contexts need structured replies first")
	}
	name, rest, ok := cutString(data)
	if !ok || len(rest) < 4 {
		return n.refuse(opt, repErrInvalid, "the lengths in the option disagree")
	}
	count := binary.BigEndian.Uint32(rest)
	rest = rest[4:]
	for range count {
		if _, rest, ok = cutString(rest); !ok {
			return n.refuse(opt, repErrInvalid, "the lengths in the option disagree")
		}
	}
	if len(rest) != 0 {
		return n.refuse(opt, repErrInvalid, "%d bytes after the last query", len(rest))
	}
	if n.c.s.export(name) == nil {
		return n.refuse(opt, repErrUnknown, "no export %q", name)
	}
	return n.reply(opt, repAck, nil)
}

// cutString takes a string with its 32-bit length off the front of b.
func cutString(b []byte) (s string, rest []byte, ok bool) {
	if len(b) < 4 {
		return "", nil, false
	}
	length := binary.BigEndian.Uint32(b)
	if uint64(length) > uint64(len(b)-4) {
		return "", nil, false
	}
	return string(b[4 : 4+length]), b[4+length:], true
}

// appendString is the opposite of cutString.
func appendString(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint32(b, uint32(len(s))), s...)
}
