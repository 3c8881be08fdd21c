package disk

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"testing"

	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// logOf returns the first WAL file of a disk whose log holds records of all kinds.
func logOf(t testing.TB, fs vfs.FS) []byte {
	b := make([]byte, 512<<10)
	f, err := fs.OpenFile(walName(testPath, 0), 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// No flipped bit of a record is ever accepted: its head is refused, or its
// payload is seen not to match.
func TestNoFlippedBitIsAccepted(t *testing.T) {
	b := logOf(t, goldenDisk(t))
	seed := seedOf(testDisk)
	recs := scanSlot(b, 0, seed)
	if len(recs) < 10 {
		t.Fatalf("only %d records", len(recs))
	}
	types := map[recordType]bool{}
	for _, f := range recs {
		if types[f.typ] {
			continue
		}
		types[f.typ] = true
		start := f.pos - f.headLen
		for off := start; off < f.pos+f.payloadLen; off++ {
			if off > start+200 && off%97 != 0 { // all of the head, some of the payload
				continue
			}
			for bit := range 8 {
				b[off] ^= 1 << bit
				r, ok := decodeHead(b[start:], seed)
				if ok && payloadMatches(r.crc, b[f.pos:f.pos+r.payloadLen]) {
					t.Fatalf("record of type %d: bit %d of byte %d flipped and accepted", f.typ, bit, off-start)
				}
				b[off] ^= 1 << bit
			}
		}
	}
	for _, want := range []recordType{recWrite, recZero, recTrim, recFence, recTrunc, recInstall, recCkpt, recCreate, recHint} {
		if !types[want] {
			t.Errorf("no record of type %d was tried", want)
		}
	}
}

// Records of another disk are never taken for this one's.
func TestOtherDisksRecords(t *testing.T) {
	b := logOf(t, goldenDisk(t))
	if got := scanSlot(b, 0, seedOf(testDisk)+1); len(got) != 0 {
		t.Fatalf("%d records of another disk were accepted", len(got))
	}
}

// FuzzScan: whatever is in a WAL file, the scan ends, and what it accepts is
// ordered and lies within the file. b is laid over a log of all kinds of records at
// a place; with seal, the heads' checksums are made to match again.
func FuzzScan(f *testing.F) {
	log := logOf(f, goldenDisk(f))[:64<<10]
	seed := seedOf(testDisk)
	f.Add([]byte{}, uint32(0), false)
	f.Add([]byte{1, 2, 3}, uint32(5000), false)
	f.Add(make([]byte, 4096), uint32(4096), false)
	for _, r := range scanSlot(log, 0, seed) {
		head := r.pos - r.headLen
		f.Add(bytes.Clone(log[head:r.pos]), uint32(0), true) // where another was
		for _, field := range []int64{10, 11, 12, 16, 24, 32, 96, 100, 104} {
			f.Add([]byte{0xff, 0xff}, uint32(head+field), true)
			f.Add([]byte{0}, uint32(head+field), true)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte, at uint32, seal bool) {
		file := bytes.Clone(log)
		copy(file[at%uint32(len(file)):], b)
		if seal {
			sealRecords(file, seed)
		}
		recs := scanSlot(file, 0, seed)
		var serial, open uint64
		for _, r := range recs {
			if r.serial <= serial || r.open < open || r.pos < r.headLen || r.pos+r.payloadLen > int64(len(file)) {
				t.Fatalf("record %d at %d after record %d", r.serial, r.pos, serial)
			}
			serial, open = r.serial, r.open
			_, _ = decodeCkpt(r.extra)
			_, _ = decodeDesc(r.replica, r.extra)
			_, _ = decodeInstall(&r.record)
		}
		log := assemble(recs, uint64(at))
		for i := 1; i < len(log.recs); i++ {
			if log.recs[i].serial <= log.recs[i-1].serial {
				t.Fatal("not in order")
			}
		}
	})
}

// sealRecords gives every head in a WAL file the checksum of what it says.
func sealRecords(file []byte, seed uint32) {
	for pos := 0; pos+recordFixed <= len(file); pos += 8 {
		h := file[pos:]
		n := int(binary.LittleEndian.Uint32(h[12:]))
		if binary.LittleEndian.Uint32(h) == recordMagic && n >= recordFixed && n <= len(h) {
			binary.LittleEndian.PutUint32(h[4:], crc32.Update(seed, castagnoli, h[8:n]))
		}
	}
}

// FuzzSuperblock: no bytes make it panic, and what it accepts is what it would
// write. b is laid over a superblock, as it is and with a checksum that matches.
func FuzzSuperblock(f *testing.F) {
	f.Add([]byte{}, uint16(0))
	f.Add(make([]byte, superSize), uint16(0))
	for _, field := range []uint16{12, 24, 32, 40, 96, 104, 144, 152, 160, 168, 172, 176, 184, 192} {
		f.Add([]byte{0xff, 0xff}, field)
		f.Add(make([]byte, 8), field)
	}
	f.Fuzz(func(t *testing.T, b []byte, at uint16) {
		image := goldenSuper().encode()
		copy(image[int(at)%len(image):], b)
		for range 2 {
			s, err := decodeSuperblock(image)
			if err == nil {
				again := s.encode()
				if !bytes.Equal(again[12:104], image[12:104]) || !bytes.Equal(again[144:200], image[144:200]) {
					t.Fatal("accepted what it would not write")
				}
				if end := s.dataOffset + s.chunks*chunkSize; end > s.size || end < 0 {
					t.Fatalf("chunks end at %d of %d", end, s.size)
				}
			}
			clear(image[8:12])
			binary.LittleEndian.PutUint32(image[8:], crc32.Checksum(image, castagnoli))
		}
	})
}

// FuzzPage: whatever a map page holds, its decoders end, and a leaf that is accepted
// names only chunks of the disk and states that there are. b is laid over one of a
// disk's pages.
func FuzzPage(f *testing.F) {
	pages := forgeable(f, goldenDisk(f)).pages
	for i := range pages {
		f.Add(uint8(i), []byte{}, uint16(0))
		for _, field := range []uint16{0, 4, 8, 16, 24, 88, 96} {
			f.Add(uint8(i), []byte{0xff, 0xff, 0xff, 0xff}, pageHead+field)
		}
	}
	f.Fuzz(func(t *testing.T, which uint8, b []byte, at uint16) {
		p := bytes.Clone(pages[int(which)%len(pages)].b)
		copy(p[int(at)%len(p):], b)
		if n := len(childrenOf(p)); n != nodeEntries {
			t.Fatalf("%d children", n)
		}
		const chunks = 200
		var l leaf
		if !l.decode(p, chunks) {
			return
		}
		for i := range l.entries {
			e := &l.entries[i]
			for k := range int64(blocksPerChunk) {
				if e.state(k) > BlockPoison {
					t.Fatalf("entry %d: state %d", i, e.state(k))
				}
			}
			if e.typ > chunkZero || e.typ == chunkMapped && e.phys >= chunks {
				t.Fatalf("entry %d: type %d, chunk %d", i, e.typ, e.phys)
			}
		}
	})
}

// FuzzBodies: what the records carry beside their heads. What is accepted is what
// would be written.
func FuzzBodies(f *testing.F) {
	for _, r := range forgeable(f, goldenDisk(f)).recs {
		f.Add(r.extra, uint8(len(r.crc)))
	}
	f.Fuzz(func(t *testing.T, b []byte, crcs uint8) {
		if c, ok := decodeCkpt(b); ok && !bytes.Equal(c.encode()[:12], b[:12]) {
			t.Fatal("a checkpoint's body that would not be written")
		}
		if d, ok := decodeDesc(testDesc(1, 0).Replica, b); ok {
			if d.Size <= 0 || d.Size > maxSegment || !bytes.Equal(encodeDesc(d)[24:], b[24:descSize]) {
				t.Fatal("a descriptor that would not be written")
			}
		}
		r := record{extra: b, crc: make([]uint32, crcs)}
		if c, ok := decodeInstall(&r); ok && !bytes.Equal(encodeInstall(&c), b) {
			t.Fatal("an install that would not be written")
		}
	})
}

// FuzzDirectory: the states of replicas in a directory.
func FuzzDirectory(f *testing.F) {
	r := newReplica(&Disk{}, testDesc(1, 1<<30))
	r.tails = []EpochStart{{1, 0}}
	f.Add(r.encodeState(noPage, 1))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, n, err := (&Disk{}).decodeState(b)
		if err == nil && (n < stateFixed || n > len(b) || s.r.desc.Size <= 0) {
			t.Fatalf("accepted %d of %d bytes", n, len(b))
		}
	})
}
