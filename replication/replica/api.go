package replica

import (
	"time"

	"github.com/holdfast-storage/holdfast"
)

// Conn numbers one connection of a writer to this replica, remote or in
// process. The edge gives numbers from 1, never twice in a process life.
type Conn uint64

// Batch numbers one APPEND or INSTALL message whose payload the edge keeps
// beside the core. The edge gives numbers from 1, never twice in a process life.
type Batch uint64

// EpochStart says that entries from First on are of Epoch, until the next.
type EpochStart struct {
	Epoch holdfast.Epoch
	First holdfast.Seq
}

// Status is what the log says of this copy: at New, what the medium holds
// after recovery (the whole tail is durable then); later, what the core knows.
// It is also the body of FENCE_OK.
type Status struct {
	Fence      holdfast.Epoch // highest epoch durably fenced
	Tail       holdfast.Seq   // last logged
	TailEpoch  holdfast.Epoch // epoch of the entry at Tail; the rebase epoch if the log is empty after a rebase; else 0
	Dur        holdfast.Seq   // durable up to here
	Commit     holdfast.Seq   // highest commit this copy was told and has recorded
	Applied    holdfast.Seq   // the base holds exactly the prefix up to here (for what it holds whole)
	Checkpoint holdfast.Seq   // the log no longer holds entries up to here

	EpochStarts []EpochStart // ascending; only what the log still knows

	// Intact: nothing this copy ever acknowledged has been lost since a
	// writer last declared it intact (same boot, no I/O error, local disk).
	Intact bool
	// Syncing: a rebase dropped the log and the base is not yet whole: only a
	// copy (JOIN) may continue it, its tail proves nothing. Set durably by
	// LogRebase, cleared durably by LogWhole.
	Syncing bool
	// Held is, while Syncing, the seq up to which the base was whole when the
	// first rebase dropped the log: a copy brings the chunks changed after it.
	Held holdfast.Seq
	// Damaged: a record within the durable part is unreadable; such a copy
	// is never a source and never continues by itself.
	Damaged bool
	// Lost is the first logged entry whose bytes are lost, or 0: such a copy is
	// not intact, and continues by itself only if there is no other. In the base
	// the entry's blocks are poison.
	Lost holdfast.Seq

	HintEpoch holdfast.Epoch // highest (epoch, isr version) this copy was told
	HintISR   holdfast.ISRVersion
}

// An Event is something that happened. Step consumes one at a time.
type Event interface{ replicaEvent() }

type (
	// Tick tells the time, at least every 250 ms. All times are monotonic
	// durations from any fixed start (CLOCK_BOOTTIME). After two Ticks further
	// apart than half a promise the clock is not believed: a promise that may
	// still stand lasts its whole length again, once.
	Tick struct{ Now time.Duration }

	// Fence is FENCE from a writer, the first message of every connection:
	// the writer named by Epoch asks to be the only one.
	Fence struct {
		Conn  Conn
		Epoch holdfast.Epoch
	}
	// Open is OPEN, the second: cut the log at CutTo and take appends from
	// there. ISRVersion is kept as the hint.
	Open struct {
		Conn       Conn
		Epoch      holdfast.Epoch
		CutTo      holdfast.Seq
		ISRVersion holdfast.ISRVersion
	}
	// Join is JOIN, instead of Open: forget the log, start a new one behind
	// At; chunks will be installed. Answered by SendOpened as Open is.
	Join struct {
		Conn       Conn
		Epoch      holdfast.Epoch
		At         holdfast.Seq
		ISRVersion holdfast.ISRVersion
	}
	// Append is APPEND: entries First..Last, all written in EntryEpoch (lower
	// than Epoch when a writer hands on what an older writer logged). The
	// edge keeps the entries under Batch until LogAppend or Drop names it.
	// The sender splits messages where the entries' epoch changes.
	Append struct {
		Conn        Conn
		Epoch       holdfast.Epoch
		EntryEpoch  holdfast.Epoch
		First, Last holdfast.Seq
		Batch       Batch
	}
	// Flush is FLUSH: make everything received so far durable, then tell.
	Flush struct {
		Conn  Conn
		Epoch holdfast.Epoch
		ID    uint64 // returned in SendFlushed
	}
	// Commit is COMMIT: every in-sync replica has made Seq durable.
	Commit struct {
		Conn  Conn
		Epoch holdfast.Epoch
		Seq   holdfast.Seq
	}
	// Ping is PING or, with Promise, PROMISE (R10): say that no higher epoch was
	// accepted, and promise to let none in for a while. Now is the time of its
	// arrival, at the latest that of this Step; only a promise needs it.
	Ping struct {
		Conn    Conn
		Epoch   holdfast.Epoch
		Nonce   uint64
		Promise bool
		Now     time.Duration
	}
	// Read is READ. The edge keeps range and buffer under (Conn, ID).
	Read struct {
		Conn  Conn
		Epoch holdfast.Epoch
		ID    uint64
	}
	// Intact is INTACT: the writer says that this copy holds everything it
	// ever acknowledged.
	Intact struct {
		Conn  Conn
		Epoch holdfast.Epoch
	}
	// Install is INSTALL: one chunk of a copy, holding the source's bytes as
	// of its applied seq AsOf. The edge keeps the bytes under Batch.
	Install struct {
		Conn  Conn
		Epoch holdfast.Epoch
		AsOf  holdfast.Seq
		Batch Batch
	}
	// Repair is REPAIR: blocks of one chunk for those that are bad here, as the
	// writer found them on in-sync copies, as of AsOf. The edge keeps them under
	// Batch.
	Repair struct {
		Conn  Conn
		Epoch holdfast.Epoch
		AsOf  holdfast.Seq
		Batch Batch
	}
	// Whole is WHOLE: nothing is missing any more (R11).
	Whole struct {
		Conn  Conn
		Epoch holdfast.Epoch
	}
	// Fetch asks this copy, as a source, for log entries From..To, or, with
	// Chunks, for the list of chunks changed after From. The edge keeps the
	// rest of the request under (Conn, ID). A list is allowed only once the
	// base holds Applied >= To; until then it waits here.
	Fetch struct {
		Conn     Conn
		Epoch    holdfast.Epoch
		ID       uint64
		Chunks   bool
		From, To holdfast.Seq
	}
	// Closed tells that a connection ended, whoever ended it. Nothing of it
	// may be delivered after this.
	Closed struct{ Conn Conn }
	// Left is CLOSE: the writer of this connection answers no more reads by
	// what was promised on it. Closed follows.
	Left struct{ Conn Conn }

	// Fenced answers LogFence.
	Fenced struct{ Err error }
	// Opened answers LogTruncate and LogRebase. Held, of a LogRebase, is the seq
	// up to which the base held the log's entries when the log was dropped.
	Opened struct {
		Held holdfast.Seq
		Err  error
	}
	// Appended answers LogAppend. An ErrIntegrity means that a payload did
	// not match its checksum and nothing of the batch was logged; any other
	// error is the end of this copy for this process life (R12).
	Appended struct {
		Batch Batch
		Err   error
	}
	// Synced answers LogSync: everything handed to the log before that
	// LogSync was executed is durable.
	Synced struct {
		ID  uint64
		Err error
	}
	// Sampled answers LogRead. The core checks the fence again: only an epoch
	// that is still alone after the sample may see it (R10).
	Sampled struct {
		Conn Conn
		ID   uint64
		Err  error
	}
	// Installed answers LogInstall.
	Installed struct {
		Batch Batch
		Err   error
	}
	// Repaired answers LogRepair. An ErrRefused or ErrIntegrity changed nothing.
	Repaired struct {
		Batch Batch
		Err   error
	}
	// WholeDone answers LogWhole.
	WholeDone struct{ Err error }
	// AppliedTo tells that the base now holds the prefix up to Applied, and
	// that the log was recycled up to Checkpoint. Needed within 250 ms of the
	// change while a Fetch waits or a copy runs; otherwise at leisure.
	AppliedTo struct{ Applied, Checkpoint holdfast.Seq }
	// Damaged tells that part of what this copy holds was found unreadable.
	Damaged struct{}
	// Failed tells that the disk failed (R12), at any time.
	Failed struct{ Err error }
)

// An Action is something the edge must do. Actions are executed in the order
// returned, and those of one Step before those of the next. "Log" actions go
// to the disk, "Send" actions to a connection. A Send to a connection that is
// closed is dropped in silence. Sends on one connection keep their order.
//
// LogAppend, LogFence, LogTruncate, LogRebase, LogInstall, LogRepair, LogWhole
// and LogIntact change the log and must take effect in order. LogSync, LogRead and
// LogFetch may run beside them, but see every change executed before them. The
// answers may come in any order unless said otherwise; every Log action with
// an answer gets exactly one.
type Action interface{ replicaAction() }

type (
	// LogFence makes Epoch durable as the fence and fdatasyncs the whole tail
	// (the seal), then answers Fenced. If Epoch is already the durable fence,
	// only the tail is synced. No LogAppend is outstanding at that time and
	// none will be handed out before the answer.
	LogFence struct{ Epoch holdfast.Epoch }
	// LogTruncate durably ends the log at To, then answers Opened.
	LogTruncate struct{ To holdfast.Seq }
	// LogRebase durably drops the log, sets tail = To, TailEpoch = Epoch,
	// Syncing and, if it was not yet Syncing, Held, and keeps the base; then
	// answers Opened. What R9 lets the base take should be applied first: the log
	// is lost, and what the base lacks of it has to be copied. Held is the base's
	// applied seq after that.
	LogRebase struct {
		Epoch holdfast.Epoch
		To    holdfast.Seq
	}
	// LogAppend appends the entries kept under Batch, First = tail+1. When
	// write(2) of all has returned, answer Appended. Answers come in order.
	LogAppend struct {
		Batch       Batch
		First, Last holdfast.Seq
	}
	// LogSync fdatasyncs what was appended before it, then answers Synced.
	// At most one is outstanding.
	LogSync struct{ ID uint64 }
	// LogCommit lets the base take entries up to min(Seq, own dur) (R9). No answer.
	LogCommit struct{ Seq holdfast.Seq }
	// LogRead samples the range kept under (Conn, ID), then answers Sampled.
	LogRead struct {
		Conn Conn
		ID   uint64
	}
	// LogIntact records {this boot, Epoch} as declared intact. No answer:
	// losing it only costs continuity.
	LogIntact struct{ Epoch holdfast.Epoch }
	// LogHint records the highest (epoch, isr version) told. No answer.
	LogHint struct {
		Epoch holdfast.Epoch
		ISR   holdfast.ISRVersion
	}
	// LogInstall installs the chunk kept under Batch atomically, v = its
	// AsOf, then answers Installed.
	LogInstall struct {
		Batch Batch
		AsOf  holdfast.Seq
	}
	// LogRepair replaces what is bad of the chunk kept under Batch: a block in its
	// place if its checksum is the one this copy holds for it, else the chunk as
	// LogInstall does. Then it answers Repaired.
	LogRepair struct {
		Batch Batch
		AsOf  holdfast.Seq
	}
	// LogWhole durably clears Syncing; its fdatasync covers every install and
	// every append before it. Then answer WholeDone.
	LogWhole struct{}
	// LogFetch reads what was kept under (Conn, ID) and sends it to Conn
	// itself: log entries, or the chunk list. There is no answer to the core.
	// The epoch was checked; entries and list may be sent as they are, for a
	// target whose writer was fenced out refuses them by epoch.
	LogFetch struct {
		Conn Conn
		ID   uint64
	}
	// Drop frees what is kept under Batch: the message was refused or ignored.
	Drop struct{ Batch Batch }

	// SendFenceOK answers Fence, with Status as of now.
	SendFenceOK struct {
		Conn   Conn
		Epoch  holdfast.Epoch
		Status Status
	}
	// SendRefused tells a writer that a higher epoch was accepted. The writer
	// is over. Sent for any message of a lower epoch, and to connections that
	// a FENCE closes (followed by CloseConn).
	SendRefused struct {
		Conn  Conn
		Fence holdfast.Epoch
	}
	// SendOpened answers Open and Join: the log ends at Tail, durable at Dur. Held
	// answers a Join: that of Status.
	SendOpened struct {
		Conn      Conn
		Epoch     holdfast.Epoch
		Tail, Dur holdfast.Seq
		Held      holdfast.Seq
	}
	// SendAck acknowledges every entry up to Tail as received. Only the last
	// of several waiting acks of one connection needs to be sent.
	SendAck struct {
		Conn  Conn
		Epoch holdfast.Epoch
		Tail  holdfast.Seq
	}
	// SendFlushed answers Flush.
	SendFlushed struct {
		Conn  Conn
		Epoch holdfast.Epoch
		ID    uint64
		Dur   holdfast.Seq
	}
	// SendPong answers Ping: PONG or, with Promise, PROMISED: no FENCE of a
	// higher epoch is answered for that long from the arrival of the Ping, as
	// this end's clock counts it.
	SendPong struct {
		Conn    Conn
		Epoch   holdfast.Epoch
		Nonce   uint64
		Promise time.Duration
	}
	// SendSample sends the sampled bytes kept under (Conn, ID), or Err.
	SendSample struct {
		Conn Conn
		ID   uint64
		Err  error
	}
	// DropRead frees what is kept under (Conn, ID), Read or Fetch.
	DropRead struct {
		Conn Conn
		ID   uint64
	}
	// SendInstalled answers Install. Retry: AsOf was not acceptable now
	// (below the floor, or above the commit this copy knows): read the chunk
	// from the source again, later; a Drop of the Batch follows.
	SendInstalled struct {
		Conn  Conn
		Batch Batch
		AsOf  holdfast.Seq
		Retry bool
	}
	// SendRepaired answers Repair, with Retry as in SendInstalled.
	SendRepaired struct {
		Conn  Conn
		Batch Batch
		AsOf  holdfast.Seq
		Retry bool
	}
	// SendWhole answers Whole.
	SendWhole struct {
		Conn  Conn
		Epoch holdfast.Epoch
		Dur   holdfast.Seq
	}
	// SendFailed tells the writer that this copy cannot go on: the disk
	// failed (ErrIO), a payload did not match (ErrIntegrity, with the first
	// seq of the batch), or OPEN would cut what is committed (ErrRefused).
	// Followed by CloseConn.
	SendFailed struct {
		Conn  Conn
		Epoch holdfast.Epoch
		Seq   holdfast.Seq
		Err   error
	}
	// CloseConn closes a connection after what was sent on it before. The
	// edge still delivers Closed for it.
	CloseConn struct{ Conn Conn }
)

func (Tick) replicaEvent()      {}
func (Fence) replicaEvent()     {}
func (Open) replicaEvent()      {}
func (Join) replicaEvent()      {}
func (Append) replicaEvent()    {}
func (Flush) replicaEvent()     {}
func (Commit) replicaEvent()    {}
func (Ping) replicaEvent()      {}
func (Read) replicaEvent()      {}
func (Intact) replicaEvent()    {}
func (Install) replicaEvent()   {}
func (Repair) replicaEvent()    {}
func (Whole) replicaEvent()     {}
func (Fetch) replicaEvent()     {}
func (Closed) replicaEvent()    {}
func (Left) replicaEvent()      {}
func (Fenced) replicaEvent()    {}
func (Opened) replicaEvent()    {}
func (Appended) replicaEvent()  {}
func (Synced) replicaEvent()    {}
func (Sampled) replicaEvent()   {}
func (Installed) replicaEvent() {}
func (Repaired) replicaEvent()  {}
func (WholeDone) replicaEvent() {}
func (AppliedTo) replicaEvent() {}
func (Damaged) replicaEvent()   {}
func (Failed) replicaEvent()    {}

func (LogFence) replicaAction()      {}
func (LogTruncate) replicaAction()   {}
func (LogRebase) replicaAction()     {}
func (LogAppend) replicaAction()     {}
func (LogSync) replicaAction()       {}
func (LogCommit) replicaAction()     {}
func (LogRead) replicaAction()       {}
func (LogIntact) replicaAction()     {}
func (LogHint) replicaAction()       {}
func (LogInstall) replicaAction()    {}
func (LogRepair) replicaAction()     {}
func (LogWhole) replicaAction()      {}
func (LogFetch) replicaAction()      {}
func (Drop) replicaAction()          {}
func (SendFenceOK) replicaAction()   {}
func (SendRefused) replicaAction()   {}
func (SendOpened) replicaAction()    {}
func (SendAck) replicaAction()       {}
func (SendFlushed) replicaAction()   {}
func (SendPong) replicaAction()      {}
func (SendSample) replicaAction()    {}
func (DropRead) replicaAction()      {}
func (SendInstalled) replicaAction() {}
func (SendRepaired) replicaAction()  {}
func (SendWhole) replicaAction()     {}
func (SendFailed) replicaAction()    {}
func (CloseConn) replicaAction()     {}

// Options are what a Core starts from.
type Options struct {
	// Status is what the log recovered. Everything in it is durable.
	Status Status
	// Now is the time of the start.
	Now time.Duration
	// PromiseLength is how long a promise of this copy lasts, and how long it
	// waits from Now before it accepts a FENCE above Status.Fence: a promise
	// given before a restart is forgotten but never broken. So it may be
	// shortened only once the longer one has passed. 0 means DefaultPromiseLength.
	PromiseLength time.Duration
	// Fresh: this copy was just made, nobody was ever promised anything.
	Fresh bool
}

// DefaultPromiseLength is L of the protocol.
const DefaultPromiseLength = 2 * time.Second

// The methods of Core, in core.go:
//
//	New(Options) *Core
//	(*Core) Step(Event) []Action   the slice is valid until the next Step
//	(*Core) Status() Status        a copy of what the core knows now
//	(*Core) Writer() (Conn, holdfast.Epoch, bool)   the open session, if any
//	(*Core) Explain() []Wait       what it waits for, and since when

// Wait says what a core waits for, in words, since when.
type Wait struct {
	For   string
	Since time.Duration
}
