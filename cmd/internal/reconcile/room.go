package reconcile

import (
	"bytes"
	"cmp"
	"slices"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/disk"
)

// HostRoom is what the file system that an image is on has left for it.
type HostRoom struct {
	FS   uint64 // names the file system: images on one share what is left
	Left int64  // bytes, not below 0, that images may still take of it, all together
	Has  int64  // bytes that the image has of it
}

// Room is what a disk has to give: its own chunks or, if that is less, what the file
// system of its image has left.
type Room struct {
	Size int64 // with what is in use or promised
	Free int64
	Host bool // the file system has less left than the disk
}

// claim is what a disk would take of its host to be full.
type claim struct {
	of   disk.Stat
	own  int64 // free in the disk
	need int64 // of that, what the file system does not have for it yet
}

// rooms says what each disk has to give. Images on one file system share what is left:
// all the same, and one that needs less leaves the rest to the others.
func (d *Disks) rooms(open []OpenedDisk) map[holdfast.DiskID]Room {
	rooms := map[holdfast.DiskID]Room{}
	left, claims := map[uint64]int64{}, map[uint64][]claim{}
	for _, o := range open {
		own := max(0, o.Stat.Capacity-o.Stat.Used-o.Stat.Reserved)
		rooms[o.Stat.Disk] = roomOf(o.Stat, own)
		if d.o.HostRoom == nil || o.Stat.Failed != nil {
			continue
		}
		host, ok := d.o.HostRoom(o.Path)
		if !ok {
			continue
		}
		has := o.Stat.Allocated
		if host.Left > 0 { // what an earlier life took is found while there is room, only
			has = max(has, host.Has)
		}
		has = max(0, has-o.Stat.Used-o.Stat.Reserved)
		left[host.FS] = host.Left
		claims[host.FS] = append(claims[host.FS], claim{o.Stat, own, max(0, own-has)})
	}
	for fs, list := range claims {
		slices.SortFunc(list, func(a, b claim) int {
			return cmp.Or(cmp.Compare(a.need, b.need), bytes.Compare(a.of.Disk[:], b.of.Disk[:]))
		})
		rest := left[fs]
		for i, c := range list {
			gets := min(c.need, rest/int64(len(list)-i))
			rest -= gets
			room := roomOf(c.of, c.own-c.need+gets)
			room.Host = gets < c.need
			rooms[c.of.Disk] = room
		}
	}
	return rooms
}

// roomOf is the room of a disk with so much free. Raft takes no disk of no size.
func roomOf(s disk.Stat, free int64) Room {
	return Room{Size: max(holdfast.ChunkSize, min(s.Capacity, s.Used+s.Reserved+free)), Free: free}
}
