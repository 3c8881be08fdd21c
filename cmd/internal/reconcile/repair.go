package reconcile

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/raftstore/state"
	"github.com/holdfast-storage/holdfast/replication/attachment"
	"github.com/holdfast-storage/holdfast/replication/coordinator"
)

const (
	// repairPatience is after how long without progress a repair is given back.
	repairPatience = 2 * time.Minute
	// repairTick is how often a repair looks where it stands.
	repairTick = 250 * time.Millisecond
	// repairDetach bounds the end of one that has done all: nothing is in flight.
	repairDetach = 15 * time.Second
	// repairEvict and repairGrace are how long a repair bears with a silent member.
	// Longer than a node needs to be gone: then the repair ends instead, for nobody
	// waits for it, and a member that it left behind holds all there is.
	repairEvict = 30 * time.Second
	repairGrace = 15 * time.Second
)

// repair is a maintenance attachment at work: this node fills the replicas of a
// detached volume, without a device, without a promise to answer reads by. It runs
// beside the volume's turn (held): a user's attach does not wait for it.
type repair struct {
	epoch holdfast.Epoch
	stop  context.CancelFunc

	mu  sync.Mutex
	att *attachment.Attachment // nil before it began, and when it is over
}

// Repairing is how a repair stands that runs here.
type Repairing struct {
	Epoch  holdfast.Epoch
	Status attachment.Status
}

// Repair says how the repair of a volume stands, if one runs here.
func (a *Attachments) Repair(id holdfast.VolumeID) (Repairing, bool) {
	a.mu.Lock()
	r := a.repairs[id]
	a.mu.Unlock()
	if r == nil {
		return Repairing{}, false
	}
	r.mu.Lock()
	att := r.att
	r.mu.Unlock()
	if att == nil {
		return Repairing{}, false
	}
	return Repairing{Epoch: r.epoch, Status: att.Status()}, true
}

// tendRepairs begins the repairs that raft gave this process and ends those that it
// took away: by a user's attach, another node, or because the volume is gone.
func (a *Attachments) tendRepairs(ctx context.Context, view *state.View) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for id, r := range a.repairs {
		if v, ok := view.Volume(id); !ok || !a.ours(v) || v.Epoch != r.epoch {
			r.stop()
			delete(a.repairs, id)
		}
	}
	if a.ctx.Err() != nil || ctx.Err() != nil { // Close waits for no new ones
		return
	}
	for v := range view.Volumes() {
		if !a.ours(v) || a.repairs[v.ID] != nil {
			continue
		}
		ctx, cancel := a.bound(ctx)
		r := &repair{epoch: v.Epoch, stop: cancel}
		a.repairs[v.ID] = r // stays until raft knows that it is over: once for each epoch
		a.wg.Go(func() {
			defer cancel()
			a.runRepair(ctx, r, v)
		})
	}
}

// ours says whether a volume is this process's to repair.
func (a *Attachments) ours(v *state.Volume) bool {
	return !v.Deleted && v.Repair.Holder == (state.Holder{Node: a.o.Node, Instance: a.o.Instance})
}

// runRepair repairs, and tells raft if that did not do everything, until ctx ends:
// then the repair is not this process's any more.
func (a *Attachments) runRepair(ctx context.Context, r *repair, v *state.Volume) {
	a.o.Logger.Info("repair begins", "volume", v.Name, "epoch", uint64(v.Epoch))
	err := a.repairVolume(ctx, r, v)
	if err == nil {
		a.o.Logger.Info("volume repaired", "volume", v.Name, "epoch", uint64(v.Epoch))
		return
	}
	if ctx.Err() != nil {
		a.o.Logger.Info("a repair is ended by another", "volume", v.Name, "epoch", uint64(v.Epoch))
		return
	}
	a.o.Logger.Warn("a repair did not do everything", "volume", v.Name, "epoch", uint64(v.Epoch), "err", err)
	end := &state.EndRepair{Volume: v.ID, Epoch: v.Epoch, Since: time.Now().Unix(), Why: err.Error()}
	end.Why = end.Why[:min(len(end.Why), state.MaxTextLength)]
	for {
		ask, cancel := context.WithTimeout(ctx, 10*time.Second)
		_, err := a.o.Cluster.Propose(ask, end)
		cancel()
		if err == nil || refusedForGood(err) {
			return
		}
		select {
		case <-time.After(retryEvery):
		case <-ctx.Done():
			return
		}
	}
}

// refusedForGood says whether to propose the same again is in vain.
func refusedForGood(err error) bool {
	var reason state.Reason
	return errors.As(err, &reason) || errors.Is(err, holdfast.ErrNotFound) || errors.Is(err, holdfast.ErrInvalid)
}

// repairVolume fills what can be filled and detaches. Its error says what stood in
// the way.
func (a *Attachments) repairVolume(ctx context.Context, r *repair, v *state.Volume) error {
	if err := a.silentCopy(v); err != nil {
		return err
	}
	att, err := attachment.New(a.repairOptions(v))
	if err != nil {
		return err
	}
	r.mu.Lock()
	r.att = att
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		r.att = nil
		r.mu.Unlock()
		att.Close()
	}()
	tick := time.NewTicker(repairTick)
	defer tick.Stop()
	best, since, told := standing{}, time.Now(), v
	for {
		select {
		case <-att.Done():
			return cmp.Or(att.Err(), error(holdfast.ErrFenced))
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		now, ok := a.o.Cluster.View().Volume(v.ID)
		if !ok || now.Epoch != v.Epoch {
			continue // ctx is about to end
		}
		if now != told {
			told = now
			a.tellRepair(att, now)
		}
		if err := a.silentCopy(now); err != nil {
			return err
		}
		status := att.Status()
		if status.Active && !a.fillable(now) {
			return a.endRepair(ctx, att)
		}
		if s := standingOf(status).max(best); s != best {
			best, since = s, time.Now()
		} else if time.Since(since) >= cmp.Or(a.o.RepairPatience, repairPatience) {
			return stuck(status, time.Since(since))
		}
	}
}

// endRepair detaches a volume that is as whole as it can be.
func (a *Attachments) endRepair(ctx context.Context, att *attachment.Attachment) error {
	ctx, cancel := context.WithTimeout(ctx, repairDetach)
	defer cancel()
	if err := att.Detach(ctx); err != nil {
		return fmt.Errorf("detach after the repair: %w", err)
	}
	return nil
}

func (a *Attachments) repairOptions(v *state.Volume) attachment.Options {
	o := a.attachmentOptions(v, v)
	o.PingsOnly = true // no promise that the next attach would have to wait out
	o.Policy.FailHeldAfter = 0
	o.Limits = coordinator.Limits{Evict: repairEvict, OpAge: repairEvict, AttachGrace: repairGrace}
	o.Gone = a.replaced
	o.Logger = o.Logger.With("repair", true)
	return o
}

// replaced says whether a node's replicas are made anew elsewhere.
func (a *Attachments) replaced(node holdfast.NodeID) bool {
	return a.o.Replaced != nil && a.o.Replaced(node)
}

// silentCopy is an error if a node is gone whose in-sync replica would be left
// behind, and that will be back.
func (a *Attachments) silentCopy(v *state.Volume) error {
	view := a.o.Cluster.View()
	for i := range v.Segments {
		for _, r := range v.Segments[i].Replicas {
			d, ok := view.Disk(r.Disk)
			if !ok || r.Role != holdfast.RoleInSync || d.State != holdfast.DiskOK || !a.o.Cluster.Gone(d.Node) || a.replaced(d.Node) {
				continue
			}
			name := d.Node.String()
			if n, ok := view.Node(d.Node); ok {
				name = n.Name
			}
			return holdfast.Errorf(holdfast.ErrUnavailable, "node %s, which has an in-sync replica, is gone: going on would leave that behind", name)
		}
	}
	return nil
}

// fillable says whether a replica is not in sync that could be brought there: on a
// good disk of a node that answers.
func (a *Attachments) fillable(v *state.Volume) bool {
	view := a.o.Cluster.View()
	for i := range v.Segments {
		for _, r := range v.Segments[i].Replicas {
			d, ok := view.Disk(r.Disk)
			wanted := (r.Role == holdfast.RoleSyncing || r.Role == holdfast.RoleStale) && !r.Leaving
			if ok && wanted && d.State == holdfast.DiskOK && !a.o.Cluster.Gone(d.Node) {
				return true
			}
		}
	}
	return false
}

func (a *Attachments) tellRepair(att *attachment.Attachment, v *state.Volume) {
	for i := range v.Segments {
		att.UpdateReplicas(uint32(i), a.replicas(&v.Segments[i]))
	}
}

// standing is how far a repair has come.
type standing struct {
	active bool
	inSync int
	bytes  int64 // sent to fill
	copied int64 // chunks
	tails  holdfast.Seq
}

func standingOf(s attachment.Status) standing {
	st := standing{active: s.Active}
	for i := range s.Segments {
		st.bytes += s.Segments[i].BytesResynced
		for _, m := range s.Segments[i].State.Members {
			if m.InSync {
				st.inSync++
			}
			st.copied += m.CopyDone
			st.tails += m.Tail
		}
	}
	return st
}

// max is the furthest of both in each.
func (a standing) max(b standing) standing {
	return standing{active: a.active || b.active, inSync: max(a.inSync, b.inSync), bytes: max(a.bytes, b.bytes), copied: max(a.copied, b.copied), tails: max(a.tails, b.tails)}
}

// stuck says what a repair without progress waited for.
func stuck(s attachment.Status, long time.Duration) error {
	what := waitsOf(s)
	for i := range s.Segments {
		for _, m := range s.Segments[i].Members {
			if what == "" && m.LastError != "" {
				what = "a replica that was not reached: " + m.LastError
			}
		}
	}
	return holdfast.Errorf(holdfast.ErrTimeout, "no progress for %v; it waited for %s", long.Round(time.Second), cmp.Or(what, "replicas to come into sync"))
}
