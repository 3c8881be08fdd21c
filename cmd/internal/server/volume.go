package server

import (
	"context"
	"sync"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/cmd/internal/api"
	"github.com/holdfast-storage/holdfast/cmd/internal/api/apipb"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

// askWriter bounds how long a look at a volume waits for its writer: a node that is
// silent for longer is gone.
const askWriter = 5 * time.Second

// InspectVolume implements apipb.HoldfastServer. The writer knows most; what a
// replica takes of its disk only its own node knows. One that does not answer in
// time is no reason to say nothing.
func (s *Server) InspectVolume(ctx context.Context, req *apipb.VolumeRequest) (*apipb.Volume, error) {
	v, err := s.o.Attachments.Find(ctx, req.Name)
	if err != nil {
		return nil, err
	}
	view := s.o.Cluster.View()
	own := s.volume(view, v)
	s.addDisks(own)
	told := s.askAbout(ctx, view, v)
	out := own
	if v.HasWriter() && told[writer(v)] != nil {
		out = told[writer(v)]
	}
	of := replicaNodes(view, v)
	for _, r := range out.Replicas {
		if from := replicaOf(told[of[r.Id]], r.Id); from != nil {
			addReplica(r, from)
		} else if from := replicaOf(own, r.Id); from != nil {
			addReplica(r, from)
		}
	}
	out.Used = fullest(out.Replicas)
	return out, nil
}

// askAbout asks the other nodes that know something of a volume for what they know.
func (s *Server) askAbout(ctx context.Context, view *state.View, v *state.Volume) map[holdfast.NodeID]*apipb.Volume {
	nodes := map[holdfast.NodeID]time.Duration{}
	for _, n := range replicaNodes(view, v) {
		nodes[n] = askOthers
	}
	if v.HasWriter() {
		nodes[writer(v)] = askWriter
	}
	told := map[holdfast.NodeID]*apipb.Volume{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for n, wait := range nodes {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, wait)
			defer cancel()
			_, _ = s.nodeCall(ctx, n, func(ctx context.Context, c *api.Client) error {
				answer, err := c.InspectVolume(ctx, &apipb.VolumeRequest{Name: v.ID.String()})
				if err == nil {
					mu.Lock()
					told[n] = answer
					mu.Unlock()
				}
				return err
			}) // who does not answer says nothing
		})
	}
	wg.Wait()
	return told
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
func (s *Server) addDisks(v *apipb.Volume) {
	for _, o := range s.o.Disks.List() {
		for _, r := range v.Replicas {
			if r.Served && r.Disk == o.Stat.Disk.String() {
				r.DiskUsed, r.DiskAllocated, r.DiskReclaimable = o.Stat.Used, o.Stat.Allocated, o.Stat.Reclaimable
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

// fullest is what the fullest replica of each segment occupies, together.
func fullest(replicas []*apipb.Replica) (sum int64) {
	most := map[uint32]int64{}
	for _, r := range replicas {
		most[r.Segment] = max(most[r.Segment], r.Used)
	}
	for _, n := range most {
		sum += n
	}
	return sum
}
