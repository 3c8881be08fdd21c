package keeper

import (
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast/blockdev/hostdev"
	"github.com/holdfast-storage/holdfast/blockdev/mount"
)

func notifyTerm(ch chan os.Signal) { signal.Notify(ch, unix.SIGTERM) }

func connectionExists(t *testing.T, id uint64) bool {
	t.Helper()
	ids, err := hostdev.Connections()
	if err != nil {
		t.Fatal(err)
	}
	return slices.Contains(ids, id)
}

func TestRootLifeOfAVolume(t *testing.T) {
	needRoot(t, "mkfs.ext4", "mkfs.xfs", "nsenter")
	for _, fs := range []mount.FileSystem{mount.Ext4, mount.XFS} {
		t.Run(string(fs), func(t *testing.T) {
			n := startNode(t, "")
			a := volume("data", fs, 512<<20)
			path := n.up(a)
			if want := MountPath(n.dir, "data"); path != want {
				t.Fatalf("mount path: got %s, want %s", path, want)
			}
			if again := n.must("Mount", a); again != path {
				t.Fatalf("second mount: got %s, want %s", again, path)
			}
			n.runInside("cp", "/proc/self/exe", filepath.Join(path, "file"))
			var devices []Device
			if err := n.call("Devices", Args{}, &devices); err != nil {
				t.Fatal(err)
			}
			if len(devices) != 1 || devices[0].MountPath != path || !devices[0].Lent || devices[0].Orphaned || devices[0].FS != fs {
				t.Fatalf("devices: got %+v, want one lent, mounted at %s", devices, path)
			}
			if table := n.must("Mounts", Args{}); strings.Contains(table, mountsDir(n.dir)+"/") {
				t.Errorf("the daemon's namespace has a volume mounted:\n%s", table)
			}
			if err := n.call("CloseDevice", a, new(string)); err == nil {
				t.Error("a mounted device was closed")
			}
			for range 2 {
				n.must("Unmount", a)
			}
			for range 2 {
				n.must("CloseDevice", a)
			}
			gone(t, devices[0])
			n.must("RemovePath", a)
			if _, err := os.Stat(filepath.Join(mountsDir(n.dir), "data")); err == nil {
				t.Error("the bare mountpoint is still there")
			}
		})
	}
}
