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
// Three processes, so that none waits for itself as it dies (a process that is
// the last to leave a mount namespace writes the file systems in it out):
//
//	keeper    PID 1   every /dev/fuse descriptor     a private mount namespace, no volume in it
//	mounter   child   loop devices, mounts, mkfs     the container's mount namespace, no /dev/fuse
//	daemon    child   duplicates of the descriptors  a private mount namespace, no volume in it
//
// Mounts are made below DATA_DIR/mounts; in a container DATA_DIR is bind-mounted
// rshared from the host, so that the engine sees them. A kill of all three
// leaves no loop device, no FUSE connection and no process in D state; a kill of
// the daemon alone, no error; the keeper ends with its mounter and the daemon
// with its keeper.
//
// Without CAP_SYS_ADMIN the keeper starts the daemon all the same, and makes no
// devices.
//
// Start reading at client.go for the daemon's side; run.go, stage.go and
// mounter.go for the keeper's.
package keeper
