package hostdev

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
)

// Way is one way to make a volume a kernel device of this host.
type Way struct {
	// Name is FuseLoop or KernelNBD.
	Name string
	// Works says whether this version can use it here.
	Works bool
	// TakesOver says whether a device made this way outlives its daemon.
	TakesOver bool
	// Lack is why it does not work, or what it cannot do; Remedy what to do
	// about it. Both may be empty.
	Lack, Remedy string
}

// The names of the ways.
const (
	FuseLoop  = "fuse-loop"
	KernelNBD = "kernel-nbd"
)

// probeWait bounds the probe; nothing in it needs a server.
const probeWait = 5 * time.Second

// Probe tries the ways to make a kernel device, the preferred first. It leaves
// nothing behind. It must not run in the process that serves block requests
// only for want of privilege there; it mounts nothing.
func Probe(ctx context.Context) []Way {
	ctx, cancel := context.WithTimeout(ctx, probeWait)
	defer cancel()
	return []Way{probeNBD(), probeFuse(ctx)}
}

// probeNBD reports the kernel's NBD client, which this version does not drive.
func probeNBD() Way {
	w := Way{Name: KernelNBD, Lack: "the kernel has no nbd module loaded", Remedy: "not needed: FUSE and loop serve instead"}
	if _, err := os.Stat("/sys/module/nbd"); err == nil {
		w.Lack = "the kernel's nbd module is loaded, but not used in this version"
	}
	return w
}

func probeFuse(ctx context.Context) Way {
	w := Way{Name: FuseLoop}
	lacks := func(err error) Way {
		w.Lack, w.Remedy = err.Error(), holdfast.RemedyOf(err)
		if w.Remedy != "" {
			w.Lack = strings.TrimSuffix(w.Lack, " ("+w.Remedy+")")
		}
		return w
	}
	c, err := Connect(ctx)
	if err != nil {
		return lacks(err)
	}
	params := c.Params()
	c.Close()
	if err := probeLoop(ctx); err != nil {
		return lacks(err)
	}
	w.Works, w.TakesOver = true, params.CanResend()
	switch {
	case !w.TakesOver:
		w.Lack, w.Remedy = "a device does not outlive its daemon: the kernel cannot resend", "Linux 6.9 or later"
	case requestTimeout() != "":
		w.Lack, w.Remedy = "the kernel ends FUSE connections that answer late", "set "+requestTimeout()+" to 0"
	}
	return w
}

// probeLoop puts a loop device on a small file in memory, without direct I/O.
func probeLoop(ctx context.Context) error {
	fd, err := unix.MemfdCreate("holdfast-probe", unix.MFD_CLOEXEC)
	if err != nil {
		return holdfast.Errorf(holdfast.ErrUnsupported, "make a file in memory: %w", err)
	}
	f := os.NewFile(uintptr(fd), "holdfast-probe")
	defer f.Close()
	if err := f.Truncate(1 << 20); err != nil {
		return holdfast.Errorf(holdfast.ErrInternal, "size a file in memory: %w", err)
	}
	loop, err := configureLoop(ctx, f, "holdfast-probe", unix.LO_FLAGS_AUTOCLEAR|unix.LO_FLAGS_READ_ONLY)
	if err != nil {
		return err
	}
	loop.Clear()
	return nil
}

// requestTimeout names the sysctl that makes the kernel abort a connection
// whose server answers late, if one is set; a volume may wait longer for its
// replicas than any such time.
func requestTimeout() string {
	for _, name := range []string{"default_request_timeout", "max_request_timeout"} {
		b, err := os.ReadFile("/proc/sys/fs/fuse/" + name)
		if err == nil && strings.TrimSpace(string(b)) != "0" {
			return fmt.Sprintf("fs.fuse.%s", name)
		}
	}
	return ""
}
