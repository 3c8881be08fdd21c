package reconcile

import (
	"context"
	"errors"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/raftstore/state"
	"github.com/holdfast-storage/holdfast/replication/attachment"
)

// meta is raft as the writer sees it.
type meta struct{ c Cluster }

var _ attachment.Meta = meta{}

// propose translates the state machine's refusals into what attachment.Meta
// promises.
func (m meta) propose(ctx context.Context, cmd state.Command) (holdfast.ISRVersion, error) {
	res, err := m.c.Propose(ctx, cmd)
	var reason state.Reason
	if errors.As(err, &reason) && reason == state.ReasonStaleISR {
		return 0, errors.Join(attachment.ErrConflict, err)
	}
	return res.ISRVersion, err
}

// Activate implements attachment.Meta.
func (m meta) Activate(ctx context.Context, seg holdfast.SegmentID, epoch holdfast.Epoch, _ holdfast.ISRVersion,
	start holdfast.Seq, members []holdfast.ReplicaID, continuous bool) (holdfast.ISRVersion, error) {
	return m.propose(ctx, &state.Activate{Segment: seg, Epoch: epoch, S: start, ISR: members, Continuous: continuous})
}

// ShrinkISR implements attachment.Meta.
func (m meta) ShrinkISR(ctx context.Context, seg holdfast.SegmentID, epoch holdfast.Epoch, isr holdfast.ISRVersion, r holdfast.ReplicaID, commit holdfast.Seq) (holdfast.ISRVersion, error) {
	return m.propose(ctx, &state.ShrinkISR{Segment: seg, Epoch: epoch, ISRVersion: isr, Replica: r, Commit: commit})
}

// GrowISR implements attachment.Meta.
func (m meta) GrowISR(ctx context.Context, seg holdfast.SegmentID, epoch holdfast.Epoch, isr holdfast.ISRVersion, r holdfast.ReplicaID, commit holdfast.Seq) (holdfast.ISRVersion, error) {
	return m.propose(ctx, &state.GrowISR{Segment: seg, Epoch: epoch, ISRVersion: isr, Replica: r, Commit: commit})
}

// StartSync implements attachment.Meta.
func (m meta) StartSync(ctx context.Context, seg holdfast.SegmentID, epoch holdfast.Epoch, r holdfast.ReplicaID) error {
	_, err := m.propose(ctx, &state.StartSync{Segment: seg, Epoch: epoch, Replica: r})
	return err
}

// Segment implements attachment.Meta.
func (m meta) Segment(ctx context.Context, seg holdfast.SegmentID) (attachment.Record, error) {
	view, err := m.c.Read(ctx)
	if err != nil {
		return attachment.Record{}, err
	}
	v, s, ok := view.Segment(seg)
	if !ok || v.Deleted {
		return attachment.Record{}, holdfast.Errorf(holdfast.ErrFenced, "segment %v was removed", seg)
	}
	return attachment.Record{Epoch: v.Epoch, Activated: s.Last().Epoch == v.Epoch, ISRVersion: s.ISRVersion, ISR: s.ISR()}, nil
}

// Detach implements attachment.Meta.
func (m meta) Detach(ctx context.Context, volume holdfast.VolumeID, epoch holdfast.Epoch, ends []attachment.SegmentEnd) error {
	cmd := &state.Detach{Volume: volume, Epoch: epoch, Since: time.Now().Unix(), Ends: make([]state.SegmentEnd, len(ends))}
	for _, e := range ends {
		if int(e.Segment.Index) >= len(ends) {
			return holdfast.Errorf(holdfast.ErrInvalid, "segment %v is not of a volume of %d segments", e.Segment, len(ends))
		}
		cmd.Ends[e.Segment.Index] = state.SegmentEnd{Index: e.Segment.Index, End: e.End, Commit: e.Commit}
	}
	_, err := m.propose(ctx, cmd)
	return err
}
