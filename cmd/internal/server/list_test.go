package server

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/disk"
	"github.com/holdfast-storage/holdfast/cmd/internal/api/apipb"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

// peer is another node's API, reduced to what a list asks of it.
type peer struct {
	apipb.UnimplementedHoldfastServer
	list  []*apipb.Volume
	mute  bool // takes the question, and says nothing until the asker leaves
	asked atomic.Int32
}

func (p *peer) ListVolumes(ctx context.Context, _ *apipb.ListVolumesRequest) (*apipb.ListVolumesResponse, error) {
	p.asked.Add(1)
	if p.mute {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return &apipb.ListVolumesResponse{Volumes: p.list}, nil
}

// serveAs has a peer answer at the API address of a node.
func (w *world) serveAs(t *testing.T, id holdfast.NodeID, p *peer) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer()
	apipb.RegisterHoldfastServer(g, p)
	var wg sync.WaitGroup
	wg.Go(func() { _ = g.Serve(l) })
	t.Cleanup(func() { g.Stop(); wg.Wait() })
	n, _ := w.reg.View().Node(id)
	moved := *n
	moved.Addresses.API = l.Addr().String()
	w.must(t, &state.NodeUpdate{Node: moved})
}

// told is a volume as the node of one of its replicas knows it.
func told(v *state.Volume, disk holdfast.DiskID, used int64) *apipb.Volume {
	for _, r := range v.Segments[0].Replicas {
		if r.Disk == disk {
			return &apipb.Volume{Id: v.ID.String(), Replicas: []*apipb.Replica{{Id: r.ID.String(), Served: true, Used: used, State: "in-sync"}}}
		}
	}
	return nil
}

// TestListAsksEveryNodeOnce: a list says what volumes use wherever they are, and what
// nobody could tell is not made up. Each node is asked once, whatever the number of
// volumes, and not waited for long.
func TestListAsksEveryNodeOnce(t *testing.T) {
	w := newWorld(t)
	w.server.Start(w.o)
	here, there := w.volume(t, "here", 1), w.volume(t, "there", 2)
	w.volume(t, "gone", 3)
	own := disk.ReplicaDesc{Segment: holdfast.SegmentID{Volume: here.ID}, Replica: here.Segments[0].Replicas[0].ID, Lineage: here.Segments[0].Replicas[0].Lineage, Size: 1 << 30}
	if err := w.o.Serve.CreateReplica(w.disks[1], own); err != nil {
		t.Fatal(err)
	}
	three, _ := w.reg.View().VolumeByName("three")
	answering := &peer{list: []*apipb.Volume{told(there, w.disks[2], 5<<20), told(three, w.disks[2], 7<<20)}}
	silent := &peer{mute: true}
	const unknown = -1
	for _, c := range []struct {
		name string
		peer *peer
		want map[string]int64
	}{
		{"n2 answers", answering, map[string]int64{"here": 0, "there": 5 << 20, "three": 7 << 20, "gone": unknown, "one": unknown}},
		{"n2 is silent", silent, map[string]int64{"here": 0, "there": unknown, "three": unknown, "gone": unknown, "one": unknown}},
	} {
		w.serveAs(t, holdfast.NodeID{2}, c.peer)
		began := time.Now()
		list, err := w.client.ListVolumes(t.Context(), &apipb.ListVolumesRequest{})
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if took := time.Since(began); took > 2*askOthers {
			t.Errorf("%s: took %v", c.name, took)
		}
		if n := c.peer.asked.Load(); n != 1 {
			t.Errorf("%s: it was asked %d times, want once for all volumes", c.name, n)
		}
		got := map[string]int64{}
		for _, v := range list.Volumes {
			got[v.Name] = unknown
			if v.Used != nil {
				got[v.Name] = *v.Used
			}
		}
		for name, want := range c.want {
			if n, ok := got[name]; !ok || n != want {
				t.Errorf("%s: volume %s uses %d, want %d", c.name, name, n, want)
			}
		}
	}
}
