// Package vfs is the one door to the disk: every byte that blockdev/disk reads
// or writes, every sync, lock and hole punch, and the boot id of the running
// kernel go through an FS.
//
// OS is the real thing. Memory is a file system in memory for tests, with the
// failures that real disks have: a crash keeps a seeded random subset of the
// 4 KiB pages that were not yet synced, tears one of them, forgets directory
// entries that were not synced and changes the boot id; writes and syncs can
// be made to fail; bits can be flipped; space can run out.
//
// A File makes few promises, and they are those of Linux: what WriteAt wrote
// is seen by every later ReadAt of any handle and survives the death of the
// process; it survives the death of the machine only after Sync. After a Sync
// that failed the written pages may be gone although reads still show them
// ("Can Applications Recover from fsync Failures?", ATC'20), so nobody may
// sync again and believe it.
//
// Start reading at vfs.go.
package vfs
