package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// What the demo takes at its peak, with room: three engines with their images, three
// disks with their logs; three engines and nodes in memory.
const (
	needDisk   = 8 << 30
	needMemory = 2 << 30
	needGo     = 26 // minor version: Go 1.26
)

// lack is something that the machine must have and has not, and what to do about it.
type lack struct{ what, remedy string }

// preflight says what this machine lacks, all of it at once. With build, a binary has
// to be built.
func preflight(ctx context.Context, build bool) []lack {
	var lacks []lack
	add := func(found *lack) {
		if found != nil {
			lacks = append(lacks, *found)
		}
	}
	info, found := askEngine(ctx)
	add(found)
	if found == nil {
		lacks = append(lacks, judgeEngine(info, kernelRelease())...)
	}
	for _, module := range []struct{ name, path string }{{"fuse", "/dev/fuse"}, {"loop", "/dev/loop-control"}} {
		if _, err := os.Stat(module.path); err != nil {
			add(&lack{module.path + " is not there", "load the module: modprobe " + module.name})
		}
	}
	add(checkDisk(info.DockerRootDir))
	add(checkMemory())
	if build {
		add(checkGo(ctx))
	}
	return lacks
}

// engineInfo is what is read of `docker info`.
type engineInfo struct {
	ServerVersion   string
	OSType          string
	OperatingSystem string
	KernelVersion   string
	DockerRootDir   string
	SecurityOptions []string
	ServerErrors    []string
}

func askEngine(ctx context.Context) (engineInfo, *lack) {
	var info engineInfo
	if _, err := exec.LookPath("docker"); err != nil {
		return info, &lack{"the docker command is not there", "install Docker Engine (Debian: apt-get install docker.io)"}
	}
	var stderr strings.Builder
	cmd := exec.CommandContext(ctx, "docker", "info", "--format", "{{json .}}")
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if jsonErr := json.Unmarshal(out, &info); jsonErr != nil && err == nil {
		err = jsonErr
	}
	if err == nil && info.ServerVersion != "" {
		return info, nil
	}
	why := strings.TrimSpace(stderr.String() + " " + strings.Join(info.ServerErrors, " "))
	if strings.Contains(why, "permission denied") {
		return info, &lack{"this user may not use Docker", "run it as root, or add the user to the group docker"}
	}
	return info, &lack{fmt.Sprintf("Docker Engine does not answer (%.200s)", why), "start it: systemctl start docker"}
}

// judgeEngine says what is wrong with an engine, for a machine whose kernel has that
// release.
func judgeEngine(info engineInfo, kernel string) []lack {
	var lacks []lack
	if info.OSType != "linux" {
		lacks = append(lacks, lack{"the engine runs " + info.OSType + " containers", "use Docker Engine on Linux"})
	} else if info.KernelVersion != kernel {
		lacks = append(lacks, lack{
			fmt.Sprintf("the engine (%s, kernel %s) runs on another machine or in a VM, not on this kernel (%s)", info.OperatingSystem, info.KernelVersion, kernel),
			"use Docker Engine on Linux, and unset DOCKER_HOST and docker context",
		})
	}
	for _, option := range info.SecurityOptions {
		if strings.Contains(option, "rootless") {
			lacks = append(lacks, lack{"the engine is rootless", "use the engine that runs as root: unset DOCKER_HOST"})
		}
	}
	return lacks
}

func kernelRelease() string {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return ""
	}
	return unix.ByteSliceToString(name.Release[:])
}

// checkDisk looks at the file system of the engine's data, or at the root where that
// cannot be seen.
func checkDisk(dir string) *lack {
	var fs unix.Statfs_t
	if dir == "" || unix.Statfs(dir, &fs) != nil {
		dir = "/"
		if err := unix.Statfs(dir, &fs); err != nil {
			return &lack{"the free space of " + dir + " is unknown: " + err.Error(), "make it readable"}
		}
	}
	if free := int64(fs.Bavail) * fs.Bsize; free < needDisk {
		return &lack{fmt.Sprintf("%s has %.1f GiB free", dir, gib(free)), fmt.Sprintf("free %d GiB, for example with docker system prune", needDisk>>30)}
	}
	return nil
}

func checkMemory() *lack {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return &lack{"the free memory is unknown: " + err.Error(), "run it on Linux"}
	}
	free, err := availableMemory(string(text))
	if err != nil {
		return &lack{err.Error(), "run it on Linux 3.14 or later"}
	}
	if free < needMemory {
		return &lack{fmt.Sprintf("%.1f GiB of memory are available", gib(free)), fmt.Sprintf("end other programs until %d GiB are", needMemory>>30)}
	}
	return nil
}

// availableMemory reads MemAvailable, in bytes, of /proc/meminfo (proc_meminfo(5)).
func availableMemory(meminfo string) (int64, error) {
	for line := range strings.Lines(meminfo) {
		if rest, ok := strings.CutPrefix(line, "MemAvailable:"); ok {
			kib, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")), 10, 64)
			if err != nil {
				return 0, fmt.Errorf("the free memory is unknown: %w", err)
			}
			return kib << 10, nil
		}
	}
	return 0, fmt.Errorf("the free memory is unknown: /proc/meminfo has no MemAvailable")
}

func checkGo(ctx context.Context) *lack {
	remedy := fmt.Sprintf("install Go 1.%d or later from https://go.dev/dl/", needGo)
	out, err := exec.CommandContext(ctx, "go", "env", "GOVERSION").Output()
	if err != nil {
		return &lack{"the go command is not there", remedy}
	}
	if version := strings.TrimSpace(string(out)); !goIsNew(version) {
		return &lack{"Go is too old: " + version, remedy}
	}
	return nil
}

// goIsNew judges a version as `go env GOVERSION` prints it: go1.26.8, go1.27rc1,
// devel go1.27-abcdef.
func goIsNew(version string) bool {
	_, minor, ok := strings.Cut(version, "go1.")
	if !ok {
		return false
	}
	end := 0
	for end < len(minor) && minor[end] >= '0' && minor[end] <= '9' {
		end++
	}
	n, err := strconv.Atoi(minor[:end])
	return err == nil && n >= needGo
}

func gib(bytes int64) float64 { return float64(bytes) / (1 << 30) }
