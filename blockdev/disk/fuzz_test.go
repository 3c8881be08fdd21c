package disk

import (
	"bytes"
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
// ordered and lies within the file.
func FuzzScan(f *testing.F) {
	b := logOf(f, goldenDisk(f))
	f.Add(b[:64<<10], uint32(0), []byte{})
	f.Add(b[:64<<10], uint32(5000), []byte{1, 2, 3})
	f.Add([]byte{}, uint32(0), []byte{})
	seed := seedOf(testDisk)
	f.Fuzz(func(t *testing.T, b []byte, at uint32, patch []byte) {
		b = bytes.Clone(b)
		if int(at) < len(b) {
			copy(b[at:], patch)
		}
		recs := scanSlot(b, 0, seed)
		var serial, open uint64
		for _, r := range recs {
			if r.serial <= serial || r.open < open || r.pos < r.headLen || r.pos+r.payloadLen > int64(len(b)) {
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

// FuzzSuperblock: no bytes make it panic, and what it accepts is what it would write.
func FuzzSuperblock(f *testing.F) {
	f.Add(goldenSuper().encode())
	f.Add(make([]byte, superSize))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := decodeSuperblock(b)
		if err == nil && !bytes.Equal(s.encode()[:8], b[:8]) {
			t.Fatal("accepted what it would not write")
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
