// Package controller keeps every volume at the number of replicas it was asked
// for: it places new ones for those whose disk failed or whose node is gone for
// longer than the grace period or is drained, removes what is too many, and has
// the replicas of detached volumes filled.
//
// Promises. Plan is a pure function of the tables and of who is gone; it never
// proposes what would leave a segment with fewer in-sync replicas than asked for,
// nor more rebuilds at a node than MaxRebuilds, nor more repairs by one than
// MaxRepairs. The loop proposes only on the raft
// leader; every command is compare-and-set, so two leaders that overlap, or a
// command applied twice, do no harm.
//
// Assumes. A writer, of a detached volume the node that repairs it, fills SYNCING
// replicas and takes Leaving ones out; the disks'
// nodes delete DELETING ones. Nothing is moved to level the disks' fill.
//
// Start reading at plan.go, then repair.go.
package controller
