package main

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestRootServeUnderKeeper: a daemon that cannot start ends its keeper, with its own
// exit code; it is not started again and again.
func TestRootServeUnderKeeper(t *testing.T) {
	if os.Getenv("HOLDFAST_UNIT") != "" || os.Geteuid() != 0 {
		t.Skip("a keeper needs root: part of make test")
	}
	dir := t.TempDir()
	taken := filepath.Join(dir, "taken.sock")
	lock, err := os.Create(taken + ".lock")
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	readOnly := filepath.Join(dir, "ro")
	if err := errors.Join(os.Mkdir(readOnly, 0o700), unix.Mount("tmpfs", readOnly, "tmpfs", unix.MS_RDONLY, "")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(readOnly, 0); err != nil {
			t.Errorf("unmount %s: %v", readOnly, err)
		}
	})
	data := filepath.Join(dir, "d")
	for _, c := range []cliCase{
		{"--data-dir " + data + " --plugin-socket " + taken, 5, []string{"another process serves the plugin socket", "--plugin-socket", "!started again"}},
		{"--data-dir " + data + " --plugin-socket relative.sock", 2, []string{`"relative.sock"`, "absolute", "!started again"}},
		{"--data-dir " + data + " --plugin-socket /dev/null/x.sock", 2, []string{"/dev/null/x.sock", "--plugin-socket= for none", "!started again"}},
		{"--data-dir " + readOnly + " --plugin-socket=", 2, []string{"--data-dir " + readOnly, "read-only", "can be written"}},
		{"--data-dir /proc --plugin-socket=", 2, []string{"--data-dir /proc", "can be written"}},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		cmd := exec.CommandContext(ctx, "/proc/self/exe", append(words("serve --ballast 16M --disk none --docker-socket= --run-dir "+dir+"/r --address "+freeAddress(t)), words(c.line)...)...)
		cmd.Env = append(os.Environ(), asProgram+"=1")
		var errOut bytes.Buffer
		cmd.Stderr = &errOut
		_ = cmd.Run() // the exit code says it
		if ctx.Err() != nil {
			t.Errorf("%s: it still runs after a minute", c.line)
		}
		cancel()
		c.check(t, cmd.ProcessState.ExitCode(), errOut.String())
	}
	if left, err := filepath.Glob(filepath.Join(data, ".probe-*")); err != nil || len(left) > 0 {
		t.Errorf("left in the data directory: %s %v", strings.Join(left, " "), err)
	}
}

// freeAddress is an address whose port and the two after it were free a moment ago.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
