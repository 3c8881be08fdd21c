package keeper

import (
	"net"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
)

// peer is the process at the other end of a connection, held by a pidfd, which
// unlike a process id always means the same process.
type peer struct {
	pid   int
	pidfd int
}

// peerOf identifies the process that made a connection and checks that it runs
// as the keeper's user.
func peerOf(conn *net.UnixConn) (*peer, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, holdfast.Errorf(holdfast.ErrInternal, "look at the peer: %w", err)
	}
	var p *peer
	var perr error
	if err := raw.Control(func(fd uintptr) { p, perr = peerOfSocket(int(fd)) }); err != nil {
		perr = err
	}
	if perr != nil {
		return nil, holdfast.Errorf(holdfast.KindOf(perr), "look at the peer: %w", perr)
	}
	return p, nil
}

func peerOfSocket(fd int) (*peer, error) {
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return nil, err
	}
	if int(cred.Uid) != unix.Geteuid() {
		return nil, holdfast.Errorf(holdfast.ErrRefused, "user %d may not talk to this keeper", cred.Uid)
	}
	// SO_PEERPIDFD (Linux 6.5) leaves no moment in which the id could be reused.
	pidfd, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	if err != nil {
		if pidfd, err = unix.PidfdOpen(int(cred.Pid), 0); err != nil {
			return nil, err
		}
	}
	unix.CloseOnExec(pidfd)
	return &peer{pid: int(cred.Pid), pidfd: pidfd}, nil
}

// dead says whether the process has ended, all its threads and descriptors with
// it: a pidfd is readable from then on.
func (p *peer) dead() bool {
	fds := []unix.PollFd{{Fd: int32(p.pidfd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n == 1 && fds[0].Revents&unix.POLLIN != 0
}

func (p *peer) close() { _ = unix.Close(p.pidfd) }
