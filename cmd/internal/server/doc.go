// Package server answers the user's API and the volume plugin of one node: it
// turns requests into commands for raft, and into calls of the attachments of
// this node or, forwarded, of the holder's.
package server
