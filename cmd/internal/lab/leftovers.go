package lab

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
)

// Leftovers lists what labs, demos and tests have left on this machine, one line each
// with its kind first: containers, networks, volumes, plugin sockets, loop devices,
// mounts, FUSE connections, cgroups, network namespaces, and processes that cannot be
// ended. A machine on which nothing runs and nothing leaked has none. It needs root to
// see everything, and says so (ErrRefused) without.
func Leftovers(ctx context.Context) ([]string, error) {
	if os.Geteuid() != 0 {
		return nil, holdfast.Errorf(holdfast.ErrRefused, "mounts and FUSE connections of others are visible to root only").WithRemedy("run it as root")
	}
	var found []string
	for _, look := range []func(context.Context) ([]string, error){
		leftInEngine, leftSockets, leftLoops, leftFuse, leftCgroups, leftNamespaces, leftStuck,
	} {
		more, err := look(ctx)
		if err != nil {
			return found, fmt.Errorf("look for leftovers: %w", err)
		}
		found = append(found, more...)
	}
	return found, nil
}

// KernelDevices lists what serves volumes on this machine now: loop devices and FUSE
// connections, of all hosts together.
func KernelDevices(ctx context.Context) ([]string, error) {
	loops, err := leftLoops(ctx)
	if err != nil {
		return nil, err
	}
	fuse, err := leftFuse(ctx)
	// A volume's connection has no mount; one that has is of something else.
	fuse = slices.DeleteFunc(fuse, func(what string) bool { return !strings.HasSuffix(what, unmounted) })
	return append(loops, fuse...), err
}

const unmounted = " without a mount"

// Stuck lists processes of this machine that cannot be ended.
func Stuck(ctx context.Context) ([]string, error) { return leftStuck(ctx) }

// leftInEngine lists what carries the label of a lab.
func leftInEngine(ctx context.Context) ([]string, error) {
	if !engineAnswers(ctx) {
		return nil, nil // so nothing is in it
	}
	var found []string
	for _, q := range []struct {
		kind string
		args []string
	}{
		{"container", []string{"ps", "-a", "--format", "{{.Names}}"}},
		{"network", []string{"network", "ls", "--format", "{{.Name}}"}},
		{"volume", []string{"volume", "ls", "--format", "{{.Name}}"}},
	} {
		names, err := lines(docker(ctx, append(q.args, "--filter", "label="+label)...))
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			found = append(found, q.kind+" "+name)
		}
	}
	return found, nil
}

func engineAnswers(ctx context.Context) bool {
	_, err := docker(ctx, "version", "-f", "{{.Server.Version}}")
	return err == nil
}

// leftSockets lists plugin sockets of tests, whose drivers are named hf...; a dead one
// keeps the engine waiting.
func leftSockets(context.Context) ([]string, error) {
	paths, err := filepath.Glob("/run/docker/plugins/hf*.sock")
	return prefixed("plugin socket", paths), err
}

// ours are the words in a path by which a mount or a backing file is known as
// holdfast's.
var ours = regexp.MustCompile(`holdfast|/hf[a-z]*[0-9-]`)

// leftLoops lists loop devices over files of holdfast, or over files that are gone. A
// volume's FUSE file stands in no mount namespace, and so its path is "/".
func leftLoops(context.Context) ([]string, error) {
	backing, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	var found []string
	for _, path := range backing {
		file, err := os.ReadFile(path)
		if err != nil {
			continue // detached since
		}
		if name := strings.TrimSpace(string(file)); name == "/" || ours.MatchString(name) || strings.HasSuffix(name, "(deleted)") {
			found = append(found, "loop device /dev/"+strings.Split(path, "/")[3]+" over "+name)
		}
	}
	return found, nil
}

// leftFuse lists mounts of holdfast in any mount namespace, and FUSE connections that
// are holdfast's: those without a mount, which is how volumes are served, and those that
// are mounted at a path of holdfast's.
func leftFuse(context.Context) ([]string, error) {
	mounts, err := allMounts()
	if err != nil {
		return nil, err
	}
	found := make(map[string]bool)
	owner := make(map[string]string) // device number to mount, of FUSE mounts
	for _, m := range mounts {
		mine := ours.MatchString(m.source) || ours.MatchString(m.point) && !strings.Contains(m.point, "/docker/")
		if strings.HasPrefix(m.fstype, "fuse") && m.fstype != "fusectl" {
			owner[m.device] = m.point
			mine = mine || ours.MatchString(m.fstype)
		}
		if mine {
			found[fmt.Sprintf("mount %s of %s (%s)", m.point, m.source, m.fstype)] = true
		}
	}
	connections, err := fuseConnections()
	if err != nil {
		return nil, err
	}
	for _, number := range connections {
		point, mounted := owner["0:"+number]
		switch {
		case !mounted:
			found["FUSE connection "+number+unmounted] = true
		case ours.MatchString(point):
			found["FUSE connection "+number+" of "+point] = true
		}
	}
	return slices.Sorted(maps.Keys(found)), nil
}

type mount struct{ device, point, fstype, source string }

// allMounts reads the mounts of every mount namespace that a process lives in.
func allMounts() ([]mount, error) {
	tables, err := filepath.Glob("/proc/[0-9]*/mountinfo")
	if err != nil {
		return nil, err
	}
	seen := make(map[string]bool)
	var all []mount
	for _, table := range tables {
		space, err := os.Readlink(filepath.Join(filepath.Dir(table), "ns", "mnt"))
		if err != nil || seen[space] {
			continue // ended since, or known
		}
		text, err := os.ReadFile(table)
		if err != nil {
			continue
		}
		seen[space] = true
		for scan := bufio.NewScanner(bytes.NewReader(text)); scan.Scan(); {
			// proc(5): id parent major:minor root point options optional... - fstype source options
			left, right, ok := strings.Cut(scan.Text(), " - ")
			before, after := strings.Fields(left), strings.Fields(right)
			if ok && len(before) >= 5 && len(after) >= 2 {
				all = append(all, mount{before[2], before[4], after[0], after[1]})
			}
		}
	}
	return all, nil
}

// fuseConnections returns the numbers of all FUSE connections of the kernel. The file
// system that shows them is mounted for the purpose, if it is not yet.
func fuseConnections() ([]string, error) {
	dir := "/sys/fs/fuse/connections"
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		if errors.Is(err, unix.ENOENT) {
			return nil, nil // a kernel without FUSE
		}
		return nil, fmt.Errorf("look at %s: %w", dir, err)
	}
	const fusectlMagic = 0x65735543 // include/uapi/linux/magic.h: FUSE_CTL_SUPER_MAGIC
	if fs.Type != fusectlMagic {
		temp, err := os.MkdirTemp("", "fusectl")
		if err != nil {
			return nil, fmt.Errorf("make a mount point: %w", err)
		}
		defer os.Remove(temp) //nolint:errcheck // below the system's temporary directory
		if err := unix.Mount("fusectl", temp, "fusectl", 0, ""); err != nil {
			return nil, fmt.Errorf("mount fusectl: %w", err)
		}
		defer unix.Unmount(temp, unix.MNT_DETACH) //nolint:errcheck // a private mount of an instant
		dir = temp
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("list FUSE connections: %w", err)
	}
	var numbers []string
	for _, e := range entries {
		numbers = append(numbers, e.Name())
	}
	return numbers, nil
}

var containerID = regexp.MustCompile(`^[0-9a-f]{64}$`)

// leftCgroups lists cgroups of containers that the engine no longer has.
func leftCgroups(ctx context.Context) ([]string, error) {
	if !engineAnswers(ctx) {
		return nil, nil // so nobody can say whose they are
	}
	ids, err := lines(docker(ctx, "ps", "-aq", "--no-trunc"))
	if err != nil {
		return nil, err
	}
	var found []string
	for _, root := range cgroupRoots {
		trees, err := filepath.Glob(filepath.Join(root, "*"))
		if err != nil {
			return nil, err
		}
		for _, tree := range trees {
			if id := filepath.Base(tree); containerID.MatchString(id) && !slices.Contains(ids, id) {
				found = append(found, "cgroup "+tree)
			}
		}
	}
	return found, nil
}

// leftNamespaces lists named network namespaces of tests.
func leftNamespaces(context.Context) ([]string, error) {
	paths, err := filepath.Glob("/run/netns/hf*")
	return prefixed("network namespace", paths), err
}

// A process counts as stuck when it is seen in uninterruptible sleep at each of so many
// looks; a busy disk keeps nobody that long.
const (
	stuckLooks = 10
	stuckPause = 200 * time.Millisecond
)

// leftStuck lists processes, not of the kernel, that cannot be ended.
func leftStuck(ctx context.Context) ([]string, error) {
	stuck, err := uninterruptible()
	for range stuckLooks - 1 {
		if err != nil || len(stuck) == 0 {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(stuckPause):
		}
		var again map[string]string
		again, err = uninterruptible()
		maps.DeleteFunc(stuck, func(pid, _ string) bool { return again[pid] == "" })
	}
	var found []string
	for _, pid := range slices.Sorted(maps.Keys(stuck)) {
		found = append(found, "process "+pid+" ("+stuck[pid]+") in D state")
	}
	return found, err
}

// uninterruptible returns the names of the processes in state D, by pid.
func uninterruptible() (map[string]string, error) {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	found := make(map[string]string)
	for _, path := range stats {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // ended since
		}
		// proc(5): pid (name) state ppid pgrp session tty_nr tpgid flags ...
		open, end := bytes.IndexByte(text, '('), bytes.LastIndexByte(text, ')')
		if open < 0 || end < open {
			continue
		}
		fields := strings.Fields(string(text[end+1:]))
		const kernelThread = "2" // kthreadd, parent of all kernel threads
		if len(fields) > 1 && fields[0] == "D" && fields[1] != kernelThread {
			found[strings.Fields(string(text))[0]] = string(text[open+1 : end])
		}
	}
	return found, nil
}

func prefixed(kind string, paths []string) []string {
	var found []string
	for _, p := range paths {
		if _, err := os.Lstat(p); !errors.Is(err, fs.ErrNotExist) {
			found = append(found, kind+" "+p)
		}
	}
	return found
}
