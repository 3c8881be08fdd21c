package disk

import (
	"testing"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// An orphan tail must not fill the log of the others, and must not be lost.
func TestOrphanTailMovesAlong(t *testing.T) {
	fs := vfs.NewMemory(3)
	mustFormat(t, fs, testPath, tinyFormat())
	d := mustOpen(t, fs, testPath)
	orphan, busy := mustCreate(t, d, 1, 1<<20), mustCreate(t, d, 2, 4<<20)
	for seq := holdfast.Seq(1); seq <= 20; seq++ {
		mustAppend(t, orphan, writeEntry(0, seq, int64(seq)*8192, 8192))
	}
	orphan.SetCommit(5)
	wrote := int64(0)
	seq := holdfast.Seq(0)
	for wrote < 10*d.wal.size() {
		seq++
		e := writeEntry(0, seq, int64(seq%60)*65536, 65536)
		e.Commit = seq - 1
		mustAppend(t, busy, e)
		wrote += 65536
	}
	for i, again := range []*vfs.Memory{fs, fs.Restart(), fs.Crash(1), fs.Crash(2)} {
		r, b := orphan, busy
		if i > 0 {
			d := mustOpen(t, again, testPath)
			r, _ = d.Replica(testDesc(1, 0).Replica)
			b, _ = d.Replica(testDesc(2, 0).Replica)
		}
		if st := r.Status(); st.Tail != 20 || st.Damaged != nil || st.Commit != 5 {
			t.Fatalf("file system %d: orphan %+v", i, st)
		}
		for q := holdfast.Seq(1); q <= 20; q++ {
			wantRead(t, r, int64(q)*8192, pattern(q, 8192))
		}
		st := b.Status()
		wantRead(t, b, int64(st.Tail%60)*65536, pattern(st.Tail, 65536))
		if err := r.Truncate(10); err != nil {
			t.Fatal(err)
		}
		wantRead(t, r, 11*8192, make([]byte, 8192))
	}
}
