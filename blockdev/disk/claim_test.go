package disk

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// TestFormatInUse: no force overrides that somebody uses the target now.
func TestFormatInUse(t *testing.T) {
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, smallFormat())
	for _, force := range []bool{false, true} {
		o := smallFormat()
		o.Force = force
		o.InUse = func(path string) (string, error) { return "it is mounted at /srv", nil }
		err := Format(t.Context(), fs, testPath, o)
		if !errors.Is(err, holdfast.ErrRefused) || !strings.Contains(err.Error(), testPath+" is in use: it is mounted at /srv") {
			t.Errorf("mounted, force %v: got %v", force, err)
		}
		o.InUse = func(string) (string, error) { return "", errors.New("no mount table") }
		wantKind(t, Format(t.Context(), fs, testPath, o), holdfast.ErrRefused)
	}
	mustOpen(t, fs, testPath) // it is as it was
}

// limited is a file system that holds no file larger than most.
type limited struct {
	vfs.FS
	most int64
}

type limitedFile struct {
	vfs.File
	most int64
}

func (l limited) OpenFile(path string, flags vfs.Flag) (vfs.File, error) {
	f, err := l.FS.OpenFile(path, flags)
	if err != nil {
		return nil, err
	}
	return limitedFile{f, l.most}, nil
}

func (f limitedFile) Truncate(size int64) error {
	if size > f.most {
		return syscall.EFBIG
	}
	return f.File.Truncate(size)
}

// TestFormatTooLarge: an image larger than its file system can hold is refused, with
// both sizes, and what was there stays.
func TestFormatTooLarge(t *testing.T) {
	const most = 1<<30 - 1
	fs := limited{vfs.NewMemory(1), most}
	o := smallFormat()
	o.Size = 2 << 30
	err := Format(t.Context(), fs, testPath, o)
	if !errors.Is(err, holdfast.ErrRefused) || !strings.Contains(err.Error(), strconv.Itoa(2<<30)) || !strings.Contains(err.Error(), strconv.Itoa(most)) {
		t.Errorf("2 GiB where files have 1: got %v", err)
	}
	if _, err := fs.Stat(testPath); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the refused image is there: %v", err)
	}
	f, err := fs.OpenFile(testPath, vfs.Create)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(64 << 20); err != nil {
		t.Fatal(err)
	}
	wantKind(t, Format(t.Context(), fs, testPath, o), holdfast.ErrRefused)
	if size, err := f.Size(); size != 64<<20 || err != nil {
		t.Errorf("a file of 64 MiB has %d bytes after it was refused, %v", size, err)
	}
	o.Size = most
	mustFormat(t, fs, testPath, o)
}

// TestFormatTooLargeForReal asks the file system of this machine, where it is one
// with a limit that can be reached.
func TestFormatTooLargeForReal(t *testing.T) {
	dir := t.TempDir()
	var sfs unix.Statfs_t
	if err := unix.Statfs(dir, &sfs); err != nil {
		t.Fatal(err)
	}
	if sfs.Type != unix.EXT4_SUPER_MAGIC || sfs.Bsize != 4096 {
		t.Skip("the temporary directory is no ext4 with blocks of 4 KiB")
	}
	o := smallFormat()
	o.Size = 17 << 40
	err := Format(t.Context(), vfs.OS{}, filepath.Join(dir, "image"), o)
	if !errors.Is(err, holdfast.ErrRefused) || !strings.Contains(err.Error(), "is to have 17 TiB") || !strings.Contains(err.Error(), strconv.Itoa(16<<40-4096)) {
		t.Errorf("17 TiB on ext4: got %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "image")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the refused image is there: %v", err)
	}
}

// mounted makes a file system of a kind on a loop device.
func mounted(t *testing.T, size int64, mkfs ...string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: loop devices")
	}
	if _, err := exec.LookPath(mkfs[0]); err != nil {
		t.Skipf("%s is not installed", mkfs[0])
	}
	image, dir := filepath.Join(t.TempDir(), "fs"), t.TempDir()
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, size); err != nil {
		t.Fatal(err)
	}
	for _, c := range [][]string{append(mkfs, image), {"mount", "-o", "loop", image, dir}} {
		if out, err := exec.Command(c[0], c[1:]...).CombinedOutput(); err != nil {
			t.Skipf("%v: %v: %s", c, err, out)
		}
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
	return dir
}

// TestFormatOnBtrfs: an image and its log are written in place there; a file that
// cannot be changed to be so is refused.
func TestFormatOnBtrfs(t *testing.T) {
	dir := mounted(t, 512<<20, "mkfs.btrfs", "-q")
	path := filepath.Join(dir, "image")
	mustFormat(t, vfs.OS{}, path, smallFormat())
	out, err := exec.Command("lsattr", path, walName(path, 0)).CombinedOutput()
	if err != nil {
		t.Fatalf("lsattr: %v: %s", err, out)
	}
	for line := range strings.Lines(string(out)) {
		if flags, _, _ := strings.Cut(line, " "); !strings.Contains(flags, "C") {
			t.Errorf("not written in place: %s", line)
		}
	}
	old := filepath.Join(dir, "old")
	if err := os.WriteFile(old, make([]byte, 40<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Format(t.Context(), vfs.OS{}, old, smallFormat()); !errors.Is(err, holdfast.ErrRefused) || !strings.Contains(err.Error(), "btrfs") {
		t.Errorf("a file that was there: got %v", err)
	}
}

// TestErase: nothing opens an erased disk, and what is another disk by now is left
// alone.
func TestErase(t *testing.T) {
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, smallFormat())
	wantKind(t, Erase(fs, testPath, holdfast.DiskID{9}), holdfast.ErrRefused)
	d := mustOpen(t, fs, testPath)
	wantKind(t, Erase(fs, testPath, testDisk), holdfast.ErrRefused) // it is open
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if err := Erase(fs, testPath, testDisk); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), fs, testPath, Options{}); !errors.Is(err, holdfast.ErrIntegrity) {
		t.Errorf("open an erased disk: got %v", err)
	}
	wantKind(t, Format(t.Context(), fs, testPath, smallFormat()), holdfast.ErrRefused) // its log is there
	o := smallFormat()
	o.Force, o.Disk = true, holdfast.DiskID{7}
	mustFormat(t, fs, testPath, o)
	if d := mustOpen(t, fs, testPath); d.Stat().Disk != o.Disk {
		t.Errorf("formatted again: disk %v", d.Stat().Disk)
	}
	if err := Erase(fs, "/disks/none", testDisk); err != nil {
		t.Errorf("an image that was removed: %v", err)
	}
}
