// Package mount is what holdfast does with file systems on its volumes: look
// for data before making one, make ext4 or xfs, check, mount and unmount, read
// the mount table, and count who uses a mount.
//
// It promises: mkfs never runs on a device that holds anything; options that
// come from users reach mkfs and mount(2) only through an allow-list, and never
// a shell; no unmount is lazy unless the caller forces it; what a user sees of
// a volume is a subdirectory, so that lost+found stays hidden and an empty
// volume looks empty; a mountpoint without its volume cannot be written to.
//
// Calls of mount(2) and umount(2) can wait for the device below. They belong
// into a process that does not serve that device: the keeper.
//
// Start reading at volume.go.
package mount
