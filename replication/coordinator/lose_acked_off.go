//go:build !holdfast_mutant_lose_acked

package coordinator

// loseAcked is true only in a build made to show that a demonstration or a test
// can fail:
//
//	go build -tags holdfast_mutant_lose_acked ./cmd/holdfast
//
// Writes and flushes are then answered as soon as one copy has them, the local
// one if there is one, and the other in-sync copies get theirs loseAckedFor
// later: when the writer's host dies, what it acknowledged in that time is lost,
// silently, though other in-sync copies are there. Never in a shipped binary.
const loseAcked = false

// loseAckedFor is far longer than a database takes from one commit to the next, so
// that some are always lost, and short enough that the window does not fill.
const loseAckedFor = 0
