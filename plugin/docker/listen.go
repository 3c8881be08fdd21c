package docker

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

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
	lock, err := reserve(path)
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

// CheckSocket says what keeps Serve from path, before anything else is started: a
// path that no plugin's socket can have or that cannot be made is ErrInvalid; what
// another process serves, or is not a socket, is ErrRefused.
func CheckSocket(path string) error {
	lock, err := reserve(path)
	if err != nil {
		return err
	}
	defer lock.Close()
	return replaceable(path)
}

// reserve checks path, makes its directory and takes the lock beside it.
func reserve(path string) (*os.File, error) {
	if !filepath.IsAbs(path) || !strings.HasSuffix(path, ".sock") {
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "plugin socket %q is not an absolute path that ends in .sock", path).
			WithRemedy("give for example --plugin-socket /run/docker/plugins/holdfast.sock")
	}
	if len(path) > maxSocketPath {
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "socket path %q has %d bytes", path, len(path)).
			WithRemedy("a unix socket's path has at most %d", maxSocketPath)
	}
	// The node may start before the engine has made its directory.
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, unusable(path, err)
	}
	return lockFile(path)
}

func unusable(path string, err error) error {
	return holdfast.Errorf(holdfast.ErrInvalid, "plugin socket %s: %w", path, err).
		WithRemedy("give another --plugin-socket, or --plugin-socket= for none")
}

// remove takes the path away: from here no engine finds the socket.
func (s *plugSocket) remove() error { return removeSocket(s.path) }

// release gives up the lock. The lock file stays: removing it would let two
// owners each hold a lock on a file of that name.
func (s *plugSocket) release() error { return s.lock.Close() }

// lockFile takes an exclusive lock beside a socket, that ends with the process.
func lockFile(socket string) (*os.File, error) {
	path := socket + ".lock"
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, unusable(socket, err)
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

// replaceable refuses what stands at path and is not a socket: it is not ours to
// remove.
func replaceable(path string) error {
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
	return nil
}

// removeSocket removes a socket at path; nothing there is success.
func removeSocket(path string) error {
	if err := replaceable(path); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove plugin socket %s: %w", path, err)
	}
	return nil
}
