package sim

import (
	"flag"
	"fmt"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

var (
	seeds   = flag.String("seeds", "", "how many seeds to run from -seed on, or FROM-TO")
	seed    = flag.Int64("seed", 1, "the first seed")
	minutes = flag.Float64("minutes", 0, "run seeds for so long instead of -seeds")
	plain   = flag.Bool("plain", false, "volumes demand nothing")
	all     = flag.Bool("all", false, "go on after a seed that fails")
	trace   = flag.Bool("events", false, "print what happens (use with -seeds 1)")
)

// seedRange reads -seeds, a count from seed on or FROM-TO, into the first seed and
// how many.
func seedRange(text string, seed int64) (first int64, n int, err error) {
	from, to, isRange := strings.Cut(text, "-")
	if text == "" {
		return seed, defaultSeeds, nil
	}
	first, err = strconv.ParseInt(from, 10, 64)
	if !isRange || err != nil {
		return seed, int(first), err
	}
	last, err := strconv.ParseInt(to, 10, 64)
	if err == nil && last < first {
		err = fmt.Errorf("no seeds from %d to %d", first, last)
	}
	return first, int(last - first + 1), err
}

func TestSeedRange(t *testing.T) {
	for _, x := range []struct {
		text  string
		first int64
		n     int
		bad   bool
	}{
		{"", 7, defaultSeeds, false}, {"12", 7, 12, false}, {"100-109", 100, 10, false}, {"5-5", 5, 1, false},
		{"9-8", 0, 0, true}, {"x", 0, 0, true}, {"1-", 0, 0, true}, {"-3", 0, 0, true},
	} {
		first, n, err := seedRange(x.text, 7)
		if (err != nil) != x.bad || !x.bad && (first != x.first || n != x.n) {
			t.Errorf("-seeds %q: %d seeds from %d, error %v; want %d from %d, error %v", x.text, n, first, err, x.n, x.first, x.bad)
		}
	}
}

// prepare is set by the mutants' build.
var prepare = func() {}

// replay is the command that repeats a run.
func replay(s int64) string {
	return fmt.Sprintf("go test ./replication/sim -run TestSeeds -seeds 1 -seed %d -events", s)
}

// TestRegressions runs the seeds that found something. (The worlds change with the
// simulator; what was found is a history of the coordinator's too.)
func TestRegressions(t *testing.T) {
	for _, x := range []struct {
		seed int64
		why  string
	}{
		{778335, "a repair waited for bytes to be applied that nobody flushed"},
		{150262344, "the only copy's log was unreadable once; good again, it was never taken back"},
		{3021425, "two replicas as slow as each other were both put out, below min_copies"},
		{3057430, "a read that was hedged waited for ever when the second member left"},
		{3034789, "a copy that was being filled was declared whole (by the model of the disk)"},
	} {
		if r := Run(Config{Seed: x.seed}); r.Failure != "" || r.Stuck != "" {
			t.Errorf("seed %d (%s): %s%s\nrepeat with: %s", x.seed, x.why, r.Failure, r.Stuck, replay(x.seed))
		}
	}
}

// TestSeeds runs the shipped cores through simulated clusters, as many at a time
// as there are processors: no promise may be broken, and every cluster must find
// back to full strength.
func TestSeeds(t *testing.T) {
	prepare()
	first, count, err := seedRange(*seeds, *seed)
	if err != nil {
		t.Fatal(err)
	}
	end := time.Now().Add(time.Duration(*minutes * float64(time.Minute)))
	var (
		mu    sync.Mutex
		next  = first
		total Report
		wg    sync.WaitGroup
	)
	take := func() (int64, bool) {
		mu.Lock()
		defer mu.Unlock()
		s := next
		if t.Failed() && !*all || *minutes == 0 && s >= first+int64(count) || *minutes > 0 && !time.Now().Before(end) {
			return 0, false
		}
		next++
		return s, true
	}
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for s, ok := take(); ok; s, ok = take() {
				cfg := Config{Seed: s, Plain: *plain}
				if *trace {
					cfg.Trace = func(line string) { fmt.Println(line) }
				}
				r := Run(cfg)
				mu.Lock()
				total.Steps, total.Completed, total.Reads, total.Epochs, total.Lossy = total.Steps+r.Steps, total.Completed+r.Completed, total.Reads+r.Reads, total.Epochs+r.Epochs, total.Lossy+r.Lossy
				mu.Unlock()
				if r.Failure != "" {
					t.Errorf("seed %d: %s\nrepeat with: %s", s, r.Failure, replay(s))
				}
				if r.Stuck != "" {
					t.Errorf("seed %d: not back to full strength: %s\nrepeat with: %s", s, r.Stuck, replay(s))
				}
			}
		})
	}
	wg.Wait()
	t.Logf("%d seeds from %d: %d steps, %d requests answered (%d reads), %d activations (%d lossy)", next-first, first, total.Steps, total.Completed, total.Reads, total.Epochs, total.Lossy)
}
