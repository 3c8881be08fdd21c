package reconcile

import (
	"context"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/disk"
)

// The watermarks of a disk (protocol, section 6) in percent. blockdev/disk acts on the
// upper two; what a person is told begins at the first.
const (
	MarkWarn   = 85 // it is told
	MarkCredit = 92 // nothing more is promised ahead of need
	MarkRefuse = 97 // what needs new space is refused
)

const (
	// fillEvery is how often disks are looked at for the log: none fills that fast
	// that a person could act earlier.
	fillEvery = 2 * time.Second
	// fillSlack is how far below a watermark, in percent, a disk must be to have left
	// it: one that lies on it is not told of again and again.
	fillSlack = 2
)

// Fill is how full a disk is.
type Fill struct {
	// Ratio is what is in use or promised: of the disk or, if that is fuller, of the
	// file system that its image is on.
	Ratio float64
	Host  bool // it is that of the file system
}

// Percent is the ratio in whole percent, rounded down.
func (f Fill) Percent() int { return int(f.Ratio*100 + 1e-6) }

// Mark is the highest watermark that is reached, 0 below all.
func (f Fill) Mark() int {
	for _, mark := range []int{MarkRefuse, MarkCredit, MarkWarn} {
		if f.Percent() >= mark {
			return mark
		}
	}
	return 0
}

// fill takes the fuller of a disk and of the file system that its image is on.
func (d *Disks) fill(path string, s disk.Stat) Fill {
	var f Fill
	if s.Capacity > 0 {
		f.Ratio = float64(s.Used+s.Reserved) / float64(s.Capacity)
	}
	if d.o.HostFill == nil {
		return f
	}
	if host, ok := d.o.HostFill(path); ok && host > f.Ratio {
		f = Fill{Ratio: host, Host: true}
	}
	return f
}

// crossed says at which watermark a disk is that was at another.
func crossed(was int, f Fill) int {
	if now := f.Mark(); now >= was || f.Percent() <= was-fillSlack {
		return now
	}
	return was
}

// WatchSpace says in the log when a disk crosses a watermark, once, and has disks give
// back what they do not need, until ctx ends.
func (d *Disks) WatchSpace(ctx context.Context) {
	tick := time.NewTicker(fillEvery)
	defer tick.Stop()
	marks, since := map[holdfast.DiskID]int{}, map[holdfast.DiskID]time.Time{}
	for {
		d.tellFill(d.List(), marks)
		d.reclaim(ctx, time.Now(), since)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func (d *Disks) tellFill(disks []OpenedDisk, marks map[holdfast.DiskID]int) {
	for _, o := range disks {
		was := marks[o.Stat.Disk]
		now := crossed(was, o.Fill)
		if now == was {
			continue
		}
		marks[o.Stat.Disk] = now
		of := "disk"
		if o.Fill.Host {
			of = "its file system"
		}
		about := []any{"path", o.Path, "disk", o.Stat.Disk, "percent", o.Fill.Percent(), "of", of, "watermark", now}
		if now > was {
			d.o.Logger.Warn("a disk fills up", append(about, "means", MarkMeans(now))...)
		} else {
			d.o.Logger.Info("a disk has room again", about...)
		}
	}
}

// MarkMeans says what a watermark does, in words.
func MarkMeans(mark int) string {
	switch mark {
	case MarkWarn:
		return "a warning"
	case MarkCredit:
		return "nothing more is promised ahead of need"
	case MarkRefuse:
		return "what needs new space is refused"
	}
	return ""
}
