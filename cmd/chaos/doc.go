// Command chaos runs a cluster of real holdfast nodes, each in a network
// namespace of its own, lets clients read, write and flush one volume, and makes
// trouble by a schedule drawn from a seed: nodes killed and stopped, networks cut
// whole, one way or by port, raft without quorum, holders replaced, disk images
// rolled back and cloned. A fault counts only if its effect was seen.
//
// At the end everything is healed, the record of what the clients saw is judged
// by cmd/internal/history, and the replicas are compared byte for byte.
//
// It needs root, iproute2, iptables and util-linux. It exits with 0 if every
// check passed, 3 if a promise of docs/guarantees.md was broken, 1 if the run
// itself failed. On 1 and 3 logs and disks stay where it says, with the command
// that repeats the schedule.
//
// Start reading at director.
package main
