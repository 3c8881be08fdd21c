package disk

import (
	"math/rand/v2"
	"testing"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// heldByCount is what held says, counted anew.
func heldByCount(x *logIndex) (n int64) {
	for _, e := range x.entries {
		if e.seq > x.indexed {
			n += e.recordBytes()
		}
	}
	return n
}

// What a replica holds of the log is known without counting, through appends,
// truncations, checkpoints, a rebase and a restart.
func TestHeldOfTheLog(t *testing.T) {
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, smallFormat())
	d := mustOpen(t, fs, testPath)
	r := mustCreate(t, d, 1, 1<<20)
	rng := rand.New(rand.NewPCG(7, 7))
	check := func(what string, seq holdfast.Seq) {
		t.Helper()
		r.mu.RLock()
		defer r.mu.RUnlock()
		if got, want := r.index.held(), heldByCount(r.index); got != want {
			t.Fatalf("after %s at %d: %d bytes held, counted %d", what, seq, got, want)
		}
	}
	commit := holdfast.Seq(0)
	for range 400 {
		seq := r.Status().Tail
		switch rng.IntN(8) {
		case 0:
			to := max(commit, seq-min(seq, holdfast.Seq(rng.IntN(4))))
			if err := r.Truncate(to); err != nil {
				t.Fatal(err)
			}
			check("truncate", to)
		case 1:
			mustSync(t, r)
			commit = seq
			r.SetCommit(commit)
			if err := d.Checkpoint(t.Context()); err != nil {
				t.Fatal(err)
			}
			check("checkpoint", seq)
		case 2:
			mustAppend(t, r, Entry{Seq: seq + 1, Type: OpTrim, Offset: 0, Length: 1 << 20})
			check("trim", seq+1)
		default:
			mustAppend(t, r, writeEntry(0, seq+1, int64(rng.IntN(200))*blockSize, blockSize*(1+rng.IntN(20))))
			check("write", seq+1)
		}
	}
	mustSync(t, r)
	held := r.index.held()
	d = mustOpen(t, fs.Crash(3), testPath)
	r = d.Replicas()[0]
	check("restart", r.Status().Tail)
	if r.index.held() < held {
		t.Errorf("%d bytes held after a restart, %d before", r.index.held(), held)
	}
	if err := r.Rebase(0, r.Status().Tail+5); err != nil {
		t.Fatal(err)
	}
	check("rebase", r.Status().Tail)
}

// A volume with more than a quarter of the log makes room before the others need
// to, all its replicas there taken together; one that is alone there need not.
func TestShareOfTheLog(t *testing.T) {
	fs := vfs.NewMemory(1)
	o := smallFormat()
	mustFormat(t, fs, testPath, o)
	d := mustOpen(t, fs, testPath)
	desc := ReplicaDesc{Segment: holdfast.SegmentID{Volume: holdfast.VolumeID{1}}, Size: 1 << 20}
	make3 := func(n byte, volume byte) *Replica {
		desc.Replica, desc.Segment.Volume, desc.Segment.Index = holdfast.ReplicaID{n}, holdfast.VolumeID{volume}, uint32(n)
		r, err := d.CreateReplica(desc)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	one, two, other := make3(1, 1), make3(2, 1), make3(3, 2)
	write := func(r *Replica, bytes int64) {
		for ; bytes > 0; bytes -= 64 << 10 {
			mustAppend(t, r, writeEntry(0, r.Status().Tail+1, 0, 64<<10))
		}
	}
	size := d.Stat().WALSize
	write(one, size/6)
	write(two, size/6)
	if d.overShare(one, d.wal.used()) {
		t.Error("a volume that is alone on the disk is over its share")
	}
	write(other, size/8)
	used := d.wal.used()
	if !d.overShare(one, used) || !d.overShare(two, used) {
		t.Error("a third of the log is not over the share of a volume")
	}
	if d.overShare(other, used) {
		t.Error("an eighth of the log is over the share of a volume")
	}
	for _, r := range []*Replica{one, two, other} {
		mustSync(t, r)
		r.SetCommit(r.Status().Tail)
	}
	if err := d.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	if d.overShare(one, used) {
		t.Error("what a checkpoint let go of still counts")
	}
}
