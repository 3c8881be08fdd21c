package sim

import (
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/replication/coordinator"
	"github.com/holdfast-storage/holdfast/replication/replica"
)

// What travels from a writer to a replica's host beside the core's own events.
type (
	appendMsg struct {
		ev      replica.Append
		entries []logEntry
	}
	readMsg struct {
		ev       replica.Read
		first, n int
	}
	// fetchMsg asks for log entries, for the list of chunks, or for a chunk.
	fetchMsg struct {
		ev    replica.Fetch
		chunk int // -1: not a chunk
	}
	installMsg struct {
		ev replica.Install
		chunkMsg
	}
	repairMsg struct {
		ev replica.Repair
		chunkMsg
	}
	chunkMsg struct {
		id    uint64 // of the writer, returned with the answer
		chunk int
		data  [blocksPerChunk]value
		lost  [blocksPerChunk]bool // blocks that nobody has
		last  holdfast.Seq
		seen  *witness // if any is lost
	}
)

// What travels back beside the core's own actions.
type (
	sampleMsg struct {
		id     uint64
		values []value
		err    error
	}
	fetchedMsg struct {
		id      uint64
		gap     bool
		entries []logEntry
		chunks  []int
		data    [blocksPerChunk]value
		state   [blocksPerChunk]coordinator.BlockState
		sum     [blocksPerChunk]value // what the block should be, where it is data or bad
		last    holdfast.Seq
		asOf    holdfast.Seq
		err     error
	}
	// damagedMsg tells of chunks with bad blocks.
	damagedMsg struct {
		chunks []int
	}
	installedMsg struct {
		id    uint64
		asOf  holdfast.Seq
		retry bool
	}
)

var (
	errFlip  = holdfast.Errorf(holdfast.ErrIntegrity, "a bit has flipped")
	errGap   = holdfast.Errorf(holdfast.ErrInternal, "not the next entry")
	errBelow = holdfast.Errorf(holdfast.ErrRefused, "the as-of is below the checkpoint")
	errDisk  = holdfast.Errorf(holdfast.ErrIO, "the disk failed")
)

type readKey struct {
	conn replica.Conn
	id   uint64
}

// host is the edge around a replica core: connections, payloads, the disk.
type host struct {
	n       *node
	core    *replica.Core
	conns   map[replica.Conn]*link
	numbers map[*link]replica.Conn
	last    replica.Conn

	batch    replica.Batch
	appends  map[replica.Batch][]logEntry
	installs map[replica.Batch]chunkMsg // and repairs
	reads    map[readKey]readMsg
	samples  map[readKey]sampleMsg
	fetches  map[readKey]fetchMsg

	damage damage

	changing  int           // changes of the log under way
	changedAt time.Duration // when the last change of the log under way has taken effect
}

func newHost(n *node) *host {
	h := &host{
		n: n, conns: map[replica.Conn]*link{}, numbers: map[*link]replica.Conn{},
		appends: map[replica.Batch][]logEntry{}, installs: map[replica.Batch]chunkMsg{},
		reads: map[readKey]readMsg{}, samples: map[readKey]sampleMsg{}, fetches: map[readKey]fetchMsg{},
	}
	st := n.disk.mem.st
	h.core = replica.New(replica.Options{Status: st, Now: n.clock(), Fresh: n.disk.fresh})
	n.disk.fresh = false
	return h
}

func (h *host) tick() {
	h.step(replica.Tick{Now: h.n.clock()})
	d := h.n.disk
	if h.n.w.chance(h.n.w.rates.checkpoint) {
		d.checkpoint(h.n.w.rng.Intn(40))
		h.tellApplied()
	}
	h.tellDamage()
}

func (h *host) tellApplied() {
	if h.n.host != h {
		return
	}
	st := &h.n.disk.mem.st
	h.step(replica.AppliedTo{Applied: st.Applied, Checkpoint: st.Checkpoint})
}

func (h *host) closed(l *link) {
	c, ok := h.numbers[l]
	if !ok {
		return
	}
	delete(h.numbers, l)
	delete(h.conns, c)
	h.step(replica.Closed{Conn: c})
}

// receive turns a message into an event, its connection filled in.
func (h *host) receive(l *link, body any) {
	c, ok := h.numbers[l]
	if !ok {
		h.last++
		c = h.last
		h.numbers[l], h.conns[c] = c, l
	}
	switch m := body.(type) {
	case appendMsg:
		h.batch++
		m.ev.Conn, m.ev.Batch = c, h.batch
		h.appends[h.batch] = m.entries
		h.step(m.ev)
	case readMsg:
		m.ev.Conn = c
		h.reads[readKey{c, m.ev.ID}] = m
		if Mutant == "local_fence_unnoticed" && l.local() {
			h.act(replica.LogRead{Conn: c, ID: m.ev.ID})
			return
		}
		h.step(m.ev)
	case fetchMsg:
		m.ev.Conn = c
		h.fetches[readKey{c, m.ev.ID}] = m
		h.step(m.ev)
	case installMsg:
		h.batch++
		m.ev.Conn, m.ev.Batch = c, h.batch
		h.installs[h.batch] = m.chunkMsg
		h.underChunk()
		h.step(m.ev)
	case repairMsg:
		h.batch++
		m.ev.Conn, m.ev.Batch = c, h.batch
		h.installs[h.batch] = m.chunkMsg
		h.underChunk()
		h.step(m.ev)
	case replica.Fence:
		m.Conn = c
		h.step(m)
	case replica.Open:
		m.Conn = c
		h.step(m)
	case replica.Join:
		m.Conn = c
		h.step(m)
	case replica.Flush:
		m.Conn = c
		h.step(m)
	case replica.Commit:
		m.Conn = c
		h.step(m)
	case replica.Ping:
		m.Conn, m.Now = c, h.n.clock()
		h.step(m)
	case replica.Intact:
		m.Conn = c
		h.step(m)
	case replica.Whole:
		m.Conn = c
		h.step(m)
	case replica.Left:
		m.Conn = c
		h.step(m)
	}
}

// underChunk sometimes has the log recycled right under a chunk that is about to come.
func (h *host) underChunk() {
	if d := h.n.disk; !h.n.w.healing && h.n.w.chance(0.3) {
		d.mem.apply(min(d.mem.st.Commit, d.mem.st.Dur))
		d.checkpoint(0)
		h.tellApplied()
	}
}

func (h *host) step(ev replica.Event) {
	if h.n.host != h {
		return
	}
	if len(h.appends)+h.changing > 0 {
		switch ev.(type) {
		case replica.Fence, replica.Ping:
			h.n.w.cover("%T overtakes entries", ev)
		}
	}
	actions := append([]replica.Action(nil), h.core.Step(ev)...)
	if h.n.w.cfg.Cover != nil {
		h.n.w.cover("copy takes %T", ev)
		for _, a := range actions {
			h.n.w.cover("copy asks %T", a)
		}
	}
	for _, a := range actions {
		h.act(a)
	}
}

// later steps an event when the disk has done its work.
func (h *host) later(ev func() replica.Event) {
	h.n.disk.later(func() { h.step(ev()) })
}

func (h *host) send(c replica.Conn, body any) {
	if l := h.conns[c]; l != nil && l.rOpen {
		l.sendToWriter(body)
	}
}

func (h *host) act(a replica.Action) {
	w, d := h.n.w, h.n.disk
	switch a := a.(type) {
	case replica.LogFence:
		d.fence(a.Epoch, func() { h.step(replica.Fenced{}) })
	case replica.LogTruncate:
		d.write(record{kind: recTrunc, seq: a.To})
		h.later(func() replica.Event { return replica.Opened{} })
	case replica.LogRebase:
		d.write(record{kind: recRebase, seq: a.To, epoch: a.Epoch})
		h.later(func() replica.Event { return replica.Opened{Held: d.mem.st.Held} })
	case replica.LogAppend:
		entries := h.appends[a.Batch]
		delete(h.appends, a.Batch)
		h.inOrder(100*time.Microsecond, func() { h.logEntries(a, entries) })
	case replica.LogSync:
		h.later(func() replica.Event { return replica.Synced{ID: a.ID} })
	case replica.LogCommit:
		d.write(record{kind: recCommit, seq: a.Seq})
		h.applySoon()
	case replica.LogRead:
		h.n.after(w.between(time.Microsecond, w.rates.readTime), func() { h.sample(readKey{a.Conn, a.ID}) })
	case replica.LogIntact:
		d.write(record{kind: recIntact, boot: h.n.boot})
		w.strike(0.5)
		if h.n.ambushIntact {
			h.n.ambush, h.n.ambushIntact = true, false
			w.ambushed(h.n, w.rates.delay/2+time.Microsecond)
		}
	case replica.LogHint:
		d.write(record{kind: recHint, epoch: a.Epoch, isr: a.ISR})
	case replica.LogInstall:
		h.n.relay.installed()
		m := h.installs[a.Batch]
		h.inOrder(time.Millisecond, func() {
			if a.AsOf < d.mem.st.Checkpoint && Mutant != "install_below_ckpt" && Mutant != "no_asof_floor" {
				h.step(replica.Installed{Batch: a.Batch, Err: errBelow}) // recycled meanwhile
				return
			}
			if m.lost != [blocksPerChunk]bool{} {
				w.cover("copy meets poison")
			}
			d.install(&m, a.AsOf)
			h.step(replica.Installed{Batch: a.Batch})
		})
	case replica.LogRepair:
		m := h.installs[a.Batch]
		h.inOrder(time.Millisecond, func() { h.step(replica.Repaired{Batch: a.Batch, Err: d.repair(&m, a.AsOf)}) })
	case replica.LogWhole:
		if Mutant == "install_not_durable" {
			d.overtake(record{kind: recWhole})
			h.n.after(time.Millisecond, func() { h.step(replica.WholeDone{}) })
			return
		}
		d.write(record{kind: recWhole})
		h.later(func() replica.Event { return replica.WholeDone{} })
	case replica.LogFetch:
		h.fetched(readKey{a.Conn, a.ID})
	case replica.Drop:
		delete(h.appends, a.Batch)
		delete(h.installs, a.Batch)
	case replica.DropRead:
		delete(h.reads, readKey{a.Conn, a.ID})
		delete(h.samples, readKey{a.Conn, a.ID})
		delete(h.fetches, readKey{a.Conn, a.ID})
	case replica.SendFenceOK:
		w.log("n%d fenced by %d: tail %d (epoch %d) dur %d commit %d applied %d intact %v syncing %v", h.n.index, a.Epoch, a.Status.Tail, a.Status.TailEpoch, a.Status.Dur, a.Status.Commit, a.Status.Applied, a.Status.Intact, a.Status.Syncing)
		h.send(a.Conn, a)
	case replica.SendRefused:
		if !h.unnoticed(a.Conn) {
			h.send(a.Conn, a)
		}
	case replica.SendOpened:
		w.strike(0.3)
		w.ambushed(h.n, 3*w.rates.delay+2*w.rates.raftDelay)
		w.log("n%d opened by %d: tail %d", h.n.index, a.Epoch, a.Tail)
		h.send(a.Conn, a)
	case replica.SendAck:
		h.send(a.Conn, a)
	case replica.SendFlushed:
		h.send(a.Conn, a)
	case replica.SendPong:
		h.send(a.Conn, a)
	case replica.SendWhole:
		h.n.relay.whole(h.n)
		h.send(a.Conn, a)
	case replica.SendFailed:
		h.send(a.Conn, a)
	case replica.SendSample:
		key := readKey{a.Conn, a.ID}
		m := h.samples[key]
		delete(h.samples, key)
		delete(h.reads, key)
		m.id, m.err = a.ID, a.Err
		h.send(a.Conn, m)
	case replica.SendInstalled:
		h.sendInstalled(a.Conn, a.Batch, a.AsOf, a.Retry)
	case replica.SendRepaired:
		h.sendInstalled(a.Conn, a.Batch, a.AsOf, a.Retry)
	case replica.CloseConn:
		if l := h.conns[a.Conn]; l != nil && !h.unnoticed(a.Conn) {
			l.closeByReplica()
		}
	}
}

func (h *host) sendInstalled(c replica.Conn, b replica.Batch, asOf holdfast.Seq, retry bool) {
	m := h.installs[b]
	delete(h.installs, b)
	h.send(c, installedMsg{id: m.id, asOf: asOf, retry: retry})
}

// unnoticed says whether the mutant applies to a connection: a writer that runs
// beside its replica, reads its disk, and does not look at the fence.
func (h *host) unnoticed(c replica.Conn) bool {
	return Mutant == "local_fence_unnoticed" && h.conns[c] != nil && h.conns[c].local()
}

// inOrder makes a change of the log after those before it. It may take long: what
// comes on the connection meanwhile, fences and pings too, overtakes it.
func (h *host) inOrder(within time.Duration, do func()) {
	w := h.n.w
	d := w.between(time.Microsecond, within)
	if w.now < h.n.slowUntil {
		d = w.between(time.Millisecond, 400*time.Millisecond)
	}
	h.changedAt = max(h.changedAt, w.now+d)
	h.changing++
	h.n.after(h.changedAt-w.now, func() {
		if h.n.host == h {
			h.changing--
			do()
		}
	})
}

// logEntries does LogAppend.
func (h *host) logEntries(a replica.LogAppend, entries []logEntry) {
	var err error
	switch {
	case a.First != h.n.disk.mem.st.Tail+1:
		err = errGap // behind a batch that was refused
	case h.n.w.chance(h.n.w.rates.flips):
		err = errFlip
	default:
		for _, e := range entries {
			h.n.disk.write(record{kind: recEntry, entry: e})
		}
	}
	h.step(replica.Appended{Batch: a.Batch, Err: err})
}

// applySoon takes committed, durable entries into the base, in the background.
func (h *host) applySoon() {
	d := h.n.disk
	if d.applying {
		return
	}
	d.applying = true
	h.n.w.after(h.n.w.between(0, h.n.w.rates.applyTime), func() {
		d.applying = false
		if h.n.host != h {
			if h.n.host != nil {
				h.n.host.applySoon() // it may have asked meanwhile
			}
			return
		}
		limit := min(d.mem.st.Commit, d.mem.st.Dur)
		if Mutant == "apply_uncommitted" {
			limit = min(d.mem.st.Commit, d.mem.st.Tail)
		}
		before := d.mem.st.Applied
		d.mem.apply(limit)
		if d.mem.st.Applied > before {
			h.n.run(h.n.life, h.tellApplied)
		}
		if d.mem.st.Applied < min(d.mem.st.Commit, d.mem.st.Tail) {
			h.applySoon()
		}
	})
}

func (h *host) sample(key readKey) {
	m, ok := h.reads[key]
	if !ok || h.n.host != h {
		return
	}
	if h.n.w.chance(h.n.w.rates.flips) {
		h.samples[key] = sampleMsg{values: []value{^value(0)}} // must never be seen (C6)
		h.step(replica.Sampled{Conn: key.conn, ID: key.id, Err: errFlip})
		return
	}
	s := sampleMsg{}
	for b := m.first; b < m.first+m.n; b++ {
		v, bad := h.n.disk.mem.look(b)
		if bad {
			h.n.w.cover("read meets rot")
			h.damage.found(b / blocksPerChunk)
			s.values, s.err = []value{^value(0)}, errFlip
			break
		}
		s.values = append(s.values, v)
	}
	h.samples[key] = s
	if h.unnoticed(key.conn) {
		h.act(replica.SendSample{Conn: key.conn, ID: key.id, Err: s.err})
		return
	}
	h.step(replica.Sampled{Conn: key.conn, ID: key.id, Err: s.err})
}

func (h *host) fetched(key readKey) {
	m, ok := h.fetches[key]
	if !ok {
		return
	}
	delete(h.fetches, key)
	d := h.n.disk
	r := fetchedMsg{id: key.id}
	switch {
	case m.chunk >= 0:
		r.last, r.asOf = d.mem.lastSeq[m.chunk], max(d.mem.st.Applied, d.mem.v[m.chunk])
		for i := range blocksPerChunk {
			b := m.chunk*blocksPerChunk + i
			r.state[i], r.sum[i], r.data[i] = d.mem.state(b), d.mem.base[b], d.mem.base[b]
			if d.mem.bad(b) {
				h.damage.found(m.chunk)
				r.data[i] = ^value(0) // must never be seen (C6)
			}
		}
		if Mutant == "asof_any" {
			for i := range r.data { // what is logged, committed or not
				r.data[i] = d.mem.block(m.chunk*blocksPerChunk + i)
				r.state[i] = coordinator.BlockData
			}
			r.asOf = d.mem.st.Tail
		}
	case m.ev.Chunks:
		for c := range chunks {
			if d.mem.lastSeq[c] > m.ev.From {
				r.chunks = append(r.chunks, c)
			}
		}
	default:
		for _, e := range d.mem.log {
			if e.seq >= m.ev.From && e.seq <= m.ev.To {
				r.entries = append(r.entries, e)
			}
		}
		r.gap = len(r.entries) != int(m.ev.To-m.ev.From+1)
	}
	h.send(key.conn, r)
}
