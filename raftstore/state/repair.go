package state

import (
	"github.com/holdfast-storage/holdfast"
)

// Repair is what is done about replicas of a detached volume that are not in
// sync. A node fills them in a maintenance attachment: in an epoch of its own, in
// which it fences like any writer, and writes nothing. To users the volume stays
// detached.
//
// A repair starts where the volume was detached and leaves it there, clean: so one
// that is given up at any point costs nothing but its epoch, and the next attach
// is as continuous as without it. A user's AttachBegin ends it at once.
type Repair struct {
	Holder Holder // who is at it; zero: nobody
	Since  int64  // Unix seconds at which Holder was given it, or the last one ended; for people only
	Tries  uint32 // repairs begun since the last one that brought a replica into the in-sync set
	Why    string // the last one ended, if it did not do everything
}

// HasWriter says whether a process has the right to change the in-sync sets: a
// user's holder, or a node that repairs.
func (v *Volume) HasWriter() bool { return v.Phase != PhaseDetached || v.UnderRepair() }

// UnderRepair says whether the writer is one that repairs.
func (v *Volume) UnderRepair() bool { return v.Repair.Holder != (Holder{}) }

// Clean says whether every segment was left at a known end, with all of it
// durable on every in-sync replica, and nothing was written since.
func (v *Volume) Clean() bool {
	for i := range v.Segments {
		if s := &v.Segments[i]; !s.Clean || s.Salvaged {
			return false
		}
	}
	return true
}

// beginRepair is AttachBegin with Maintenance.
func (c *AttachBegin) beginRepair(t *View, vol *Volume) (Result, error) {
	me := Holder{c.Node, c.Instance}
	switch {
	case !c.Session.IsZero() || c.Force:
		return Result{}, invalid("a maintenance attachment has no session and is never forced")
	case c.Expect < vol.Epoch && c.Expect+1 == vol.Epoch && vol.Repair.Holder == me:
		return volumeResult(vol, false), nil
	}
	if err := c.checkExpect(vol); err != nil {
		return Result{}, err
	}
	switch {
	case vol.Phase != PhaseDetached:
		return Result{}, heldError(t, vol)
	case vol.UnderRepair() && !c.Takeover:
		return Result{}, refuse(holdfast.ErrRefused, ReasonHeld, "volume %s is under repair by node %s", vol.Name, t.nodeName(vol.Repair.Holder.Node))
	case !vol.Clean():
		return Result{}, holdfast.Errorf(holdfast.ErrRefused, "volume %s was salvaged, or not detached in order: its next attachment repairs it", vol.Name)
	case vol.Epoch == maxEpoch:
		return Result{}, invalid("volume %s has no epochs left", vol.Name)
	}
	vol.Epoch++
	vol.Repair.Holder, vol.Repair.Since = me, c.Since
	if vol.Repair.Tries < ^uint32(0) {
		vol.Repair.Tries++
	}
	t.putVolume(vol)
	return volumeResult(vol, true), nil
}

// checkRepairActivate: a repair goes on exactly where the volume was detached.
func (c *Activate) checkRepairActivate(seg *Segment) error {
	if c.Continuous && c.S == seg.End {
		return nil
	}
	return refuse(holdfast.ErrIntegrity, ReasonReplicaRegression, "a repair of segment %v starts where it was detached, at %d, not at %d", c.Segment, seg.End, c.S)
}

// checkRepairCommit refuses a repair that says it wrote something.
func (v *Volume) checkRepairCommit(seg *Segment, commit holdfast.Seq) error {
	if !v.UnderRepair() || commit <= seg.End {
		return nil
	}
	return refuse(holdfast.ErrIntegrity, ReasonReplicaRegression, "a repair of volume %s writes nothing, but says that %d is committed behind the end at %d", v.Name, commit, seg.End)
}

// forgive lets a repair that failed be tried again at once: what it met has changed.
func (v *Volume) forgive() {
	if !v.UnderRepair() {
		v.Repair = Repair{}
	}
}

// EndRepair gives a repair back that did not do everything. One that did ends
// with Detach, or, if its node did not live to say so, with an EndRepair that has
// nothing to complain of.
type EndRepair struct {
	Volume holdfast.VolumeID
	Epoch  holdfast.Epoch // compared
	Since  int64          // Unix seconds
	Why    string         // "": nothing is left to do
}

func (*EndRepair) kind() commandKind { return kindEndRepair }

func (c *EndRepair) apply(t *View) (Result, error) {
	vol, err := t.changeVolume(c.Volume)
	if err != nil {
		return Result{}, err
	}
	if err := checkEpoch(vol, c.Epoch); err != nil {
		return Result{}, err
	}
	if len(c.Why) > MaxTextLength {
		return Result{}, invalid("the end of a repair has %d bytes, more than %d", len(c.Why), MaxTextLength)
	}
	if !vol.UnderRepair() {
		return volumeResult(vol, false), nil
	}
	vol.Repair.Holder, vol.Repair.Since, vol.Repair.Why = Holder{}, c.Since, c.Why
	if c.Why == "" {
		vol.Repair = Repair{}
	}
	t.putVolume(vol)
	return volumeResult(vol, true), nil
}
