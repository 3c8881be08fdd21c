package e2e

import (
	"context"
	"fmt"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// nodesWith are the nodes with a replica of a volume in a state.
func (v volume) nodesWith(state string) map[string]bool {
	on := map[string]bool{}
	for _, r := range v.Replicas {
		if r.State == state {
			on[r.Node] = true
		}
	}
	return on
}

// writer is a client that writes and reads back without an end.
type writer struct {
	t      *testing.T
	stop   chan struct{}
	passes atomic.Int64 // that were written and read back whole
	result chan error
}

// startWriter writes the 4 MiB from 64 MiB on, again and again, and verifies each
// pass.
func startWriter(t *testing.T, uri string) *writer {
	t.Helper()
	w := &writer{t: t, stop: make(chan struct{}), result: make(chan error, 1)}
	dir := t.TempDir() // fio leaves its verify state where it runs
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Minute)
	t.Cleanup(cancel)
	go func() {
		for {
			select {
			case <-w.stop:
				w.result <- nil
				return
			default:
			}
			cmd := exec.CommandContext(ctx, "fio", "--name=w", "--ioengine=nbd", "--uri="+uri, "--thread", "--rw=randwrite", "--bs=4k", "--offset=64M", "--size=4M",
				"--rate_iops=400,400", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1")
			cmd.Dir = dir
			if out, err := cmd.CombinedOutput(); err != nil {
				w.result <- fmt.Errorf("fio, pass %d: %w\n%s", w.passes.Load()+1, err, out)
				return
			}
			w.passes.Add(1)
		}
	}()
	return w
}

// wrote waits for a pass that began after the call and was read back whole.
func (w *writer) wrote(what string) {
	w.t.Helper()
	target := w.passes.Load() + 2
	eventually(w.t, time.Minute, "a whole pass of the client "+what, func() bool { return w.passes.Load() >= target || len(w.result) > 0 })
	if len(w.result) > 0 {
		w.t.Fatalf("the client %s: %v", what, <-w.result)
	}
}

// finish lets the client end its pass.
func (w *writer) finish() {
	w.t.Helper()
	close(w.stop)
	if err := <-w.result; err != nil {
		w.t.Fatal(err)
	}
}

// TestRebuildElsewhere has a volume of three copies on four nodes come back to
// three when a node is gone for longer than the grace period, change their number,
// and leave a node that is drained, all while a client writes; every byte is kept.
func TestRebuildElsewhere(t *testing.T) {
	whole(t)
	t.Parallel()
	need(t, "qemu-io", "fio")
	c := startWith(t, 4, "--rebuild-after", "8s")
	byName := map[string]*node{}
	for _, n := range c.nodes {
		byName[n.name] = n
	}
	first := c.nodes[0]
	first.must("volume", "create", "v", "--size", "128M", "--replicas", "3")
	replicas := first.inspect("v").Replicas
	holder, dead := byName[replicas[0].Node], byName[replicas[1].Node]
	uri := holder.attach("v")
	fio(t, uri, "--rw=write", "--bs=64k", "--size=64M", "--verify=crc32c", "--do_verify=0")
	client := startWriter(t, uri)
	client.wrote("before the death")

	dead.kill()
	eventually(t, 30*time.Second, "explain says when the dead node's replica is made anew", func() bool {
		return strings.Contains(holder.must("volume", "explain", "v"), "is made anew elsewhere")
	})
	eventually(t, 90*time.Second, "three copies in sync without the dead node", func() bool {
		on := holder.inspect("v").nodesWith("in-sync")
		return len(on) == 3 && !on[dead.name]
	})
	client.wrote("after the rebuild")
	dead.start()
	eventually(t, time.Minute, "the dead node is back, and has no copy any more", func() bool {
		v := holder.inspect("v")
		return v.whole() && !v.nodesWith("in-sync")[dead.name]
	})
	dead.ready()

	for _, n := range []int{2, 3} {
		holder.must("volume", "update", "v", "--replicas", fmt.Sprint(n))
		eventually(t, time.Minute, fmt.Sprintf("%d copies", n), func() bool { v := holder.inspect("v"); return v.whole() && len(v.Replicas) == n })
		client.wrote(fmt.Sprintf("with %d copies", n))
	}
	for _, bad := range []struct {
		code int
		args []string
	}{
		{5, []string{"--replicas", "5"}}, {2, []string{"--replicas", "0"}}, {2, []string{"--min-copies", "4"}}, {2, nil}, {2, []string{"--segment-size", "1M"}},
	} {
		if r := holder.cli(append([]string{"volume", "update", "v"}, bad.args...)...); r.code != bad.code {
			t.Errorf("volume update %v: exit %d, want %d\n%s", bad.args, r.code, bad.code, r.stderr)
		}
	}

	// The node that drains is one with a copy that is not the holder.
	var leaving string
	for name := range holder.inspect("v").nodesWith("in-sync") {
		if name != holder.name {
			leaving = name
		}
	}
	holder.must("node", "drain", leaving, "--wait", "90s")
	v := holder.inspect("v")
	if !v.whole() || len(v.Replicas) != 3 || v.nodesWith("in-sync")[leaving] {
		t.Errorf("after the drain of %s: %+v", leaving, v.Replicas)
	}
	// Now three copies stand on the three nodes that are left.
	if r := holder.cli("node", "drain", dead.name); leaving != dead.name && r.code != 5 {
		t.Errorf("drain without a place to go: exit %d, want 5\n%s", r.code, r.stderr)
	}
	if r := holder.cli("node", "rm", leaving); r.code != 5 || !strings.Contains(r.stderr, "is up") {
		t.Errorf("rm of a node that is up: exit %d, want 5\n%s", r.code, r.stderr)
	}
	holder.must("volume", "update", "v", "--replicas", "1", "--min-copies", "1")
	eventually(t, time.Minute, "one copy, the holder's", func() bool {
		v := holder.inspect("v")
		return v.whole() && v.nodesWith("in-sync")[holder.name]
	})
	client.finish()
	fio(t, uri, "--rw=read", "--bs=64k", "--size=64M", "--verify=crc32c", "--verify_only")
	holder.must("volume", "detach", "v")

	gone := byName[leaving]
	gone.terminate()
	eventually(t, 30*time.Second, "the drained node is gone", func() bool {
		var n struct{ State string }
		holder.decode(&n, "node", "inspect", leaving)
		return n.State == "gone"
	})
	holder.must("node", "rm", leaving)
	if r := holder.cli("node", "inspect", leaving); r.code != 3 {
		t.Errorf("inspect of a removed node: exit %d, want 3", r.code)
	}
	holder.must("node", "maintenance", holder.name, "on")
	if r := holder.must("node", "ls"); !strings.Contains(r, "maintenance") {
		t.Errorf("node ls does not show maintenance:\n%s", r)
	}
	holder.must("node", "maintenance", holder.name, "off")
}
