//go:build holdfast_mutants

package disk

import "testing"

// mutants are the rules that are left out one at a time, and within how many
// seeds the crash test must notice.
var mutants = []struct {
	name, what string
	seeds      uint64
}{
	{"record_before_chunk", "the record is appended before the fresh chunks that it refers to are written", 60},
	{"dur_without_data_sync", "the log is called durable without a sync of the fresh chunks", 60},
	{"dur_without_log_sync", "the log is called durable without a sync of its own", 20},
	{"chunk_reused_before_ckpt", "a freed chunk is given out before a checkpoint without it is durable", 60},
	{"page_rewritten", "a page that the last checkpoint refers to is written in place", 60},
	{"checkpoint_before_base_sync", "the CKPT record is written before chunks and map are synced", 20},
}

// TestMutants: a crash test that does not notice is no proof of the shipped code.
func TestMutants(t *testing.T) {
	for _, m := range mutants {
		t.Run(m.name, func(t *testing.T) {
			points := 0
			for seed := uint64(1); seed <= m.seeds; seed++ {
				mutant = m.name
				why, w := crashSeed(t, seed)
				mutant = ""
				points += w.looked
				if why == "" {
					continue
				}
				if why, _ := crashSeed(t, seed); why != "" {
					t.Fatalf("seed %d fails without the mutant too: %s", seed, why)
				}
				t.Logf("%s: killed by seed %d after %d crashes: %.300s", m.what, seed, points, why)
				return
			}
			t.Errorf("%s: survived %d seeds, %d crashes", m.what, m.seeds, points)
		})
	}
}
