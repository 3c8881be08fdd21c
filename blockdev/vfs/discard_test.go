package vfs

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// TestRootDiscard: a block device discards what it is asked to, and no more; a file
// knows no such thing.
func TestRootDiscard(t *testing.T) {
	const size, part = 8 << 20, 1 << 20
	backing := t.TempDir() + "/backing"
	p := bytes.Repeat([]byte{7}, size)
	if err := os.WriteFile(backing, p, 0o600); err != nil {
		t.Fatal(err)
	}
	file := mustOpen(t, OS{}, backing, 0).(*osFile)
	if err := file.discard(0, part); !errors.Is(err, syscall.ENOTTY) {
		t.Errorf("discard of a file: got %v, want ENOTTY", err)
	}
	losetup, err := exec.LookPath("losetup")
	if os.Geteuid() != 0 || err != nil || os.Getenv("HOLDFAST_UNIT") == "1" {
		if os.Getenv("CI") == "true" && os.Getenv("HOLDFAST_UNIT") != "1" {
			t.Fatal("a block device needs root and losetup")
		}
		t.Skip("a block device needs root and losetup")
	}
	out, err := exec.Command(losetup, "--find", "--show", backing).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup: %v: %s", err, out)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command(losetup, "--detach", dev).CombinedOutput(); err != nil {
			t.Errorf("detach %s: %s", dev, out)
		}
	})
	f := mustOpen(t, OS{}, dev, 0).(*osFile)
	before := blocksOf(t, backing)
	if err := f.discard(2*part, part); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	if got, want := blocksOf(t, backing), before-part/512; got != want {
		t.Errorf("the file below takes %d sectors, want %d", got, want)
	}
	got := make([]byte, part)
	for at := int64(0); at < size; at += part {
		if _, err := f.ReadAt(got, at); err != nil {
			t.Fatal(err)
		}
		if same := bytes.Equal(got, p[:part]); same == (at == 2*part) {
			t.Errorf("at %d MiB: as before %v", at>>20, same)
		}
	}
}

// blocksOf is how many sectors a file takes.
func blocksOf(t *testing.T, path string) int64 {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks
}
