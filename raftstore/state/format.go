package state

import (
	"fmt"

	"github.com/holdfast-storage/holdfast"
)

// The fields of every record and command at cluster level 1, in the order in
// which they are written. FORMAT.md draws them.

func (l *Label) code(c *coder) { c.str(&l.Key); c.str(&l.Value) }

func (l *Labels) code(c *coder) {
	s := []Label(*l)
	list(c, &s, func(c *coder, e *Label) { e.code(c) })
	if c.decoding { // a shared record is only read while it is encoded
		*l = s
	}
}

func (n *Node) code(c *coder) {
	id(c, &n.ID)
	c.str(&n.Name)
	c.str(&n.Addresses.API)
	c.str(&n.Addresses.Data)
	c.str(&n.Addresses.Raft)
	id(c, &n.Instance)
	n.Labels.code(c)
	c.bool(&n.HasDisks)
	c.str(&n.Version)
	u32(c, &n.MaxLevel)
	if !c.decoding && n.Kind == "" {
		k := MemberWatcher // a proposer leaves it out; the tables never do
		enum(c, &k, memberKinds)
	} else {
		enum(c, &n.Kind, memberKinds)
	}
	if !c.decoding && n.Duty == "" {
		d := DutyServing
		enum(c, &d, duties)
	} else {
		enum(c, &n.Duty, duties)
	}
	u64(c, &n.Revision)
	c.bool(&n.Removed)
}

func (d *Disk) code(c *coder) {
	id(c, &d.ID)
	id(c, &d.Node)
	id(c, &d.Instance)
	u64(c, &d.OpenCount)
	enum(c, &d.State, diskStates)
	c.str(&d.Reason)
	c.str(&d.Pool)
	u64(c, &d.Size)
	u64(c, &d.Free)
	c.bool(&d.Leaving)
	c.bool(&d.Removed)
}

func (o *VolumeOptions) code(c *coder) {
	c.small(&o.Replicas)
	c.str(&o.FS)
	c.str(&o.Mkfs)
	c.str(&o.MountOptions)
	u64(c, &o.SegmentSize)
	enum(c, &o.AckMode, ackModes)
	c.small(&o.MinCopies)
	u64(c, &o.FailHeldAfter)
	c.bool(&o.PingsOnly)
	c.str(&o.Pool)
}

func (v *Volume) code(c *coder) {
	id(c, &v.ID)
	c.str(&v.Name)
	u64(c, &v.Size)
	v.Options.code(c)
	v.Labels.code(c)
	u64(c, &v.LabelsRevision)
	u64(c, &v.Created)
	u64(c, &v.Epoch)
	enum(c, &v.Phase, phases)
	id(c, &v.Holder.Node)
	id(c, &v.Holder.Instance)
	u64(c, &v.Since)
	id(c, &v.Session)
	id(c, &v.Offered)
	id(c, &v.Lineage)
	enum(c, &v.Format, formatStates)
	c.bool(&v.Deleted)
	id(c, &v.Repair.Holder.Node)
	id(c, &v.Repair.Holder.Instance)
	u64(c, &v.Repair.Since)
	u32(c, &v.Repair.Tries)
	c.str(&v.Repair.Why)
	list(c, &v.Segments, func(c *coder, s *Segment) { s.code(c) })
}

func (s *Segment) code(c *coder) {
	u64(c, &s.Size)
	u64(c, &s.ISRVersion)
	u64(c, &s.LayoutVersion)
	list(c, &s.Replicas, func(c *coder, r *Replica) { r.code(c) })
	list(c, &s.History, func(c *coder, h *EpochStart) { h.code(c) })
	u64(c, &s.LastCommit)
	u64(c, &s.End)
	c.bool(&s.Clean)
	c.bool(&s.Salvaged)
}

func (r *Replica) code(c *coder) {
	id(c, &r.ID)
	id(c, &r.Disk)
	enum(c, &r.Role, roles)
	u64(c, &r.SinceEpoch)
	u64(c, &r.Opened)
	id(c, &r.Lineage)
	c.bool(&r.Leaving)
}

func (h *EpochStart) code(c *coder) {
	u64(c, &h.Epoch)
	u64(c, &h.Start)
	f := uint8(h.Flags)
	c.u8(&f)
	if f&^uint8(allFlags) != 0 {
		c.fail(fmt.Errorf("epoch flags %#x are not known", f))
	}
	if c.decoding {
		h.Flags = EpochFlags(f)
	}
}

func (p *ReplicaPlace) code(c *coder) {
	id(c, &p.Replica)
	codeSegmentID(c, &p.Segment)
	c.bool(&p.Gone)
}

func codeSegmentID(c *coder, s *holdfast.SegmentID) { id(c, &s.Volume); u32(c, &s.Index) }

func codePlacement(c *coder, p *[]SegmentPlacement) {
	list(c, p, func(c *coder, s *SegmentPlacement) {
		r := []ReplicaPlacement(*s)
		list(c, &r, func(c *coder, e *ReplicaPlacement) { id(c, &e.Replica); id(c, &e.Disk) })
		if c.decoding {
			*s = r
		}
	})
}

func (x *InitCluster) code(c *coder) { id(c, &x.ID); u32(c, &x.Level) }
func (x *RaiseLevel) code(c *coder)  { u32(c, &x.To) }
func (x *NodeJoin) code(c *coder)    { x.Node.code(c) }
func (x *NodeUpdate) code(c *coder)  { x.Node.code(c) }
func (x *NodeRemove) code(c *coder)  { id(c, &x.Node) }

func (x *SetMember) code(c *coder) {
	id(c, &x.Node)
	enum(c, &x.From, memberKinds)
	enum(c, &x.To, memberKinds)
}

func (x *DiskOpen) code(c *coder) {
	id(c, &x.Disk)
	id(c, &x.Node)
	id(c, &x.Instance)
	u64(c, &x.OpenCount)
	c.str(&x.Pool)
	u64(c, &x.Size)
	u64(c, &x.Free)
	c.str(&x.Failed)
}

func (x *DiskUpdate) code(c *coder) {
	id(c, &x.Disk)
	u64(c, &x.OpenCount)
	u64(c, &x.Size)
	u64(c, &x.Free)
}

func (x *DiskFailed) code(c *coder) { id(c, &x.Disk); u64(c, &x.OpenCount); c.str(&x.Reason) }

func (x *SetDiskLeaving) code(c *coder) { id(c, &x.Disk); c.bool(&x.Leaving) }
func (x *DiskRemove) code(c *coder)     { id(c, &x.Disk); c.bool(&x.Force) }

func (x *CreateVolume) code(c *coder) {
	id(c, &x.Volume)
	c.str(&x.Name)
	u64(c, &x.Size)
	x.Options.code(c)
	x.Labels.code(c)
	id(c, &x.Lineage)
	u64(c, &x.Created)
	codePlacement(c, &x.Placement)
}

func (x *DeleteVolume) code(c *coder) { id(c, &x.Volume) }
func (x *ReplicaGone) code(c *coder)  { id(c, &x.Replica) }

func (x *AttachBegin) code(c *coder) {
	id(c, &x.Volume)
	id(c, &x.Node)
	id(c, &x.Instance)
	u64(c, &x.Expect)
	id(c, &x.Session)
	u64(c, &x.Since)
	c.bool(&x.Takeover)
	c.bool(&x.Force)
	c.bool(&x.Maintenance)
}

func (x *Activate) code(c *coder) {
	codeSegmentID(c, &x.Segment)
	u64(c, &x.Epoch)
	u64(c, &x.S)
	list(c, &x.ISR, func(c *coder, r *holdfast.ReplicaID) { id(c, r) })
	c.bool(&x.Continuous)
}

func (x *ShrinkISR) code(c *coder) {
	codeSegmentID(c, &x.Segment)
	u64(c, &x.Epoch)
	u64(c, &x.ISRVersion)
	id(c, &x.Replica)
	u64(c, &x.Commit)
}

func (x *GrowISR) code(c *coder) {
	codeSegmentID(c, &x.Segment)
	u64(c, &x.Epoch)
	u64(c, &x.ISRVersion)
	id(c, &x.Replica)
	u64(c, &x.Commit)
}

func (x *Detach) code(c *coder) {
	id(c, &x.Volume)
	u64(c, &x.Epoch)
	list(c, &x.Ends, func(c *coder, e *SegmentEnd) {
		u32(c, &e.Index)
		u64(c, &e.End)
		u64(c, &e.Commit)
	})
	u64(c, &x.Since)
}

func (x *AddReplica) code(c *coder) {
	codeSegmentID(c, &x.Segment)
	u64(c, &x.LayoutVersion)
	id(c, &x.Replica)
	id(c, &x.Disk)
}

func (x *RemoveReplica) code(c *coder) {
	codeSegmentID(c, &x.Segment)
	u64(c, &x.LayoutVersion)
	id(c, &x.Replica)
	c.bool(&x.Force)
}

func (x *StartSync) code(c *coder) {
	codeSegmentID(c, &x.Segment)
	u64(c, &x.Epoch)
	id(c, &x.Replica)
}

func (x *SetFormat) code(c *coder) {
	id(c, &x.Volume)
	u64(c, &x.Epoch)
	enum(c, &x.To, formatStates)
}

func (x *ResizeVolume) code(c *coder) {
	id(c, &x.Volume)
	u64(c, &x.From)
	u64(c, &x.To)
	codePlacement(c, &x.Placement)
}

func (x *SetLabels) code(c *coder) { id(c, &x.Volume); u64(c, &x.Revision); x.Labels.code(c) }
func (x *Rename) code(c *coder)    { id(c, &x.Volume); c.str(&x.From); c.str(&x.To) }

func (x *UpdateVolume) code(c *coder) { id(c, &x.Volume); x.From.code(c); x.To.code(c) }

func (x *SetDuty) code(c *coder) {
	id(c, &x.Node)
	enum(c, &x.From, duties)
	enum(c, &x.To, duties)
}

func (x *EndRepair) code(c *coder) {
	id(c, &x.Volume)
	u64(c, &x.Epoch)
	u64(c, &x.Since)
	c.str(&x.Why)
}

func (x *ForceRecover) code(c *coder) {
	id(c, &x.Volume)
	u64(c, &x.Expect)
	list(c, &x.Choices, func(c *coder, e *SalvageChoice) { u32(c, &e.Index); id(c, &e.Replica) })
	id(c, &x.Lineage)
	u64(c, &x.Since)
}
