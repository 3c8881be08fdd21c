package replica

import (
	"testing"

	"pgregory.net/rapid"

	"github.com/holdfast-storage/holdfast"
)

// environment feeds a core with messages of several writers at once, some of
// them mad, and a log that answers late; it checks what may never happen.
type environment struct {
	t *rapid.T
	c *Core

	accepted holdfast.Epoch // highest FENCE delivered
	fenced   holdfast.Epoch // highest made durable
	conn     Conn           // who fenced last

	tail, durable holdfast.Seq // of the log as answered, and for certain on the medium
	handed        holdfast.Seq
	appends       []LogAppend
	fence         *LogFence
	sync          *LogSync
	syncCovers    holdfast.Seq
	cut           *holdfast.Seq
	installs      []LogInstall
	whole         bool
	samples       []LogRead

	batch   Batch
	batches map[Batch]int // how often each was taken or dropped
	acked   map[Conn]holdfast.Seq
	failed  bool
}

func (e *environment) step(ev Event) {
	if c, ok := ev.(Closed); ok {
		delete(e.acked, c.Conn)
	}
	for _, a := range e.c.Step(ev) {
		e.act(a)
	}
	st := e.c.Status()
	switch {
	case st.Dur > st.Tail:
		e.t.Fatalf("after %#v: durable up to %d, but the log ends at %d", ev, st.Dur, st.Tail)
	case st.Commit > st.Tail:
		e.t.Fatalf("after %#v: commit %d beyond the tail %d", ev, st.Commit, st.Tail)
	case st.Fence > e.accepted || st.Fence < e.fenced && !e.failed:
		e.t.Fatalf("after %#v: fence %d, delivered %d, durable %d", ev, st.Fence, e.accepted, e.fenced)
	case len(st.EpochStarts) > 0 && st.Tail > 0 && st.EpochStarts[len(st.EpochStarts)-1].Epoch != st.TailEpoch:
		e.t.Fatalf("after %#v: the tail is of epoch %d, the epochs say %v", ev, st.TailEpoch, st.EpochStarts)
	}
}

func (e *environment) act(a Action) {
	alone := func(what string, epoch holdfast.Epoch) {
		if epoch != e.accepted {
			e.t.Fatalf("%s for epoch %d although %d was accepted (R4, R10)", what, epoch, e.accepted)
		}
	}
	switch a := a.(type) {
	case LogFence:
		if e.fence != nil || len(e.appends) > 0 || e.cut != nil {
			e.t.Fatalf("fence while %d appends and %v are under way", len(e.appends), e.cut)
		}
		e.fence = &a
	case LogAppend:
		e.batches[a.Batch]++
		if a.First != e.handed+1 || e.fence != nil || e.cut != nil {
			e.t.Fatalf("append %d..%d behind %d, fence %v, cut %v (R1)", a.First, a.Last, e.handed, e.fence, e.cut)
		}
		e.handed = a.Last
		e.appends = append(e.appends, a)
	case LogSync:
		if e.sync != nil {
			e.t.Fatalf("two syncs at once")
		}
		e.sync, e.syncCovers = &a, e.tail
	case LogTruncate:
		e.cut = &a.To
	case LogRebase:
		e.cut = &a.To
	case LogCommit:
		if a.Seq > e.tail {
			e.t.Fatalf("commit %d beyond the tail %d", a.Seq, e.tail)
		}
	case LogInstall:
		e.batches[a.Batch]++
		e.installs = append(e.installs, a)
	case LogWhole:
		e.whole = true
	case LogRead:
		e.samples = append(e.samples, a)
	case Drop:
		e.batches[a.Batch]++
	case SendFenceOK:
		alone("FENCE_OK", a.Epoch)
		if e.fenced != a.Epoch || e.durable != e.tail || a.Status.Tail != e.tail || a.Status.Dur != e.tail {
			e.t.Fatalf("FENCE_OK %d: durable fence %d, log %d, durable %d, told %+v (R5)", a.Epoch, e.fenced, e.tail, e.durable, a.Status)
		}
	case SendAck:
		alone("ACK", a.Epoch)
		if a.Tail > e.tail || a.Tail < e.acked[a.Conn] || a.Conn != e.conn {
			e.t.Fatalf("ACK %d to #%d: the log ends at %d, told before %d, writer #%d", a.Tail, a.Conn, e.tail, e.acked[a.Conn], e.conn)
		}
		e.acked[a.Conn] = a.Tail
	case SendFlushed:
		alone("FLUSHED", a.Epoch)
		if a.Dur > e.durable {
			e.t.Fatalf("FLUSHED %d, but only %d is durable", a.Dur, e.durable)
		}
	case SendOpened:
		alone("OPENED", a.Epoch)
		if a.Tail != e.tail || a.Dur > e.durable {
			e.t.Fatalf("OPENED %d/%d, the log says %d/%d", a.Tail, a.Dur, e.tail, e.durable)
		}
	case SendPong:
		alone("PONG", a.Epoch)
	case SendSample:
		if a.Err == nil && a.Conn != e.conn {
			e.t.Fatalf("bytes to #%d although #%d fenced (R10)", a.Conn, e.conn)
		}
	case SendFailed:
		e.failed = e.failed || holdfast.KindOf(a.Err) == holdfast.ErrIO
	}
}

// answer lets one thing finish that the log was asked for.
func (e *environment) answer() {
	var may []func()
	if len(e.appends) > 0 {
		may = append(may, func() {
			a := e.appends[0]
			e.appends = e.appends[1:]
			e.tail = a.Last
			e.step(Appended{Batch: a.Batch})
		})
	}
	if e.fence != nil && len(e.appends) == 0 {
		may = append(may, func() {
			e.fenced, e.durable = max(e.fenced, e.fence.Epoch), e.tail
			e.fence = nil
			e.step(Fenced{})
		})
	}
	if e.sync != nil {
		may = append(may, func() {
			id := e.sync.ID
			e.durable = max(e.durable, min(e.syncCovers, e.tail))
			e.sync = nil
			e.step(Synced{ID: id})
		})
	}
	if e.cut != nil {
		may = append(may, func() {
			e.tail = *e.cut
			e.durable, e.syncCovers, e.handed = min(e.durable, e.tail), min(e.syncCovers, e.tail), e.tail
			if e.c.opening.rebase {
				e.durable, e.syncCovers = e.tail, 0
			}
			e.cut = nil
			e.step(Opened{})
		})
	}
	if len(e.installs) > 0 {
		may = append(may, func() {
			in := e.installs[0]
			e.installs = e.installs[1:]
			e.step(Installed{Batch: in.Batch})
		})
	}
	if e.whole {
		may = append(may, func() {
			e.whole = false
			e.durable = e.tail
			e.step(WholeDone{})
		})
	}
	if len(e.samples) > 0 {
		may = append(may, func() {
			s := e.samples[0]
			e.samples = e.samples[1:]
			e.step(Sampled{Conn: s.Conn, ID: s.ID})
		})
	}
	if len(may) > 0 {
		may[rapid.IntRange(0, len(may)-1).Draw(e.t, "which")]()
	}
}

// TestNothingForbidden: whatever writers and log do, nothing of a lower epoch
// is taken or answered, nothing is acknowledged that was not written, nothing is
// called durable that is not, and every message's payload is used or dropped once.
func TestNothingForbidden(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		e := &environment{t: t, batches: map[Batch]int{}, acked: map[Conn]holdfast.Seq{}}
		e.c = New(Options{})
		e.step(Tick{Now: DefaultPromiseLength})
		nextConn, id := Conn(0), uint64(0)
		for range rapid.IntRange(1, 150).Draw(t, "steps") {
			conn, epoch := e.conn, e.accepted
			if rapid.IntRange(0, 9).Draw(t, "mad") == 0 {
				conn = Conn(rapid.IntRange(1, int(nextConn)+1).Draw(t, "conn"))
				epoch = holdfast.Epoch(rapid.IntRange(0, int(e.accepted)+1).Draw(t, "epoch"))
			}
			id++
			switch rapid.IntRange(0, 17).Draw(t, "event") {
			case 0:
				nextConn++
				epoch = e.accepted + holdfast.Epoch(rapid.IntRange(0, 2).Draw(t, "up"))
				if epoch == 0 {
					epoch = 1
				}
				e.accepted, e.conn = epoch, nextConn
				e.step(Fence{Conn: nextConn, Epoch: epoch})
			case 1, 2:
				e.step(Open{Conn: conn, Epoch: epoch, CutTo: holdfast.Seq(rapid.IntRange(0, int(e.tail)+2).Draw(t, "cut"))})
			case 3:
				e.step(Join{Conn: conn, Epoch: epoch, At: e.tail + holdfast.Seq(rapid.IntRange(0, 5).Draw(t, "at"))})
			case 4, 5, 6:
				e.batch++
				e.batches[e.batch] = 0
				first := e.handed + 1
				if rapid.IntRange(0, 9).Draw(t, "gap") == 0 {
					first = holdfast.Seq(rapid.IntRange(0, int(e.handed)+3).Draw(t, "first"))
				}
				last := first + holdfast.Seq(rapid.IntRange(0, 2).Draw(t, "n"))
				of := epoch - min(epoch, holdfast.Epoch(rapid.IntRange(0, 1).Draw(t, "older")))
				e.step(Append{Conn: conn, Epoch: epoch, EntryEpoch: of, First: first, Last: last, Batch: e.batch})
			case 7:
				e.step(Flush{Conn: conn, Epoch: epoch, ID: id})
			case 8:
				e.step(Commit{Conn: conn, Epoch: epoch, Seq: holdfast.Seq(rapid.IntRange(0, int(e.tail)+3).Draw(t, "commit"))})
			case 9:
				e.step(Ping{Conn: conn, Epoch: epoch, Nonce: id})
			case 10:
				e.step(Read{Conn: conn, Epoch: epoch, ID: id})
			case 11:
				e.batch++
				e.batches[e.batch] = 0
				e.step(Install{Conn: conn, Epoch: epoch, AsOf: holdfast.Seq(rapid.IntRange(0, int(e.tail)+1).Draw(t, "as-of")), Batch: e.batch})
			case 12:
				e.step(Whole{Conn: conn, Epoch: epoch})
			case 13:
				if rapid.Bool().Draw(t, "close") {
					e.step(Closed{Conn: conn})
				}
				e.step(Intact{Conn: conn, Epoch: epoch})
			default:
				e.answer()
			}
		}
		for range 1000 {
			e.answer()
		}
		for b, n := range e.batches {
			if n != 1 {
				t.Fatalf("the payload of message %d was used or dropped %d times, want once", b, n)
			}
		}
	})
}
