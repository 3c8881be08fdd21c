package coordinator

import (
	"time"

	"github.com/holdfast-storage/holdfast"
)

// Conn numbers one connection to one replica. The edge gives numbers from 1,
// never twice in the life of a Core.
type Conn uint64

// OpID names one request of a client. The edge gives numbers, never twice in
// the life of a Core.
type OpID uint64

// OpKind says what a mutation does.
type OpKind uint8

// The kinds of mutation.
const (
	OpWrite OpKind = iota + 1
	OpZero
	OpTrim
)

// Start is one entry of the segment's history in raft: an activated epoch and
// the seq it started behind.
type Start struct {
	Epoch holdfast.Epoch
	S     holdfast.Seq
}

// Replica is what raft says of one copy.
type Replica struct {
	ID      holdfast.ReplicaID
	Node    holdfast.NodeID
	Role    holdfast.ReplicaRole
	Lineage holdfast.LineageID // what its disk answers to; for the edge only
	Leaving bool               // it is to be taken out of the in-sync set, and not to come back
}

// Options are what a Core starts from: the applied result of AttachBegin.
type Options struct {
	Now time.Duration
	// Node is the node this writer runs on: its replica, if any, is read first.
	Node holdfast.NodeID

	Epoch      holdfast.Epoch // the one AttachBegin issued
	ISRVersion holdfast.ISRVersion
	Replicas   []Replica         // in raft's order; role in-sync makes the ISR
	Gone       []holdfast.NodeID // nodes that are gone now
	History    []Start           // ascending by epoch
	// HistoryPruned: entries older than the first were dropped, so a copy
	// whose last entry is older than that counts as empty.
	HistoryPruned bool
	// Floor is the highest of the last activated S, S_end and lastCommit: an
	// activation below it is a REPLICA_REGRESSION.
	Floor holdfast.Seq
	// Detached: the volume was cleanly detached, at End.
	Detached bool
	End      holdfast.Seq
	// Salvaged: an operator chose the one in-sync replica. The start is lossy,
	// whatever that says of itself.
	Salvaged bool
	// AcceptLoss: the operator allows a lossy start at once.
	AcceptLoss bool

	// PingsOnly (read_promises=off): no read is answered by a promise, every one
	// waits for a ping round. For hosts whose clocks cannot be relied on: a
	// virtual machine that may be paused without its clock telling.
	PingsOnly bool

	Copies int // replicas the volume was made with
	// MinCopies: with fewer in-sync copies writes are held; 0 and 1 hold none.
	MinCopies int
	// FailHeldAfter is how long requests are held, below MinCopies or while raft
	// has no quorum to take a silent member out, before they fail
	// (on_quorum_loss=error:T); 0 holds them for ever (freeze).
	FailHeldAfter time.Duration
	Ack           holdfast.AckMode // "" means received

	Limits Limits
}

// Limits are the times and sizes of the protocol; zero fields take the default.
type Limits struct {
	Tick          time.Duration // how often the edge ticks; 100 ms
	PromiseLength time.Duration // L, 2 s: promises are asked for every L/4; two ticks more than L/2 apart are a stall
	Suspect       time.Duration // silence until a member is suspected; 2 s
	Hedge         time.Duration // what a member may take over a read until another one is asked; 200 ms
	Evict         time.Duration // silence until it is evicted; 5 s
	OpAge         time.Duration // age of an unacknowledged op or flush until eviction; 10 s
	AttachGrace   time.Duration // wait for the others after the first intact answer; 500 ms
	LossyWait     time.Duration // T_wait: until a lossy start without every answer; 30 s
	ExtendWait    time.Duration // time for short members to be extended; 10 s
	FlushEvery    time.Duration // own flush of dirty time; 100 ms
	FlushBytes    int64         // own flush of dirty bytes; 16 MiB
	WindowBytes   int64         // replay window; 64 MiB
	WindowOps     int           // operations in it; 16384
	RetryRaft     time.Duration // between asks of raft; 500 ms
	SlowWindow    time.Duration // over which members' medians are compared; 30 s
	SlowSamples   int           // without so many in a window a member is not judged; 20
}

// An Event is something that happened. Step consumes one at a time, with the
// time it was taken up at: a monotonic duration from any fixed start
// (CLOCK_BOOTTIME), never going back.
type Event interface{ coordinatorEvent() }

type (
	// Tick must come every Limits.Tick. Before a Tick the edge delivers what
	// it already received, so that a stall of this process is not taken for
	// silence of others.
	Tick struct{}
	// NodeGone tells a change of liveness: the node is gone, or back.
	NodeGone struct {
		Node holdfast.NodeID
		Gone bool
	}
	// Replicas tells raft's present list (a copy was added or removed).
	Replicas struct{ List []Replica }

	// LinkUp answers Connect: the connection is made and HELLO exchanged.
	LinkUp struct {
		Replica holdfast.ReplicaID
		Conn    Conn
	}
	// LinkDown tells that a connection ended, whoever ended it (also after
	// CloseConn). Nothing of it may be delivered after this.
	LinkDown struct {
		Replica holdfast.ReplicaID
		Conn    Conn
	}

	// FenceOK is the answer to SendFence.
	FenceOK struct {
		Replica holdfast.ReplicaID
		Conn    Conn
		Epoch   holdfast.Epoch
		Status  Status
	}
	// Refused: the replica accepted a higher epoch.
	Refused struct {
		Replica holdfast.ReplicaID
		Conn    Conn
		Fence   holdfast.Epoch
	}
	// Opened is the answer to SendOpen and SendJoin. Held, of a join, is the seq
	// up to which its chunks are whole: what it had applied when it dropped its log.
	Opened struct {
		Replica   holdfast.ReplicaID
		Conn      Conn
		Tail, Dur holdfast.Seq
		Held      holdfast.Seq
		Credit    int64 // as in Acked
	}
	// Acked: every entry up to Tail was received (cumulative). Entries behind
	// Tail may map Credit chunks; see Unlimited.
	Acked struct {
		Replica holdfast.ReplicaID
		Conn    Conn
		Tail    holdfast.Seq
		Credit  int64
	}
	// Afforded is the answer to SendAfford: the write would map Need chunks, and
	// entries behind Tail may map Credit.
	Afforded struct {
		Replica holdfast.ReplicaID
		Conn    Conn
		Ask     uint64
		Need    int64
		Credit  int64
		Tail    holdfast.Seq
	}
	// Flushed is the answer to SendFlush.
	Flushed struct {
		Replica holdfast.ReplicaID
		Conn    Conn
		ID      uint64
		Dur     holdfast.Seq
	}
	// Pong is the answer to SendPing. Promise, if not zero: the replica answers
	// no FENCE of a higher epoch for that long from the arrival of the ping.
	Pong struct {
		Replica holdfast.ReplicaID
		Conn    Conn
		Nonce   uint64
		Promise time.Duration
	}
	// WholeOK is the answer to SendWhole.
	WholeOK struct {
		Replica holdfast.ReplicaID
		Conn    Conn
		Dur     holdfast.Seq
	}
	// ReplicaFailed: the copy cannot go on (disk failed: ErrIO; a payload did
	// not match its checksum: ErrIntegrity, at Seq).
	ReplicaFailed struct {
		Replica holdfast.ReplicaID
		Conn    Conn
		Seq     holdfast.Seq
		Err     error
	}

	// CopiedLog tells how a CopyLog went: everything up to To was sent to the
	// target, or Err. Gap: the source no longer has the entries.
	CopiedLog struct {
		Copy uint64
		Gap  bool
		Err  error
	}
	// Copied tells how a StartCopy went: every chunk of the source's list was
	// answered by SendInstalled without Retry; MaxAsOf is the highest AsOf.
	Copied struct {
		Copy    uint64
		MaxAsOf holdfast.Seq
		Err     error
	}
	// CopyProgress is for people: chunks installed, of how many.
	CopyProgress struct {
		Copy        uint64
		Done, Total int64
	}

	// Write asks for a mutation of [Offset, Offset+Length), aligned to
	// 4 KiB, at most MaxOpSize for OpWrite. The edge keeps the payload under
	// ID until Sequence or CompleteWrite names it.
	Write struct {
		ID             OpID
		Kind           OpKind
		Offset, Length int64
		FUA            bool
	}
	// Read asks for a range. The edge keeps the buffer until CompleteRead.
	Read struct {
		ID             OpID
		Offset, Length int64
	}
	// Flush asks that every write completed before it be durable.
	Flush struct{ ID OpID }
	// Settle asks the same of every acknowledged write, without an answer: who
	// looks at chunks waits until they are applied.
	Settle struct{}
	// Sampled answers SampleRead: the bytes are in the buffer, or Err.
	Sampled struct {
		ID      OpID
		Sample  uint64
		Replica holdfast.ReplicaID
		Conn    Conn
		Err     error
	}

	// Proposed answers Propose, exactly once.
	Proposed struct {
		ID         uint64
		Outcome    Outcome
		ISRVersion holdfast.ISRVersion // with OutcomeApplied
	}
	// Meta answers ReadMeta: the segment's record by a linearizable read, or
	// Err (no quorum).
	Meta struct {
		ID         uint64
		Err        error
		Epoch      holdfast.Epoch
		Activated  bool // Activate of Epoch was applied
		ISRVersion holdfast.ISRVersion
		ISR        []holdfast.ReplicaID
	}

	// Policy replaces the options of the same names.
	Policy struct {
		Copies        int
		MinCopies     int
		FailHeldAfter time.Duration
	}
	// Detach asks for a clean end: no new requests are taken (the edge sends
	// none after it), those taken are finished, everything is flushed, then
	// Detached is returned.
	Detach struct{}
	// Stop ends the session at once, without flushing (SIGTERM after a
	// flush, or the edge was told that the volume is gone).
	Stop struct{ Err error }
)

// Status is what a replica says of itself in FENCE_OK; the fields are those of
// replica.Status.
type Status struct {
	Fence      holdfast.Epoch
	Tail       holdfast.Seq
	TailEpoch  holdfast.Epoch
	Dur        holdfast.Seq
	Commit     holdfast.Seq
	Applied    holdfast.Seq
	Checkpoint holdfast.Seq
	Intact     bool
	Syncing    bool
	Held       holdfast.Seq
	Damaged    bool
	Lost       holdfast.Seq // the first logged entry whose bytes it lost; 0: none
	HintEpoch  holdfast.Epoch
	HintISR    holdfast.ISRVersion
	LogSize    int64 // bytes of its disk's log; 0: not known
}

// Outcome is what became of a raft command.
type Outcome uint8

// The outcomes.
const (
	OutcomeUnknown  Outcome = iota // no answer: it may be applied, now or later
	OutcomeApplied                 // applied, also when it had been applied before
	OutcomeFenced                  // raft knows a higher epoch
	OutcomeConflict                // another isr version: read again
	OutcomeRefused                 // the state machine refused it for good (REPLICA_REGRESSION)
)

// An Action is something the edge must do. Actions are executed in the order
// returned, and those of one Step before those of the next. A Send to a
// connection that is closed is dropped in silence. Sends on one connection keep
// their order, but that entries may have to wait for the member to take earlier
// ones: SendFlush, SendIntact and SendWhole stand behind every SendAppend before
// them, all others may overtake entries. Nothing here may block the next Step.
type Action interface{ coordinatorAction() }

type (
	// Connect asks for one connection to a replica: dial, with the edge's own
	// backoff, until LinkUp, or until Disconnect. A refused HELLO counts as
	// not yet connected.
	Connect struct {
		Replica holdfast.ReplicaID
		Node    holdfast.NodeID
		Lineage holdfast.LineageID
	}
	// Disconnect takes a Connect back.
	Disconnect struct{ Replica holdfast.ReplicaID }
	// CloseConn closes a connection, with CLOSE as its last message: no read is
	// answered any more by what was promised on it. LinkDown is still delivered.
	CloseConn struct {
		Replica holdfast.ReplicaID
		Conn    Conn
	}

	// SendFence sends FENCE.
	SendFence struct {
		Replica holdfast.ReplicaID
		Conn    Conn
		Epoch   holdfast.Epoch
	}
	// SendOpen sends OPEN: cut the log at CutTo.
	SendOpen struct {
		Replica    holdfast.ReplicaID
		Conn       Conn
		Epoch      holdfast.Epoch
		CutTo      holdfast.Seq
		ISRVersion holdfast.ISRVersion
	}
	// SendJoin sends JOIN: drop the log, start behind At.
	SendJoin struct {
		Replica    holdfast.ReplicaID
		Conn       Conn
		Epoch      holdfast.Epoch
		At         holdfast.Seq
		ISRVersion holdfast.ISRVersion
	}
	// SendAppend sends the entries First..Last of the replay window (all of
	// this epoch), in as many APPEND messages as the edge likes, in order.
	SendAppend struct {
		Replica     holdfast.ReplicaID
		Conn        Conn
		Epoch       holdfast.Epoch
		First, Last holdfast.Seq
	}
	// SendFlush sends FLUSH. It stands behind every append sent before it.
	SendFlush struct {
		Replica holdfast.ReplicaID
		Conn    Conn
		Epoch   holdfast.Epoch
		ID      uint64
	}
	// SendAfford asks what a write of the range takes, and for credit behind Pending
	// chunks. Asks are numbered, never twice in the life of a Core.
	SendAfford struct {
		Replica        holdfast.ReplicaID
		Conn           Conn
		Epoch          holdfast.Epoch
		Ask            uint64
		Offset, Length int64
		Pending        int64
	}
	// SendCommit sends COMMIT.
	SendCommit struct {
		Replica holdfast.ReplicaID
		Conn    Conn
		Epoch   holdfast.Epoch
		Seq     holdfast.Seq
	}
	// SendPing sends PING or, with Promise, PROMISE. It must be handed to the
	// connection after this action was returned, never taken from an earlier
	// one (R10).
	SendPing struct {
		Replica holdfast.ReplicaID
		Conn    Conn
		Epoch   holdfast.Epoch
		Nonce   uint64
		Promise bool
	}
	// SendIntact sends INTACT.
	SendIntact struct {
		Replica holdfast.ReplicaID
		Conn    Conn
		Epoch   holdfast.Epoch
	}
	// SendWhole sends WHOLE.
	SendWhole struct {
		Replica holdfast.ReplicaID
		Conn    Conn
		Epoch   holdfast.Epoch
	}

	// CopyLog has the entries From..To fetched from the source and sent to
	// the target as APPEND, with the epochs they were written in, all under
	// this Epoch, in order, before anything sent to the target later. (The
	// core sends the target no entries until CopiedLog or its acks say that
	// To was reached.) Report CopiedLog once.
	CopyLog struct {
		Copy                   uint64
		Epoch                  holdfast.Epoch
		Source, Target         holdfast.ReplicaID
		SourceConn, TargetConn Conn
		From, To               holdfast.Seq
	}
	// StartCopy has the source list the chunks changed after After, once it
	// has applied At, and every one of them read from the source and sent to
	// the target as INSTALL, again when the answer is Retry, at most a few at
	// a time. Live entries go to the target meanwhile. Report Copied once.
	StartCopy struct {
		Copy                   uint64
		Epoch                  holdfast.Epoch
		Source, Target         holdfast.ReplicaID
		SourceConn, TargetConn Conn
		After, At              holdfast.Seq
	}
	// StopCopy ends a CopyLog or StartCopy; no report is needed after it.
	StopCopy struct{ Copy uint64 }

	// Sequence gives the write its place: from now on its payload is in the
	// replay window under Seq, until ReleaseWindow. Entries are logged with
	// the Core's epoch.
	Sequence struct {
		ID  OpID
		Seq holdfast.Seq
	}
	// ReleaseWindow frees the payloads of every seq up to UpTo.
	ReleaseWindow struct{ UpTo holdfast.Seq }
	// SampleRead reads the range of ID from a replica into the buffer: READ
	// with Epoch on that connection. Then Sampled, with the same Sample
	// number. A later SampleRead of the same ID makes earlier ones void: the
	// edge must not let a late answer of an earlier one touch the buffer.
	SampleRead struct {
		ID             OpID
		Sample         uint64
		Replica        holdfast.ReplicaID
		Conn           Conn
		Epoch          holdfast.Epoch
		Offset, Length int64
	}
	// CompleteWrite, CompleteRead and CompleteFlush answer the client. Each
	// request is completed exactly once. Err is nil, or of kind ErrFenced
	// (the session is over), ErrNoSpace (nothing of the write took effect), ErrIO,
	// ErrIntegrity.
	CompleteWrite struct {
		ID  OpID
		Err error
	}
	// CompleteRead hands the sampled buffer to the client.
	CompleteRead struct {
		ID  OpID
		Err error
	}
	// CompleteFlush answers a flush.
	CompleteFlush struct {
		ID  OpID
		Err error
	}

	// Propose hands a command to raft, compare-and-set on (Epoch,
	// ISRVersion). One is outstanding at a time. The same command may be
	// proposed again after OutcomeUnknown, with a new ID.
	Propose struct {
		ID         uint64
		Command    Command
		Epoch      holdfast.Epoch
		ISRVersion holdfast.ISRVersion
		// Activate:
		S          holdfast.Seq
		ISR        []holdfast.ReplicaID
		Continuous bool
		// Shrink and Grow:
		Replica holdfast.ReplicaID
		Commit  holdfast.Seq
	}
	// ReadMeta asks for a linearizable read of the segment's record.
	ReadMeta struct{ ID uint64 }

	// Activated tells that requests are served from now on. Not Continuous:
	// what older sessions were told may be lost; they must not be continued.
	Activated struct {
		S          holdfast.Seq
		Continuous bool
		ISRVersion holdfast.ISRVersion
	}
	// Detached answers Detach: every in-sync replica holds End durably and
	// nothing else. The edge proposes Detach to raft with it.
	Detached struct {
		End, Commit holdfast.Seq
		ISRVersion  holdfast.ISRVersion
	}
	// EndSession is the last action: every request has been completed, every
	// connection is to be closed, nothing may be sent any more. Err is
	// ErrFenced, ErrIntegrity (REPLICA_REGRESSION, METADATA_REGRESSION,
	// NO_IN_SYNC_REPLICA, or the writer's own memory), or what Stop gave; nil after Detached.
	EndSession struct {
		Reason EndReason
		Err    error
	}
	// Notice is a state change worth a log line, a metric and a test.
	Notice struct {
		Kind    NoticeKind
		Replica holdfast.ReplicaID // zero if not about one
		Text    string
		Warn    bool // degraded, or a person should look
	}
)

// Command names a raft command of the coordinator.
type Command string

// The commands.
const (
	CommandActivate Command = "activate"
	CommandShrink   Command = "shrink"
	CommandGrow     Command = "grow"
)

// EndReason says why a session ended.
type EndReason string

// The reasons.
const (
	EndFenced             EndReason = "fenced"              // a higher epoch exists
	EndReplicaRegression  EndReason = "replica-regression"  // copies hold less than raft knows was durable
	EndNoInSync           EndReason = "no-in-sync"          // every in-sync copy answered that its log is damaged
	EndMetadataRegression EndReason = "metadata-regression" // copies know a higher epoch than raft
	EndBadMemory          EndReason = "bad-memory"          // two members refused one op's checksum
	EndChanged            EndReason = "changed"             // the in-sync set changed during the attach: attach again, with a new epoch
	EndDetached           EndReason = "detached"
	EndStopped            EndReason = "stopped"
)

// NoticeKind names a state change.
type NoticeKind string

// The notices.
const (
	NoticeSuspect    NoticeKind = "suspect"
	NoticeEvicting   NoticeKind = "evicting"
	NoticeEvicted    NoticeKind = "evicted"
	NoticeReplay     NoticeKind = "replay"
	NoticeCatchUp    NoticeKind = "catch-up"
	NoticeCopy       NoticeKind = "copy"
	NoticeInSync     NoticeKind = "in-sync"
	NoticeRegression NoticeKind = "replica-regression"
	NoticeDurable    NoticeKind = "ack-durable"
	NoticeReceived   NoticeKind = "ack-received"
	NoticeStall      NoticeKind = "stall"
	NoticeSlow       NoticeKind = "slow"
	NoticeHold       NoticeKind = "hold"
	NoticeFull       NoticeKind = "full"
	NoticeRelease    NoticeKind = "release"
)

func (Tick) coordinatorEvent()          {}
func (NodeGone) coordinatorEvent()      {}
func (Replicas) coordinatorEvent()      {}
func (LinkUp) coordinatorEvent()        {}
func (LinkDown) coordinatorEvent()      {}
func (FenceOK) coordinatorEvent()       {}
func (Refused) coordinatorEvent()       {}
func (Opened) coordinatorEvent()        {}
func (Acked) coordinatorEvent()         {}
func (Afforded) coordinatorEvent()      {}
func (Flushed) coordinatorEvent()       {}
func (Pong) coordinatorEvent()          {}
func (WholeOK) coordinatorEvent()       {}
func (ReplicaFailed) coordinatorEvent() {}
func (CopiedLog) coordinatorEvent()     {}
func (Copied) coordinatorEvent()        {}
func (CopyProgress) coordinatorEvent()  {}
func (Write) coordinatorEvent()         {}
func (Read) coordinatorEvent()          {}
func (Flush) coordinatorEvent()         {}
func (Settle) coordinatorEvent()        {}
func (Sampled) coordinatorEvent()       {}
func (Proposed) coordinatorEvent()      {}
func (Meta) coordinatorEvent()          {}
func (Policy) coordinatorEvent()        {}
func (Detach) coordinatorEvent()        {}
func (Stop) coordinatorEvent()          {}

func (Connect) coordinatorAction()       {}
func (Disconnect) coordinatorAction()    {}
func (CloseConn) coordinatorAction()     {}
func (SendFence) coordinatorAction()     {}
func (SendOpen) coordinatorAction()      {}
func (SendJoin) coordinatorAction()      {}
func (SendAppend) coordinatorAction()    {}
func (SendFlush) coordinatorAction()     {}
func (SendAfford) coordinatorAction()    {}
func (SendCommit) coordinatorAction()    {}
func (SendPing) coordinatorAction()      {}
func (SendIntact) coordinatorAction()    {}
func (SendWhole) coordinatorAction()     {}
func (CopyLog) coordinatorAction()       {}
func (StartCopy) coordinatorAction()     {}
func (StopCopy) coordinatorAction()      {}
func (Sequence) coordinatorAction()      {}
func (ReleaseWindow) coordinatorAction() {}
func (SampleRead) coordinatorAction()    {}
func (CompleteWrite) coordinatorAction() {}
func (CompleteRead) coordinatorAction()  {}
func (CompleteFlush) coordinatorAction() {}
func (Propose) coordinatorAction()       {}
func (ReadMeta) coordinatorAction()      {}
func (Activated) coordinatorAction()     {}
func (Detached) coordinatorAction()      {}
func (EndSession) coordinatorAction()    {}
func (Notice) coordinatorAction()        {}

// The methods of Core, in core.go:
//
//	New(Options) *Core                          the first actions come from Start
//	(*Core) Start() []Action                    once, before the first Step
//	(*Core) Step(now time.Duration, ev Event) []Action   the slice is valid until the next Step
//	(*Core) Explain() []Wait                    what it waits for, and since when
//	(*Core) State() State                       a summary for people: phase, members, seqs

// Wait says what a core waits for, in words, since when.
type Wait struct {
	For   string
	Since time.Duration
}

// Phase is where a session stands.
type Phase string

// The phases, in order.
const (
	PhaseFencing    Phase = "fencing"    // asking the in-sync set who holds what
	PhaseOpening    Phase = "opening"    // cutting and extending to S
	PhaseActivating Phase = "activating" // asking raft
	PhaseActive     Phase = "active"
	PhaseDetaching  Phase = "detaching"
	PhaseEnded      Phase = "ended"
)

// State is a summary of a Core.
type State struct {
	Phase      Phase
	Epoch      holdfast.Epoch
	ISRVersion holdfast.ISRVersion
	S          holdfast.Seq
	Tail       holdfast.Seq // last sequenced
	Acked      holdfast.Seq // received by every ackset member
	Commit     holdfast.Seq
	Ack        holdfast.AckMode // in force now
	Refused    uint64           // writes refused for want of space
	Members    []MemberState
}

// MemberState is a summary of one copy as the writer sees it.
type MemberState struct {
	Replica   holdfast.ReplicaID
	Node      holdfast.NodeID
	Role      holdfast.ReplicaRole
	Link      string // down, fencing, fenced, opening, replaying, catching-up, copying, streaming
	InSync    bool   // in raft's in-sync set as far as known
	InAckset  bool
	Tail, Dur holdfast.Seq
	Credit    int64         // chunks that writes may map without asking
	Promised  time.Duration // how long its read promise stands yet; zero: none
	CopyDone  int64         // chunks, while copying
	CopyTotal int64
}
