package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// namePrefix begins the names of the network namespaces and the directory of a
// run; the number of its process follows. make leftovers looks for hf*.
const namePrefix = "hfchaos-"

// ownName is what the names of this run begin with.
func ownName() string { return namePrefix + strconv.Itoa(os.Getpid()) + "-" }

// removeStale takes away what runs that were killed have left: namespaces and
// mounts. Their nodes died with them; logs and disks stay.
func removeStale(ctx context.Context) error {
	spaces, err := filepath.Glob("/run/netns/" + namePrefix + "*")
	if err != nil {
		return err
	}
	for _, path := range spaces {
		if name := filepath.Base(path); dead(name) {
			if _, err := command(ctx, nil, "ip", "netns", "del", name); err != nil {
				return err
			}
		}
	}
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) { return !deadPath(m.Mountpoint), false })
	if err != nil {
		return fmt.Errorf("list mounts: %w", err)
	}
	for _, m := range slices.Backward(mounts) { // the inner ones came later
		if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", m.Mountpoint, err)
		}
	}
	return nil
}

// deadPath reports whether a part of a path is the name of a run that is over.
func deadPath(path string) bool {
	return slices.ContainsFunc(strings.Split(path, "/"), dead)
}

// dead reports whether a name is that of a run whose process is gone.
func dead(name string) bool {
	after, ok := strings.CutPrefix(name, namePrefix)
	if !ok {
		return false
	}
	number, _, _ := strings.Cut(after, "-")
	pid, err := strconv.Atoi(number)
	return err == nil && syscall.Kill(pid, 0) == syscall.ESRCH
}
