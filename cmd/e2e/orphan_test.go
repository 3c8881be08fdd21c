package e2e

import (
	"strings"
	"testing"
	"time"
)

// TestOrphanOnADeadNode: a volume goes on from the copy that had fallen behind, and the
// node with the other never comes back. It is removed once that copy is given up.
func TestOrphanOnADeadNode(t *testing.T) {
	whole(t)
	t.Parallel() // it waits most of the time
	need(t, "qemu-io")
	c := start(t, 4)
	c.nodes[0].must("volume", "create", "v", "--size", "64M", "--replicas", "2")
	old, dead, user := c.homes("v")
	uri := dead.attach("v")
	blockIO(t, uri, "write -P 1 0 64k")
	old.kill()
	blockIO(t, uri, "write -P 2 1M 64k") // what old lacks
	dead.kill()
	old.start()
	old.ready()
	eventually(t, time.Minute, "the volume goes on from what there is", func() bool {
		return user.cli("volume", "salvage", "v", "--replica", old.name, "--accept-loss").code == 0
	})
	uri = user.attach("v")
	blockIO(t, uri, "read -P 1 0 64k", "read -P 0 1M 64k", "write -P 3 2M 64k")
	eventually(t, time.Minute, "a second copy stands elsewhere", func() bool {
		n := 0
		for _, r := range user.inspect("v").Replicas {
			if r.State == "in-sync" {
				n++
			}
		}
		return n == 2
	})
	eventually(t, time.Minute, "the dead node is not taken to be up", func() bool {
		return !strings.Contains(user.cli("node", "rm", dead.name).stderr, "is up") // it is refused either way
	})
	for _, force := range [][]string{nil, {"--force"}} {
		user.refuses(5, "node "+dead.name+" has an abandoned replica of volume v", append([]string{"node", "rm", dead.name}, force...)...)
		user.refuses(5, "--drop-orphans", append([]string{"node", "rm", dead.name}, force...)...)
	}
	user.refuses(5, "abandoned replica of volume v", "node", "drain", dead.name)
	user.must("volume", "salvage", "v", "--drop-orphans")
	user.must("node", "rm", dead.name)
	if ls := user.must("node", "ls"); strings.Contains(ls, dead.name+" ") {
		t.Errorf("node ls still has it:\n%s", ls)
	}
	eventually(t, time.Minute, "the volume is whole", func() bool { return user.inspect("v").whole() })
	blockIO(t, uri, "read -P 1 0 64k", "read -P 0 1M 64k", "read -P 3 2M 64k")
	user.must("volume", "detach", "v")
}
