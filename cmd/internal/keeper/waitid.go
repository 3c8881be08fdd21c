package keeper

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// waitid asks for any child that has exited and leaves it as it is. info is a
// siginfo_t of 128 bytes; all zeroes if there is none.
func waitid(info []byte) error {
	_ = info[127]
	const flags = unix.WEXITED | unix.WNOHANG | unix.WNOWAIT
	_, _, errno := unix.Syscall6(unix.SYS_WAITID, unix.P_ALL, 0, uintptr(unsafe.Pointer(&info[0])), flags, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}
