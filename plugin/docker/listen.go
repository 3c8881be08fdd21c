package docker

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
)

// maxSocketPath is what a unix socket address can hold (sun_path, less its zero).
const maxSocketPath = 107

// plugSocket is a listening unix socket whose path exists only while it is held.
type plugSocket struct {
	net.Listener
	path string
	lock *os.File
}

// openSocket takes the lock beside path, removes what a dead owner left at path,
// and listens there. It is ErrRefused while another process holds the lock, and
// when path is something other than a socket.
func openSocket(path string) (*plugSocket, error) {
	if len(path) > maxSocketPath {
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "socket path %q has %d bytes", path, len(path)).
			WithRemedy("a unix socket's path has at most %d", maxSocketPath)
	}
	// The node may start before the engine has made its directory.
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("make the directory of plugin socket %s: %w", path, err)
	}
	lock, err := lockFile(path + ".lock")
	if err != nil {
		return nil, err
	}
	if err := removeSocket(path); err != nil {
		lock.Close()
		return nil, err
	}
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		lock.Close()
		return nil, fmt.Errorf("listen on plugin socket %s: %w", path, err)
	}
	s := &plugSocket{Listener: listener, path: path, lock: lock}
	// Only root's engine has business here. The path is removed by remove, while
	// connections are still served, and not by closing the listener.
	listener.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("protect plugin socket %s: %w", path, err), s.remove(), listener.Close(), s.release())
	}
	return s, nil
}

// remove takes the path away: from here no engine finds the socket.
func (s *plugSocket) remove() error { return removeSocket(s.path) }

// release gives up the lock. The lock file stays: removing it would let two
// owners each hold a lock on a file of that name.
func (s *plugSocket) release() error { return s.lock.Close() }

// lockFile takes an exclusive lock that ends with the process.
func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the lock of the plugin socket: %w", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		return f, nil
	}
	f.Close()
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, holdfast.Errorf(holdfast.ErrRefused, "another process serves the plugin socket: %s is locked", path).
			WithRemedy("stop the other node on this host, or give this one another --plugin-socket")
	}
	return nil, fmt.Errorf("lock %s: %w", path, err)
}

// removeSocket removes a socket at path; nothing there is success, and anything
// else there is not ours to remove.
func removeSocket(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look at plugin socket %s: %w", path, err)
	}
	if info.Mode()&os.ModeSocket == 0 {
		return holdfast.Errorf(holdfast.ErrRefused, "%s is not a socket", path).WithRemedy("move it away, or give another --plugin-socket")
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove plugin socket %s: %w", path, err)
	}
	return nil
}
