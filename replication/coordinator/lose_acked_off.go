//go:build !holdfast_mutant_lose_acked

package coordinator

// loseAcked is true only in a build made to show that the demo can fail (-tags
// holdfast_mutant_lose_acked): a write is then acknowledged as soon as one copy
// has it, before the other in-sync replicas do, so that a host failure loses
// acknowledged writes. Never true in a shipped binary.
const loseAcked = false
