// Command bench compares holdfast with nbdkit's file plugin, on one file system
// and in one run, through fio's nbd engine. It is what `make bench` runs.
//
// What it prints are ratios of medians over rounds in which the targets take
// turns; absolute numbers of different runs are not comparable. Each target
// first passes a run of fio with verification. What a write that was answered
// has survived differs: nbdkit's is in the page cache of one host, holdfast's
// in the memory of every in-sync node; a flush makes both durable.
//
// nbdkit is measured twice, since on kernels with large folios the page cache
// serves a file that was filled by 4 KiB writes ("S") several times faster for
// small writes than one filled by 1 MiB writes ("L").
//
// With -disk (`make bench-disk`) it compares one disk of holdfast, in its own process,
// with a file beside the disk's image: what the device gives, and what is left of it.
//
// Start reading in run.go, for -disk in diskrun.go.
package main
