package reconcile

import (
	"context"
	"time"

	"github.com/holdfast-storage/holdfast"
)

// reclaimAfter is how long what was trimmed, deleted or replaced waits at most to be
// given back: a disk frees it with its next checkpoint, and one with little to do has
// none for long. A checkpoint in such a time costs nothing that could be measured.
const reclaimAfter = 30 * time.Second

// reclaim gives back what has waited long enough. since is when each disk was first
// seen to have something, and is kept between the calls.
func (d *Disks) reclaim(ctx context.Context, now time.Time, since map[holdfast.DiskID]time.Time) {
	if !d.changing.TryLock() {
		return // a disk comes or goes, and may take minutes to; next time
	}
	defer d.changing.Unlock() // none is closed meanwhile
	d.mu.Lock()
	open := make(map[holdfast.DiskID]*openDisk, len(d.open))
	for id, od := range d.open {
		open[id] = od
	}
	d.mu.Unlock()
	for id, od := range open {
		if !reclaimDue(id, od.Stat().Reclaimable, now, since) {
			continue
		}
		if err := od.Checkpoint(ctx); err != nil && ctx.Err() == nil && od.Stat().Failed == nil {
			d.o.Logger.Warn("give space of a disk back", "path", od.path, "err", err)
		}
	}
}

// reclaimDue says whether a disk has had something to give back for long enough, and
// begins anew then.
func reclaimDue(id holdfast.DiskID, reclaimable int64, now time.Time, since map[holdfast.DiskID]time.Time) bool {
	first, waits := since[id]
	switch {
	case reclaimable == 0:
		delete(since, id)
	case !waits:
		since[id] = now
	case now.Sub(first) >= reclaimAfter:
		delete(since, id)
		return true
	}
	return false
}
