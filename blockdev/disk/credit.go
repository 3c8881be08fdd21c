package disk

import "github.com/holdfast-storage/holdfast"

// Above creditShare of the disk's chunks no credit is given ahead of need: what is
// left goes to whoever writes first. Above refuseShare nothing new is given at all;
// the rest is for what must not be refused, like chunks of a copy that is installed
// over what it replaces.
const (
	creditShare = 92 // percent
	refuseShare = 97 // percent
)

// Affordable is what Afford found, all of one moment.
type Affordable struct {
	Need   int64        // chunks that logging the write would map
	Credit int64        // chunks that entries behind Tail may map
	Tail   holdfast.Seq // the log's tail
}

// Credit returns how many chunks entries behind the tail may map, as Reserve and
// Afford have promised. It waits for nothing: of a moment when entries are being
// logged it may be the credit of before or after them.
func (r *Replica) Credit() int64 {
	return r.credit.Load()
}

// Ahead raises the credit to want bytes as Reserve does, unless the disk, or the host, is
// so full that nothing is to be promised ahead of need. A shortage is no error.
func (r *Replica) Ahead(want int64) error {
	more := (want - r.Credit()*chunkSize + chunkSize - 1) / chunkSize
	if more <= 0 || r.d.alloc.above(creditShare, more) || !r.d.ahead(more) {
		return nil
	}
	_, err := r.Reserve(want)
	if holdfast.KindOf(err) == holdfast.ErrNoSpace {
		return nil
	}
	return err
}

// ahead says whether so many chunks may be promised ahead of need: on a host that is
// almost full, if they have space.
func (d *Disk) ahead(chunks int64) bool {
	return d.alloc.short(chunks, 0) == 0 || d.mayGrow(true) == nil
}

// Afford looks what a write of [off, off+length) would take if it were logged now,
// and raises the credit so that it can follow entries that will map pending chunks.
// The disk is full for it if the answer's Credit is less than Need and pending
// together; a write that needs nothing new always fits.
func (r *Replica) Afford(off, length, pending int64) (Affordable, error) {
	if off < 0 || length <= 0 || pending < 0 || pending > r.d.alloc.chunks || length > r.desc.Size || off > r.desc.Size-length {
		return Affordable{}, holdfast.Errorf(holdfast.ErrInvalid, "afford %d bytes at %d and %d chunks more: replica %v has %d bytes",
			length, off, pending, r.desc.Replica, r.desc.Size)
	}
	a, err := r.need(off, length)
	missing := pending + a.Need - a.Credit
	if err != nil || a.Need == 0 || missing <= 0 {
		return a, err
	}
	for squeezed := false; ; squeezed = true {
		if r.d.alloc.above(refuseShare, missing) {
			err = holdfast.Errorf(holdfast.ErrNoSpace, "more than %d %% of the disk are in use", refuseShare)
		} else {
			_, err = r.Reserve((pending + a.Need) * chunkSize)
		}
		if holdfast.KindOf(err) == holdfast.ErrNoSpace && !squeezed && r.d.wouldFree() {
			if err := r.d.squeeze(nil); err != nil {
				return Affordable{}, err
			}
			continue
		}
		if err != nil && holdfast.KindOf(err) != holdfast.ErrNoSpace {
			return Affordable{}, err
		}
		return r.need(off, length)
	}
}

// wouldFree says whether squeeze now may give chunks back.
func (d *Disk) wouldFree() bool { return d.awaits() || len(d.releasedMaps()) > 0 }

// awaits says whether a checkpoint now would give chunks back: they wait for
// one, or something was zeroed or trimmed that is not applied yet, or written to
// fresh chunks.
func (d *Disk) awaits() bool {
	if d.alloc.awaited() {
		return true
	}
	for _, r := range d.Replicas() {
		if r.clears() {
			return true
		}
	}
	return false
}

func (r *Replica) clears() bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if r.damaged != nil { // nothing of it is ever applied
		return false
	}
	for s := r.ckpt + 1; s <= min(r.commit, r.tail); s++ {
		if e := r.index.get(s); e != nil && (e.fresh != nil || e.typ != recWrite && s > r.applied) {
			return true // of two places for a chunk one comes free
		}
	}
	return false
}

// need counts the chunks of a range that have no place and are not promised one, or
// may lose it to what is logged and not applied yet.
func (r *Replica) need(off, length int64) (Affordable, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	a := Affordable{Credit: r.credit.Load(), Tail: r.tail}
	for c := off / chunkSize; c <= (off+length-1)/chunkSize; c++ {
		if !r.hasPlace(c) || r.index.clearedAbove(c, r.applied) {
			a.Need++
		}
	}
	return a, r.usable()
}

// hasPlace says whether a chunk is mapped, or will be by what is logged. Under mu.
func (r *Replica) hasPlace(chunk int64) bool {
	_, promised := r.reserved[chunk]
	_, mapping := r.mapping[chunk]
	return promised || mapping || r.tree.isMapped(chunk)
}

// above says whether more than percent of the chunks would be in use or promised if
// n more were.
func (a *allocator) above(percent, n int64) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return (a.chunks-a.free+a.reserved+n)*100 > a.chunks*percent
}

// awaited says whether chunks or pages wait for a checkpoint.
func (a *allocator) awaited() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.waiting)+len(a.waitingPages) > 0
}
