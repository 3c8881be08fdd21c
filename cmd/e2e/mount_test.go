package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast/cmd/internal/lab"
)

// plugin speaks the volume driver protocol to a node, as Docker's engine does.
type plugin struct {
	t      *testing.T
	client http.Client
}

// mountingNode is a node with a keeper, kernel devices and a plugin socket.
func mountingNode(t *testing.T, name string, flags ...string) (*node, *plugin) {
	t.Helper()
	whole(t)
	need(t, "mkfs.ext4")
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	n := newNode(t, name)
	socket := filepath.Join(n.dir, "holdfast.sock")
	n.keeper = true
	n.flags = append(append(n.flags, "--plugin-socket", socket), flags...)
	p := &plugin{t: t}
	p.client.Transport = &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}
	t.Cleanup(p.client.CloseIdleConnections)
	return n, p
}

// call makes one call; it returns the mountpoint, if there is one, and the error text.
func (p *plugin) call(call string, args map[string]any) (mountpoint, failure string) {
	p.t.Helper()
	body, err := json.Marshal(args)
	if err != nil {
		p.t.Fatal(err)
	}
	resp, err := p.client.Post("http://plugin/VolumeDriver."+call, "application/json", bytes.NewReader(body))
	if err != nil {
		p.t.Fatalf("%s: %v", call, err)
	}
	defer resp.Body.Close()
	var answer struct{ Mountpoint, Err string }
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		p.t.Fatalf("%s: %v", call, err)
	}
	return answer.Mountpoint, answer.Err
}

func (p *plugin) must(call string, args map[string]any) string {
	p.t.Helper()
	mountpoint, failure := p.call(call, args)
	if failure != "" {
		p.t.Fatalf("%s %v: %s", call, args, failure)
	}
	return mountpoint
}

// wantIOError writes to a file whose device was taken away.
func wantIOError(t *testing.T, f *os.File) {
	t.Helper()
	_, err := f.WriteString("lost")
	err = errors.Join(err, f.Sync())
	if !errors.Is(err, syscall.EIO) && !errors.Is(err, syscall.EROFS) && !errors.Is(err, syscall.ESHUTDOWN) {
		t.Errorf("a write after the device was taken away: got %v, want an I/O error", err)
	}
}

func nothingStuck(t *testing.T) {
	t.Helper()
	stuck, err := lab.Stuck(t.Context())
	if err != nil || len(stuck) > 0 {
		t.Errorf("stuck processes: %v %v", stuck, err)
	}
}

// openFile is a file of a mounted volume in use, with a durable first line.
func openFile(t *testing.T, mountpoint string) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(mountpoint, "file"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.WriteString("durable\n"); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	return f
}

func wantDurable(t *testing.T, mountpoint string) {
	t.Helper()
	if got, err := os.ReadFile(filepath.Join(mountpoint, "file")); err != nil || !strings.HasPrefix(string(got), "durable\n") {
		t.Errorf("the file: got %q %v, want the synced line", got, err)
	}
}

// TestForcedDetachUnderAMount takes a mounted volume away from its user: refused
// without force; with it the user gets I/O errors, nothing hangs, and the volume can
// be mounted again with all that was synced.
func TestForcedDetachUnderAMount(t *testing.T) {
	n, p := mountingNode(t, "solo")
	n.flags = append(n.flags, "--disk", filepath.Join(n.dir, "disk.img")+",size=2G,wal=64M")
	n.start()
	n.ready()
	p.must("Create", map[string]any{"Name": "v", "Opts": map[string]string{"size": "1G", "replicas": "1"}})
	path := p.must("Mount", map[string]any{"Name": "v", "ID": "first"})
	f := openFile(t, path)

	if r := n.cli("volume", "detach", "v"); r.code != 5 || !strings.Contains(r.stderr, "mounted") {
		t.Errorf("detach under a mount: exit %d, want 5\n%s", r.code, r.stderr)
	}
	n.must("volume", "detach", "v", "--force")
	if v := n.inspect("v"); v.State != "detached" {
		t.Errorf("after the forced detach: %+v", v)
	}
	wantIOError(t, f)
	nothingStuck(t)
	f.Close()
	p.must("Unmount", map[string]any{"Name": "v", "ID": "first"}) // what Docker says when the container ends

	again := p.must("Mount", map[string]any{"Name": "v", "ID": "second"})
	if again != path {
		t.Errorf("mountpoint: got %s, want %s again", again, path)
	}
	wantDurable(t, again)
	p.must("Unmount", map[string]any{"Name": "v", "ID": "second"})
	p.must("Remove", map[string]any{"Name": "v"})
}

// TestTakenOverUnderAMount takes a mounted volume over at another node while its
// holder lives and its application has a file open: the application gets I/O errors,
// Unmount still works, and the volume can be mounted at the first node again.
func TestTakenOverUnderAMount(t *testing.T) {
	n, p := mountingNode(t, "n1", "--bootstrap")
	n.flags = append(n.flags, "--disk", filepath.Join(n.dir, "disk.img")+",size=2G,wal=64M")
	n.start()
	n.ready()
	other := newNode(t, "n2", "--join", n.address)
	other.flags = append(other.flags, "--disk", filepath.Join(other.dir, "disk.img")+",size=2G,wal=64M")
	other.start()
	other.ready()
	p.must("Create", map[string]any{"Name": "v", "Opts": map[string]string{"size": "1G", "replicas": "2"}})
	path := p.must("Mount", map[string]any{"Name": "v", "ID": "first"})
	f := openFile(t, path)

	if r := other.cli("volume", "attach", "v", "--nbd"); r.code != 5 {
		t.Errorf("attach of a volume that a live node holds: exit %d, want 5\n%s", r.code, r.stderr)
	}
	other.attach("v", "--force")
	eventually(t, 30*time.Second, "the old holder's device fails", func() bool {
		_, err := f.WriteString("x")
		return errors.Join(err, f.Sync()) != nil
	})
	wantIOError(t, f)
	nothingStuck(t)
	f.Close()
	p.must("Unmount", map[string]any{"Name": "v", "ID": "first"})
	if v := other.inspect("v"); v.Node != "n2" {
		t.Errorf("after the old holder's Unmount the volume is at %q, want n2", v.Node)
	}
	if _, failure := p.call("Mount", map[string]any{"Name": "v", "ID": "second"}); !strings.Contains(failure, "n2") {
		t.Errorf("mount of what n2 holds: got %q, want a refusal that names n2", failure)
	}

	other.must("volume", "detach", "v")
	wantDurable(t, p.must("Mount", map[string]any{"Name": "v", "ID": "third"}))
	p.must("Unmount", map[string]any{"Name": "v", "ID": "third"})
	p.must("Remove", map[string]any{"Name": "v"})
}
