package server

import (
	"context"
	"fmt"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/cmd/internal/api"
	"github.com/holdfast-storage/holdfast/cmd/internal/api/apipb"
	"github.com/holdfast-storage/holdfast/cmd/internal/reconcile"
	"github.com/holdfast-storage/holdfast/raftstore/state"
	"github.com/holdfast-storage/holdfast/replication/attachment"
	"github.com/holdfast-storage/holdfast/replication/coordinator"
)

// ExplainVolume implements apipb.HoldfastServer.
func (s *Server) ExplainVolume(ctx context.Context, req *apipb.VolumeRequest) (*apipb.Explanation, error) {
	v, err := s.o.Attachments.Find(ctx, req.Name)
	if err != nil {
		return nil, err
	}
	var resp *apipb.Explanation
	done, callErr := s.writerCall(ctx, v, func(ctx context.Context, c *api.Client) (err error) {
		resp, err = c.ExplainVolume(ctx, req)
		return err
	})
	if done && callErr == nil {
		return resp, nil
	}
	resp = s.explain(v)
	if done {
		node, what := writer(v), "the holder"
		if v.UnderRepair() {
			what = "the one that repairs"
		}
		resp.Lines = append(resp.Lines, fmt.Sprintf("%s, node %s, does not answer: %v", what, s.nodeName(node), callErr))
	}
	return resp, nil
}

func (s *Server) explain(v *state.Volume) *apipb.Explanation {
	view := s.o.Cluster.View()
	e := &apipb.Explanation{Volume: s.volume(view, v)}
	say := func(format string, args ...any) { e.Lines = append(e.Lines, fmt.Sprintf(format, args...)) }
	held, here := s.o.Attachments.Get(v.ID)
	switch {
	case v.Phase == state.PhaseDetached:
		say("volume %s is detached; the last epoch was %d", v.Name, v.Epoch)
		if line := repairLine(e.Volume.Repair); line != "" {
			say("%s", line)
		}
	case s.o.Cluster.Gone(v.Holder.Node) && v.Holder.Node != s.o.Node:
		say("volume %s: epoch %d belongs to node %s, which is gone; attach it on another node to take it over", v.Name, v.Epoch, s.nodeName(v.Holder.Node))
	default:
		say("volume %s: node %s holds epoch %d (%s)", v.Name, s.nodeName(v.Holder.Node), v.Epoch, v.Phase)
	}
	s.explainRebuilds(e, view, v)
	if here {
		if held.Waiting != "" {
			e.Waits = append(e.Waits, &apipb.WaitReason{Reason: held.Waiting})
		}
		if held.Status.Ended != nil {
			say("the session on this node ended: %v", held.Status.Ended)
		}
		for i := range held.Status.Segments {
			s.explainSegment(e, uint32(i), &held.Status.Segments[i], say)
		}
		return e
	}
	if r, ok := s.repairing(v); ok {
		for i := range r.Status.Segments {
			s.explainSegment(e, uint32(i), &r.Status.Segments[i], say)
		}
		return e
	}
	for i := range v.Segments {
		for _, r := range v.Segments[i].Replicas {
			say("segment %d: replica on node %s is %s since epoch %d", i, s.diskNode(view, r.Disk), r.Role, r.SinceEpoch)
		}
	}
	return e
}

func (s *Server) explainSegment(e *apipb.Explanation, index uint32, seg *attachment.SegmentStatus, say func(string, ...any)) {
	st := seg.State
	say("segment %d: %s, tail %d, acknowledged %d, committed %d, ack %s, %d requests in work", index, st.Phase, st.Tail, st.Acked, st.Commit, st.Ack, seg.Requests)
	for i, m := range st.Members {
		more := ""
		if i < len(seg.Members) {
			lag := seg.Members[i]
			if lag.LagOps > 0 {
				more = fmt.Sprintf(", lacks %d entries", lag.LagOps)
			}
			if m.CopyTotal > 0 {
				more += fmt.Sprintf(", %d of %d chunks copied", m.CopyDone, m.CopyTotal)
			}
			more += resyncText(lag, toSync(m, lag))
			if lag.LastError != "" && lag.Remote == "" {
				more += ", not reached: " + lag.LastError
			}
		}
		role := "not in sync"
		if m.InSync {
			role = "in sync"
		}
		say("segment %d: replica on node %s is %s (%s), tail %d, durable %d%s", index, s.nodeName(m.Node), role, m.Link, m.Tail, m.Dur, more)
	}
	e.BytesResynced += seg.BytesResynced
	for _, w := range seg.Waits {
		e.Waits = append(e.Waits, &apipb.WaitReason{Segment: index, Reason: w.For, SinceMillis: w.Time.Milliseconds()})
	}
}

// resyncText says how fast a member is brought back, and how much it lacks.
func resyncText(m attachment.MemberStatus, left int64) string {
	switch m.Resync {
	case attachment.ResyncWaiting:
		return ", waits for two other resyncs on a disk"
	case attachment.ResyncRunning:
		text := fmt.Sprintf(", resync at %s/s", holdfast.FormatSize(m.ResyncRate))
		if left > 0 {
			text += fmt.Sprintf(", %s to go", holdfast.FormatSize(left))
		}
		return text
	case attachment.ResyncNone:
	}
	return ""
}

// toSync is what a member lacks, in bytes, as far as that is known.
func toSync(m coordinator.MemberState, more attachment.MemberStatus) int64 {
	return max(0, more.LagBytes) + (m.CopyTotal-m.CopyDone)*holdfast.ChunkSize
}

// volume describes a volume from a view, and from the attachment if it is here.
func (s *Server) volume(view *state.View, v *state.Volume) *apipb.Volume {
	out := &apipb.Volume{
		Name: v.Name, Id: v.ID.String(), Size: v.Size, State: string(v.State()), Epoch: uint64(v.Epoch),
		ReplicaCount: int32(v.Options.Replicas), Fs: v.Options.FS, FsState: string(v.Format), Mkfs: v.Options.Mkfs,
		MountOptions: v.Options.MountOptions, MinCopies: int32(v.Options.MinCopies), OnQuorumLoss: holdfast.HoldPolicy(time.Duration(v.Options.FailHeldAfter) * time.Second),
		ReadPromises: readPromises(v), Labels: v.Labels.Map(), SegmentSize: v.Options.SegmentSize, Pool: v.Options.Pool, Mounts: s.o.Attachments.Users(v.Name), Mountpoint: s.o.Attachments.Path(v.Name),
	}
	if v.Phase != state.PhaseDetached {
		out.Node, out.Session = s.nodeName(v.Holder.Node), v.Session.String()
		if v.Phase == state.PhaseAttaching || v.Holder.Node != s.o.Node && s.o.Cluster.Gone(v.Holder.Node) {
			out.State = string(holdfast.VolumeUnavailable)
		}
	}
	held, here := s.o.Attachments.Get(v.ID)
	if held.Epoch < v.Epoch { // a session that was taken over and has not noticed yet
		held, here = reconcile.Held{}, false
	}
	if here && held.Active {
		out.Device, out.Uri, out.Clients = held.Device, held.URI, int32(held.Clients)
	} else if v.Phase != state.PhaseDetached && v.Holder.Node == s.o.Node {
		out.State = string(holdfast.VolumeUnavailable)
	}
	if r, ok := s.repairing(v); ok { // how far its members are
		held.Status = r.Status
	}
	for i := range v.Segments {
		for _, r := range v.Segments[i].Replicas {
			if r.Role != holdfast.RoleDeleting {
				out.Replicas = append(out.Replicas, s.replica(view, held, i, r))
			}
		}
	}
	out.Used, out.Repair = used(len(v.Segments), out.Replicas), s.repair(v)
	return out
}

func readPromises(v *state.Volume) string {
	if v.Options.PingsOnly {
		return holdfast.PromisesOff
	}
	return holdfast.PromisesOn
}

func (s *Server) replica(view *state.View, held reconcile.Held, segment int, r state.Replica) *apipb.Replica {
	out := &apipb.Replica{Id: r.ID.String(), Segment: uint32(segment), Node: s.diskNode(view, r.Disk), Disk: r.Disk.String(), State: string(r.Role), Leaving: r.Leaving, SinceEpoch: uint64(r.SinceEpoch)}
	if d, ok := view.Disk(r.Disk); ok {
		if n, ok := view.Node(d.Node); ok {
			out.Address = n.Addresses.Data
		}
	}
	if status, ok := s.o.Serve.Replica(r.ID); ok {
		out.Tail, out.Durable, out.TailEpoch = uint64(status.Core.Tail), uint64(status.Core.Dur), uint64(status.Core.TailEpoch)
		out.Used = status.Log.Used
		out.Served, out.Damaged, out.Partial = true, status.Core.Damaged || status.Failed != nil, status.Core.Syncing
	}
	if segment >= len(held.Status.Segments) {
		return out
	}
	seg := &held.Status.Segments[segment]
	for i, m := range seg.State.Members {
		if m.Replica != r.ID {
			continue
		}
		out.Tail, out.Durable = max(out.Tail, uint64(m.Tail)), max(out.Durable, uint64(m.Dur))
		if i < len(seg.Members) {
			out.BytesToSync = toSync(m, seg.Members[i])
		}
	}
	return out
}

func (s *Server) diskNode(view *state.View, id holdfast.DiskID) string {
	if d, ok := view.Disk(id); ok {
		return s.nodeName(d.Node)
	}
	return "unknown"
}
