// Package disk is one pooled disk at work: an image file or a raw block device
// that holds replicas of segments of many volumes.
//
// A disk has a superblock (two copies), one write-ahead log that all its
// replicas share, and chunks of 64 KiB found through a map per replica. Every
// mutation is a WAL record first, and only whole chunks of a large write are written
// before it, to free places (fresh.go). A background goroutine applies committed
// entries to the chunks, writes the map copy-on-write and a checkpoint record,
// and so makes WAL space free again. FORMAT.md draws the bytes and states what
// the disk below must promise and what is promised in turn.
//
// What holds, by the rules of the protocol:
//
//   - R1: a replica's log has no gaps: Append takes exactly tail+1.
//   - R4, R5: Fence returns once the fence and the whole tail are durable.
//   - R9: chunks change only by entries that are committed and durable here.
//   - R12: the first error of a write or a sync fails the disk for this
//     process's life; nothing is ever written or synced again.
//   - C6: bytes are returned only if their checksums hold. What does not match is
//     remembered (Replica.Bad) and replaced by what a peer holds (Replica.Repair).
//
// Concurrency: all exported methods may be called concurrently, on one replica
// or many. Appends to different replicas share writes, Syncs from any number
// of goroutines share fdatasyncs. On one replica the mutating methods take
// effect one after the other in the order of their calls.
//
// "Received" means that write(2) has returned for a record and for all records
// before it, so that only the death of the machine can lose it; "durable"
// means that fdatasync has returned as well.
//
// Start reading at api.go, then disk.go, wal.go and recover.go.
package disk
