package sim

import (
	"errors"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/replication/coordinator"
	"github.com/holdfast-storage/holdfast/replication/replica"
)

// writer is the edge around a coordinator core: one attachment on one node.
type writer struct {
	n     int // node index
	node  *node
	life  int
	epoch holdfast.Epoch
	core  *coordinator.Core
	era   int

	links map[coordinator.Conn]*link
	conns map[*link]coordinator.Conn
	dials map[holdfast.ReplicaID]int
	last  coordinator.Conn

	pending map[coordinator.OpID]*op
	window  map[holdfast.Seq]mutation
	samples map[uint64]*op // by number of the SampleRead
	fetchID uint64
	copies  map[uint64]*copying
	fetches map[uint64]*copying
	install map[uint64]*copying
	asks    map[uint64]*ask
	repairs map[repairKey]*repair

	active    bool
	ended     bool
	detaching bool
	reading   int // requests in flight
	writing   int
}

// copying is a CopyLog or StartCopy under way.
type copying struct {
	id       uint64
	src, dst *link
	epoch    holdfast.Epoch
	from, to holdfast.Seq
	floor    holdfast.Seq          // chunks are asked for as of this
	ends     [2]coordinator.Holder // source and target
	log      bool
	todo     []int
	listed   bool
	maxAsOf  holdfast.Seq
	ended    bool
}

func newWriter(n *node, o coordinator.Options) *writer {
	wr := &writer{
		n: n.index, node: n, life: n.life, epoch: o.Epoch, core: coordinator.New(o),
		links: map[coordinator.Conn]*link{}, conns: map[*link]coordinator.Conn{}, dials: map[holdfast.ReplicaID]int{},
		pending: map[coordinator.OpID]*op{}, window: map[holdfast.Seq]mutation{}, samples: map[uint64]*op{},
		copies: map[uint64]*copying{}, fetches: map[uint64]*copying{}, install: map[uint64]*copying{},
		asks: map[uint64]*ask{}, repairs: map[repairKey]*repair{},
	}
	n.writers = append(n.writers, wr)
	n.w.log("n%d attaches, epoch %d", n.index, o.Epoch)
	wr.execute(wr.core.Start())
	return wr
}

// die ends the writer with its process.
func (wr *writer) die() { wr.ended = true }

func (wr *writer) tick() {
	if !wr.ended {
		wr.step(coordinator.Tick{})
	}
}

func (wr *writer) step(ev coordinator.Event) {
	if wr.node.life != wr.life || !wr.node.up {
		return
	}
	if wr.node.w.cfg.Cover == nil {
		wr.execute(wr.core.Step(wr.node.clock(), ev))
		return
	}
	before := wr.core.State()
	actions := append([]coordinator.Action(nil), wr.core.Step(wr.node.clock(), ev)...)
	wr.covered(ev, actions, before, wr.core.State())
	wr.execute(actions)
}

// covered tells one step of the core.
func (wr *writer) covered(ev coordinator.Event, actions []coordinator.Action, before, after coordinator.State) {
	w := wr.node.w
	w.cover("writer takes %T", ev)
	for _, a := range actions {
		switch a := a.(type) {
		case coordinator.Notice:
			w.cover("notice %s", a.Kind)
		case coordinator.EndSession:
			w.cover("end %s", a.Reason)
		case coordinator.Propose:
			w.cover("propose %s", a.Command)
		default:
			w.cover("writer asks %T", a)
		}
	}
	if before.Phase != after.Phase {
		w.cover("phase %s -> %s", before.Phase, after.Phase)
	}
	for i := range min(len(before.Members), len(after.Members)) {
		if b, a := before.Members[i].Link, after.Members[i].Link; a != b {
			w.cover("member %s -> %s", b, a)
		}
		if b, a := before.Members[i], after.Members[i]; a.Promised > 0 && b.Promised == 0 {
			w.cover("promise begins")
		} else if a.Promised == 0 && b.Promised > 0 {
			w.cover("promise ends")
		}
	}
}

func (wr *writer) execute(actions []coordinator.Action) {
	for _, a := range append([]coordinator.Action(nil), actions...) {
		wr.act(a)
	}
}

// after steps later, in this process life.
func (wr *writer) after(d time.Duration, ev func() coordinator.Event) {
	wr.node.after(d, func() { wr.step(ev()) })
}

func (wr *writer) linkDown(l *link) {
	c, ok := wr.conns[l]
	if !ok {
		return
	}
	delete(wr.conns, l)
	delete(wr.links, c)
	wr.step(coordinator.LinkDown{Replica: l.id, Conn: c})
	wr.unanswered(l)
}

func (wr *writer) send(c coordinator.Conn, body any) {
	if l := wr.links[c]; l != nil && l.wOpen {
		l.sendToReplica(body)
	}
}

func (wr *writer) dial(id holdfast.ReplicaID, number int) {
	w := wr.node.w
	wr.node.after(w.between(time.Millisecond, 20*time.Millisecond), func() {
		if wr.dials[id] != number || wr.ended {
			return
		}
		target := w.nodeOf(id)
		if !target.up || target.host == nil || target.replica != id || !w.reachable(wr.node.index, target.index) {
			wr.node.after(w.between(50*time.Millisecond, 300*time.Millisecond), func() { wr.dial(id, number) })
			return
		}
		l := &link{w: w, wr: wr, wLife: wr.life, host: target, id: id, rLife: target.life, wOpen: true, rOpen: true}
		w.links = append(w.links, l)
		wr.last++
		wr.links[wr.last], wr.conns[l] = l, wr.last
		wr.dials[id]++
		wr.step(coordinator.LinkUp{Replica: id, Conn: wr.last})
	})
}

// receive turns a replica's message into an event.
func (wr *writer) receive(l *link, body any) {
	c, ok := wr.conns[l]
	if !ok {
		return
	}
	id := l.id
	switch m := body.(type) {
	case replica.SendFenceOK:
		s := m.Status
		wr.step(coordinator.FenceOK{Replica: id, Conn: c, Epoch: m.Epoch, Status: coordinator.Status{
			Fence: s.Fence, Tail: s.Tail, TailEpoch: s.TailEpoch, Dur: s.Dur, Commit: s.Commit, Applied: s.Applied,
			Checkpoint: s.Checkpoint, Intact: s.Intact, Syncing: s.Syncing, Held: s.Held, Damaged: s.Damaged,
			HintEpoch: s.HintEpoch, HintISR: s.HintISR,
		}})
	case replica.SendRefused:
		wr.step(coordinator.Refused{Replica: id, Conn: c, Fence: m.Fence})
	case replica.SendOpened:
		wr.step(coordinator.Opened{Replica: id, Conn: c, Tail: m.Tail, Dur: m.Dur, Held: m.Held, Credit: coordinator.Unlimited})
	case replica.SendAck:
		wr.step(coordinator.Acked{Replica: id, Conn: c, Tail: m.Tail, Credit: coordinator.Unlimited})
	case replica.SendFlushed:
		wr.step(coordinator.Flushed{Replica: id, Conn: c, ID: m.ID, Dur: m.Dur})
	case replica.SendPong:
		wr.step(coordinator.Pong{Replica: id, Conn: c, Nonce: m.Nonce, Promise: m.Promise})
	case replica.SendWhole:
		wr.step(coordinator.WholeOK{Replica: id, Conn: c, Dur: m.Dur})
	case replica.SendFailed:
		wr.step(coordinator.ReplicaFailed{Replica: id, Conn: c, Seq: m.Seq, Err: m.Err})
	case sampleMsg:
		o := wr.samples[m.id]
		if o == nil {
			return
		}
		delete(wr.samples, m.id)
		if o.sample == m.id && m.err == nil {
			o.values = m.values
		}
		wr.step(coordinator.Sampled{ID: o.id, Sample: m.id, Replica: id, Conn: c, Err: m.err})
	case fetchedMsg:
		if !wr.answered(m.id, m, m.err == nil) {
			wr.fetched(m)
		}
	case installedMsg:
		if !wr.answered(m.id, m, true) {
			wr.installed(m)
		}
	case damagedMsg:
		wr.damaged(id, m.chunks)
	}
}

func (wr *writer) act(a coordinator.Action) {
	w := wr.node.w
	switch a := a.(type) {
	case coordinator.Connect:
		wr.dials[a.Replica]++
		wr.dial(a.Replica, wr.dials[a.Replica])
	case coordinator.Disconnect:
		wr.dials[a.Replica]++
	case coordinator.CloseConn:
		if l := wr.links[a.Conn]; l != nil {
			l.closeByWriter()
		}
	case coordinator.SendFence:
		wr.send(a.Conn, replica.Fence{Epoch: a.Epoch})
	case coordinator.SendOpen:
		wr.send(a.Conn, replica.Open{Epoch: a.Epoch, CutTo: a.CutTo, ISRVersion: a.ISRVersion})
	case coordinator.SendJoin:
		w.log("e%d joins %v behind %d", wr.epoch, w.indexOf(a.Replica), a.At)
		if !w.raft.startSync(wr.epoch, a.Replica) {
			return // it is to go, or this writer is over
		}
		wr.send(a.Conn, replica.Join{Epoch: a.Epoch, At: a.At, ISRVersion: a.ISRVersion})
	case coordinator.SendAppend:
		wr.sendAppend(a)
	case coordinator.SendFlush:
		wr.send(a.Conn, replica.Flush{Epoch: a.Epoch, ID: a.ID})
	case coordinator.SendCommit:
		wr.send(a.Conn, replica.Commit{Epoch: a.Epoch, Seq: a.Seq})
	case coordinator.SendPing:
		wr.send(a.Conn, replica.Ping{Epoch: a.Epoch, Nonce: a.Nonce, Promise: a.Promise})
	case coordinator.SendIntact:
		wr.send(a.Conn, replica.Intact{Epoch: a.Epoch})
	case coordinator.SendWhole:
		wr.send(a.Conn, replica.Whole{Epoch: a.Epoch})
	case coordinator.CopyLog:
		w.log("e%d copies log %d..%d from n%d to n%d", wr.epoch, a.From, a.To, w.nodeOf(a.Source).index, w.nodeOf(a.Target).index)
		wr.startCopy(&copying{id: a.Copy, log: true, src: wr.links[a.SourceConn], dst: wr.links[a.TargetConn], epoch: a.Epoch, from: a.From, to: a.To})
	case coordinator.StartCopy:
		w.log("e%d copies chunks after %d at %d from n%d to n%d", wr.epoch, a.After, a.At, w.nodeOf(a.Source).index, w.nodeOf(a.Target).index)
		wr.startCopy(&copying{id: a.Copy, src: wr.links[a.SourceConn], dst: wr.links[a.TargetConn], epoch: a.Epoch, from: a.After, to: a.At, floor: a.At,
			ends: [2]coordinator.Holder{{Replica: a.Source, Conn: a.SourceConn}, {Replica: a.Target, Conn: a.TargetConn}}})
	case coordinator.StopCopy:
		if cp := wr.copies[a.Copy]; cp != nil {
			cp.ended = true
			delete(wr.copies, a.Copy)
		}
	case coordinator.Sequence:
		wr.window[a.Seq] = wr.pending[a.ID].m
		w.check.placed(wr.epoch, a.Seq, wr.pending[a.ID].m)
	case coordinator.ReleaseWindow:
		for s := range wr.window {
			if s <= a.UpTo {
				delete(wr.window, s)
			}
		}
	case coordinator.SampleRead:
		o := wr.pending[a.ID]
		o.sample = a.Sample
		wr.samples[a.Sample] = o
		wr.send(a.Conn, readMsg{ev: replica.Read{Epoch: a.Epoch, ID: a.Sample}, first: o.m.first, n: o.m.n})
	case coordinator.CompleteWrite:
		wr.complete(a.ID, a.Err)
	case coordinator.CompleteRead:
		wr.complete(a.ID, a.Err)
	case coordinator.CompleteFlush:
		wr.complete(a.ID, a.Err)
	case coordinator.Propose:
		w.raft.propose(wr, a)
	case coordinator.ReadMeta:
		w.raft.read(wr, a)
	case coordinator.Activated:
		w.log("e%d ACTIVE: S=%d continuous=%v isrVersion=%d", wr.epoch, a.S, a.Continuous, a.ISRVersion)
		wr.active = true
		wr.era = w.check.eraOf(wr.epoch)
		wr.client()
	case coordinator.Detached:
		w.log("e%d detaches at %d", wr.epoch, a.End)
		w.raft.detach(wr, a)
	case coordinator.EndSession:
		w.log("e%d ends: %s %v", wr.epoch, a.Reason, a.Err)
		wr.ended, wr.active = true, false
		if a.Reason == coordinator.EndReplicaRegression || a.Reason == coordinator.EndMetadataRegression || a.Reason == coordinator.EndBadMemory {
			w.ctl.regressions++
		}
		if a.Reason == coordinator.EndNoInSync {
			w.ctl.callOperator()
		}
	case coordinator.Notice:
		w.log("e%d %s n%d: %s", wr.epoch, a.Kind, w.indexOf(a.Replica), a.Text)
	}
}

func (wr *writer) sendAppend(a coordinator.SendAppend) {
	// Sometimes in several messages, as the edge likes.
	for first := a.First; first <= a.Last; {
		last := a.Last
		if wr.node.w.chance(0.2) {
			last = first
		}
		var entries []logEntry
		for s := first; s <= last; s++ {
			m, ok := wr.window[s]
			if !ok {
				panic("the replay window does not hold what is to be sent")
			}
			entries = append(entries, logEntry{epoch: wr.epoch, seq: s, m: m})
		}
		wr.send(a.Conn, appendMsg{ev: replica.Append{Epoch: a.Epoch, EntryEpoch: wr.epoch, First: first, Last: last}, entries: entries})
		first = last + 1
	}
}

var errCopy = errors.New("connection lost")

func (wr *writer) startCopy(cp *copying) {
	wr.copies[cp.id] = cp
	if cp.src == nil || cp.dst == nil {
		wr.endCopy(cp, errCopy, false)
		return
	}
	wr.fetch(cp, -1)
}

func (wr *writer) fetch(cp *copying, chunk int) {
	wr.fetchID++
	wr.fetches[wr.fetchID] = cp
	if !cp.src.wOpen {
		wr.endCopy(cp, errCopy, false)
		return
	}
	ev := replica.Fetch{Epoch: cp.epoch, ID: wr.fetchID, Chunks: !cp.log, From: cp.from, To: cp.to}
	if chunk >= 0 {
		ev.To = cp.floor
	}
	cp.src.sendToReplica(fetchMsg{chunk: chunk, ev: ev})
}

func (wr *writer) endCopy(cp *copying, err error, gap bool) {
	if cp.ended {
		return
	}
	cp.ended = true
	delete(wr.copies, cp.id)
	wr.after(0, func() coordinator.Event {
		if cp.log {
			return coordinator.CopiedLog{Copy: cp.id, Gap: gap, Err: err}
		}
		return coordinator.Copied{Copy: cp.id, MaxAsOf: cp.maxAsOf, Err: err}
	})
}

func (wr *writer) fetched(m fetchedMsg) {
	cp := wr.fetches[m.id]
	delete(wr.fetches, m.id)
	if cp == nil || cp.ended {
		return
	}
	if !cp.dst.wOpen {
		wr.endCopy(cp, errCopy, false)
		return
	}
	if m.err != nil {
		wr.endCopy(cp, m.err, false)
		return
	}
	switch {
	case cp.log && m.gap:
		wr.endCopy(cp, nil, true)
	case cp.log:
		for i := 0; i < len(m.entries); {
			j := i
			for j < len(m.entries) && m.entries[j].epoch == m.entries[i].epoch {
				j++
			}
			e := m.entries[i:j]
			cp.dst.sendToReplica(appendMsg{ev: replica.Append{Epoch: cp.epoch, EntryEpoch: e[0].epoch, First: e[0].seq, Last: e[len(e)-1].seq}, entries: e})
			i = j
		}
		wr.endCopy(cp, nil, false)
	case !cp.listed:
		cp.todo, cp.listed = m.chunks, true
		wr.nextChunk(cp)
	default:
		if c := contentOf(&m); c.Missing() {
			wr.mendCopy(cp, m)
			return
		}
		wr.sendInstall(cp, m.asOf, chunkMsg{id: m.id, chunk: cp.todo[0], data: m.data, last: m.last})
	}
}

func (wr *writer) sendInstall(cp *copying, asOf holdfast.Seq, m chunkMsg) {
	wr.install[m.id] = cp
	cp.dst.sendToReplica(installMsg{ev: replica.Install{Epoch: cp.epoch, AsOf: asOf}, chunkMsg: m})
}

func (wr *writer) nextChunk(cp *copying) {
	if len(cp.todo) == 0 {
		wr.endCopy(cp, nil, false)
		return
	}
	wr.node.after(wr.node.w.between(time.Millisecond, wr.node.w.rates.chunkTime), func() {
		if !cp.ended {
			wr.fetch(cp, cp.todo[0])
		}
	})
}

func (wr *writer) installed(m installedMsg) {
	cp := wr.install[m.id]
	delete(wr.install, m.id)
	if cp == nil || cp.ended {
		return
	}
	if !m.retry {
		cp.maxAsOf = max(cp.maxAsOf, m.asOf)
		cp.todo = cp.todo[1:]
	} else {
		cp.floor = max(cp.floor, wr.core.State().Commit)
	}
	wr.nextChunk(cp)
}
