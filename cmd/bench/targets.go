package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// target is a running server, or several that serve one volume together.
type target struct {
	name    string
	uri     string
	procs   []*exec.Cmd
	exited  []chan struct{} // of procs
	prepare func(ctx context.Context) error
}

// allTargets are measured by default.
var allTargets = []string{"nbdkit-S", "nbdkit-L", "holdfast-1", "holdfast-3"}

// starters start targets by name. A target that is returned beside an error has
// processes to stop.
var starters = map[string]func(ctx context.Context, c config, name string) (*target, error){
	"nbdkit-S":   startNBDKit,
	"nbdkit-L":   startNBDKit,
	"holdfast-1": startHoldfast,
	"holdfast-3": startHoldfast,
}

func (t *target) pids() (pids []int) {
	for _, p := range t.procs {
		pids = append(pids, p.Process.Pid)
	}
	return pids
}

func (t *target) cpu() time.Duration { return treeCPU(t.pids()) }
func (t *target) rss() float64       { return treeRSS(t.pids()) }

// startWait bounds how long a server may take until it serves.
const startWait = 60 * time.Second

// start runs a server in a process group of its own; what it prints goes to
// a file beside its data.
func (t *target) start(log string, name string, args ...string) error {
	f, err := os.Create(log)
	if err != nil {
		return err
	}
	defer f.Close()
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = f, f
	// Nothing is mounted here, so no node needs a keeper; nbdkit does not care.
	cmd.Env = append(os.Environ(), "HOLDFAST_KEEPER=off")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	if err := cmd.Start(); err != nil {
		return err
	}
	exited := make(chan struct{})
	go func() {
		_ = cmd.Wait() // how it ended stands in its log
		close(exited)
	}()
	t.procs, t.exited = append(t.procs, cmd), append(t.exited, exited)
	return nil
}

// stopWait is how long a server may take to end by itself.
const stopWait = 15 * time.Second

// stop ends the processes: all are asked, then made to.
func (t *target) stop() {
	for _, p := range t.procs {
		_ = p.Process.Signal(syscall.SIGTERM)
	}
	end := time.After(stopWait)
	for i, p := range t.procs {
		select {
		case <-t.exited[i]:
		case <-end:
		}
		// What is left of the group: it may have children of its own.
		_ = syscall.Kill(-p.Process.Pid, syscall.SIGKILL)
		<-t.exited[i]
	}
}

// startNBDKit serves an image file through nbdkit's file plugin.
func startNBDKit(ctx context.Context, c config, name string) (*target, error) {
	dir := filepath.Join(c.dir, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	image, socket := filepath.Join(dir, "image"), filepath.Join(dir, "s")
	step := 1 << 20
	if strings.HasSuffix(name, "-S") {
		step = 4 << 10
	}
	t := &target{name: name, uri: "nbd+unix:///?socket=" + socket}
	t.prepare = func(context.Context) error { return fill(image, c.sizeMiB, step) }
	if err := t.prepare(ctx); err != nil {
		return nil, err
	}
	if err := t.start(filepath.Join(dir, "log"), "nbdkit", "-f", "--threads=16", "-U", socket, "file", image); err != nil {
		return nil, err
	}
	return t, t.await(ctx, func() error {
		nc, err := net.Dial("unix", socket)
		if err == nil {
			nc.Close()
		}
		return err
	}, filepath.Join(dir, "log"))
}

// fill overwrites the file by writes of one size after dropping it from the
// page cache: the size decides how large the cache's folios are.
func fill(image string, sizeMiB, step int) error {
	f, err := os.OpenFile(image, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := fadviseDontNeed(f); err != nil {
		return err
	}
	p := bytes.Repeat([]byte("holdfast"), step/8)
	for off := int64(0); off < int64(sizeMiB)<<20; off += int64(step) {
		if _, err := f.WriteAt(p, off); err != nil {
			return err
		}
	}
	return f.Sync()
}

// await tries ready until it succeeds, a process ends, or startWait is over.
func (t *target) await(ctx context.Context, ready func() error, log string) error {
	ctx, cancel := context.WithTimeout(ctx, startWait)
	defer cancel()
	for {
		err := ready()
		if err == nil {
			return nil
		}
		select {
		case <-t.exited[len(t.exited)-1]:
			text, _ := os.ReadFile(log) //nolint:errcheck // the error is at hand
			return fmt.Errorf("it ended: %s", tail(text))
		case <-ctx.Done():
			text, _ := os.ReadFile(log) //nolint:errcheck // the error is at hand
			return fmt.Errorf("not ready after %v: %w: %s", startWait, err, tail(text))
		case <-time.After(50 * time.Millisecond):
		}
	}
}
