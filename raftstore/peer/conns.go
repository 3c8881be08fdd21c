package peer

import (
	"context"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"

	"github.com/holdfast-storage/holdfast"
)

const (
	// maxConns bounds the cached connections; the least is closed at random
	// beyond it, and dialed again when it is needed.
	maxConns = 256
	// maxMessage bounds a received message, in bytes: a command with its answer
	// (raftstore.MaxCommand and a volume of as many segments), or a piece of a snapshot.
	maxMessage = 8 << 20
)

// conns caches one gRPC connection per address. Names are resolved at every dial.
type conns struct {
	dialing []grpc.DialOption

	mu     sync.Mutex // of the fields below
	open   map[string]*grpc.ClientConn
	closed bool
}

func newConns(dialing []grpc.DialOption) *conns {
	base := []grpc.DialOption{
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", address)
		}),
		grpc.WithConnectParams(grpc.ConnectParams{
			// A node that comes back is to be found at once.
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: 2 * time.Second,
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
	}
	return &conns{dialing: append(base, dialing...), open: map[string]*grpc.ClientConn{}}
}

// to returns the connection to an address. It is made when it is first used.
func (c *conns) to(address string) (*grpc.ClientConn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, holdfast.Errorf(holdfast.ErrUnavailable, "the peer is closed")
	}
	if conn := c.open[address]; conn != nil {
		return conn, nil
	}
	// passthrough: the dialer resolves the name, each time.
	conn, err := grpc.NewClient("passthrough:///"+address, c.dialing...)
	if err != nil {
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "address %s: %w", address, err)
	}
	for old, oc := range c.open {
		if len(c.open) < maxConns {
			break
		}
		oc.Close()
		delete(c.open, old)
	}
	c.open[address] = conn
	return conn, nil
}

// drop closes the connection to an address that went silent: TCP would try the
// old one for minutes after the network is whole again.
func (c *conns) drop(address string) {
	c.mu.Lock()
	conn := c.open[address]
	delete(c.open, address)
	c.mu.Unlock()
	if conn != nil {
		conn.Close()
	}
}

func (c *conns) close() {
	c.mu.Lock()
	c.closed = true
	open := c.open
	c.open = map[string]*grpc.ClientConn{}
	c.mu.Unlock()
	for _, conn := range open {
		conn.Close()
	}
}
