// Package badgerlog keeps the raft log and raft's stable values (term, vote) in
// one badger database: a raft.LogStore and a raft.StableStore.
//
// Promises. What StoreLog, StoreLogs, DeleteRange, Set or SetUint64 returned
// without an error is durable: badger runs with SyncWrites, which its own
// default leaves off. A batch that is cut short by a crash leaves a prefix of
// it; a range that is cut short while it is deleted leaves no hole that raft
// could mistake for entries. Every value carries its own crc32c and index, so a
// damaged or misplaced entry is an ErrIntegrity error and never an entry.
//
// The first error of the database is final: it is reported through
// Options.OnFail and every later call returns it. After a failed fsync nobody
// knows what the medium holds; the node must stop.
//
// Assumes. One Store per directory (badger locks it). Badger maps its files
// into memory, so a full file system is a SIGBUS: the node keeps a ballast file
// beside it. Entries stay below MaxEntry, so that no value leaves the LSM tree
// for badger's value log, whose large values were lost after power failures
// (badger issue 2000).
package badgerlog
