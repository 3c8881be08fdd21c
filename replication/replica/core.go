package replica

import (
	"errors"
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
	now     time.Duration
	started time.Duration
	promise time.Duration

	st Status
	// accepted is the highest epoch whose FENCE was accepted. Above st.Fence
	// while that is being made durable; lower epochs are ignored from the
	// moment of acceptance (R4).
	accepted holdfast.Epoch
	held     *Fence // a higher FENCE that waits for the start-up time to pass
	heldAt   time.Duration

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
	held    holdfast.Seq // rebase: what the base held whole when it began
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
	c := &Core{now: o.Now, started: o.Now, promise: o.PromiseLength, st: o.Status}
	c.st.EpochStarts = append([]EpochStart(nil), o.Status.EpochStarts...)
	c.accepted = c.st.Fence
	c.handed, c.handedEpoch = c.st.Tail, c.st.TailEpoch
	c.commitGot = c.st.Commit
	c.since = o.Now
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
		if c.admit(e.Conn, e.Epoch) {
			c.do(SendPong{Conn: e.Conn, Epoch: e.Epoch, Nonce: e.Nonce})
		}
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
		c.now = max(c.now, e.Now)
		c.releaseHeld()
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
			c.st.Intact = true
			c.do(LogIntact{Epoch: e.Epoch})
		}
	case Install:
		c.install(e)
	case Installed:
		c.installed(e)
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
	case Failed:
		c.fail(e.Err)
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
	if c.wholeWant && c.sess.step == stepOpen && !busy && c.st.Tail >= c.sess.maxV {
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

// fence takes FENCE, or holds it back until no promise given before a restart
// can stand any more.
func (c *Core) fence(e Fence) {
	switch {
	case c.failed != nil:
		c.do(SendFailed{Conn: e.Conn, Epoch: e.Epoch, Err: c.failed})
		c.do(CloseConn{Conn: e.Conn})
	case e.Epoch < c.accepted:
		c.do(SendRefused{Conn: e.Conn, Fence: c.accepted})
		c.do(CloseConn{Conn: e.Conn})
	case e.Epoch > c.accepted && c.now < c.started+c.promise:
		if c.held != nil && c.held.Conn != e.Conn {
			older := *c.held
			if e.Epoch < older.Epoch {
				c.do(CloseConn{Conn: e.Conn})
				return
			}
			c.do(CloseConn{Conn: older.Conn})
		}
		c.held, c.heldAt = &e, c.now
	default:
		c.accept(e)
	}
}

func (c *Core) releaseHeld() {
	if c.held == nil || c.now < c.started+c.promise {
		return
	}
	e := *c.held
	c.held = nil
	c.fence(e)
}

// accept makes e's connection the session. From here on nothing of a lower
// epoch, and nothing of an older connection, changes or learns anything.
func (c *Core) accept(e Fence) {
	old := c.sess
	c.leave()
	if old.step != stepNone && old.conn != e.Conn && Mutant != "no_fence" {
		if old.epoch < e.Epoch {
			c.do(SendRefused{Conn: old.conn, Fence: e.Epoch})
		}
		c.do(CloseConn{Conn: old.conn})
	}
	c.accepted = e.Epoch
	c.sessions++
	c.sess = session{number: c.sessions, conn: e.Conn, epoch: e.Epoch, step: stepFencing}
	c.since = c.now
}

// leave forgets the session and what waits on its behalf.
func (c *Core) leave() {
	for _, f := range c.fetches {
		c.do(DropRead{Conn: f.conn, ID: f.id})
	}
	c.fetches = c.fetches[:0]
	c.waiters = c.waiters[:0]
	c.wholeWant = false
	c.sess = session{}
	c.since = c.now
}

func (c *Core) fenced(e Fenced) {
	if !c.fencing {
		return
	}
	c.fencing = false
	if e.Err != nil {
		c.fail(e.Err)
		return
	}
	if Mutant != "no_fence" {
		c.st.Fence = c.fenceFor
	}
	c.st.Dur = c.st.Tail // the seal
	c.syncTo = min(c.syncTo, c.st.Tail)
	if c.sess.step == stepFencing && c.sess.epoch == c.fenceFor && c.sess.conn == c.fenceConn {
		c.move(stepFenced)
		c.do(SendFenceOK{Conn: c.sess.conn, Epoch: c.sess.epoch, Status: c.Status()})
	}
}

func (c *Core) move(s step) { c.sess.step, c.since = s, c.now }

// open takes OPEN and JOIN.
func (c *Core) open(conn Conn, epoch holdfast.Epoch, isr holdfast.ISRVersion, w openWork) {
	if epoch < c.accepted {
		c.do(SendRefused{Conn: conn, Fence: c.accepted})
		return
	}
	if c.failed != nil || conn != c.sess.conn || epoch != c.sess.epoch || c.sess.step != stepFenced {
		return
	}
	if !w.rebase && c.st.Syncing {
		// The tail of a copy in the making proves nothing: only JOIN may go on.
		c.do(CloseConn{Conn: conn})
		return
	}
	if !w.rebase && w.to < c.st.Commit {
		// What was committed is in the base, or on its way: no true writer cuts it.
		c.do(SendFailed{Conn: conn, Epoch: epoch, Err: holdfast.Errorf(holdfast.ErrRefused, "a cut to %d below commit %d", w.to, c.st.Commit)})
		c.do(CloseConn{Conn: conn})
		c.leave()
		return
	}
	if epoch > c.st.HintEpoch || epoch == c.st.HintEpoch && isr > c.st.HintISR {
		c.st.HintEpoch, c.st.HintISR = epoch, isr
		c.do(LogHint{Epoch: epoch, ISR: isr})
	}
	w.session = c.sess.number
	c.opening = w
	c.move(stepOpening)
	switch {
	case w.rebase:
		c.other++
		c.opening.held, c.rebasing = c.st.Applied, true
		c.do(LogRebase{Epoch: epoch, To: w.to})
	case w.to < c.st.Tail:
		c.other++
		c.do(LogTruncate{To: w.to})
	default:
		c.openDone()
	}
}

func (c *Core) opened(e Opened) {
	if c.other == 0 {
		return
	}
	c.other--
	c.rebasing = false
	if e.Err != nil {
		c.fail(e.Err)
		return
	}
	w := c.opening
	if w.rebase {
		if !c.st.Syncing {
			c.st.Held = w.held
		}
		c.st.Syncing, c.st.Intact = true, false
		c.st.Tail, c.st.Dur = w.to, w.to
		c.st.Applied, c.st.Checkpoint = w.to, w.to
		c.st.TailEpoch = c.st.Fence
		c.st.EpochStarts = append(c.st.EpochStarts[:0], EpochStart{Epoch: c.st.Fence, First: w.to})
		c.st.Commit = min(c.st.Commit, w.to)
		c.commitGot = c.st.Commit
		c.syncTo = 0
	} else {
		c.cut(w.to)
	}
	c.handed, c.handedEpoch = c.st.Tail, c.st.TailEpoch
	if c.sess.number == w.session && c.sess.step == stepOpening {
		c.openDone()
	}
}

// cut mirrors a truncation of the log.
func (c *Core) cut(to holdfast.Seq) {
	c.st.Tail = to
	c.st.Dur = min(c.st.Dur, to)
	c.syncTo = min(c.syncTo, to)
	starts := c.st.EpochStarts
	for len(starts) > 0 && starts[len(starts)-1].First > to {
		starts = starts[:len(starts)-1]
	}
	c.st.EpochStarts = starts
	c.st.TailEpoch = 0
	if len(starts) > 0 && to > 0 {
		c.st.TailEpoch = starts[len(starts)-1].Epoch
	}
}

func (c *Core) openDone() {
	c.sess.joined, c.sess.joinAt = c.opening.rebase, c.opening.to
	c.move(stepOpen)
	c.do(SendOpened{Conn: c.sess.conn, Epoch: c.sess.epoch, Tail: c.st.Tail, Dur: c.st.Dur})
}

// append takes entries. On one ordered connection they can only be the next
// ones (R1); anything else is a broken writer, whose connection ends.
func (c *Core) append(e Append) {
	if !c.admit(e.Conn, e.Epoch) {
		c.do(Drop{Batch: e.Batch})
		return
	}
	if e.First != c.handed+1 || e.Last < e.First || e.EntryEpoch > e.Epoch || e.EntryEpoch < c.handedEpoch || c.badSession == c.sess.number {
		c.do(Drop{Batch: e.Batch})
		c.do(CloseConn{Conn: e.Conn})
		return
	}
	c.handed, c.handedEpoch = e.Last, e.EntryEpoch
	c.appends.push(appending{session: c.sess.number, conn: e.Conn, writer: e.Epoch, batch: e.Batch, epoch: e.EntryEpoch, first: e.First, last: e.Last})
	c.do(LogAppend{Batch: e.Batch, First: e.First, Last: e.Last})
}

func (c *Core) appended(e Appended) {
	if c.appends.len() == 0 || c.appends.front().batch != e.Batch {
		return
	}
	a := c.appends.pop()
	if e.Err != nil {
		c.appendFailed(a, e.Err)
		return
	}
	if a.epoch > c.st.TailEpoch {
		c.st.EpochStarts = append(c.st.EpochStarts, EpochStart{Epoch: a.epoch, First: a.first})
	}
	c.st.Tail, c.st.TailEpoch = a.last, a.epoch
	if a.session == c.sess.number && c.sess.step == stepOpen {
		c.do(SendAck{Conn: a.conn, Epoch: a.writer, Tail: c.st.Tail})
	}
}

// appendFailed: a payload that does not match costs the connection; the
// batches handed out behind it cannot be logged and their errors mean nothing.
// Any other error is the disk's (R12).
func (c *Core) appendFailed(a appending, err error) {
	if a.session == c.badSession {
		c.rewindHanded()
		return
	}
	if !errors.Is(err, holdfast.ErrIntegrity) {
		c.fail(err)
		return
	}
	c.badSession = a.session
	c.rewindHanded()
	if a.session == c.sess.number {
		c.do(SendFailed{Conn: c.sess.conn, Epoch: c.sess.epoch, Seq: a.first, Err: err})
		c.do(CloseConn{Conn: c.sess.conn})
		c.leave()
	}
}

func (c *Core) rewindHanded() {
	if c.appends.len() == 0 {
		c.handed, c.handedEpoch = c.st.Tail, c.st.TailEpoch
	}
}

func (c *Core) flush(e Flush) {
	if !c.admit(e.Conn, e.Epoch) {
		return
	}
	if c.handed <= c.st.Dur {
		c.do(SendFlushed{Conn: e.Conn, Epoch: e.Epoch, ID: e.ID, Dur: c.st.Dur})
		return
	}
	if len(c.waiters) == maxWaiters {
		c.do(CloseConn{Conn: e.Conn})
		return
	}
	c.waiters = append(c.waiters, waiter{id: e.ID, need: c.handed})
}

// startSync syncs once for all who wait and whose entries have been written.
func (c *Core) startSync() {
	if c.syncing || c.fencing || c.other > 0 || len(c.waiters) == 0 || c.waiters[0].need > c.st.Tail {
		return
	}
	c.syncing = true
	c.syncID++
	c.syncTo = c.st.Tail
	c.do(LogSync{ID: c.syncID})
}

func (c *Core) synced(e Synced) {
	if !c.syncing || e.ID != c.syncID {
		return
	}
	c.syncing = false
	if e.Err != nil {
		c.fail(e.Err)
		return
	}
	// syncTo was lowered if the log was cut meanwhile: what was appended
	// behind the cut is not covered by this sync.
	c.st.Dur = max(c.st.Dur, c.syncTo)
	n := 0
	for n < len(c.waiters) && c.waiters[n].need <= c.st.Dur {
		c.do(SendFlushed{Conn: c.sess.conn, Epoch: c.sess.epoch, ID: c.waiters[n].id, Dur: c.st.Dur})
		n++
	}
	c.waiters = append(c.waiters[:0], c.waiters[n:]...)
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

// install takes one chunk of a copy under the conditions of R11.
func (c *Core) install(e Install) {
	if !c.admit(e.Conn, e.Epoch) || !c.st.Syncing || !c.sess.joined {
		c.do(Drop{Batch: e.Batch})
		return
	}
	floor := max(c.sess.joinAt, c.st.Checkpoint)
	if e.AsOf < floor || e.AsOf > c.commitGot {
		c.do(SendInstalled{Conn: e.Conn, Batch: e.Batch, AsOf: e.AsOf, Retry: true})
		c.do(Drop{Batch: e.Batch})
		return
	}
	c.other++
	c.installs = append(c.installs, installing{session: c.sess.number, batch: e.Batch, asOf: e.AsOf})
	c.do(LogInstall{Batch: e.Batch, AsOf: e.AsOf})
}

func (c *Core) installed(e Installed) {
	at := -1
	for i := range c.installs {
		if c.installs[i].batch == e.Batch {
			at = i
			break
		}
	}
	if at < 0 {
		return
	}
	in := c.installs[at]
	c.installs = append(c.installs[:at], c.installs[at+1:]...)
	c.other--
	retry := errors.Is(e.Err, holdfast.ErrRefused) // the checkpoint moved meanwhile
	if e.Err != nil && !retry {
		c.fail(e.Err)
		return
	}
	if in.session != c.sess.number || c.sess.step != stepOpen {
		return
	}
	if !retry {
		c.sess.maxV = max(c.sess.maxV, in.asOf)
	}
	c.do(SendInstalled{Conn: c.sess.conn, Batch: in.batch, AsOf: in.asOf, Retry: retry})
}

func (c *Core) wholeDone(e WholeDone) {
	if !c.wholeBusy {
		return
	}
	c.wholeBusy = false
	c.other--
	if e.Err != nil {
		c.fail(e.Err)
		return
	}
	c.st.Syncing, c.st.Damaged = false, false
	c.st.Held = 0
	c.st.Dur = max(c.st.Dur, c.wholeTail)
	if c.sess.step == stepOpen && c.sess.joined {
		c.do(SendWhole{Conn: c.sess.conn, Epoch: c.sess.epoch, Dur: c.st.Dur})
	}
}

func (c *Core) fetch(e Fetch) {
	if !c.admit(e.Conn, e.Epoch) || len(c.fetches) == maxWaiters {
		c.do(DropRead{Conn: e.Conn, ID: e.ID})
		return
	}
	if e.Chunks && e.To > c.st.Applied {
		c.fetches = append(c.fetches, fetching{conn: e.Conn, id: e.ID, need: e.To})
		return
	}
	c.do(LogFetch{Conn: e.Conn, ID: e.ID})
}

func (c *Core) appliedTo(e AppliedTo) {
	if c.rebasing {
		return // it may speak of the base before or after the rebase
	}
	c.st.Applied = max(c.st.Applied, e.Applied)
	c.st.Checkpoint = max(c.st.Checkpoint, e.Checkpoint)
	kept := c.fetches[:0]
	for _, f := range c.fetches {
		if f.need <= c.st.Applied {
			c.do(LogFetch{Conn: f.conn, ID: f.id})
		} else {
			kept = append(kept, f)
		}
	}
	c.fetches = kept
	// The log is never cut below what is applied: the start that covers it is enough.
	starts := c.st.EpochStarts
	n := 0
	for n+1 < len(starts) && starts[n+1].First <= c.st.Applied {
		n++
	}
	c.st.EpochStarts = append(starts[:0], starts[n:]...)
}

func (c *Core) closed(conn Conn) {
	if c.held != nil && c.held.Conn == conn {
		c.held = nil
	}
	if conn == c.sess.conn && c.sess.step != stepNone {
		c.leave()
	}
}

// fail ends this copy for this process life (R12).
func (c *Core) fail(err error) {
	if c.failed != nil {
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
