// Package coordinator is the thinking of the writer of one attached segment:
// it takes over the in-sync replicas (FENCE, OPEN, Activate), numbers the
// writes, decides when a write, a read or a flush is complete, puts out
// members that fail, brings back those that return, and fills new ones. It is a
// pure function of events: no goroutine, clock, lock, channel, randomness or
// I/O. Payload bytes travel beside it, named by operation id before they have a
// seq and by seq after.
//
// An edge (replication/attachment) owns one Core per segment, feeds it events
// one at a time and executes the actions it returns, in order. What the edge
// must guarantee is written at each action in api.go, where reading should
// start. The rules cited as R1..R12 and the promises C1..C6 are those of
// docs/protocol.
package coordinator
