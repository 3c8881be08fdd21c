package nbd

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"github.com/holdfast-storage/holdfast"
)

// maxSocketPath is what sockaddr_un holds (unix(7)), less its final zero.
const maxSocketPath = 107

// ListenUnix listens on a unix socket with mode 0660. A socket left over by a
// process that is gone is replaced; one that is in use is ErrExists, anything
// else at the path too. Closing the listener removes the socket. The caller
// sees to it that no two processes do this at once (one data directory has one
// daemon).
func ListenUnix(path string) (net.Listener, error) {
	if len(path) > maxSocketPath {
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "socket path %s has %d bytes, the limit is %d", path, len(path), maxSocketPath).
			WithRemedy("choose a shorter directory")
	}
	if err := removeStale(path); err != nil {
		return nil, err
	}
	// Bound under another name of the same length, given its mode, then
	// renamed: nobody can connect while the mode is what umask left.
	dir, file := filepath.Split(path)
	fresh := dir + "~" + file[1:]
	if fresh == path {
		fresh = dir + "#" + file[1:]
	}
	if err := os.Remove(fresh); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, listenError(path, err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: fresh, Net: "unix"})
	if err != nil {
		return nil, listenError(path, err)
	}
	l.SetUnlinkOnClose(false)
	err = os.Chmod(fresh, 0o660)
	if err == nil {
		err = os.Rename(fresh, path)
	}
	if err != nil {
		_ = l.Close()
		_ = os.Remove(fresh) // the error at hand says more
		return nil, listenError(path, err)
	}
	return &unixListener{Listener: l, path: path}, nil
}

func listenError(path string, err error) error {
	return holdfast.Errorf(holdfast.ErrIO, "listen on %s: %w", path, err)
}

// removeStale removes a socket that nobody listens on.
func removeStale(path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return listenError(path, err)
	}
	if st.Mode().Type() != os.ModeSocket {
		return holdfast.Errorf(holdfast.ErrExists, "%s exists and is not a socket", path)
	}
	nc, err := net.Dial("unix", path)
	if err == nil {
		nc.Close()
		return holdfast.Errorf(holdfast.ErrExists, "another process listens on %s", path)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return listenError(path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return listenError(path, err)
	}
	return nil
}

// unixListener removes its socket when closed.
type unixListener struct {
	net.Listener
	path string
	once sync.Once
}

func (l *unixListener) Close() error {
	l.once.Do(func() { _ = os.Remove(l.path) })
	return l.Listener.Close()
}
