package mount

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast"
)

// needRoot skips a test that needs root and the named programs, unless CI says
// that nothing may be skipped.
func needRoot(t testing.TB, programs ...string) {
	t.Helper()
	if os.Getenv("HOLDFAST_UNIT") == "1" {
		t.Skip("HOLDFAST_UNIT=1: tests that need root are left out")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	for _, p := range programs {
		if _, err := lookPath(p); err == nil {
			continue
		}
		if os.Getenv("CI") == "true" {
			t.Fatalf("needs %s", p)
		}
		t.Skipf("needs %s", p)
	}
}

func ctxFor(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// loop makes a loop device on a sparse file.
func loop(t *testing.T, size int64) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, size); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "-f", "--show", image).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup: %v: %s", err, out)
	}
	device := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "-d", device).CombinedOutput(); err != nil {
			t.Errorf("losetup -d: %v: %s", err, out)
		}
	})
	return device
}

func TestRootFormatMountCheck(t *testing.T) {
	needRoot(t, "losetup", "blkid", "wipefs", "mkfs.ext4", "mkfs.xfs", "e2fsck", "xfs_repair")
	for _, fs := range []FileSystem{Ext4, XFS} {
		t.Run(string(fs), func(t *testing.T) {
			ctx := ctxFor(t)
			device := loop(t, 512<<20)
			var tools Tools
			if what, err := tools.Blank(ctx, device); what != "" || err != nil {
				t.Fatalf("blank of an empty device: got %q, %v, want nothing", what, err)
			}
			if err := tools.Format(ctx, device, FormatOptions{FS: fs}); err != nil {
				t.Fatal(err)
			}
			if err := tools.Format(ctx, device, FormatOptions{FS: fs}); !errors.Is(err, holdfast.ErrRefused) {
				t.Fatalf("second mkfs: got %v, want it refused", err)
			}
			what, err := tools.Signature(ctx, device)
			if err != nil || !strings.Contains(what, string(fs)) {
				t.Fatalf("signature: got %q, %v, want %s in it", what, err, fs)
			}
			if err := tools.Format(ctx, device, FormatOptions{FS: fs, Again: true}); err != nil {
				t.Fatalf("mkfs again: %v", err)
			}
			target := filepath.Join(t.TempDir(), "vol")
			if err := PrepareTarget(target); err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := RemoveTarget(target); err != nil {
					t.Error(err)
				}
			}()
			if err := os.WriteFile(filepath.Join(target, "x"), nil, 0o600); err == nil {
				t.Fatal("a file was written into the bare mountpoint")
			}
			if err := tools.Fsck(ctx, device, fs); err != nil {
				t.Fatal(err)
			}
			opts, err := ParseOptions(fs, "noatime")
			if err != nil {
				t.Fatal(err)
			}
			for range 2 { // the second finds it mounted
				if err := Mount(device, target, fs, opts); err != nil {
					t.Fatal(err)
				}
			}
			names, err := os.ReadDir(DataPath(target))
			if err != nil || len(names) != 0 {
				t.Fatalf("data directory: got %v, %v, want it empty", names, err)
			}
			if err := os.WriteFile(filepath.Join(DataPath(target), "x"), []byte("y"), 0o600); err != nil {
				t.Fatal(err)
			}
			e, ok, err := At(target)
			if !ok || err != nil || e.FS != string(fs) || e.ReadOnly() || !hasWord(e.Options, "noatime") {
				t.Fatalf("table: got %+v, %v, %v, want a writable %s with noatime", e, ok, err, fs)
			}
			if err := RemoveTarget(target); !errors.Is(err, holdfast.ErrRefused) {
				t.Fatalf("remove a mounted target: got %v, want it refused", err)
			}
			if err := SyncFS(target); err != nil {
				t.Fatal(err)
			}
			for range 2 { // the second finds nothing to do
				if err := Unmount(ctx, target, false); err != nil {
					t.Fatal(err)
				}
			}
			if err := tools.Check(ctx, device, fs); err != nil {
				t.Fatal(err)
			}
		})
	}
}
