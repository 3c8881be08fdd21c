package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// repairedBy waits until a node repairs the volume, and returns it. To users the
// volume stays detached meanwhile.
func repairedBy(t *testing.T, from *node, name string) string {
	t.Helper()
	var v volume
	eventually(t, time.Minute, "a node repairs the volume", func() bool {
		v = from.inspect(name)
		detached(t, v)
		return v.Repair.Node != ""
	})
	return v.Repair.Node
}

// detached checks that nobody sees an attachment.
func detached(t *testing.T, v volume) {
	t.Helper()
	if v.State != "detached" || v.Node != "" || v.Session != "" {
		t.Fatalf("a volume that nobody attached shows as %+v", v)
	}
}

// TestRepair has a detached volume come back to its copies by itself: its node
// dies, the node that repairs it is killed, and a user attaches while a repair runs.
func TestRepair(t *testing.T) {
	whole(t)
	t.Parallel()
	need(t, "fio")
	c := startWith(t, 5, "--rebuild-after", "8s")
	byName := map[string]*node{}
	for _, n := range c.nodes {
		byName[n.name] = n
	}
	// Two nodes will be down: the first of them must be no voter.
	var name string
	var dead *node
	var others []*node
	for i := 0; dead == nil; i++ {
		name, others = fmt.Sprintf("v%d", i), nil
		c.nodes[0].must("volume", "create", name, "--size", "1G", "--replicas", "3")
		for _, r := range c.nodes[0].inspect(name).Replicas {
			var n struct{ Raft string }
			c.nodes[0].decode(&n, "node", "inspect", r.Node)
			if dead == nil && n.Raft != "voter" && n.Raft != "leader" {
				dead = byName[r.Node]
			} else {
				others = append(others, byName[r.Node])
			}
		}
	}
	holder, watcher := others[0], others[1]
	uri := holder.attach(name)
	fio(t, uri, "--rw=write", "--bs=1M", "--size=640M", "--verify=crc32c", "--do_verify=0")
	holder.must("volume", "detach", name)

	// A node with a copy dies. Another copy is made elsewhere; the one that makes it
	// is killed, and another goes on.
	dead.kill()
	first := repairedBy(t, watcher, name)
	if first == watcher.name {
		watcher = holder
	}
	if out := watcher.must("volume", "explain", name); !strings.Contains(out, "repair: node "+first+" fills its replicas") && watcher.inspect(name).Repair.Node != "" {
		t.Errorf("explain does not say who repairs:\n%s", out)
	}
	killed := byName[first]
	killed.kill()
	eventually(t, 2*time.Minute, "three copies in sync on the nodes that are left", func() bool {
		v := watcher.inspect(name)
		detached(t, v)
		on := v.nodesWith("in-sync")
		return len(on) == 3 && !on[dead.name] && !on[killed.name]
	})
	eventually(t, 30*time.Second, "the repair is over", func() bool {
		v := watcher.inspect(name)
		return v.Repair.Node == "" && v.Repair.Tries == 0
	})
	uri = watcher.attach(name)
	fio(t, uri, "--rw=read", "--bs=1M", "--size=640M", "--verify=crc32c", "--verify_only")
	watcher.must("volume", "detach", name)

	// A user comes while a repair runs: from a node that has no copy yet, and is not
	// kept waiting.
	dead.start()
	killed.start()
	for _, n := range []*node{dead, killed} {
		n.ready()
	}
	eventually(t, time.Minute, "three copies, and nothing of the old ones", func() bool { v := watcher.inspect(name); return v.whole() && len(v.Replicas) == 3 })
	session := watcher.inspect(name).Epoch
	watcher.must("volume", "update", name, "--replicas", "4")
	by := repairedBy(t, watcher, name)
	var user *node
	for other := range watcher.inspect(name).nodesWith("in-sync") {
		if other != by {
			user = byName[other]
		}
	}
	began := time.Now()
	uri = user.attach(name)
	if took := time.Since(began); took > 6*time.Second { // what a takeover takes
		t.Errorf("the attach took %v while node %s repaired", took, by)
	} else {
		t.Logf("attached in %v while node %s repaired", took, by)
	}
	v := user.inspect(name)
	if v.Node != user.name || v.Epoch < session+2 || v.Repair.Node != "" {
		t.Errorf("attached during a repair: %+v", v)
	}
	fio(t, uri, "--rw=read", "--bs=1M", "--size=640M", "--verify=crc32c", "--verify_only")
	eventually(t, 2*time.Minute, "four copies", func() bool { v := user.inspect(name); return v.whole() && len(v.Replicas) == 4 })
	user.must("volume", "detach", name)
	user.must("volume", "rm", name)
}
