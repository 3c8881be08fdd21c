package e2e

import (
	"strings"
	"testing"
	"time"
)

// homes returns the nodes of a volume's two replicas, and one that has none.
func (c *cluster) homes(name string) (first, second, none *node) {
	c.t.Helper()
	placed := c.nodes[0].inspect(name).Replicas
	for _, x := range c.nodes {
		switch x.name {
		case placed[0].Node:
			first = x
		case placed[1].Node:
			second = x
		default:
			none = x
		}
	}
	return first, second, none
}

// TestSalvage loses the only in-sync copy of a volume for good, as far as the
// operator knows, and goes on from the one that had fallen behind; what comes
// back later is an orphan and stays out.
func TestSalvage(t *testing.T) {
	whole(t)
	t.Parallel()
	need(t, "qemu-io")
	c := start(t, 4)
	first := c.nodes[0]
	first.must("volume", "create", "v", "--size", "64M", "--replicas", "2")
	old, last, user := c.homes("v")
	do := func(uri, command string) {
		t.Helper()
		if out, err := qemuIO(t, uri, command); err != nil {
			t.Fatalf("%s: %v\n%s", command, err, out)
		}
	}
	stateOf := func(on *node, name string) string {
		t.Helper()
		for _, r := range on.inspect("v").Replicas {
			if r.Node == name {
				return r.State
			}
		}
		return "none"
	}
	refused := func(code int, text string, args ...string) {
		t.Helper()
		r := user.cli(append([]string{"volume", "salvage"}, args...)...)
		if r.code != code || !strings.Contains(r.stdout+r.stderr, text) {
			t.Errorf("salvage %v: exit %d, want %d and %q\n%s%s", args, r.code, code, text, r.stdout, r.stderr)
		}
	}

	uri := last.attach("v")
	do(uri, "write -P 1 0 64k")
	old.kill()
	do(uri, "write -P 2 0 64k")
	do(uri, "write -P 3 1M 64k")
	eventually(t, 30*time.Second, "the dead node's replica is stale", func() bool { return stateOf(last, old.name) == "stale" })
	refused(5, "needs no salvage", "v", "--replica", old.name, "--accept-loss")
	last.kill()
	old.start()
	eventually(t, time.Minute, "one node is back, the other gone", func() bool {
		r := user.cli("node", "ls")
		up := 0
		for line := range strings.Lines(r.stdout) {
			if strings.Contains(line, old.name) && strings.Contains(line, "up") || strings.Contains(line, last.name) && strings.Contains(line, "gone") {
				up++
			}
		}
		return up == 2
	})
	if r := user.cli("volume", "attach", "v", "--nbd", "--wait", "12s"); r.code != 6 || !strings.Contains(r.stderr, "NO_IN_SYNC_REPLICA") {
		t.Errorf("attach without an in-sync replica: exit %d, want 6 and the reason\n%s", r.code, r.stderr)
	}

	refused(5, "segment 0 has no in-sync replica", "v")
	refused(5, "accept-loss", "v", "--replica", old.name)
	refused(2, "without --replica", "v", "--accept-loss")
	refused(2, "drop-orphans", "v", "--drop-orphans", "--replica", old.name)
	refused(3, "no replica", "v", "--replica", "nosuch", "--accept-loss")
	refused(3, "nosuch", "nosuch")
	refused(5, "does not answer", "v", "--replica", last.name, "--accept-loss")
	refused(5, "its orphans may be wanted", "v", "--drop-orphans")

	var done struct {
		Done  bool
		Epoch uint64
	}
	if user.decode(&done, "volume", "salvage", "v", "--replica", old.name, "--accept-loss"); !done.Done || done.Epoch == 0 {
		t.Fatalf("salvage: %+v", done)
	}
	refused(5, "needs no salvage", "v", "--replica", old.name, "--accept-loss")
	uri = user.attach("v")
	do(uri, "read -P 1 0 64k")
	do(uri, "read -P 0 1M 64k")
	do(uri, "write -P 4 2M 64k")

	// The node whose copy was given up comes back: it is left out, and nothing
	// of it is merged.
	last.start()
	last.ready()
	if got := stateOf(user, last.name); got != "orphan" {
		t.Errorf("the replica that was given up is %s, want orphan", got)
	}
	do(uri, "read -P 1 0 64k")
	do(uri, "read -P 0 1M 64k")
	do(uri, "read -P 4 2M 64k")
	user.must("volume", "detach", "v")

	// Its data is newer: the operator goes back to it.
	user.must("volume", "salvage", "v", "--replica", last.name, "--accept-loss", "--force")
	uri = user.attach("v")
	do(uri, "read -P 2 0 64k")
	do(uri, "read -P 3 1M 64k")
	do(uri, "read -P 0 2M 64k")
	if got := stateOf(user, old.name); got != "orphan" {
		t.Errorf("the replica salvaged first is %s, want orphan", got)
	}
	if r := user.must("volume", "salvage", "v", "--drop-orphans"); !strings.Contains(r, "orphans are being deleted") {
		t.Errorf("drop of the orphan: %s", r)
	}
	eventually(t, time.Minute, "no orphan is left, and two copies are in sync again", func() bool { return user.inspect("v").whole() })
	do(uri, "read -P 3 1M 64k")
	user.must("volume", "detach", "v")
	user.must("volume", "rm", "v")
}
