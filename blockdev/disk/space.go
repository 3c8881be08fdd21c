package disk

import (
	"encoding/binary"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/holdfast-storage/holdfast"
)

// space says which chunks the maps of all replicas refer to. It follows from the
// leaves, and is stored beside them so that no leaf need be read when a disk is
// opened: pages of level 0xfffe, each one bit for 32,448 chunks, copy-on-write as
// those of maps are. The directory refers to all of them.
type space struct {
	mu     sync.Mutex
	mapped []uint64
	dirty  map[int64]struct{} // pages that changed since they were written

	stale     atomic.Bool // it holds chunks that no map has any more
	refs      []pageRef   // guarded by gate
	unwritten int64       // pages that no checkpoint has; guarded by gate
}

const (
	levelSpace   = 0xfffe
	spaceEntries = (pageSize - pageHead) * 8
)

func newSpace(chunks int64) *space {
	s := &space{mapped: make([]uint64, (chunks+63)/64), dirty: map[int64]struct{}{}}
	for i := range (chunks + spaceEntries - 1) / spaceEntries {
		s.refs = append(s.refs, noPage)
		s.dirty[i] = struct{}{} // written once, all have a place for ever
	}
	return s
}

// move notes that an entry of a map becomes another.
func (s *space) move(from, to *chunkEntry) {
	was, is := from.typ == chunkMapped, to.typ == chunkMapped
	if was == is && (!is || from.phys == to.phys) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if was {
		s.mapped[from.phys/64] &^= 1 << (from.phys % 64)
		s.dirty[int64(from.phys)/spaceEntries] = struct{}{}
	}
	if is {
		s.mapped[to.phys/64] |= 1 << (to.phys % 64)
		s.dirty[int64(to.phys)/spaceEntries] = struct{}{}
	}
}

// has says whether a map refers to a chunk.
func (s *space) has(chunk int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mapped[chunk/64]&(1<<(chunk%64)) != 0
}

// bytesOf copies page i's bits into b, or out of it. A page ends within a word
// of the bits, so it goes byte by byte.
func (s *space) bytesOf(i int64, b []byte, load bool) {
	for k := range int64(len(b)) {
		at := i*spaceEntries/8 + k
		if at/8 >= int64(len(s.mapped)) {
			return
		}
		shift := 8 * (at % 8)
		if load {
			s.mapped[at/8] |= uint64(b[k]) << shift
		} else {
			b[k] = byte(s.mapped[at/8] >> shift)
		}
	}
}

// save writes what changed. The caller holds gate alone. What was written counts
// as saved at once: if the checkpoint does not come about, the next one refers to
// the same pages.
func (s *space) save(w *pageWriter) error {
	for i := range s.refs {
		s.mu.Lock()
		_, changed := s.dirty[int64(i)]
		b := w.buffer()
		if changed {
			s.bytesOf(int64(i), b[pageHead:], false)
		}
		s.mu.Unlock()
		if !changed {
			continue
		}
		old := s.refs[i]
		crc := encodePageHead(b, holdfast.ReplicaID{}, levelSpace, int64(i), 0, w.d.seed)
		if old.page >= 0 && old.gen == w.d.mapGen {
			s.refs[i].crc = crc
			if err := w.again(old.page, b); err != nil {
				return err
			}
		} else {
			page, err := w.put(b)
			if err != nil {
				return err
			}
			if old.page >= 0 {
				w.drop(old.page)
			}
			s.refs[i] = pageRef{page, crc, w.d.mapGen}
		}
		s.mu.Lock()
		delete(s.dirty, int64(i))
		s.mu.Unlock()
	}
	return nil
}

// settled returns how many pages the first checkpoint, durable now, has brought.
func (s *space) settled() (n int64) {
	n, s.unwritten = s.unwritten, 0
	return n
}

// spaceStale, in the count of pages: what they say is to be found out anew.
const spaceStale = 1 << 31

// encode writes where the pages are: a count u32, and for each page number u64,
// crc u32.
func (s *space) encode() []byte {
	count := uint32(len(s.refs))
	if s.stale.Load() {
		count |= spaceStale
	}
	b := binary.LittleEndian.AppendUint32(nil, count)
	for _, ref := range s.refs {
		b = binary.LittleEndian.AppendUint64(b, uint64(ref.page))
		b = binary.LittleEndian.AppendUint32(b, ref.crc)
	}
	return b
}

// decode reads what encode wrote and returns what follows it.
func (s *space) decode(b []byte) ([]byte, error) {
	bad := holdfast.Errorf(holdfast.ErrIntegrity, "the directory does not say where the pages of used chunks are")
	if len(b) < 4 {
		return nil, bad
	}
	count := binary.LittleEndian.Uint32(b)
	s.stale.Store(count&spaceStale != 0)
	if int(count&^spaceStale) != len(s.refs) || len(b) < 4+12*len(s.refs) {
		return nil, bad
	}
	b = b[4:]
	for i := range s.refs {
		s.refs[i] = pageRef{page: int64(binary.LittleEndian.Uint64(b)), crc: binary.LittleEndian.Uint32(b[8:])}
		b = b[12:]
	}
	return b, nil
}

// load reads the pages. With an error the caller asks every leaf instead, by
// recount.
func (s *space) load(d *Disk) (lost error) {
	if s.stale.Load() {
		return holdfast.Errorf(holdfast.ErrIntegrity, "chunks of a map that was unreadable count as used")
	}
	for i := range s.refs {
		b, err := d.readPage(s.refs[i].page, true)
		if err == nil && !checkPage(b, holdfast.ReplicaID{}, levelSpace, int64(i), s.refs[i].crc, d.seed) {
			err = holdfast.Errorf(holdfast.ErrIntegrity, "page %d of used chunks does not match its checksum", i)
		}
		if err != nil {
			return err
		}
		s.bytesOf(int64(i), b[pageHead:], true)
		delete(s.dirty, int64(i))
	}
	if over := d.alloc.chunks % 64; over != 0 && s.mapped[len(s.mapped)-1]>>over != 0 {
		return holdfast.Errorf(holdfast.ErrIntegrity, "chunks behind the end of the disk count as used")
	}
	return nil
}

// recount finds the used chunks by reading every leaf. One that cannot be read
// damages its replica, and its chunks count as free: so nothing may ever free them
// on its behalf (Replica.uncounted). Damaged replicas, and what is left of them, come
// last: what they refer to may have been given to others since, and then it is the
// others'.
func (s *space) recount(replicas []*Replica) error {
	clear(s.mapped)
	s.stale.Store(false)
	for i := range s.refs {
		s.dirty[int64(i)] = struct{}{}
	}
	slices.SortStableFunc(replicas, func(a, b *Replica) int {
		switch {
		case a.mayShare() == b.mayShare():
			return 0
		case a.mayShare():
			return 1
		}
		return -1
	})
	for _, r := range replicas {
		damaged := r.mayShare()
		for next, end := int64(0), (r.desc.Size-1)/chunkSize/leafEntries+1; ; {
			some := r.tree.exists(0, next, end, 1)
			if len(some) == 0 {
				break
			}
			next = some[0] + 1
			l, err := r.leaf(some[0])
			twice := false
			if err == nil {
				twice, err = s.countLeaf(l)
			}
			switch {
			case err == nil:
				continue
			case twice && !damaged:
				return err
			case r.uncounted == nil:
				r.uncounted = map[int64]struct{}{}
			}
			r.uncounted[some[0]] = struct{}{}
			s.stale.Store(true)
		}
	}
	return nil
}

// mayShare says whether chunks that the map refers to may be others' by now.
func (r *Replica) mayShare() bool { return r.deleted || r.isDamaged() }

// countLeaf counts the chunks of a leaf, all or, with the first that is counted
// already, none.
func (s *space) countLeaf(l *leaf) (twice bool, err error) {
	for i := range l.entries {
		if e := &l.entries[i]; e.typ == chunkMapped && s.has(int64(e.phys)) {
			return true, holdfast.Errorf(holdfast.ErrIntegrity, "chunk %d of the disk is mapped twice", e.phys)
		}
	}
	for i := range l.entries {
		if e := &l.entries[i]; e.typ == chunkMapped {
			s.move(&chunkEntry{}, e)
		}
	}
	return false, nil
}
