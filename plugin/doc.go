// Package plugin says what an orchestrator's volume driver needs of a node: the
// Volumes interface. It knows nothing of Docker, blocks or raft, so that every
// driver (plugin/docker, later a CSI one) is a thin translation of the same
// promises, and so that a driver can be tested against a few directories.
//
// Start reading at Volumes; its method comments are the contract that both sides
// are tested against.
package plugin
