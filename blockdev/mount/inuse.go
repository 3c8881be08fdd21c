package mount

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
)

// InUse says what uses the block device or file at path now: a mount, swap, a loop
// device, a device-mapper or md target, also of one of its partitions, or whoever
// has a device open for itself alone; "" if nothing is seen to. What it names must
// not be written to by anybody else, whatever an operator says. A path that is not
// there is not in use.
func InUse(path string) (what string, err error) {
	return kernel{proc: "/proc", sys: "/sys"}.inUse(path)
}

// kernel is where the kernel tells what is in use.
type kernel struct{ proc, sys string }

// target is what a path leads to.
type target struct {
	path   string // without symbolic links
	device bool
	id     uint64 // of a device its number, of a file that of its inode's device
	inode  uint64 // of a file
}

func (k kernel) inUse(path string) (string, error) {
	t, err := lookAt(path)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", holdfast.Errorf(holdfast.ErrIO, "look at %s: %w", path, err)
	}
	what, err := k.user(t)
	if what != "" || err != nil || !t.device {
		return what, err
	}
	for _, part := range k.partitions(t.id) {
		if what, err = k.user(part); err != nil {
			return "", err
		}
		if what != "" {
			return "its partition " + filepath.Base(part.path) + " " + strings.TrimPrefix(what, "it "), nil
		}
	}
	// The kernel gives a device to one exclusive user alone. Opened for reading:
	// closing a device that was open for writing makes udev look at it.
	f, err := os.OpenFile(t.path, os.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.EBUSY):
		return "it is in use: another program or the kernel has it for itself alone", nil
	case err != nil:
		return "", holdfast.Errorf(holdfast.ErrIO, "open %s: %w", path, err)
	}
	return "", f.Close()
}

// lookAt follows a path.
func lookAt(path string) (target, error) {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return target{}, err
	}
	var st unix.Stat_t
	if err := unix.Stat(real, &st); err != nil {
		return target{}, err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		return target{path: real, device: true, id: st.Rdev}, nil
	}
	return target{path: real, id: st.Dev, inode: st.Ino}, nil
}

// is says whether a path, as the kernel tells it, leads to the target.
func (t target) is(path string) bool {
	if path == t.path {
		return true
	}
	if !strings.HasPrefix(path, "/") {
		return false
	}
	o, err := lookAt(path)
	return err == nil && o.device == t.device && o.id == t.id && o.inode == t.inode
}

// user says who uses one device or file.
func (k kernel) user(t target) (string, error) {
	for _, look := range []func(target) (string, error){k.mounted, k.swap, k.holder, k.loop} {
		if what, err := look(t); what != "" || err != nil {
			return what, err
		}
	}
	return "", nil
}

// mounted looks at the mounts that this process sees, and at those of process 1:
// a container has its own.
func (k kernel) mounted(t target) (string, error) {
	if !t.device {
		return "", nil
	}
	for _, process := range []string{"self", "1"} {
		f, err := os.Open(filepath.Join(k.proc, process, "mountinfo"))
		if err != nil {
			if process == "self" {
				return "", holdfast.Errorf(holdfast.ErrInternal, "read the mount table: %w", err)
			}
			continue
		}
		infos, err := mountinfo.GetMountsFromReader(f, nil)
		f.Close()
		if err != nil {
			return "", holdfast.Errorf(holdfast.ErrInternal, "read the mount table: %w", err)
		}
		for _, i := range infos {
			// btrfs has device numbers of its own: there only the source tells.
			if unix.Mkdev(uint32(i.Major), uint32(i.Minor)) == t.id || t.is(i.Source) {
				return fmt.Sprintf("it is mounted at %s (%s)", i.Mountpoint, i.FSType), nil
			}
		}
	}
	return "", nil
}

func (k kernel) swap(t target) (string, error) {
	raw, err := os.ReadFile(filepath.Join(k.proc, "swaps"))
	if err != nil {
		return "", nil //nolint:nilerr // a kernel without swap
	}
	for line := range strings.Lines(string(raw)) {
		name, _, _ := strings.Cut(line, " ")
		name = strings.ReplaceAll(strings.TrimSpace(name), `\040`, " ")
		if strings.HasPrefix(name, "/") && t.is(name) {
			return "it is in use as swap", nil
		}
	}
	return "", nil
}

// holder looks for what is stacked on a device.
func (k kernel) holder(t target) (string, error) {
	if !t.device {
		return "", nil
	}
	holders := k.list(k.device(t.id), "holders")
	if len(holders) == 0 {
		return "", nil
	}
	name := holders[0]
	kind := "device " + name
	if raw, err := os.ReadFile(filepath.Join(k.sys, "block", name, "dm", "name")); err == nil {
		kind = fmt.Sprintf("device-mapper target %s (%s)", strings.TrimSpace(string(raw)), name)
	} else if strings.HasPrefix(name, "md") {
		kind = "md array " + name
	} else if strings.HasPrefix(name, "bcache") {
		kind = "bcache device " + name
	}
	return "it is in use by the " + kind, nil
}

// loop looks for a loop device on it.
func (k kernel) loop(t target) (string, error) {
	for _, name := range k.list(k.sys, "block") {
		raw, err := os.ReadFile(filepath.Join(k.sys, "block", name, "loop", "backing_file"))
		if err != nil {
			continue // no loop device, or one without a file
		}
		if t.is(strings.TrimSpace(string(raw))) {
			return "it is in use by the loop device /dev/" + name, nil
		}
	}
	return "", nil
}

// partitions are those of a whole disk.
func (k kernel) partitions(id uint64) (out []target) {
	dir := k.device(id)
	for _, name := range k.list(dir, "") {
		if _, err := os.Stat(filepath.Join(dir, name, "partition")); err != nil {
			continue
		}
		raw, err := os.ReadFile(filepath.Join(dir, name, "dev"))
		var major, minor uint32
		if err != nil {
			continue
		}
		if _, err := fmt.Sscanf(string(raw), "%d:%d", &major, &minor); err == nil {
			out = append(out, target{path: "/dev/" + name, device: true, id: unix.Mkdev(major, minor)})
		}
	}
	return out
}

// device is a block device's directory in sysfs.
func (k kernel) device(id uint64) string {
	return filepath.Join(k.sys, "dev", "block", fmt.Sprintf("%d:%d", unix.Major(id), unix.Minor(id)))
}

func (k kernel) list(dir, name string) (names []string) {
	entries, err := os.ReadDir(filepath.Join(dir, name))
	if err != nil {
		return nil // it has none
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	slices.Sort(names)
	return names
}

// Rotational says whether what path lies on turns: the device itself, or the one
// below the file system of a file (of its directory, if there is no file yet).
// known is false where the kernel does not say: a network or memory file system,
// or one over several devices.
func Rotational(path string) (turns, known bool) {
	return kernel{proc: "/proc", sys: "/sys"}.rotational(path)
}

func (k kernel) rotational(path string) (turns, known bool) {
	t, err := lookAt(path)
	if errors.Is(err, os.ErrNotExist) {
		t, err = lookAt(filepath.Dir(path))
	}
	if err != nil {
		return false, false
	}
	if !t.device && unix.Major(t.id) == 0 { // btrfs and the like: what its mount names
		if t, err = k.below(t); err != nil {
			return false, false
		}
	}
	dir, err := filepath.EvalSymlinks(k.device(t.id))
	if err != nil {
		return false, false
	}
	for _, d := range []string{dir, filepath.Dir(dir)} { // a partition's queue is its disk's
		if raw, err := os.ReadFile(filepath.Join(d, "queue", "rotational")); err == nil {
			return strings.TrimSpace(string(raw)) == "1", true
		}
	}
	return false, false
}

// below is the block device that the mount of a file names as its source.
func (k kernel) below(t target) (target, error) {
	f, err := os.Open(filepath.Join(k.proc, "self", "mountinfo"))
	if err != nil {
		return target{}, err
	}
	defer f.Close()
	infos, err := mountinfo.GetMountsFromReader(f, nil)
	if err != nil {
		return target{}, err
	}
	best, length := target{}, -1 // the innermost mount that covers it
	for _, i := range infos {
		if i.Mountpoint != "/" && t.path != i.Mountpoint && !strings.HasPrefix(t.path, i.Mountpoint+"/") || len(i.Mountpoint) < length {
			continue
		}
		length, best = len(i.Mountpoint), target{}
		if d, err := lookAt(i.Source); err == nil && d.device {
			best = d
		}
	}
	if !best.device {
		return target{}, os.ErrNotExist
	}
	return best, nil
}
