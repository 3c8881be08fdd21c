// Package blockdev says what a block device is to the rest of holdfast: the
// Device interface and the vocabulary around it. Servers (blockdev/nbd,
// blockdev/hostdev) export a Device; replication/attachment is one.
package blockdev
