package e2e

import (
	"strings"
	"testing"
	"time"
)

// TestVerbsFromAnyNode asks each verb of a node that is neither leader nor
// holder, where that is possible.
func TestVerbsFromAnyNode(t *testing.T) {
	whole(t)
	t.Parallel()
	need(t, "nbdinfo")
	c := start(t, 3)
	a, b, d := c.nodes[0], c.nodes[1], c.nodes[2]
	b.must("volume", "create", "v", "--size", "128M", "--replicas", "2", "--labels", "team=db")
	d.must("volume", "create", "w", "--size", "64M")
	if v := a.inspect("w"); v.ReplicaCount != 3 || len(v.Replicas) != 3 {
		t.Errorf("the default on three nodes: %d replicas, want 3", v.ReplicaCount)
	}
	uri := a.attach("v")
	first := newLedger(128 << 20)
	load := first.write(t, uri, 1)
	load.waitAcks(100)

	if v := d.inspect("v"); v.State != "attached" || v.Node != a.name || v.Replicas[0].Tail == 0 || v.Size != 128<<20 {
		t.Errorf("inspect from another node: %+v", v)
	}
	if out := d.must("volume", "explain", "v"); !strings.Contains(out, "node "+a.name+" holds epoch 1") {
		t.Errorf("explain from another node:\n%s", out)
	}
	if out := d.must("node", "what-if-down", a.name); !strings.Contains(out, "2 of 3 voters left") || !strings.Contains(out, "yes: its clients there end") {
		t.Errorf("what-if-down of the holder:\n%s", out)
	}
	var impact struct {
		QuorumLost bool `json:"quorum_lost"`
		Volumes    []struct {
			Volume, Loses string
			InSyncLeft    int `json:"in_sync_left"`
		}
	}
	if b.decode(&impact, "node", "what-if-down", d.name); impact.QuorumLost || len(impact.Volumes) == 0 || impact.Volumes[0].Loses != "redundancy" {
		t.Errorf("what-if-down of another node: %+v", impact)
	}
	for _, r := range []struct {
		n    *node
		args []string
		code int
		says string
	}{
		{b, []string{"volume", "attach", "v", "--nbd", "--wait", "20s"}, 5, "attached at node " + a.name},
		{d, []string{"volume", "detach", "v"}, 5, "client"},
		{d, []string{"volume", "rm", "v"}, 5, "attached"},
		{b, []string{"volume", "attach", "v"}, 5, "--nbd"},
		{b, []string{"node", "what-if-down", "nowhere"}, 3, "nowhere"},
	} {
		if got := r.n.cli(r.args...); got.code != r.code || !strings.Contains(got.stderr, r.says) {
			t.Errorf("holdfast %s: exit %d, want %d, saying %q:\n%s", strings.Join(r.args, " "), got.code, r.code, r.says, got.stderr)
		}
	}
	load.stop()

	// An operator's force fences a live holder; its clients see errors, and what
	// was acknowledged is there.
	load = first.write(t, uri, 2)
	load.waitAcks(100)
	forced := b.attach("v", "--force")
	<-load.done
	first.check(t, forced)
	eventually(t, 20*time.Second, "the old holder gave its export up", func() bool { return !strings.Contains(a.must("volume", "ls"), a.name+" ") })
	if v := a.inspect("v"); v.Node != b.name || v.Epoch != 2 {
		t.Errorf("after a forced attach: node %s, epoch %d; want %s, 2", v.Node, v.Epoch, b.name)
	}
	a.must("volume", "detach", "v")
	if got := a.must("volume", "detach", "v"); !strings.Contains(got, "was not attached") {
		t.Errorf("detach again: %s", got)
	}
	d.must("volume", "rm", "v", "w")
	eventually(t, 20*time.Second, "the disks hold no replica", func() bool {
		var ls struct{ Disks []struct{ Replicas int } }
		a.decode(&ls, "disk", "ls")
		for _, disk := range ls.Disks {
			if disk.Replicas != 0 {
				return false
			}
		}
		return len(ls.Disks) == 3
	})
	if out := c.nodes[0].must("node", "inspect", d.name); !strings.Contains(out, d.address) {
		t.Errorf("node inspect:\n%s", out)
	}
}
