//go:build holdfast_mutants

package sim

import (
	"flag"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
)

// mutants names the rules that are left out one at a time, and within how many
// seeds (from 1) the promises of C1 to C6, or the comparison of the replicas,
// must notice. Those that another rule covers are in docs/testing.md.
var mutants = []struct {
	name  string
	limit int
}{
	{"ack_before_raft", 6000},
	{"no_fence", 6000},
	{"volatile_fence", 6000},
	{"no_seal", 6000},
	{"ack_majority", 6000},
	{"add_without_catchup", 6000},
	{"no_epoch_history", 6000},
	{"reboot_keeps_intact", 6000},
	{"stale_acks_kept", 6000},
	{"apply_uncommitted", 6000},
	{"ping_any", 6000},
	{"remote_read_epoch_only", 6000},
	{"inflight_checked_before_only", 6000},
	{"activate_from_any", 6000},
	{"add_raft_first", 6000},
	{"claim_continuity", 6000},
	{"flush_lies", 6000},
	{"stale_raft_cmd", 6000},
	{"install_below_ckpt", 6000},
	{"list_before_applied", 6000},
	{"install_not_durable", 6000},
	{"ignore_promise", 6000},
	{"no_lease_margin", 6000},
	{"promise_lost_on_crash", 6000},
	{"read_without_lease", 6000},
	{"local_fence_unnoticed", 6000},
	{"flush_local_only", 6000},
	{"isr_not_recomputed", 10000},
	{"no_asof_floor", 6000},
	{"asof_any", 10000},
	{"lastseq_at_append", 10000},
	{"repair_without_asof", 6000},
}

var mutantFlag = flag.String("mutant", "", "leave this rule out in TestSeeds")

func init() { prepare = func() { setMutant(*mutantFlag) } }

// TestMutants leaves out each rule: a simulator that does not notice is no
// proof of the shipped code. The worlds are plain: what a volume may demand holds
// requests and hides what a mutant does. Every seed that kills is run again without the
// mutant and must pass.
func TestMutants(t *testing.T) {
	for _, m := range mutants {
		t.Run(m.name, func(t *testing.T) {
			setMutant(m.name)
			killed := firstFailure(int64(m.limit))
			setMutant("")
			if killed.Failure == "" {
				t.Fatalf("survived %d seeds", m.limit)
			}
			if r := Run(Config{Seed: killed.Seed, Plain: true}); r.Failure != "" || r.Stuck != "" {
				t.Fatalf("seed %d fails without the mutant too: %s%s", killed.Seed, r.Failure, r.Stuck)
			}
			t.Logf("killed by seed %d: %s\nrepeat with: %s", killed.Seed, killed.Failure, replayMutant(m.name, killed.Seed))
		})
	}
}

// firstFailure runs plain worlds from seed 1 on, as many at a time as there are
// processors, and returns the report of the lowest seed that fails.
func firstFailure(limit int64) Report {
	var (
		next  atomic.Int64
		mu    sync.Mutex
		first Report
		wg    sync.WaitGroup
	)
	over := func(s int64) bool {
		mu.Lock()
		defer mu.Unlock()
		return s > limit || first.Failure != "" && s > first.Seed
	}
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for s := next.Add(1); !over(s); s = next.Add(1) {
				r := Run(Config{Seed: s, Plain: true})
				mu.Lock()
				if r.Failure != "" && (first.Failure == "" || s < first.Seed) {
					first = r
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return first
}

func replayMutant(name string, s int64) string {
	return fmt.Sprintf("go test -tags holdfast_mutants ./replication/sim -run TestSeeds -plain -mutant %s -seeds 1 -seed %d -events", name, s)
}
