package disk

import (
	"context"
	"encoding/binary"
	"hash/fnv"
	"log/slog"
	"slices"
	"sort"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// Open opens a formatted disk: it takes the lock, syncs and scans the log,
// rebuilds every replica as of what the medium holds, and raises the open
// count, durably, before it returns. ErrRefused if another process has the
// disk; ErrUnsupported if a newer program wrote it; ErrIntegrity if
// superblock, last checkpoint or map cannot be trusted. A disk that a newer
// program made such that this one may read and not write is opened for reading
// alone (Stat.ReadOnly): what would change it returns ErrUnsupported. Damage to the log that
// can be told apart from a crash damages replicas, not the disk: see
// Status.Damaged and Status.BadRanges.
func Open(ctx context.Context, fs vfs.FS, path string, o Options) (*Disk, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	d := &Disk{
		fs: fs, path: path, log: o.Logger, opts: o,
		replicas: map[holdfast.ReplicaID]*Replica{}, begun: time.Now(),
		kick: make(chan struct{}, 1), shed: make(chan struct{}, 1), stop: make(chan struct{}),
	}
	if err := d.open(ctx); err != nil {
		d.wg.Wait() // for the mark of a failure
		if d.main != nil {
			d.closeFiles()
		}
		return nil, holdfast.Errorf(holdfast.KindOf(err), "open disk %s: %w", path, err)
	}
	d.opened.Store(true)
	if !o.foreground && d.readOnly == nil {
		d.wg.Go(d.background)
		d.wg.Go(d.releaser)
		d.wg.Go(d.sweepAfterOpen)
		d.wakeReleaser()
	}
	return d, nil
}

func (d *Disk) open(ctx context.Context) error {
	if err := d.openFiles(); err != nil {
		return err
	}
	s := d.super
	d.seed = seedOf(s.disk)
	d.alloc = newAllocator(s.chunks)
	d.makeMaps()
	d.wal.seed = d.seed
	if why := s.refusesWrites(); why != nil {
		return d.openReadOnly(ctx, why)
	}
	d.wal.reserve = min(4<<20, d.wal.size()/8)
	d.wal.fail, d.wal.forget = d.fail, d.forget

	// What the medium holds is what there is: what an earlier process wrote
	// and did not sync becomes durable, or is an error, before anything is believed.
	if s.walOffset == 0 {
		d.wal.data = d.base
		if err := d.base.Sync(); err != nil { // fresh chunks, before the records that refer to them
			return d.fail(holdfast.Errorf(holdfast.ErrIO, "sync the chunks: %w", err))
		}
	}
	for i := range d.wal.slots {
		if i > 0 && s.walOffset != 0 {
			break // all in one file
		}
		if err := d.wal.slots[i].file.Sync(); err != nil {
			// What the sync lost is lost silently from now on: marked as failed,
			// nothing on this disk claims to be intact again.
			return d.fail(holdfast.Errorf(holdfast.ErrIO, "sync the log: %w", err))
		}
	}
	log, err := d.scan(ctx)
	if err != nil {
		return err
	}
	if err := d.rebuild(log); err != nil {
		return err
	}
	// Durable before anybody hears of this open.
	s.openCount++
	s.bootID, s.walDurable = d.bootID, d.wal.serial
	d.wal.open = uint64(s.openCount)
	if err := writeSuperblock(d.main, s); err != nil {
		return d.fail(err)
	}
	d.log.Info("disk opened", "disk", s.disk.String(), "path", d.path, "open_count", uint64(s.openCount),
		"replicas", len(d.replicas), "log_serial", d.wal.serial)
	return nil
}

// makeMaps readies what is common to all maps.
func (d *Disk) makeMaps() {
	leaves := d.opts.cacheLeaves
	if leaves == 0 {
		bytes := d.opts.MapCache
		if bytes == 0 {
			bytes = DefaultMapCache
		}
		leaves = int(max(MinMapCache, bytes) / leafBytes)
	}
	d.space, d.cache, d.mapGen = newSpace(d.alloc.chunks), &mapCache{limit: leaves}, 1
}

// openFiles opens and locks everything and reads the superblock.
func (d *Disk) openFiles() error {
	st, err := d.fs.Stat(d.path)
	if err != nil {
		return holdfast.Errorf(holdfast.ErrNotFound, "%w", err)
	}
	flags := vfs.Flag(0)
	if st.Kind == vfs.KindBlockDevice {
		flags = vfs.Exclusive
	}
	main, err := d.fs.OpenFile(d.path, flags)
	if err != nil {
		return holdfast.Errorf(holdfast.ErrRefused, "%w", err)
	}
	d.main, d.base, d.direct = main, main, main
	d.wal = &wal{}
	if err := main.Lock(); err != nil {
		d.super = &superblock{}
		return holdfast.Errorf(holdfast.ErrRefused, "%w", err).WithRemedy("stop the process that uses it")
	}
	if d.super, err = readSuperblock(main); err != nil {
		d.super = &superblock{}
		return err
	}
	s := d.super
	if !d.opts.Cluster.IsZero() && s.cluster != d.opts.Cluster || !d.opts.Node.IsZero() && s.node != d.opts.Node {
		return holdfast.Errorf(holdfast.ErrRefused, "it belongs to another cluster or node (cluster %v, node %v)", s.cluster, s.node).
			WithRemedy("give another --disk; this one was not changed")
	}
	if st, err = main.Stat(); err != nil {
		return holdfast.Errorf(holdfast.ErrIO, "%w", err)
	}
	if st.Size < s.size {
		return holdfast.Errorf(holdfast.ErrIntegrity, "it has %d bytes and was formatted with %d", st.Size, s.size)
	}
	if d.bootID, err = d.fs.BootID(); err != nil {
		return holdfast.Errorf(holdfast.ErrIO, "read the boot id: %w", err)
	}
	if len(d.bootID) > 40 {
		return holdfast.Errorf(holdfast.ErrInvalid, "boot id %q is too long", d.bootID)
	}
	d.keepsPages = st.KeepsPages
	identity := fnv.New64a()
	identity.Write([]byte(st.Identity))
	d.wal.slotSize = s.slotSize
	d.wal.slots = make([]slot, s.slots)
	if d.direct, err = d.fs.OpenFile(d.path, vfs.Direct); err != nil {
		d.direct = main
		return holdfast.Errorf(holdfast.ErrIO, "%w", err)
	}
	if again, err := d.direct.Stat(); err != nil || again.Identity != st.Identity {
		return holdfast.Errorf(holdfast.ErrIO, "it was exchanged while it was opened (%v)", err)
	}
	if s.walOffset != 0 {
		// Log and chunks share an inode: all chunks are written past the page cache,
		// so that a sync of the log does not wait for them.
		d.base = d.direct
		for i := range d.wal.slots {
			d.wal.slots[i] = slot{file: main, base: s.walOffset + int64(i)*s.slotSize}
		}
	} else {
		for i := range d.wal.slots {
			f, err := d.fs.OpenFile(walName(d.path, i), 0)
			if err != nil {
				return holdfast.Errorf(holdfast.ErrIntegrity, "open a log file: %w", err)
			}
			d.wal.slots[i].file = f
			st, err := f.Stat()
			if err != nil {
				return holdfast.Errorf(holdfast.ErrIO, "%w", err)
			}
			if st.Size < s.slotSize {
				return holdfast.Errorf(holdfast.ErrIntegrity, "log file %d has %d bytes, not %d", i, st.Size, s.slotSize)
			}
			d.keepsPages = d.keepsPages && st.KeepsPages
			identity.Write([]byte(st.Identity))
		}
	}
	d.identity = identity.Sum64()
	_ = d.main.AdviseRandom() // readahead of chunks is the caller's; a refusal costs speed alone
	return nil
}

// found is one record of a scan.
type found struct {
	record
	slot int32
	pos  int64 // of the payload in the slot
	end  int64 // of the record in the slot, rounded up to where the next may be
	ok   bool  // the payload matches its crcs
}

// scannedLog is the log as far as it counts.
type scannedLog struct {
	recs    []found // ascending serials
	holes   []hole  // between or before them: records lost to corruption
	durable uint64  // records up to here were durable for certain
	cut     bool    // more was written behind an unreadable record: no death of a process leaves that
	lost    []lostChunks
	looked  bool // at fresh chunks, of which nothing but the look says that they are durable
}

// hole is a range of serials.
type hole struct{ first, last uint64 }

// scan reads the whole log from the medium.
//
// The end: a record follows another if its serial is one higher and its
// openCount not lower. Bytes of an earlier round of the ring have lower serials.
// Bytes of a tail that was lost in a crash may have the right serials, but a
// lower openCount than anything written after that crash.
//
// A record that is missing or does not match ends the log, unless a later
// record, or the superblock, says that it was durable: then it is corruption,
// the log goes on behind it, and a hole is reported.
func (d *Disk) scan(ctx context.Context) (*scannedLog, error) {
	var all []found
	buf := vfs.AlignedBuffer(int(d.wal.slotSize))
	for i := range d.wal.slots {
		if err := ctx.Err(); err != nil {
			return nil, holdfast.Errorf(holdfast.ErrTimeout, "scan the log: %w", err)
		}
		s := d.wal.slots[i]
		for off := 0; off < len(buf); off += 1 << 20 {
			part := buf[off:min(off+1<<20, len(buf))]
			if _, err := s.file.ReadDirectAt(part, s.base+int64(off)); err != nil {
				return nil, holdfast.Errorf(holdfast.ErrIO, "scan the log: %w", err)
			}
		}
		all = append(all, scanSlot(buf, int32(i), d.seed)...)
	}
	for i := range all {
		// An open is durable in the superblock before it writes to the log.
		if f := &all[i]; f.open > uint64(d.super.openCount) {
			return nil, holdfast.Errorf(holdfast.ErrIntegrity, "the superblock is older than the log: it knows of %d opens, and record %d is of open %d; a write of it was lost, or it was put back to an earlier state",
				d.super.openCount, f.serial, f.open)
		}
	}
	log := assemble(all, d.super.walDurable)
	d.endAtLostChunks(log)
	return log, nil
}

// scanSlot finds the records of one slot: those that follow each other from its
// beginning, and behind an unreadable one those of the next page that begins a
// later record.
func scanSlot(b []byte, slot int32, seed uint32) []found {
	var recs []found
	var serial, open uint64
	for pos := int64(0); pos < int64(len(b)); {
		r, ok := decodeHead(b[pos:], seed)
		fits := ok && pos+r.headLen+r.payloadLen <= int64(len(b))
		if !fits || r.serial <= serial || r.open < open || pos%vfs.PageSize != 0 && r.serial != serial+1 {
			pos = pageUp(pos + 1)
			continue
		}
		f := found{record: r, slot: slot, pos: pos + r.headLen}
		f.ok = r.edgesMatch(b[f.pos : f.pos+r.payloadLen])
		if at := rewritten(b, f, seed); at > 0 {
			pos = at
			continue
		}
		pos = f.pos + r.payloadLen
		if r.flags&flagBatchEnd != 0 {
			pos = pageUp(pos)
		}
		f.end = pageUp(pos)
		serial, open = r.serial, r.open
		recs = append(recs, f)
	}
	return recs
}

// rewritten looks into the payload of a record that does not match for a record
// of a later open: a crash had torn this one, and the log went on over it. It
// returns its place, or 0. (A payload's own bytes cannot pass for one: a record
// that was copied into a payload has a lower serial.)
func rewritten(b []byte, f found, seed uint32) int64 {
	if f.ok {
		return 0
	}
	for pos := pageUp(f.pos); pos < f.pos+f.payloadLen; pos += vfs.PageSize {
		if r, ok := decodeHead(b[pos:], seed); ok && r.serial >= f.serial && r.open > f.open {
			return pos
		}
	}
	return 0
}

// assemble puts the records of all slots into one log and finds its end.
func assemble(all []found, durable uint64) *scannedLog {
	sort.SliceStable(all, func(i, j int) bool {
		if all[i].serial != all[j].serial {
			return all[i].serial < all[j].serial
		}
		return all[i].open > all[j].open
	})
	log := &scannedLog{durable: durable}
	var serial, open uint64
	for _, f := range all {
		if f.serial == serial || f.open < open {
			continue // of a tail that a crash had cut off
		}
		serial, open = f.serial, f.open
		log.durable = max(log.durable, f.durable)
		log.recs = append(log.recs, f)
	}
	next := uint64(0)
	for i := range log.recs {
		f := &log.recs[i]
		if i > 0 && f.serial != next {
			if next > log.durable {
				log.cut = f.open == log.recs[i-1].open
				log.recs = log.recs[:i]
				return log
			}
			log.holes = append(log.holes, hole{next, f.serial - 1})
		}
		if !f.ok && f.serial > log.durable {
			log.cut = i+1 < len(log.recs) && log.recs[i+1].open == f.open
			log.recs = log.recs[:i]
			return log
		}
		next = f.serial + 1
	}
	if len(log.recs) > 0 && next <= log.durable {
		log.holes = append(log.holes, hole{next, log.durable})
	}
	return log
}

// rebuild makes the replicas and the state of the log out of what was scanned.
func (d *Disk) rebuild(log *scannedLog) error {
	w := d.wal
	for i := range log.recs {
		f := &log.recs[i]
		if w.cur != int(f.slot) {
			w.outside = 0
		}
		w.serial, w.cur, w.pos = f.serial, int(f.slot), f.end
		w.outside += f.freshBytes()
		w.slots[f.slot].last = f.serial
	}
	for _, h := range log.holes {
		w.serial = max(w.serial, h.last) // a serial is never used twice
	}
	w.durable = w.serial
	body := ckptBody{page: -1, replayFrom: 1}
	for i := range log.recs {
		if log.recs[i].typ == recCkpt {
			b, ok := decodeCkpt(log.recs[i].extra)
			if !ok {
				return holdfast.Errorf(holdfast.ErrIntegrity, "a checkpoint record contradicts itself")
			}
			body = b
		}
	}
	switch {
	case len(log.recs) == 0 && log.durable > 0:
		return holdfast.Errorf(holdfast.ErrIntegrity, "the log is gone: it was durable up to record %d", log.durable)
	case len(log.recs) > 0 && log.recs[0].serial > body.replayFrom:
		if body.upTo == 0 {
			return holdfast.Errorf(holdfast.ErrIntegrity, "the log begins at record %d and holds no checkpoint", log.recs[0].serial)
		}
		log.holes = append([]hole{{body.replayFrom, log.recs[0].serial - 1}}, log.holes...)
	}
	w.keepFrom = body.replayFrom
	saved, err := d.loadDirectory(body)
	if err != nil {
		return err
	}
	p := newReplay(d, saved, body, log)
	if err := p.run(); err != nil {
		return err
	}
	d.alloc.loaded()
	installs := int64(0)
	for _, s := range p.saved {
		p.finish(s)
		for _, f := range p.logs[s.r.desc.Replica].installs {
			if !f.taken {
				installs++
			}
		}
		d.replicas[s.r.desc.Replica] = s.r
	}
	if d.opts.checking || d.readOnly != nil {
		return p.overlay()
	}
	if err := d.sealFresh(log); err != nil {
		return err
	}
	if err := d.ground(installs); err != nil {
		return err
	}
	for _, s := range p.saved {
		for _, f := range p.logs[s.r.desc.Replica].installs {
			if err := p.install(s.r, &f); err != nil {
				return err
			}
		}
	}
	return nil
}

// loadDirectory reads the replicas of the last checkpoint and their maps.
func (d *Disk) loadDirectory(body ckptBody) (map[holdfast.ReplicaID]*savedState, error) {
	saved := map[holdfast.ReplicaID]*savedState{}
	var all []byte
	ref := pageRef{page: body.page, crc: body.crc}
	for i := int64(0); ref.page >= 0; i++ {
		if i > d.alloc.chunks*pagesPerChunk || !d.alloc.usePage(ref.page) {
			return nil, holdfast.Errorf(holdfast.ErrIntegrity, "the directory of replicas goes in circles")
		}
		b, err := d.readPage(ref.page, true)
		if err != nil {
			return nil, err
		}
		used := binary.LittleEndian.Uint32(b[28:])
		if !checkPage(b, holdfast.ReplicaID{}, levelDir, i, ref.crc, d.seed) || used > dirPayload {
			return nil, holdfast.Errorf(holdfast.ErrIntegrity, "page %d of the directory of replicas does not match its checksum", i)
		}
		d.dirPages = append(d.dirPages, ref.page)
		all = append(all, b[pageHead+dirLink:][:used]...)
		ref = pageRef{page: int64(binary.LittleEndian.Uint64(b[pageHead:])), crc: binary.LittleEndian.Uint32(b[pageHead+8:])}
	}
	if body.page < 0 {
		d.alloc.needs(int64(len(d.space.refs)))
		d.space.unwritten = int64(len(d.space.refs))
		return saved, nil
	}
	all, err := d.space.decode(all)
	if err != nil {
		return nil, err
	}
	for i := range d.space.refs {
		if !d.alloc.usePage(d.space.refs[i].page) {
			return nil, holdfast.Errorf(holdfast.ErrIntegrity, "page %d of used chunks lies where another is", i)
		}
	}
	for len(all) > 0 {
		s, n, err := d.decodeState(all)
		if err != nil {
			return nil, err
		}
		all = all[n:]
		err = s.r.tree.load(d, s.root, d.alloc.usePage)
		if err != nil {
			return nil, holdfast.Errorf(holdfast.KindOf(err), "load the map of replica %v: %w", s.r.desc.Replica, err)
		}
		if s.r.deleted {
			d.released = append(d.released, s.r)
			continue
		}
		saved[s.r.desc.Replica] = s
	}
	if uint64(len(saved)+len(d.released)) != body.replicas {
		return nil, holdfast.Errorf(holdfast.ErrIntegrity, "the directory holds %d replicas, not %d", len(saved)+len(d.released), body.replicas)
	}
	return saved, d.loadSpace(saved)
}

// loadSpace finds out which chunks the maps refer to: from the pages that say
// so, or, if one of them is lost, from every leaf.
func (d *Disk) loadSpace(saved map[holdfast.ReplicaID]*savedState) error {
	if lost := d.space.load(d); lost != nil {
		d.log.Error("pages of used chunks are lost, the maps are read whole", "disk", d.super.disk.String(), "error", lost)
		d.spaceLost = lost
		all := slices.Clone(d.released)
		for _, s := range saved {
			all = append(all, s.r)
		}
		if err := d.space.recount(all); err != nil {
			return err
		}
	}
	if c, ok := d.alloc.useAll(d.space.mapped); !ok {
		return holdfast.Errorf(holdfast.ErrIntegrity, "chunk %d of the disk is both data and map", c)
	}
	return nil
}
