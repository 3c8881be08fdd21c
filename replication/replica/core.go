package replica

import (
	"time"

	"github.com/holdfast-storage/holdfast"
)

// step is how far the writer of a session has come.
//
//	none --FENCE--> fencing --(durable)--> fenced --OPEN/JOIN--> opening --(durable)--> open
//
// Any accepted FENCE starts over; the end of the connection leads to none.
type step uint8

const (
	stepNone step = iota
	stepFencing
	stepFenced
	stepOpening
	stepOpen
)

// session is the one connection that may change this copy.
type session struct {
	number uint64 // counts sessions, so that late answers are told apart
	conn   Conn
	epoch  holdfast.Epoch
	step   step
	joined bool         // opened by JOIN
	joinAt holdfast.Seq // where
	maxV   holdfast.Seq // highest AsOf installed
}

// appending is one LogAppend that was not answered yet.
type appending struct {
	session     uint64
	conn        Conn
	writer      holdfast.Epoch // of the message
	batch       Batch
	epoch       holdfast.Epoch // of the entries
	first, last holdfast.Seq
}

// waiter is a FLUSH that waits until everything up to need is durable.
type waiter struct {
	id   uint64
	need holdfast.Seq
}

// fetching is a chunk list that waits until the base has reached need.
type fetching struct {
	conn Conn
	id   uint64
	need holdfast.Seq
}

// maxWaiters bounds the flushes, and separately the fetches, that one session
// may have waiting. A coordinator has two flushes and one fetch outstanding.
const maxWaiters = 1024

// Core is one copy. It is not safe for concurrent use.
type Core struct {
	now    time.Duration
	length time.Duration // of a promise

	st Status
	// accepted is the highest epoch whose FENCE was accepted. Above st.Fence
	// while that is being made durable; lower epochs are ignored from the
	// moment of acceptance (R4).
	accepted holdfast.Epoch
	// No higher FENCE is accepted before promised: a promise stands until then,
	// or may have been given before the start.
	promised time.Duration
	doubted  bool   // it was put off once because of the clock
	held     *Fence // a higher FENCE that waits for it
	heldAt   time.Duration
	lastTick time.Duration

	sess     session
	sessions uint64
	since    time.Duration // when sess.step was entered

	fencing   bool // a LogFence is outstanding, for fenceFor
	fenceFor  holdfast.Epoch
	fenceConn Conn

	handed      holdfast.Seq   // last seq handed to the log
	handedEpoch holdfast.Epoch // its epoch
	appends     fifo[appending]
	badSession  uint64 // its remaining appends fail, and are ignored
	other       int    // outstanding LogTruncate, LogRebase, LogInstall, LogWhole

	opening   openWork
	rebasing  bool // a LogRebase is outstanding
	installs  []installing
	repairs   []installing
	wholeWant bool
	wholeBusy bool
	wholeTail holdfast.Seq

	waiters   []waiter
	syncing   bool
	syncID    uint64
	syncTo    holdfast.Seq
	fetches   []fetching
	commitGot holdfast.Seq // highest commit told; st.Commit never exceeds the tail

	failed error
	out    []Action
}

type openWork struct {
	session uint64
	rebase  bool
	to      holdfast.Seq
}

type installing struct {
	session uint64
	batch   Batch
	asOf    holdfast.Seq
}

// New returns the core of a copy whose log has recovered to o.Status.
func New(o Options) *Core {
	if o.PromiseLength == 0 {
		o.PromiseLength = DefaultPromiseLength
	}
	c := &Core{now: o.Now, length: o.PromiseLength, st: o.Status}
	c.st.EpochStarts = append([]EpochStart(nil), o.Status.EpochStarts...)
	c.accepted = c.st.Fence
	c.handed, c.handedEpoch = c.st.Tail, c.st.TailEpoch
	c.commitGot = c.st.Commit
	c.since, c.lastTick = o.Now, o.Now
	c.promised = o.Now
	if !o.Fresh && Mutant != "promise_lost_on_crash" {
		c.promised += o.PromiseLength
	}
	return c
}

// Status returns what the core knows now.
func (c *Core) Status() Status {
	st := c.st
	st.EpochStarts = append([]EpochStart(nil), c.st.EpochStarts...)
	return st
}

// Writer returns the connection and epoch of the open session, if there is one.
func (c *Core) Writer() (Conn, holdfast.Epoch, bool) {
	return c.sess.conn, c.sess.epoch, c.sess.step == stepOpen
}

// Step consumes one event. The slice it returns is valid until the next call.
func (c *Core) Step(ev Event) []Action {
	c.out = c.out[:0]
	switch e := ev.(type) {
	case Append:
		c.append(e)
	case Appended:
		c.appended(e)
	case Ping:
		c.ping(e)
	case Read:
		c.read(e)
	case Sampled:
		c.sampled(e)
	case Flush:
		c.flush(e)
	case Synced:
		c.synced(e)
	case Commit:
		if c.admit(e.Conn, e.Epoch) && e.Seq > c.commitGot {
			c.commitGot = e.Seq
		}
	case Tick:
		c.tick(e.Now)
	case Fence:
		c.fence(e)
	case Fenced:
		c.fenced(e)
	case Open:
		c.open(e.Conn, e.Epoch, e.ISRVersion, openWork{to: e.CutTo})
	case Join:
		c.open(e.Conn, e.Epoch, e.ISRVersion, openWork{to: e.At, rebase: true})
	case Opened:
		c.opened(e)
	case Intact:
		if c.admit(e.Conn, e.Epoch) && !c.st.Syncing && !c.st.Damaged {
			c.st.Intact, c.st.Lost = true, 0 // what it lost, the writer knows
			c.do(LogIntact{Epoch: e.Epoch})
		}
	case Install:
		c.install(e)
	case Installed:
		c.installed(e)
	case Repair:
		c.repair(e)
	case Repaired:
		c.repaired(e)
	case Whole:
		if c.admit(e.Conn, e.Epoch) && c.st.Syncing && !c.wholeBusy {
			c.wholeWant = true
		}
	case WholeDone:
		c.wholeDone(e)
	case Fetch:
		c.fetch(e)
	case AppliedTo:
		c.appliedTo(e)
	case Closed:
		c.closed(e.Conn)
	case Left:
		c.left(e.Conn)
	case Failed:
		c.fail(e.Err)
	case Damaged:
		c.damage()
	}
	c.settle()
	return c.out
}

func (c *Core) do(a Action) { c.out = append(c.out, a) }

// settle hands out what has become possible.
func (c *Core) settle() {
	if c.failed != nil {
		return
	}
	busy := c.appends.len() > 0 || c.other > 0
	if c.sess.step == stepFencing && !c.fencing && (!busy || Mutant == "no_fence") {
		c.fencing, c.fenceFor, c.fenceConn = true, c.sess.epoch, c.sess.conn
		epoch := c.sess.epoch
		if Mutant == "volatile_fence" || Mutant == "no_fence" {
			epoch = c.st.Fence
		}
		c.do(LogFence{Epoch: epoch})
	}
	if commit := min(c.commitGot, c.st.Tail); commit > c.st.Commit && !c.fencing && c.other == 0 {
		c.st.Commit = commit
		c.do(LogCommit{Seq: commit})
	}
	if Mutant == "apply_uncommitted" {
		c.do(LogCommit{Seq: c.st.Tail})
	}
	if c.wholeWant && c.sess.step == stepOpen && !busy && (c.st.Tail >= c.sess.maxV || Mutant == "no_tail_floor") {
		c.wholeWant, c.wholeBusy, c.wholeTail = false, true, c.st.Tail
		c.other++
		c.do(LogWhole{})
	}
	c.startSync()
}

// admit says whether a message may be acted on: its connection is the open
// session and no higher epoch was accepted. A lower epoch is told so.
func (c *Core) admit(conn Conn, epoch holdfast.Epoch) bool {
	if Mutant == "no_fence" && c.failed == nil && c.sess.step != stepNone && epoch <= c.accepted {
		return true
	}
	if c.failed == nil && conn == c.sess.conn && epoch == c.sess.epoch && epoch == c.accepted && c.sess.step == stepOpen {
		return true
	}
	if epoch < c.accepted {
		c.do(SendRefused{Conn: conn, Fence: c.accepted})
	}
	return false
}

func (c *Core) read(e Read) {
	if !c.admit(e.Conn, e.Epoch) {
		c.do(DropRead{Conn: e.Conn, ID: e.ID})
		return
	}
	if c.st.Syncing || c.st.Damaged {
		c.do(SendSample{Conn: e.Conn, ID: e.ID, Err: holdfast.Errorf(holdfast.ErrRefused, "this copy is not whole")})
		return
	}
	c.do(LogRead{Conn: e.Conn, ID: e.ID})
}

// sampled checks the fence after the bytes were taken: since fences only rise,
// the epoch was alone at the sample too (R10).
func (c *Core) sampled(e Sampled) {
	alone := c.failed == nil && e.Conn == c.sess.conn && c.sess.epoch == c.accepted && c.sess.step == stepOpen
	if !alone && Mutant != "no_fence" {
		c.do(DropRead{Conn: e.Conn, ID: e.ID})
		return
	}
	c.do(SendSample{Conn: e.Conn, ID: e.ID, Err: e.Err})
}

func (c *Core) closed(conn Conn) {
	if c.held != nil && c.held.Conn == conn {
		c.held = nil
	}
	if conn == c.sess.conn && c.sess.step != stepNone {
		c.leave()
	}
}

// damage ends the session: the writer is to hear, by the next FENCE_OK, that
// what this copy holds is not known any more.
func (c *Core) damage() {
	if c.failed != nil || c.st.Damaged {
		return
	}
	c.st.Damaged, c.st.Intact = true, false
	if c.sess.step != stepNone {
		c.do(CloseConn{Conn: c.sess.conn})
		c.leave()
	}
}

// fail ends this copy for this process life (R12), unless all that is wrong is
// what it holds.
func (c *Core) fail(err error) {
	if c.failed != nil {
		return
	}
	if holdfast.KindOf(err) == holdfast.ErrIntegrity {
		c.damage()
		return
	}
	if err == nil {
		err = holdfast.ErrIO
	}
	c.failed = err
	c.st.Intact = false
	if c.sess.step != stepNone {
		c.do(SendFailed{Conn: c.sess.conn, Epoch: c.sess.epoch, Err: err})
		c.do(CloseConn{Conn: c.sess.conn})
	}
	if c.held != nil {
		c.do(CloseConn{Conn: c.held.Conn})
		c.held = nil
	}
	c.leave()
}
