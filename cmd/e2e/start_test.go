package e2e

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
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
