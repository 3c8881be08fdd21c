package e2e

import (
	"context"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// qemuIO runs one qemu-io command on a URI.
func qemuIO(t *testing.T, uri, command string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, "qemu-io", "-f", "raw", "-t", "none", "-c", command, uri).CombinedOutput()
	return string(out), err
}

// TestBelowMinCopies keeps a volume of two copies that demands two from
// acknowledging on one: writes are held for as long as the policy says and then
// fail, reads go on, and all is well when the second copy is back.
func TestBelowMinCopies(t *testing.T) {
	whole(t)
	t.Parallel()
	need(t, "qemu-io")
	c := start(t, 3)
	n := c.nodes[0]
	if r := n.cli("volume", "create", "x", "--size", "64M", "--replicas", "2", "--min-copies", "3"); r.code != 2 || !strings.Contains(r.stderr, "min_copies=3") {
		t.Errorf("min_copies above replicas: exit %d, want 2\n%s", r.code, r.stderr)
	}
	n.must("volume", "create", "v", "--size", "64M", "--replicas", "2", "--min-copies", "2", "--on-quorum-loss", "error:15s")
	var shown struct {
		MinCopies    int    `json:"min_copies"`
		OnQuorumLoss string `json:"on_quorum_loss"`
	}
	if n.decode(&shown, "volume", "inspect", "v"); shown.MinCopies != 2 || shown.OnQuorumLoss != "error:15s" {
		t.Errorf("inspect: %+v, want min_copies 2 and error:15s", shown)
	}
	// The holder is a node with a replica, so that reads have one to go to; a third
	// node keeps raft's quorum.
	byName := map[string]*node{}
	for _, x := range c.nodes {
		byName[x.name] = x
	}
	replicas := n.inspect("v").Replicas
	holder, other := byName[replicas[0].Node], byName[replicas[1].Node]
	uri := holder.attach("v")
	if out, err := qemuIO(t, uri, "write -P 1 0 64k"); err != nil {
		t.Fatalf("write on two copies: %v\n%s", err, out)
	}

	other.kill()
	if out, err := qemuIO(t, uri, "write -P 2 64k 64k"); err == nil || !strings.Contains(out, "failed") {
		t.Errorf("write on one copy: got success, want an error after the hold time\n%s", out)
	}
	if out, err := qemuIO(t, uri, "read -P 1 0 64k"); err != nil {
		t.Errorf("read on one copy: %v\n%s", err, out)
	}
	if r := holder.must("volume", "explain", "v"); !strings.Contains(r, "2 in-sync copies (1 now)") {
		t.Errorf("explain does not name what writes wait for:\n%s", r)
	}

	other.start()
	eventually(t, time.Minute, "both copies in sync again", func() bool { return holder.inspect("v").whole() })
	if out, err := qemuIO(t, uri, "write -P 3 64k 64k"); err != nil {
		t.Errorf("write with both copies again: %v\n%s", err, out)
	}
	if out, err := qemuIO(t, uri, "read -P 3 64k 64k"); err != nil {
		t.Errorf("read with both copies again: %v\n%s", err, out)
	}
	holder.must("volume", "detach", "v")
}

// TestJoinOfAnotherCluster starts a node that has a cluster with a --join that
// names another one's node: refused, and nothing is changed. Its own is no error.
func TestJoinOfAnotherCluster(t *testing.T) {
	whole(t)
	t.Parallel()
	answers := func(n *node) {
		t.Helper()
		n.start()
		eventually(t, 30*time.Second, n.name+" answers", func() bool { return n.cli("node", "ls").code == 0 })
	}
	one, two := newNode(t, "one"), newNode(t, "two")
	for _, n := range []*node{one, two} {
		n.flags = append(n.flags, "--disk", "none")
		answers(n)
	}
	two.terminate()
	r := runCLI(t, "", append(two.flags, "--join", one.address)...)
	if r.code != 5 || !strings.Contains(r.stderr, "belongs to cluster") {
		t.Errorf("--join of another cluster: exit %d, want 5\n%s", r.code, r.stderr)
	}
	two.flags = append(two.flags, "--join", two.address)
	answers(two)
}
