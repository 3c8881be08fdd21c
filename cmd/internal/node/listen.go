package node

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
)

// listenTCP binds the port of address on the listen host, if one is given. A
// taken port is ErrInvalid and names flag and port: it is the operator's to
// choose another.
func listenTCP(flag, address, listen string) (net.Listener, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "%s %q: %w", flag, address, err)
	}
	l, err := net.Listen("tcp", net.JoinHostPort(cmp.Or(listen, host), port))
	if err != nil {
		return nil, listenError(flag, address, port, err)
	}
	return l, nil
}

func listenError(flag, address, port string, err error) error {
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return holdfast.Errorf(holdfast.ErrInvalid, "%s %s: port %s is taken", flag, address, port).WithRemedy("stop what listens there, or give another %s", flag)
	case errors.Is(err, unix.EACCES):
		return holdfast.Errorf(holdfast.ErrInvalid, "%s %s: this process may not listen on port %s", flag, address, port).
			WithRemedy("give %s with a port of 1024 or more, or run it with CAP_NET_BIND_SERVICE", flag)
	}
	return holdfast.Errorf(holdfast.ErrInvalid, "%s %s: %w", flag, address, err).WithRemedy("give an address of this host")
}

// listenUnix replaces whatever socket stands at path; the caller owns the
// directory, so it can only be a dead one.
func listenUnix(path string, mode os.FileMode) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	if err := os.Chmod(path, mode); err != nil {
		l.Close()
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	return l, nil
}
