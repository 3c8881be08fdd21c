package mount

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
)

// mounted makes an ext4 on a loop device and mounts it.
func mounted(t *testing.T) (device, target string) {
	t.Helper()
	device = loop(t, 64<<20)
	if err := (Tools{}).Format(ctxFor(t), device, FormatOptions{FS: Ext4}); err != nil {
		t.Fatal(err)
	}
	target = filepath.Join(t.TempDir(), "vol")
	if err := PrepareTarget(target); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(Unmount(context.Background(), target, true), RemoveTarget(target)); err != nil {
			t.Error(err)
		}
	})
	if err := Mount(device, target, Ext4, Options{}); err != nil {
		t.Fatal(err)
	}
	return device, target
}

func TestRootUnmountBusy(t *testing.T) {
	needRoot(t, "losetup", "mkfs.ext4")
	_, target := mounted(t)
	f, err := os.Create(filepath.Join(DataPath(target), "open"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	now, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Unmount(now, target, false); !errors.Is(err, holdfast.ErrRefused) || holdfast.RemedyOf(err) == "" {
		t.Errorf("unmount in use: got %v, want it refused with a remedy", err)
	}
	if _, there, _ := At(target); !there {
		t.Fatal("it was unmounted all the same")
	}
	if err := Unmount(now, target, true); err != nil {
		t.Errorf("forced: %v", err)
	}
	if _, there, _ := At(target); there {
		t.Error("forced: it is still mounted")
	}
	if _, err := f.WriteString("x"); err != nil {
		t.Errorf("its user lost it: %v", err)
	}
	if err := os.WriteFile(filepath.Join(target, "x"), nil, 0o600); err == nil {
		t.Error("the bare mountpoint was written to")
	}
}

func TestRootMountRefusals(t *testing.T) {
	needRoot(t, "losetup", "mkfs.ext4")
	device, target := mounted(t)
	if err := Mount(device, target, Ext4, Options{}); err != nil {
		t.Errorf("mounted already: got %v, want success", err)
	}
	other := loop(t, 64<<20)
	if err := Mount(other, target, Ext4, Options{}); !errors.Is(err, holdfast.ErrRefused) {
		t.Errorf("another device on the same target: got %v, want it refused", err)
	}
	empty := filepath.Join(t.TempDir(), "empty")
	if err := PrepareTarget(empty); err != nil {
		t.Fatal(err)
	}
	defer RemoveTarget(empty)
	if err := Mount(other, empty, Ext4, Options{}); err == nil {
		t.Error("a device without a file system was mounted")
	}
	if err := Mount(filepath.Join(t.TempDir(), "none"), empty, Ext4, Options{}); !errors.Is(err, holdfast.ErrNotFound) {
		t.Errorf("no device: got %v, want not found", err)
	}
	if err := Mount(image(t, 4096), empty, Ext4, Options{}); !errors.Is(err, holdfast.ErrInvalid) {
		t.Errorf("a file: got %v, want it refused", err)
	}
	if err := Unmount(t.Context(), empty, false); err != nil {
		t.Errorf("unmount of nothing: %v", err)
	}
}

// TestRootDataDirectoryIsAFile: what users see is never something else than a
// directory of the volume.
func TestRootDataDirectoryIsAFile(t *testing.T) {
	needRoot(t, "losetup", "mkfs.ext4")
	device, target := mounted(t)
	if err := os.Remove(DataPath(target)); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/", DataPath(target)); err != nil {
		t.Fatal(err)
	}
	if err := Mount(device, target, Ext4, Options{}); !errors.Is(err, holdfast.ErrIntegrity) {
		t.Errorf("a link in its place: got %v, want it refused", err)
	}
}

// TestRootGuards makes bare mountpoints unwritable, with the flag and, on a
// file system that has no flags, with a guard mount.
func TestRootGuards(t *testing.T) {
	needRoot(t)
	ramfs := t.TempDir()
	if err := unix.Mount("none", ramfs, "ramfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(ramfs, unix.MNT_DETACH)
	for name, dir := range map[string]string{"with flags": t.TempDir(), "without flags": ramfs} {
		target := filepath.Join(dir, "a", "vol")
		for range 2 {
			if err := PrepareTarget(target); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
		e, guarded, err := At(target)
		if want := name == "without flags"; guarded != want || err != nil {
			t.Errorf("%s: guard mount %v (%+v), %v, want %v", name, guarded, e, err, want)
		}
		for what, err := range map[string]error{
			"a file":      os.WriteFile(filepath.Join(target, "x"), nil, 0o600),
			"a directory": os.Mkdir(filepath.Join(target, "data"), 0o700),
		} {
			if err == nil {
				t.Errorf("%s: %s was made in the bare mountpoint", name, what)
			}
		}
		if err := Unmount(t.Context(), target, true); err != nil {
			t.Errorf("%s: unmount of the bare mountpoint: %v", name, err)
		}
		if _, still, _ := At(target); still != guarded {
			t.Errorf("%s: unmount took the guard away", name)
		}
		for range 2 {
			if err := RemoveTarget(target); err != nil {
				t.Errorf("%s: remove: %v", name, err)
			}
		}
		if _, err := os.Lstat(target); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: after remove: got %v, want it gone", name, err)
		}
	}
}

func TestPrepareTargetRefusesFiles(t *testing.T) {
	target := t.TempDir()
	if err := os.WriteFile(filepath.Join(target, "precious"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	err := PrepareTarget(target)
	if !errors.Is(err, holdfast.ErrRefused) || !strings.Contains(err.Error(), "precious") {
		t.Errorf("got %v, want it refused, naming a file", err)
	}
}

func TestCovering(t *testing.T) {
	e, err := Covering("/proc/self/fd")
	if err != nil || e.FS != "proc" {
		t.Errorf("/proc/self/fd: got %+v, %v, want proc", e, err)
	}
	if e, err := Covering("/no/such/path"); err != nil || e.Target != "/" {
		t.Errorf("/no/such/path: got %+v, %v, want the root", e, err)
	}
}
