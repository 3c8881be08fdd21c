package keeper

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
)

// A keeper is two processes, and becomes so in stages: the process that is
// started (PID 1 of the container) starts the mounter, which stays in the mount
// namespace that both were born in; then it moves to a private copy of that
// namespace, which only one of its threads can do, and executes itself anew, so
// that all are there. Each stage runs the same program with the same arguments
// and finds out from the environment which one it is.
//
//	(none)  --starts-->  mounter
//	   \--unshare, exec-->  keeper  --starts-->  daemon

const (
	stageVariable  = "HOLDFAST_KEEPER_STAGE"
	stageMounter   = "mounter"
	stageKeeper    = "keeper"
	socketVariable = "HOLDFAST_KEEPER_FD" // the descriptor of the stage's end of their socket
	// firstExtraFD is the number of exec.Cmd.ExtraFiles' first file in the child.
	firstExtraFD = 3
)

// firstStage starts the mounter and executes the keeper; it returns only with
// an error.
func firstStage() error {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return holdfast.Errorf(holdfast.ErrInternal, "make a socket pair: %w", err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "mounter")
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(stageless(), stageVariable+"="+stageMounter, socketVariable+"="+strconv.Itoa(firstExtraFD))
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // a terminal's interrupt is the keeper's alone
	if err := cmd.Start(); err != nil {
		return holdfast.Errorf(holdfast.ErrInternal, "start the mounter: %w", err)
	}
	_ = theirs.Close()
	runtime.LockOSThread() // and never unlock: this thread becomes the process
	// Without the privilege there are no kernel devices; the rest still works.
	err = unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS)
	if err != nil && !errors.Is(err, unix.EPERM) {
		return holdfast.Errorf(holdfast.ErrInternal, "make a private mount namespace: %w", err)
	}
	if err == nil {
		if err := unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return holdfast.Errorf(holdfast.ErrInternal, "make the mount namespace private: %w", err)
		}
	}
	if _, err := unix.FcntlInt(uintptr(pair[0]), unix.F_SETFD, 0); err != nil {
		return holdfast.Errorf(holdfast.ErrInternal, "keep the mounter's socket: %w", err)
	}
	env := append(stageless(), stageVariable+"="+stageKeeper, socketVariable+"="+strconv.Itoa(pair[0]))
	err = unix.Exec("/proc/self/exe", os.Args, env)
	return holdfast.Errorf(holdfast.ErrInternal, "execute the keeper: %w", err)
}

// stageless is the environment without the stages' variables.
func stageless() []string {
	var env []string
	for _, kv := range os.Environ() {
		if !strings.HasPrefix(kv, stageVariable+"=") && !strings.HasPrefix(kv, socketVariable+"=") {
			env = append(env, kv)
		}
	}
	return env
}

// stageSocket is this stage's end of the socket between keeper and mounter.
func stageSocket() (*packets, error) {
	fd, err := strconv.Atoi(os.Getenv(socketVariable))
	if err != nil {
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "%s: %w", socketVariable, err)
	}
	unix.CloseOnExec(fd)
	f := os.NewFile(uintptr(fd), "stage socket")
	defer f.Close()
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, holdfast.Errorf(holdfast.ErrInternal, "take the stage's socket: %w", err)
	}
	u, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "%s is not a unix socket", socketVariable)
	}
	return newPackets(u), nil
}

// mounterStage is the mounter's whole life.
func mounterStage(ctx context.Context, opts Options) (code int, err error) {
	p, err := stageSocket()
	if err != nil {
		return 1, err
	}
	if err := runMounter(ctx, p, opts.DataDir, opts.Logger); err != nil {
		return 1, err
	}
	return 0, nil
}

// prepareDataDir makes what every stage needs and returns the directory as the
// mount table spells it.
func prepareDataDir(dir string) (string, error) {
	if err := os.MkdirAll(mountsDir(dir), 0o711); err != nil {
		return "", holdfast.Errorf(holdfast.ErrIO, "make the directory of mounts: %w", err)
	}
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return "", holdfast.Errorf(holdfast.ErrIO, "resolve the data directory: %w", err)
	}
	return real, nil
}
