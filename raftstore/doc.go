// Package raftstore keeps the cluster's metadata: the tables of raftstore/state,
// replicated by raft, with the log in raftstore/badgerlog.
//
// Promises. A command whose Propose returned without an error is durable on a
// majority of the voters and stands in View. A command whose result was lost
// (ErrUnavailable, ErrTimeout) may or may not be applied later; commands are
// compare-and-set and idempotent, so it is proposed again. View never blocks and
// never goes backwards; it may be behind. ReadIndex gives the index that a
// linearizable read must have reached. A follower never serves from a log that
// it cannot understand: a panic while applying, an entry of an unknown kind and
// any error of the log store stop the node (Fatal).
//
// Assumes. One Store per directory. Something above it forwards proposals to
// the leader, keeps the record of who is alive, and calls Reconcile on the
// leader (raftstore/peer does all three). Whoever can connect to the raft
// listener and knows the cluster's and the node's id is a peer.
//
// A node's identity stands in Dir: its id, made with the store and never
// reused, and the cluster it belongs to. A node that lost its directory is a
// new node. The first bytes of every raft connection name the cluster, the
// sender and the addressee, so that an address that moved to another cluster or
// node reaches nobody by mistake.
//
// A leader whose own disk hangs stops to lead (patience.go).
//
// Start reading at store.go, then fsm.go.
package raftstore
