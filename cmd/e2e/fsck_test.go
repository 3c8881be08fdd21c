package e2e

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"testing"
)

// TestFsck checks a disk offline, as its daemon left it and as nobody should find it.
func TestFsck(t *testing.T) {
	whole(t)
	t.Parallel()
	need(t, "qemu-io")
	n := newNode(t, "solo")
	image := filepath.Join(n.dir, "disk.img")
	n.flags = append(n.flags, "--disk", image+",size=1G,wal=64M")
	n.start()
	n.ready()
	n.must("volume", "create", "v", "--size", "64M", "--replicas", "1")
	uri := n.attach("v")
	if out, err := qemuIO(t, uri, "write -P 0x5a 1M 1M"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	fsck := func(code int) (report struct {
		Found    int
		Replicas []struct {
			Blocks int64
			Bad    int64 `json:"bad_blocks"`
		}
		Findings []struct {
			Where          string
			Offset, Length int64
		}
	}) {
		t.Helper()
		r := n.cli("disk", "fsck", image, "--json")
		if r.code != code {
			t.Fatalf("fsck: exit %d, want %d\n%s%s", r.code, code, r.stdout, r.stderr)
		}
		if r.stdout != "" {
			if err := json.Unmarshal([]byte(r.stdout), &report); err != nil {
				t.Fatalf("%v:\n%s", err, r.stdout)
			}
		}
		return report
	}
	fsck(5) // the daemon has it
	n.must("volume", "detach", "v")
	n.terminate()
	if r := fsck(0); r.Found != 0 || len(r.Replicas) != 1 || r.Replicas[0].Blocks != 256 || r.Replicas[0].Bad != 0 {
		t.Errorf("a disk that was closed: %+v", r)
	}
	flipByte(t, image, bytes.Repeat([]byte{0x5a}, 4096))
	r := fsck(7)
	if r.Found != 1 || r.Replicas[0].Bad != 1 || r.Findings[0].Where != "data" || r.Findings[0].Length != 4096 || r.Findings[0].Offset < 1<<20 || r.Findings[0].Offset >= 2<<20 {
		t.Errorf("a disk with a flipped bit: %+v", r)
	}
	for path, code := range map[string]int{filepath.Join(n.dir, "none"): 3, filepath.Join(n.dir, "log"): 7} {
		if r := n.cli("disk", "fsck", path); r.code != code {
			t.Errorf("fsck %s: exit %d, want %d\n%s", path, r.code, code, r.stderr)
		}
	}
}

// flipByte changes one bit of the first page of a file that equals page.
func flipByte(t *testing.T, path string, page []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, len(page))
	for off := int64(0); ; off += int64(len(b)) {
		if _, err := io.ReadFull(io.NewSectionReader(f, off, int64(len(b))), b); err != nil {
			t.Fatalf("no such page in %s: %v", path, err)
		}
		if bytes.Equal(b, page) {
			if _, err := f.WriteAt([]byte{page[100] ^ 4}, off+100); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
}
