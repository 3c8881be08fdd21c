package keeper

import (
	"context"
	"log/slog"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev"
	"github.com/holdfast-storage/holdfast/blockdev/hostdev"
)

// AttachOptions of Attach.
type AttachOptions struct {
	// Logger is the Server's.
	Logger *slog.Logger
	// Readers is the Server's.
	Readers int
}

// Attached is a Device served as a kernel device of this host.
type Attached struct {
	client *Client
	volume holdfast.VolumeID
	server *hostdev.Server
	path   string
}

// Attach makes dev a kernel device, or takes over the one that a dead daemon
// left, if it has the same session: it opens the device, serves it (requests
// the dead daemon had read come again) and configures the loop device.
func Attach(ctx context.Context, c *Client, dev blockdev.Device, spec DeviceSpec, opts AttachOptions) (*Attached, error) {
	opened, err := c.OpenDevice(ctx, spec)
	if err != nil {
		return nil, err
	}
	server, err := hostdev.Serve(dev, opened.FD, opened.Params, hostdev.Options{Logger: opts.Logger, Readers: opts.Readers, Resend: opened.Resend})
	if err != nil {
		return nil, err
	}
	path, err := c.ConfigureLoop(ctx, spec.Volume)
	if err != nil {
		server.Close(ctx) // the keeper still has the device: Attach again, or Abort
		return nil, err
	}
	return &Attached{client: c, volume: spec.Volume, server: server, path: path}, nil
}

// Path returns /dev/loopN.
func (a *Attached) Path() string { return a.path }

// Server returns the server of its requests.
func (a *Attached) Server() *hostdev.Server { return a.server }

// Done is closed when requests are no longer answered: the device was closed or
// aborted, or Close was called.
func (a *Attached) Done() <-chan struct{} { return a.server.Done() }

// Close stops serving and leaves the device to the keeper: requests wait for
// whoever attaches next. It comes before the Device behind it is closed.
func (a *Attached) Close(ctx context.Context) { a.server.Close(ctx) }

// Detach ends the device, which must not be mounted, and stops serving it.
func (a *Attached) Detach(ctx context.Context) error {
	if err := a.client.CloseDevice(ctx, a.volume); err != nil {
		return err
	}
	a.server.Close(ctx)
	return nil
}
