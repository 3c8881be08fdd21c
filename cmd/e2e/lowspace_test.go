package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestLowSpaceIsTheAnswer: the only voter of two nodes has no space for the metadata.
// What would change it is refused with the reason, at once and from either node;
// clients of an attached volume go on; with room everything does.
func TestLowSpaceIsTheAnswer(t *testing.T) {
	t.Parallel()
	whole(t)
	need(t, "mount", "qemu-io")
	n := newNode(t, "n1", "--bootstrap")
	data := filepath.Join(n.dir, "d")
	tmpfsOf(t, n, data, "300m")
	image := filepath.Join(n.dir, "disk.img") // on another file system than the metadata
	n.flags = append(n.flags, "--disk", image+",size=256M,wal=16M")
	n.start()
	n.ready()
	other := newNode(t, "n2", "--disk", "none", "--join", n.address)
	other.start()
	other.ready()
	n.must("volume", "create", "v", "--size", "64M")
	n.must("volume", "create", "w", "--size", "16M")
	uri := n.attach("v")
	blockIO(t, uri, "write -P 0x5a 0 4M")

	var st unix.Statfs_t
	if err := unix.Statfs(data, &st); err != nil {
		t.Fatal(err)
	}
	growFiller(t, data, int64(st.Bavail)*st.Bsize-(6<<20)) // the ballast is of 16 MiB
	const why = "node n1 takes no changes of the metadata: the file system of "
	eventually(t, 20*time.Second, "a change is refused for want of space", func() bool {
		r := n.cli("volume", "update", "v", "--min-copies", "1") // of which any number is the same
		return r.code == 5 && strings.Contains(r.stderr, why)
	})
	for _, from := range []*node{n, other} {
		for _, verb := range [][]string{
			{"volume", "create", "y", "--size", "16M"},
			{"volume", "rm", "w"},
			{"volume", "attach", "w", "--nbd"},
			{"volume", "detach", "v"},
			{"volume", "update", "v", "--min-copies", "1"},
			{"node", "maintenance", "n1", "on"},
			{"disk", "add", filepath.Join(from.dir, "more.img") + ",size=64M,wal=16M"},
		} {
			if from == other && verb[0] == "disk" {
				continue // it was started to have none
			}
			from.refuses(5, why, verb...)
		}
		from.refuses(6, "", "status") // not ready, and it says why on its stdout
		if out := from.cli("status").stdout; !strings.Contains(out, "not ready: "+why) || !strings.Contains(out, "make room there") {
			t.Errorf("status at %s:\n%s", from.name, out)
		}
	}
	if _, err := os.Stat(filepath.Join(n.dir, "more.img")); err == nil {
		t.Error("a refused disk was made all the same")
	}
	var e struct {
		Error struct{ Kind, Message, Remedy string }
	}
	if r := n.cli("volume", "rm", "w", "--json"); r.code == 5 {
		decodeJSON(t, r.stderr, &e)
	}
	if e.Error.Kind != "no_space" || e.Error.Remedy != "make room there" {
		t.Errorf("as JSON: %+v", e)
	}
	blockIO(t, uri, "read -P 0x5a 0 4M", "write -P 0x5b 8M 4M", "read -P 0x5b 8M 4M")

	removeFiller(t, data)
	eventually(t, 30*time.Second, "changes go on", func() bool { return n.cli("volume", "update", "v", "--min-copies", "1").code == 0 })
	other.must("volume", "rm", "w")
	for _, v := range []string{"y", "w"} {
		n.refuses(3, "no volume", "volume", "inspect", v) // y was refused, and not done later
	}
	n.must("volume", "detach", "v")
}

func decodeJSON(t *testing.T, text string, to any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), to); err != nil {
		t.Fatalf("%v:\n%s", err, text)
	}
}
