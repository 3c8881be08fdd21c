package keeper

import (
	"context"
	"log/slog"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/hostdev"
)

const (
	// endWait bounds the wait for a connection to end once its loop device is
	// cleared; what still uses it then is cut off.
	endWait = 10 * time.Second
	// endPoll is how often that is looked at; the kernel tells nobody.
	endPoll = 5 * time.Millisecond
)

// device is one kernel device. A device's calls that wait for the device itself
// (which its daemon serves) run one at a time under turn; lending and aborting
// do not take turns, since they are what such a call may be waiting for.
type device struct {
	turn chan struct{} // holds one token

	// Guarded by keeper.mu; conn, once set, is only closed by the turn's holder.
	spec    DeviceSpec
	conn    *hostdev.Connection
	loop    string  // /dev/loopN, "" before the verb loop
	lender  *daemon // who has or last had the descriptor; nil before the first
	busy    verb
	removed bool // no longer among the keeper's devices
}

// find returns a device, or nil.
func (k *keeper) find(volume holdfast.VolumeID) *device {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.devices[volume]
}

func (k *keeper) mustFind(volume holdfast.VolumeID) (*device, error) {
	if d := k.find(volume); d != nil {
		return d, nil
	}
	return nil, holdfast.Errorf(holdfast.ErrNotFound, "the keeper holds no device for volume %v", volume)
}

// inTurn runs work, which may wait for the device, when no other such call
// runs. It returns at ctx's end at the latest; work then goes on in the
// background, holding the turn. work's own context ends with ctx.
func (k *keeper) inTurn(ctx context.Context, d *device, v verb, work func(context.Context) (string, error)) (string, error) {
	select {
	case <-d.turn:
	case <-ctx.Done():
		k.mu.Lock()
		busy := d.busy
		k.mu.Unlock()
		return "", holdfast.Errorf(holdfast.ErrTimeout, "%s: the device is busy with %s", v, busy)
	}
	type outcome struct {
		text string
		err  error
	}
	done := make(chan outcome, 1)
	k.mu.Lock()
	removed := d.removed
	d.busy = v
	k.mu.Unlock()
	if removed {
		k.endTurn(d)
		return "", holdfast.Errorf(holdfast.ErrNotFound, "the device was closed")
	}
	k.work.Add(1)
	go func() {
		defer k.work.Done()
		text, err := work(ctx)
		k.endTurn(d)
		done <- outcome{text, err}
	}()
	select {
	case o := <-done:
		return o.text, o.err
	case <-ctx.Done():
	}
	select { // both may be ready
	case o := <-done:
		return o.text, o.err
	default:
		return "", holdfast.Errorf(holdfast.ErrTimeout, "%s goes on: the device did not answer in time", v)
	}
}

func (k *keeper) endTurn(d *device) {
	k.mu.Lock()
	d.busy = ""
	k.mu.Unlock()
	d.turn <- struct{}{}
	k.noteChange()
}

// lend is the verb open: it makes a device or lends one again.
func (k *keeper) lend(ctx context.Context, spec DeviceSpec, to *daemon) (fd int, params hostdev.Params, resend bool, err error) {
	if err := spec.validate(); err != nil {
		return -1, params, false, err
	}
	if k.namespace == 0 {
		return -1, params, false, holdfast.Errorf(holdfast.ErrUnsupported, "this node makes no kernel devices: it has no private mount namespace").WithRemedy("%s", needsAdmin)
	}
	// Two calls for one new device must not both make it.
	select {
	case <-k.opening:
		defer func() { k.opening <- struct{}{} }()
	case <-ctx.Done():
		return -1, params, false, holdfast.Errorf(holdfast.ErrTimeout, "open: %w", ctx.Err())
	}
	d := k.find(spec.Volume)
	if d == nil {
		if d, err = k.create(ctx, spec); err != nil {
			return -1, params, false, err
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if d.removed {
		return -1, params, false, holdfast.Errorf(holdfast.ErrUnavailable, "the old device of volume %s has just been closed; ask again", spec.Name)
	}
	if err := d.mayLend(spec, to); err != nil {
		return -1, params, false, err
	}
	if fd, err = d.conn.Dup(); err != nil {
		return -1, params, false, err
	}
	resend = d.lender != nil
	d.spec.Epoch, d.lender = spec.Epoch, to
	k.log.Info("device lent", d.attrs(slog.Bool("takeover", resend), slog.Int("pid", to.pid))...)
	return fd, d.conn.Params(), resend, nil
}

// mayLend refuses what would show applications another device than the one
// they have open.
func (d *device) mayLend(spec DeviceSpec, to *daemon) error {
	abort := "abort it first; applications then get I/O errors"
	switch {
	case d.spec.Session != spec.Session:
		return holdfast.Errorf(holdfast.ErrRefused, "the device of volume %s is of session %v, not %v", d.spec.Name, d.spec.Session, spec.Session).WithRemedy("%s", abort)
	case d.spec.Size != spec.Size:
		return holdfast.Errorf(holdfast.ErrRefused, "the device of volume %s has %d bytes, not %d", d.spec.Name, d.spec.Size, spec.Size).WithRemedy("%s", abort)
	case d.conn.Ended():
		return holdfast.Errorf(holdfast.ErrRefused, "the connection of volume %s has ended", d.spec.Name).WithRemedy("%s", abort)
	case d.lender != nil && d.lender != to && !d.lender.dead():
		return holdfast.Errorf(holdfast.ErrRefused, "process %d still has the device of volume %s", d.lender.pid, d.spec.Name)
	case d.lender != nil && !d.conn.Params().CanResend():
		return holdfast.Errorf(holdfast.ErrRefused, "this kernel cannot repeat what the dead daemon had read of volume %s", d.spec.Name).WithRemedy("%s", abort)
	}
	return nil
}

// create makes the connection of a new device. The caller holds opening.
func (k *keeper) create(ctx context.Context, spec DeviceSpec) (*device, error) {
	k.mu.Lock()
	full := len(k.devices) >= maxDevices
	var taken holdfast.VolumeID
	for id, d := range k.devices {
		if d.spec.Name == spec.Name {
			taken = id
		}
	}
	k.mu.Unlock()
	if full {
		return nil, holdfast.Errorf(holdfast.ErrRefused, "the keeper holds %d devices already", maxDevices)
	}
	if !taken.IsZero() {
		return nil, holdfast.Errorf(holdfast.ErrRefused, "the name %s is in use by the device of volume %v", spec.Name, taken)
	}
	conn, err := hostdev.Connect(ctx)
	if err != nil {
		return nil, err
	}
	d := &device{turn: make(chan struct{}, 1), spec: spec, conn: conn}
	d.turn <- struct{}{}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.devices[spec.Volume] = d
	return d, nil
}

func (d *device) attrs(more ...any) []any {
	return append([]any{slog.String("volume", d.spec.Name), slog.Uint64("epoch", uint64(d.spec.Epoch)), slog.Uint64("connection", d.conn.ID())}, more...)
}

// forward hands a request for a device on to the mounter, in turn.
func (k *keeper) forward(ctx context.Context, d *device, r request) (string, error) {
	return k.inTurn(ctx, d, r.Verb, func(ctx context.Context) (string, error) {
		if d.conn.Ended() && r.Verb != verbUnmount {
			return "", deadDevice(d)
		}
		return k.askMounter(ctx, d, r)
	})
}

// askMounter hands a request on; the caller has the turn, or needs none.
func (k *keeper) askMounter(ctx context.Context, d *device, r request) (string, error) {
	r.Volume, r.Name = d.spec.Volume, d.spec.Name
	fd := -1
	if r.Verb == verbLoop {
		fd = d.conn.Root()
	}
	a, err := k.mounter.call(ctx, r, fd)
	return a.Text, err
}

func deadDevice(d *device) error {
	return holdfast.Errorf(holdfast.ErrIO, "the device of volume %s is dead: its connection has ended", d.spec.Name).WithRemedy("abort it and attach again")
}

// configureLoop is the verb loop.
func (k *keeper) configureLoop(ctx context.Context, d *device) (string, error) {
	// A takeover asks again while a call of the dead daemon may still have the
	// turn, and that may be waiting for this very takeover.
	k.mu.Lock()
	path := d.loop
	k.mu.Unlock()
	if path != "" {
		return path, nil
	}
	return k.inTurn(ctx, d, verbLoop, func(ctx context.Context) (string, error) {
		if d.conn.Ended() {
			return "", deadDevice(d)
		}
		path, err := k.askMounter(ctx, d, request{Verb: verbLoop})
		if err != nil {
			return "", err
		}
		k.mu.Lock()
		d.loop = path
		k.mu.Unlock()
		d.conn.Release() // from here on the loop device keeps the file system
		k.log.Info("loop device configured", d.attrs(slog.String("device", path))...)
		return path, nil
	})
}

// mount is the verb mount.
func (k *keeper) mount(ctx context.Context, d *device, r request) (string, error) {
	k.mu.Lock()
	draining := k.draining
	k.mu.Unlock()
	if draining {
		return "", holdfast.Errorf(holdfast.ErrUnavailable, "this node is stopping")
	}
	path, err := k.forward(ctx, d, r)
	if err == nil {
		k.log.Info("volume mounted", d.attrs(slog.String("path", path))...)
	}
	return path, err
}

// unmount is the verb unmount.
func (k *keeper) unmount(ctx context.Context, d *device, force bool) error {
	_, err := k.forward(ctx, d, request{Verb: verbUnmount, Force: force})
	if err == nil {
		k.log.Info("volume unmounted", d.attrs(slog.Bool("forced", force))...)
	}
	return err
}

// close is the verb close.
func (k *keeper) close(ctx context.Context, d *device) error {
	_, err := k.inTurn(ctx, d, verbClose, func(ctx context.Context) (string, error) {
		if _, err := k.askMounter(ctx, d, request{Verb: verbClose, Force: d.conn.Ended()}); err != nil {
			return "", err
		}
		k.end(d)
		return "", nil
	})
	return err
}

// abort is the verb abort. Cutting the connection needs no turn: it is what
// ends the calls that wait for the device.
func (k *keeper) abort(ctx context.Context, d *device) error {
	k.log.Warn("device aborted", d.attrs()...)
	k.mu.Lock() // against end, which closes the connection
	err := d.conn.Abort()
	k.mu.Unlock()
	if err != nil {
		return err
	}
	_, err = k.inTurn(ctx, d, verbAbort, func(ctx context.Context) (string, error) {
		if _, err := k.askMounter(ctx, d, request{Verb: verbUnmount, Force: true}); err != nil {
			return "", err
		}
		if _, err := k.askMounter(ctx, d, request{Verb: verbClose, Force: true}); err != nil {
			return "", err
		}
		k.end(d)
		return "", nil
	})
	return err
}

// end forgets the device, whose loop device is cleared. The caller has the turn.
func (k *keeper) end(d *device) {
	d.conn.Release()
	for deadline := time.Now().Add(endWait); !d.conn.Ended(); {
		if time.Now().After(deadline) {
			if err := d.conn.Abort(); err != nil {
				k.log.Error("connection not aborted", d.attrs(slog.Any("error", err))...)
			}
			break
		}
		time.Sleep(endPoll)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	d.conn.Close()
	d.removed = true
	delete(k.devices, d.spec.Volume)
	k.log.Info("device closed", d.attrs()...)
}

// state asks the mounter; it needs no turn.
func (k *keeper) state(ctx context.Context, d *device) (state, error) {
	a, err := k.mounter.call(ctx, request{Verb: verbState, Volume: d.spec.Volume, Name: d.spec.Name}, -1)
	if err != nil || a.State == nil {
		return state{}, err
	}
	return *a.State, nil
}

// describe returns what is told of a device.
func (k *keeper) describe(ctx context.Context, d *device) (Device, error) {
	s, err := k.state(ctx, d)
	if err != nil {
		return Device{}, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	v := Device{DeviceSpec: d.spec, Params: d.conn.Params(), Ended: d.conn.Ended(), Connection: d.conn.ID(), Busy: string(d.busy), Loop: s.Loop}
	if d.lender != nil {
		v.Orphaned = d.lender.dead()
		v.Lent = !v.Orphaned
	}
	if s.Mounted {
		v.MountPath, v.FS, v.ReadOnly = MountPath(k.opts.DataDir, d.spec.Name), s.FS, s.ReadOnly
	}
	return v, nil
}
