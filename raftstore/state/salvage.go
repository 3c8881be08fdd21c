package state

import (
	"slices"

	"github.com/holdfast-storage/holdfast"
)

// SalvageChoice names the replica that a segment goes on from.
type SalvageChoice struct {
	Index   uint32 // of the segment
	Replica holdfast.ReplicaID
}

// ForceRecover lets an operator go on from replicas that raft does not call in
// sync, or no longer reach what was committed (`volume salvage`). The volume gets
// a new epoch and a new lineage and is detached; of each segment chosen for, the
// replica named becomes the only one in sync, those in sync or stale besides
// become ORPHAN, kept as they are, and those that were being filled, which hold
// no one state of the volume, DELETING. Segments that are not named stay as they
// are. The next activation of a named one is forced and lossy, whatever its
// writer says of it.
//
// A STALE, an ORPHAN or an in-sync replica may be chosen; that it can be had, and
// that no in-sync one can, is the proposer's to find out.
type ForceRecover struct {
	Volume  holdfast.VolumeID
	Expect  holdfast.Epoch // the epoch it was read at, compared; the new one is Expect+1
	Choices []SalvageChoice
	Lineage holdfast.LineageID // fresh
	Since   int64              // Unix seconds
}

func (*ForceRecover) kind() commandKind { return kindForceRecover }

func (c *ForceRecover) apply(t *View) (Result, error) {
	vol, err := t.changeVolume(c.Volume)
	if err != nil {
		return Result{}, err
	}
	if c.Expect+1 == vol.Epoch && vol.Lineage == c.Lineage && !c.Lineage.IsZero() {
		return volumeResult(vol, false), nil
	}
	switch {
	case c.Lineage.IsZero() || c.Lineage == vol.Lineage:
		return Result{}, invalid("a salvage needs a fresh lineage")
	case len(c.Choices) == 0:
		return Result{}, invalid("a salvage needs a replica to go on from")
	case c.Expect != vol.Epoch:
		return Result{}, refuse(holdfast.ErrRefused, ReasonStaleRevision, "volume %s is at epoch %d, not %d", vol.Name, vol.Epoch, c.Expect)
	case vol.Epoch == maxEpoch:
		return Result{}, invalid("volume %s has no epochs left", vol.Name)
	}
	vol.Epoch++
	for i, choice := range c.Choices {
		if i > 0 && c.Choices[i-1].Index >= choice.Index {
			return Result{}, invalid("the choices of a salvage are not sorted by segment")
		}
		if uint64(choice.Index) >= uint64(len(vol.Segments)) {
			return Result{}, notFound("segment", holdfast.SegmentID{Volume: vol.ID, Index: choice.Index})
		}
		seg := &vol.Segments[choice.Index]
		r := seg.Replica(choice.Replica)
		if r == nil {
			return Result{}, notFound("replica", choice.Replica)
		}
		if !r.Salvageable() {
			return Result{}, holdfast.Errorf(holdfast.ErrRefused, "replica %v is %s: it holds no one state of the volume", r.ID, r.Role)
		}
		if d, ok := t.disks.get(r.Disk); !ok || d.State != holdfast.DiskOK {
			return Result{}, holdfast.Errorf(holdfast.ErrRefused, "replica %v stands on disk %v, which failed", r.ID, r.Disk)
		}
		seg.salvage(r, vol.Epoch)
	}
	vol.Lineage, vol.Repair = c.Lineage, Repair{}
	vol.Phase, vol.Holder, vol.Since = PhaseDetached, Holder{}, c.Since
	vol.Session, vol.Offered = holdfast.SessionID{}, holdfast.SessionID{}
	t.putVolume(vol)
	return volumeResult(vol, true), nil
}

// Salvageable says whether a replica holds one state of the volume, however old.
func (r *Replica) Salvageable() bool {
	return r.Role == holdfast.RoleInSync || r.Role == holdfast.RoleStale || r.Role == holdfast.RoleOrphan
}

// salvage makes chosen the segment's only in-sync replica, in an epoch.
func (s *Segment) salvage(chosen *Replica, epoch holdfast.Epoch) {
	switch {
	case chosen.Role == holdfast.RoleOrphan:
		// It took no part in the epochs since it was abandoned: they do not cut it.
		s.History = slices.DeleteFunc(s.History, func(h EpochStart) bool { return h.Epoch >= chosen.SinceEpoch })
	case s.CountsAsEmpty(*chosen):
		s.History = nil // what would cut it is forgotten, and all it holds is wanted
	}
	for i := range s.Replicas {
		r := &s.Replicas[i]
		switch {
		case r == chosen:
			r.Role, r.SinceEpoch, r.Leaving = holdfast.RoleInSync, epoch, false
		case r.Role == holdfast.RoleInSync || r.Role == holdfast.RoleStale:
			r.Role, r.SinceEpoch = holdfast.RoleOrphan, epoch
		case r.Role == holdfast.RoleSyncing:
			r.Role, r.SinceEpoch = holdfast.RoleDeleting, epoch
		}
	}
	s.ISRVersion++
	s.LayoutVersion++
	s.LastCommit, s.End, s.Clean = 0, 0, false
	s.Salvaged = true
}
