package disk

import (
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// Touch reads one page of the log from the medium and returns when that is done,
// well or not: a disk that hangs is one at which it does not return. It changes
// nothing. Writes to the log may come back from memory for as long as there is
// some, so they tell nothing of the kind. It must not be called after Close began.
func (d *Disk) Touch() error {
	return d.wal.touch(vfs.AlignedBuffer(vfs.PageSize))
}
