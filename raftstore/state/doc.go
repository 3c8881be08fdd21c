// Package state is what the cluster knows: the tables of nodes, disks, volumes,
// segments and replicas, and the commands that change them. It is a pure core:
// no goroutine, clock, lock, channel, context, randomness or I/O. Ids and times
// come in commands.
//
// Promises. A View is immutable: readers share it without locks and must not
// modify what it returns. Apply is total and deterministic: the same commands at
// the same log indexes give the same View, byte for byte, on every member; a
// refused command changes nothing but the index. Every command is
// compare-and-set (on an epoch, an in-sync-set version, a revision or the thing
// itself) and idempotent: a proposal whose result was lost may be proposed again.
//
// The rules kept here, whatever a proposer believes: an in-sync set never
// becomes empty; a volume never shrinks; a stale (epoch, isrVer) is refused
// (R3); an unforced Activate below the last activated S, clean end or known
// commit is refused (REPLICA_REGRESSION); ids are never reused, and removed ones
// are kept for ever.
//
// Assumes. The proposer, on the leader, has checked what only it can see: that
// the holder named in a takeover is gone.
//
// Formats (FORMAT.md): commands, results and snapshots are written by hand in a
// versioned codec and not in protobuf, because a protobuf reader skips fields it
// does not know. An old follower that skips a field of a command ends with other
// tables than the leader, silently. Here each encoding names its cluster level,
// every byte has one meaning, and what cannot be understood is an error that
// stops the node.
//
// Start reading at records.go, then attach.go (the commands of an attachment).
package state
