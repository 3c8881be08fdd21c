package main

import (
	"os"

	"golang.org/x/sys/unix"
)

// fadviseDontNeed writes the file out and drops it from the page cache.
func fadviseDontNeed(f *os.File) error {
	if err := f.Sync(); err != nil {
		return err
	}
	return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
}
