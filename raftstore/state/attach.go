package state

import (
	"slices"

	"github.com/holdfast-storage/holdfast"
)

// AttachBegin gives a process the right to write in a new epoch (A1). Its result
// carries the in-sync sets that the new writer fences. It is refused unless the
// volume is detached, or held by another process of the same node (which is
// gone, as the node announced a new instance) or by this one, or Takeover or
// Force is set.
type AttachBegin struct {
	Volume   holdfast.VolumeID
	Node     holdfast.NodeID
	Instance holdfast.InstanceID // must be the node's announced one
	Expect   holdfast.Epoch      // the epoch it was read at, compared; the new one is Expect+1
	Session  holdfast.SessionID  // fresh; becomes the session unless the old one continues
	Since    int64               // Unix seconds
	// Takeover: the leader saw by its own record of heartbeats that the
	// holder at Expect is gone.
	Takeover bool
	// Force: an operator accepts that a live holder is fenced.
	Force bool
	// Maintenance: to repair a detached volume (Repair), not to serve it. Without a
	// session; a takeover here is from another node that repairs.
	Maintenance bool
}

func (*AttachBegin) kind() commandKind { return kindAttachBegin }

func (c *AttachBegin) apply(t *View) (Result, error) {
	vol, err := t.changeVolume(c.Volume)
	if err != nil {
		return Result{}, err
	}
	node, err := t.liveNode(c.Node)
	if err != nil {
		return Result{}, err
	}
	if node.Instance != c.Instance {
		return Result{}, staleInstance(node)
	}
	if c.Maintenance {
		return c.beginRepair(t, vol)
	}
	if c.Session.IsZero() {
		return Result{}, invalid("an attach needs a session")
	}
	me := Holder{c.Node, c.Instance}
	if c.Expect < vol.Epoch && c.Expect+1 == vol.Epoch && vol.Holder == me && vol.Offered == c.Session && vol.Phase != PhaseDetached {
		return volumeResult(vol, false), nil
	}
	if err := c.checkExpect(vol); err != nil {
		return Result{}, err
	}
	if vol.Phase != PhaseDetached && vol.Holder.Node != c.Node && !c.Takeover && !c.Force {
		return Result{}, heldError(t, vol)
	}
	if vol.Epoch == maxEpoch {
		return Result{}, invalid("volume %s has no epochs left", vol.Name)
	}
	vol.Epoch++
	vol.Phase, vol.Holder, vol.Since = PhaseAttaching, me, c.Since
	vol.Repair = Repair{} // fenced by the new epoch, and with what it met no more
	vol.Offered = c.Session
	if vol.Session.IsZero() {
		vol.Session = c.Session
	}
	t.putVolume(vol)
	return volumeResult(vol, true), nil
}

func (c *AttachBegin) checkExpect(vol *Volume) error {
	err := checkEpoch(vol, c.Expect)
	if c.Expect < vol.Epoch {
		// The asker is not a writer yet: it reads again.
		return refuse(holdfast.ErrRefused, ReasonStaleRevision, "volume %s is at epoch %d, not %d", vol.Name, vol.Epoch, c.Expect)
	}
	return err
}

const maxEpoch = ^holdfast.Epoch(0)

func heldError(t *View, vol *Volume) error {
	e := holdfast.Errorf(holdfast.ErrRefused, "volume %s is attached at node %s", vol.Name, t.nodeName(vol.Holder.Node)).
		WithRemedy("detach it there, or use --force to fence it")
	e.Cause = ReasonHeld
	return e
}

// Activate ends the recovery of one segment (A6): epoch Epoch starts at S with
// the in-sync set ISR, a subset of the present one (R6). Members left out become
// STALE. Each member has confirmed OPEN(Epoch, S). Not continuous means lossy:
// the volume's session is replaced by the one offered at AttachBegin. The first
// of a salvaged segment is lossy whatever it says, and may start anywhere.
type Activate struct {
	Segment    holdfast.SegmentID
	Epoch      holdfast.Epoch // compared
	S          holdfast.Seq
	ISR        []holdfast.ReplicaID
	Continuous bool
}

func (*Activate) kind() commandKind { return kindActivate }

func (c *Activate) apply(t *View) (Result, error) {
	vol, seg, err := t.changeSegment(c.Segment)
	if err != nil {
		return Result{}, err
	}
	if err := checkWriter(vol, c.Epoch); err != nil {
		return Result{}, err
	}
	if len(c.ISR) == 0 {
		return Result{}, refuse(holdfast.ErrRefused, ReasonLastInSync, "an activation of segment %v needs an in-sync replica", c.Segment)
	}
	for i, id := range c.ISR {
		if slices.Contains(c.ISR[:i], id) {
			return Result{}, invalid("replica %v stands twice in the in-sync set", id)
		}
	}
	flags := c.flags(seg)
	if last := seg.Last(); last.Epoch == c.Epoch {
		// A forced one was so by the segment's mark, which it took away.
		if last.Start == c.S && (last.Flags == flags || last.Flags&FlagForced != 0) && sameMembers(seg.ISR(), c.ISR) {
			return segmentResult(vol, seg, false), nil
		}
		return Result{}, refuse(holdfast.ErrRefused, ReasonStaleISR, "segment %v was activated in epoch %d already, at %d", c.Segment, c.Epoch, last.Start)
	}
	if floor := seg.Floor(); c.S < floor {
		return Result{}, refuse(holdfast.ErrIntegrity, ReasonReplicaRegression,
			"segment %v cannot start at %d: entries up to %d were committed", c.Segment, c.S, floor)
	}
	if vol.UnderRepair() {
		if err := c.checkRepairActivate(seg); err != nil {
			return Result{}, err
		}
	}
	for _, id := range c.ISR {
		if r := seg.Replica(id); r == nil || r.Role != holdfast.RoleInSync {
			return Result{}, holdfast.Errorf(holdfast.ErrRefused, "replica %v is not in sync and cannot be activated from", id)
		}
	}
	seg.activate(c, flags)
	if vol.UnderRepair() {
		seg.Clean = true // nothing is written until somebody else attaches
		t.putVolume(vol)
		return segmentResult(vol, seg, true), nil
	}
	if flags&FlagLossy != 0 {
		vol.Session = vol.Offered
	}
	if vol.activatedIn(c.Epoch) {
		vol.Phase = PhaseAttached
	}
	t.putVolume(vol)
	return segmentResult(vol, seg, true), nil
}

func (c *Activate) flags(s *Segment) EpochFlags {
	switch {
	case s.Salvaged:
		return FlagForced | FlagLossy
	case c.Continuous:
		return FlagContinuous
	}
	return FlagLossy
}

func (s *Segment) activate(c *Activate, flags EpochFlags) {
	for i := range s.Replicas {
		r := &s.Replicas[i]
		switch {
		case slices.Contains(c.ISR, r.ID):
			r.Opened = c.Epoch
		case r.Role == holdfast.RoleInSync:
			r.Role, r.SinceEpoch = holdfast.RoleStale, c.Epoch
		}
	}
	s.ISRVersion++
	s.Clean, s.Salvaged = false, false
	s.History = append(s.History, EpochStart{Epoch: c.Epoch, Start: c.S, Flags: flags})
	s.prune()
}

func (v *Volume) activatedIn(e holdfast.Epoch) bool {
	for i := range v.Segments {
		if v.Segments[i].Last().Epoch != e {
			return false
		}
	}
	return true
}

// prune drops history that no replica needs: entries below the oldest epoch that
// a replica not DELETING opened last, and whatever is beyond MaxHistory.
func (s *Segment) prune() {
	oldest := s.Last().Epoch
	for _, r := range s.Replicas {
		if r.Role != holdfast.RoleDeleting {
			oldest = min(oldest, r.Opened)
		}
	}
	drop := 0
	for drop < len(s.History)-1 && s.History[drop].Epoch < oldest {
		drop++
	}
	drop = max(drop, len(s.History)-MaxHistory)
	s.History = slices.Clone(s.History[drop:])
}

func sameMembers(a, b []holdfast.ReplicaID) bool {
	if len(a) != len(b) {
		return false
	}
	for _, id := range a {
		if !slices.Contains(b, id) {
			return false
		}
	}
	return true
}

// ShrinkISR drops a replica from the in-sync set; the writer releases the held
// acks only when this was applied (R2).
type ShrinkISR struct {
	Segment    holdfast.SegmentID
	Epoch      holdfast.Epoch      // compared
	ISRVersion holdfast.ISRVersion // compared
	Replica    holdfast.ReplicaID
	Commit     holdfast.Seq // the writer's commit
}

func (*ShrinkISR) kind() commandKind { return kindShrinkISR }

func (c *ShrinkISR) apply(t *View) (Result, error) {
	vol, seg, r, again, err := t.changeISR(c.Segment, c.Epoch, c.ISRVersion, c.Replica, holdfast.RoleStale)
	if err != nil || again {
		return segmentResultOf(vol, seg, err), err
	}
	if r.Role != holdfast.RoleInSync {
		return Result{}, holdfast.Errorf(holdfast.ErrRefused, "replica %v is %s, not in sync", c.Replica, r.Role)
	}
	if len(seg.ISR()) == 1 {
		return Result{}, refuse(holdfast.ErrRefused, ReasonLastInSync, "replica %v is the last in-sync one of segment %v", c.Replica, c.Segment)
	}
	if err := vol.checkRepairCommit(seg, c.Commit); err != nil {
		return Result{}, err
	}
	r.Role, r.SinceEpoch = holdfast.RoleStale, c.Epoch
	if r.Leaving {
		r.Role = holdfast.RoleDeleting
	}
	seg.ISRVersion++
	seg.LastCommit = max(seg.LastCommit, c.Commit)
	t.putVolume(vol)
	return segmentResult(vol, seg, true), nil
}

// GrowISR adds a replica that caught up to the in-sync set; it has counted in
// the writer's ackset since before it caught up (R2).
type GrowISR struct {
	Segment    holdfast.SegmentID
	Epoch      holdfast.Epoch      // compared
	ISRVersion holdfast.ISRVersion // compared
	Replica    holdfast.ReplicaID
	Commit     holdfast.Seq // the writer's commit
}

func (*GrowISR) kind() commandKind { return kindGrowISR }

func (c *GrowISR) apply(t *View) (Result, error) {
	vol, seg, r, again, err := t.changeISR(c.Segment, c.Epoch, c.ISRVersion, c.Replica, holdfast.RoleInSync)
	if err != nil || again {
		return segmentResultOf(vol, seg, err), err
	}
	if r.Role != holdfast.RoleSyncing && r.Role != holdfast.RoleStale || r.Leaving {
		return Result{}, holdfast.Errorf(holdfast.ErrRefused, "replica %v is %s and cannot join the in-sync set", c.Replica, r.Role)
	}
	if d, ok := t.disks.get(r.Disk); !ok || d.State != holdfast.DiskOK {
		return Result{}, holdfast.Errorf(holdfast.ErrRefused, "replica %v stands on disk %v, which failed", c.Replica, r.Disk)
	}
	if err := vol.checkRepairCommit(seg, c.Commit); err != nil {
		return Result{}, err
	}
	r.Role, r.SinceEpoch, r.Opened = holdfast.RoleInSync, c.Epoch, c.Epoch
	seg.ISRVersion++
	if vol.UnderRepair() {
		vol.Repair.Tries, vol.Repair.Why = 1, ""
	}
	seg.LastCommit = max(seg.LastCommit, c.Commit)
	seg.prune()
	t.putVolume(vol)
	return segmentResult(vol, seg, true), nil
}

// changeISR does the checks that ShrinkISR and GrowISR share (R3). again is true
// if the command was applied before: the version is one further and the replica
// has the wanted role since this epoch.
func (t *View) changeISR(id holdfast.SegmentID, epoch holdfast.Epoch, version holdfast.ISRVersion, replica holdfast.ReplicaID, role holdfast.ReplicaRole) (
	vol *Volume, seg *Segment, r *Replica, again bool, err error) {
	vol, seg, err = t.changeSegment(id)
	if err != nil {
		return nil, nil, nil, false, err
	}
	if err := checkWriter(vol, epoch); err != nil {
		return nil, nil, nil, false, err
	}
	if seg.Last().Epoch != epoch {
		return nil, nil, nil, false, holdfast.Errorf(holdfast.ErrRefused, "segment %v is not activated in epoch %d", id, epoch)
	}
	r = seg.Replica(replica)
	if r == nil {
		return nil, nil, nil, false, notFound("replica", replica)
	}
	if version+1 == seg.ISRVersion && r.Role == role && r.SinceEpoch == epoch {
		return vol, seg, r, true, nil
	}
	if version != seg.ISRVersion {
		return nil, nil, nil, false, refuse(holdfast.ErrRefused, ReasonStaleISR, "the in-sync set of segment %v is at version %d, not %d", id, seg.ISRVersion, version)
	}
	return vol, seg, r, false, nil
}

func segmentResultOf(vol *Volume, seg *Segment, err error) Result {
	if err != nil {
		return Result{}
	}
	return segmentResult(vol, seg, false)
}

// StartSync makes a STALE replica SYNCING, before anything newer is copied over
// what it holds: from then on it is not one state of the volume any more and no
// candidate of a salvage.
type StartSync struct {
	Segment holdfast.SegmentID
	Epoch   holdfast.Epoch // compared
	Replica holdfast.ReplicaID
}

func (*StartSync) kind() commandKind { return kindStartSync }

func (c *StartSync) apply(t *View) (Result, error) {
	vol, seg, err := t.changeSegment(c.Segment)
	if err != nil {
		return Result{}, err
	}
	if err := checkWriter(vol, c.Epoch); err != nil {
		return Result{}, err
	}
	r := seg.Replica(c.Replica)
	switch {
	case r == nil:
		return Result{}, notFound("replica", c.Replica)
	case r.Role == holdfast.RoleSyncing:
		return segmentResult(vol, seg, false), nil
	case r.Role != holdfast.RoleStale:
		return Result{}, holdfast.Errorf(holdfast.ErrRefused, "replica %v is %s, not %s", c.Replica, r.Role, holdfast.RoleStale)
	}
	r.Role, r.SinceEpoch = holdfast.RoleSyncing, c.Epoch
	t.putVolume(vol)
	return segmentResult(vol, seg, true), nil
}

// SegmentEnd is where a writer left a segment.
type SegmentEnd struct {
	Index  uint32
	End    holdfast.Seq // S_end: the last sequenced entry
	Commit holdfast.Seq // durable on every in-sync replica; equal to End when clean
}

// Detach gives the right to write back. Every segment that was activated in the
// epoch has one end; a segment that was not is as the epoch found it. A segment
// is clean, and attaches continuous at End, only if its commit reached its end.
// A repair ends where it began.
type Detach struct {
	Volume holdfast.VolumeID
	Epoch  holdfast.Epoch // compared
	Ends   []SegmentEnd
	Since  int64 // Unix seconds
}

func (*Detach) kind() commandKind { return kindDetach }

func (c *Detach) apply(t *View) (Result, error) {
	vol, err := t.changeVolume(c.Volume)
	if err != nil {
		return Result{}, err
	}
	if err := checkEpoch(vol, c.Epoch); err != nil {
		return Result{}, err
	}
	if !vol.HasWriter() {
		return volumeResult(vol, false), nil
	}
	for i, e := range c.Ends {
		if i > 0 && c.Ends[i-1].Index >= e.Index {
			return Result{}, invalid("the ends of a detach are not sorted by segment")
		}
		if uint64(e.Index) >= uint64(len(vol.Segments)) {
			return Result{}, notFound("segment", holdfast.SegmentID{Volume: vol.ID, Index: e.Index})
		}
	}
	next := 0
	for i := range vol.Segments {
		seg := &vol.Segments[i]
		given := next < len(c.Ends) && int(c.Ends[next].Index) == i
		if given != (seg.Last().Epoch == c.Epoch && c.Epoch != 0) {
			return Result{}, invalid("detach of epoch %d: segment %d needs an end exactly if it was activated in that epoch", c.Epoch, i)
		}
		if !given {
			continue
		}
		e := c.Ends[next]
		next++
		if e.Commit > e.End || e.End < seg.Floor() {
			return Result{}, refuse(holdfast.ErrIntegrity, ReasonReplicaRegression,
				"segment %d cannot end at %d with commit %d: entries up to %d were committed", i, e.End, e.Commit, seg.Floor())
		}
		if vol.UnderRepair() && (e.End != seg.End || e.Commit != seg.End) {
			return Result{}, refuse(holdfast.ErrIntegrity, ReasonReplicaRegression, "a repair of segment %d began at %d and cannot end at %d with commit %d", i, seg.End, e.End, e.Commit)
		}
		seg.LastCommit = max(seg.LastCommit, e.Commit)
		seg.Clean = e.Commit == e.End
		if seg.Clean {
			seg.End = e.End
		}
	}
	if vol.UnderRepair() {
		vol.Repair = Repair{}
		t.putVolume(vol)
		return volumeResult(vol, true), nil
	}
	vol.Phase, vol.Holder, vol.Since = PhaseDetached, Holder{}, c.Since
	vol.Session, vol.Offered = holdfast.SessionID{}, holdfast.SessionID{}
	t.putVolume(vol)
	return volumeResult(vol, true), nil
}

// SetFormat moves what raft knows of a volume's file system one step forward:
// none, formatting (before mkfs runs), formatted.
type SetFormat struct {
	Volume holdfast.VolumeID
	Epoch  holdfast.Epoch // compared: only the writer formats
	To     holdfast.FormatState
}

func (*SetFormat) kind() commandKind { return kindSetFormat }

func (c *SetFormat) apply(t *View) (Result, error) {
	vol, err := t.changeVolume(c.Volume)
	if err != nil {
		return Result{}, err
	}
	if err := checkWriter(vol, c.Epoch); err != nil {
		return Result{}, err
	}
	if vol.UnderRepair() {
		return Result{}, holdfast.Errorf(holdfast.ErrRefused, "volume %s is under repair: only its holder makes a file system", vol.Name)
	}
	from, to := slices.Index(formatStates, vol.Format), slices.Index(formatStates, c.To)
	switch {
	case to < 0:
		return Result{}, invalid("%q is not a format state", c.To)
	case from == to:
		return volumeResult(vol, false), nil
	case to != from+1:
		return Result{}, holdfast.Errorf(holdfast.ErrRefused, "the file system of volume %s is %s and cannot become %s", vol.Name, vol.Format, c.To)
	}
	vol.Format = c.To
	t.putVolume(vol)
	return volumeResult(vol, true), nil
}

// checkEpoch compares an epoch with the volume's: a lower one is fenced, a
// higher one means that raft went backwards.
func checkEpoch(vol *Volume, e holdfast.Epoch) error {
	switch {
	case e < vol.Epoch:
		return refuse(holdfast.ErrFenced, ReasonStaleEpoch, "epoch %d of volume %s is over: it is at %d", e, vol.Name, vol.Epoch)
	case e > vol.Epoch:
		return refuse(holdfast.ErrIntegrity, ReasonMetadataRegression, "volume %s is at epoch %d, below the writer's %d: the metadata went backwards", vol.Name, vol.Epoch, e)
	}
	return nil
}

// checkWriter checks that e is the epoch of the volume's present writer, a node
// that repairs included.
func checkWriter(vol *Volume, e holdfast.Epoch) error {
	if err := checkEpoch(vol, e); err != nil {
		return err
	}
	if !vol.HasWriter() {
		return refuse(holdfast.ErrFenced, ReasonStaleEpoch, "volume %s was detached in epoch %d", vol.Name, e)
	}
	return nil
}
