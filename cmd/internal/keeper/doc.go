// Package keeper is the process that stands above the daemon on a node: it
// opens /dev/fuse, makes and mounts kernel devices, runs mkfs and fsck, starts
// the daemon, and lends it the descriptors from which it answers the kernel.
//
// It exists for two reasons. Whoever answers block requests must never mount:
// the daemon's death would otherwise flush a file system onto the daemon
// itself, and nothing could end that. And a device outlives its daemon: the
// keeper holds every descriptor, so after kill -9 of the daemon the kernel's
// requests wait until the next one has taken over, and an application sees a
// pause and no error.
//
// The keeper (Run) is PID 1 of the node's container, or a process on a plain
// host. It knows volumes only as devices: an id, a name, a size, a session. It
// never decides whether a session goes on; the daemon does, by opening a device
// with the session it has: the same one takes it over, another one is refused
// until the old device is aborted.
//
// The daemon talks to it through Client, over DATA_DIR/keeper.sock: one JSON
// message per packet of a SOCK_SEQPACKET socket (message.go), descriptors by
// SCM_RIGHTS. The socket is 0600, peers must have the keeper's user id, and
// there is one daemon at a time: another process is refused until a pidfd
// proves the one before it dead.
//
// Mounts are made in the keeper's namespace, below DATA_DIR/mounts; in a
// container DATA_DIR is bind-mounted rshared from the host, so that the engine
// sees them. The daemon runs in a private copy of that namespace, and Dial
// detaches every volume from the copy before anything is served.
//
// Start reading at client.go for the daemon's side and run.go for the keeper's.
package keeper
