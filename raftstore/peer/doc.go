// Package peer is what the nodes of a cluster do for each other's metadata, over
// gRPC on the --address port: they forward commands to the leader, join, tell
// each other that they live, read linearizably, and follow the tables when they
// are no raft members.
//
// Promises. Propose returns the command's own answer from whichever node leads,
// and asks again while there is none, until its context ends; commands are
// compare-and-set and idempotent, so that asking again is safe. Every node beats
// to every voter each 500 ms, and each voter keeps the arrivals, leader or not;
// a node is gone after 5 s of silence by the asked node's own record, or when it
// shows up with a new instance. A takeover proposed through Propose waits at the
// leader until the holder is gone or has detached; it is woken, it does not poll.
// Time is CLOCK_BOOTTIME; silence counts only while this process ran.
//
// Assumes. The owner serves the registered service on the address that stands in
// the node's record. Nobody who must not be a peer can reach it: credentials are
// the owner's (Options.Dialing, the server's options).
//
// Start reading at peer.go, then liveness.go.
package peer
