package disk

import (
	"errors"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// replay brings the replicas of the last checkpoint to the end of the log.
type replay struct {
	d     *Disk
	saved map[holdfast.ReplicaID]*savedState
	body  ckptBody
	log   *scannedLog
	logs  map[holdfast.ReplicaID]*foundLog
	born  map[holdfast.ReplicaID]uint64 // the last CREATE that the checkpoint has
}

// foundLog is what the log says of one replica beside its checkpointed state.
type foundLog struct {
	entries  map[holdfast.Seq]*logEntry
	tail     holdfast.Seq
	installs []foundInstall
}

func newReplay(d *Disk, saved map[holdfast.ReplicaID]*savedState, body ckptBody, log *scannedLog) *replay {
	p := &replay{d: d, saved: saved, body: body, log: log, logs: map[holdfast.ReplicaID]*foundLog{}, born: map[holdfast.ReplicaID]uint64{}}
	for id, s := range saved {
		p.logs[id] = &foundLog{entries: map[holdfast.Seq]*logEntry{}, tail: s.r.ckpt}
	}
	for i := range log.recs {
		if f := &log.recs[i]; f.typ == recCreate && f.serial <= body.upTo {
			p.born[f.replica] = f.serial
		}
	}
	return p
}

// run goes through the records in order. Entries before what must be replayed
// serve Entries alone, and only from behind the last hole: a TRUNC may be in it.
func (p *replay) run() error {
	from := uint64(0)
	for _, h := range p.log.holes {
		if h.last < p.body.replayFrom {
			from = h.last + 1
		}
	}
	for i := range p.log.recs {
		if f := &p.log.recs[i]; f.serial >= from {
			if err := p.one(f); err != nil {
				return err
			}
		}
	}
	return nil
}

func (p *replay) one(f *found) error {
	if f.typ == recCreate {
		if f.serial <= p.body.upTo || p.saved[f.replica] != nil {
			return nil // it is in the directory, or dead since
		}
		desc, ok := decodeDesc(f.replica, f.extra)
		if !ok {
			return holdfast.Errorf(holdfast.ErrIntegrity, "the record of replica %v's creation contradicts itself", f.replica)
		}
		p.saved[f.replica] = &savedState{r: newReplica(p.d, desc), seen: f.serial, root: noPage}
		p.logs[f.replica] = &foundLog{entries: map[holdfast.Seq]*logEntry{}}
		return nil
	}
	s := p.saved[f.replica]
	if s == nil || f.serial < p.born[f.replica] {
		return nil // of the disk, or of a replica that is gone, though another may have its id
	}
	r, l := s.r, p.logs[f.replica]
	r.commit = max(r.commit, f.commit)
	isNew := f.serial > s.seen
	switch f.typ {
	case recWrite, recZero, recTrim:
		if f.off%blockSize != 0 || f.length%blockSize != 0 || f.length <= 0 || f.length > r.desc.Size || f.off > r.desc.Size-f.length ||
			f.typ == recWrite && f.length != f.payloadLen+f.freshBytes() || f.seq > maxSeq {
			return holdfast.Errorf(holdfast.ErrIntegrity, "entry %d of replica %v in the log contradicts itself", f.seq, f.replica)
		}
		l.entries[f.seq] = &logEntry{
			epoch: f.epoch, seq: f.seq, commit: f.commit, typ: f.typ, off: f.off, length: f.length,
			crc: f.crc, serial: f.serial, slot: f.slot, pos: f.pos, fresh: f.freshChunks(), bad: !f.ok,
		}
		l.tail = max(l.tail, f.seq)
	case recTrunc:
		l.cut(max(f.seq, r.ckpt))
		l.tail = max(min(l.tail, f.seq), r.ckpt)
		if isNew {
			s.tail = min(s.tail, l.tail)
		}
	case recRebase:
		if f.seq > maxSeq {
			return holdfast.Errorf(holdfast.ErrIntegrity, "a rebase of replica %v to entry %d in the log contradicts itself", f.replica, f.seq)
		}
		if isNew && f.flags&flagAnew != 0 {
			r.release(r.anew(f.epoch, f.seq))
			r.uncounted, l.installs = nil, nil
			s.seen = f.serial // what was lost before does not matter any more
		}
		clear(l.entries)
		l.tail = r.ckpt
		if isNew {
			r.rebase(f.epoch, f.seq)
			l.tail, s.tail = f.seq, f.seq
		}
	case recInstall:
		if isNew {
			l.installs = append(l.installs, foundInstall{found: f})
		}
	case recFence:
		r.fence = max(r.fence, f.epoch)
	case recHint:
		if v := holdfast.ISRVersion(f.seq); f.epoch > r.hintEpoch || f.epoch == r.hintEpoch && v > r.hintISR {
			r.hintEpoch, r.hintISR = f.epoch, v
		}
	case recIntact:
		if isNew {
			r.intact, r.intactEpoch, r.intactFiles, r.intactBoot = true, f.epoch, uint64(f.seq), string(f.extra)
		}
	case recDelete:
		if isNew {
			r.release(r.empty())
			delete(p.saved, f.replica)
			delete(p.logs, f.replica)
		}
	case recCommit:
	default:
		return holdfast.Errorf(holdfast.ErrUnsupported, "the log holds records of type %d, which this program does not know", f.typ)
	}
	return nil
}

// cut drops the entries above to: one by one, or, where the log cannot have so many
// as its tail says, by a look at each.
func (l *foundLog) cut(to holdfast.Seq) {
	if l.tail > to && l.tail-to > holdfast.Seq(len(l.entries)) {
		for s := range l.entries {
			if s > to {
				delete(l.entries, s)
			}
		}
		return
	}
	for s := l.tail; s > to; s-- {
		delete(l.entries, s)
	}
}

// finish gives a replica its log and promises it chunks.
func (p *replay) finish(s *savedState) {
	r, l, d := s.r, p.logs[s.r.desc.Replica], p.d
	r.lastSerial = s.seen
	r.index.indexed = r.ckpt
	r.applied, r.tail = r.ckpt, r.ckpt
	first := r.ckpt + 1
	for e := l.entries[first-1]; e != nil && !e.bad && e.fresh == nil; e = l.entries[first-1] {
		first-- // a bad one was being overwritten; the map, and what follows, may have changed fresh chunks
	}
	tails := r.tails
	for n := len(tails); n > 0 && tails[n-1].First > r.ckpt; n-- {
		tails = tails[:n-1]
	}
	r.tails = tails
	for q := first; q <= l.tail; q++ {
		e := l.entries[q]
		if e == nil {
			r.damage("entry %d is missing from its log", q)
			break
		}
		if q > r.ckpt {
			p.claim(r, e)
			r.index.push(e)
			r.tail = q
			r.startEpoch(e.epoch, q)
		} else {
			r.index.entries = append(r.index.entries, e)
		}
		r.lastSerial = max(r.lastSerial, e.serial)
		if e.bad {
			d.log.Error("logged bytes lost", "replica", r.desc.Replica.String(), "seq", uint64(e.seq), "offset", e.off, "length", e.length)
		}
	}
	for i := range l.installs {
		p.claimInstall(r, &l.installs[i])
	}
	if r.tail < s.tail {
		r.damage("its log ends at entry %d and was durable up to %d", r.tail, s.tail)
	}
	for _, h := range p.log.holes {
		if h.last >= p.body.replayFrom && h.last > s.seen {
			r.damage("records %d to %d of the disk's log are unreadable", h.first, h.last)
		}
	}
	r.dur, r.durMark = r.tail, r.commit
	r.floor = max(r.applied, min(r.commit, r.tail))
	r.intact = r.intact && r.damaged == nil && !p.log.cut && d.mayBeIntact() && r.intactBoot == d.bootID && r.intactFiles == d.identity
	for _, e := range r.index.entries {
		if e.bad && e.seq > r.ckpt {
			r.intact = false
			if r.badEntry == 0 {
				r.badEntry = e.seq
			}
		}
	}
	r.countPages()
	p.promise(r)
}

// damage marks the replica as one whose durable log is not all there.
func (r *Replica) damage(format string, args ...any) {
	if r.damaged != nil {
		return
	}
	why := holdfast.Errorf(holdfast.ErrIntegrity, format, args...)
	r.damaged = holdfast.Errorf(holdfast.ErrIntegrity, "replica %v is damaged: %w", r.desc.Replica, why).
		WithRemedy("it is filled anew from another replica while its volume is attached")
	r.d.log.Error("replica damaged", "replica", r.desc.Replica.String(), "error", why)
}

// promise reserves the chunks that logged writes will need.
func (p *replay) promise(r *Replica) {
	for _, e := range r.index.entries {
		if e.seq <= r.ckpt || e.typ != recWrite {
			continue
		}
		for c := e.off / chunkSize; c <= (e.off+e.length-1)/chunkSize; c++ {
			if _, ok := r.reserved[c]; !ok && !r.tree.isMapped(c) {
				r.reserved[c] = struct{}{}
				p.d.alloc.promise(1, int64(len(r.addPages([]int64{c}))))
			}
		}
	}
}

// readInstall returns the chunk that a found CHUNK_INSTALL brought. Blocks that do not match
// are poison; of the others data is told where they are, and what they hold.
func (p *replay) readInstall(r *Replica, f *foundInstall, data func(block int, src source, b []byte)) (Chunk, error) {
	c, ok := decodeInstall(&f.record)
	if !ok || c.Index < 0 || c.Index > (r.desc.Size-1)/chunkSize {
		return c, holdfast.Errorf(holdfast.ErrIntegrity, "an install of replica %v in the log contradicts itself", f.replica)
	}
	b := vfs.AlignedBuffer(blockSize)
	src := source{kind: fromLog, slot: f.slot, pos: f.pos}
	if fresh := f.freshChunks(); fresh != nil {
		src = source{kind: fromChunk, phys: fresh[0]}
	}
	for i, s := range c.State {
		if s != BlockData {
			continue
		}
		src.crc = c.CRC[i]
		err := error(nil)
		switch {
		case src.kind == fromLog:
			if err = p.d.wal.read(b, src.slot, src.pos); err != nil {
				return c, holdfast.Errorf(holdfast.ErrIO, "read an install from the log: %w", err)
			}
		case f.taken:
			_, err = p.d.main.ReadDirectAt(b, p.d.chunkOffset(src.phys)+src.pos)
		}
		if err != nil || src.kind == fromChunk && !f.taken || !payloadMatches(c.CRC[i:i+1], b) {
			c.State[i], c.CRC[i] = BlockPoison, 0
			r.intact = false
		} else {
			data(i, src, b)
		}
		src.pos += blockSize
	}
	return c, nil
}

// install does once more what an InstallChunk above the checkpoint did. Its
// payload is in the log, or in a fresh chunk; what is unreadable of it is poison.
func (p *replay) install(r *Replica, f *foundInstall) error {
	data := make([]byte, chunkSize)
	c, err := p.readInstall(r, f, func(i int, _ source, b []byte) { copy(data[i*blockSize:], b) })
	if err != nil {
		return err
	}
	c.Data = data
	p.d.alloc.needs(int64(len(r.addPages([]int64{c.Index}))))
	var phys uint32
	if f.taken {
		phys = f.freshChunks()[0]
		old, err := r.lookupChunk(c.Index)
		if err == nil {
			if _, promised := r.reserved[c.Index]; !promised && old.typ != chunkMapped {
				r.reserved[c.Index] = struct{}{}
				p.d.alloc.promise(1, 0)
			}
			err = r.flipInstalled(&c, phys, 0)
		}
		if errors.Is(err, holdfast.ErrIntegrity) {
			p.d.alloc.later(phys)
			return nil
		}
		return err
	}
	if packStates(&c.State) != 0 {
		_, promised := r.reserved[c.Index]
		delete(r.reserved, c.Index)
		if phys, err = p.d.alloc.take(promised); err != nil {
			return err
		}
	}
	err = r.replaceChunk(&c, phys)
	if errors.Is(err, holdfast.ErrIntegrity) { // its map is unreadable: it is damaged
		if packStates(&c.State) != 0 {
			p.d.alloc.later(phys)
		}
		return nil
	}
	return err
}
