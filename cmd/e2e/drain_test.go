package e2e

import (
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestDrainListsAttachments drains a node that holds volumes, asking another one: the
// replicas move, what is attached stays, and the answer says who uses it and how it ends.
func TestDrainListsAttachments(t *testing.T) {
	need(t, "qemu-io")
	n, p := mountingNode(t, "n1", "--bootstrap")
	n.flags = append(n.flags, "--disk", filepath.Join(n.dir, "disk.img")+",size=2G,wal=64M")
	n.start()
	n.ready()
	for _, v := range []string{"free", "mounted"} {
		p.must("Create", map[string]any{"Name": v, "Opts": map[string]string{"size": "256M", "replicas": "1"}})
	}
	other := newNode(t, "n2", "--join", n.address)
	other.flags = append(other.flags, "--disk", filepath.Join(other.dir, "disk.img")+",size=2G,wal=64M")
	other.start()
	other.ready()
	n.attach("free")
	path := p.must("Mount", map[string]any{"Name": "mounted", "ID": "c1"})
	openFile(t, path).Close()

	out := other.must("node", "drain", "n1", "--wait", "2m")
	for _, want := range []string{"n1: draining, 0 replicas, 2 volumes attached", "holdfast volume detach free", "1 container(s)", "docker ps --filter volume=mounted"} {
		if !strings.Contains(out, want) {
			t.Errorf("drain does not say %q:\n%s", want, out)
		}
	}
	var told struct {
		Attached []struct {
			Volume, Remedy  string
			Told            bool
			Mounts, Clients int
		}
	}
	other.decode(&told, "node", "drain", "n1")
	if a := told.Attached; len(a) != 2 || a[0].Volume != "free" || !a[0].Told || a[0].Mounts != 0 || a[1].Volume != "mounted" || a[1].Mounts != 1 || a[1].Remedy == "" {
		t.Errorf("drain --json: %+v", a)
	}
	wantDurable(t, path)

	// What it says ends them.
	other.must("volume", "detach", "free")
	p.must("Unmount", map[string]any{"Name": "mounted", "ID": "c1"})
	eventually(t, 30*time.Second, "nothing is attached there", func() bool {
		other.decode(&told, "node", "inspect", "n1")
		return len(told.Attached) == 0
	})
	if out := other.must("node", "drain", "n1"); strings.Contains(out, "TO END IT") {
		t.Errorf("drain of a node that holds nothing:\n%s", out)
	}
}
