package disk

import (
	"testing"

	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// slotOf lays records of one page each out in a WAL file.
func slotOf(recs ...record) []byte {
	b := vfs.AlignedBuffer(64 << 10)
	for i := range recs {
		r := &recs[i]
		r.typ, r.flags = recFence, flagBatchEnd
		r.encodeHead(b[i*vfs.PageSize:][:r.headSize()], 1)
	}
	return b
}

func serials(log *scannedLog) (s []uint64) {
	for _, r := range log.recs {
		s = append(s, r.serial)
	}
	return s
}

func TestScan(t *testing.T) {
	for _, c := range []struct {
		name    string
		slots   [][]byte
		durable uint64 // by the superblock
		want    []uint64
		holes   []hole
	}{
		{"nothing", [][]byte{slotOf()}, 0, nil, nil},
		{"one file", [][]byte{slotOf(record{serial: 1, open: 1}, record{serial: 2, open: 1})}, 0, []uint64{1, 2}, nil},
		{"ring", [][]byte{
			slotOf(record{serial: 5, open: 1}, record{serial: 2, open: 1}), // 2 is of the round before
			slotOf(record{serial: 3, open: 1}, record{serial: 4, open: 1}),
		}, 0, []uint64{3, 4, 5}, nil},
		{"a lost tail's record after one that took its place", [][]byte{
			slotOf(record{serial: 1, open: 1}, record{serial: 2, open: 2}, record{serial: 3, open: 1}),
		}, 0, []uint64{1, 2}, nil},
		{"a lost tail in another file", [][]byte{
			slotOf(record{serial: 1, open: 1}, record{serial: 2, open: 2}),
			slotOf(record{serial: 3, open: 1}, record{serial: 4, open: 1}),
		}, 0, []uint64{1, 2}, nil},
		{"torn", [][]byte{slotOf(record{serial: 1, open: 1}, record{serial: 3, open: 1, durable: 1})}, 0, []uint64{1}, nil},
		{"corrupt, says a later record", [][]byte{
			slotOf(record{serial: 1, open: 1}, record{serial: 3, open: 1, durable: 2}),
		}, 0, []uint64{1, 3}, []hole{{2, 2}}},
		{"corrupt, says the superblock", [][]byte{slotOf(record{serial: 1, open: 1})}, 3, []uint64{1}, []hole{{2, 3}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var all []found
			for i, b := range c.slots {
				all = append(all, scanSlot(b, int32(i), 1)...)
			}
			log := assemble(all, c.durable)
			got := serials(log)
			if len(got) != len(c.want) || len(log.holes) != len(c.holes) {
				t.Fatalf("got records %v holes %v, want %v %v", got, log.holes, c.want, c.holes)
			}
			for i := range got {
				if got[i] != c.want[i] {
					t.Fatalf("got records %v, want %v", got, c.want)
				}
			}
			for i := range c.holes {
				if log.holes[i] != c.holes[i] {
					t.Fatalf("got holes %v, want %v", log.holes, c.holes)
				}
			}
		})
	}
}
