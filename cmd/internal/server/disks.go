package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/cmd/internal/api"
	"github.com/holdfast-storage/holdfast/cmd/internal/api/apipb"
	"github.com/holdfast-storage/holdfast/cmd/internal/reconcile"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

// askOthers bounds how long a list of disks waits for the nodes that have them.
const askOthers = 2 * time.Second

// ListDisks implements apipb.HoldfastServer. Of a node that does not answer it tells
// what raft knows.
func (s *Server) ListDisks(ctx context.Context, req *apipb.ListDisksRequest) (*apipb.ListDisksResponse, error) {
	view := s.o.Cluster.View()
	if _, ok := view.NodeByName(req.Node); req.Node != "" && !ok {
		return nil, holdfast.Errorf(holdfast.ErrNotFound, "no node %q", req.Node).WithRemedy("see holdfast node ls")
	}
	ctx, cancel := context.WithTimeout(ctx, askOthers)
	defer cancel()
	resp := &apipb.ListDisksResponse{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for n := range view.Nodes() {
		if req.Node != "" && req.Node != n.Name {
			continue
		}
		wg.Go(func() {
			disks := s.disksOf(ctx, view, n)
			mu.Lock()
			defer mu.Unlock()
			resp.Disks = append(resp.Disks, disks...)
		})
	}
	wg.Wait()
	slices.SortFunc(resp.Disks, func(a, b *apipb.Disk) int { return cmp.Or(cmp.Compare(a.Node, b.Node), cmp.Compare(a.Id, b.Id)) })
	return resp, nil
}

// disksOf asks a node for its disks.
func (s *Server) disksOf(ctx context.Context, view *state.View, n *state.Node) []*apipb.Disk {
	var told *apipb.ListDisksResponse
	done, err := s.nodeCall(ctx, n.ID, func(ctx context.Context, c *api.Client) (err error) {
		told, err = c.ListDisks(ctx, &apipb.ListDisksRequest{Node: n.Name})
		return err
	})
	if done && err == nil {
		return told.Disks
	}
	return s.disks(view, n.ID)
}

func (s *Server) disks(view *state.View, node holdfast.NodeID) []*apipb.Disk {
	var list []*apipb.Disk
	for d := range view.Disks() {
		if d.Node == node {
			list = append(list, s.disk(view, d))
		}
	}
	return list
}

// disk describes a disk from the tables, and from what is open here.
func (s *Server) disk(view *state.View, d *state.Disk) *apipb.Disk {
	out := &apipb.Disk{Id: d.ID.String(), Node: s.nodeName(d.Node), State: string(d.State), Pool: d.Pool, Reason: d.Reason, Leaving: d.Leaving, Removed: d.Removed,
		Size: d.Size, Free: d.Free, Used: d.Size - d.Free, OpenCount: uint64(d.OpenCount)}
	if d.Size > 0 && !d.Removed {
		setFill(out, reconcile.Fill{Ratio: float64(d.Size-d.Free) / float64(d.Size)})
	}
	for p := range view.ReplicasOn(d.ID) {
		out.Replicas++
		if status, ok := s.o.Serve.Replica(p.Replica.ID); ok && d.Leaving {
			out.Left += status.Log.Used
		}
	}
	if d.Node != s.o.Node {
		return out
	}
	for _, o := range s.o.Disks.List() {
		if o.Stat.Disk == d.ID {
			s.openDisk(out, o)
		}
	}
	return out
}

// openDisk adds what only the disk's own node knows.
func (s *Server) openDisk(out *apipb.Disk, o reconcile.OpenedDisk) {
	st := o.Stat
	out.Open, out.Path, out.WalSize, out.WalUsed = true, o.Path, st.WALSize, st.WALUsed
	out.Size, out.Used, out.Reserved = st.Capacity, st.Used, st.Reserved
	out.Reclaimable, out.Allocated, out.MapSize = st.Reclaimable, st.Allocated, st.Map
	out.Free, out.FreeHost = o.Room.Free, o.Room.Host
	setFill(out, o.Fill)
	out.BlocksFound, out.BlocksRepaired = st.Repair.Found, st.Repair.Repaired
	for _, r := range s.o.Serve.Replicas() {
		if r.Disk == st.Disk {
			out.BadBlocks += r.Log.Bad
			out.LostBlocks += r.Log.Poison
		}
	}
	sc := o.Scrub
	out.Scrub = &apipb.Scrub{Running: sc.Running, Total: sc.Total, Done: sc.Read, BadBlocks: sc.Bad, LostBlocks: sc.Lost, Rate: sc.Rate,
		Began: unix(sc.Began), Ended: unix(sc.Ended), Next: unix(sc.Next), Scrubs: sc.Scrubs}
	if sc.Err != nil {
		out.Scrub.Error = sc.Err.Error()
	}
}

func setFill(out *apipb.Disk, f reconcile.Fill) {
	out.FullPercent, out.FullHost, out.Watermark = int32(f.Percent()), f.Host, int32(f.Mark())
}

// fillWarning tells a person of a disk that reached a watermark, or is "".
func fillWarning(d *apipb.Disk) string {
	if d.Watermark == 0 || d.Removed {
		return ""
	}
	what := "disk " + cmp.Or(d.Path, d.Id)
	if d.FullHost {
		what = "the file system of " + what
	}
	more := ""
	if d.Watermark > reconcile.MarkWarn {
		more = ": " + reconcile.MarkMeans(int(d.Watermark))
	}
	return fmt.Sprintf("%s, node %s, is %d %% full%s; add a disk (holdfast disk add), or remove or trim what is not needed", what, d.Node, d.FullPercent, more)
}

func unix(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}

// leastPrefix is how many letters of a disk's id name it at least.
const leastPrefix = 4

// findDisk returns the disk of an id or of the beginning of one.
func findDisk(view *state.View, id string) (*state.Disk, error) {
	if full, err := holdfast.ParseID[holdfast.DiskID](id); err == nil {
		if d, ok := view.Disk(full); ok {
			return d, nil
		}
	}
	var found *state.Disk
	for d := range view.Disks() {
		if len(id) < leastPrefix || !strings.HasPrefix(d.ID.String(), strings.ToLower(id)) {
			continue
		}
		if found != nil {
			return nil, holdfast.Errorf(holdfast.ErrInvalid, "%q is the beginning of more than one disk's id", id).WithRemedy("give more of it")
		}
		found = d
	}
	if found == nil {
		return nil, holdfast.Errorf(holdfast.ErrNotFound, "no disk %q", id).WithRemedy("holdfast disk ls shows their ids; the first %d letters do", leastPrefix)
	}
	return found, nil
}

// diskNow finds a disk in a view that shows all that was decided before the call.
func (s *Server) diskNow(ctx context.Context, id string) (*state.View, *state.Disk, error) {
	view, err := s.o.Cluster.Read(ctx)
	if err != nil {
		return nil, nil, err
	}
	d, err := findDisk(view, id)
	return view, d, err
}

// InspectDisk implements apipb.HoldfastServer. The disk's node knows most.
func (s *Server) InspectDisk(ctx context.Context, req *apipb.DiskRequest) (*apipb.Disk, error) {
	view := s.o.Cluster.View()
	d, err := findDisk(view, req.Id)
	if errors.Is(err, holdfast.ErrNotFound) { // added this very moment
		view, d, err = s.diskNow(ctx, req.Id)
	}
	if err != nil {
		return nil, err
	}
	var told *apipb.Disk
	done, err := s.nodeCall(ctx, d.Node, func(ctx context.Context, c *api.Client) (err error) {
		ctx, cancel := context.WithTimeout(ctx, askOthers)
		defer cancel()
		told, err = c.InspectDisk(ctx, &apipb.DiskRequest{Id: d.ID.String()})
		return err
	})
	if done && err == nil {
		return told, nil
	}
	out := s.disk(view, d)
	for p := range view.ReplicasOn(d.ID) {
		r := &apipb.DiskReplica{Id: p.Replica.ID.String(), Volume: p.Volume.Name, Segment: p.Segment.Index, State: string(p.Replica.Role), Size: p.Size, Leaving: p.Replica.Leaving}
		if status, ok := s.o.Serve.Replica(p.Replica.ID); ok {
			r.Used, r.BadBlocks = status.Log.Used, status.Log.Bad
		}
		out.OnIt = append(out.OnIt, r)
	}
	return out, nil
}

// AddDisk implements apipb.HoldfastServer.
func (s *Server) AddDisk(ctx context.Context, req *apipb.AddDiskRequest) (*apipb.Disk, error) {
	spec, err := reconcile.ParseDisk("disk", req.Spec)
	if err != nil {
		return nil, err
	}
	if !strings.HasPrefix(req.Spec, "/") {
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "disk %q: the path is not absolute", req.Spec).WithRemedy("begin it with /")
	}
	node := s.o.Node
	if req.Node != "" {
		n, err := findNode(s.o.Cluster.View(), req.Node)
		if err != nil {
			return nil, err
		}
		node = n.ID
	}
	var added *apipb.Disk
	done, err := s.nodeCall(ctx, node, func(ctx context.Context, c *api.Client) (err error) {
		added, err = c.AddDisk(ctx, req)
		return err
	})
	if done || err != nil {
		return added, err
	}
	if node != s.o.Node {
		return nil, s.noAnswer(node)
	}
	if _, err := s.o.Cluster.Read(ctx); err != nil { // nothing is formatted that raft cannot be told of
		return nil, err
	}
	id, err := s.o.Disks.Add(ctx, spec, req.Force)
	if err != nil {
		return nil, err
	}
	view, d, err := s.diskNow(ctx, id.String())
	if err != nil {
		return nil, err
	}
	return s.disk(view, d), nil
}

func (s *Server) noAnswer(node holdfast.NodeID) error {
	return holdfast.Errorf(holdfast.ErrUnavailable, "node %s does not answer", s.nodeName(node)).WithRemedy("see holdfast node ls")
}

// RemoveDisk implements apipb.HoldfastServer. The controller moves what is on it,
// and its node lets it go.
func (s *Server) RemoveDisk(ctx context.Context, req *apipb.RemoveDiskRequest) (*apipb.Disk, error) {
	view, d, err := s.diskNow(ctx, req.Id)
	if err != nil {
		return nil, err
	}
	if d.Removed {
		return nil, holdfast.Errorf(holdfast.ErrNotFound, "disk %v was removed", d.ID).WithRemedy("see holdfast disk ls")
	}
	if !req.Undo && !req.Force && !d.Leaving {
		if err := s.mayLeave(view, d); err != nil {
			return nil, err
		}
	}
	if _, err := s.o.Cluster.Propose(ctx, &state.SetDiskLeaving{Disk: d.ID, Leaving: !req.Undo}); err != nil {
		return nil, err
	}
	if !req.Undo && s.gone(d.Node) {
		// Nobody is there to let it go. What is being deleted goes with it.
		if _, err := s.o.Cluster.Propose(ctx, &state.DiskRemove{Disk: d.ID, Force: true}); err != nil && !errors.Is(err, holdfast.ErrRefused) {
			return nil, err
		}
	}
	s.o.Logger.Info("a disk is told to leave, or to stay", "disk", d.ID, "node", s.nodeName(d.Node), "leaving", !req.Undo)
	return s.InspectDisk(ctx, &apipb.DiskRequest{Id: d.ID.String()})
}

// mayLeave refuses what could never end: a replica that no other disk can take.
func (s *Server) mayLeave(view *state.View, d *state.Disk) error {
	without, _, err := view.Apply(view.Index()+1, &state.SetDiskLeaving{Disk: d.ID, Leaving: true})
	if err != nil {
		return err
	}
	for p := range view.ReplicasOn(d.ID) {
		if p.Replica.Role == holdfast.RoleDeleting {
			continue
		}
		if p.Replica.Role == holdfast.RoleOrphan {
			return holdfast.Errorf(holdfast.ErrRefused, "volume %s has an abandoned replica on disk %v, and those are not moved", p.Volume.Name, d.ID).
				WithRemedy("holdfast volume salvage %s --drop-orphans deletes it", p.Volume.Name)
		}
		seg := &p.Volume.Segments[p.Segment.Index]
		var stay []state.Replica
		copies := 0
		for _, r := range seg.Replicas {
			o, ok := without.Disk(r.Disk)
			if !ok || r.ID == p.Replica.ID || r.Leaving || !o.Usable() || r.Role == holdfast.RoleDeleting || r.Role == holdfast.RoleOrphan {
				continue
			}
			stay = append(stay, r)
			if r.Role == holdfast.RoleInSync && !s.gone(o.Node) {
				copies++
			}
		}
		if len(stay) >= p.Volume.Options.Replicas {
			continue
		}
		_, err := state.PlaceOne(without, &state.Segment{Size: p.Size, Replicas: stay}, state.PlaceRequest{Pool: p.Volume.Options.Pool, Avoid: s.goneNodes(view), NewReplica: holdfast.NewID[holdfast.ReplicaID]})
		if err == nil {
			continue
		}
		what := "a copy of volume " + p.Volume.Name
		if copies == 0 && p.Replica.Role == holdfast.RoleInSync {
			what = "the last copy in sync of volume " + p.Volume.Name
		}
		pool := ""
		if p.Volume.Options.Pool != "" {
			pool = " in pool " + p.Volume.Options.Pool
		}
		return holdfast.Errorf(holdfast.ErrRefused, "disk %v has %s, and it has nowhere to go%s: %v", d.ID, what, pool, holdfast.MessageOf(err)).
			WithRemedy("add a disk (holdfast disk add) or a node, lower its replicas with holdfast volume update, or use --force to move what can be moved")
	}
	return nil
}

// ScrubDisk implements apipb.HoldfastServer.
func (s *Server) ScrubDisk(ctx context.Context, req *apipb.ScrubDiskRequest) (*apipb.Disk, error) {
	view := s.o.Cluster.View()
	d, err := findDisk(view, req.Id)
	if err != nil {
		return nil, err
	}
	var told *apipb.Disk
	done, err := s.nodeCall(ctx, d.Node, func(ctx context.Context, c *api.Client) (err error) {
		told, err = c.ScrubDisk(ctx, req)
		return err
	})
	if done || err != nil {
		return told, err
	}
	if d.Node != s.o.Node {
		return nil, s.noAnswer(d.Node)
	}
	if err := s.o.Disks.Scrub(d.ID, req.Rate, req.Stop); err != nil {
		return nil, err
	}
	return s.disk(view, d), nil
}
