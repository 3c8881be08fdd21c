// Package attachment is the running writer of an attached volume: a
// blockdev.Device whose every segment is driven by one coordinator core. It
// gives the core what it asks for: connections to the replicas, their messages
// as events, payload memory, answers of raft through the Meta interface, time.
//
// A request enters at device.go: it is split by segment and into operations of
// at most 1 MiB, edges below a block are read, changed and written under a
// range lock, checksums are computed here once and travel with the bytes to
// every disk. segment.go owns the core: a mutex guards it, any goroutine may
// step it, and what the step asks for is queued under that mutex in order and
// sent after it was released. A request blocks while the core holds it.
//
// Start reading at options.go, then attachment.go and segment.go.
package attachment
