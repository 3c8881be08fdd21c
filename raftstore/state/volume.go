package state

import (
	"slices"

	"github.com/holdfast-storage/holdfast"
)

// ReplicaPlacement puts one new replica on a disk.
type ReplicaPlacement struct {
	Replica holdfast.ReplicaID // fresh
	Disk    holdfast.DiskID
}

// SegmentPlacement is where the replicas of one segment go.
type SegmentPlacement []ReplicaPlacement

// CreateVolume creates a volume whose replicas are all in sync, as all are
// empty. The proposer decides the placement (Place); it is checked here.
type CreateVolume struct {
	Volume    holdfast.VolumeID
	Name      string
	Size      int64 // bytes, whole blocks
	Options   VolumeOptions
	Labels    Labels
	Lineage   holdfast.LineageID
	Created   int64 // Unix seconds
	Placement []SegmentPlacement
}

func (*CreateVolume) kind() commandKind { return kindCreateVolume }

func (c *CreateVolume) apply(t *View) (Result, error) {
	if have, ok := t.volumes.get(c.Volume); ok {
		if !have.Deleted && have.Name == c.Name && have.Size == c.Size && have.Options == c.Options && have.Lineage == c.Lineage {
			return volumeResult(have, false), nil
		}
		return Result{}, refuse(holdfast.ErrRefused, ReasonRemoved, "volume id %v was used before", c.Volume)
	}
	if err := c.validate(); err != nil {
		return Result{}, err
	}
	if other, ok := t.VolumeByName(c.Name); ok {
		return Result{}, holdfast.Errorf(holdfast.ErrExists, "a volume named %s exists", other.Name)
	}
	vol := &Volume{
		ID: c.Volume, Name: c.Name, Size: c.Size, Options: c.Options, Labels: slices.Clone(c.Labels),
		LabelsRevision: 1, Created: c.Created, Phase: PhaseDetached, Since: c.Created, Lineage: c.Lineage, Format: holdfast.FormatNone,
	}
	if err := t.addSegments(vol, c.Placement, 0); err != nil {
		return Result{}, err
	}
	t.names = t.names.set(nameKey(vol.Name), vol)
	t.putVolume(vol)
	return volumeResult(vol, true), nil
}

func (c *CreateVolume) validate() error {
	if c.Volume.IsZero() || c.Lineage.IsZero() {
		return invalid("a volume needs an id and a lineage")
	}
	if err := checkName("volume", c.Name); err != nil {
		return err
	}
	if err := c.Options.validate(); err != nil {
		return err
	}
	if err := c.Labels.validate(); err != nil {
		return err
	}
	want, err := SegmentCount(c.Size, c.Options.SegmentSize)
	if err != nil {
		return err
	}
	if len(c.Placement) != want {
		return invalid("a volume of %d bytes has %d segments of up to %d bytes, not %d", c.Size, want, c.Options.SegmentSize, len(c.Placement))
	}
	return nil
}

func (o VolumeOptions) validate() error {
	switch {
	case o.Replicas < 1 || o.Replicas > MaxReplicas:
		return invalid("%d replicas: 1 to %d are possible", o.Replicas, MaxReplicas)
	case o.MinCopies < 1 || o.MinCopies > o.Replicas:
		return invalid("min_copies=%d: 1 to %d are possible with %d replicas", o.MinCopies, o.Replicas, o.Replicas)
	case o.FailHeldAfter < 0 || o.FailHeldAfter > int64(holdfast.MaxHoldTime.Seconds()):
		return invalid("on_quorum_loss: %d s is not a time of at most %v", o.FailHeldAfter, holdfast.MaxHoldTime)
	case o.SegmentSize < MinSegmentSize || o.SegmentSize%holdfast.RegionSize != 0:
		return invalid("segment_size=%d must be a multiple of %d", o.SegmentSize, holdfast.RegionSize)
	case !slices.Contains(ackModes, o.AckMode):
		return invalid("ack=%q must be %s or %s", o.AckMode, holdfast.AckReceived, holdfast.AckDurable)
	case len(o.FS) > MaxNameLength || len(o.Mkfs) > MaxTextLength || len(o.MountOptions) > MaxTextLength:
		return invalid("a file system option has more than %d bytes", MaxTextLength)
	}
	if o.Pool == "" {
		return nil
	}
	return checkName("pool", o.Pool)
}

// SegmentCount returns how many segments a volume of a size has; sizes are in
// bytes. A size that no volume can have is ErrInvalid.
func SegmentCount(size, segmentSize int64) (int, error) {
	if size <= 0 || size%holdfast.BlockSize != 0 {
		return 0, invalid("a volume size must be a positive multiple of %d bytes, not %d", holdfast.BlockSize, size)
	}
	if segmentSize < MinSegmentSize {
		return 0, invalid("segment_size=%d is below %d", segmentSize, MinSegmentSize)
	}
	n := (size-1)/segmentSize + 1
	if n > MaxSegments {
		return 0, holdfast.Errorf(holdfast.ErrInvalid, "a volume of %s has %d segments of %s, more than %d", holdfast.FormatSize(size), n, holdfast.FormatSize(segmentSize), MaxSegments).
			WithRemedy("give a segment_size of at least %dM", ((size-1)/MaxSegments)/holdfast.RegionSize+1)
	}
	return int(n), nil
}

// addSegments appends placed, empty segments to vol and registers their replicas.
func (t *View) addSegments(vol *Volume, placement []SegmentPlacement, opened holdfast.Epoch) error {
	for _, p := range placement {
		index := len(vol.Segments)
		if len(p) != vol.Options.Replicas {
			return invalid("segment %d is placed on %d disks, not %d", index, len(p), vol.Options.Replicas)
		}
		seg := Segment{
			Size:       min(vol.Options.SegmentSize, vol.Size-int64(index)*vol.Options.SegmentSize),
			ISRVersion: 1, LayoutVersion: 1, Clean: true,
		}
		for _, r := range p {
			if err := t.checkPlace(&seg, vol.Options.Pool, r); err != nil {
				return err
			}
			seg.Replicas = append(seg.Replicas, Replica{ID: r.Replica, Disk: r.Disk, Role: holdfast.RoleInSync, SinceEpoch: opened, Opened: opened, Lineage: vol.Lineage})
			t.putReplica(r.Replica, holdfast.SegmentID{Volume: vol.ID, Index: uint32(index)}, false)
		}
		vol.Segments = append(vol.Segments, seg)
	}
	return nil
}

// checkPlace checks that a new replica may stand on its disk beside those of seg.
func (t *View) checkPlace(seg *Segment, pool string, r ReplicaPlacement) error {
	if r.Replica.IsZero() {
		return invalid("a replica needs an id")
	}
	if _, ok := t.replicas.get(r.Replica); ok {
		return refuse(holdfast.ErrRefused, ReasonRemoved, "replica id %v was used before", r.Replica)
	}
	disk, ok := t.disks.get(r.Disk)
	if !ok {
		return notFound("disk", r.Disk)
	}
	switch {
	case disk.Removed:
		return diskRemoved(disk)
	case disk.State != holdfast.DiskOK:
		return holdfast.Errorf(holdfast.ErrRefused, "disk %v failed: %s", disk.ID, disk.Reason)
	case disk.Leaving:
		return holdfast.Errorf(holdfast.ErrRefused, "disk %v is leaving", disk.ID)
	}
	if pool != "" && disk.Pool != pool {
		return holdfast.Errorf(holdfast.ErrRefused, "disk %v is of pool %q, not %q", disk.ID, disk.Pool, pool)
	}
	if _, err := t.liveNode(disk.Node); err != nil {
		return err
	}
	for _, have := range seg.Replicas {
		// What is abandoned or going away is no copy that could fail with another:
		// a disk's replicas may move to another of its node.
		d, ok := t.disks.get(have.Disk)
		if ok && d.Node == disk.Node && have.Role != holdfast.RoleDeleting && have.Role != holdfast.RoleOrphan && d.Usable() {
			return holdfast.Errorf(holdfast.ErrRefused, "node %v has a replica of this segment already", disk.Node)
		}
	}
	return nil
}

// DeleteVolume deletes a detached volume: its name is free at once, its replicas
// are DELETING until each is confirmed by ReplicaGone, the id stays for ever.
type DeleteVolume struct {
	Volume holdfast.VolumeID
}

func (*DeleteVolume) kind() commandKind { return kindDeleteVolume }

func (c *DeleteVolume) apply(t *View) (Result, error) {
	have, ok := t.volumes.get(c.Volume)
	if !ok {
		return Result{}, notFound("volume", c.Volume)
	}
	if have.Deleted {
		return volumeResult(have, false), nil
	}
	if have.Phase != PhaseDetached {
		return Result{}, refuse(holdfast.ErrRefused, ReasonHeld, "volume %s is attached at node %s", have.Name, t.nodeName(have.Holder.Node))
	}
	vol := have.clone()
	vol.Deleted, vol.Repair = true, Repair{}
	for i := range vol.Segments {
		for j := range vol.Segments[i].Replicas {
			vol.Segments[i].Replicas[j].Role = holdfast.RoleDeleting
		}
	}
	t.names = t.names.remove(nameKey(vol.Name))
	t.volumes = t.volumes.set(vol.ID, vol)
	return volumeResult(vol, true), nil
}

// ReplicaGone confirms that a DELETING replica is no longer on its disk.
type ReplicaGone struct {
	Replica holdfast.ReplicaID
}

func (*ReplicaGone) kind() commandKind { return kindReplicaGone }

func (c *ReplicaGone) apply(t *View) (Result, error) {
	place, ok := t.replicas.get(c.Replica)
	if !ok {
		return Result{}, notFound("replica", c.Replica)
	}
	if place.Gone {
		return Result{}, nil
	}
	have, s, ok := t.Segment(place.Segment)
	if !ok || s.Replica(c.Replica) == nil {
		return Result{}, holdfast.Errorf(holdfast.ErrIntegrity, "replica %v is recorded in segment %v, which does not have it", c.Replica, place.Segment)
	}
	if role := s.Replica(c.Replica).Role; role != holdfast.RoleDeleting {
		return Result{}, holdfast.Errorf(holdfast.ErrRefused, "replica %v is %s, not %s", c.Replica, role, holdfast.RoleDeleting)
	}
	vol := have.clone()
	seg := &vol.Segments[place.Segment.Index]
	seg.Replicas = slices.DeleteFunc(seg.Replicas, func(r Replica) bool { return r.ID == c.Replica })
	seg.prune()
	t.putReplica(c.Replica, place.Segment, true)
	if vol.Deleted && !vol.hasReplicas() {
		vol.Segments = nil
	}
	t.putVolume(vol)
	return volumeResult(vol, true), nil
}

func (v *Volume) hasReplicas() bool {
	return slices.ContainsFunc(v.Segments, func(s Segment) bool { return len(s.Replicas) > 0 })
}

// AddReplica adds an empty, SYNCING replica to a segment.
type AddReplica struct {
	Segment       holdfast.SegmentID
	LayoutVersion uint64 // compared
	Replica       holdfast.ReplicaID
	Disk          holdfast.DiskID
}

func (*AddReplica) kind() commandKind { return kindAddReplica }

func (c *AddReplica) apply(t *View) (Result, error) {
	vol, seg, err := t.changeSegment(c.Segment)
	if err != nil {
		return Result{}, err
	}
	if r := seg.Replica(c.Replica); r != nil && r.Disk == c.Disk && r.Role != holdfast.RoleDeleting {
		return segmentResult(vol, seg, false), nil
	}
	if seg.LayoutVersion != c.LayoutVersion {
		return Result{}, staleLayout(seg, c.LayoutVersion)
	}
	if len(seg.Replicas) >= maxReplicaRecords {
		return Result{}, holdfast.Errorf(holdfast.ErrRefused, "segment %v has %d replica records, the most", c.Segment, len(seg.Replicas))
	}
	if err := t.checkPlace(seg, vol.Options.Pool, ReplicaPlacement{c.Replica, c.Disk}); err != nil {
		return Result{}, err
	}
	seg.Replicas = append(seg.Replicas, Replica{ID: c.Replica, Disk: c.Disk, Role: holdfast.RoleSyncing, SinceEpoch: vol.Epoch, Opened: vol.Epoch, Lineage: vol.Lineage})
	seg.LayoutVersion++
	vol.forgive()
	t.putReplica(c.Replica, c.Segment, false)
	t.putVolume(vol)
	return segmentResult(vol, seg, true), nil
}

// RemoveReplica makes a replica DELETING, for good. A STALE or in-sync one goes only
// when the segment keeps as many in-sync replicas as asked for, or by force, the
// last in-sync one never. An in-sync one of a volume that has a writer is marked
// Leaving first: it is DELETING once its writer took it out (R2).
type RemoveReplica struct {
	Segment       holdfast.SegmentID
	LayoutVersion uint64 // compared
	Replica       holdfast.ReplicaID
	Force         bool
}

func (*RemoveReplica) kind() commandKind { return kindRemoveReplica }

func (c *RemoveReplica) apply(t *View) (Result, error) {
	vol, seg, err := t.changeSegment(c.Segment)
	if err != nil {
		return Result{}, err
	}
	r := seg.Replica(c.Replica)
	if r == nil {
		if place, ok := t.replicas.get(c.Replica); ok && place.Gone && place.Segment == c.Segment {
			return segmentResult(vol, seg, false), nil
		}
		return Result{}, notFound("replica", c.Replica)
	}
	if r.Role == holdfast.RoleDeleting {
		return segmentResult(vol, seg, false), nil
	}
	if seg.LayoutVersion != c.LayoutVersion {
		return Result{}, staleLayout(seg, c.LayoutVersion)
	}
	staying := seg.staying(c.Replica)
	if r.Role == holdfast.RoleInSync && staying == 0 {
		return Result{}, refuse(holdfast.ErrRefused, ReasonLastInSync, "replica %v is the last in-sync one of segment %v", c.Replica, c.Segment)
	}
	if (r.Role == holdfast.RoleStale || r.Role == holdfast.RoleInSync) && !c.Force && staying < vol.Options.Replicas {
		return Result{}, holdfast.Errorf(holdfast.ErrRefused, "replica %v is %s, and without it segment %v has only %d of %d replicas in sync", c.Replica, r.Role, c.Segment, staying, vol.Options.Replicas)
	}
	seg.LayoutVersion++
	if r.Role == holdfast.RoleInSync {
		if vol.HasWriter() {
			if r.Leaving {
				return segmentResult(vol, seg, false), nil
			}
			r.Leaving = true
			t.putVolume(vol)
			return segmentResult(vol, seg, true), nil
		}
		seg.ISRVersion++
	}
	r.Role, r.SinceEpoch = holdfast.RoleDeleting, vol.Epoch
	vol.forgive()
	seg.prune()
	t.putVolume(vol)
	return segmentResult(vol, seg, true), nil
}

// staying counts the in-sync replicas that stay, without one.
func (s *Segment) staying(without holdfast.ReplicaID) int {
	n := 0
	for _, r := range s.Replicas {
		if r.Role == holdfast.RoleInSync && !r.Leaving && r.ID != without {
			n++
		}
	}
	return n
}

func staleLayout(s *Segment, want uint64) error {
	return refuse(holdfast.ErrRefused, ReasonStaleRevision, "the segment's layout is at version %d, not %d", s.LayoutVersion, want)
}

// ResizeVolume grows a detached volume. Existing segments grow to the segment
// size; what is beyond them is placed anew. A repair, which knows the old size,
// is over.
type ResizeVolume struct {
	Volume    holdfast.VolumeID
	From, To  int64 // bytes; From is compared
	Placement []SegmentPlacement
}

func (*ResizeVolume) kind() commandKind { return kindResizeVolume }

func (c *ResizeVolume) apply(t *View) (Result, error) {
	vol, err := t.changeVolume(c.Volume)
	if err != nil {
		return Result{}, err
	}
	if vol.Size == c.To {
		return volumeResult(vol, false), nil
	}
	if c.To < vol.Size {
		return Result{}, holdfast.Errorf(holdfast.ErrRefused, "volume %s has %d bytes and never shrinks, not to %d", vol.Name, vol.Size, c.To)
	}
	if vol.Size != c.From {
		return Result{}, refuse(holdfast.ErrRefused, ReasonStaleRevision, "volume %s has %d bytes, not %d", vol.Name, vol.Size, c.From)
	}
	if vol.Phase != PhaseDetached {
		return Result{}, refuse(holdfast.ErrRefused, ReasonHeld, "volume %s is attached: detach it to resize it", vol.Name)
	}
	count, err := SegmentCount(c.To, vol.Options.SegmentSize)
	if err != nil {
		return Result{}, err
	}
	if count-len(vol.Segments) != len(c.Placement) {
		return Result{}, invalid("%d bytes need %d segments more, not %d", c.To, count-len(vol.Segments), len(c.Placement))
	}
	vol.Size, vol.Repair = c.To, Repair{}
	if last := len(vol.Segments) - 1; last >= 0 {
		vol.Segments[last].Size = min(vol.Options.SegmentSize, vol.Size-int64(last)*vol.Options.SegmentSize)
	}
	if err := t.addSegments(vol, c.Placement, vol.Epoch); err != nil {
		return Result{}, err
	}
	t.putVolume(vol)
	return volumeResult(vol, true), nil
}

// UpdateVolume changes what may be changed of a volume's options: Replicas,
// MinCopies, FailHeldAfter and PingsOnly. From is compared. Placing and removing
// replicas for another number of them is not part of it.
type UpdateVolume struct {
	Volume   holdfast.VolumeID
	From, To VolumeOptions
}

func (*UpdateVolume) kind() commandKind { return kindUpdateVolume }

func (c *UpdateVolume) apply(t *View) (Result, error) {
	vol, err := t.changeVolume(c.Volume)
	if err != nil {
		return Result{}, err
	}
	if vol.Options == c.To {
		return volumeResult(vol, false), nil
	}
	if vol.Options != c.From {
		return Result{}, refuse(holdfast.ErrRefused, ReasonStaleRevision, "the options of volume %s were changed meanwhile", vol.Name)
	}
	if err := c.To.validate(); err != nil {
		return Result{}, err
	}
	same := c.To
	same.Replicas, same.MinCopies, same.FailHeldAfter, same.PingsOnly = c.From.Replicas, c.From.MinCopies, c.From.FailHeldAfter, c.From.PingsOnly
	if same != c.From {
		return Result{}, invalid("an option of volume %s that is fixed when it is made cannot be changed", vol.Name)
	}
	vol.Options = c.To
	t.putVolume(vol)
	return volumeResult(vol, true), nil
}

// SetLabels replaces a volume's labels.
type SetLabels struct {
	Volume   holdfast.VolumeID
	Revision uint64 // Volume.LabelsRevision, compared
	Labels   Labels
}

func (*SetLabels) kind() commandKind { return kindSetLabels }

func (c *SetLabels) apply(t *View) (Result, error) {
	vol, err := t.changeVolume(c.Volume)
	if err != nil {
		return Result{}, err
	}
	if slices.Equal(vol.Labels, c.Labels) {
		return volumeResult(vol, false), nil
	}
	if vol.LabelsRevision != c.Revision {
		return Result{}, refuse(holdfast.ErrRefused, ReasonStaleRevision, "the labels of volume %s are at revision %d, not %d", vol.Name, vol.LabelsRevision, c.Revision)
	}
	if err := c.Labels.validate(); err != nil {
		return Result{}, err
	}
	vol.Labels = slices.Clone(c.Labels)
	vol.LabelsRevision++
	t.putVolume(vol)
	return volumeResult(vol, true), nil
}

// Rename gives a volume another name. From is compared.
type Rename struct {
	Volume   holdfast.VolumeID
	From, To string
}

func (*Rename) kind() commandKind { return kindRename }

func (c *Rename) apply(t *View) (Result, error) {
	vol, err := t.changeVolume(c.Volume)
	if err != nil {
		return Result{}, err
	}
	if vol.Name == c.To {
		return volumeResult(vol, false), nil
	}
	if vol.Name != c.From {
		return Result{}, refuse(holdfast.ErrRefused, ReasonStaleRevision, "the volume is named %s, not %q", vol.Name, c.From)
	}
	if err := checkName("volume", c.To); err != nil {
		return Result{}, err
	}
	if _, ok := t.VolumeByName(c.To); ok {
		return Result{}, holdfast.Errorf(holdfast.ErrExists, "a volume named %s exists", c.To)
	}
	t.names = t.names.remove(nameKey(vol.Name))
	vol.Name = c.To
	t.putVolume(vol)
	return volumeResult(vol, true), nil
}

// changeVolume returns a copy of a live volume that the caller may change.
func (t *View) changeVolume(id holdfast.VolumeID) (*Volume, error) {
	have, ok := t.volumes.get(id)
	if !ok || have.Deleted {
		return nil, notFound("volume", id)
	}
	return have.clone(), nil
}

// changeSegment returns a copy of a live volume and, in it, a segment.
func (t *View) changeSegment(id holdfast.SegmentID) (*Volume, *Segment, error) {
	vol, err := t.changeVolume(id.Volume)
	if err != nil {
		return nil, nil, err
	}
	if uint64(id.Index) >= uint64(len(vol.Segments)) {
		return nil, nil, notFound("segment", id)
	}
	return vol, &vol.Segments[id.Index], nil
}

// putVolume stores a volume in both tables; vol must not be changed afterwards.
func (t *View) putVolume(vol *Volume) {
	t.volumes = t.volumes.set(vol.ID, vol)
	if !vol.Deleted {
		t.names = t.names.set(nameKey(vol.Name), vol)
	}
}

func (t *View) putReplica(id holdfast.ReplicaID, seg holdfast.SegmentID, gone bool) {
	t.replicas = t.replicas.set(id, &ReplicaPlace{Replica: id, Segment: seg, Gone: gone})
}

func (t *View) nodeName(id holdfast.NodeID) string {
	if n, ok := t.nodes.get(id); ok {
		return n.Name
	}
	return id.String()
}

func volumeResult(v *Volume, changed bool) Result {
	return Result{Changed: changed, Epoch: v.Epoch, Volume: v}
}

func segmentResult(v *Volume, s *Segment, changed bool) Result {
	return Result{Changed: changed, Epoch: v.Epoch, ISRVersion: s.ISRVersion, Volume: v}
}
