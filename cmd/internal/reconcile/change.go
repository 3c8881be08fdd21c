package reconcile

import (
	"context"
	"errors"
	"fmt"
	iofs "io/fs"
	"path/filepath"
	"slices"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/disk"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

// Know takes the list of this node's disks, from an earlier start and its flags,
// and keeps it for the next.
func (d *Disks) Know(list []DiskSpec) error {
	d.changing.Lock()
	defer d.changing.Unlock()
	return d.know(list)
}

// know keeps a list. The caller holds changing.
func (d *Disks) know(list []DiskSpec) error {
	d.mu.Lock()
	d.known = slices.Clone(list)
	d.mu.Unlock()
	if d.o.Save == nil {
		return nil
	}
	if err := d.o.Save(list); err != nil {
		return fmt.Errorf("keep the list of disks: %w", err)
	}
	return nil
}

// without is the list of known disks without the one of a path.
func (d *Disks) without(path string) []DiskSpec {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(d.known), func(k DiskSpec) bool { return k.Path == path })
}

// Add claims a device or an image and serves it, now and after every restart. What
// is in use is refused, what holds something else unless forced; this node's own
// disk, one that did not open at its start, is opened as it is. ErrExists if it is
// open already.
func (d *Disks) Add(ctx context.Context, spec DiskSpec, force bool) (holdfast.DiskID, error) {
	d.changing.Lock()
	defer d.changing.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(d.ctx, cancel)() // Close does not wait for raft
	if d.o.None {
		return holdfast.DiskID{}, holdfast.Errorf(holdfast.ErrRefused, "this node was started with --disk none").WithRemedy("start it without that flag first")
	}
	for _, o := range d.List() {
		if o.Path == spec.Path {
			return o.Stat.Disk, holdfast.Errorf(holdfast.ErrExists, "%s is disk %v of this node, and open", spec.Path, o.Stat.Disk).WithRemedy("see holdfast disk inspect %v", o.Stat.Disk)
		}
	}
	if err := d.Check(spec); err != nil {
		return holdfast.DiskID{}, err
	}
	if err := d.Prepare(ctx, spec, force); err != nil {
		return holdfast.DiskID{}, err
	}
	id, err := d.openOne(ctx, spec)
	if errors.Is(err, state.ReasonRemoved) {
		// It was removed, and its node did not live to erase it.
		if !force {
			return id, holdfast.Errorf(holdfast.ErrRefused, "%w", err).WithRemedy("use --force to make a new disk of it")
		}
		if err := disk.Erase(d.o.FS, spec.Path, id); err != nil {
			return id, err
		}
		if err := d.Prepare(ctx, spec, true); err != nil {
			return id, err
		}
		id, err = d.openOne(ctx, spec)
	}
	if err != nil {
		return id, err
	}
	spec.Removed = false
	return id, d.know(append(d.without(spec.Path), spec))
}

// Check refuses a new disk of which Prepare would tell less clearly or, as of a size
// that is not the one that is there, not at all. An empty file is as good as none.
func (d *Disks) Check(spec DiskSpec) error {
	st, err := d.o.FS.Stat(spec.Path)
	switch {
	case err != nil && !errors.Is(err, iofs.ErrNotExist), err == nil && st.Kind != vfs.KindRegular && st.Kind != vfs.KindBlockDevice:
		return nil // Format says what it is
	case err == nil && spec.Size != 0 && st.Size != 0 && st.Size != spec.Size:
		return holdfast.Errorf(holdfast.ErrRefused, "%s is there and has %s (%d bytes), not the size %s (%d bytes) that was given",
			spec.Path, holdfast.FormatSize(st.Size), st.Size, holdfast.FormatSize(spec.Size), spec.Size).
			WithRemedy("leave size= out: what is there is used as it is, neither grown nor cut")
	case err == nil && st.Size != 0:
		return nil
	}
	dir := filepath.Dir(spec.Path)
	if st, err := d.o.FS.Stat(dir); errors.Is(err, iofs.ErrNotExist) || err == nil && st.Kind != vfs.KindDirectory {
		return holdfast.Errorf(holdfast.ErrNotFound, "%s: there is no directory %s on this node", spec.Path, dir).WithRemedy("make it, or mount what belongs there")
	}
	if spec.Size == 0 {
		return holdfast.Errorf(holdfast.ErrInvalid, "%s is not there, or is empty, and no size says how large an image to make", spec.Path).WithRemedy("write %s,size=100G", spec.Path)
	}
	return nil
}

// empty says whether raft knows no replica on a disk, also none to be deleted.
func (d *Disks) empty(id holdfast.DiskID) bool {
	for range d.o.Cluster.View().ReplicasOn(id) {
		return false
	}
	return true
}

// release lets a leaving disk go that raft knows to be empty: raft first, then its
// file, so that nothing is placed on it meanwhile. What fails is tried again.
func (d *Disks) release(ctx context.Context, id holdfast.DiskID, od *openDisk) error {
	d.changing.Lock()
	defer d.changing.Unlock()
	if n := len(od.Replicas()); n > 0 && od.Stat().Failed == nil {
		return holdfast.Errorf(holdfast.ErrRefused, "disk %s holds %d replicas that raft does not know of: it is kept", od.path, n)
	}
	if _, err := d.o.Cluster.Propose(ctx, &state.DiskRemove{Disk: id}); err != nil {
		return err
	}
	od.scrub.close()
	if err := d.o.Serve.RemoveDisk(ctx, id); err != nil {
		return err
	}
	if err := od.Close(); err != nil {
		d.o.Logger.Warn("close a removed disk", "path", od.path, "err", err)
	}
	d.mu.Lock()
	delete(d.open, id)
	d.mu.Unlock()
	d.o.Logger.Info("disk removed", "path", od.path, "disk", id)
	return d.retire(od.path, id)
}

// retire erases a disk that raft removed, and remembers not to open it. The caller
// holds changing.
func (d *Disks) retire(path string, id holdfast.DiskID) error {
	if err := disk.Erase(d.o.FS, path, id); err != nil {
		d.o.Logger.Warn("erase a removed disk", "path", path, "err", err) // raft refuses it in any case
	}
	d.mu.Lock()
	spec := DiskSpec{Path: path}
	for _, k := range d.known {
		if k.Path == path {
			spec = k
		}
	}
	d.mu.Unlock()
	spec.Removed = true
	return d.know(append(d.without(path), spec))
}

// Retire is for a disk that did not open since raft has removed it: this node did
// not live to let it go.
func (d *Disks) Retire(path string) error {
	d.changing.Lock()
	defer d.changing.Unlock()
	id, err := disk.Identify(d.o.FS, path)
	if err != nil {
		return err
	}
	if rec, ok := d.o.Cluster.View().Disk(id); !ok || !rec.Removed {
		return holdfast.Errorf(holdfast.ErrRefused, "disk %s is not known to be removed", path)
	}
	return d.retire(path, id)
}

// giveUp ends what this node's leaving disks wait for that cannot work any more: one
// that failed or did not open deletes nothing. Its replicas are elsewhere by then.
func (d *Disks) giveUp(ctx context.Context) error {
	view := d.o.Cluster.View()
	var errs []error
	for rec := range view.Disks() {
		if rec.Node != d.o.Node || !rec.Leaving {
			continue
		}
		d.mu.Lock()
		od := d.open[rec.ID]
		d.mu.Unlock()
		if od != nil && od.Stat().Failed == nil {
			continue
		}
		if !slices.ContainsFunc(slices.Collect(view.ReplicasOn(rec.ID)), func(p state.Placed) bool { return p.Replica.Role != holdfast.RoleDeleting }) {
			_, err := d.o.Cluster.Propose(ctx, &state.DiskRemove{Disk: rec.ID, Force: true})
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
