package sim

import (
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/replication/coordinator"
	"github.com/holdfast-storage/holdfast/replication/replica"
)

// The volume is small, so that everything overlaps: blocks of 4 KiB in chunks
// of two.
const (
	blocks         = 12
	blocksPerChunk = 2
	chunks         = blocks / blocksPerChunk
)

// value is the content of a block: the number of the write that put it there.
type value uint64

// mutation is a logged operation.
type mutation struct {
	first, n int // blocks
	v        value
}

// logEntry is a mutation in its place.
type logEntry struct {
	epoch holdfast.Epoch
	seq   holdfast.Seq
	m     mutation
}

type recordKind uint8

const (
	recEntry recordKind = iota
	recFence
	recTrunc
	recRebase
	recCommit
	recInstall
	recWhole
	recIntact
	recHint
)

// record is one record of the log on disk.
type record struct {
	kind  recordKind
	entry logEntry
	epoch holdfast.Epoch
	seq   holdfast.Seq
	isr   holdfast.ISRVersion
	boot  int
	chunk int
	data  [blocksPerChunk]value
	lost  [blocksPerChunk]bool // install: nobody has these blocks
	last  holdfast.Seq         // install: the source's lastSeq
	tail  holdfast.Seq         // tail after this record
}

// image is what the records amount to.
type image struct {
	st         replica.Status
	intactBoot int // boot in which the copy was declared intact; -1 never
	log        []logEntry
	base       [blocks]value
	v          [chunks]holdfast.Seq // as-of of the last install
	lastSeq    [chunks]holdfast.Seq
	// rot: the medium no longer holds what the base took; the checksum tells, which is
	// that of the value in base. poison: the block is known to be lost.
	rot, poison [blocks]bool
}

// disk is the disk of one replica: a log with a volatile cache, and a base.
type disk struct {
	n           *node
	ckpt        image // durable
	wal         []record
	synced      int // records that the medium holds for certain
	mem         image
	grown       int // counts power losses, so that syncs of an earlier boot mean nothing
	checkpoints int
	applying    bool
	harmed      logEntry // as it was before its record became unreadable
	fresh       bool     // made a moment ago: it promised nothing to anybody
}

func newDisk(n *node) *disk {
	d := &disk{n: n, fresh: true}
	d.ckpt.intactBoot = 0
	d.ckpt.st.Intact = true
	d.mem = d.ckpt.clone()
	return d
}

func (im *image) clone() image {
	c := *im
	c.log = append([]logEntry(nil), im.log...)
	c.st.EpochStarts = append([]replica.EpochStart(nil), im.st.EpochStarts...)
	return c
}

// take applies a record to the image. The base is left to apply.
func (im *image) take(r record) {
	st := &im.st
	switch r.kind {
	case recEntry:
		e := r.entry
		if e.epoch > st.TailEpoch {
			st.EpochStarts = append(st.EpochStarts, replica.EpochStart{Epoch: e.epoch, First: e.seq})
		}
		im.log = append(im.log, e)
		st.Tail, st.TailEpoch = e.seq, e.epoch
		if Mutant == "lastseq_at_append" {
			for c := e.m.first / blocksPerChunk; c <= (e.m.first+e.m.n-1)/blocksPerChunk; c++ {
				im.lastSeq[c] = max(im.lastSeq[c], e.seq)
			}
		}
	case recFence:
		st.Fence = max(st.Fence, r.epoch)
	case recTrunc:
		for len(im.log) > 0 && im.log[len(im.log)-1].seq > r.seq {
			im.log = im.log[:len(im.log)-1]
		}
		s := st.EpochStarts
		for len(s) > 0 && s[len(s)-1].First > r.seq {
			s = s[:len(s)-1]
		}
		st.EpochStarts = s
		st.Tail, st.TailEpoch, st.Dur = r.seq, 0, min(st.Dur, r.seq)
		if len(s) > 0 && r.seq > 0 {
			st.TailEpoch = s[len(s)-1].Epoch
		}
	case recRebase:
		im.apply(min(st.Commit, st.Tail))
		im.log = nil
		st.Tail, st.TailEpoch, st.Dur = r.seq, r.epoch, r.seq
		st.EpochStarts = []replica.EpochStart{{Epoch: r.epoch, First: r.seq}}
		if !st.Syncing {
			st.Held = st.Applied
		}
		st.Syncing = true
		st.Applied, st.Checkpoint = r.seq, r.seq
		st.Commit = min(st.Commit, r.seq)
		im.intactBoot = -1
	case recCommit:
		st.Commit = max(st.Commit, r.seq)
	case recInstall:
		for i, v := range r.data {
			b := r.chunk*blocksPerChunk + i
			if im.poison[b] = r.lost[i]; !r.lost[i] {
				im.base[b], im.rot[b] = v, false
			}
		}
		im.v[r.chunk] = r.seq
		im.lastSeq[r.chunk] = r.last
		// What the base had taken beyond the as-of is in the log still (as-of
		// is not below the checkpoint), and is taken again.
		for _, e := range im.log {
			if e.seq > r.seq && e.seq <= st.Applied {
				im.put(e, r.chunk)
			}
		}
	case recWhole:
		st.Syncing, st.Held, st.Damaged = false, 0, false
	case recIntact:
		im.intactBoot = r.boot
	case recHint:
		st.HintEpoch, st.HintISR = r.epoch, r.isr
	}
}

// apply takes entries up to limit into the base. A log that is damaged is not to be
// relied on.
func (im *image) apply(limit holdfast.Seq) {
	if im.st.Damaged {
		return
	}
	for _, e := range im.log {
		if e.seq <= im.st.Applied || e.seq > limit {
			continue
		}
		for c := range chunks {
			im.put(e, c)
		}
		im.st.Applied = e.seq
	}
}

// put takes what an entry writes to a chunk into the base, unless the chunk
// was installed as of a later seq.
func (im *image) put(e logEntry, c int) {
	if e.seq <= im.v[c] {
		return
	}
	for b := max(e.m.first, c*blocksPerChunk); b < min(e.m.first+e.m.n, (c+1)*blocksPerChunk); b++ {
		im.base[b] = e.m.v
		im.rot[b], im.poison[b] = false, false
		if Mutant != "lastseq_at_append" {
			im.lastSeq[c] = max(im.lastSeq[c], e.seq)
		}
	}
}

// block returns the newest logged value of a block.
func (im *image) block(b int) value {
	if e := im.newest(b); e != nil {
		return e.m.v
	}
	return im.base[b]
}

// look returns that, and whether it can be read: what is not yet in the base is read
// from the log; what only the base holds may have rotted, or be lost.
func (im *image) look(b int) (v value, bad bool) {
	if e := im.newest(b); e != nil && e.seq > im.st.Applied {
		return e.m.v, false
	}
	return im.base[b], im.bad(b)
}

// bad says whether a block of the base cannot be read.
func (im *image) bad(b int) bool { return im.rot[b] || im.poison[b] }

// lost says whether a block is lost, and nothing was written since.
func (im *image) lost(b int) bool { return im.poison[b] && im.newest(b) == nil }

// state is what the map and the medium say of a block of the base.
func (im *image) state(b int) coordinator.BlockState {
	switch {
	case im.poison[b]:
		return coordinator.BlockPoison
	case im.rot[b]:
		return coordinator.BlockBad
	case im.base[b] == 0:
		return coordinator.BlockZero
	}
	return coordinator.BlockData
}

// newest is the last logged entry that writes to a block, nil if there is none.
func (im *image) newest(b int) *logEntry {
	v := im.v[b/blocksPerChunk]
	for i := len(im.log) - 1; i >= 0; i-- {
		e := &im.log[i]
		if e.seq > v && e.m.first <= b && b < e.m.first+e.m.n {
			return e
		}
	}
	return nil
}

func (d *disk) write(r record) {
	d.mem.take(r)
	r.tail = d.mem.st.Tail
	d.wal = append(d.wal, r)
}

// sync makes the first n records durable.
func (d *disk) sync(n int) {
	n = min(n, len(d.wal))
	if n <= d.synced {
		return
	}
	d.synced = n
	d.mem.st.Dur = min(d.mem.st.Tail, d.wal[n-1].tail)
}

// powerLoss keeps a prefix of the log, at least the synced part. The base may
// have been written back, or not.
func (d *disk) powerLoss() {
	n := d.synced + d.n.w.rng.Intn(len(d.wal)-d.synced+1)
	if d.n.w.chance(0.5) {
		n = d.synced
	}
	base, rot, back := d.mem.base, d.mem.rot, d.n.w.chance(0.5)
	d.wal = d.wal[:n]
	d.mem = d.ckpt.clone()
	for b := range blocks {
		// What was written in a rotten place, and not back, left it as it was.
		d.mem.rot[b] = rot[b] || d.mem.rot[b] && !back
	}
	if back {
		d.mem.base = base
	}
	for _, r := range d.wal {
		d.mem.take(r)
	}
	d.grown++
}

// open recovers: everything is synced first, so tail and dur are what the
// medium holds.
func (d *disk) open() {
	base, rot := d.mem.base, d.mem.rot
	d.mem = d.ckpt.clone()
	d.mem.base, d.mem.rot = base, rot // what the page cache or the medium has
	for _, r := range d.wal {
		d.mem.take(r)
	}
	d.sync(len(d.wal))
	st := &d.mem.st
	st.Dur = st.Tail
	d.mem.apply(min(st.Commit, st.Tail))
	st.Intact = !st.Damaged && d.mem.intactBoot == d.n.boot || Mutant == "reboot_keeps_intact" && d.mem.intactBoot >= 0
}

// checkpoint makes the base durable and recycles the log below keep entries.
func (d *disk) checkpoint(keep int) {
	d.sync(len(d.wal))
	st := &d.mem.st
	n := 0
	for n < len(d.mem.log) && d.mem.log[n].seq+holdfast.Seq(keep) <= st.Applied {
		n++
	}
	if n > 0 {
		st.Checkpoint = max(st.Checkpoint, d.mem.log[n-1].seq)
		d.mem.log = append([]logEntry(nil), d.mem.log[n:]...)
	}
	d.ckpt = d.mem.clone()
	d.wal, d.synced = nil, 0
	d.checkpoints++
}

// syncTime is how long the medium takes.
func (d *disk) syncTime() time.Duration {
	w := d.n.w
	switch {
	case w.now < d.n.slowUntil:
		return w.between(50*time.Millisecond, 1500*time.Millisecond)
	case w.chance(w.rates.hungSync):
		return w.between(time.Second, 12*time.Second)
	case w.chance(w.rates.slowSync):
		return w.between(10*time.Millisecond, 500*time.Millisecond)
	}
	return w.between(100*time.Microsecond, 4*time.Millisecond)
}

// later runs do after a sync took its time, unless the process died meanwhile.
// What was written before the call is durable then, also if the process died
// but the power did not fail.
func (d *disk) later(do func()) {
	upTo, grown, checkpoints, life := len(d.wal), d.grown, d.checkpoints, d.n.life
	d.n.w.after(d.syncTime(), func() {
		if d.grown == grown && d.checkpoints == checkpoints { // else nothing of it is left, or all was synced
			d.sync(upTo)
		}
		d.n.run(life, do)
	})
}

// harm makes a durable record of the log unreadable. The next open finds it.
func (d *disk) harm() bool {
	d.checkpoint(1 + d.n.w.rng.Intn(20))
	if len(d.mem.log) == 0 {
		return false
	}
	e := &d.mem.log[d.n.w.rng.Intn(len(d.mem.log))]
	d.harmed = *e
	e.m.v = ^value(0) // must never be seen (C6)
	d.mem.st.Damaged = true
	d.ckpt = d.mem.clone()
	return true
}

// mend undoes a harm that was not outgrown by a copy.
func (d *disk) mend() {
	if !d.mem.st.Damaged {
		return
	}
	d.checkpoint(1000)
	for i := range d.mem.log {
		if d.mem.log[i].seq == d.harmed.seq {
			d.mem.log[i] = d.harmed
		}
	}
	d.mem.st.Damaged = false
	d.ckpt = d.mem.clone()
}

// overtake makes a record durable before what was written earlier: the mutants
// that sync too little.
func (d *disk) overtake(r record) {
	d.mem.take(r)
	r.tail = d.ckpt.st.Tail
	if d.synced > 0 {
		r.tail = d.wal[d.synced-1].tail
	}
	d.wal = append(d.wal[:d.synced:d.synced], append([]record{r}, d.wal[d.synced:]...)...)
	d.sync(d.synced + 1)
}

// fence logs the fence and makes the whole tail durable.
func (d *disk) fence(epoch holdfast.Epoch, done func()) {
	if Mutant == "no_seal" {
		d.overtake(record{kind: recFence, epoch: epoch})
		d.n.after(time.Millisecond, done)
		return
	}
	if epoch > d.mem.st.Fence {
		d.write(record{kind: recFence, epoch: epoch})
	}
	d.later(done)
}
