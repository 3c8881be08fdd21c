package e2e

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// serveOnce runs a daemon that must end by itself, with its flags and the environment
// that is given in addition.
func (n *node) serveOnce(env []string, flags ...string) result {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	var out, errOut strings.Builder
	cmd := exec.CommandContext(ctx, program, append(n.flags, flags...)...)
	cmd.Env = append(append(os.Environ(), "HOLDFAST_KEEPER=off"), env...)
	cmd.Stdout, cmd.Stderr = &out, &errOut
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	if ctx.Err() != nil {
		n.t.Errorf("holdfast serve %v did not end by itself:\n%s", flags, errOut.String())
	}
	if cmd.ProcessState == nil {
		n.t.Fatal(err)
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), errOut.String()}
}

// A start that fails after the node began to serve ends, and says why.
func TestAStartThatFailsLateEnds(t *testing.T) {
	whole(t)
	t.Parallel()
	n := newNode(t, "solo")
	n.flags = append(n.flags, "--disk", filepath.Join(n.dir, "disk.img")+",size=1G,wal=16M")
	n.start()
	n.ready()
	n.terminate()
	record := filepath.Join(n.dir, "d", "attachments.json")
	for _, content := range []string{"{", "null"} {
		if err := os.WriteFile(record, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		r := n.serveOnce(nil)
		if r.code != 7 || !strings.Contains(r.stderr, record) || !strings.Contains(r.stderr, "move the file away") {
			t.Errorf("attachments.json holds %q: exit %d, want 7, saying which file and what to do:\n%s", content, r.code, r.stderr)
		}
	}
	if err := os.Remove(record); err != nil {
		t.Fatal(err)
	}
	n.start()
	n.ready()
}

// A keeper starts no daemon again and again that cannot read what was here.
func TestAStartThatFailsLateEndsItsKeeper(t *testing.T) {
	n, _ := mountingNode(t, "solo")
	n.flags = append(n.flags, "--disk", filepath.Join(n.dir, "disk.img")+",size=1G,wal=16M")
	n.start()
	n.ready()
	n.kill()
	for name, remedy := range map[string]string{"attachments.json": "move the file away", "mounts.json": "remove the file once"} {
		path := filepath.Join(n.dir, "d", name)
		if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
		r := n.serveOnce([]string{"HOLDFAST_KEEPER="})
		if r.code != 7 || !strings.Contains(r.stderr, path) || !strings.Contains(r.stderr, remedy) {
			t.Errorf("%s is broken: exit %d, want 7, saying which file and what to do:\n%s", name, r.code, r.stderr)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}

// What --disk says is taken as it is, or refused: no directory is made where a file
// system may be missing, and no size is ignored.
func TestDisksOfFlagsAreRefused(t *testing.T) {
	whole(t)
	t.Parallel()
	n := newNode(t, "solo")
	blank := filepath.Join(n.dir, "blank.img")
	if err := os.WriteFile(blank, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(blank, 200<<20); err != nil {
		t.Fatal(err)
	}
	missing := filepath.Join(n.dir, "mnt")
	for _, c := range []struct {
		disk string
		code int
		says []string
	}{
		{missing + "/z.img,size=1G", 3, []string{missing, "mount what belongs there"}},
		{filepath.Join(n.dir, "z.img"), 2, []string{"z.img is not there", "z.img,size=100G"}},
		{blank + ",size=300M", 5, []string{"200 MiB", "300 MiB", "leave size= out"}},
		{blank + ",size=100M", 5, []string{"200 MiB", "100 MiB", "leave size= out"}},
		{blank + ",size=200M,size=300M", 2, []string{"size twice", "give it once"}},
	} {
		r := n.serveOnce(nil, "--disk", c.disk)
		if r.code != c.code {
			t.Errorf("--disk %s: exit %d, want %d:\n%s", c.disk, r.code, c.code, r.stderr)
		}
		for _, text := range c.says {
			if !strings.Contains(r.stderr, text) {
				t.Errorf("--disk %s does not say %q:\n%s", c.disk, text, r.stderr)
			}
		}
	}
	if _, err := os.Stat(missing); !os.IsNotExist(err) {
		t.Errorf("%s was made: %v", missing, err)
	}

	// A known disk is opened all the same, and status says so.
	below := filepath.Join(n.dir, "d", "more", "0.img")
	flags := n.flags
	n.flags = append(slices.Clone(flags), "--disk", below+",size=200M,wal=16M")
	n.start()
	n.ready()
	n.terminate()
	n.flags = append(slices.Clone(flags), "--disk", below+",size=1G,wal=16M")
	n.start()
	n.ready()
	if out := n.must("status"); !strings.Contains(out, "200 MiB") || !strings.Contains(out, "1 GiB") {
		t.Errorf("status does not say that the size was not taken:\n%s", out)
	}
}

// A node that cannot join says where, for how long and why not: in status and its log.
func TestANodeThatCannotJoinSaysWhy(t *testing.T) {
	whole(t)
	t.Parallel()
	n := newNode(t, "lost", "--disk", "none", "--join", "127.0.0.1:1")
	n.start()
	eventually(t, 30*time.Second, "status names what is waited for", func() bool {
		r := n.cli("status")
		return r.code == 6 && strings.Contains(r.stderr, "this node is starting: for ") && strings.Contains(r.stderr, "trying to join the cluster at 127.0.0.1:1; last error: ask 127.0.0.1:1: ") &&
			strings.Contains(r.stderr, "connection refused")
	})
	eventually(t, 30*time.Second, "the log names it", func() bool {
		raw, err := os.ReadFile(filepath.Join(n.dir, "log"))
		return err == nil && strings.Contains(string(raw), `"question":"join 127.0.0.1:1"`) && strings.Contains(string(raw), "connection refused")
	})
	n.terminate()
}

func TestAKeeperThatIsNone(t *testing.T) {
	whole(t)
	t.Parallel()
	n := newNode(t, "solo", "--disk", "none")
	if r := n.serveOnce([]string{"HOLDFAST_KEEPER=maybe"}); r.code != 2 || !strings.Contains(r.stderr, `HOLDFAST_KEEPER=\"maybe\"`) && !strings.Contains(r.stderr, `HOLDFAST_KEEPER="maybe"`) {
		t.Errorf("HOLDFAST_KEEPER=maybe: exit %d, want 2:\n%s", r.code, r.stderr)
	}
	socket := filepath.Join(n.dir, "plugins", "holdfast.sock")
	n.flags = append(n.flags, "--plugin-socket", socket)
	n.start()
	eventually(t, 30*time.Second, "the node answers", func() bool { return strings.Contains(n.cli("status").stdout, "off:") })
	out := n.cli("status").stdout
	if !strings.Contains(out, "no Docker volume plugin at "+socket) {
		t.Errorf("status does not say that the plugin is off:\n%s", out)
	}
	n.terminate()
}
