package disk

import (
	"hash/crc32"
	"maps"
	"math/bits"
	"sync"
	"sync/atomic"
	"time"

	"github.com/holdfast-storage/holdfast"
)

// Blocks whose bytes do not match, or were lost, are remembered here until they
// are good again: what a read, a copy or an apply found is told to the writer,
// which has the bytes of the other replicas (protocol, sections 5 and 8).

// maxBad bounds the chunks remembered; what is beyond is found again later.
const maxBad = 1024

// RepairStat counts blocks of all replicas of a disk since it was opened.
type RepairStat struct {
	Found    uint64 // blocks found bad or lost
	Repaired uint64 // blocks that are good again
	Poisoned uint64 // blocks that became poison for good: no in-sync replica had them
}

type repairCounters struct{ found, repaired, poisoned atomic.Uint64 }

// badBlocks are the blocks of one replica that are known to be bad.
type badBlocks struct {
	mu     sync.Mutex
	chunks map[int64]*badChunk
}

type badChunk struct {
	mask uint16        // its bad blocks
	told bool          // by Bad
	at   time.Duration // when
}

// add notes bad blocks of a chunk and returns how many of them are news.
func (b *badBlocks) add(chunk int64, mask uint16) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	c := b.chunks[chunk]
	if c == nil {
		if len(b.chunks) >= maxBad {
			return 0
		}
		if b.chunks == nil {
			b.chunks = map[int64]*badChunk{}
		}
		c = &badChunk{}
		b.chunks[chunk] = c
	}
	news := bits.OnesCount16(mask &^ c.mask)
	c.mask |= mask
	return news
}

// keep forgets the bad blocks of a chunk but those of mask.
func (b *badBlocks) keep(chunk int64, mask uint16) {
	b.mu.Lock()
	defer b.mu.Unlock()
	c := b.chunks[chunk]
	if c == nil {
		return
	}
	if c.mask &= mask; c.mask == 0 {
		delete(b.chunks, chunk)
	}
}

// forget forgets the chunks that f says.
func (b *badBlocks) forget(f func(chunk int64) bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	maps.DeleteFunc(b.chunks, func(c int64, _ *badChunk) bool { return f(c) })
}

func (b *badBlocks) clear() {
	b.mu.Lock()
	defer b.mu.Unlock()
	clear(b.chunks)
}

func (b *badBlocks) count() (n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, c := range b.chunks {
		n += int64(bits.OnesCount16(c.mask))
	}
	return n
}

// Bad returns up to max chunks with blocks known to be bad, none of them told
// less than every ago. now is any monotonic time.
func (r *Replica) Bad(max int, now, every time.Duration) []int64 {
	r.bad.mu.Lock()
	defer r.bad.mu.Unlock()
	var out []int64
	for chunk, c := range r.bad.chunks {
		if len(out) == max {
			break
		}
		if !c.told || now-c.at >= every {
			c.told, c.at = true, now
			out = append(out, chunk)
		}
	}
	return out
}

// found notes blocks that are bad.
func (r *Replica) found(chunk int64, mask uint16) {
	if n := r.bad.add(chunk, mask); n > 0 {
		r.d.repairs.found.Add(uint64(n))
		r.d.log.Warn("bad blocks found", "replica", r.desc.Replica.String(), "chunk", chunk, "blocks", n)
	}
}

func (r *Replica) foundBlock(block int64) {
	r.found(block/blocksPerChunk, 1<<(block%blocksPerChunk))
}

// lose notes a block that an apply found lost. The caller holds applying.
func (r *Replica) lose(chunk, i int64) {
	if r.lost == nil {
		r.lost = map[int64]uint16{}
	}
	r.lost[chunk] |= 1 << i
}

// foundLost tells of the lost blocks, now that the map calls them poison. The
// caller holds applying.
func (r *Replica) foundLost() {
	for chunk, mask := range r.lost {
		r.found(chunk, mask)
	}
	clear(r.lost)
}

// Repair brings bad blocks of a chunk back from what in-sync replicas hold of
// it. A block whose checksum is the one in this replica's map is written in its
// place: the same bytes, so a crash in between leaves a block that does not
// match, as before. Where the map cannot say what is right, or the place does
// not hold what is written to it, the whole chunk is installed, as by
// InstallChunk and under its conditions; c.AsOf must besides not lie above the
// tail (ErrRefused).
//
// A block that c calls poison becomes poison here, unless it is good. A chunk
// without bad blocks is left as it is.
func (r *Replica) Repair(c Chunk) error {
	if _, err := r.checkInstall(&c); err != nil {
		return err
	}
	t, err := r.repairInPlace(&c)
	if err != nil {
		return err
	}
	if t.install {
		if err := r.InstallChunk(c); err != nil {
			return err
		}
	}
	r.bad.keep(c.Index, 0)
	r.d.repairs.repaired.Add(uint64(bits.OnesCount16(t.bad &^ t.poison)))
	r.d.repairs.poisoned.Add(uint64(bits.OnesCount16(t.bad & t.poison)))
	if t.bad != 0 {
		r.d.log.Warn("bad blocks repaired", "replica", r.desc.Replica.String(), "chunk", c.Index, "blocks", bits.OnesCount16(t.bad&^t.poison),
			"lost", bits.OnesCount16(t.bad&t.poison), "installed", t.install)
	}
	return nil
}

// treatment is what a repair did, or leaves to an install.
type treatment struct {
	bad     uint16 // what was bad
	poison  uint16 // what nobody has
	install bool
}

// repairInPlace writes the blocks that it can in their place. Where c lacks a
// block that is good here, it is completed.
func (r *Replica) repairInPlace(c *Chunk) (treatment, error) {
	if r.d.readOnly != nil {
		return treatment{}, r.d.readOnly
	}
	r.d.gate.RLock()
	defer r.d.gate.RUnlock()
	r.applying.Lock()
	defer r.applying.Unlock()
	var t treatment
	r.mu.RLock()
	tail, err := r.tail, r.usable()
	r.mu.RUnlock()
	if err != nil {
		return t, err
	}
	e, err := r.lookupChunk(c.Index)
	switch {
	case err != nil:
		return t, err
	case c.AsOf > tail:
		return t, holdfast.Errorf(holdfast.ErrRefused, "repair chunk %d of replica %v as of entry %d: its log ends at %d", c.Index, r.desc.Replica, c.AsOf, tail)
	case e.typ != chunkMapped:
		return t, nil
	}
	own := r.d.buffer()
	defer r.d.buffers.Put(own)
	good, err := r.readOwn(*own, &e)
	if err != nil {
		return t, err
	}
	var dirty [blocksPerChunk]bool
	for i := range c.State {
		b := (*own)[i*blockSize : (i+1)*blockSize]
		if good&(1<<i) != 0 {
			if c.State[i] != BlockPoison {
				continue
			}
			if e.lastSeq != c.LastSeq {
				return t, holdfast.Errorf(holdfast.ErrRefused, "repair chunk %d of replica %v: block %d is good here, and lost in another version", c.Index, r.desc.Replica, i)
			}
			c.complete(i, e.state(int64(i)), e.crc[i], b)
			continue
		}
		if c.State[i] == BlockPoison && e.state(int64(i)) == BlockPoison {
			continue
		}
		t.bad |= 1 << i
		switch {
		case c.State[i] == BlockPoison:
			t.poison |= 1 << i
			t.install = true
		case e.state(int64(i)) == BlockData && c.State[i] == BlockData && c.CRC[i] == e.crc[i]:
			copy(b, c.Data[i*blockSize:])
			dirty[i] = true
		default:
			t.install = true
		}
	}
	if err := r.d.writeBlocks(*own, e.phys, dirty); err != nil {
		return t, err
	}
	if dirty == ([blocksPerChunk]bool{}) {
		return t, nil
	}
	if good, err = r.readOwn(*own, &e); err != nil {
		return t, err
	}
	for i := range dirty { // a place that does not keep what is written to it is given up
		t.install = t.install || dirty[i] && good&(1<<i) == 0
	}
	return t, nil
}

// complete takes a block that is good here into c.
func (c *Chunk) complete(i int, s BlockState, crc uint32, b []byte) {
	c.State[i], c.CRC[i] = s, 0
	if s != BlockData {
		return
	}
	if c.Data == nil {
		c.Data = make([]byte, chunkSize)
	}
	c.CRC[i] = crc
	copy(c.Data[i*blockSize:], b)
}

// readOwn reads a mapped chunk from the medium and returns which of its blocks
// are good: zeroes, or bytes that match. The caller holds applying.
func (r *Replica) readOwn(buf []byte, e *chunkEntry) (good uint16, err error) {
	at := r.d.chunkOffset(e.phys)
	_, whole := r.d.main.ReadDirectAt(buf, at)
	for i := range int64(blocksPerChunk) {
		b := buf[i*blockSize : (i+1)*blockSize]
		switch e.state(i) {
		case BlockZero:
			good |= 1 << i
		case BlockData:
			if whole != nil { // a sector that cannot be read costs its block alone
				if _, err := r.d.main.ReadDirectAt(b, at+i*blockSize); err != nil {
					continue
				}
			}
			if crc32.Checksum(b, castagnoli) == e.crc[i] {
				good |= 1 << i
			}
		}
	}
	return good, r.d.failed()
}
