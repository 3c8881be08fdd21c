package node

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/mount"
	"github.com/holdfast-storage/holdfast/cmd/internal/reconcile"
)

// Sizes of the write-ahead log of the disk that is made without --disk.
const (
	defaultWALShare = 16
	leastDefaultWAL = 256 << 20
	mostDefaultWAL  = 2 << 30
)

// diskSpecs are the disks to open: those known from earlier starts, and fresh
// ones of the flags, or on a first start without --disk an image in the data
// directory.
func (n *node) diskSpecs() (known, fresh []reconcile.DiskSpec, err error) {
	err = n.dir.loadJSON("disks.json", &known)
	first := errors.Is(err, os.ErrNotExist)
	if err != nil && !first {
		return nil, nil, holdfast.Errorf(holdfast.ErrIntegrity, "read the known disks: %s: %w", n.dir.file("disks.json"), err).WithRemedy("remove the file and give every disk with --disk")
	}
	if n.o.noDisks {
		for _, d := range known {
			if !d.Removed {
				return nil, nil, holdfast.Errorf(holdfast.ErrRefused, "--disk none, but this node has the disk %s", d.Path).WithRemedy("leave the flag out")
			}
		}
		return known, nil, nil
	}
	for _, d := range n.o.disks {
		if !has(known, d.Path) && !has(fresh, d.Path) {
			fresh = append(fresh, d)
		}
	}
	if first && len(fresh) == 0 {
		d, err := n.defaultDisk()
		if err != nil {
			return nil, nil, err
		}
		fresh = append(fresh, d)
	}
	return known, fresh, nil
}

func has(list []reconcile.DiskSpec, path string) bool {
	for _, d := range list {
		if d.Path == path {
			return true
		}
	}
	return false
}

// defaultDisk is half of what is free after the WAL, in DATA_DIR/disks/0.img.
func (n *node) defaultDisk() (reconcile.DiskSpec, error) {
	free, err := freeBytes(n.o.DataDir)
	if err != nil {
		return reconcile.DiskSpec{}, err
	}
	wal := min(max(free/2/defaultWALShare, leastDefaultWAL), mostDefaultWAL) / (1 << 20) * (1 << 20)
	size := (free - wal) / 2 / (1 << 20) * (1 << 20)
	if size < minDefaultDisk {
		return reconcile.DiskSpec{}, holdfast.Errorf(holdfast.ErrRefused, "%s free in %s after %s of ballast: too little for a disk of at least %s and its log",
			holdfast.FormatSize(free), n.o.DataDir, holdfast.FormatSize(n.o.ballast), holdfast.FormatSize(minDefaultDisk)).
			WithRemedy("give --disk with a device or a size, or a smaller --ballast")
	}
	return reconcile.DiskSpec{Path: n.dir.file("disks", "0.img"), Size: size, WAL: wal}, nil
}

// class is the pool of a disk for which its operator names none.
func class(path string) string {
	turns, ok := mount.Rotational(path)
	switch {
	case !ok:
		return ""
	case turns:
		return "hdd"
	}
	return "ssd"
}

func writable(dir string) bool { return unix.Access(dir, unix.W_OK) == nil }
