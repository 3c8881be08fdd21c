//go:build holdfast_mutant_lose_acked

package sim

import "testing"

// TestLoseAcked: the build that loses acknowledged writes on purpose is found
// out at once. Run it alone: every other test of this build may fail.
func TestLoseAcked(t *testing.T) {
	const limit = 50
	for s := int64(1); s <= limit; s++ {
		if r := Run(Config{Seed: s}); r.Failure != "" {
			t.Logf("killed by seed %d: %s", s, r.Failure)
			return
		}
	}
	t.Errorf("survived %d seeds", limit)
}
