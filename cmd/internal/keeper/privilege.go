package keeper

import (
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

const needsResource = "give the container CAP_SYS_RESOURCE (--privileged, or --cap-add SYS_RESOURCE)"

const needsAdmin = "run as root; in a container, with CAP_SYS_ADMIN (--privileged, or --cap-add SYS_ADMIN)"

// What takePrivileges could not get, as Lack.What says it.
const (
	LackOOM       = "the out-of-memory killer may choose the daemon"
	LackIOFlusher = "PR_SET_IO_FLUSHER: the daemon may wait for its own disks when memory is short"
)

// takePrivileges takes what keeps a host that serves its own disks from locking
// up when memory is short, and says what it could not get. Both are inherited
// by the daemon.
func takePrivileges() []Lack {
	var lacks []Lack
	// The out-of-memory killer must choose somebody else: what it would free
	// here is little, and every volume's user would wait for it.
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0); err != nil {
		lacks = append(lacks, Lack{What: LackOOM, Remedy: needsResource})
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := setIOFlusher(true); err != nil {
		return append(lacks, Lack{What: LackIOFlusher, Remedy: needsResource})
	}
	_ = setIOFlusher(false)
	return lacks
}

// setIOFlusher marks the calling thread, and what it starts, as one that memory
// reclaim must not make wait for I/O: that I/O may be its own to do.
func setIOFlusher(on bool) error {
	v := uintptr(0)
	if on {
		v = 1
	}
	return unix.Prctl(unix.PR_SET_IO_FLUSHER, v, 0, 0, 0)
}
