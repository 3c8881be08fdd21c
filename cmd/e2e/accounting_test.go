package e2e

import (
	"strings"
	"syscall"
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

// listedUsed is what volume ls tells of what a volume uses, nil if that is not known.
func (n *node) listedUsed(name string) *int64 {
	n.t.Helper()
	var ls struct {
		Volumes []struct {
			Name string
			Used *int64
		}
	}
	n.decode(&ls, "volume", "ls")
	for _, v := range ls.Volumes {
		if v.Name == name {
			return v.Used
		}
	}
	n.t.Fatalf("%s: no volume %s in volume ls", n.name, name)
	return nil
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
				if listed := n.listedUsed("v"); used != written || len(of) != 2 || listed == nil || *listed != written {
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
		if listed := n.listedUsed("v"); listed == nil || *listed != written {
			t.Errorf("%s, with %s down: volume ls shows %v", n.name, down.name, listed)
		}
	}
}

// TestUsedOfSilentNodes: what a volume uses is told by every node while one with an
// in-sync replica answers. With none, nobody makes it up, at once or, of a node that
// hangs, after a short while.
func TestUsedOfSilentNodes(t *testing.T) {
	t.Parallel()
	whole(t)
	need(t, "qemu-io")
	const written = 4 << 20
	c := start(t, 3)
	a := c.nodes[0]
	a.must("volume", "create", "v", "--size", "64M", "--replicas", "1")
	uri := a.attach("v")
	blockIO(t, uri, "write -P 0x5a 1M 4M", "flush")
	a.must("volume", "detach", "v")
	eventually(t, 30*time.Second, "every node tells what v uses", func() bool {
		for _, n := range c.nodes {
			if used := n.listedUsed("v"); used == nil || *used != written {
				return false
			}
		}
		return true
	})
	_, of := a.replicaSpace("v")
	var with, without *node
	for _, n := range c.nodes {
		if _, has := of[n.name]; has {
			with = n
		} else {
			without = n
		}
	}
	if err := with.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	used, took := without.listedUsed("v"), time.Since(began)
	if err := with.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if used != nil || took > 5*time.Second {
		t.Errorf("while %s hangs: used %v, after %v", with.name, used, took)
	}
	with.kill()
	if used := without.listedUsed("v"); used != nil {
		t.Errorf("with %s down: used %d", with.name, *used)
	}
	if out := without.must("volume", "ls"); !strings.Contains(out, " - ") {
		t.Errorf("with %s down:\n%s", with.name, out)
	}
}
