package keeper

import (
	"context"
	"encoding/binary"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"sync"

	"golang.org/x/sys/unix"
)

// children are the keeper's processes: those it started, which their starters
// wait for, and those it inherited as PID 1 or subreaper, which the reaper ends.
type children struct {
	log  *slog.Logger
	kick chan struct{} // holds one: look again

	// Held across fork: a child must not be reaped before it is known.
	mu    sync.Mutex
	known map[int]struct{}
}

func newChildren(log *slog.Logger) *children {
	return &children{log: log, kick: make(chan struct{}, 1), known: make(map[int]struct{})}
}

// start starts a process that wait will wait for.
func (c *children) start(cmd *exec.Cmd) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := cmd.Start(); err != nil {
		return err
	}
	c.known[cmd.Process.Pid] = struct{}{}
	return nil
}

func (c *children) wait(cmd *exec.Cmd) error {
	err := cmd.Wait()
	c.mu.Lock()
	delete(c.known, cmd.Process.Pid)
	c.mu.Unlock()
	select {
	case c.kick <- struct{}{}:
	default:
	}
	return err
}

// reap ends inherited children until ctx ends.
func (c *children) reap(ctx context.Context) {
	ch := make(chan os.Signal, 1)
	signal.Notify(ch, unix.SIGCHLD)
	defer signal.Stop(ch)
	for {
		for c.reapOne() {
		}
		select {
		case <-ch:
		case <-c.kick:
		case <-ctx.Done():
			return
		}
	}
}

// reapOne ends one inherited child that has exited. It returns false when there
// is none, or when a child of our own is first in line: its wait kicks again.
func (c *children) reapOne() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	pid := exited()
	if pid <= 0 {
		return false
	}
	if _, ours := c.known[pid]; ours {
		return false
	}
	var status unix.WaitStatus
	if got, err := unix.Wait4(pid, &status, unix.WNOHANG, nil); err != nil || got != pid {
		return false
	}
	c.log.Debug("orphan reaped", slog.Int("pid", pid), slog.Int("status", int(status)))
	return true
}

// exited returns a child that has exited, without reaping it; 0 for none.
func exited() int {
	// siginfo_t of a child: si_signo, si_errno, si_code, padding (64-bit), si_pid.
	const pidOffset = 16
	var info [128]byte
	err := waitid(info[:])
	if err != nil {
		return 0
	}
	return int(int32(binary.NativeEndian.Uint32(info[pidOffset:])))
}
