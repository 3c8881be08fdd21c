package disk

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// loopDevice makes a block device of a file, or skips without root.
func loopDevice(t *testing.T, size int64) string {
	t.Helper()
	lacks := func(what string) {
		if os.Getenv("CI") == "true" && os.Getenv("HOLDFAST_UNIT") != "1" {
			t.Fatalf("a block device needs %s", what)
		}
		t.Skipf("a block device needs %s", what)
	}
	if os.Geteuid() != 0 || os.Getenv("HOLDFAST_UNIT") == "1" {
		lacks("root")
	}
	losetup, err := exec.LookPath("losetup")
	if err != nil {
		lacks("losetup")
	}
	path := t.TempDir() + "/backing"
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(losetup, "--find", "--show", path).CombinedOutput()
	if err != nil {
		lacks("a free loop device: " + strings.TrimSpace(string(out)))
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command(losetup, "--detach", dev).CombinedOutput(); err != nil {
			t.Errorf("detach %s: %s", dev, out)
		}
	})
	return dev
}

// TestRootRawDevice: log and chunks on one block device, chunks by O_DIRECT.
func TestRootRawDevice(t *testing.T) {
	dev := loopDevice(t, 64<<20)
	o := FormatOptions{Cluster: testCluster, Node: testNode, WALSize: MinWALSize}
	mustFormat(t, vfs.OS{}, dev, o)
	wantKind(t, Format(t.Context(), vfs.OS{}, dev, o), holdfast.ErrExists)
	d, err := Open(t.Context(), vfs.OS{}, dev, Options{ApplyEvery: -1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), vfs.OS{}, dev, Options{}); holdfast.KindOf(err) != holdfast.ErrRefused {
		t.Fatalf("second open: got %v", err)
	}
	r := mustCreate(t, d, 1, 1<<30)
	newest := map[int64]holdfast.Seq{}
	for q := holdfast.Seq(1); q <= 2000; q++ {
		e := writeEntry(0, q, int64(q*7%250)*16384, 16384)
		e.Commit = q - 1
		mustAppend(t, r, e)
		newest[e.Offset] = q
	}
	mustSync(t, r)
	r.SetCommit(2000)
	if err := d.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := r.DeclareIntact(0); err != nil {
		t.Fatal(err)
	}
	for off, q := range newest {
		wantRead(t, r, off, pattern(q, 16384))
	}
	mustAppend(t, r, Entry{Seq: 2001, Type: OpTrim, Offset: 0, Length: 1 << 20}, writeEntry(0, 2002, 4096, 4096))
	mustSync(t, r)
	r.SetCommit(2002)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = mustOpen(t, vfs.OS{}, dev)
	r, _ = d.Replica(testDesc(1, 0).Replica)
	if st := r.Status(); !st.Intact || st.Tail != 2002 || st.Applied != 2002 {
		t.Fatalf("status %+v", st)
	}
	wantRead(t, r, 4096, pattern(2002, 4096))
	for off, q := range newest {
		if off >= 1<<20 {
			wantRead(t, r, off, pattern(q, 16384))
		}
	}
}

// mapEntry returns what the map has of a chunk.
func mapEntry(r *Replica, chunk int64) chunkEntry {
	e, err := r.lookupChunk(chunk)
	if err != nil {
		panic(err)
	}
	return e
}
