package disk

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"math/bits"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// Finding is one thing that is not as it was written.
type Finding struct {
	Where   string             // superblock, log, map or data
	Replica holdfast.ReplicaID // zero if it concerns the whole disk
	Range                      // of the segment; zero if it has none
	What    string
}

// CheckedReplica is what was found of one replica.
type CheckedReplica struct {
	ReplicaDesc
	Tail, Checkpoint holdfast.Seq
	Mapped           int64 // bytes of chunks
	Blocks           int64 // blocks of data that were compared with their checksums
	Bad              int64 // of them, those that did not match
	Poisoned         int64 // blocks known to be lost: they read as errors until written
	Logged           int64 // entries of the log above the checkpoint
	Damaged          string
}

// CheckReport is what Check found.
type CheckReport struct {
	Stat
	Version   uint32
	Records   int // of the log
	Replicas  []CheckedReplica
	Found     int       // findings, also those that are not listed
	Findings  []Finding // at most maxFindings
	BytesRead int64
}

// maxFindings bounds the findings that are listed one by one.
const maxFindings = 1000

func (c *CheckReport) add(f Finding) {
	c.Found++
	if len(c.Findings) < maxFindings {
		c.Findings = append(c.Findings, f)
	}
}

// Check reads a formatted disk that nobody has open, whole and past the page cache:
// both superblocks, the log, the map, and every block of data against its checksum.
// It writes nothing. Damage is not an error of Check but a finding of its report;
// errors are those of Open. progress, if not nil, is told now and then how much of
// the data has been read, in bytes.
func Check(ctx context.Context, fs vfs.FS, path string, progress func(done, total int64)) (*CheckReport, error) {
	d := &Disk{
		fs: fs, path: path, log: slog.New(slog.DiscardHandler), opts: Options{checking: true},
		replicas: map[holdfast.ReplicaID]*Replica{},
	}
	defer func() {
		if d.main != nil {
			d.closeFiles()
		}
	}()
	fail := func(err error) (*CheckReport, error) {
		return nil, holdfast.Errorf(holdfast.KindOf(err), "check disk %s: %w", path, err)
	}
	if err := d.openFiles(); err != nil {
		return fail(err)
	}
	d.seed = seedOf(d.super.disk)
	d.alloc = newAllocator(d.super.chunks)
	d.makeMaps()
	d.wal.seed = d.seed
	c := &CheckReport{Version: d.super.version}
	c.superblocks(d)
	log, err := d.scan(ctx)
	if err != nil {
		return fail(err)
	}
	broken := d.rebuild(log)
	if broken != nil && holdfast.KindOf(broken) != holdfast.ErrIntegrity {
		return fail(broken)
	}
	c.log(log, d.wal.keepFrom)
	for _, l := range log.lost {
		c.add(Finding{Where: "log", Replica: l.replica, Range: l.Range, What: fmt.Sprintf("chunks that entry %d was written to do not match its checksums", l.seq)})
	}
	if broken != nil {
		c.add(Finding{Where: "map", What: broken.Error()})
	}
	c.Stat = d.Stat()
	c.Stat.Replicas = len(d.replicas)
	if err := c.data(ctx, d, progress); err != nil {
		return fail(err)
	}
	return c, nil
}

// superblocks looks at each copy by itself.
func (c *CheckReport) superblocks(d *Disk) {
	for _, off := range []int64{superA, superB} {
		b := vfs.AlignedBuffer(superSize)
		_, err := d.main.ReadDirectAt(b, off)
		var s *superblock
		if err == nil {
			s, err = decodeSuperblock(b)
		}
		switch {
		case err != nil:
			c.add(Finding{Where: "superblock", What: fmt.Sprintf("the copy at %d: %v", off, err)})
		case s.generation+1 < d.super.generation: // a crash between the two writes leaves one behind
			c.add(Finding{Where: "superblock", What: fmt.Sprintf("the copy at %d is of generation %d, the other of %d", off, s.generation, d.super.generation)})
		}
	}
	if d.super.flags&superFailed != 0 {
		c.add(Finding{Where: "superblock", What: "marked as failed: an I/O error was seen, and nothing here counts as intact"})
	}
}

// log notes what of the log cannot be read. Records before from are done with, and
// may be half overwritten.
func (c *CheckReport) log(log *scannedLog, from uint64) {
	c.Records = len(log.recs)
	for _, h := range log.holes {
		if h.last < from {
			continue
		}
		c.add(Finding{Where: "log", What: fmt.Sprintf("records %d to %d are unreadable and were durable", h.first, h.last)})
	}
	for i := range log.recs {
		if f := &log.recs[i]; !f.ok && f.serial >= from {
			c.add(Finding{Where: "log", Replica: f.replica, Range: Range{f.off, f.length}, What: fmt.Sprintf("the payload of record %d (entry %d) does not match its checksums", f.serial, f.seq)})
		}
	}
}

// data compares every mapped block with its checksum, and the maps with what is
// stored of them beside.
func (c *CheckReport) data(ctx context.Context, d *Disk, progress func(done, total int64)) error {
	if d.spaceLost != nil {
		c.add(Finding{Where: "map", What: d.spaceLost.Error()})
	}
	total := int64(0)
	for _, r := range d.Replicas() {
		total += r.tree.mapped * chunkSize
	}
	seen := newSpace(d.alloc.chunks)
	unread := false
	buf := d.buffer()
	for _, r := range d.Replicas() {
		out := CheckedReplica{ReplicaDesc: r.desc, Tail: r.tail, Checkpoint: r.ckpt, Mapped: r.tree.mapped * chunkSize, Logged: int64(r.tail - r.ckpt)}
		if r.damaged != nil {
			out.Damaged = r.damaged.Error()
			c.add(Finding{Where: "log", Replica: r.desc.Replica, What: out.Damaged})
		}
		for next, end := int64(0), r.desc.Size/chunkSize/leafEntries+1; ; {
			some := r.tree.exists(0, next, end, 1)
			if len(some) == 0 {
				break
			}
			next = some[0] + 1
			if r.tree.isZero(some[0]) {
				continue
			}
			l, err := r.readLeaf(some[0], r.tree.ref(pageKey{0, some[0]}))
			if err != nil {
				unread = true
				c.add(Finding{
					Where: "map", Replica: r.desc.Replica, What: err.Error(),
					Range: Range{some[0] * leafEntries * chunkSize, leafEntries * chunkSize},
				})
				continue
			}
			c.summary(r, l)
			for k := range l.entries {
				e := &l.entries[k]
				if e.typ != chunkMapped {
					continue
				}
				if err := ctx.Err(); err != nil {
					return holdfast.Errorf(holdfast.ErrTimeout, "%w", err)
				}
				chunk := l.index*leafEntries + int64(k)
				if seen.has(int64(e.phys)) {
					c.add(Finding{Where: "map", Replica: r.desc.Replica, Range: Range{chunk * chunkSize, chunkSize}, What: fmt.Sprintf("chunk %d of the disk is mapped twice", e.phys)})
				}
				seen.move(&chunkEntry{}, e)
				c.chunk(d, r, *buf, &out, chunk, e)
				c.BytesRead += chunkSize
				if progress != nil && c.BytesRead%(64<<20) == 0 {
					progress(c.BytesRead, total)
				}
			}
		}
		c.Replicas = append(c.Replicas, out)
	}
	unread = c.released(d, seen) || unread
	if d.spaceLost == nil && !unread {
		c.compareSpace(d.space, seen)
	}
	return nil
}

// released counts the chunks of released maps: they are in use until they are freed.
// It reports whether leaves could not be read.
func (c *CheckReport) released(d *Disk, seen *space) (unread bool) {
	for _, r := range d.released {
		for _, index := range r.tree.exists(0, 0, r.leafCount(), math.MaxInt) {
			if r.tree.isZero(index) {
				continue
			}
			l, err := r.readLeaf(index, r.tree.ref(pageKey{0, index}))
			if err != nil {
				unread = true
				c.add(Finding{Where: "map", Replica: r.desc.Replica, What: "deleted: " + err.Error()})
				continue
			}
			for k := range l.entries {
				e := &l.entries[k]
				switch {
				case e.typ != chunkMapped:
				case !seen.has(int64(e.phys)):
					seen.move(&chunkEntry{}, e)
				case d.spaceLost == nil: // else it may be another's by now, and is not freed for this one
					c.add(Finding{Where: "map", Replica: r.desc.Replica, What: fmt.Sprintf("chunk %d of the disk, of a deleted replica, is mapped", e.phys)})
				}
			}
		}
	}
	return unread
}

// summary compares what the page above a leaf says of it.
func (c *CheckReport) summary(r *Replica, l *leaf) {
	mapped, poison, last := uint64(0), int64(0), holdfast.Seq(0)
	for k := range l.entries {
		e := &l.entries[k]
		if e.typ == chunkMapped {
			mapped |= 1 << k
		}
		poison += e.poisoned()
		last = max(last, e.lastSeq)
	}
	if up := r.tree.child(l.index); up.mapped != mapped || int64(up.poison) != poison || up.lastSeq < last {
		c.add(Finding{
			Where: "map", Replica: r.desc.Replica, Range: Range{l.index * leafEntries * chunkSize, leafEntries * chunkSize},
			What: fmt.Sprintf("the page above says chunks %x mapped, %d blocks lost, up to entry %d, and they are %x, %d, %d",
				up.mapped, up.poison, up.lastSeq, mapped, poison, last),
		})
	}
}

// compareSpace looks for chunks that count as used and are not, or are and do not.
func (c *CheckReport) compareSpace(stored, seen *space) {
	leaked, missing := 0, 0
	for i := range stored.mapped {
		leaked += bits.OnesCount64(stored.mapped[i] &^ seen.mapped[i])
		missing += bits.OnesCount64(seen.mapped[i] &^ stored.mapped[i])
	}
	if leaked > 0 {
		c.add(Finding{Where: "map", What: fmt.Sprintf("%d chunks count as used and no map refers to them", leaked)})
	}
	if missing > 0 {
		c.add(Finding{Where: "map", What: fmt.Sprintf("%d chunks that maps refer to do not count as used", missing)})
	}
}

// chunk compares one chunk's blocks with the map's checksums. A block of which the
// log holds a newer version may be half written: nothing reads it. Nor what was installed
// anew, which was compared when it was found in the log.
func (c *CheckReport) chunk(d *Disk, r *Replica, buf []byte, out *CheckedReplica, chunk int64, e *chunkEntry) {
	bad := func(block int64, what string) {
		out.Bad++
		c.add(Finding{Where: "data", Replica: out.Replica, Range: Range{chunk*chunkSize + block*blockSize, blockSize}, What: what})
	}
	_, err := d.base.ReadDirectAt(buf, d.chunkOffset(e.phys))
	for i := int64(0); i < blocksPerChunk; i++ {
		switch state := e.state(i); {
		case r.index.newest(chunk*blocksPerChunk+i) != nil || r.installed[chunk] != nil:
			continue
		case state == BlockPoison:
			out.Poisoned++
			continue
		case state != BlockData:
			continue
		}
		out.Blocks++
		if err != nil {
			bad(i, err.Error())
		} else if b := buf[i*blockSize : (i+1)*blockSize]; !payloadMatches(e.crc[i:i+1], b) {
			bad(i, fmt.Sprintf("block %d of chunk %d does not match its checksum", i, e.phys))
		}
	}
}
