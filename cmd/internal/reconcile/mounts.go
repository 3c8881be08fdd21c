package reconcile

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev"
	"github.com/holdfast-storage/holdfast/raftstore/state"
	"github.com/holdfast-storage/holdfast/replication/attachment"
)

// DeviceSpec names the kernel device of a volume.
type DeviceSpec struct {
	Volume  holdfast.VolumeID
	Name    string
	Size    int64
	Session holdfast.SessionID
	Epoch   holdfast.Epoch
	// Base is the first epoch of those that only this node was given: a device
	// made before it must not go on.
	Base holdfast.Epoch
	// Continuous: nothing acknowledged to the session is lost.
	Continuous bool
}

// Devices makes kernel devices and mounts their file systems. All methods are
// idempotent and may be called concurrently, but for one volume one at a time.
type Devices interface {
	// Open serves dev as a kernel device and returns its path. A device that an
	// earlier run of this daemon served goes on without an I/O error if the
	// spec allows; else it is aborted and made anew.
	Open(ctx context.Context, dev blockdev.Device, spec DeviceSpec) (path string, err error)
	// Probe says what speaks against the device being blank, "" if nothing does.
	Probe(ctx context.Context, id holdfast.VolumeID) (what string, err error)
	// Format makes a file system on a device that holds nothing. again: raft
	// says that it was begun before, so that it was never mounted.
	Format(ctx context.Context, id holdfast.VolumeID, fs, options string, again bool) error
	// Mount checks and mounts the file system and returns where its files are.
	Mount(ctx context.Context, id holdfast.VolumeID, fs, options string) (path string, err error)
	// Path returns where a volume's files are mounted, "" if they are not.
	Path(name string) string
	// Hold and Release count the users of a mount; last: no user is left.
	Hold(name, user string) error
	Drop(name, user string) (last bool, err error)
	// Users returns the ids that hold a volume's mount.
	Users(name string) []string
	// Close unmounts, if mounted, and ends the device. It is ErrRefused while
	// the mount is in use, unless forced.
	Close(ctx context.Context, id holdfast.VolumeID, name string, force bool) error
	// Abort ends a device at once: applications see I/O errors.
	Abort(ctx context.Context, id holdfast.VolumeID) error
	// Release stops serving every device without ending it: the next run goes on.
	Release(ctx context.Context)
	// Sweep aborts the devices that nobody wants.
	Sweep(ctx context.Context, wanted func(holdfast.VolumeID) bool)
}

// Mount mounts a volume's file system on this node for one user and returns
// where its files are. The first mount of a volume makes the file system.
func (a *Attachments) Mount(ctx context.Context, name, user string, waiting func(string)) (string, error) {
	v, err := a.Find(ctx, name)
	if err != nil {
		return "", err
	}
	if a.o.Devices == nil {
		return "", holdfast.Errorf(holdfast.ErrRefused, "this node cannot mount volumes").WithRemedy("run the node as root with its keeper; see holdfast status")
	}
	ctx, cancel := a.bound(ctx)
	defer cancel()
	h, err := a.enter(ctx, v.ID)
	if err != nil {
		return "", err
	}
	defer a.leave(v.ID, h)
	var path string
	if _, err = a.attach(ctx, h, v.ID, AttachOptions{Device: true, Waiting: waiting}); err == nil {
		path, err = a.mount(ctx, h, v.ID)
	}
	if err == nil {
		err = a.o.Devices.Hold(name, user)
	}
	if err == nil {
		return path, nil
	}
	if h.active() != nil && len(a.o.Devices.Users(name)) == 0 {
		// Nothing half done: the next Mount, here or elsewhere, starts afresh.
		undo, done := context.WithTimeout(context.WithoutCancel(ctx), undoWithin)
		defer done()
		if err := a.lastLeft(undo, h, v.ID); err != nil {
			a.o.Logger.Warn("detach after a failed mount", "volume", name, "err", err)
		}
	}
	return "", fmt.Errorf("mount volume %s: %w", name, err)
}

// undoWithin bounds what a failed mount does to leave nothing half done.
const undoWithin = 10 * time.Second

// lastLeft ends the device, and the attachment unless NBD clients keep it.
func (a *Attachments) lastLeft(ctx context.Context, h *held, id holdfast.VolumeID) error {
	if a.used(id).NBD && h.active() != nil {
		return a.closeDevice(ctx, h, id, false)
	}
	return a.detach(ctx, h, id, false)
}

// mount formats what was never formatted, and mounts. Raft records formatting
// before mkfs and formatted after it, so that data is never formatted over.
func (a *Attachments) mount(ctx context.Context, h *held, id holdfast.VolumeID) (string, error) {
	view, err := a.o.Cluster.Read(ctx)
	if err != nil {
		return "", err
	}
	v, ok := view.Volume(id)
	if !ok || v.Deleted {
		return "", holdfast.Errorf(holdfast.ErrNotFound, "volume %v was removed", id)
	}
	if v.Format != holdfast.FormatDone {
		if err := a.format(ctx, h, v); err != nil {
			return "", err
		}
	}
	return a.o.Devices.Mount(ctx, id, v.Options.FS, v.Options.MountOptions)
}

func (a *Attachments) format(ctx context.Context, h *held, v *state.Volume) error {
	h.mu.Lock()
	epoch, att := h.epoch, h.att
	h.mu.Unlock()
	again := v.Format == holdfast.FormatDoing
	set := func(to holdfast.FormatState) error {
		_, err := a.o.Cluster.Propose(ctx, &state.SetFormat{Volume: v.ID, Epoch: epoch, To: to})
		return err
	}
	if !again {
		if err := a.mustBeBlank(ctx, v, att.Status()); err != nil {
			return err
		}
		if err := set(holdfast.FormatDoing); err != nil {
			return err
		}
	}
	if err := a.o.Devices.Format(ctx, v.ID, v.Options.FS, v.Options.Mkfs, again); err != nil {
		return err
	}
	a.o.Logger.Info("file system made", "volume", v.Name, "fs", v.Options.FS)
	return set(holdfast.FormatDone)
}

// mustBeBlank refuses to format a volume that was ever written, or that looks
// as if it held something: once "formatting" stands in raft, mkfs asks no more.
func (a *Attachments) mustBeBlank(ctx context.Context, v *state.Volume, s attachment.Status) error {
	what, err := a.o.Devices.Probe(ctx, v.ID)
	if err != nil {
		return err
	}
	for _, seg := range s.Segments {
		if what == "" && seg.State.Tail > 0 {
			what = "data that was written without a file system"
		}
	}
	if what == "" {
		return nil
	}
	return holdfast.Errorf(holdfast.ErrRefused, "volume %s was never formatted by holdfast and holds %s", v.Name, what).
		WithRemedy("use it over NBD, or remove it and create another: it is not formatted over")
}

// Unmount ends one user's use of a mount. When the last one leaves, everything
// is written out, the volume is unmounted and detached.
func (a *Attachments) Unmount(ctx context.Context, name, user string) error {
	v, err := a.Find(ctx, name)
	if errors.Is(err, holdfast.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if a.o.Devices == nil {
		return nil
	}
	bounded, cancel := a.bound(ctx)
	defer cancel()
	h, err := a.enter(bounded, v.ID)
	if err != nil {
		return err
	}
	defer a.leave(v.ID, h)
	last, err := a.o.Devices.Drop(name, user)
	if err != nil || !last {
		return err
	}
	if err = a.lastLeft(bounded, h, v.ID); err != nil {
		// The user is gone and nobody asks again: go on without it, or the
		// volume stays here, mounted by no one.
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.ctx.Err() == nil {
			a.wg.Go(func() { a.finishUnmount(v.ID, name) })
		}
	}
	return err
}

// finishUnmount ends what an Unmount could not in its time, unless somebody
// uses the mount again.
func (a *Attachments) finishUnmount(id holdfast.VolumeID, name string) {
	for a.ctx.Err() == nil {
		select {
		case <-time.After(retryEvery):
		case <-a.ctx.Done():
			return
		}
		h, err := a.enter(a.ctx, id)
		if err != nil {
			return
		}
		if len(a.o.Devices.Users(name)) > 0 {
			a.leave(id, h)
			return
		}
		err = a.lastLeft(a.ctx, h, id)
		a.leave(id, h)
		if err == nil {
			return
		}
		a.o.Logger.Warn("unmount goes on", "volume", name, "err", err)
	}
}

// Path returns where a volume is mounted on this node, "" if it is not.
func (a *Attachments) Path(name string) string {
	if a.o.Devices == nil {
		return ""
	}
	return a.o.Devices.Path(name)
}

// Users returns the ids that hold a volume's mount on this node.
func (a *Attachments) Users(name string) []string {
	if a.o.Devices == nil {
		return nil
	}
	return a.o.Devices.Users(name)
}
