package state

import (
	"github.com/holdfast-storage/holdfast"
)

// DiskOpen tells raft that a node opened a disk; the node serves it only after
// this was applied. OpenCount must be above the recorded one, else the image was
// rolled back or cloned; the same count by the same process is the same opening.
// A disk that stands in the tables with another node is refused.
type DiskOpen struct {
	Disk      holdfast.DiskID
	Node      holdfast.NodeID
	Instance  holdfast.InstanceID
	OpenCount holdfast.OpenCount
	Pool      string
	Size      int64 // bytes
	Free      int64 // bytes
	// Failed is the reason why the node opened the disk as failed, "" if it
	// is good. A disk that failed in an earlier life and was verified again
	// opens good, but never with an intact replica.
	Failed string
}

func (*DiskOpen) kind() commandKind { return kindDiskOpen }

func (c *DiskOpen) apply(t *View) (Result, error) {
	node, err := t.liveNode(c.Node)
	if err != nil {
		return Result{}, err
	}
	if node.Instance != c.Instance {
		return Result{}, staleInstance(node)
	}
	if c.Disk.IsZero() || c.OpenCount == 0 {
		return Result{}, invalid("a disk needs an id and an open count")
	}
	if err := checkDiskNumbers(c.Pool, c.Size, c.Free); err != nil {
		return Result{}, err
	}
	if len(c.Failed) > MaxTextLength {
		return Result{}, invalid("a failure reason has %d bytes, more than %d", len(c.Failed), MaxTextLength)
	}
	if have, ok := t.disks.get(c.Disk); ok {
		if have.Node != c.Node {
			return Result{}, refuse(holdfast.ErrRefused, ReasonForeign, "disk %v belongs to node %v: this is a clone, or it was moved", c.Disk, have.Node)
		}
		if have.Removed {
			return Result{}, diskRemoved(have)
		}
		if have.OpenCount == c.OpenCount && have.Instance == c.Instance {
			return Result{}, nil
		}
		if c.OpenCount <= have.OpenCount {
			return Result{}, refuse(holdfast.ErrRefused, ReasonRolledBack,
				"disk %v was opened %d times, but shows %d: its image was rolled back or cloned", c.Disk, have.OpenCount, c.OpenCount)
		}
	}
	d := Disk{ID: c.Disk, Node: c.Node, Instance: c.Instance, OpenCount: c.OpenCount,
		State: holdfast.DiskOK, Pool: c.Pool, Size: c.Size, Free: c.Free}
	if have, ok := t.disks.get(c.Disk); ok {
		d.Leaving = have.Leaving
	}
	if c.Failed != "" {
		d.State, d.Reason = holdfast.DiskFailed, c.Failed
	}
	t.disks = t.disks.set(d.ID, &d)
	return Result{Changed: true}, nil
}

// DiskUpdate tells raft a disk's size and free bytes, now and then: when they
// moved enough to matter for placement.
type DiskUpdate struct {
	Disk       holdfast.DiskID
	OpenCount  holdfast.OpenCount // compared
	Size, Free int64              // bytes
}

func (*DiskUpdate) kind() commandKind { return kindDiskUpdate }

func (c *DiskUpdate) apply(t *View) (Result, error) {
	have, err := t.openDisk(c.Disk, c.OpenCount)
	if err != nil {
		return Result{}, err
	}
	if err := checkDiskNumbers(have.Pool, c.Size, c.Free); err != nil {
		return Result{}, err
	}
	if have.Size == c.Size && have.Free == c.Free {
		return Result{}, nil
	}
	d := *have
	d.Size, d.Free = c.Size, c.Free
	t.disks = t.disks.set(d.ID, &d)
	return Result{Changed: true}, nil
}

// DiskFailed records an I/O error: the disk is out of use for this opening.
// Its replicas stay in the in-sync sets until their writers evict them.
type DiskFailed struct {
	Disk      holdfast.DiskID
	OpenCount holdfast.OpenCount // compared
	Reason    string
}

func (*DiskFailed) kind() commandKind { return kindDiskFailed }

func (c *DiskFailed) apply(t *View) (Result, error) {
	have, err := t.openDisk(c.Disk, c.OpenCount)
	if err != nil {
		return Result{}, err
	}
	if len(c.Reason) > MaxTextLength {
		return Result{}, invalid("a failure reason has %d bytes, more than %d", len(c.Reason), MaxTextLength)
	}
	if have.State == holdfast.DiskFailed {
		return Result{}, nil
	}
	d := *have
	d.State, d.Reason = holdfast.DiskFailed, c.Reason
	t.disks = t.disks.set(d.ID, &d)
	return Result{Changed: true}, nil
}

// SetDiskLeaving says that a disk is to be removed: its replicas are made anew on
// other disks, and nothing is placed on it. Or that it is not, after all.
type SetDiskLeaving struct {
	Disk    holdfast.DiskID
	Leaving bool
}

func (*SetDiskLeaving) kind() commandKind { return kindDiskLeaving }

func (c *SetDiskLeaving) apply(t *View) (Result, error) {
	have, ok := t.disks.get(c.Disk)
	switch {
	case !ok:
		return Result{}, notFound("disk", c.Disk)
	case have.Removed:
		return Result{}, diskRemoved(have)
	case have.Leaving == c.Leaving:
		return Result{}, nil
	}
	d := *have
	d.Leaving = c.Leaving
	t.disks = t.disks.set(d.ID, &d)
	return Result{Changed: true}, nil
}

// DiskRemove removes a leaving disk for ever. It is refused while a replica stands
// on it; one that is being deleted goes with it only by force: for a disk that will
// not be asked again.
type DiskRemove struct {
	Disk  holdfast.DiskID
	Force bool
}

func (*DiskRemove) kind() commandKind { return kindDiskRemove }

func (c *DiskRemove) apply(t *View) (Result, error) {
	have, ok := t.disks.get(c.Disk)
	switch {
	case !ok:
		return Result{}, notFound("disk", c.Disk)
	case have.Removed:
		return Result{}, nil
	case !have.Leaving:
		return Result{}, holdfast.Errorf(holdfast.ErrRefused, "disk %v is not told to leave", c.Disk).WithRemedy("see holdfast disk rm")
	}
	var deleting []holdfast.ReplicaID
	for p := range t.ReplicasOn(c.Disk) {
		if p.Replica.Role != holdfast.RoleDeleting || !c.Force {
			return Result{}, holdfast.Errorf(holdfast.ErrRefused, "disk %v has a replica of volume %s, %s", c.Disk, p.Volume.Name, p.Replica.Role).
				WithRemedy("wait until it is moved: holdfast disk inspect %v", c.Disk)
		}
		deleting = append(deleting, p.Replica.ID)
	}
	for _, id := range deleting {
		if _, err := (&ReplicaGone{Replica: id}).apply(t); err != nil {
			return Result{}, err
		}
	}
	d := *have
	d.Removed = true
	t.disks = t.disks.set(d.ID, &d)
	return Result{Changed: true}, nil
}

func diskRemoved(d *Disk) error {
	return refuse(holdfast.ErrRefused, ReasonRemoved, "disk %v was removed", d.ID)
}

func (t *View) openDisk(id holdfast.DiskID, count holdfast.OpenCount) (*Disk, error) {
	d, ok := t.disks.get(id)
	if !ok {
		return nil, notFound("disk", id)
	}
	if d.Removed {
		return nil, diskRemoved(d)
	}
	if d.OpenCount != count {
		return nil, refuse(holdfast.ErrRefused, ReasonStaleRevision, "disk %v is at open count %d, not %d", id, d.OpenCount, count)
	}
	return d, nil
}

func staleInstance(n *Node) error {
	return refuse(holdfast.ErrFenced, ReasonStaleInstance, "a newer process of node %s announced itself, instance %v", n.Name, n.Instance)
}

func checkDiskNumbers(pool string, size, free int64) error {
	if pool != "" {
		if err := checkName("pool", pool); err != nil {
			return err
		}
	}
	if size <= 0 || free < 0 || free > size {
		return invalid("a disk of %d bytes with %d free", size, free)
	}
	return nil
}
