// Package hostdev makes a blockdev.Device a kernel block device of this host:
// a file served over the FUSE protocol, with a loop device on top of it.
//
// The work is split between processes, because whoever answers block
// requests must never mount (a dying server would flush a file system onto
// itself and never end):
//
//   - the keeper calls Connect, which opens /dev/fuse, makes the FUSE file
//     system whose root is one regular file, and settles the protocol's
//     version and limits. It holds that descriptor for as long as the device
//     lives.
//   - the keeper's mounter, a third process, calls OpenRoot and ConfigureLoop,
//     which put a loop device on that file. It has the mounts, and for that very
//     reason never a /dev/fuse descriptor.
//   - the daemon gets a duplicate of the FUSE descriptor and calls Serve, which
//     answers the kernel's requests from a Device. When the daemon dies, the
//     next one calls Serve on the same descriptor with Options.Resend: the
//     kernel then repeats what the dead one had read and not answered, and no
//     application sees an error.
//
// The FUSE file system stands in no mount namespace: it is made detached and
// lives through the loop device's reference to its one file. So no process can
// pin it by inheriting a namespace, and it is gone when the loop device is.
//
// The loop device is configured AUTOCLEAR: when keeper, daemon and the last
// mount are gone, it and the FUSE connection go by themselves.
//
// Sources: Linux Documentation/filesystems/fuse/, include/uapi/linux/fuse.h
// (protocol 7.45), loop(4).
//
// Start reading at server.go for the daemon's side and connection.go for the
// keeper's.
package hostdev
