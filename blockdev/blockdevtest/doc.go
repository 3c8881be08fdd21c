// Package blockdevtest says in tests what blockdev.Device says in words: Run is
// the conformance suite that every Device passes. Memory is the reference
// Device, which can crash; Faulty, Gated and Counted wrap a Device to fail it,
// hold its requests and count them.
package blockdevtest
