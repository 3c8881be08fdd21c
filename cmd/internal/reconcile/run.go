package reconcile

import (
	"context"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

// Run attaches again what the record says, tells running attachments what changed
// in raft, and repairs what raft says is this process's to repair, until ctx ends.
func (a *Attachments) Run(ctx context.Context) {
	a.restore(ctx)
	known := map[holdfast.VolumeID]*state.Volume{}
	for ctx.Err() == nil {
		changed := a.o.Cluster.Changed()
		view := a.o.Cluster.View()
		a.tendRepairs(ctx, view)
		was := known
		known = map[holdfast.VolumeID]*state.Volume{}
		for _, id := range a.List() {
			v, ok := view.Volume(id)
			if !ok {
				continue
			}
			if was[id] != v {
				a.tellVolume(id, v)
			}
			known[id] = v
			a.tellLiveness(id, view)
		}
		select {
		case <-changed:
		case <-ctx.Done():
		}
	}
}

func (a *Attachments) tellVolume(id holdfast.VolumeID, v *state.Volume) {
	a.mu.Lock()
	h := a.held[id]
	a.mu.Unlock()
	if att, epoch := h.activeIn(); att != nil {
		if v.Epoch > epoch {
			// Its replicas may never tell it: those that a salvage abandoned
			// are asked by nobody.
			a.wg.Go(func() { a.endOver(att, v, epoch) })
			return
		}
		att.SetPolicy(policy(v))
		for i := range v.Segments {
			att.UpdateReplicas(uint32(i), a.replicas(&v.Segments[i]))
		}
	}
}

func (a *Attachments) tellLiveness(id holdfast.VolumeID, view *state.View) {
	a.mu.Lock()
	h := a.held[id]
	a.mu.Unlock()
	att := h.active()
	if att == nil {
		return
	}
	for n := range view.Nodes() {
		att.NodeGone(n.ID, a.o.Cluster.Gone(n.ID))
	}
}

// restore attaches again, side by side, what this node held when it ended. What
// another node holds by now stays there. Devices that nothing remembers were
// swept before the first request (New).
func (a *Attachments) restore(ctx context.Context) {
	for id := range a.left {
		a.wg.Go(func() { a.restoreOne(ctx, id) })
	}
}

// restoreOne keeps trying until the volume is attached, is another's, or ctx
// ends: its clients wait for it.
func (a *Attachments) restoreOne(ctx context.Context, id holdfast.VolumeID) {
	for ctx.Err() == nil {
		err := a.restoreNow(ctx, id)
		if err == nil {
			return
		}
		a.o.Logger.Warn("attach again after the restart", "volume", id, "err", err)
		select {
		case <-time.After(retryEvery):
		case <-ctx.Done():
		}
	}
}

// restoreNow decides under the volume's turn, so that no request of a user
// comes between what it reads and what it does.
func (a *Attachments) restoreNow(ctx context.Context, id holdfast.VolumeID) error {
	h, err := a.enter(ctx, id)
	if err != nil {
		return err
	}
	defer a.leave(id, h)
	u := a.used(id)
	if h.active() != nil || !u.NBD && !u.Device {
		return nil // a user attached or detached it meanwhile
	}
	view, err := a.o.Cluster.Read(ctx)
	if err != nil {
		return err
	}
	v, ok := view.Volume(id)
	if !ok || v.Deleted || v.Phase == state.PhaseDetached || v.Holder.Node != a.o.Node {
		a.o.Logger.Warn("a volume that was attached here has been taken over or detached", "volume", id)
		return a.forget(ctx, id)
	}
	_, err = a.attach(ctx, h, id, AttachOptions{NBD: u.NBD, Device: u.Device})
	return err
}
