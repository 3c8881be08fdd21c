package wire

import (
	"fmt"

	"github.com/holdfast-storage/holdfast"
)

// Message is one message of the protocol. The concrete types are pointers to
// the structs of this package. A message is immutable once sent: an in-process
// link hands the same value to the other end.
type Message interface {
	// Type names the message.
	Type() Type
	// Release gives back the message's reference to its payload. Every message
	// that was received, or whose sending has ended, is released exactly once;
	// afterwards its payload must not be touched.
	Release()

	appendBody(b []byte) []byte
	payload(p [][]byte) [][]byte
	decodeBody(f *fields, payload *Buffer)
}

// Bounds of what one message lists.
const (
	// MaxEntries bounds the entries of one APPEND or ENTRIES: a largest
	// operation's worth of single blocks.
	MaxEntries = holdfast.MaxOpSize / holdfast.BlockSize
	// MaxEpochTails bounds a replica's epoch list, as raft's history is bounded.
	MaxEpochTails = 1024
	// MaxChunkRefs bounds a page of a chunk list: 2048 chunks are 128 MiB.
	MaxChunkRefs = 2048
	// MaxText bounds an error's text and its remedy, each.
	MaxText = 1024
)

// bare is embedded by messages without payload.
type bare struct{}

func (bare) Release()                    {}
func (bare) payload(p [][]byte) [][]byte { return p }
func (bare) noPayload(f *fields, b *Buffer) {
	if b != nil {
		f.fail("%d bytes of payload in a message that has none", len(b.Bytes()))
	}
}

// newMessage returns an empty message of a type, or nil for a type that is not known.
func newMessage(t Type) Message {
	switch t {
	case TypeHello:
		return &Hello{}
	case TypeWelcome:
		return &Welcome{}
	case TypeError:
		return &Error{}
	case TypeFence:
		return &Fence{}
	case TypeFenced:
		return &Fenced{}
	case TypeRefused:
		return &Refused{}
	case TypeOpen:
		return &Open{}
	case TypeJoin:
		return &Join{}
	case TypeOpened:
		return &Opened{}
	case TypeAppend:
		return &Append{}
	case TypeAck:
		return &Ack{}
	case TypeFlush:
		return &Flush{}
	case TypeFlushed:
		return &Flushed{}
	case TypeCommit:
		return &Commit{}
	case TypePing:
		return &Ping{}
	case TypePong:
		return &Pong{}
	case TypeRead:
		return &Read{}
	case TypeData:
		return &Data{}
	case TypeIntact:
		return &Intact{}
	case TypeFetch:
		return &Fetch{}
	case TypeEntries:
		return &Entries{}
	case TypeList:
		return &List{}
	case TypeChunks:
		return &Chunks{}
	case TypeReadChunk:
		return &ReadChunk{}
	case TypeChunk:
		return &Chunk{}
	case TypeInstall:
		return &Install{}
	case TypeInstalled:
		return &Installed{}
	case TypeWhole:
		return &Whole{}
	case TypeWholeDone:
		return &WholeDone{}
	case TypeFailed:
		return &Failed{}
	case TypeClose:
		return &Close{}
	case TypePromise:
		return &Promise{}
	case TypePromised:
		return &Promised{}
	case TypeAfford:
		return &Afford{}
	case TypeAfforded:
		return &Afforded{}
	case TypeDamaged:
		return &Damaged{}
	case TypeRepair:
		return &Repair{}
	}
	return nil
}

// decode reads a message from a frame's body and payload. On success the
// message owns the payload's reference, on failure the caller keeps it.
func decode(h Header, body []byte, payload *Buffer) (Message, error) {
	m := newMessage(h.Type)
	if m == nil {
		return nil, holdfast.Errorf(holdfast.ErrUnsupported, "message %v is not known", h.Type)
	}
	f := fields{p: body}
	m.decodeBody(&f, payload)
	if err := f.done(); err != nil {
		return nil, err
	}
	return m, nil
}

// ranges of a segment, as entries and reads carry them.
func checkRange(f *fields, off, n int64) {
	if off%holdfast.BlockSize != 0 || n%holdfast.BlockSize != 0 || n <= 0 || off+n < off {
		f.fail("range of %d bytes at %d is not made of blocks", n, off)
	}
}

// String of a header is for errors and logs.
func (h Header) String() string {
	return fmt.Sprintf("%v epoch %d request %d, %d+%d bytes", h.Type, h.Epoch, h.Request, h.Body, h.Payload)
}
