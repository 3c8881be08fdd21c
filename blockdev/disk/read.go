package disk

import (
	"hash/crc32"

	"github.com/holdfast-storage/holdfast"
)

// source is where the newest bytes of one block are.
type source struct {
	kind  sourceKind
	crc   uint32
	slot  int32 // fromLog
	phys  uint32
	pos   int64 // of the block: in the slot, or in the chunk
	entry *logEntry
}

type sourceKind uint8

const (
	fromNowhere sourceKind = iota // zeroes
	fromLog
	fromChunk
	fromLoss // bytes that were lost
)

// maxLookups bounds how often a read looks a block up again because it moved
// while it was read: each time, an apply and a checkpoint or an install have
// passed it by.
const maxLookups = 16

// ReadAt fills p with the newest logged bytes of [off, off+len(p)), both in
// whole blocks; what was never written, or was zeroed or trimmed, is zero. Only
// bytes that match their checksum are returned: a mismatch is read again from
// the medium, and is ErrIntegrity then, as are blocks known to be lost.
func (r *Replica) ReadAt(p []byte, off int64) error {
	if off < 0 || off%blockSize != 0 || len(p)%blockSize != 0 || int64(len(p)) > r.desc.Size || off > r.desc.Size-int64(len(p)) {
		return holdfast.Errorf(holdfast.ErrInvalid, "read %d bytes at %d of replica %v: not whole blocks within %d bytes", len(p), off, r.desc.Replica, r.desc.Size)
	}
	var few [8]source
	srcs := few[:0]
	first := off / blockSize
	r.mu.RLock()
	if err := r.usable(); err != nil {
		r.mu.RUnlock()
		return err
	}
	for i := int64(0); i < int64(len(p)/blockSize); i++ {
		src, ok := r.lookup(first + i)
		if !ok { // its leaf is not in memory
			r.mu.RUnlock()
			if _, err := r.leaf((first + i) / blocksPerChunk / leafEntries); err != nil {
				return err
			}
			r.mu.RLock()
			if err := r.usable(); err != nil {
				r.mu.RUnlock()
				return err
			}
			srcs, i = few[:0], -1 // all of one moment
			continue
		}
		srcs = append(srcs, src)
	}
	r.mu.RUnlock()
	for i := 0; i < len(srcs); {
		n := runOf(srcs[i:])
		part := p[i*blockSize : (i+n)*blockSize]
		if err := r.readRun(part, srcs[i:i+n], first+int64(i)); err != nil {
			return err
		}
		i += n
	}
	return nil
}

// lookup finds the newest bytes of a block; false if the leaf of its chunk must
// be read first. Under mu.
func (r *Replica) lookup(block int64) (source, bool) {
	if src, ok := r.lookupInstalled(block); ok {
		return src, true
	}
	c, ok := r.tree.get(block / blocksPerChunk)
	if !ok {
		return source{}, false
	}
	if e := r.index.newest(block); e != nil && e.seq > r.applied && e.seq > c.asOf {
		return e.source(block), true
	}
	i := block % blocksPerChunk
	if c.typ != chunkMapped {
		return source{}, true
	}
	switch c.state(i) {
	case BlockData:
		return source{kind: fromChunk, crc: c.crc[i], phys: c.phys, pos: i * blockSize}, true
	case BlockPoison:
		return source{kind: fromLoss}, true
	}
	return source{}, true
}

// source says where an entry has a block. Under mu.
func (e *logEntry) source(block int64) source {
	if e.typ != recWrite {
		return source{}
	}
	if e.bad {
		return source{kind: fromLoss}
	}
	return e.at(block)
}

// runOf counts the sources at the start that one read can fetch.
func runOf(s []source) int {
	n := 1
	for n < len(s) && s[n].kind == s[0].kind && s[n].slot == s[0].slot && s[n].phys == s[0].phys &&
		(s[0].kind == fromNowhere || s[n].pos == s[0].pos+int64(n)*blockSize) {
		n++
	}
	return n
}

// readRun reads blocks that lie one after the other, and looks each up again
// that does not match.
func (r *Replica) readRun(p []byte, srcs []source, block int64) error {
	if srcs[0].kind == fromNowhere {
		clear(p)
		return nil
	}
	var failed error // of a run; a sector that cannot be read costs its block alone
	if srcs[0].kind != fromLoss {
		failed = r.d.fetch(p, srcs[0], false)
	}
	for i := range srcs {
		b := p[i*blockSize : (i+1)*blockSize]
		if srcs[i].kind != fromLoss && failed == nil && crc32.Checksum(b, castagnoli) == srcs[i].crc {
			continue
		}
		if err := r.readAgain(b, srcs[i], block+int64(i)); err != nil {
			return err
		}
	}
	return nil
}

// readAgain reads one block that did not match: where it is now, if it moved
// in the meantime, else from the medium.
func (r *Replica) readAgain(p []byte, src source, block int64) error {
	for range maxLookups {
		r.mu.RLock()
		now, ok := r.lookup(block)
		err := r.usable()
		r.mu.RUnlock()
		if err == nil && !ok {
			if _, err = r.leaf(block / blocksPerChunk / leafEntries); err == nil {
				continue
			}
		}
		if err != nil { // deleted, its map is empty: that is not a block of zeroes
			return err
		}
		if now == src {
			break
		}
		src = now
		switch src.kind {
		case fromNowhere:
			clear(p)
			return nil
		case fromLoss:
			continue
		}
		if err := r.d.fetch(p, src, false); err != nil {
			return holdfast.Errorf(holdfast.ErrIO, "read block %d of replica %v: %w", block, r.desc.Replica, err)
		}
		if crc32.Checksum(p, castagnoli) == src.crc {
			return nil
		}
	}
	if src.kind == fromLoss {
		r.foundBlock(block)
		return holdfast.Errorf(holdfast.ErrIntegrity, "block %d of replica %v is lost until it is written again", block, r.desc.Replica)
	}
	if err := r.d.fetch(p, src, true); err != nil {
		if r.d.failed() == nil {
			r.foundBlock(block)
		}
		return holdfast.Errorf(holdfast.ErrIO, "read block %d of replica %v: %w", block, r.desc.Replica, err)
	}
	if got := crc32.Checksum(p, castagnoli); got != src.crc {
		r.foundBlock(block)
		return holdfast.Errorf(holdfast.ErrIntegrity, "block %d of replica %v has checksum %08x, not %08x", block, r.desc.Replica, got, src.crc)
	}
	return nil
}

// fetch reads bytes from the log or a chunk, of the page cache or the medium.
func (d *Disk) fetch(p []byte, src source, direct bool) error {
	switch {
	case src.kind == fromLog && direct:
		return d.wal.readDirect(p, src.slot, src.pos)
	case src.kind == fromLog:
		return d.wal.read(p, src.slot, src.pos)
	case direct:
		return readDirect(d.main, p, d.chunkOffset(src.phys)+src.pos)
	}
	_, err := d.main.ReadAt(p, d.chunkOffset(src.phys)+src.pos)
	return err
}

// readPayload reads blocks of an entry's payload from the given one on.
func (r *Replica) readPayload(p []byte, e *logEntry, from int64) error {
	r.mu.RLock()
	parts, bad := e.parts(from, int64(len(p)/blockSize)), e.bad
	r.mu.RUnlock()
	crc := e.crc[from:][:len(p)/blockSize]
	for _, direct := range [...]bool{false, true} {
		if bad {
			break
		}
		for _, part := range parts {
			if err := r.d.fetch(p[part.from:part.to], part.src, direct); err != nil {
				return holdfast.Errorf(holdfast.ErrIO, "read entry %d of replica %v from the log: %w", e.seq, r.desc.Replica, err)
			}
		}
		if payloadMatches(crc, p) {
			return nil
		}
	}
	return holdfast.Errorf(holdfast.ErrIntegrity, "the payload of entry %d of replica %v is lost", e.seq, r.desc.Replica)
}
