package mount

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// fakeKernel is a /proc and a /sys of a machine with nothing in use.
func fakeKernel(t *testing.T) (k kernel, put func(path, content string)) {
	t.Helper()
	root := t.TempDir()
	put = func(path, content string) {
		t.Helper()
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	put("proc/self/mountinfo", "20 1 8:1 / / rw - ext4 /dev/root rw\n")
	put("proc/swaps", "Filename\tType\tSize\tUsed\tPriority\n")
	put("sys/block/none", "")
	return kernel{proc: filepath.Join(root, "proc"), sys: filepath.Join(root, "sys")}, put
}

// TestUsers reads what a kernel says of devices that this machine has not.
func TestUsers(t *testing.T) {
	sdb := target{path: "/dev/sdb", device: true, id: unix.Mkdev(8, 16)}
	for _, c := range []struct {
		name, path, content string
		want                string
	}{
		{"nothing", "sys/block/none", "", ""},
		{"a mount", "proc/self/mountinfo", "20 1 8:1 / / rw - ext4 /dev/root rw\n31 20 8:16 / /srv/my\\040data rw - xfs /dev/sdb rw\n", "it is mounted at /srv/my data (xfs)"},
		{"a mount of the host", "proc/1/mountinfo", "31 20 8:16 / /srv rw - ext4 /dev/sdb rw\n", "it is mounted at /srv (ext4)"},
		{"btrfs, whose numbers are its own", "proc/self/mountinfo", "31 20 0:44 / /srv rw - btrfs /dev/sdb rw\n", "it is mounted at /srv (btrfs)"},
		{"another device's mount", "proc/self/mountinfo", "31 20 8:17 / /srv rw - ext4 /dev/sdb1 rw\n", ""},
		{"swap", "proc/swaps", "Filename Type Size Used Priority\n/dev/sdb  partition 8 0 -2\n", "it is in use as swap"},
		{"LVM or LUKS", "sys/dev/block/8:16/holders/dm-0", "", "it is in use by the device dm-0"},
		{"md", "sys/dev/block/8:16/holders/md127", "", "it is in use by the md array md127"},
		{"bcache", "sys/dev/block/8:16/holders/bcache0", "", "it is in use by the bcache device bcache0"},
		{"a loop device", "sys/block/loop3/loop/backing_file", "/dev/sdb\n", "it is in use by the loop device /dev/loop3"},
	} {
		k, put := fakeKernel(t)
		put(c.path, c.content)
		if what, err := k.user(sdb); what != c.want || err != nil {
			t.Errorf("%s: %q, %v; want %q", c.name, what, err, c.want)
		}
	}
	k, put := fakeKernel(t)
	put("sys/dev/block/8:16/holders/dm-0", "")
	put("sys/block/dm-0/dm/name", "vg0-root\n")
	if what, _ := k.user(sdb); what != "it is in use by the device-mapper target vg0-root (dm-0)" {
		t.Errorf("a named target: %q", what)
	}
	put("sys/dev/block/8:32/sdc1/partition", "1\n")
	put("sys/dev/block/8:32/sdc1/dev", "8:33\n")
	put("sys/dev/block/8:32/queue/rotational", "0\n")
	if p := k.partitions(unix.Mkdev(8, 32)); len(p) != 1 || p[0].path != "/dev/sdc1" || p[0].id != unix.Mkdev(8, 33) {
		t.Errorf("partitions: %+v", p)
	}
}

// TestInUseFile: a file is in use as swap and below a loop device, by whatever
// name; one that is not there is free.
func TestInUseFile(t *testing.T) {
	k, put := fakeKernel(t)
	path := image(t, 1<<20)
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{path, link, path + "-none"} {
		if what, err := k.inUse(p); what != "" || err != nil {
			t.Errorf("%s: %q, %v", p, what, err)
		}
	}
	put("sys/block/loop0/loop/backing_file", path+"\n")
	if what, err := k.inUse(link); what != "it is in use by the loop device /dev/loop0" || err != nil {
		t.Errorf("below a loop device: %q, %v", what, err)
	}
	put("sys/block/loop0/loop/backing_file", "/elsewhere\n")
	put("proc/swaps", "Filename Type Size Used Priority\n"+link+" file 8 0 -2\n")
	if what, err := k.inUse(path); what != "it is in use as swap" || err != nil {
		t.Errorf("swap: %q, %v", what, err)
	}
}

func TestRotational(t *testing.T) {
	path := image(t, 4096)
	own, err := lookAt(path)
	if err != nil {
		t.Fatal(err)
	}
	number := fmt.Sprintf("%d:%d", unix.Major(own.id), unix.Minor(own.id))
	if unix.Major(own.id) == 0 {
		t.Skip("the temporary directory lies on no block device")
	}
	k, _ := fakeKernel(t)
	if _, known := k.rotational(path); known {
		t.Error("known without a word of the kernel")
	}
	for content, want := range map[string]bool{"1\n": true, "0\n": false} {
		k, put := fakeKernel(t)
		// As the kernel has it: a partition lies in its disk's directory.
		put("sys/devices/sda/queue/rotational", content)
		put("sys/devices/sda/sda1/partition", "1\n")
		if err := os.MkdirAll(filepath.Join(k.sys, "dev", "block"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("../../devices/sda/sda1", filepath.Join(k.sys, "dev", "block", number)); err != nil {
			t.Fatal(err)
		}
		for _, p := range []string{path, path + "-not-yet"} {
			if turns, known := k.rotational(p); turns != want || !known {
				t.Errorf("%s with %q: %v, %v", p, content, turns, known)
			}
		}
	}
}

// TestInUseDevice asks the kernel of this machine.
func TestInUseDevice(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: loop devices")
	}
	needPrograms(t, "losetup", "mkfs.ext4", "mount", "umount")
	path := image(t, 32<<20)
	run(t, "mkfs.ext4", "-q", path)
	loop := strings.TrimSpace(run(t, "losetup", "--find", "--show", path))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "-d", loop).CombinedOutput(); err != nil {
			t.Errorf("losetup -d: %v: %s", err, out)
		}
	})
	inUse := func(path, want string) {
		t.Helper()
		if what, err := InUse(path); what != want || err != nil {
			t.Errorf("%s: %q, %v; want %q", path, what, err, want)
		}
	}
	inUse(loop, "")
	inUse(path, "it is in use by the loop device "+loop)
	dir := t.TempDir()
	run(t, "mount", loop, dir)
	inUse(loop, "it is mounted at "+dir+" (ext4)")
	run(t, "umount", dir)
	inUse(loop, "")
	f, err := os.OpenFile(loop, os.O_RDONLY|unix.O_EXCL, 0)
	if err != nil {
		t.Fatal(err)
	}
	inUse(loop, "it is in use: another program or the kernel has it for itself alone")
	f.Close()
	inUse(loop, "")
}
