package node

import (
	"errors"
	"net"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
)

func TestWhyNobodyListens(t *testing.T) {
	for errno, says := range map[error]string{
		unix.EADDRINUSE:    "port 80 is taken",
		unix.EACCES:        "a port of 1024 or more",
		unix.EADDRNOTAVAIL: "give an address of this host",
	} {
		err := listenError("--address", "10.0.0.1:80", "80", &net.OpError{Op: "listen", Err: errno})
		if !errors.Is(err, holdfast.ErrInvalid) || !strings.Contains(err.Error(), "--address 10.0.0.1:80") || !strings.Contains(err.Error(), says) {
			t.Errorf("%v: %v, want invalid saying %q", errno, err, says)
		}
	}
}
