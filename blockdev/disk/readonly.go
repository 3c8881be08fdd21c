package disk

import (
	"context"
	"fmt"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// A disk with ro_compat features that this program does not know is opened for
// reading alone: a later release changed what must be kept up when something is
// written, not how it is read. Nothing of such a disk is changed, not even its
// open count: it is read as its last checkpoint and its log have it. Status,
// ReadAt and Entries work as ever; ReadChunk and Chunks do not, for they are as
// of what is applied, and applying writes.

// refusesWrites returns why nothing may be written to a disk of this superblock,
// or nil.
func (s *superblock) refusesWrites() error {
	if unknown := s.roCompat &^ knownRoCompat; unknown != 0 {
		return holdfast.Errorf(holdfast.ErrUnsupported, "disk %v is open for reading alone: its ro_compat features %s are not known to this program (format version %d)",
			s.disk, bitsOf(unknown), formatVersion).WithRemedy("run the release that wrote it, or a later one")
	}
	return nil
}

// bitsOf names the set bits of a feature word: "0, 40 (0x10000000001)".
func bitsOf(word uint64) string {
	s := ""
	for i := range 64 {
		if word&(1<<i) != 0 {
			if s != "" {
				s += ", "
			}
			s += fmt.Sprintf("%d", i)
		}
	}
	return fmt.Sprintf("%s (%#x)", s, word)
}

// protect makes every file of the disk refuse to be changed, whoever asks. What
// would change something is refused before it comes to that.
func (d *Disk) protect(why error) {
	d.readOnly = why
	for _, f := range []*vfs.File{&d.main, &d.base, &d.direct} {
		*f = readOnlyFile{*f, why}
	}
	for i := range d.wal.slots {
		d.wal.slots[i].file = readOnlyFile{d.wal.slots[i].file, why}
	}
	d.wal.failed = why // submit and sync return it
}

// readOnlyFile is a file that nothing changes.
type readOnlyFile struct {
	vfs.File
	why error
}

func (f readOnlyFile) WriteAt([]byte, int64) (int, error) { return 0, f.why }
func (f readOnlyFile) WritevAt([][]byte, int64) error     { return f.why }
func (f readOnlyFile) Sync() error                        { return f.why }
func (f readOnlyFile) Truncate(int64) error               { return f.why }
func (f readOnlyFile) Allocate(int64, int64) error        { return f.why }
func (f readOnlyFile) PunchHole(int64, int64) error       { return f.why }

// openReadOnly is what open does with a disk that must not be written to. The log
// is not synced: what an earlier process wrote is read, and is not vouched for.
func (d *Disk) openReadOnly(ctx context.Context, why error) error {
	d.protect(why)
	log, err := d.scan(ctx)
	if err != nil {
		return err
	}
	if err := d.rebuild(log); err != nil {
		return err
	}
	d.log.Warn("disk opened for reading alone", "disk", d.super.disk.String(), "path", d.path, "error", why)
	return nil
}

// installedChunk is what a CHUNK_INSTALL of the log made of a chunk, on a disk
// where it cannot be written to its place.
type installedChunk struct {
	Chunk                        // without its bytes
	at    [blocksPerChunk]source // of the blocks that are data
}

// overlay notes the installs of the log: their blocks are read from there.
func (p *replay) overlay() error {
	for _, s := range p.saved {
		for _, f := range p.logs[s.r.desc.Replica].installs {
			if err := p.overlayOne(s.r, &f); err != nil {
				return err
			}
		}
	}
	return nil
}

// overlayOne notes one install. Blocks that do not match are poison, as in a
// recovery that writes.
func (p *replay) overlayOne(r *Replica, f *foundInstall) error {
	in := &installedChunk{}
	c, err := p.readInstall(r, f, func(i int, src source, _ []byte) { in.at[i] = src })
	if err != nil {
		return err
	}
	in.Chunk = c
	if r.installed == nil {
		r.installed = map[int64]*installedChunk{}
	}
	r.installed[c.Index] = in // a later one replaces it
	r.asOf = max(r.asOf, c.AsOf)
	return nil
}

// lookupInstalled finds a block of a chunk that was installed and not put in its
// place; false for all others. Under mu.
func (r *Replica) lookupInstalled(block int64) (source, bool) {
	c := r.installed[block/blocksPerChunk]
	if c == nil {
		return source{}, false
	}
	if e := r.index.newest(block); e != nil && e.seq > r.applied && e.seq > c.AsOf {
		return e.source(block), true
	}
	i := block % blocksPerChunk
	switch c.State[i] {
	case BlockData:
		return c.at[i], true
	case BlockPoison:
		return source{kind: fromLoss}, true
	}
	return source{}, true
}
