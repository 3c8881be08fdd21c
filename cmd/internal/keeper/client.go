package keeper

import (
	"context"
	"log/slog"
	"net"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/hostdev"
	"github.com/holdfast-storage/holdfast/blockdev/mount"
)

// dialWait bounds the hello.
const dialWait = 10 * time.Second

// DialOptions of Dial.
type DialOptions struct {
	// Instance is this daemon's run.
	Instance holdfast.InstanceID
	// Logger gets what Dial detached; nil discards it.
	Logger *slog.Logger
}

// Client is the daemon's way to its keeper. All methods may be called
// concurrently, wait no longer than their context (two minutes without a
// deadline), may be repeated, and return errors with a root kind. A call whose
// context ends may still take effect; repeating it tells.
type Client struct {
	*caller
	instance holdfast.InstanceID
	lacks    []Lack
}

// Dial reaches the keeper of a data directory and makes this process fit to
// serve devices: it must run in another mount namespace than the keeper, and
// every volume mounted in its copy is detached before Dial returns. So it comes
// before the first device is served.
func Dial(ctx context.Context, dataDir string, opts DialOptions) (*Client, error) {
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	keepLock()
	ctx, cancel := context.WithTimeout(ctx, dialWait)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unixpacket", SocketPath(dataDir))
	if err != nil {
		return nil, holdfast.Errorf(holdfast.ErrUnavailable, "reach the keeper: %w", err)
	}
	c := &Client{caller: newCaller("keeper", newPackets(conn.(*net.UnixConn)))}
	if err := c.hello(ctx, opts); err != nil {
		_ = conn.Close()
		return nil, err
	}
	go c.receive()
	return c, nil
}

func (c *Client) hello(ctx context.Context, opts DialOptions) error {
	deadline, _ := ctx.Deadline()
	_ = c.p.conn.SetReadDeadline(deadline)
	if err := c.p.send(hello{Version: version, Instance: opts.Instance}, -1); err != nil {
		return err
	}
	var h hello
	if _, err := c.p.receive(&h); err != nil {
		return holdfast.Errorf(holdfast.ErrUnavailable, "hello of the keeper: %w", err)
	}
	if h.Error != nil {
		return h.Error.err()
	}
	if h.Version != version {
		return holdfast.Errorf(holdfast.ErrUnsupported, "the keeper speaks version %d, this daemon %d", h.Version, version)
	}
	_ = c.p.conn.SetReadDeadline(time.Time{})
	c.instance, c.lacks = h.Instance, h.Lacks
	if h.Namespace == 0 {
		return nil // a keeper without privilege: there are no devices, see Lacks
	}
	return isolate(h.Namespace, h.Mounts, opts.Logger)
}

// Close ends the conversation. The keeper keeps every device.
func (c *Client) Close() { c.close() }

// Done is closed when the conversation is over; without its keeper a daemon has
// nothing left to serve devices with.
func (c *Client) Done() <-chan struct{} { return c.done }

// Instance names the keeper's run.
func (c *Client) Instance() holdfast.InstanceID { return c.instance }

// Lacks says what this host does not give.
func (c *Client) Lacks() []Lack { return c.lacks }

// Devices returns every device that the keeper holds.
func (c *Client) Devices(ctx context.Context) ([]Device, error) {
	var all []Device
	for page := 0; ; page++ {
		a, err := c.call(ctx, request{Verb: verbDevices, Page: page}, -1)
		if err != nil {
			return nil, err
		}
		all = append(all, a.Devices...)
		if !a.More {
			return all, nil
		}
	}
}

// Opened is a device's descriptor, lent to this daemon.
type Opened struct {
	// FD is a duplicate of the /dev/fuse descriptor; the caller owns it and
	// gives it to hostdev.Serve.
	FD int
	// Params and Resend are for hostdev.Serve.
	Params hostdev.Params
	Resend bool
}

// OpenDevice makes a device, or lends one again that is held with the same
// session, whether a dead daemon left it or this one had it (then the caller's
// Server for it must be closed). Before a device is taken over, the dead
// daemon's writes must be fenced. A device of another session, or one whose
// connection has ended, is an ErrRefused: Abort it first.
func (c *Client) OpenDevice(ctx context.Context, spec DeviceSpec) (*Opened, error) {
	a, err := c.call(ctx, request{Verb: verbOpen, Volume: spec.Volume, Spec: &spec}, -1)
	if err != nil {
		return nil, err
	}
	if a.fd < 0 {
		return nil, holdfast.Errorf(holdfast.ErrInternal, "the keeper lent no descriptor")
	}
	return &Opened{FD: a.fd, Params: a.Params, Resend: a.Resend}, nil
}

// ConfigureLoop puts a loop device on the device, which must be served by now.
// It returns /dev/loopN.
func (c *Client) ConfigureLoop(ctx context.Context, volume holdfast.VolumeID) (path string, err error) {
	a, err := c.call(ctx, request{Verb: verbLoop, Volume: volume}, -1)
	return a.Text, err
}

// Probe says what speaks against the device being blank, "" if nothing does.
func (c *Client) Probe(ctx context.Context, volume holdfast.VolumeID) (what string, err error) {
	a, err := c.call(ctx, request{Verb: verbProbe, Volume: volume}, -1)
	return a.Text, err
}

// Format makes a file system on the device; one that is not blank is an
// ErrRefused.
func (c *Client) Format(ctx context.Context, volume holdfast.VolumeID, opts FormatOptions) error {
	_, err := c.call(ctx, request{Verb: verbFormat, Volume: volume, Format: &opts}, -1)
	return err
}

// Fsck makes the device's file system fit to be mounted, quickly; see mount.Tools.Fsck.
func (c *Client) Fsck(ctx context.Context, volume holdfast.VolumeID, fs mount.FileSystem) error {
	_, err := c.call(ctx, request{Verb: verbFsck, Volume: volume, FS: fs}, -1)
	return err
}

// Mount mounts the device's file system and returns the directory that users
// get. Mounted already: it makes sure that what is mounted is alive. One whose
// connection has ended, or which went read-only after an error, is an ErrIO.
func (c *Client) Mount(ctx context.Context, volume holdfast.VolumeID, opts MountOptions) (path string, err error) {
	a, err := c.call(ctx, request{Verb: verbMount, Volume: volume, Mount: &opts}, -1)
	return a.Text, err
}

// Unmount unmounts the device's file system: on success no mount namespace has
// it any more, and its last write has reached the device. In use is an
// ErrRefused; see UnmountOptions.Force.
func (c *Client) Unmount(ctx context.Context, volume holdfast.VolumeID, opts UnmountOptions) error {
	_, err := c.call(ctx, request{Verb: verbUnmount, Volume: volume, Force: opts.Force}, -1)
	return err
}

// CloseDevice flushes and ends a device that is not mounted: its Server's Done
// is closed on the way. A device that the keeper does not hold is success. An
// ErrIO says that the device failed a write since it was made, and leaves it
// open; the kernel tells that once, so asking again closes it.
func (c *Client) CloseDevice(ctx context.Context, volume holdfast.VolumeID) error {
	_, err := c.call(ctx, request{Verb: verbClose, Volume: volume}, -1)
	return err
}

// Abort ends a device whatever uses it: every request fails with an I/O error,
// now and later, and its mount vanishes. A device that the keeper does not hold
// is success.
func (c *Client) Abort(ctx context.Context, volume holdfast.VolumeID) error {
	_, err := c.call(ctx, request{Verb: verbAbort, Volume: volume}, -1)
	return err
}

// RemovePath removes the bare mountpoint of a volume that was deleted.
func (c *Client) RemovePath(ctx context.Context, name string) error {
	_, err := c.call(ctx, request{Verb: verbRemovePath, Name: name}, -1)
	return err
}
