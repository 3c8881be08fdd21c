// Package node assembles a daemon: it takes the data directory, opens the
// listeners, the metadata and the disks, wires the parts together and runs them
// until it is told to stop. It holds no policy of its own.
package node
