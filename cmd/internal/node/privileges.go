package node

import (
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast/cmd/internal/keeper"
)

// prGetIOFlusher is PR_GET_IO_FLUSHER (prctl(2)): whether this thread is part of
// the path that writes dirty pages back, and so must not wait for them. It is a
// flag of the thread that the threads it makes inherit; the keeper sets it
// before it starts the daemon.
const prGetIOFlusher = 58

// takePrivileges asks the kernel for what keeps a storage daemon alive under
// memory pressure, when its own clients' dirty pages are what fills the memory.
// What is refused is not an error: it is returned for status to list, in the keeper's
// words where the keeper asks for the same.
func takePrivileges() (lacks []keeper.Lack) {
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_ONFAULT); err != nil {
		lacks = append(lacks, keeper.Lack{What: fmt.Sprintf("memory is not locked: mlockall: %v", err), Remedy: "give CAP_IPC_LOCK"})
	}
	if set, _, errno := unix.Syscall6(unix.SYS_PRCTL, prGetIOFlusher, 0, 0, 0, 0, 0); errno != 0 || set != 1 {
		lacks = append(lacks, keeper.Lack{What: keeper.LackIOFlusher, Remedy: "a keeper takes it, with CAP_SYS_RESOURCE"})
	}
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0); err != nil {
		lacks = append(lacks, keeper.Lack{What: keeper.LackOOM, Remedy: "give CAP_SYS_RESOURCE"})
	}
	return lacks
}

// offOf writes lacks for status, each once: of two that are the same the later, which
// knows better what to do, counts.
func offOf(lacks []keeper.Lack) (off []string) {
	for i, l := range lacks {
		if slices.ContainsFunc(lacks[i+1:], func(later keeper.Lack) bool { return later.What == l.What }) {
			continue
		}
		text := l.What
		if l.Remedy != "" {
			text += " (" + l.Remedy + ")"
		}
		off = append(off, text)
	}
	return off
}
