package state

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"

	"github.com/holdfast-storage/holdfast"
)

// A snapshot of the tables:
//
//	magic "hfstate\n" | level u32 | body length u64 | body | crc32c u32 of all before
//
// The body holds the index, the cluster and each table in key order, so equal
// Views have equal snapshots.
const (
	snapshotMagic  = "hfstate\n"
	snapshotHeader = len(snapshotMagic) + 4 + 8
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// EncodeSnapshot writes the whole View, at its cluster level.
func EncodeSnapshot(v *View) ([]byte, error) {
	c := &coder{}
	level := max(v.cluster.Level, holdfast.Level1)
	if level != holdfast.Level1 {
		return nil, holdfast.Errorf(holdfast.ErrUnsupported, "this version writes snapshots of cluster level %d, not %d", holdfast.Level1, level)
	}
	c.buf = append(c.buf, snapshotMagic...)
	u32(c, &level)
	var length uint64
	u64(c, &length)
	v.code(c)
	if c.err != nil {
		return nil, holdfast.Errorf(holdfast.ErrInternal, "encode snapshot at index %d: %w", v.index, c.err)
	}
	binary.LittleEndian.PutUint64(c.buf[snapshotHeader-8:], uint64(len(c.buf)-snapshotHeader))
	return binary.LittleEndian.AppendUint32(c.buf, crc32.Checksum(c.buf, castagnoli)), nil
}

// DecodeSnapshot reads a View. Damage of any kind, and tables that contradict
// themselves, are ErrIntegrity; a level of a later version is ErrUnsupported.
func DecodeSnapshot(b []byte) (*View, error) {
	if len(b) < snapshotHeader+4 || string(b[:len(snapshotMagic)]) != snapshotMagic {
		return nil, holdfast.Errorf(holdfast.ErrIntegrity, "%d bytes that do not start like a snapshot", len(b))
	}
	body, sum := b[:len(b)-4], binary.LittleEndian.Uint32(b[len(b)-4:])
	if got := crc32.Checksum(body, castagnoli); got != sum {
		return nil, holdfast.Errorf(holdfast.ErrIntegrity, "the snapshot's checksum is %08x, not %08x", got, sum)
	}
	if level := binary.LittleEndian.Uint32(b[len(snapshotMagic):]); level != uint32(holdfast.Level1) {
		return nil, holdfast.Errorf(holdfast.ErrUnsupported, "a snapshot of cluster level %d: this version reads level %d", level, holdfast.Level1)
	}
	body = body[snapshotHeader:]
	if n := binary.LittleEndian.Uint64(b[snapshotHeader-8:]); n != uint64(len(body)) {
		return nil, holdfast.Errorf(holdfast.ErrIntegrity, "the snapshot has %d bytes, its header says %d", len(body), n)
	}
	v := &View{}
	c := &coder{buf: body, decoding: true}
	v.code(c)
	if err := c.done(); err != nil {
		return nil, holdfast.Errorf(holdfast.ErrIntegrity, "decode snapshot: %w", err)
	}
	if err := v.check(); err != nil {
		return nil, err
	}
	return v, nil
}

// code writes or reads all tables. The name index is not written: it follows
// from the volumes.
func (v *View) code(c *coder) {
	u64(c, &v.index)
	id(c, &v.cluster.ID)
	u32(c, &v.cluster.Level)
	codeTable(c, &v.nodes, func(n *Node) key { n.code(c); return key(n.ID) })
	codeTable(c, &v.disks, func(d *Disk) key { d.code(c); return key(d.ID) })
	codeTable(c, &v.volumes, func(vol *Volume) key { vol.code(c); return key(vol.ID) })
	codeTable(c, &v.replicas, func(p *ReplicaPlace) key { p.code(c); return key(p.Replica) })
	if !c.decoding || c.err != nil {
		return
	}
	for vol := range v.Volumes() {
		v.names = v.names.set(nameKey(vol.Name), vol)
	}
}

// codeTable writes a count and the records, or reads them; one writes or reads
// one record and returns its key. Keys must rise, as they do when written.
func codeTable[V any](c *coder, t *table[V], one func(*V) key) {
	n := uint32(t.n)
	u32(c, &n)
	if !c.decoding {
		for r := range t.all() {
			one(r)
		}
		return
	}
	var last key
	for i := uint32(0); i < n && c.err == nil; i++ {
		r := new(V)
		k := one(r)
		if c.err == nil && i > 0 && bytes.Compare(last[:], k[:]) >= 0 {
			c.fail(holdfast.Errorf(holdfast.ErrIntegrity, "table keys do not rise at %x", k))
		}
		if c.err == nil {
			*t = t.set(k, r)
		}
		last = k
	}
}

// check verifies what Apply keeps true, of a View that came from a snapshot.
func (v *View) check() error {
	bad := func(format string, args ...any) error {
		return holdfast.Errorf(holdfast.ErrIntegrity, format, args...)
	}
	if v.cluster.ID.IsZero() != (v.cluster.Level == 0) || v.cluster.Level > holdfast.Level1 {
		return bad("cluster %v is at level %d", v.cluster.ID, v.cluster.Level)
	}
	live := 0
	for vol := range v.volumes.all() {
		if !vol.Deleted {
			live++
			if n, err := SegmentCount(vol.Size, vol.Options.SegmentSize); err != nil || n != len(vol.Segments) {
				return bad("volume %v of %d bytes has %d segments", vol.ID, vol.Size, len(vol.Segments))
			}
		}
		if vol.UnderRepair() && (vol.Deleted || vol.Phase != PhaseDetached || !vol.Clean()) {
			return bad("volume %v is under repair and %s", vol.ID, vol.Phase)
		}
		for i := range vol.Segments {
			seg := &vol.Segments[i]
			if !vol.Deleted && len(seg.ISR()) == 0 {
				return bad("segment %v/%d has no in-sync replica", vol.ID, i)
			}
			for j, h := range seg.History {
				if h.Epoch > vol.Epoch || j > 0 && seg.History[j-1].Epoch >= h.Epoch {
					return bad("segment %v/%d has epoch %d out of order", vol.ID, i, h.Epoch)
				}
			}
			for _, r := range seg.Replicas {
				place, ok := v.replicas.get(r.ID)
				if !ok || place.Gone || place.Segment != (holdfast.SegmentID{Volume: vol.ID, Index: uint32(i)}) {
					return bad("replica %v of segment %v/%d is not in the table of replicas", r.ID, vol.ID, i)
				}
				if _, ok := v.disks.get(r.Disk); !ok {
					return bad("replica %v stands on disk %v, which is not known", r.ID, r.Disk)
				}
			}
		}
	}
	if v.names.n != live {
		return bad("%d live volumes have %d names", live, v.names.n)
	}
	for p := range v.replicas.all() {
		if p.Gone {
			continue
		}
		if _, seg, ok := v.Segment(p.Segment); !ok || seg.Replica(p.Replica) == nil {
			return bad("replica %v is not in segment %v", p.Replica, p.Segment)
		}
	}
	for d := range v.disks.all() {
		if _, ok := v.nodes.get(d.Node); !ok {
			return bad("disk %v belongs to node %v, which is not known", d.ID, d.Node)
		}
	}
	return nil
}
