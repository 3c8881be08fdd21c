package disk

import "github.com/holdfast-storage/holdfast"

// freshMatches compares fresh chunks, read from the medium, with the checksums of a
// write at off.
func (d *Disk) freshMatches(off int64, fresh, crc []uint32) (bool, error) {
	for _, c := range fresh {
		if int64(c) >= d.alloc.chunks {
			return false, nil
		}
	}
	buf := d.wideBuffer()
	defer d.wide.Put(buf)
	crc = crc[leadBlocks(off):]
	for i := 0; i < len(fresh); {
		n := runOfChunks(fresh[i:])
		b := (*buf)[:n*chunkSize]
		if _, err := d.main.ReadDirectAt(b, d.chunkOffset(fresh[i])); err != nil {
			return false, holdfast.Errorf(holdfast.ErrIO, "read chunk %d: %w", fresh[i], err)
		}
		if !payloadMatches(crc[i*blocksPerChunk:(i+n)*blocksPerChunk], b) {
			return false, nil
		}
		i += n
	}
	return true, nil
}

// endAtLostChunks ends the log at the first record whose fresh chunks do not match and
// of which nothing says that it was durable. No checkpoint in this log has let go of
// any chunk that is looked at: its record would say that it was durable.
func (d *Disk) endAtLostChunks(log *scannedLog) {
	for i := range log.recs {
		f := &log.recs[i]
		if f.serial <= log.durable || f.freshBytes() == 0 {
			continue
		}
		ok, err := d.freshMatches(f.off, f.freshChunks(), f.crc)
		if err != nil { // a sector that a crash tore may be unreadable
			d.log.Warn("chunks of the log's end are unreadable", "replica", f.replica.String(), "seq", uint64(f.seq), "error", err)
		}
		if err != nil || !ok {
			log.cut = true // fresh chunks are written before their record
			log.recs = log.recs[:i]
			return
		}
		log.looked = true
	}
}

// sealFresh has the superblock say how far the log is durable, before chunks may be
// written of entries that the log drops: the scan after a crash must not look at them
// again.
func (d *Disk) sealFresh(log *scannedLog) error {
	if !log.looked {
		return nil
	}
	d.super.walDurable = d.wal.serial
	if err := writeSuperblock(d.main, d.super); err != nil {
		return d.fail(err)
	}
	return nil
}

// claim takes the fresh chunks of an entry above the checkpoint into use. One that does
// not match was durable: its bytes are lost.
func (p *replay) claim(r *Replica, e *logEntry) {
	if e.fresh == nil {
		return
	}
	n := 0
	if !e.bad {
		ok, err := p.d.freshMatches(e.off, e.fresh, e.crc)
		for err == nil && ok && n < len(e.fresh) && p.d.alloc.use(int64(e.fresh[n])) {
			n++
		}
		if n == len(e.fresh) {
			return
		}
		p.log.lost = append(p.log.lost, lostChunks{r.desc.Replica, e.seq, Range{e.off, e.length}})
	}
	p.d.alloc.giveBack(e.fresh[:n])
	e.bad, e.fresh = true, nil
}

// foundInstall is an install above the checkpoint.
type foundInstall struct {
	*found
	taken bool // its fresh chunk is in use for it
	whole bool // and all of it matches
}

// claimInstall does the same for an install. What matches is not lost.
func (p *replay) claimInstall(r *Replica, f *foundInstall) {
	fresh := f.freshChunks()
	if fresh == nil {
		return
	}
	ok, err := p.d.freshMatches(f.off, fresh, f.crc)
	f.taken = int64(fresh[0]) < p.d.alloc.chunks && p.d.alloc.use(int64(fresh[0]))
	f.whole = f.taken && err == nil && ok
	if !f.whole {
		p.log.lost = append(p.log.lost, lostChunks{r.desc.Replica, f.seq, Range{f.off, f.length}})
	}
}

// lostChunks is an entry whose fresh chunks were durable and do not match.
type lostChunks struct {
	replica holdfast.ReplicaID
	seq     holdfast.Seq
	Range
}
