package disk

import (
	"context"
	"math"
	"sort"

	"github.com/holdfast-storage/holdfast"
)

// maxApplyBatch bounds the entries applied at once: what a checkpoint, an
// install or a reader of chunks may have to wait for.
const maxApplyBatch = 512

// Apply applies what may be applied of the entries up to to (R9: committed and
// durable here) and returns what the chunks hold now. It syncs the log if that
// is what keeps entries from being applied.
func (r *Replica) Apply(ctx context.Context, to holdfast.Seq) (holdfast.Seq, error) {
	if err := r.d.settleCommits([]*Replica{r}); err != nil {
		return 0, err
	}
	r.d.gate.RLock()
	defer r.d.gate.RUnlock()
	r.applying.Lock()
	defer r.applying.Unlock()
	err := r.applyTo(ctx, to)
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.applied, firstOf(err, r.usable())
}

// allRecords is the last record of all there will be.
const allRecords = math.MaxUint64

// applyAll applies what may be applied of all replicas.
func (d *Disk) applyAll() error {
	all := d.Replicas()
	if err := d.settleCommits(all); err != nil {
		return err
	}
	return d.applyEach(all, allRecords)
}

// applyEach applies what is known to be committed durably, of the entries whose records
// are up to a serial, and of those before them.
func (d *Disk) applyEach(all []*Replica, upTo uint64) error {
	for _, r := range all {
		d.gate.RLock()
		r.applying.Lock()
		err := r.applyTo(context.Background(), r.lastUpTo(upTo))
		r.applying.Unlock()
		d.gate.RUnlock()
		if err != nil && (d.failed() != nil || !r.isDamaged()) {
			return err // a damaged one is left alone, and must not keep the others
		}
	}
	return nil
}

// lastUpTo returns the last entry, not yet applied, whose record is not above a serial;
// 0 if there is none.
func (r *Replica) lastUpTo(serial uint64) holdfast.Seq {
	if serial == allRecords {
		return ^holdfast.Seq(0)
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	for s := r.tail; s > r.applied; s-- {
		if e := r.index.get(s); e != nil && e.serial <= serial {
			return s
		}
	}
	return 0
}

func (r *Replica) isDamaged() bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.damaged != nil
}

// settleCommits makes the commits of replicas durable in the log, so that
// after a crash none of them can be truncated below what its chunks hold.
func (d *Disk) settleCommits(replicas []*Replica) error {
	if d.readOnly != nil {
		return d.readOnly
	}
	var req walRequest
	req.class = classCommit
	type told struct {
		r      *Replica
		commit holdfast.Seq
	}
	var tell []told
	need := uint64(0)
	oldest, tight := d.wal.oldest()
	for _, r := range replicas {
		r.mu.Lock()
		r.settleDurable()
		commit := min(r.commit, r.tail)
		if r.usable() == nil && commit > r.applied {
			if commit > r.loggedCommit() && (!tight || r.lets(oldest, commit)) {
				req.recs = append(req.recs, record{typ: recCommit, replica: r.desc.Replica, epoch: r.fence, commit: commit})
				tell = append(tell, told{r, commit})
			}
			if commit > r.durMark || commit > r.dur {
				need = max(need, r.lastSerial)
				if n := len(r.marks); n > 0 {
					need = max(need, r.marks[n-1].serial)
				}
			}
		}
		r.mu.Unlock()
	}
	if len(req.recs) > 0 {
		if err := d.wal.submit(&req); err != nil {
			return noSpace(err)
		}
		for i, t := range tell {
			t.r.mu.Lock()
			t.r.mark(req.where[i].serial, t.commit)
			t.r.mu.Unlock()
			need = max(need, req.where[i].serial)
		}
	}
	if need == 0 {
		return d.failed()
	}
	return d.wal.sync(context.Background(), need)
}

// lets reports whether applying up to commit lets go of the records up to the
// serial. In a log of which only the reserve is left a commit is recorded for
// that alone: else commits that trickle in would use up what fences need. Under mu.
func (r *Replica) lets(serial uint64, commit holdfast.Seq) bool {
	held := false
	for s := r.applied + 1; s <= r.tail; s++ {
		if r.index.get(s).serial <= serial {
			if s > commit {
				return false
			}
			held = true
		}
	}
	return held
}

// chunkPlan is what a batch of entries does to one chunk: the newest entry of
// each block it touches.
type chunkPlan struct {
	src  [blocksPerChunk]*logEntry
	last holdfast.Seq
}

// applyTo applies entries up to min(to, commit, dur). The caller holds gate
// (shared) and applying.
func (r *Replica) applyTo(ctx context.Context, to holdfast.Seq) error {
	for {
		if err := ctx.Err(); err != nil {
			return holdfast.Errorf(holdfast.ErrTimeout, "apply entries of replica %v: %w", r.desc.Replica, err)
		}
		batch, err := r.nextBatch(to)
		if err != nil || len(batch) == 0 {
			return err
		}
		if batch[0].wide() {
			if err := r.applyWide(batch[0]); err != nil {
				return err
			}
			continue
		}
		if err := r.applyBatch(batch); err != nil {
			return err
		}
	}
}

// nextBatch returns the next entries to apply: one wide one, or several others.
func (r *Replica) nextBatch(to holdfast.Seq) ([]*logEntry, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.deleted || r.damaged != nil {
		return nil, nil // nothing of it is to change
	}
	if err := r.d.failed(); err != nil {
		return nil, err
	}
	r.settleDurable()
	to = min(to, r.appliable())
	var batch []*logEntry
	for s := r.applied + 1; s <= to && len(batch) < maxApplyBatch; s++ {
		e := r.index.get(s)
		if e.wide() {
			if len(batch) == 0 {
				batch = append(batch, e)
			}
			break
		}
		batch = append(batch, e)
	}
	if n := len(batch); n > 0 {
		r.floor = max(r.floor, batch[n-1].seq)
	}
	return batch, nil
}

// appliable is the last entry that may be applied (R9). Under mu.
func (r *Replica) appliable() holdfast.Seq {
	return min(r.commit, r.dur, r.durMark, r.limit, r.tail)
}

// applyBatch brings entries into the chunks. Until applied is raised, readers
// find all blocks that it touches in the log, so they never see a half-written one.
func (r *Replica) applyBatch(batch []*logEntry) error {
	plans := map[int64]*chunkPlan{}
	for _, e := range batch {
		for b := e.off / blockSize; b < (e.off+e.length)/blockSize; b++ {
			c := b / blocksPerChunk
			p := plans[c]
			if p == nil {
				p = &chunkPlan{}
				plans[c] = p
			}
			p.last = e.seq
			p.src[b%blocksPerChunk] = e
		}
	}
	chunks := make([]int64, 0, len(plans))
	for c := range plans {
		chunks = append(chunks, c)
	}
	sort.Slice(chunks, func(i, j int) bool { return chunks[i] < chunks[j] })
	before, entries := make([]chunkEntry, len(chunks)), make([]chunkEntry, len(chunks))
	leaves := map[int64]*leaf{}
	last := batch[len(batch)-1].seq
	buf := r.d.buffer()
	defer r.d.buffers.Put(buf)
	for _, c := range chunks { // before any of them is given a place
		if leaves[c/leafEntries] == nil {
			l, err := r.leaf(c / leafEntries)
			if err != nil {
				return err
			}
			leaves[l.index] = l
		}
	}
	for i, c := range chunks {
		e := leaves[c/leafEntries].entries[c%leafEntries]
		before[i] = e
		if err := r.applyChunk(*buf, c, &e, plans[c]); err != nil {
			r.mu.Lock()
			clear(r.mapping)
			r.mu.Unlock()
			return err
		}
		entries[i] = e
	}
	r.mu.Lock()
	for i, c := range chunks {
		r.turn(c, &before[i], &entries[i], plans[c])
		r.setChunk(leaves[c/leafEntries], c, entries[i], last)
	}
	r.freeFresh(batch)
	clear(r.mapping)
	r.applied = last
	r.foundLost()
	r.mu.Unlock()
	return r.spill()
}

// applyChunk writes a plan's blocks into their chunk, which it allocates if
// need be, and changes e to match.
func (r *Replica) applyChunk(buf []byte, chunk int64, e *chunkEntry, p *chunkPlan) error {
	if r.flip(chunk, e, p) {
		return nil
	}
	needs := false
	for _, src := range p.src {
		needs = needs || src != nil && src.typ == recWrite && src.seq > e.asOf
	}
	if needs && e.typ != chunkMapped {
		if err := r.mapChunk(chunk, e); err != nil {
			return err
		}
	}
	dirty, err := r.merge(buf, chunk, e, p)
	if err != nil {
		return err
	}
	if p.last > e.asOf && e.typ != chunkAbsent {
		e.lastSeq = max(e.lastSeq, p.last)
	}
	if dirty == ([blocksPerChunk]bool{}) {
		return nil
	}
	if err := r.leave(buf, chunk, e, &dirty); err != nil {
		return err
	}
	return r.d.writeBlocks(buf, e.phys, dirty)
}

// mapChunk gives an unmapped chunk its place.
func (r *Replica) mapChunk(chunk int64, e *chunkEntry) error {
	phys, err := r.takePromised(chunk)
	if err != nil {
		return err
	}
	*e = chunkEntry{typ: chunkMapped, phys: phys, lastSeq: e.lastSeq, asOf: e.asOf}
	return nil
}

// takePromised takes the chunk that was promised to a chunk of the segment.
func (r *Replica) takePromised(chunk int64) (uint32, error) {
	r.mu.Lock()
	_, promised := r.reserved[chunk]
	delete(r.reserved, chunk)
	r.mapping[chunk] = struct{}{}
	r.mu.Unlock()
	phys, err := r.d.alloc.take(promised)
	if err != nil {
		if promised {
			r.mu.Lock()
			r.reserved[chunk] = struct{}{}
			r.mu.Unlock()
		}
		return 0, holdfast.Errorf(holdfast.ErrNoSpace, "map chunk %d of replica %v: %w", chunk, r.desc.Replica, err)
	}
	return phys, nil
}

// merge reads the payloads of a plan's blocks into buf, sets their states and
// crcs in e, and returns which blocks of buf are to be written.
func (r *Replica) merge(buf []byte, chunk int64, e *chunkEntry, p *chunkPlan) (dirty [blocksPerChunk]bool, err error) {
	for i := int64(0); i < blocksPerChunk; i++ {
		src := p.src[i]
		if src == nil || src.seq <= e.asOf {
			continue
		}
		if src.typ != recWrite {
			e.setState(i, BlockZero)
			e.crc[i] = 0
			continue
		}
		n := int64(1) // blocks of the same entry in a row
		for i+n < blocksPerChunk && p.src[i+n] == src {
			n++
		}
		from := chunk*blocksPerChunk + i - src.off/blockSize
		part := buf[i*blockSize : (i+n)*blockSize]
		state := BlockData
		if err := r.readPayload(part, src, from); err != nil {
			if holdfast.KindOf(err) != holdfast.ErrIntegrity {
				return dirty, r.d.fail(err)
			}
			r.d.log.Error("logged bytes lost", "replica", r.desc.Replica.String(), "seq", uint64(src.seq), "chunk", chunk, "error", err)
			state = BlockPoison
			for k := i; k < i+n; k++ {
				r.lose(chunk, k)
			}
		}
		for k := i; k < i+n; k++ {
			e.setState(k, state)
			e.crc[k] = 0
			if state == BlockData {
				e.crc[k] = src.crc[from+k-i]
				dirty[k] = true
			}
		}
		i += n - 1
	}
	return dirty, nil
}

// writeBlocks writes blocks of a chunk buffer, runs at a time.
func (d *Disk) writeBlocks(buf []byte, phys uint32, dirty [blocksPerChunk]bool) error {
	if err := d.failed(); err != nil {
		return err
	}
	for i := int64(0); i < blocksPerChunk; i++ {
		if !dirty[i] {
			continue
		}
		n := i + 1
		for n < blocksPerChunk && dirty[n] {
			n++
		}
		if _, err := d.base.WriteAt(buf[i*blockSize:n*blockSize], d.chunkOffset(phys)+i*blockSize); err != nil {
			return d.fail(holdfast.Errorf(holdfast.ErrIO, "write chunk %d: %w", phys, err))
		}
		i = n
	}
	return nil
}

// setChunk puts an entry into the map as of an applied seq. A chunk that holds
// nothing any more is given back, unless a logged write waits for it. Under mu.
func (r *Replica) setChunk(l *leaf, chunk int64, e chunkEntry, applied holdfast.Seq) {
	if e.typ == chunkAbsent {
		return // zeroes upon zeroes
	}
	if e.typ == chunkZero && e.asOf == 0 && r.tree.zeroAgain(l.index, e.lastSeq) {
		l.entries[chunk%leafEntries] = e // if a later one has the leaf written after all
		return
	}
	r.bad.keep(chunk, 0) // whatever is still bad is found again
	if e.typ == chunkMapped && e.states == 0 && !r.writePending(chunk, applied) {
		r.d.alloc.later(e.phys)
		r.unkeep(e.phys)
		e = chunkEntry{typ: chunkZero, lastSeq: e.lastSeq, asOf: e.asOf}
		r.leftFlip(chunk, &e)
	}
	r.tree.set(l, chunk, e)
}

// writePending reports whether a write above applied that is logged, or is
// being logged, counts on the chunk being mapped. Under mu.
func (r *Replica) writePending(chunk int64, applied holdfast.Seq) bool {
	if r.index.writtenAbove(chunk, applied) {
		return true
	}
	for i := range r.inflight {
		e := &r.inflight[i]
		if e.Type == OpWrite && e.Offset/chunkSize <= chunk && chunk <= (e.Offset+e.Length-1)/chunkSize {
			return true
		}
	}
	return false
}

// applyWide zeroes a long range: it touches no bytes, only the map, and of that only
// what shed leaves. Until applied is raised, readers find the whole range in the log.
func (r *Replica) applyWide(e *logEntry) error {
	first, end := e.off/blockSize, (e.off+e.length)/blockSize
	from, to := first/blocksPerChunk, (end+blocksPerChunk-1)/blocksPerChunk
	for _, index := range r.shed(e) {
		l, err := r.leaf(index)
		if err != nil {
			return err
		}
		r.mu.Lock()
		for k := range l.entries {
			c := l.index*leafEntries + int64(k)
			n := l.entries[k]
			if c < from || c >= to || n.typ == chunkAbsent || e.seq <= n.asOf {
				continue
			}
			for i := int64(0); i < blocksPerChunk && n.typ == chunkMapped; i++ {
				if b := c*blocksPerChunk + i; b >= first && b < end {
					n.setState(i, BlockZero)
					n.crc[i] = 0
				}
			}
			n.lastSeq = max(n.lastSeq, e.seq)
			r.setChunk(l, c, n, e.seq)
		}
		r.mu.Unlock()
		if err := r.spill(); err != nil {
			return err
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.applied = e.seq
	return nil
}
