// Package serve is a node's replicas at work: it takes sessions from writers,
// over TCP or in process, runs a replica core for every replica of the node's
// disks, and does to the log what the core asks for.
//
// copy.go holds one replica. A mutex guards its core; whoever brings an event
// steps it, and what it asks for is queued, in order, under that mutex: changes
// of the log for the one goroutine that makes them, messages for the sessions'
// links. Nothing waits with the mutex held: a ping is answered while the log
// is being written or synced.
//
// Start reading at server.go, then copy.go.
package serve
