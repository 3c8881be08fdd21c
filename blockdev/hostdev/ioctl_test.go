package hostdev

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctlRange is an ioctl that takes an offset and a length.
func ioctlRange(fd int, request uintptr, r *[2]uint64) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(unsafe.Pointer(r))); errno != 0 {
		return errno
	}
	return nil
}
