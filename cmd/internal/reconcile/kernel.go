package reconcile

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev"
	"github.com/holdfast-storage/holdfast/blockdev/mount"
	"github.com/holdfast-storage/holdfast/cmd/internal/keeper"
)

// Kernel are kernel devices made and mounted by this node's keeper: this
// process only answers their block requests.
type Kernel struct {
	client *keeper.Client
	counts *mount.Counts
	logger *slog.Logger

	mu      sync.Mutex
	served  map[holdfast.VolumeID]*keeper.Attached
	mounted map[string]string // volume name to where its files are
}

var _ Devices = (*Kernel)(nil)

// NewKernel learns from the keeper what is mounted.
func NewKernel(ctx context.Context, client *keeper.Client, counts *mount.Counts, logger *slog.Logger) (*Kernel, error) {
	k := &Kernel{client: client, counts: counts, logger: logger,
		served: map[holdfast.VolumeID]*keeper.Attached{}, mounted: map[string]string{}}
	devices, err := client.Devices(ctx)
	if err != nil {
		return nil, fmt.Errorf("ask the keeper for its devices: %w", err)
	}
	for _, d := range devices {
		if d.MountPath != "" && !d.Ended {
			k.mounted[d.Name] = d.MountPath
		}
	}
	forgotten, err := counts.Reconcile(func(name string) bool { return k.mounted[name] != "" })
	if err != nil {
		return nil, err
	}
	for _, name := range forgotten {
		logger.Info("users of a mount that is gone are forgotten", "volume", name)
	}
	return k, nil
}

// Open implements Devices.
func (k *Kernel) Open(ctx context.Context, dev blockdev.Device, spec DeviceSpec) (string, error) {
	devices, err := k.client.Devices(ctx)
	if err != nil {
		return "", err
	}
	for _, d := range devices {
		if d.Volume != spec.Volume {
			continue
		}
		if !d.Ended && spec.Continuous && d.Session == spec.Session && d.Epoch >= spec.Base {
			break
		}
		k.logger.Warn("a kernel device cannot go on: its applications see I/O errors", "volume", spec.Name, "ended", d.Ended,
			"continuous", spec.Continuous, "same_session", d.Session == spec.Session, "epoch", uint64(d.Epoch), "base", uint64(spec.Base))
		if err := k.Abort(ctx, spec.Volume); err != nil {
			return "", err
		}
	}
	att, err := keeper.Attach(ctx, k.client, dev, keeper.DeviceSpec{Volume: spec.Volume, Name: spec.Name, Size: spec.Size, Session: spec.Session, Epoch: spec.Epoch}, keeper.AttachOptions{Logger: k.logger})
	if err != nil {
		return "", err
	}
	k.mu.Lock()
	k.served[spec.Volume] = att
	k.mu.Unlock()
	return att.Path(), nil
}

// Probe implements Devices.
func (k *Kernel) Probe(ctx context.Context, id holdfast.VolumeID) (string, error) {
	return k.client.Probe(ctx, id)
}

// Format implements Devices.
func (k *Kernel) Format(ctx context.Context, id holdfast.VolumeID, fs, options string, again bool) error {
	kind, err := mount.ParseFileSystem(fs)
	if err != nil {
		return err
	}
	return k.client.Format(ctx, id, keeper.FormatOptions{FS: kind, Options: options, Again: again})
}

// Mount implements Devices.
func (k *Kernel) Mount(ctx context.Context, id holdfast.VolumeID, fs, options string) (string, error) {
	kind, err := mount.ParseFileSystem(fs)
	if err != nil {
		return "", err
	}
	name, already := "", false
	devices, err := k.client.Devices(ctx)
	if err != nil {
		return "", err
	}
	for _, d := range devices {
		if d.Volume == id {
			name, already = d.Name, d.MountPath != ""
		}
	}
	if !already {
		if err := k.client.Fsck(ctx, id, kind); err != nil {
			return "", err
		}
	}
	path, err := k.client.Mount(ctx, id, keeper.MountOptions{FS: kind, Options: options})
	if err != nil {
		return "", err
	}
	k.mu.Lock()
	k.mounted[name] = path
	k.mu.Unlock()
	return path, nil
}

// Path implements Devices.
func (k *Kernel) Path(name string) string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.mounted[name]
}

// Hold implements Devices.
func (k *Kernel) Hold(name, user string) error {
	_, err := k.counts.Add(name, user)
	return err
}

// Drop implements Devices.
func (k *Kernel) Drop(name, user string) (bool, error) {
	if _, err := k.counts.Remove(name, user); err != nil {
		return false, err
	}
	return len(k.counts.Holders(name)) == 0, nil
}

// Users implements Devices.
func (k *Kernel) Users(name string) []string { return k.counts.Holders(name) }

// Close implements Devices.
func (k *Kernel) Close(ctx context.Context, id holdfast.VolumeID, name string, force bool) error {
	if err := k.client.Unmount(ctx, id, keeper.UnmountOptions{Force: force}); err != nil {
		return err
	}
	k.mu.Lock()
	delete(k.mounted, name)
	att := k.served[id]
	k.mu.Unlock()
	var err error
	if att != nil {
		err = att.Detach(ctx)
	} else {
		err = k.client.CloseDevice(ctx, id)
	}
	if err != nil && force {
		err = k.Abort(ctx, id) // something still has it open: it sees I/O errors
	}
	if err != nil {
		return err
	}
	k.mu.Lock()
	delete(k.served, id)
	k.mu.Unlock()
	return k.forgetUsers(name)
}

func (k *Kernel) forgetUsers(name string) error {
	var errs []error
	for _, user := range k.counts.Holders(name) {
		_, err := k.counts.Remove(name, user)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// Abort implements Devices. Users of the mount stay counted: they are still
// there, with I/O errors, and leave by Unmount.
func (k *Kernel) Abort(ctx context.Context, id holdfast.VolumeID) error {
	devices, err := k.client.Devices(ctx)
	if err != nil {
		return err
	}
	err = k.client.Abort(ctx, id)
	k.mu.Lock()
	att := k.served[id]
	delete(k.served, id)
	for _, d := range devices {
		if d.Volume == id {
			delete(k.mounted, d.Name)
		}
	}
	k.mu.Unlock()
	if att != nil {
		att.Close(ctx)
	}
	return err
}

// Release implements Devices.
func (k *Kernel) Release(ctx context.Context) {
	k.mu.Lock()
	all := k.served
	k.served = map[holdfast.VolumeID]*keeper.Attached{}
	k.mu.Unlock()
	for _, att := range all {
		att.Close(ctx)
	}
}

// Sweep implements Devices.
func (k *Kernel) Sweep(ctx context.Context, wanted func(holdfast.VolumeID) bool) {
	devices, err := k.client.Devices(ctx)
	if err != nil {
		k.logger.Warn("ask the keeper for its devices", "err", err)
		return
	}
	for _, d := range devices {
		if wanted(d.Volume) {
			continue
		}
		k.logger.Warn("a kernel device that nothing here remembers is ended", "volume", d.Name)
		if err := k.Abort(ctx, d.Volume); err != nil {
			k.logger.Warn("end a kernel device", "volume", d.Name, "err", err)
		}
	}
}
