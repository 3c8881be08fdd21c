package reconcile

import (
	"bytes"
	"hash/crc32"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/disk"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// TestReclaimDue: what can be given back waits for a while, so that more comes
// together, and no longer.
func TestReclaimDue(t *testing.T) {
	id, since := holdfast.DiskID{1}, map[holdfast.DiskID]time.Time{}
	for _, step := range []struct {
		at          time.Duration
		reclaimable int64
		due         bool
	}{
		{0, 0, false},
		{1 * time.Second, 64, false},
		{20 * time.Second, 128, false},
		{31 * time.Second, 128, true},
		{32 * time.Second, 64, false}, // it begins anew
		{61 * time.Second, 64, false},
		{62 * time.Second, 64, true},
		{63 * time.Second, 64, false},
		{70 * time.Second, 0, false}, // the disk did so by itself
		{95 * time.Second, 64, false},
		{125 * time.Second, 64, true},
	} {
		if got := reclaimDue(id, step.reclaimable, time.Unix(0, 0).Add(step.at), since); got != step.due {
			t.Errorf("after %v, with %d bytes: got %v, want %v", step.at, step.reclaimable, got, step.due)
		}
	}
}

// TestReclaim: an idle disk, whose log never fills, gives back what was trimmed.
func TestReclaim(t *testing.T) {
	reg := newRegister(t)
	n := run(t, reg, holdfast.NewID[holdfast.NodeID](), vfs.NewMemory(1), t.TempDir())
	defer n.end(t)
	v := n.create(t, "v")
	var od *openDisk
	n.disks.mu.Lock()
	for _, x := range n.disks.open {
		od = x
	}
	n.disks.mu.Unlock()
	var r *disk.Replica
	until(t, "the replica is made", func() (ok bool) { r, ok = od.Replica(v.Segments[0].Replicas[0].ID); return ok })
	if err := r.Fence(1); err != nil {
		t.Fatal(err)
	}
	payload := bytes.Repeat([]byte{0x5a}, holdfast.ChunkSize)
	write := disk.Entry{Epoch: 1, Seq: 1, Type: disk.OpWrite, Length: holdfast.ChunkSize, Payload: payload}
	for off := 0; off < len(payload); off += holdfast.BlockSize {
		write.CRC = append(write.CRC, crc32.Checksum(payload[off:off+holdfast.BlockSize], crc32.MakeTable(crc32.Castagnoli)))
	}
	for _, e := range []disk.Entry{write, {Epoch: 1, Seq: 2, Type: disk.OpTrim, Length: holdfast.ChunkSize}} {
		if err := r.Append([]disk.Entry{e}); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Sync(t.Context()); err != nil {
			t.Fatal(err)
		}
		r.SetCommit(e.Seq)
		if at, err := r.Apply(t.Context(), e.Seq); err != nil || at != e.Seq {
			t.Fatalf("applied to %d: %v", at, err)
		}
	}
	if s := od.Stat(); s.Reclaimable == 0 {
		t.Fatalf("nothing to give back: %+v", s)
	}
	since := map[holdfast.DiskID]time.Time{}
	n.disks.reclaim(t.Context(), time.Unix(0, 0), since)
	if s := od.Stat(); s.Reclaimable == 0 {
		t.Error("given back at once")
	}
	n.disks.reclaim(t.Context(), time.Unix(0, 0).Add(reclaimAfter), since)
	if s := od.Stat(); s.Reclaimable != 0 {
		t.Errorf("still %d bytes to give back", s.Reclaimable)
	}
}
