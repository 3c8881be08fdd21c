// Package replica is the thinking of one copy of a segment: which writer may
// speak to it (the durable fence), where its log ends, what it may acknowledge,
// and how an empty or outdated copy is filled. It is a pure function of
// events: no goroutine, clock, lock, channel, randomness or I/O. Payload bytes
// travel beside it; it sees numbers only.
//
// An edge (replication/serve) owns one Core per replica, feeds it events from
// connections, from the log and from a timer, one at a time, and executes the
// actions it returns, in order. What the edge must guarantee is written at
// each action in api.go, where reading should start. The rules cited as R1..R12
// are those of docs/protocol.
//
// What the core promises: a FENCE is answered only after it is durable and the
// whole tail is (R4, R5); a message of another epoch than the fence's changes
// nothing and is answered by nothing but the fence's number; the log grows
// without gaps (R1); an acknowledgement names only what write(2) has returned
// for; a pong or a read is given only while no higher fence was accepted (R10).
package replica
