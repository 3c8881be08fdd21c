package sim

import (
	"flag"
	"fmt"
	"testing"
)

var (
	seeds = flag.Int("seeds", 2000, "how many seeds to run")
	seed  = flag.Int64("seed", 1, "the first seed")
	trace = flag.Bool("events", false, "print what happens (use with -seeds 1)")
)

// prepare is set by the mutants' build.
var prepare = func() {}

// replay is the command that repeats a run.
func replay(s int64) string {
	return fmt.Sprintf("go test ./replication/sim -run TestSeeds -seeds 1 -seed %d -events", s)
}

// TestSeeds runs the shipped cores through simulated clusters: no promise may
// be broken, and every cluster must find back to full strength.
func TestSeeds(t *testing.T) {
	prepare()
	var steps, completed, reads, epochs, lossy int
	for s := *seed; s < *seed+int64(*seeds); s++ {
		cfg := Config{Seed: s}
		if *trace {
			cfg.Trace = func(line string) { fmt.Println(line) }
		}
		r := Run(cfg)
		steps, completed, reads, epochs, lossy = steps+r.Steps, completed+r.Completed, reads+r.Reads, epochs+r.Epochs, lossy+r.Lossy
		if r.Failure != "" {
			t.Fatalf("seed %d: %s\nrepeat with: %s", s, r.Failure, replay(s))
		}
		if r.Stuck != "" {
			t.Fatalf("seed %d: not back to full strength: %s\nrepeat with: %s", s, r.Stuck, replay(s))
		}
	}
	t.Logf("%d seeds: %d steps, %d requests answered (%d reads), %d activations (%d lossy)", *seeds, steps, completed, reads, epochs, lossy)
}
