//go:build holdfast_mutant_lose_acked

package coordinator

// loseAcked: see lose_acked_off.go. THIS BUILD LOSES DATA ON PURPOSE.
const loseAcked = true
