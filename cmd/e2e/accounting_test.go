package e2e

import (
	"testing"
	"time"
)

// replicaSpace is what volume inspect tells of a replica's place.
type replicaSpace struct {
	Node, Disk      string
	Served          bool
	Used            int64
	DiskUsed        int64 `json:"disk_used"`
	DiskAllocated   int64 `json:"disk_allocated"`
	DiskReclaimable int64 `json:"disk_reclaimable"`
}

func (n *node) replicaSpace(name string) (used int64, of map[string]replicaSpace) {
	n.t.Helper()
	var v struct {
		Used     int64
		Replicas []replicaSpace
	}
	n.decode(&v, "volume", "inspect", name)
	of = map[string]replicaSpace{}
	for _, r := range v.Replicas {
		of[r.Node] = r
	}
	return v.Used, of
}

// TestReplicaSpace: every node tells the same of what each replica and its disk take,
// whether it has one or not, while the volume is attached and after. Of a replica
// whose node is down nothing is made up.
func TestReplicaSpace(t *testing.T) {
	t.Parallel()
	whole(t)
	need(t, "qemu-io")
	const written = 8 << 20
	c := start(t, 3)
	a := c.nodes[0]
	a.must("volume", "create", "v", "--size", "64M", "--replicas", "2")
	uri := a.attach("v")
	blockIO(t, uri, "write -P 0x5a 1M 8M", "flush")
	for _, attached := range []bool{true, false} {
		if !attached {
			a.must("volume", "detach", "v")
		}
		for _, n := range c.nodes {
			eventually(t, 30*time.Second, n.name+" tells what the replicas take", func() bool {
				used, of := n.replicaSpace("v")
				if used != written || len(of) != 2 {
					return false
				}
				for name, r := range of {
					d := n.disks(name)[0]
					if !r.Served || r.Used != written || r.Disk != d.ID || r.DiskUsed < written || r.DiskAllocated < r.DiskUsed ||
						r.DiskUsed != d.Used || r.DiskAllocated != d.Allocated || r.DiskReclaimable != d.Reclaimable {
						return false
					}
				}
				return true
			})
		}
	}
	_, of := a.replicaSpace("v")
	var down *node
	for _, n := range c.nodes[1:] {
		if of[n.name].Served {
			down = n
		}
	}
	down.kill()
	for _, n := range c.nodes {
		if n == down {
			continue
		}
		used, of := n.replicaSpace("v")
		if r := of[down.name]; used != written || r.Served || r.Used != 0 || r.DiskAllocated != 0 {
			t.Errorf("%s, with %s down: used %d, %+v", n.name, down.name, used, r)
		}
	}
}
