package reconcile

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

// claim asks raft for an epoch in which this node may write (A1), and waits
// while the present holder may be gone. It returns the applied command and the
// record as it was before.
//
// A holder that is heard while we ask is alive: that is refused at once, unless
// forced. For one that is silent the leader waits, by its own record, until it
// is gone or has detached.
func (a *Attachments) claim(ctx context.Context, h *held, id holdfast.VolumeID, o AttachOptions) (state.Result, *state.Volume, error) {
	session := holdfast.NewID[holdfast.SessionID]()
	for {
		changed := a.o.Cluster.Changed()
		before, why, err := a.tryClaim(ctx, id, o)
		if err == nil {
			h.wait(o, why)
			var res state.Result
			if res, err = a.propose(ctx, before, session, o); err == nil {
				return res, before, nil
			}
			err = fmt.Errorf("attach volume %s: %w", before.Name, err)
		}
		if why = retryable(err); why == "" {
			return state.Result{}, nil, err
		}
		h.wait(o, why)
		select {
		case <-changed:
		case <-time.After(retryEvery):
		case <-ctx.Done():
			return state.Result{}, nil, holdfast.Errorf(holdfast.ErrTimeout, "the attach waited for %s", why).WithRemedy("see holdfast volume explain, or wait longer with --wait")
		}
	}
}

// tryClaim reads the volume and decides whether to propose; why says what the
// leader will wait for before it applies the proposal, if it will.
func (a *Attachments) tryClaim(ctx context.Context, id holdfast.VolumeID, o AttachOptions) (before *state.Volume, why string, err error) {
	view, err := a.o.Cluster.Read(ctx)
	if err != nil {
		return nil, "", err
	}
	v, ok := view.Volume(id)
	if !ok || v.Deleted {
		return nil, "", holdfast.Errorf(holdfast.ErrNotFound, "volume %v was removed", id)
	}
	ours := v.Holder.Node == a.o.Node
	if v.Phase == state.PhaseDetached || ours || o.Force {
		return v, "", nil
	}
	l, err := a.o.Cluster.Liveness(ctx, v.Holder)
	if err != nil {
		return nil, "", err
	}
	name := v.Holder.Node.String()
	if n, ok := view.Node(v.Holder.Node); ok {
		name = n.Name
	}
	switch {
	case l.Gone:
		return v, "", nil
	case l.Alive:
		e := holdfast.Errorf(holdfast.ErrRefused, "volume %s is attached at node %s since %s, epoch %d", v.Name, name, time.Unix(v.Since, 0).UTC().Format(time.RFC3339), v.Epoch).
			WithRemedy("detach it there, or use --force to fence it: its clients see I/O errors")
		e.Cause = state.ReasonHeld
		return nil, "", e
	}
	return v, fmt.Sprintf("node %s, the holder, to be declared gone: %s", name, l.Why), nil
}

// propose records the epoch this node is about to be given, then asks for it.
func (a *Attachments) propose(ctx context.Context, before *state.Volume, session holdfast.SessionID, o AttachOptions) (state.Result, error) {
	next := before.Epoch + 1
	err := a.remember(before.ID, func(u *use) {
		u.NBD, u.Device = u.NBD || o.NBD, u.Device || o.Device
		if !a.continues(before, *u) {
			u.Base = next
		}
		u.Next = next
	})
	if err != nil {
		return state.Result{}, err
	}
	return a.o.Cluster.Propose(ctx, &state.AttachBegin{
		Volume: before.ID, Node: a.o.Node, Instance: a.o.Instance, Expect: before.Epoch, Session: session,
		Since: time.Now().Unix(), Force: o.Force,
		Takeover: before.Phase != state.PhaseDetached && before.Holder.Node != a.o.Node,
	})
}

// continues reports whether nobody but this node held the volume since the
// epochs in the record began: only then may a kernel device that an earlier run
// of this daemon served go on, for its host's caches are still true.
func (a *Attachments) continues(v *state.Volume, u use) bool {
	return v.Phase != state.PhaseDetached && v.Holder.Node == a.o.Node && u.Base > 0 && v.Epoch >= u.Base && v.Epoch <= u.Next
}

// retryable says what to wait for when an error can pass by itself; "" if it
// cannot.
func retryable(err error) string {
	var reason state.Reason
	errors.As(err, &reason)
	switch {
	case reason == state.ReasonStaleRevision:
		return "another attach that came between"
	case reason == state.ReasonHeld:
		return ""
	case errors.Is(err, holdfast.ErrUnavailable), errors.Is(err, holdfast.ErrTimeout):
		return "raft: " + err.Error()
	}
	return ""
}
