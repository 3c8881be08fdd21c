package sim

import (
	"slices"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/replication/coordinator"
	"github.com/holdfast-storage/holdfast/replication/replica"
)

// The repair of bad blocks: what a disk found is told to the writer (DAMAGED), which
// reads the chunk from the other in-sync members and sends it back (REPAIR). What is
// made of it is decided by the cores; here are the edges around them.

const (
	// askTime bounds one question for a chunk.
	askTime = 10 * time.Second
	// A repair is tried so often in a row, with this pause; then the chunk is left alone
	// for a while, longer each time.
	repairTries    = 5
	repairRetry    = 200 * time.Millisecond
	minRepairPause = 2 * time.Second
	// damageEvery is how long it takes until a chunk is told of again.
	damageEvery = 2 * time.Second
)

// damage is what a process knows of the bad blocks of its disk.
type damage struct {
	known [chunks]bool
	some  bool
	told  [chunks]time.Duration // when; 0: not yet
}

// found notes a chunk with bad blocks.
func (d *damage) found(chunk int) {
	if !d.known[chunk] {
		d.known[chunk], d.told[chunk], d.some = true, 0, true
	}
}

// scrub looks at every block of the base.
func (h *host) scrub() {
	for b := range blocks {
		if h.n.disk.mem.bad(b) {
			h.damage.found(b / blocksPerChunk)
		}
	}
}

// tellDamage tells the writer, if there is one.
func (h *host) tellDamage() {
	w := h.n.w
	if w.healing {
		h.scrub()
	}
	if !h.damage.some {
		return
	}
	conn, _, ok := h.core.Writer()
	if !ok {
		return
	}
	h.damage.some = false
	var tell []int
	for c := range chunks {
		if !h.damage.known[c] {
			continue
		}
		im := &h.n.disk.mem
		if !im.bad(c*blocksPerChunk) && !im.bad(c*blocksPerChunk+1) {
			h.damage.known[c] = false
			continue
		}
		h.damage.some = true
		if t := h.damage.told[c]; t == 0 || w.now-t >= damageEvery {
			h.damage.told[c] = w.now
			tell = append(tell, c)
		}
	}
	if len(tell) > 0 {
		w.cover("repair told")
		h.send(conn, damagedMsg{chunks: tell})
	}
}

// install replaces a chunk.
func (d *disk) install(m *chunkMsg, asOf holdfast.Seq) {
	for i := range m.lost {
		b := m.chunk*blocksPerChunk + i
		if m.lost[i] && !d.mem.poison[b] {
			m.seen.judge(d.n, b, m.last)
		}
	}
	d.write(record{kind: recInstall, chunk: m.chunk, data: m.data, lost: m.lost, seq: asOf, last: m.last})
}

// repair is what a disk does with REPAIR: a block is written in its place if that is
// what the map says it should be; else the chunk is installed. What is good stays.
func (d *disk) repair(m *chunkMsg, asOf holdfast.Seq) error {
	im, w := &d.mem, d.n.w
	install, poisons := false, false
	if asOf > im.st.Tail && Mutant != "repair_without_asof" {
		return errBelow
	}
	for i := range blocksPerChunk {
		b := m.chunk*blocksPerChunk + i
		switch {
		case !im.bad(b) && m.lost[i]:
			if im.lastSeq[m.chunk] != m.last {
				return errBelow // good here, and lost in another version
			}
			m.data[i], m.lost[i] = im.base[b], false
		case !im.bad(b) || m.lost[i] && im.poison[b]:
		case m.lost[i]:
			install, poisons = true, true
		case Mutant == "repair_without_asof" || !im.poison[b] && m.data[i] == im.base[b]:
			w.cover("repair in place")
			im.base[b], im.rot[b], im.poison[b] = m.data[i], false, false
		default:
			install = true
		}
	}
	if !install {
		return nil
	}
	if asOf < im.st.Checkpoint || asOf < im.v[m.chunk] {
		w.cover("repair refused")
		return errBelow
	}
	w.cover("repair %s", map[bool]string{false: "by install", true: "poisons"}[poisons])
	d.install(m, asOf)
	return nil
}

// witness is what was so when a writer began to look for blocks of a chunk: who was in
// sync, and had them.
type witness struct {
	w    *world
	had  [blocksPerChunk][]*disk
	rots []int // of each of w.nodes, so far
}

// witnessed notes who has what of a chunk, for the writer by whose word the members are in sync.
func (wr *writer) witnessed(chunk int) *witness {
	w := wr.node.w
	s := &witness{w: w}
	for _, m := range wr.core.State().Members {
		n := w.nodeOf(m.Replica)
		if !m.InSync || !w.raft.inISR(m.Replica) || n == nil || n.replica != m.Replica {
			continue
		}
		for i := range blocksPerChunk {
			if !n.disk.mem.bad(chunk*blocksPerChunk + i) {
				s.had[i] = append(s.had[i], n.disk)
			}
		}
	}
	for _, n := range w.nodes {
		s.rots = append(s.rots, n.rots)
	}
	return s
}

// judge: block b of the chunk as entry last left it becomes poison on x. That is wrong
// if an in-sync replica has had it all along.
func (s *witness) judge(x *node, b int, last holdfast.Seq) {
	for _, d := range s.had[b%blocksPerChunk] {
		n := d.n
		if n != x && n.disk == d && s.w.raft.inISR(n.replica) && !d.mem.bad(b) && s.rots[n.index] == n.rots && d.mem.lastSeq[b/blocksPerChunk] == last {
			s.w.check.fail("C6: block %d is called lost on n%d, but in-sync n%d has it", b, x.index, n.index)
		}
	}
}

// ask is a question for a chunk, or a REPAIR, that was not answered yet.
type ask struct {
	l    *link
	then func(m any, ok bool)
}

// ask sends what body makes of the question's number. then is told the answer, or that
// there is none.
func (wr *writer) ask(h coordinator.Holder, body func(id uint64) any, then func(m any, ok bool)) {
	l := wr.links[h.Conn]
	if l == nil || !l.wOpen {
		then(nil, false)
		return
	}
	wr.fetchID++
	id := wr.fetchID
	wr.asks[id] = &ask{l: l, then: then}
	l.sendToReplica(body(id))
	wr.node.after(askTime, func() { wr.answered(id, nil, false) })
}

// answered ends a question, if it is one.
func (wr *writer) answered(id uint64, m any, ok bool) bool {
	k := wr.asks[id]
	if k == nil {
		return false
	}
	delete(wr.asks, id)
	if !wr.ended {
		k.then(m, ok)
	}
	return true
}

// unanswered ends the questions of a connection.
func (wr *writer) unanswered(l *link) {
	var ids []uint64
	for id, k := range wr.asks {
		if k.l == l {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	for _, id := range ids {
		wr.answered(id, nil, false)
	}
}

// readChunk asks a member for a chunk as of an applied entry of at least floor.
func (wr *writer) readChunk(h coordinator.Holder, chunk int, floor holdfast.Seq, then func(m fetchedMsg, ok bool)) {
	wr.ask(h, func(id uint64) any {
		return fetchMsg{chunk: chunk, ev: replica.Fetch{Epoch: wr.epoch, ID: id, Chunks: true, To: floor}}
	}, func(m any, ok bool) {
		r, _ := m.(fetchedMsg)
		then(r, ok)
	})
}

// contentOf is what the core learns of a chunk. A value is its own checksum.
func contentOf(m *fetchedMsg) coordinator.ChunkContent {
	c := coordinator.ChunkContent{LastSeq: m.last, AsOf: m.asOf, Blocks: make([]coordinator.Piece, blocksPerChunk)}
	for i, st := range m.state {
		c.Blocks[i].State = st
		if st == coordinator.BlockData || st == coordinator.BlockBad {
			c.Blocks[i].Sum = uint32(m.sum[i])
		}
	}
	return c
}

// mended is what became of bad blocks.
type mended struct {
	chunkMsg
	asOf holdfast.Seq
	news bool
	err  error
}

// mend makes bad blocks of a chunk good out of what others hold.
func (wr *writer) mend(chunk int, own fetchedMsg, owner coordinator.Holder, floor holdfast.Seq, extra []coordinator.Holder, then func(mended)) {
	w := wr.node.w
	m := coordinator.NewMend(contentOf(&own), owner, floor)
	read := []fetchedMsg{own}
	seen := wr.witnessed(chunk)
	var next func()
	next = func() {
		if h, floor, ok := m.Next(); ok {
			wr.readChunk(h, chunk, floor, func(o fetchedMsg, ok bool) {
				if ok {
					read = append(read, o)
					m.Answer(contentOf(&o))
				} else {
					m.Silent()
				}
				next()
			})
			return
		}
		c, news, err := m.Done()
		r := mended{chunkMsg: chunkMsg{chunk: chunk, last: c.LastSeq, seen: seen}, asOf: c.AsOf, news: news, err: err}
		from := map[int]bool{}
		for i, p := range c.Blocks {
			switch p.State {
			case coordinator.BlockData:
				r.data[i] = read[p.From].data[i]
			case coordinator.BlockPoison:
				r.lost[i] = true
			}
			from[p.From] = from[p.From] || !r.lost[i]
		}
		switch {
		case err != nil:
			w.cover("mend not now")
		case len(from) > 1:
			w.cover("mend from several")
		default:
			w.cover("mend from one")
		}
		then(r)
	}
	begin := func() {
		m.Members(wr.core.Holders())
		next()
	}
	if len(extra) == 0 {
		begin()
		return
	}
	wr.readChunk(extra[0], chunk, 0, func(o fetchedMsg, ok bool) {
		if ok {
			read = append(read, o)
			m.Extra(contentOf(&o))
		}
		begin()
	})
}

// mendCopy completes a chunk of a copy whose source has bad blocks.
func (wr *writer) mendCopy(cp *copying, m fetchedMsg) {
	wr.node.w.cover("copy meets rot")
	wr.mend(cp.todo[0], m, cp.ends[0], cp.floor, cp.ends[1:], func(r mended) {
		switch {
		case cp.ended:
		case !cp.dst.wOpen:
			wr.endCopy(cp, errCopy, false)
		case r.err != nil:
			wr.endCopy(cp, r.err, false)
		default:
			r.id = m.id
			wr.sendInstall(cp, r.asOf, r.chunkMsg)
		}
	})
}

// repairKey names a chunk of one replica.
type repairKey struct {
	replica holdfast.ReplicaID
	chunk   int
}

// repair is a chunk with bad blocks.
type repair struct {
	active      bool
	next, pause time.Duration
}

// damaged takes what a member says of its disk.
func (wr *writer) damaged(id holdfast.ReplicaID, list []int) {
	if !wr.active || wr.ended {
		return
	}
	for _, c := range list {
		key := repairKey{id, c}
		r := wr.repairs[key]
		if r == nil {
			r = &repair{}
			wr.repairs[key] = r
		}
		if !r.active && wr.node.w.now >= r.next {
			r.active = true
			wr.repair(key, repairTries)
		}
	}
}

// repaired notes how a repair went.
func (wr *writer) repaired(key repairKey, what string) {
	wr.node.w.cover("repair %s", what)
	if what == "done" {
		delete(wr.repairs, key)
		return
	}
	r := wr.repairs[key]
	r.active = false
	r.pause = max(2*r.pause, minRepairPause)
	r.next = wr.node.w.now + r.pause
}

// repair repairs one chunk of a member that is in sync.
func (wr *writer) repair(key repairKey, tries int) {
	again := func(what string) {
		if tries == 1 {
			wr.repaired(key, what)
			return
		}
		wr.node.w.cover("repair %s", what)
		wr.node.after(repairRetry, func() {
			if !wr.ended {
				wr.repair(key, tries-1)
			}
		})
	}
	wr.step(coordinator.Settle{})
	floor := wr.core.State().Acked
	members, _ := wr.core.Holders()
	i := slices.IndexFunc(members, func(h coordinator.Holder) bool { return h.Replica == key.replica })
	if i < 0 {
		wr.repaired(key, "of who is not in sync")
		return
	}
	target := members[i]
	wr.readChunk(target, key.chunk, floor, func(bad fetchedMsg, ok bool) {
		if !ok {
			wr.repaired(key, "unanswered")
			return
		}
		if c := contentOf(&bad); !c.Missing() {
			wr.repaired(key, "done") // written again
			return
		}
		wr.mend(key.chunk, bad, target, bad.asOf, nil, func(m mended) {
			switch {
			case m.err != nil:
				again("not now")
				return
			case !m.news:
				wr.repaired(key, "of what is lost")
				return
			}
			wr.ask(target, func(id uint64) any {
				m.id = id
				return repairMsg{ev: replica.Repair{Epoch: wr.epoch, AsOf: m.asOf}, chunkMsg: m.chunkMsg}
			}, func(a any, ok bool) {
				switch r, _ := a.(installedMsg); {
				case !ok:
					wr.repaired(key, "unanswered")
				case r.retry:
					again("again")
				default:
					wr.repaired(key, "done")
				}
			})
		})
	})
}

// lostEverywhere says whether no in-sync replica has a block any more.
func (w *world) lostEverywhere(b int) bool {
	ids := w.raft.isr()
	for _, id := range ids {
		n := w.nodeOf(id)
		if n.disk == nil || !n.disk.mem.poison[b] {
			return false
		}
		if _, bad := n.disk.mem.look(b); !bad {
			return false
		}
	}
	return len(ids) > 0
}

// giveUp writes the blocks that are lost: all that a user can do.
func (w *world) giveUp() {
	h := w.ctl.holder
	if h == nil || !h.active || h.ended || h.detaching || h.writing > 0 || !h.node.up || h.node.life != h.life {
		return
	}
	for b := range blocks {
		if w.lostEverywhere(b) {
			w.cover("repair by a write")
			o := &op{wr: h, kind: opWrite, m: mutation{first: b, n: 1}}
			h.node.run(h.life, func() { h.request(o) })
		}
	}
}

// anyBad says whether a replica that counts has bad blocks.
func (w *world) anyBad() bool {
	for _, n := range w.reps {
		for b := range blocks {
			if n.disk != nil && n.disk.mem.bad(b) {
				return true
			}
		}
	}
	return false
}
