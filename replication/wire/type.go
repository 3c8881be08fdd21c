package wire

import "fmt"

// Type says what message a frame carries. Values are never reused.
type Type uint8

// The messages. W is the writer's end, R the replica's.
const (
	TypeHello     Type = 1  // W: who I am and which replica I want
	TypeWelcome   Type = 2  // R: who I am; the session is open
	TypeError     Type = 3  // R: what cannot be done, of a request or of the session
	TypeFence     Type = 4  // W: accept no epoch below the header's; seal
	TypeFenced    Type = 5  // R: fenced and sealed, and what I hold
	TypeRefused   Type = 6  // R: a higher epoch is accepted here
	TypeOpen      Type = 7  // W: cut beyond a seq and take entries from there
	TypeJoin      Type = 8  // W: drop your log, keep your chunks, follow from a seq
	TypeOpened    Type = 9  // R: open
	TypeAppend    Type = 10 // W: entries
	TypeAck       Type = 11 // R: everything up to a seq is received
	TypeFlush     Type = 12 // W: make everything sent before durable
	TypeFlushed   Type = 13 // R: done, up to a seq
	TypeCommit    Type = 14 // W: everything up to a seq is durable everywhere
	TypePing      Type = 15 // W: is this epoch still the highest you accepted
	TypePong      Type = 16 // R: it is
	TypeRead      Type = 17 // W: bytes, as of now
	TypeData      Type = 18 // R: the bytes and their sums
	TypeIntact    Type = 19 // W: you hold all that you ever acknowledged
	TypeFetch     Type = 20 // W: logged entries of a range of seqs
	TypeEntries   Type = 21 // R: they, or the first of them
	TypeList      Type = 22 // W: which chunks do you hold
	TypeChunks    Type = 23 // R: a page of them
	TypeReadChunk Type = 24 // W: one chunk as of your applied seq
	TypeChunk     Type = 25 // R: its blocks, sums and states
	TypeInstall   Type = 26 // W: put this chunk in place
	TypeInstalled Type = 27 // R: logged, or not now
	TypeWhole     Type = 28 // W: nothing is missing any more
	TypeWholeDone Type = 29 // R: noted, durably
	TypeFailed    Type = 30 // R: this copy cannot go on
	TypeClose     Type = 31 // W: I am leaving, in order; nothing follows
	TypePromise   Type = 32 // W: a ping, and answer no higher epoch's FENCE for a while
	TypePromised  Type = 33 // R: a pong, and for how long; without a promise, PONG
	TypeAfford    Type = 34 // W: what would a write of this range take, and can you give it
	TypeAfforded  Type = 35 // R: so much, and so much is promised
	TypeDamaged   Type = 36 // R: chunks that have bad blocks here
	TypeRepair    Type = 37 // W: put these blocks in the place of bad ones

	minType = TypeHello
	typeEnd = 38 // one past the last
)

var typeNames = [typeEnd]string{
	TypeHello: "HELLO", TypeWelcome: "WELCOME", TypeError: "ERROR", TypeFence: "FENCE", TypeFenced: "FENCED",
	TypeRefused: "REFUSED", TypeOpen: "OPEN", TypeJoin: "JOIN", TypeOpened: "OPENED", TypeAppend: "APPEND", TypeAck: "ACK",
	TypeFlush: "FLUSH", TypeFlushed: "FLUSHED", TypeCommit: "COMMIT", TypePing: "PING", TypePong: "PONG",
	TypeRead: "READ", TypeData: "DATA", TypeIntact: "INTACT", TypeFetch: "FETCH", TypeEntries: "ENTRIES",
	TypeList: "LIST", TypeChunks: "CHUNKS", TypeReadChunk: "READ_CHUNK", TypeChunk: "CHUNK",
	TypeInstall: "INSTALL", TypeInstalled: "INSTALLED", TypeWhole: "WHOLE", TypeWholeDone: "WHOLE_DONE",
	TypeFailed: "FAILED", TypeClose: "CLOSE",
	TypePromise: "PROMISE", TypePromised: "PROMISED", TypeAfford: "AFFORD", TypeAfforded: "AFFORDED",
	TypeDamaged: "DAMAGED", TypeRepair: "REPAIR",
}

// String returns the message's name, or type N for one that is not known.
func (t Type) String() string {
	if t >= minType && t < typeEnd {
		return typeNames[t]
	}
	return fmt.Sprintf("type %d", uint8(t))
}
