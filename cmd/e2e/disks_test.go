package e2e

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// diskInfo is what the tests read of disk ls and disk inspect.
type diskInfo struct {
	ID, Node, Path, State, Pool string
	Used, Allocated             int64
	Reclaimable                 int64
	Replicas                    int
	Leaving, Removed, Open      bool
	BadBlocks                   int64 `json:"bad_blocks"`
	LostBlocks                  int64 `json:"lost_blocks"`
	BlocksRepaired              int64 `json:"blocks_repaired"`
	Scrub                       struct {
		Running   bool
		Done      int64
		Scrubs    int
		BadBlocks int64 `json:"bad_blocks"`
	}
	OnIt []struct{ Volume, State string } `json:"on_it"`
}

// disks lists the disks of a node, of all with "".
func (n *node) disks(of string) []diskInfo {
	n.t.Helper()
	var ls struct{ Disks []diskInfo }
	args := []string{"disk", "ls"}
	if of != "" {
		args = append(args, "--node", of)
	}
	n.decode(&ls, args...)
	return ls.Disks
}

func (n *node) disk(id string) diskInfo {
	n.t.Helper()
	var d diskInfo
	n.decode(&d, "disk", "inspect", id)
	return d
}

// refuses runs a verb that has to fail with a code, saying something.
func (n *node) refuses(code int, says string, args ...string) {
	n.t.Helper()
	if r := n.cli(args...); r.code != code || !strings.Contains(r.stderr, says) {
		n.t.Errorf("holdfast %s: exit %d, want %d, saying %q:\n%s%s", strings.Join(args, " "), r.code, code, says, r.stdout, r.stderr)
	}
}

// blockIO has qemu-io do each command; a pattern that does not match fails.
func blockIO(t *testing.T, uri string, commands ...string) {
	t.Helper()
	for _, command := range commands {
		if out, err := qemuIO(t, uri, command); err != nil || strings.Contains(out, "failed") {
			t.Fatalf("%s: %v\n%s", command, err, out)
		}
	}
}

func sparse(t *testing.T, path string, size int64) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
}

// TestDiskAddAndRemove adds disks to a running node, has a volume in use moved from
// one to the other, and lets the first go, also over a restart with its old flag.
func TestDiskAddAndRemove(t *testing.T) {
	t.Parallel()
	whole(t)
	need(t, "qemu-io", "mkfs.ext4")
	n := newNode(t, "solo")
	first, second := filepath.Join(n.dir, "a.img"), filepath.Join(n.dir, "b.img")
	n.flags = append(n.flags, "--disk", first+",size=256M,wal=16M,pool=old")
	n.start()
	n.ready()
	n.must("volume", "create", "v", "--size", "64M", "--replicas", "1")
	uri := n.attach("v")
	blockIO(t, uri, "write -P 0x5a 1M 8M", "flush")
	var was diskInfo
	eventually(t, 30*time.Second, "what was written is applied", func() bool { was = n.disks("")[0]; return was.Used >= 8<<20 })
	if was.Pool != "old" || was.Path != first || was.Replicas != 1 || was.Allocated < was.Used {
		t.Errorf("disk ls: %+v", was)
	}

	// What somebody may still want, and what cannot be.
	n.refuses(5, "the last copy in sync of volume v", "disk", "rm", was.ID)
	n.refuses(3, "no disk", "disk", "rm", "ffff0000")
	n.refuses(3, "no disk", "disk", "inspect", "ff")
	n.refuses(4, "open", "disk", "add", first)
	n.refuses(2, "size=", "disk", "add", second)
	n.refuses(2, "16 MiB", "disk", "add", second+",size=256M,wal=1M")
	n.refuses(3, "no directory", "disk", "add", filepath.Join(n.dir, "none", "b.img")+",size=256M")
	n.refuses(5, "no disk is of pool fast", "volume", "create", "w", "--pool", "fast")
	sparse(t, second, 256<<20)
	mkfs(t, second)
	n.refuses(5, "a file system of type ext4", "disk", "add", second+",wal=16M")
	if os.Geteuid() == 0 {
		dir := t.TempDir()
		if out, err := exec.Command("mount", "-o", "loop", second, dir).CombinedOutput(); err == nil {
			n.refuses(5, "in use by the loop device", "disk", "add", second+",wal=16M", "--force")
			if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
				t.Fatalf("umount: %v: %s", err, out)
			}
		} else {
			t.Logf("mount: %v: %s", err, out)
		}
	}
	// The loop device goes a moment after its mount.
	eventually(t, 10*time.Second, "the image is added by force", func() bool {
		return n.cli("disk", "add", second+",wal=16M,pool=fast", "--force").code == 0
	})
	disks := n.disks("solo")
	if len(disks) != 2 {
		t.Fatalf("%d disks, want 2: %+v", len(disks), disks)
	}
	now := disks[0]
	if now.ID == was.ID {
		now = disks[1]
	}
	if now.Pool != "fast" || now.Path != second || now.Replicas != 0 {
		t.Errorf("the new disk: %+v", now)
	}
	n.must("volume", "create", "w", "--pool", "fast", "--size", "16M")
	if d := n.disk(now.ID); d.Replicas != 1 || len(d.OnIt) != 1 || d.OnIt[0].Volume != "w" {
		t.Errorf("a volume of pool fast is not there: %+v", d)
	}
	n.refuses(5, "in pool fast", "disk", "rm", now.ID)

	// The volume is in use meanwhile.
	n.must("disk", "rm", was.ID[:8], "--wait", "60s")
	if d := n.disk(was.ID); !d.Removed || d.Replicas != 0 {
		t.Errorf("removed: %+v", d)
	}
	blockIO(t, uri, "read -P 0x5a 1M 8M", "write -P 0x66 1M 1M")
	if v := n.inspect("v"); !v.whole() || v.State != "attached" {
		t.Errorf("after the move: %+v", v)
	}
	n.refuses(3, "was removed", "disk", "rm", was.ID)

	// The old flag does not bring it back, and the new disk needs none.
	n.must("volume", "detach", "v")
	n.terminate()
	if err := os.RemoveAll(first); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(first + ".wal"); err != nil {
		t.Fatal(err)
	}
	n.start()
	n.ready()
	if d := n.disks(""); len(d) != 1 || d[0].ID != now.ID || d[0].Pool != "fast" {
		t.Errorf("after a restart: %+v", d)
	}
	if _, err := os.Stat(first); err == nil {
		t.Error("the removed image is there again")
	}
	uri = n.attach("v")
	blockIO(t, uri, "read -P 0x66 1M 1M", "read -P 0x5a 2M 7M")
	n.must("disk", "add", first+",size=256M,wal=16M") // made anew
	if d := n.disks(""); len(d) != 2 {
		t.Errorf("added again: %+v", d)
	}
	n.must("volume", "detach", "v")
}

// TestScrub rots a block below one replica of three: a scrub finds it, another
// replica mends it, and the next scrub finds nothing.
func TestScrub(t *testing.T) {
	t.Parallel()
	whole(t)
	need(t, "qemu-io")
	c := start(t, 3)
	a, b := c.nodes[0], c.nodes[1]
	a.must("volume", "create", "v", "--size", "64M", "--replicas", "3")
	uri := a.attach("v")
	blockIO(t, uri, "write -P 0x5a 1M 4M", "flush")
	a.must("volume", "detach", "v") // all is committed, and applied when its node ends
	b.terminate()
	image := filepath.Join(b.dir, "disk.img")
	flipByte(t, image, bytes.Repeat([]byte{0x5a}, 4096))
	b.start()
	b.ready()
	id := a.disks(b.name)[0].ID
	scrub := func(code int) (d diskInfo) {
		t.Helper()
		r := a.cli("disk", "scrub", id, "--rate", "1G", "--wait", "60s", "--json")
		if r.code != code {
			t.Fatalf("scrub: exit %d, want %d\n%s%s", r.code, code, r.stdout, r.stderr)
		}
		if err := json.Unmarshal([]byte(r.stdout), &d); err != nil {
			t.Fatalf("%v:\n%s", err, r.stdout)
		}
		return d
	}
	if d := scrub(7); d.Scrub.BadBlocks != 1 || d.BadBlocks != 1 || d.Scrub.Done < 4<<20 {
		t.Errorf("a rotten block: %+v", d)
	}
	uri = a.attach("v")
	eventually(t, time.Minute, "the block is mended", func() bool {
		d := a.disk(id)
		return d.BadBlocks == 0 && d.BlocksRepaired == 1
	})
	if d := scrub(0); d.Scrub.BadBlocks != 0 || d.LostBlocks != 0 || d.Scrub.Scrubs != 2 {
		t.Errorf("mended: %+v", d)
	}
	blockIO(t, uri, "read -P 0x5a 1M 4M")
	a.refuses(2, "1M", "disk", "scrub", id, "--rate", "1K")
	a.must("volume", "detach", "v")
}
