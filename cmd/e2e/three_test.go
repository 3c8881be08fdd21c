package e2e

import (
	"math"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// TestReplicaDiesUnderVerify kills a replica's node inside fio's write phase,
// keeps it down while I/O goes on, and starts it again: no error, no verify
// failure, and only what it missed is copied.
func TestReplicaDiesUnderVerify(t *testing.T) {
	whole(t)
	t.Parallel()
	need(t, "fio")
	c := start(t, 3)
	holder, victim := c.nodes[0], c.nodes[1]
	holder.must("volume", "create", "v", "--size", "1G", "--replicas", "3")
	uri := holder.attach("v")
	amount, rate, down := "80M", "--rate_iops=1000", 10*time.Second
	if os.Getenv("HOLDFAST_SOAK") != "" {
		amount, rate, down = "80M", "--rate_iops=500", 20*time.Second
	}
	shape := []string{"--rw=randwrite", "--bs=4k", "--iodepth=8", "--size=1G", "--io_size=" + amount, "--verify=crc32c", "--verify_fatal=1", "--randseed=11"}
	job := fioCommand(t, uri, append(shape, "--do_verify=1", rate)...)
	report := filepath.Join(holder.dir, "fio.out")
	out, err := os.Create(report)
	if err != nil {
		t.Fatal(err)
	}
	job.Stdout, job.Stderr = out, out
	if err := job.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, 30*time.Second, "fio writes", func() bool { return holder.inspect("v").Replicas[0].Tail > 200 })
	victim.kill()
	killed := time.Now()
	before := holder.inspect("v").Replicas[0].Tail
	eventually(t, 30*time.Second, "the dead member is evicted and writes go on", func() bool {
		v := holder.inspect("v")
		return !v.whole() && v.State == "degraded" && tailOf(v, holder.name) > before+100
	})
	time.Sleep(down - time.Since(killed)) // the fault itself: how long the node stays down
	victim.start()
	if err := job.Wait(); err != nil {
		raw, _ := os.ReadFile(report)
		t.Fatalf("fio: %v\n%s", err, raw)
	}
	eventually(t, 60*time.Second, "every replica in sync again", func() bool { return holder.inspect("v").whole() })
	sent, size := copied(t, holder), holder.inspect("v").Size
	t.Logf("copied to bring %s back: %d bytes of a volume of %d", victim.name, sent, size)
	if sent == 0 || sent > size/10 {
		t.Errorf("copied %d bytes, want some and at most %d", sent, size/10)
	}
	fio(t, uri, append(shape, "--verify_only")...)
}

func tailOf(v volume, node string) uint64 {
	for _, r := range v.Replicas {
		if r.Node == node {
			return r.Tail
		}
	}
	return 0
}

// copied reads how many bytes resync sent, from explain.
func copied(t *testing.T, n *node) int64 {
	t.Helper()
	var e struct {
		BytesResynced int64 `json:"bytes_resynced"`
	}
	n.decode(&e, "volume", "explain", "v")
	return e.BytesResynced
}

// takeoverLimit is the contract: from the holder's death to the first
// acknowledged write elsewhere, with default timeouts.
const takeoverLimit = 10 * time.Second

// TestHolderDies kills the holder's node under load; another node attaches and
// finds every acknowledged write. In a third of the rounds the holder's node
// is raft leader too.
func TestHolderDies(t *testing.T) {
	whole(t)
	c := start(t, 3)
	rounds := 5
	if os.Getenv("HOLDFAST_SOAK") != "" {
		rounds = 100
	}
	var times []time.Duration
	c.nodes[0].must("volume", "create", "v", "--size", "64M", "--replicas", "3")
	ledger := newLedger(64 << 20)
	for round := range rounds {
		holder := c.nodes[round%3]
		if round%3 == 0 {
			if leader := c.leader(); leader != nil {
				holder = leader
			}
		}
		next := c.other(holder)
		uri := holder.attach("v")
		load := ledger.write(t, uri, int64(round+1))
		load.waitAcks(500)
		holder.kill()
		died := time.Now()
		load.stop()
		uri = next.attach("v", "--wait", "60s")
		first := ledger.write(t, uri, int64(round+1)<<32)
		first.waitAcks(1)
		took := time.Since(died)
		first.waitAcks(50)
		first.stop()
		t.Logf("round %d: %s died, %s wrote %.1f s later; %d acked before", round, holder.name, next.name, took.Seconds(), load.acked)
		times = append(times, took)
		if took > takeoverLimit {
			t.Errorf("round %d: %.1f s from death to the first acknowledged write, the contract is %v", round, took.Seconds(), takeoverLimit)
		}
		ledger.check(t, uri)
		next.must("volume", "detach", "v")
		holder.start()
		holder.ready()
		wholeAgain := c.nodes[(round+2)%3]
		wholeAgain.attach("v")
		eventually(t, 60*time.Second, "every replica in sync again", func() bool { return wholeAgain.inspect("v").whole() })
		wholeAgain.must("volume", "detach", "v")
	}
	slices.Sort(times)
	at := func(share float64) time.Duration { return times[int(math.Ceil(share*float64(len(times))))-1] }
	t.Logf("%d deaths: from death to the first acknowledged write elsewhere p50 %.2f s, p99 %.2f s, most %.2f s",
		len(times), at(0.5).Seconds(), at(0.99).Seconds(), times[len(times)-1].Seconds())
}

// TestSourceDiesDuringResync brings a replica back that missed writes, again and
// again, at a holder that has no replica of its own, and kills another replica in the
// middle: the copy goes on from the third. What is copied is near what was missed.
func TestSourceDiesDuringResync(t *testing.T) {
	whole(t)
	t.Parallel()
	c := start(t, 4)
	cycles := 1
	if os.Getenv("HOLDFAST_SOAK") != "" {
		cycles = 200
	}
	c.nodes[0].must("volume", "create", "v", "--size", "64M", "--replicas", "3")
	by := map[string]*node{}
	for _, n := range c.nodes {
		by[n.name] = n
	}
	var copies []*node
	for _, r := range c.nodes[0].inspect("v").Replicas {
		copies = append(copies, by[r.Node])
	}
	i := slices.IndexFunc(c.nodes, func(n *node) bool { return !slices.Contains(copies, n) })
	holder := c.nodes[i]
	uri := holder.attach("v")
	ledger := newLedger(64 << 20)
	for cycle := range cycles {
		victim, source := copies[cycle%3], copies[(cycle+1)%3]
		victim.kill()
		load := ledger.write(t, uri, int64(cycle+1)<<20)
		eventually(t, 30*time.Second, "the dead replica is taken out", func() bool { return stateOn(holder.inspect("v"), victim) != "in-sync" })
		from := load.now()
		load.waitAcks(from + 2000)
		before := copied(t, holder)
		victim.start()
		eventually(t, 60*time.Second, "the replica is being brought back", func() bool { return copied(t, holder) > before || stateOn(holder.inspect("v"), victim) == "in-sync" })
		source.kill()
		eventually(t, 60*time.Second, "the replica is in sync without the source", func() bool {
			v := holder.inspect("v")
			return stateOn(v, victim) == "in-sync" && stateOn(v, source) != "in-sync"
		})
		source.start()
		eventually(t, 60*time.Second, "every replica is in sync", func() bool { return holder.inspect("v").whole() })
		load.stop()
		ledger.check(t, uri)
		t.Logf("cycle %d: %s came back while %s died; %d writes in all, %d bytes copied so far", cycle, victim.name, source.name, load.now(), copied(t, holder))
	}
	holder.must("volume", "detach", "v")
	// Each copy alone holds every acknowledged write: it is read where it lies.
	for _, n := range copies {
		ledger.check(t, n.attach("v"))
		n.must("volume", "detach", "v")
	}
}

func stateOn(v volume, n *node) string {
	for _, r := range v.Replicas {
		if r.Node == n.name {
			return r.State
		}
	}
	return ""
}

// leader is the raft leader's node, if one is known.
func (c *cluster) leader() *node {
	var s struct{ Leader string }
	c.nodes[0].decode(&s, "status")
	for _, n := range c.nodes {
		if n.name == s.Leader {
			return n
		}
	}
	return nil
}

// other is the next node after n.
func (c *cluster) other(n *node) *node {
	for i, x := range c.nodes {
		if x == n {
			return c.nodes[(i+1)%len(c.nodes)]
		}
	}
	c.t.Fatalf("%s is not of this cluster", n.name)
	return nil
}
