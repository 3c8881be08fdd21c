package api

import (
	"context"
	"net"
	"os"
	"strconv"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/cmd/internal/api/apipb"
)

// Where a client looks for a daemon when HOLDFAST_ADDRESS is unset.
const (
	DefaultSocket  = "/run/holdfast/control.sock"
	DefaultAddress = "127.0.0.1:9400"
)

// maxMessage bounds one API message: a list of 10,000 volumes with their
// replicas is about 8 MiB.
const maxMessage = 32 << 20

// Client is a connection to one daemon. Errors of its calls carry root kinds.
type Client struct {
	apipb.HoldfastClient
	conn *grpc.ClientConn
	// Address is what was dialled, for messages.
	Address string
}

// Dial prepares a client for address: unix:///PATH or HOST:PORT; empty means
// the default socket if it exists, else the default address. It does not
// connect yet.
func Dial(address string) (*Client, error) {
	if address == "" {
		address = DefaultAddress
		if _, err := os.Stat(DefaultSocket); err == nil {
			address = "unix://" + DefaultSocket
		}
	}
	target := address
	if path, isUnix := strings.CutPrefix(address, "unix://"); isUnix {
		if !strings.HasPrefix(path, "/") {
			return nil, holdfast.Errorf(holdfast.ErrInvalid, "address %q has no absolute path", address).WithRemedy("write unix:///PATH")
		}
		if err := CheckSocketPath(path); err != nil {
			return nil, err
		}
	} else if _, port, err := net.SplitHostPort(address); err != nil || !isPort(port) {
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "%q is not an address", address).WithRemedy("write unix:///PATH or HOST:PORT")
	} else {
		target = "passthrough:///" + address
	}
	conn, err := grpc.NewClient(target,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
		grpc.WithUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			return FromStatus(invoke(ctx, method, req, reply, cc, opts...))
		}))
	if err != nil {
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "address %q: %w", address, err)
	}
	return &Client{HoldfastClient: apipb.NewHoldfastClient(conn), conn: conn, Address: address}, nil
}

func isPort(s string) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n > 0
}

// Close closes the connection.
func (c *Client) Close() error { return c.conn.Close() }

// maxSocketPath is what sun_path holds, less its final zero byte (unix(7)).
const maxSocketPath = 107

// CheckSocketPath refuses a path that no unix socket can have.
func CheckSocketPath(path string) error {
	if len(path) > maxSocketPath {
		return holdfast.Errorf(holdfast.ErrInvalid, "socket path %s has %d bytes, more than %d", path, len(path), maxSocketPath).WithRemedy("choose a shorter --data-dir or --run-dir")
	}
	return nil
}
