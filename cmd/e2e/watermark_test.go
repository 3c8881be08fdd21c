package e2e

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fullness is what disk ls tells of how full a disk is.
type fullness struct {
	Node        string
	FullPercent int  `json:"full_percent"`
	FullHost    bool `json:"full_host"`
	Watermark   int
}

// TestWatermarks fills the file system of a disk's image, then the disk itself: from
// 85 % on every node's status and disk ls, the metrics and, once, the log say so; at
// 97 % of the file system the image takes no more of it.
func TestWatermarks(t *testing.T) {
	t.Parallel()
	whole(t)
	need(t, "mount", "qemu-io")
	n := newNode(t, "n1", "--bootstrap")
	host := filepath.Join(n.dir, "host")
	tmpfsOf(t, n, host, "1000m")
	n.flags = append(n.flags, "--disk", filepath.Join(host, "disk.img")+",size=400M,wal=16M")
	n.start()
	n.ready()
	other := newNode(t, "n2", "--disk", "none", "--join", n.address)
	other.start()
	other.ready()
	n.must("volume", "create", "v", "--size", "390M", "--replicas", "1")
	uri := n.attach("v")
	blockIO(t, uri, "write -P 0x5a 0 8M", "flush")

	look := func(from *node) fullness {
		var ls struct{ Disks []fullness }
		from.decode(&ls, "disk", "ls")
		if len(ls.Disks) != 1 {
			t.Fatalf("disks: %+v", ls.Disks)
		}
		return ls.Disks[0]
	}
	warned := func(from *node) string {
		var s struct{ Warnings []string }
		from.decode(&s, "status")
		i := slices.IndexFunc(s.Warnings, func(w string) bool { return strings.Contains(w, "% full") })
		if i < 0 {
			return ""
		}
		return s.Warnings[i]
	}
	lines := func(what string) int {
		log, err := os.ReadFile(filepath.Join(n.dir, "log"))
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(string(log), what)
	}
	if f := look(n); f.Watermark != 0 || warned(n) != "" || lines("a disk fills up") != 0 {
		t.Fatalf("with room: %+v, %q", f, warned(n))
	}

	fill := func(percent int64) {
		t.Helper()
		var st unix.Statfs_t
		if err := unix.Statfs(host, &st); err != nil {
			t.Fatal(err)
		}
		growFiller(t, host, (int64(st.Blocks)*percent/100-int64(st.Blocks-st.Bfree))*st.Bsize)
	}
	fill(87)
	for _, from := range []*node{n, other} {
		if f := look(from); f.Watermark != 85 || !f.FullHost || f.FullPercent < 86 {
			t.Errorf("%s, with 87 %% of the host's file system in use: %+v", from.name, f)
		}
		if w := warned(from); !strings.Contains(w, "the file system of disk "+filepath.Join(host, "disk.img")+", node n1, is 8") {
			t.Errorf("%s warns %q", from.name, w)
		}
	}
	if out := n.must("disk", "ls"); !strings.Contains(out, "% (above 85)") {
		t.Errorf("disk ls:\n%s", out)
	}
	eventually(t, 20*time.Second, "the log says so", func() bool { return lines("a disk fills up") == 1 })
	if got := metric(t, n, "holdfast_disk_full_ratio{"); got < 0.86 || got > 0.9 {
		t.Errorf("holdfast_disk_full_ratio: %v", got)
	}
	blockIO(t, uri, "write -P 0x5b 8M 8M") // it is a warning

	fill(98)
	if f := look(other); f.Watermark != 97 {
		t.Errorf("with 98 %% of the host's file system in use: %+v", f)
	}
	if out, _ := qemuIO(t, uri, "write -P 0x5c 100M 250M"); !strings.Contains(out, "No space left") {
		t.Errorf("a write that needs new space: %s", out)
	}
	blockIO(t, uri, "read -P 0x5a 0 8M", "read -P 0x5b 8M 8M", "write -P 0x5d 0 4M") // what needs none goes on
	removeFiller(t, host)
	eventually(t, 20*time.Second, "the log says that there is room again", func() bool { return lines("a disk has room again") == 1 })
	if f := look(other); f.FullHost && f.Watermark != 0 {
		t.Errorf("with room again: %+v", f)
	}

	// The disk itself.
	eventually(t, time.Minute, "the disk fills up", func() bool {
		out, err := qemuIO(t, uri, "write -P 0x5e 16M 340M")
		return err == nil && !strings.Contains(out, "failed")
	})
	eventually(t, 30*time.Second, "the disk's own watermark is told", func() bool {
		f := look(other)
		return f.Watermark >= 85 && !f.FullHost && strings.HasPrefix(warned(other), "disk ") && lines("a disk fills up") >= 2
	})
	n.must("volume", "detach", "v")
}

// metric is the value of the first sample whose line begins so.
func metric(t *testing.T, n *node, prefix string) float64 {
	t.Helper()
	resp, err := http.Get("http://" + n.address + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(body)) {
		if !strings.HasPrefix(line, prefix) {
			continue
		}
		var v float64
		if _, err := fmt.Sscan(line[strings.LastIndexByte(strings.TrimSpace(line), ' ')+1:], &v); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		return v
	}
	t.Fatalf("no sample %q in\n%s", prefix, body)
	return 0
}
