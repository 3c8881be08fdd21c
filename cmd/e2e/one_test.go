package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestOneNodeServesAVolumeAndKeepsItOverARestart(t *testing.T) {
	whole(t)
	t.Parallel()
	need(t, "fio", "nbdinfo")
	n := newNode(t, "solo")
	n.flags = append(n.flags, "--disk", filepath.Join(n.dir, "disk.img")+",size=3G,wal=64M")
	n.start()
	n.ready()
	n.must("volume", "create", "t", "--size", "1G", "--replicas", "1")
	uri := n.attach("t")
	if again := n.attach("t"); again != uri {
		t.Errorf("attach twice: %q, then %q", uri, again)
	}
	fio(t, uri, "--rw=randwrite", "--bs=4k", "--iodepth=16", "--size=1G", "--io_size=64M", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--randseed=7")
	v := n.inspect("t")
	if v.State != "attached" || v.Node != "solo" || v.Epoch == 0 || !v.whole() || v.Used == 0 {
		t.Errorf("inspect: %+v", v)
	}

	for _, how := range []struct {
		name string
		end  func()
	}{{"SIGTERM", n.terminate}, {"kill -9", n.kill}} {
		how.end()
		n.start()
		n.ready()
		eventually(t, 30*time.Second, "the node holds the volume again after "+how.name, func() bool { return n.inspect("t").State == "attached" })
		if after := n.attach("t"); after != uri {
			t.Errorf("after %s the URI is %q, was %q", how.name, after, uri)
		}
		fio(t, uri, "--rw=randwrite", "--bs=4k", "--iodepth=16", "--size=1G", "--io_size=64M", "--verify=crc32c", "--verify_only", "--verify_fatal=1", "--randseed=7")
	}
	n.must("volume", "detach", "t")
	if v := n.inspect("t"); v.State != "detached" || v.Node != "" {
		t.Errorf("after detach: %+v", v)
	}
	n.must("volume", "rm", "t")
	if r := n.cli("volume", "inspect", "t"); r.code != 3 {
		t.Errorf("inspect of a removed volume: exit %d, want 3\n%s", r.code, r.stderr)
	}
}

func TestBadInput(t *testing.T) {
	whole(t)
	t.Parallel()
	n := newNode(t, "solo")
	n.flags = append(n.flags, "--disk", filepath.Join(n.dir, "disk.img")+",size=2G,wal=64M")
	n.start()
	n.ready()
	n.must("volume", "create", "taken", "--size", "64M", "--replicas", "1")
	for _, c := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"volume", "create", "x", "--size", "0"}, 2, "smallest volume"},
		{[]string{"volume", "create", "x", "--size", "1e30"}, 2, "1e30"},
		{[]string{"volume", "create", "x", "--size", "64M", "--replicas", "3"}, 5, "3 replicas"},
		{[]string{"volume", "create", "x", "--opt", "sise=1G"}, 2, "sise"},
		{[]string{"volume", "create", "x", "--opt", "mkfs=-Z 1"}, 2, "option mkfs: "},
		{[]string{"volume", "create", "x", "--opt", "mount_options=noload"}, 2, "option mount_options: "},
		{[]string{"volume", "create", "x", "--opt", "mount_options=ro"}, 2, "docker run -v VOLUME:/PATH:ro"},
		{[]string{"volume", "create", "x", "--opt", "ec=2+1"}, 2, "not in this version"},
		{[]string{"volume", "create", "x", "--no-such-flag"}, 2, "no-such-flag"},
		{[]string{"volume", "create", "taken", "--size", "64M"}, 4, "taken"},
		{[]string{"volume", "create", "taken", "--size", "128M"}, 4, "taken"},
		{[]string{"volume", "create", "../x"}, 2, "../x"},
		{[]string{"volume", "create"}, 2, "one volume name"},
		{[]string{"volume", "frobnicate"}, 2, "frobnicate"},
		{[]string{"frobnicate"}, 2, "frobnicate"},
		{[]string{"volume", "attach", "nowhere", "--nbd"}, 3, "nowhere"},
		{[]string{"volume", "detach", "nowhere"}, 3, "nowhere"},
		{[]string{"volume", "rm", "nowhere"}, 3, "nowhere"},
		{[]string{"volume", "explain", "nowhere"}, 3, "nowhere"},
		{[]string{"node", "inspect", "nowhere"}, 3, "nowhere"},
		{[]string{"status", "--api", "unix:///nonexistent/sock"}, 6, "holdfast serve"},
		{[]string{"status", "--api", "rubbish"}, 2, "rubbish"},
		{[]string{"status", "--api", "127.0.0.1:99999"}, 2, "99999"},
	} {
		r := n.cli(c.args...)
		if r.code != c.code || !strings.Contains(r.stderr, c.says) {
			t.Errorf("holdfast %s: exit %d, want %d, saying %q:\n%s", strings.Join(c.args, " "), r.code, c.code, c.says, r.stderr)
		}
	}
	if r := n.cli("volume", "inspect", "nowhere", "--json"); r.code != 3 || !strings.HasPrefix(r.stderr, `{"error":{"kind":"not_found","message":`) {
		t.Errorf("an error as JSON: exit %d %s", r.code, r.stderr)
	}
}

func TestServeRefusesWhatIsTaken(t *testing.T) {
	whole(t)
	t.Parallel()
	n := newNode(t, "first")
	n.flags = append(n.flags, "--disk", filepath.Join(n.dir, "disk.img")+",size=1G,wal=16M")
	n.start()
	n.ready()
	serve := func(args ...string) result {
		t.Helper()
		return runCLI(t, "", append([]string{"serve", "--plugin-socket", "", "--docker-socket", "", "--ballast", "16M", "--run-dir", filepath.Join(n.dir, "r2")}, args...)...)
	}
	other := filepath.Join(n.dir, "other")
	free := newNode(t, "free").address
	for _, c := range []struct {
		what string
		args []string
		code int
		says string
	}{
		{"a data directory in use", []string{"--data-dir", filepath.Join(n.dir, "d"), "--address", free}, 5, "in use"},
		{"a taken port", []string{"--data-dir", other, "--address", n.address}, 2, "--address"},
		{"an address nobody can dial", []string{"--data-dir", other, "--address", "0.0.0.0:9400"}, 2, "0.0.0.0"},
		{"in clear beyond loopback", []string{"--data-dir", other, "--address", "192.0.2.1:9400", "--bootstrap"}, 2, "--insecure"},
		{"neither bootstrap nor join", []string{"--data-dir", other, "--address", "192.0.2.1:9400", "--insecure"}, 2, "--join"},
		{"both", []string{"--data-dir", other, "--bootstrap", "--join", "127.0.0.1:1"}, 2, "both"},
		{"a long socket path", []string{"--data-dir", "/tmp/" + strings.Repeat("x", 120)}, 2, "bytes"},
		{"a small WAL", []string{"--data-dir", other, "--disk", other + ".img,wal=1M"}, 2, "16 MiB"},
		{"an unknown word", []string{"--data-dir", other, "--disk", other + ".img,walrus=1M"}, 2, "walrus"},
		{"a small ballast", []string{"--data-dir", other, "--ballast", "1K"}, 2, "--ballast"},
	} {
		if r := serve(c.args...); r.code != c.code || !strings.Contains(r.stderr, c.says) {
			t.Errorf("%s: exit %d, want %d, saying %q:\n%s", c.what, r.code, c.code, c.says, r.stderr)
		}
	}
}

func TestForeignDisksAreRefused(t *testing.T) {
	whole(t)
	t.Parallel()
	need(t, "mkfs.ext4")
	first := newNode(t, "first")
	image := filepath.Join(first.dir, "disk.img")
	first.flags = append(first.flags, "--disk", image+",size=128M,wal=16M")
	first.start()
	first.ready()
	first.terminate()

	second := newNode(t, "second")
	fs := filepath.Join(second.dir, "fs.img")
	f, err := os.Create(fs)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(128 << 20); err != nil {
		t.Fatal(err)
	}
	f.Close()
	mkfs(t, fs)
	before, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ what, disk, says string }{
		{"another cluster's superblock", image, "another cluster"},
		{"a disk with a file system", fs + ",wal=16M", "ext4"},
	} {
		r := runCLI(t, "", append(second.flags, "--disk", c.disk)...)
		if r.code != 5 || !strings.Contains(r.stderr, c.says) {
			t.Errorf("%s: exit %d, want 5, saying %q:\n%s", c.what, r.code, c.says, r.stderr)
		}
	}
	after, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	if string(before) != string(after) {
		t.Error("the refused disk was changed")
	}
}
