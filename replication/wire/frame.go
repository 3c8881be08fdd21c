package wire

import (
	"encoding/binary"
	"fmt"
	"io"

	"github.com/holdfast-storage/holdfast"
)

// Version is the version of the frame and of every message in it. A peer of
// another version is refused at HELLO.
type Version uint8

// Version1 is the first version: the frames and messages of FORMAT.md.
const Version1 Version = 1

// Sizes of a frame, in bytes.
const (
	// HeaderSize is the fixed part of every frame.
	HeaderSize = 48
	// MaxBody bounds the message fields. The largest body is an APPEND of
	// MaxEntries one-block entries (10 KiB) or a CHUNKS list of MaxChunkRefs.
	MaxBody = 64 << 10
	// MaxPayload bounds the data of one frame: one largest operation.
	MaxPayload = holdfast.MaxOpSize
)

// magic starts every frame: "HFw" and a zero.
const magic = 0x48467700

// Header is the fixed part of a frame.
//
//	 0  magic "HFw\0"           u32
//	 4  version                 u8
//	 5  type                    u8
//	 6  flags, zero             u16
//	 8  body length             u32
//	12  payload length          u32
//	16  epoch                   u64
//	24  connection nonce        u64
//	32  request, zero for none  u64
//	40  crc32c of the body      u32
//	44  crc32c of bytes 0..43   u32
//
// All integers are big endian.
type Header struct {
	Type    Type
	Body    int // bytes of message fields that follow
	Payload int // bytes of data behind them
	Epoch   holdfast.Epoch
	Nonce   Nonce
	Request RequestID
	bodySum uint32
}

// Nonce names one connection; the dialling side draws it at random.
type Nonce uint64

// RequestID matches a reply to its request within a connection; zero where
// nothing is matched.
type RequestID uint64

// put writes the header to p, which holds HeaderSize bytes.
func (h Header) put(p []byte) {
	be := binary.BigEndian
	be.PutUint32(p[0:], magic)
	p[4], p[5] = byte(Version1), byte(h.Type)
	be.PutUint16(p[6:], 0)
	be.PutUint32(p[8:], uint32(h.Body))
	be.PutUint32(p[12:], uint32(h.Payload))
	be.PutUint64(p[16:], uint64(h.Epoch))
	be.PutUint64(p[24:], uint64(h.Nonce))
	be.PutUint64(p[32:], uint64(h.Request))
	be.PutUint32(p[40:], h.bodySum)
	be.PutUint32(p[44:], Checksum(p[:44]))
}

// parseHeader reads a header from p, which holds HeaderSize bytes. The sum is
// compared before any field is believed.
func parseHeader(p []byte) (Header, error) {
	be := binary.BigEndian
	if got, want := Checksum(p[:44]), be.Uint32(p[44:]); got != want {
		return Header{}, holdfast.Errorf(holdfast.ErrIntegrity, "frame header: crc32c %08x, want %08x", got, want)
	}
	h := Header{
		Type:    Type(p[5]),
		Epoch:   holdfast.Epoch(be.Uint64(p[16:])),
		Nonce:   Nonce(be.Uint64(p[24:])),
		Request: RequestID(be.Uint64(p[32:])),
		bodySum: be.Uint32(p[40:]),
	}
	body, payload := be.Uint32(p[8:]), be.Uint32(p[12:])
	switch {
	case be.Uint32(p) != magic:
		return Header{}, holdfast.Errorf(holdfast.ErrInvalid, "frame starts with %08x, not a replication frame", be.Uint32(p))
	case Version(p[4]) != Version1:
		return Header{}, holdfast.Errorf(holdfast.ErrUnsupported, "frame version %d, this build speaks %d", p[4], Version1)
	case be.Uint16(p[6:]) != 0:
		return Header{}, holdfast.Errorf(holdfast.ErrUnsupported, "frame flags %04x are not known", be.Uint16(p[6:]))
	case body > MaxBody:
		return Header{}, holdfast.Errorf(holdfast.ErrInvalid, "frame body of %d bytes, at most %d", body, MaxBody)
	case payload > MaxPayload:
		return Header{}, holdfast.Errorf(holdfast.ErrInvalid, "frame payload of %d bytes, at most %d", payload, MaxPayload)
	}
	h.Body, h.Payload = int(body), int(payload)
	return h, nil
}

// readAhead is the size of a Reader's buffer: many small frames per read(2),
// and large payloads past it straight to their buffer.
const readAhead = 64 << 10

// Reader takes frames from a stream. It is not safe for concurrent use.
type Reader struct {
	from  io.Reader
	buf   []byte
	r, w  int // unread bytes are buf[r:w]
	body  []byte
	nonce Nonce
	bound bool
}

// NewReader returns a Reader of frames from r.
func NewReader(r io.Reader) *Reader {
	return &Reader{from: r, buf: make([]byte, readAhead)}
}

// Bind makes the reader refuse, with ErrInvalid, every later frame whose nonce
// is another's.
func (r *Reader) Bind(n Nonce) { r.nonce, r.bound = n, true }

// Ready reports whether Next can return without reading: a whole frame is here.
func (r *Reader) Ready() bool {
	have := r.w - r.r
	if have < HeaderSize {
		return false
	}
	p := r.buf[r.r:]
	body, payload := binary.BigEndian.Uint32(p[8:]), binary.BigEndian.Uint32(p[12:])
	return uint64(HeaderSize)+uint64(body)+uint64(payload) <= uint64(have)
}

// Next returns the next frame, decoded. A Message with payload owns a
// reference to its buffer: the caller gives it back with Message.Release. An
// error ends the stream: io.EOF between two frames, ErrIntegrity, ErrInvalid or
// ErrUnsupported for what arrived, or the stream's own error.
func (r *Reader) Next() (Header, Message, error) {
	if err := r.fill(HeaderSize); err != nil {
		return Header{}, nil, err
	}
	h, err := parseHeader(r.buf[r.r : r.r+HeaderSize])
	if err != nil {
		return Header{}, nil, err
	}
	if r.bound && h.Nonce != r.nonce {
		return Header{}, nil, holdfast.Errorf(holdfast.ErrInvalid, "%v frame of another connection (nonce %016x, want %016x)", h.Type, uint64(h.Nonce), uint64(r.nonce))
	}
	r.r += HeaderSize
	body, err := r.take(h.Body)
	if err != nil {
		return Header{}, nil, err
	}
	if got := Checksum(body); got != h.bodySum {
		return Header{}, nil, holdfast.Errorf(holdfast.ErrIntegrity, "%v frame body: crc32c %08x, want %08x", h.Type, got, h.bodySum)
	}
	var payload *Buffer
	if h.Payload > 0 {
		payload = NewBuffer(h.Payload)
		if err := r.read(payload.Bytes()); err != nil {
			payload.Release()
			return Header{}, nil, err
		}
	}
	m, err := decode(h, body, payload)
	if err != nil {
		payload.Release()
		return Header{}, nil, fmt.Errorf("decode %v frame: %w", h.Type, err)
	}
	return h, m, nil
}

// fill makes at least n bytes unread in the buffer. At the very start of a
// frame an ended stream is io.EOF; within one it is io.ErrUnexpectedEOF.
func (r *Reader) fill(n int) error {
	if r.r == r.w {
		r.r, r.w = 0, 0
	} else if len(r.buf)-r.r < n {
		r.w = copy(r.buf, r.buf[r.r:r.w])
		r.r = 0
	}
	for r.w-r.r < n {
		got, err := r.from.Read(r.buf[r.w:])
		r.w += got
		if err != nil && r.w-r.r < n {
			if err == io.EOF && r.w > r.r {
				return io.ErrUnexpectedEOF
			}
			return err
		}
	}
	return nil
}

// take returns the next n bytes (at most MaxBody), valid until the next call.
func (r *Reader) take(n int) ([]byte, error) {
	if n <= r.w-r.r {
		b := r.buf[r.r : r.r+n]
		r.r += n
		return b, nil
	}
	if cap(r.body) < n {
		r.body = make([]byte, n)
	}
	b := r.body[:n]
	return b, r.read(b)
}

// read fills p from what is buffered and then from the stream.
func (r *Reader) read(p []byte) error {
	n := copy(p, r.buf[r.r:r.w])
	r.r += n
	if n == len(p) {
		return nil
	}
	_, err := io.ReadFull(r.from, p[n:])
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// Frame is one frame made ready to send: the fixed part and the fields in one
// slice, and the payload by reference.
type Frame struct {
	Head    []byte   // header and body
	Payload [][]byte // data, in order; belongs to the message
}

// AppendFrame encodes m behind head and returns the frame; head's memory is
// reused. The payload is not copied: the message must stay unreleased until it
// was sent. A message that breaks the format's bounds is a defect of the
// caller and is returned as ErrInternal.
func AppendFrame(head []byte, epoch holdfast.Epoch, nonce Nonce, request RequestID, m Message) (Frame, error) {
	start := len(head)
	head = append(head, make([]byte, HeaderSize)...)
	head = m.appendBody(head)
	f := Frame{Head: head, Payload: m.payload(nil)}
	h := Header{Type: m.Type(), Body: len(head) - start - HeaderSize, Epoch: epoch, Nonce: nonce, Request: request}
	for _, p := range f.Payload {
		h.Payload += len(p)
	}
	if h.Body > MaxBody || h.Payload > MaxPayload {
		return Frame{}, holdfast.Errorf(holdfast.ErrInternal, "%v frame of %d+%d bytes exceeds the wire's bounds", h.Type, h.Body, h.Payload)
	}
	h.bodySum = Checksum(head[start+HeaderSize:])
	h.put(head[start:])
	return f, nil
}
