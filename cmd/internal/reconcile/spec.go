package reconcile

import (
	"path/filepath"
	"strings"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/disk"
)

// minDisk is the least an image may have: less has no room beside its log.
const minDisk = 64 << 20

// DiskSpec is one disk as an operator gives it: a raw block device or an image file.
type DiskSpec struct {
	Path string
	Size int64  // bytes of an image to be made
	WAL  int64  // bytes of write-ahead log; 0: by the disk's size
	Pool string // empty: by its class, ssd or hdd
	// Removed: it was removed from the cluster, and is not opened again because a
	// flag still names it.
	Removed bool `json:",omitempty"`
}

// diskWords is how a disk is written.
const diskWords = "write PATH[,size=10G][,pool=ssd][,wal=256M]"

// ParseDisk reads PATH[,size=10G][,pool=ssd][,wal=256M]. flag is what errors call it.
func ParseDisk(flag, s string) (DiskSpec, error) {
	parts := strings.Split(s, ",")
	d := DiskSpec{Path: parts[0]}
	if d.Path == "" {
		return d, holdfast.Errorf(holdfast.ErrInvalid, "%s %q has no path", flag, s).WithRemedy(diskWords)
	}
	abs, err := filepath.Abs(d.Path)
	if err != nil {
		return d, holdfast.Errorf(holdfast.ErrInvalid, "%s %q: %w", flag, s, err)
	}
	d.Path = abs
	seen := map[string]bool{}
	for _, p := range parts[1:] {
		k, v, _ := strings.Cut(p, "=")
		if seen[k] {
			return d, holdfast.Errorf(holdfast.ErrInvalid, "%s %q gives %s twice", flag, s, k).WithRemedy("give it once")
		}
		seen[k] = true
		switch k {
		case "size":
			if d.Size, err = holdfast.ParseSize(v); err == nil && d.Size < minDisk {
				err = holdfast.Errorf(holdfast.ErrInvalid, "size %s is less than 64 MiB", v)
			}
		case "wal":
			if d.WAL, err = holdfast.ParseSize(v); err == nil && d.WAL < disk.MinWALSize {
				err = holdfast.Errorf(holdfast.ErrInvalid, "wal %s is less than 16 MiB", v)
			}
		case "pool":
			d.Pool = v
			err = holdfast.CheckPoolName(v)
		default:
			err = holdfast.Errorf(holdfast.ErrInvalid, "unknown word %q", p).WithRemedy(diskWords)
		}
		if err != nil {
			return d, holdfast.Errorf(holdfast.ErrInvalid, "%s %q: %w", flag, s, err)
		}
	}
	return d, nil
}
