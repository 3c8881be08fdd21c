package disk

import (
	"context"
	"encoding/binary"
	"errors"
	"math"
	"slices"
	"sort"
	"syscall"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// Checkpoint applies what may be applied and writes a checkpoint, durable on
// return: WAL space is free again as far as its entries are applied.
func (d *Disk) Checkpoint(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return holdfast.Errorf(holdfast.ErrTimeout, "checkpoint: %w", err)
	}
	return d.checkpoint(nil, true)
}

// reclaim makes room in the log, for the holder of a replica's order if held is not
// nil, and says whether anybody did meanwhile: others may have taken it again, and
// another try is no waste. Who finds that another's checkpoint made room does nothing.
func (d *Disk) reclaim(held *Replica) (room bool, err error) {
	before := d.wal.freedSlots()
	d.passes.Lock()
	defer d.passes.Unlock()
	if d.wal.freedSlots() > before {
		return true, d.failed()
	}
	err = d.checkpointLocked(held, false)
	freed := (d.wal.freedSlots() - before) * d.wal.slotSize
	if freed > 0 && d.relogged < freed/4*3 {
		d.stuck.Store(0)
	} else {
		d.stuck.Store(d.wal.used()) // what is left waits, for its commit as a rule, or was only moved
	}
	return freed > 0, err
}

func (d *Disk) checkpoint(held *Replica, always bool) error {
	d.passes.Lock()
	defer d.passes.Unlock()
	return d.checkpointLocked(held, always)
}

// checkpointLocked applies, then writes the changed map pages to new places,
// the directory of replicas, and the CKPT record that refers to it:
//
//	apply -> map pages and directory -> sync of chunks and map -> CKPT -> sync
//	of the log -> what the old checkpoint alone referred to is free
//
// Appends and reads go on all the while; changes of maps wait. Unless always is
// set, no more is applied than makes room of the oldest eighth of the log, unless old
// entries had to be moved, and a checkpoint that would free no part of it is not
// written, unless commits found no room: it would only use the reserve up.
func (d *Disk) checkpointLocked(held *Replica, always bool) error {
	d.relogged = 0
	upTo := uint64(allRecords)
	if !always {
		upTo = d.wal.oldestPart(d.wal.size() / 8)
	}
	all := d.Replicas()
	err := d.settleCommits(all)
	if holdfast.KindOf(err) == holdfast.ErrNoSpace {
		// The log has no room for commits: a first checkpoint tells them.
		err = d.writeCheckpoint()
	}
	if err == nil {
		err = d.applyEach(all, upTo)
	}
	if err != nil {
		return err
	}
	d.relogged, err = d.relogOld(held)
	if err == nil && d.relogged > 0 && !always {
		// What that took must not be all that an eighth gives.
		err = d.applyEach(all, allRecords)
	}
	if err != nil {
		return err
	}
	if !always && !d.wal.frees(d.neededFrom()) {
		return nil
	}
	return d.writeCheckpoint()
}

// writeCheckpoint writes the maps as they are, and the record. The caller holds passes.
func (d *Disk) writeCheckpoint() error {
	if err := d.grow(0, 0); err != nil && holdfast.KindOf(err) != holdfast.ErrNoSpace {
		return err
	}
	d.gate.Lock()
	body, views, chunks, pages, err := d.writeMaps()
	if err == nil {
		err = d.commitCheckpoint(body)
	}
	if err == nil {
		for _, v := range views {
			v.r.mu.Lock()
			was := v.r.ckpt
			v.r.ckpt = v.applied
			v.r.durMark = max(v.r.durMark, v.commit)
			v.r.index.settle(v.applied, v.r.dropPromise)
			chunks = append(chunks, v.r.settleFresh(was, v.applied)...)
			v.r.countPages()
			v.r.mu.Unlock()
		}
		d.mapGen++
		d.dirPages, d.dirNext = d.dirNext, nil
		d.alloc.needs(-d.space.settled())
	}
	d.gate.Unlock()
	if err != nil {
		d.alloc.keepWaiting(chunks, pages)
		return err
	}
	d.wal.recycle(body.replayFrom)
	d.settled.Store(d.wal.used())
	keep := d.sparesWanted()
	chunks, spares := d.alloc.split(chunks, keep)
	_ = d.punch(chunks) // what could not be punched keeps its space
	d.alloc.settled(append(chunks, spares...), pages)
	d.alloc.addSpares(spares)
	d.dropSpares(keep)
	d.tryHostAgain()
	return d.failed()
}

// view is one replica as a checkpoint has it.
type view struct {
	r       *Replica
	applied holdfast.Seq
	commit  holdfast.Seq
	bytes   []byte
	leaves  []*leaf // written
}

// writeMaps writes and syncs the maps and the directory. The caller holds gate
// exclusively.
func (d *Disk) writeMaps() (ckptBody, []view, []uint32, []int64, error) {
	upTo := d.wal.written()
	body := ckptBody{page: -1, replayFrom: upTo + 1, upTo: upTo}
	store := &pageWriter{d: d}
	views, err := d.placeMaps(store, &body)
	if err != nil && holdfast.KindOf(err) != holdfast.ErrNoSpace {
		return body, nil, nil, nil, d.fail(err)
	}
	// If no page was left for the map, since the host is full, what was placed is
	// written all the same, for the next checkpoint refers to it; what was dropped
	// stays until then.
	var chunks []uint32
	var pages []int64
	if err == nil {
		chunks, pages = d.alloc.capture()
	}
	if ferr := store.flush(); ferr != nil {
		return body, nil, chunks, pages, d.fail(ferr)
	}
	for _, v := range views {
		v.r.cleaned(v.leaves)
	}
	d.cache.trim()
	if err != nil {
		return body, nil, nil, nil, err
	}
	if mutant == "checkpoint_before_base_sync" {
		return body, views, chunks, pages, nil
	}
	fresh := d.wal.freshSerial()
	if err := d.base.Sync(); err != nil {
		return body, nil, nil, nil, d.fail(holdfast.Errorf(holdfast.ErrIO, "sync chunks and map: %w", err))
	}
	d.wal.dataSynced(fresh)
	return body, views, chunks, pages, nil
}

// placeMaps gives the changed pages their places, children before parents.
func (d *Disk) placeMaps(store *pageWriter, body *ckptBody) (views []view, err error) {
	for _, r := range append(d.Replicas(), d.releasedMaps()...) {
		v := view{r: r}
		v.leaves, err = r.saveLeaves(store)
		views = append(views, v)
		if err == nil {
			err = r.saveNodes(store)
		}
		if err != nil {
			return views, err
		}
	}
	if err := d.space.save(store); err != nil {
		return views, err
	}
	for i := range views {
		v := &views[i]
		v.r.mu.Lock()
		v.applied, v.commit = v.r.applied, v.r.commit
		v.bytes = v.r.encodeState(v.r.tree.root, body.upTo)
		body.replayFrom = min(body.replayFrom, v.r.needsFrom())
		v.r.mu.Unlock()
	}
	return views, d.writeDirectory(store, views, body)
}

// neededFrom is the first record that a checkpoint now would leave to be replayed.
func (d *Disk) neededFrom() uint64 {
	from := d.wal.written() + 1
	for _, r := range d.Replicas() {
		r.mu.RLock()
		from = min(from, r.needsFrom())
		r.mu.RUnlock()
	}
	return from
}

// needsFrom is the first record that recovery must see to find this replica's
// log again. Under mu.
func (r *Replica) needsFrom() uint64 {
	from := uint64(math.MaxUint64)
	if r.submitting {
		from = r.submitLow + 1
	}
	if r.damaged != nil { // nothing of it is ever applied
		return from
	}
	for s := r.applied + 1; s <= r.tail; s++ {
		from = min(from, r.index.get(s).serial)
	}
	return from
}

// commitCheckpoint writes the CKPT record and makes it durable.
func (d *Disk) commitCheckpoint(body ckptBody) error {
	// The record says that all fresh chunks before it were durable: a scan does not
	// look at them any more, and those it lets go of may be written again.
	err := d.wal.sync(context.Background(), d.wal.freshSerial())
	if err != nil {
		return err
	}
	_, err = d.control(classCkpt, record{typ: recCkpt, extra: body.encode()})
	if err != nil {
		return holdfast.Errorf(holdfast.KindOf(err), "write the checkpoint: %w", err)
	}
	return nil
}

// maxPunch bounds one punch: a longer one would hold up the file system.
const maxPunch = 16 << 20

// punch gives the space of chunks back that nobody can be given meanwhile, in runs, and
// returns those that keep it, since the file system cannot.
func (d *Disk) punch(chunks []uint32) (rest []uint32) {
	const maxRun = maxPunch / chunkSize
	slices.Sort(chunks)
	for i := 0; i < len(chunks); {
		n := 1
		for i+n < len(chunks) && n < maxRun && chunks[i+n] == chunks[i]+uint32(n) {
			n++
		}
		err := d.main.PunchHole(d.chunkOffset(chunks[i]), int64(n)*chunkSize)
		if errors.Is(err, errors.ErrUnsupported) || errors.Is(err, syscall.ENOSPC) {
			return chunks[i:] // or a full file system has no room to split an extent
		}
		if err != nil {
			_ = d.fail(holdfast.Errorf(holdfast.ErrIO, "give chunk %d back: %w", chunks[i], err))
			return chunks[i:]
		}
		d.alloc.punched(chunks[i : i+n])
		i += n
	}
	return nil
}

// pageWriter collects map pages and writes them in runs.
type pageWriter struct {
	d     *Disk
	pages []placedPage
}

type placedPage struct {
	page int64
	b    []byte
}

func (w *pageWriter) buffer() []byte { return make([]byte, pageSize) }

func (w *pageWriter) put(b []byte) (int64, error) {
	p, err := w.d.alloc.page()
	if err != nil {
		return 0, err
	}
	w.pages = append(w.pages, placedPage{p, b})
	if len(w.pages) == maxHeldPages {
		return p, w.flush()
	}
	return p, nil
}

// maxHeldPages bounds the memory of a checkpoint: 16 MiB.
const maxHeldPages = 4096

func (w *pageWriter) drop(page int64) { w.d.alloc.laterPage(page) }

func (w *pageWriter) again(page int64, b []byte) error {
	w.pages = append(w.pages, placedPage{page, b})
	return nil
}

func (w *pageWriter) flush() error {
	sort.Slice(w.pages, func(i, j int) bool { return w.pages[i].page < w.pages[j].page })
	buf := vfs.AlignedBuffer(chunkSize)
	for i := 0; i < len(w.pages); {
		n := 0
		for i+n < len(w.pages) && n < pagesPerChunk && w.pages[i+n].page == w.pages[i].page+int64(n) {
			copy(buf[n*pageSize:], w.pages[i+n].b)
			n++
		}
		if _, err := w.d.base.WriteAt(buf[:n*pageSize], w.d.pageOffset(w.pages[i].page)); err != nil {
			return holdfast.Errorf(holdfast.ErrIO, "write map page %d: %w", w.pages[i].page, err)
		}
		i += n
	}
	w.pages = w.pages[:0]
	return nil
}

func (d *Disk) pageOffset(page int64) int64 { return d.super.dataOffset + page*pageSize }

// The directory is the places of the pages of used chunks (space.go) and the
// replicas' states, one after the other, cut into pages of level 0xffff; each
// begins with the number u64 and crc u32 of the next (-1: none), and zero u32. It
// is written from the last page to the first.
const (
	dirLink    = 16
	dirPayload = pageSize - pageHead - dirLink
)

func (d *Disk) writeDirectory(store *pageWriter, views []view, body *ckptBody) error {
	for _, p := range d.dirPages {
		store.drop(p) // once, whether or not this checkpoint comes about
	}
	d.dirPages = nil
	all := d.space.encode()
	for _, v := range views {
		all = append(all, v.bytes...)
	}
	body.replicas = uint64(len(views))
	next := noPage
	spare, used := d.dirNext, []int64(nil) // no durable checkpoint refers to those
	for i := (len(all)+dirPayload-1)/dirPayload - 1; i >= 0; i-- {
		part := all[i*dirPayload : min(len(all), (i+1)*dirPayload)]
		b := store.buffer()
		binary.LittleEndian.PutUint64(b[pageHead:], uint64(next.page))
		binary.LittleEndian.PutUint32(b[pageHead+8:], next.crc)
		copy(b[pageHead+dirLink:], part)
		crc := encodePageHead(b, holdfast.ReplicaID{}, levelDir, int64(i), len(part), d.seed)
		var page int64
		var err error
		if n := len(spare); n > 0 {
			page, spare = spare[n-1], spare[:n-1]
			err = store.again(page, b)
		} else {
			page, err = store.put(b)
		}
		if err != nil {
			d.dirNext = used
			return err
		}
		next = pageRef{page: page, crc: crc}
		used = append(used, page)
	}
	for _, p := range spare {
		store.drop(p)
	}
	d.dirNext = used
	body.page, body.crc = next.page, next.crc
	return nil
}

// encodeState writes a replica's state, little-endian, as of all its records
// up to walSerial seen. Under mu.
//
//	  0  4  length of the whole
//	  4 16  replica
//	 20 48  descriptor, as in CREATE
//	 68  8  fence
//	 76  8  commit
//	 84  8  ckptSeq: what the map holds
//	 92  8  tail
//	100  8  hint: epoch
//	108  8  hint: ISR version
//	116  8  intact: epoch
//	124  8  intact: identity of the files
//	132 40  intact: boot id, text, zero padded
//	172  8  walSerial seen
//	180  4  flags: 1 damaged, 2 intact declared, 4 released
//	184 16  root of the map: page number u64 (-1: none), crc u32, zero u32
//	200  4  key id (0: none)
//	204  4  number of epoch tails
//	208  8  the highest asOf in the map
//	216     epoch u64, first seq u64, ...
const stateFixed = 216

const (
	stateDamaged = 1
	stateIntact  = 2
	// stateReleased: it is no replica any more, and what its map refers to is to be freed.
	stateReleased = 4
)

func (r *Replica) encodeState(root pageRef, upTo uint64) []byte {
	var tails []EpochStart
	for _, t := range r.tails {
		if t.First <= r.applied { // later ones follow from the log
			tails = append(tails, t)
		}
	}
	b := make([]byte, stateFixed+16*len(tails))
	le := binary.LittleEndian
	le.PutUint32(b, uint32(len(b)))
	copy(b[4:], r.desc.Replica[:])
	copy(b[20:], encodeDesc(r.desc))
	le.PutUint64(b[68:], uint64(r.fence))
	le.PutUint64(b[76:], uint64(r.commit))
	le.PutUint64(b[84:], uint64(r.applied))
	le.PutUint64(b[92:], uint64(r.tail))
	le.PutUint64(b[100:], uint64(r.hintEpoch))
	le.PutUint64(b[108:], uint64(r.hintISR))
	le.PutUint64(b[116:], uint64(r.intactEpoch))
	le.PutUint64(b[124:], r.intactFiles)
	copy(b[132:172], r.intactBoot)
	seen := r.lastSerial
	if !r.submitting {
		seen = max(seen, upTo)
	}
	le.PutUint64(b[172:], seen)
	flags := uint32(0)
	if r.damaged != nil {
		flags |= stateDamaged
	}
	if r.intact {
		flags |= stateIntact
	}
	if r.deleted {
		flags |= stateReleased
	}
	le.PutUint32(b[180:], flags)
	le.PutUint64(b[184:], uint64(root.page))
	le.PutUint32(b[192:], root.crc)
	le.PutUint32(b[204:], uint32(len(tails)))
	le.PutUint64(b[208:], uint64(r.asOf))
	for i, t := range tails {
		le.PutUint64(b[stateFixed+16*i:], uint64(t.Epoch))
		le.PutUint64(b[stateFixed+16*i+8:], uint64(t.First))
	}
	return b
}

// savedState is what encodeState wrote.
type savedState struct {
	r    *Replica
	tail holdfast.Seq
	seen uint64
	root pageRef
}

func (d *Disk) decodeState(b []byte) (*savedState, int, error) {
	bad := holdfast.Errorf(holdfast.ErrIntegrity, "the directory of replicas contradicts itself")
	le := binary.LittleEndian
	if len(b) < stateFixed {
		return nil, 0, bad
	}
	n, tails := int64(le.Uint32(b)), int64(le.Uint32(b[204:]))
	if tails > MaxEpochTails || n != stateFixed+16*tails || n > int64(len(b)) {
		return nil, 0, bad
	}
	desc, ok := decodeDesc(holdfast.ReplicaID(b[4:20]), b[20:68])
	if !ok {
		return nil, 0, bad
	}
	r := newReplica(d, desc)
	r.fence = holdfast.Epoch(le.Uint64(b[68:]))
	r.commit = holdfast.Seq(le.Uint64(b[76:]))
	r.ckpt = holdfast.Seq(le.Uint64(b[84:]))
	r.hintEpoch, r.hintISR = holdfast.Epoch(le.Uint64(b[100:])), holdfast.ISRVersion(le.Uint64(b[108:]))
	r.intactEpoch, r.intactFiles, r.intactBoot = holdfast.Epoch(le.Uint64(b[116:])), le.Uint64(b[124:]), text(b[132:172])
	flags := le.Uint32(b[180:])
	if flags&stateDamaged != 0 {
		r.damaged = damagedEarlier(desc.Replica)
	}
	r.intact, r.deleted = flags&stateIntact != 0, flags&stateReleased != 0
	s := &savedState{
		r: r, tail: holdfast.Seq(le.Uint64(b[92:])), seen: le.Uint64(b[172:]),
		root: pageRef{page: int64(le.Uint64(b[184:])), crc: le.Uint32(b[192:])},
	}
	r.asOf = holdfast.Seq(le.Uint64(b[208:]))
	if r.ckpt > maxSeq || s.tail > maxSeq {
		return nil, 0, bad
	}
	for i := range tails {
		r.tails = append(r.tails, EpochStart{
			holdfast.Epoch(le.Uint64(b[stateFixed+16*i:])), holdfast.Seq(le.Uint64(b[stateFixed+16*i+8:])),
		})
	}
	return s, int(n), nil
}

func damagedEarlier(id holdfast.ReplicaID) error {
	return holdfast.Errorf(holdfast.ErrIntegrity, "replica %v: part of its durable log was found unreadable in an earlier run", id).
		WithRemedy("it is filled anew from another replica while its volume is attached")
}
