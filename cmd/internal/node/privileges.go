package node

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// prGetIOFlusher is PR_GET_IO_FLUSHER (prctl(2)): whether this thread is part of
// the path that writes dirty pages back, and so must not wait for them. It is a
// flag of the thread that the threads it makes inherit; the keeper sets it
// before it starts the daemon.
const prGetIOFlusher = 58

// takePrivileges asks the kernel for what keeps a storage daemon alive under
// memory pressure, when its own clients' dirty pages are what fills the memory.
// What is refused is not an error: it is returned for status to list.
func takePrivileges() (off []string) {
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_ONFAULT); err != nil {
		off = append(off, fmt.Sprintf("memory is not locked (mlockall: %v)", err))
	}
	if set, _, errno := unix.Syscall6(unix.SYS_PRCTL, prGetIOFlusher, 0, 0, 0, 0, 0); errno != 0 || set != 1 {
		off = append(off, "not marked as an I/O flusher (the keeper does that, with CAP_SYS_RESOURCE)")
	}
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0); err != nil {
		off = append(off, fmt.Sprintf("may be chosen by the OOM killer (%v)", err))
	}
	return off
}
