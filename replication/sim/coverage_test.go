//go:build !race

package sim

import (
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// mustCover names what the runs must come through: every event and action of
// both cores that this world makes, every phase, every state of a member's
// connection, and how each is left. Not here: what people and edges alone cause
// (the process stops, progress is told), and what nothing in
// this world causes: raft here never changes the in-sync set beside the writer
// (end changed), loses no history (replica-regression, metadata-regression), and
// no writer's memory is bad.
var mustCover = map[string]string{
	"writer takes coordinator.": "Tick NodeGone LinkUp LinkDown FenceOK Refused Opened Acked Flushed Pong WholeOK ReplicaFailed CopiedLog Copied Write Read Flush Sampled Proposed Meta Detach Policy Replicas",
	"writer asks coordinator.": "Connect Disconnect CloseConn SendFence SendOpen SendJoin SendAppend SendFlush SendCommit SendPing SendIntact SendWhole CopyLog StartCopy StopCopy " +
		"Sequence ReleaseWindow SampleRead CompleteWrite CompleteRead CompleteFlush ReadMeta Activated Detached",
	"propose ":         "activate shrink grow",
	"notice ":          "suspect evicting evicted replay catch-up copy in-sync ack-durable ack-received stall slow hold release",
	"end ":             "fenced detached no-in-sync",
	"fault ":           "leaving salvage|of|in-sync salvage|of|stale salvage|of|orphan rot harm one-way slow-disk jump stall relay",
	"read ":            "meets|rot ends|with|EIO",
	"copy meets ":      "rot poison",
	"mend ":            "from|one from|several not|now",
	"repair ":          "told in|place by|install poisons refused again not|now unanswered of|who|is|not|in|sync of|what|is|lost done by|a|write",
	"replica.":         "Fence|overtakes|entries Ping|overtakes|entries",
	"role in-sync -> ": "stale deleting orphan",
	"role stale -> ":   "syncing in-sync orphan deleting",
	"role syncing -> ": "in-sync deleting",
	"role orphan -> ":  "in-sync deleting",
	"promise ":         "begins ends",
	"copy takes replica.": "Tick Fence Open Join Append Flush Commit Ping Read Intact Install Repair Whole Fetch Closed Left Fenced Opened Appended Synced Sampled Installed Repaired WholeDone " +
		"AppliedTo Failed",
	"copy asks replica.": "LogFence LogTruncate LogRebase LogAppend LogSync LogCommit LogRead LogIntact LogHint LogInstall LogRepair LogWhole LogFetch Drop SendFenceOK SendRefused SendOpened " +
		"SendAck SendFlushed SendPong SendSample DropRead SendInstalled SendRepaired SendWhole SendFailed CloseConn",
	"phase fencing -> ":      "opening ended",
	"phase opening -> ":      "activating ended",
	"phase activating -> ":   "active ended",
	"phase active -> ":       "detaching ended",
	"phase detaching -> ":    "ended",
	"member down -> ":        "dialing",
	"member dialing -> ":     "fencing down",
	"member fencing -> ":     "fenced opening down",
	"member fenced -> ":      "opening down",
	"member opening -> ":     "opened catching-up replaying streaming copying down",
	"member opened -> ":      "streaming down",
	"member catching-up -> ": "replaying streaming down",
	"member copying -> ":     "streaming down",
	"member replaying -> ":   "streaming down",
	"member streaming -> ":   "down",
}

// coverSeeds is enough that the rarest of them comes several times.
const coverSeeds = 1000

// TestCoverage fails for what no run came through: a rule that is never reached
// is not tested by the seeds that pass.
func TestCoverage(t *testing.T) {
	var (
		mu   sync.Mutex
		seen = map[string]int{}
		next atomic.Int64
		wg   sync.WaitGroup
	)
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			mine := map[string]int{}
			for s := next.Add(1); s <= coverSeeds; s = next.Add(1) {
				if r := Run(Config{Seed: s, Cover: func(what string) { mine[what]++ }}); r.Failure != "" {
					t.Errorf("seed %d: %s", s, r.Failure)
				}
			}
			mu.Lock()
			defer mu.Unlock()
			for what, n := range mine {
				seen[what] += n
			}
		})
	}
	wg.Wait()
	var out strings.Builder
	for _, prefix := range slices.Sorted(maps.Keys(mustCover)) {
		for _, name := range strings.Fields(mustCover[prefix]) {
			name = strings.ReplaceAll(name, "|", " ")
			n := seen[prefix+name]
			delete(seen, prefix+name)
			fmt.Fprintf(&out, "%9d %s%s\n", n, prefix, name)
			if n == 0 {
				t.Errorf("%s%s: never in %d seeds", prefix, name, coverSeeds)
			}
		}
	}
	// What else came is no demand, but of interest to who adds one.
	for _, what := range slices.Sorted(maps.Keys(seen)) {
		fmt.Fprintf(&out, "%9d %s (not asked for)\n", seen[what], what)
	}
	t.Logf("%d seeds came through\n%s", coverSeeds, out.String())
}
