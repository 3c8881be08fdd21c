package disk

import (
	"testing"

	"github.com/holdfast-storage/holdfast"
)

// A replica that has the id of one that was deleted is another one: nothing that the log
// holds of the former life becomes its own, wherever the last checkpoint was.
func TestSameIDAgain(t *testing.T) {
	const after = 8 * chunkSize
	for _, checkpoints := range []string{"", "f", "d", "c", "e", "fdce", "de", "ce", "dc"} {
		t.Run("checkpoints at "+checkpoints, func(t *testing.T) {
			fs, d, r := freshDisk(t, smallFormat())
			at := func(point string) {
				t.Helper()
				for _, c := range checkpoints {
					if string(c) == point {
						if err := d.Checkpoint(t.Context()); err != nil {
							t.Fatal(err)
						}
					}
				}
			}
			if err := r.Fence(7); err != nil {
				t.Fatal(err)
			}
			for seq := holdfast.Seq(1); seq <= 20; seq++ {
				e := writeEntry(7, seq, int64(seq)*chunkSize, blockSize)
				e.Commit = seq - 1
				mustAppend(t, r, e)
			}
			if err := r.SetHint(7, 9); err != nil {
				t.Fatal(err)
			}
			mustSync(t, r)
			at("f") // in the former life
			if err := d.DeleteReplica(r.desc.Replica); err != nil {
				t.Fatal(err)
			}
			at("d") // deleted
			r = mustCreate(t, d, 1, 1<<30)
			at("c") // created
			for seq := holdfast.Seq(1); seq <= 3; seq++ {
				mustAppend(t, r, writeEntry(0, seq, after+int64(seq)*chunkSize, 2*blockSize))
			}
			mustSync(t, r)
			at("e") // with entries
			want := r.Status()
			d.Abandon()
			d, r = reopened(t, fs.Restart())
			got := r.Status()
			if got.Tail != 3 || got.Fence != 0 || got.Commit != want.Commit || got.HintEpoch != 0 || got.Damaged != nil {
				t.Fatalf("after the open: %+v\nbefore:         %+v", got, want)
			}
			r.SetCommit(3)
			mustCheckpoint(t, d, r)
			for seq := int64(1); seq <= 20; seq++ {
				if seq < 9 || seq > 11 {
					wantRead(t, r, seq*chunkSize, make([]byte, blockSize))
				}
			}
			for seq := holdfast.Seq(1); seq <= 3; seq++ {
				wantRead(t, r, after+int64(seq)*chunkSize, pattern(seq, 2*blockSize))
			}
		})
	}
}
