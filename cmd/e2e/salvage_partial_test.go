package e2e

import (
	"strings"
	"testing"
	"time"
)

// TestSalvageRefusesHalfACopy loses the only whole copy of a volume while chunks are
// being copied from it: what the other one holds is neither the old state nor the
// new one, and no salvage may go on from it.
func TestSalvageRefusesHalfACopy(t *testing.T) {
	whole(t)
	t.Parallel()
	need(t, "fio")
	c := start(t, 4)
	first := c.nodes[0]
	first.must("volume", "create", "v", "--size", "2G", "--replicas", "2")
	old, last, user := c.homes("v")
	uri := last.attach("v")
	fio(t, uri, "--rw=write", "--bs=1M", "--iodepth=4", "--size=64M")
	old.kill()
	// More than the log keeps for a replica that is away.
	fio(t, uri, "--rw=write", "--bs=1M", "--iodepth=4", "--size=768M")
	old.start()
	half := func() (left int64) {
		for _, r := range last.inspect("v").Replicas {
			if r.Node == old.name && r.State != "in-sync" {
				left = r.BytesToSync
			}
		}
		return left
	}
	deadline := time.Now().Add(2 * time.Minute)
	for left := half(); left == 0 || left > 700<<20; left = half() {
		if time.Now().After(deadline) {
			t.Fatalf("the copy was never under way: %+v", last.inspect("v").Replicas)
		}
	}
	last.kill()
	eventually(t, time.Minute, "the source is gone", func() bool {
		for line := range strings.Lines(user.cli("node", "ls").stdout) {
			if strings.Contains(line, last.name) && strings.Contains(line, "gone") {
				return true
			}
		}
		return false
	})
	for _, args := range [][]string{{"v"}, {"v", "--replica", old.name, "--accept-loss"}} {
		r := user.cli(append([]string{"volume", "salvage"}, args...)...)
		if r.code != 5 {
			t.Errorf("salvage %v: exit %d, want 5\n%s%s", args, r.code, r.stdout, r.stderr)
		}
		if len(args) > 1 && !strings.Contains(r.stderr, "was being filled") {
			t.Errorf("salvage %v does not say why:\n%s", args, r.stderr)
		}
	}
	// With its source back the copy goes on, and the volume with it.
	last.start()
	eventually(t, 2*time.Minute, "both copies are in sync", func() bool { return user.inspect("v").whole() })
}
