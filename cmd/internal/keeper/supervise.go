package keeper

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
)

const (
	// firstPause and lastPause bound the pause before the daemon is started
	// again; it doubles. The first restart after a long run waits for nothing:
	// applications are waiting.
	firstPause = 100 * time.Millisecond
	lastPause  = 5 * time.Second
	// longRun is after how long a daemon counts as having worked.
	longRun = 30 * time.Second
)

// exit is how a daemon ended.
type exit struct {
	code   int // 128 + signal if killed
	killed bool
	ran    time.Duration
}

// supervise runs the daemon, again and again, until ctx ends (then it is sent
// SIGTERM, and SIGKILL when the grace is over) or until running it again can
// not help: it then returns the exit code for the keeper.
func (k *keeper) supervise(ctx context.Context) int {
	pause := time.Duration(0)
	for {
		e, err := k.runDaemon(ctx)
		if err != nil {
			k.log.Error("daemon not started", slog.Any("error", err))
			e = exit{code: 1}
		}
		if ctx.Err() != nil || k.finished(e) {
			return e.code
		}
		if e.ran >= longRun {
			pause = 0
		}
		k.log.Error("daemon ended; it is started again", slog.Int("code", e.code), slog.Duration("ran", e.ran.Round(time.Millisecond)), slog.Duration("pause", pause))
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return e.code
		}
		pause = min(max(2*pause, firstPause), lastPause)
	}
}

// finished says whether a daemon that ended by itself ends the keeper: it holds
// no device, and either it meant to end or it never got as far as hello, as
// after a mistake in its flags, which a restart does not mend.
func (k *keeper) finished(e exit) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.devices) == 0 && !e.killed && (e.code == 0 || !k.greeted)
}

// runDaemon runs the daemon once.
func (k *keeper) runDaemon(ctx context.Context) (exit, error) {
	type started struct {
		cmd *exec.Cmd
		err error
	}
	up := make(chan started, 1)
	ended := make(chan error, 1)
	k.work.Add(1)
	go func() {
		defer k.work.Done()
		// The kernel sends the death signal when the thread that started the
		// daemon ends, not the process: so the thread waits with it.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		_ = setIOFlusher(true) // the daemon inherits it; takePrivileges has reported a refusal
		cmd := k.daemonCommand()
		err := k.children.start(cmd)
		_ = setIOFlusher(false)
		up <- started{cmd, err}
		if err == nil {
			ended <- k.children.wait(cmd)
		}
	}()
	s := <-up
	if s.err != nil {
		return exit{}, holdfast.Errorf(holdfast.ErrInternal, "start %s: %w", k.opts.Command[0], s.err)
	}
	begin := time.Now()
	k.log.Info("daemon started", slog.Int("pid", s.cmd.Process.Pid))
	var err error
	select {
	case err = <-ended:
	case <-ctx.Done():
		_ = s.cmd.Process.Signal(unix.SIGTERM)
		select {
		case err = <-ended:
		case <-time.After(k.opts.DaemonGrace):
			k.log.Error("daemon killed: it did not end in time", slog.Duration("grace", k.opts.DaemonGrace))
			_ = s.cmd.Process.Kill()
			err = <-ended
		}
	}
	k.noteChange()
	return exitOf(err, time.Since(begin)), nil
}

// daemonCommand is the daemon's process: in a mount namespace of its own, from
// which nothing propagates (syscall makes it private), and gone when the keeper
// is. It shares the keeper's lock: the next keeper starts when both are dead.
func (k *keeper) daemonCommand() *exec.Cmd {
	cmd := exec.Command(k.opts.Command[0], k.opts.Command[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = nil, os.Stdout, os.Stderr
	cmd.Env = append(stageless(), environment+"="+SocketPath(k.opts.DataDir), lockVariable+"="+strconv.Itoa(firstExtraFD))
	cmd.ExtraFiles = []*os.File{k.lock}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL, Setpgid: true}
	if k.namespace != 0 {
		cmd.SysProcAttr.Unshareflags = unix.CLONE_NEWNS
	}
	return cmd
}

func exitOf(err error, ran time.Duration) exit {
	e := exit{ran: ran}
	var x *exec.ExitError
	switch {
	case err == nil:
	case errors.As(err, &x):
		status, ok := x.Sys().(syscall.WaitStatus)
		if ok && status.Signaled() {
			e.code, e.killed = 128+int(status.Signal()), true
		} else {
			e.code = x.ExitCode()
		}
	default:
		e.code = 1
	}
	return e
}
