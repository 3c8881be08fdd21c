//go:build holdfast_mutant_lose_acked

package coordinator

import "time"

// loseAcked and loseAckedFor: see lose_acked_off.go. THIS BUILD LOSES DATA ON PURPOSE.
const (
	loseAcked    = true
	loseAckedFor = 500 * time.Millisecond
)
