// Package sim runs whole clusters of the real protocol cores
// (replication/coordinator, replication/replica) in simulated time: one seed
// decides every delay, crash, partition, stall and client request, so that a
// failure is repeated by its seed. The disk, the network and raft are models;
// what decides is the shipped code.
//
// The fault model, which is the claim that the tests make:
//
//   - a process dies at any time: what it had written with write(2) stays in
//     the page cache; its connections end;
//   - a host loses power at any time: of each log a prefix survives that holds
//     at least what was synced; base writes may or may not have reached the
//     medium; the boot id changes;
//   - messages on one connection are delayed, in order; connections are reset,
//     losing what is under way; hosts are cut off, both ways or one way, and
//     messages wait until the cut heals;
//   - a bit flips on the way to a log, or under a read: the edge's checksum
//     tells; blocks of a base rot, of one replica or of several at once, and stay so
//     until they are repaired or written again; a durable record becomes unreadable,
//     which the next open finds (damaged); a disk fails for the life of a process,
//     what was not synced is lost;
//   - a disk is slow for seconds: changes of the log keep their order, but what
//     comes on a connection meanwhile overtakes them;
//   - replicas are placed on hosts that have none, and told to go; what is removed
//     is deleted by its host and its id never used again;
//   - a volume is salvaged (ForceRecover) from an in-sync, a stale or an orphaned
//     replica, after every process died: the operator's claim is true;
//   - a process stands still for seconds; a sync takes seconds;
//   - raft is one register with the compare-and-set commands of the protocol;
//     it may be out of reach, answers may be lost, and a command whose answer
//     was lost may be applied seconds later;
//   - a writer may be replaced while it runs (force), at any time.
//
// Checked after every step, from what clients were told: C1 (per block
// linearizable), C2, C3, C4, C5 and C6; that what a session finds is what the one
// order of all writes up to its start says, over all blocks; that a block is called lost
// only if no in-sync replica had it; at rest, after a clean
// detach, that each in-sync replica is its log's prefix; at the end, that all
// replicas hold the same bytes, no bad block among them, and that the cluster finds back
// to full strength.
// The order is what writers gave places to, cut where raft says that a later epoch
// starts. No check looks at a rule of the protocol.
//
// Start reading at Run in run.go; the checks are in check.go, the faults in
// faults.go, members.go and relay.go; repair.go has the edges of a repair. `go test ./replication/sim -seeds FROM-TO` runs
// those seeds.
package sim
