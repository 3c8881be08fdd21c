package server

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/disk"
	"github.com/holdfast-storage/holdfast/cmd/internal/api"
	"github.com/holdfast-storage/holdfast/cmd/internal/api/apipb"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

// askWriter bounds how long a look at a volume waits for its writer: a node that is
// silent for longer is gone.
const askWriter = 5 * time.Second

// ListVolumes implements apipb.HoldfastServer: by name. Every node that knows
// something of one is asked once, for all of them.
func (s *Server) ListVolumes(ctx context.Context, _ *apipb.ListVolumesRequest) (*apipb.ListVolumesResponse, error) {
	view := s.o.Cluster.View()
	resp := &apipb.ListVolumesResponse{}
	var volumes []*state.Volume
	nodes := map[holdfast.NodeID]time.Duration{}
	for v := range view.Volumes() {
		volumes = append(volumes, v)
		for n := range knowing(view, v) {
			nodes[n] = askOthers
		}
	}
	slices.SortFunc(volumes, func(a, b *state.Volume) int { return cmp.Compare(a.Name, b.Name) })
	for _, v := range volumes {
		resp.Volumes = append(resp.Volumes, s.volume(view, v))
	}
	s.addDisks(resp.Volumes...)
	told := s.askNodes(ctx, nodes, func(ctx context.Context, c *api.Client) ([]*apipb.Volume, error) {
		list, err := c.ListVolumes(ctx, &apipb.ListVolumesRequest{})
		return list.GetVolumes(), err
	})
	for i, v := range volumes {
		resp.Volumes[i] = told.addTo(resp.Volumes[i], view, v)
	}
	return resp, nil
}

// InspectVolume implements apipb.HoldfastServer. One that does not answer in time is
// no reason to say nothing.
func (s *Server) InspectVolume(ctx context.Context, req *apipb.VolumeRequest) (*apipb.Volume, error) {
	v, err := s.o.Attachments.Find(ctx, req.Name)
	if err != nil {
		return nil, err
	}
	view := s.o.Cluster.View()
	own := s.volume(view, v)
	s.addDisks(own)
	told := s.askNodes(ctx, knowing(view, v), func(ctx context.Context, c *api.Client) ([]*apipb.Volume, error) {
		answer, err := c.InspectVolume(ctx, &apipb.VolumeRequest{Name: v.ID.String()})
		return []*apipb.Volume{answer}, err
	})
	return told.addTo(own, view, v), nil
}

// knowing are the nodes that know something of a volume, and for how long a look at it
// waits for each.
func knowing(view *state.View, v *state.Volume) map[holdfast.NodeID]time.Duration {
	nodes := map[holdfast.NodeID]time.Duration{}
	for _, n := range replicaNodes(view, v) {
		nodes[n] = askOthers
	}
	if v.HasWriter() {
		nodes[writer(v)] = askWriter
	}
	return nodes
}

// answers are what other nodes tell of volumes, by the volumes' ids.
type answers map[holdfast.NodeID]map[string]*apipb.Volume

// askNodes asks nodes, all at once, for what they know of volumes.
func (s *Server) askNodes(ctx context.Context, nodes map[holdfast.NodeID]time.Duration, ask func(context.Context, *api.Client) ([]*apipb.Volume, error)) answers {
	told := answers{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for n, wait := range nodes {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, wait)
			defer cancel()
			_, _ = s.nodeCall(ctx, n, func(ctx context.Context, c *api.Client) error {
				list, err := ask(ctx, c)
				if err != nil {
					return err
				}
				of := make(map[string]*apipb.Volume, len(list))
				for _, v := range list {
					of[v.Id] = v
				}
				mu.Lock()
				defer mu.Unlock()
				told[n] = of
				return nil
			}) // who does not answer says nothing
		})
	}
	wg.Wait()
	return told
}

// addTo adds what others tell of a volume to what is known of it here. The writer knows
// most; what a replica takes of its disk only its own node knows.
func (told answers) addTo(own *apipb.Volume, view *state.View, v *state.Volume) *apipb.Volume {
	out := own
	if v.HasWriter() && told[writer(v)][own.Id] != nil {
		out = told[writer(v)][own.Id]
	}
	of := replicaNodes(view, v)
	for _, r := range out.Replicas {
		if from := replicaOf(told[of[r.Id]][own.Id], r.Id); from != nil {
			addReplica(r, from)
		} else if from := replicaOf(own, r.Id); from != nil {
			addReplica(r, from)
		}
	}
	out.Used = used(len(v.Segments), out.Replicas)
	return out
}

// replicaNodes says on which node each replica of a volume stands, by its id.
func replicaNodes(view *state.View, v *state.Volume) map[string]holdfast.NodeID {
	of := map[string]holdfast.NodeID{}
	for i := range v.Segments {
		for _, r := range v.Segments[i].Replicas {
			if d, ok := view.Disk(r.Disk); ok {
				of[r.ID.String()] = d.Node
			}
		}
	}
	return of
}

// addDisks adds the figures of the disks that replicas served here stand on.
func (s *Server) addDisks(volumes ...*apipb.Volume) {
	disks := map[string]disk.Stat{}
	for _, o := range s.o.Disks.List() {
		disks[o.Stat.Disk.String()] = o.Stat
	}
	for _, v := range volumes {
		for _, r := range v.Replicas {
			if on, ok := disks[r.Disk]; ok && r.Served {
				r.DiskUsed, r.DiskAllocated, r.DiskReclaimable = on.Used, on.Allocated, on.Reclaimable
			}
		}
	}
}

func replicaOf(v *apipb.Volume, id string) *apipb.Replica {
	for _, r := range v.GetReplicas() {
		if r.Id == id {
			return r
		}
	}
	return nil
}

// addReplica adds to what is known of a replica what its own node tells of it.
func addReplica(to, from *apipb.Replica) {
	if !from.Served {
		return
	}
	to.Served, to.Damaged, to.Partial = true, from.Damaged, from.Partial
	to.Tail, to.Durable, to.TailEpoch = max(to.Tail, from.Tail), max(to.Durable, from.Durable), max(to.TailEpoch, from.TailEpoch)
	to.Used = from.Used
	to.DiskUsed, to.DiskAllocated, to.DiskReclaimable = from.DiskUsed, from.DiskAllocated, from.DiskReclaimable
}

// used is what one copy of a volume takes: of each segment the fullest in-sync replica
// of those that are open somewhere. A replica that is not in sync may hold less, or what
// was trimmed since. Nil while a segment has none: then it is not known.
func used(segments int, replicas []*apipb.Replica) *int64 {
	most := map[uint32]int64{}
	for _, r := range replicas {
		if r.Served && !r.Damaged && r.State == string(holdfast.RoleInSync) {
			most[r.Segment] = max(most[r.Segment], r.Used)
		}
	}
	if len(most) < segments {
		return nil
	}
	var sum int64
	for _, n := range most {
		sum += n
	}
	return &sum
}
