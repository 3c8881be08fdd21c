package disk

import (
	"errors"
	"strings"
	"syscall"
	"testing"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// R12: after one error nothing is written or synced again, and no replica of
// the disk is ever intact again.
func TestFirstErrorEndsTheDisk(t *testing.T) {
	for _, c := range []struct {
		name string
		op   vfs.Op
		path string
	}{
		{"log write", vfs.OpWrite, walDirSuffix},
		{"log sync", vfs.OpSync, walDirSuffix},
		{"chunk write", vfs.OpWrite, ""},
		{"chunk sync", vfs.OpSync, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			fs := vfs.NewMemory(1)
			mustFormat(t, fs, testPath, smallFormat())
			failed := make(chan error, 2)
			d, err := Open(t.Context(), fs, testPath, Options{ApplyEvery: -1, OnFail: func(err error) { failed <- err }})
			if err != nil {
				t.Fatal(err)
			}
			r := mustCreate(t, d, 1, 1<<20)
			mustAppend(t, r, writeEntry(0, 1, 0, 4096))
			mustSync(t, r)
			if err := r.DeclareIntact(0); err != nil {
				t.Fatal(err)
			}
			r.SetCommit(1)
			once := vfs.Fault{Op: c.op, Path: c.path, Times: 1, Err: syscall.EIO}
			if c.path == "" { // the image, not its log: let the log's operations pass
				once.Path, once.Times = testPath, 0
				if err := d.settleCommits(d.Replicas()); err != nil {
					t.Fatal(err)
				}
			}
			fs.Inject(once)
			err = r.Append([]Entry{writeEntry(0, 2, 0, 4096)})
			if err == nil {
				_, err = r.Sync(t.Context())
			}
			if err == nil {
				err = d.Checkpoint(t.Context())
			}
			wantKind(t, err, holdfast.ErrIO)
			fs.ClearFaults()
			wantKind(t, <-failed, holdfast.ErrIO)
			before := fs.Restart()
			wantKind(t, r.Append([]Entry{writeEntry(0, 3, 0, 4096)}), holdfast.ErrIO)
			_, err = r.Sync(t.Context())
			wantKind(t, err, holdfast.ErrIO)
			wantKind(t, r.Fence(9), holdfast.ErrIO)
			wantKind(t, r.ReadAt(make([]byte, 4096), 0), holdfast.ErrIO)
			wantKind(t, d.Checkpoint(t.Context()), holdfast.ErrIO)
			_, err = d.CreateReplica(testDesc(2, 1<<20))
			wantKind(t, err, holdfast.ErrIO)
			if d.Stat().Failed == nil {
				t.Fatal("Stat does not tell")
			}
			if err := d.Close(); err != nil {
				t.Fatalf("close of a failed disk: %v", err)
			}
			if len(failed) != 0 {
				t.Fatal("OnFail was called twice")
			}
			if c.path == "" {
				return // the mark may have met the same fault
			}
			d = mustOpen(t, before, testPath)
			r, _ = d.Replica(testDesc(1, 0).Replica)
			if st := d.Stat(); !st.MarkedFailed || r.Status().Intact {
				t.Fatalf("after reopening: marked %v, intact %v", st.MarkedFailed, r.Status().Intact)
			}
			wantKind(t, r.DeclareIntact(1), holdfast.ErrRefused)
		})
	}
}

// A full disk refuses what needs a new chunk and nothing else.
func TestFullDisk(t *testing.T) {
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, tinyFormat())
	d := mustOpen(t, fs, testPath)
	r := mustCreate(t, d, 1, 1<<30)
	seq, err := holdfast.Seq(0), error(nil)
	for err == nil {
		seq++
		e := writeEntry(0, seq, int64(seq)*65536, 65536)
		e.Commit = seq - 1
		err = r.Append([]Entry{e})
	}
	wantKind(t, err, holdfast.ErrNoSpace)
	if st := r.Status(); st.Tail != seq-1 {
		t.Fatalf("tail %d, want %d", st.Tail, seq-1)
	}
	mustAppend(t, r, Entry{Seq: seq, Commit: seq - 1, Type: OpWrite, Offset: 65536, Length: 4096, CRC: crcsOf(pattern(9, 4096)), Payload: pattern(9, 4096)})
	mustAppend(t, r, Entry{Seq: seq + 1, Commit: seq, Type: OpTrim, Offset: 0, Length: 1 << 29})
	mustSync(t, r)
	r.SetCommit(seq + 1)
	if err := d.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	if st := d.Stat(); st.Used > 1<<20 || st.Reserved != 0 || r.Status().Used != 0 {
		t.Fatalf("after a trim of all: %+v", st)
	}
	mustAppend(t, r, writeEntry(0, seq+2, 0, 65536))
	if held := fs.Held(); held > 4<<20 {
		t.Fatalf("the image and its log hold %d bytes after a trim of all", held)
	}
}

// A log full of uncommitted entries still takes fences and truncations.
func TestFullLogIsFenced(t *testing.T) {
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, tinyFormat())
	d := mustOpen(t, fs, testPath)
	r := mustCreate(t, d, 1, 1<<30)
	seq, err := holdfast.Seq(0), error(nil)
	for err == nil {
		seq++
		err = r.Append([]Entry{writeEntry(0, seq, int64(seq%8)*65536, 65536)})
	}
	wantKind(t, err, holdfast.ErrNoSpace)
	for epoch := holdfast.Epoch(1); epoch <= 10; epoch++ {
		if err := r.Fence(epoch); err != nil {
			t.Fatalf("fence %d in a full log: %v", epoch, err)
		}
	}
	if err := r.Truncate(1); err != nil {
		t.Fatal(err)
	}
	if err := d.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	mustAppend(t, r, writeEntry(10, 2, 0, 65536))
	wantRead(t, r, 0, pattern(2, 65536))
}

// The empty replica of 1 TiB costs almost nothing.
func TestThin(t *testing.T) {
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, smallFormat())
	d := mustOpen(t, fs, testPath)
	held := fs.Held()
	r := mustCreate(t, d, 1, 1<<40)
	mustAppend(t, r, Entry{Seq: 1, Type: OpTrim, Offset: 0, Length: 1 << 40}, Entry{Seq: 2, Type: OpZero, Offset: 1 << 20, Length: 1 << 39})
	mustSync(t, r)
	r.SetCommit(2)
	if err := d.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	if more := fs.Held() - held; more > 64<<10 {
		t.Fatalf("an empty replica holds %d bytes", more)
	}
	if st := r.Status(); st.Applied != 2 || st.Used != 0 {
		t.Fatalf("status %+v", st)
	}
}

func TestFormatRefuses(t *testing.T) {
	format := func(fs vfs.FS, o FormatOptions) error { return Format(t.Context(), fs, testPath, o) }
	used := func() *vfs.Memory {
		fs := vfs.NewMemory(1)
		mustFormat(t, fs, testPath, smallFormat())
		return fs
	}
	other := smallFormat()
	other.Cluster = holdfast.ClusterID{0xff}
	if err := format(used(), other); !errors.Is(err, holdfast.ErrRefused) || !strings.Contains(err.Error(), "another cluster") {
		t.Fatalf("disk of another cluster: got %v", err)
	}
	wantKind(t, format(used(), smallFormat()), holdfast.ErrExists)
	moved := smallFormat()
	moved.Node = holdfast.NodeID{0xfe}
	wantKind(t, format(used(), moved), holdfast.ErrRefused)
	forced := other
	forced.Force = true
	fs := used()
	if err := format(fs, forced); err != nil {
		t.Fatalf("forced: %v", err)
	}
	if d := mustOpen(t, fs, testPath); d.Stat().Cluster != other.Cluster || d.Stat().OpenCount != 1 {
		t.Fatalf("forced: %+v", d.Stat())
	}

	fs = vfs.NewMemory(1)
	f, err := fs.OpenFile(testPath, vfs.Create)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(40 << 20); err != nil {
		t.Fatal(err)
	}
	probed := smallFormat()
	probed.Probe = func(string) (string, error) { return "an ext4 file system", nil }
	if err := format(fs, probed); !errors.Is(err, holdfast.ErrRefused) || !strings.Contains(err.Error(), "ext4") {
		t.Fatalf("probed: got %v", err)
	}
	if _, err := f.WriteAt([]byte{1}, 40<<20-700); err != nil {
		t.Fatal(err)
	}
	wantKind(t, format(fs, smallFormat()), holdfast.ErrRefused)
	if err := f.Lock(); err != nil {
		t.Fatal(err)
	}
	forced = smallFormat()
	forced.Force = true
	wantKind(t, format(fs, forced), holdfast.ErrRefused) // somebody has it

	for what, o := range map[string]FormatOptions{
		"tiny WAL":  {Cluster: testCluster, Node: testNode, Size: 1 << 30, WALSize: 1 << 20},
		"tiny disk": {Cluster: testCluster, Node: testNode, Size: 1 << 20, WALSize: MinWALSize},
		"no size":   {Cluster: testCluster, Node: testNode},
		"no node":   {Cluster: testCluster, Size: 1 << 30},
	} {
		if err := format(vfs.NewMemory(1), o); !errors.Is(err, holdfast.ErrInvalid) {
			t.Errorf("%s: got %v", what, err)
		}
	}
}

// Append takes only what fits: R1, epochs, ranges, checksums.
func TestAppendRefuses(t *testing.T) {
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, smallFormat())
	d := mustOpen(t, fs, testPath)
	r := mustCreate(t, d, 1, 1<<20)
	if err := r.Fence(5); err != nil {
		t.Fatal(err)
	}
	mustAppend(t, r, writeEntry(4, 1, 0, 4096), writeEntry(5, 2, 0, 4096))
	good := writeEntry(5, 3, 0, 8192)
	var gap *GapError
	for what, change := range map[string]func(*Entry){
		"a gap": func(e *Entry) { e.Seq = 4 }, "again": func(e *Entry) { e.Seq = 2 },
	} {
		e := good
		change(&e)
		if err := r.Append([]Entry{e}); !errors.As(err, &gap) || gap.Tail != 2 {
			t.Errorf("%s: got %v", what, err)
		}
	}
	for what, change := range map[string]func(*Entry){
		"epoch above the fence": func(e *Entry) { e.Epoch = 6 },
		"epoch that falls":      func(e *Entry) { e.Epoch = 4 },
		"beyond the end":        func(e *Entry) { e.Offset = 1<<20 - 4096 },
		"negative":              func(e *Entry) { e.Offset = -4096 },
		"unaligned":             func(e *Entry) { e.Offset = 512 },
		"empty":                 func(e *Entry) { e.Length, e.CRC, e.Payload = 0, nil, nil },
		"too few crcs":          func(e *Entry) { e.CRC = e.CRC[:1] },
		"unknown type":          func(e *Entry) { e.Type = 9 },
		"trim with payload":     func(e *Entry) { e.Type = OpTrim },
		"overflow":              func(e *Entry) { e.Type, e.CRC, e.Payload, e.Offset, e.Length = OpTrim, nil, nil, 1<<62, 1<<62 },
	} {
		e := good
		change(&e)
		if err := r.Append([]Entry{e}); !errors.Is(err, holdfast.ErrInvalid) {
			t.Errorf("%s: got %v", what, err)
		}
	}
	bad := writeEntry(5, 3, 0, 8192)
	bad.Payload[5000] ^= 1
	wantKind(t, r.Append([]Entry{bad}), holdfast.ErrIntegrity)
	mustAppend(t, r, good)
	if st := r.Status(); st.Tail != 3 || len(st.EpochTails) != 2 || st.EpochTails[1] != (EpochStart{5, 2}) {
		t.Fatalf("status %+v", st)
	}
}
