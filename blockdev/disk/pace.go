package disk

import "time"

// Back-pressure. Entries come faster than they can be applied and synced to the
// chunks, until the log is full. A writer that then waited for a whole checkpoint
// would stand still for as long as half the log takes. So
//
//   - above half the log, the background makes room in passes, each for an eighth of
//     the log (tend);
//   - from there on each write is delayed a little, the more the fuller the log is, so
//     that writers come down to what the passes get done (delay);
//   - a writer waits for a pass only when the log is almost full all the same.
const (
	paceFrom = 9  // sixteenths of the log: above, writers are slowed
	paceTo   = 13 // sixteenths of the log: above, they wait
	// paceUnit is what 4 KiB cost half-way between the two: 200 MB/s. Disks that are
	// slower or faster settle nearer to one end.
	paceUnit = 20 * time.Microsecond
	// largeDiscount is what less a large write costs: it is in its place, and only has
	// to be synced.
	largeDiscount = 16
	// paceMost bounds one delay; it bounds what a full log can add to a write as long
	// as passes make progress.
	paceMost = 100 * time.Millisecond
	// paceLeast is not worth going to sleep for; it is added to the next delay.
	paceLeast = time.Millisecond
)

// tend applies what may be applied, which syncs no chunks. For a sync is the more of a
// burden the more was applied since the last, it writes a checkpoint after each eighth
// of the log; and more of them while the log is more than half full, as long as they make
// more room than they take.
func (d *Disk) tend() error {
	if d.cache.full() {
		return d.checkpoint(nil, true)
	}
	size := d.wal.size()
	if used := d.wal.used(); used <= size/2 {
		if err := d.applyAll(); err != nil || used < d.settled.Load()+size/8 {
			return err
		}
		_, err := d.reclaim(nil)
		return err
	}
	for d.wal.used() > size/2 {
		if _, err := d.reclaim(nil); err != nil || d.stuck.Load() > 0 {
			return err
		}
		select {
		case <-d.stop:
			return nil
		default:
		}
	}
	return nil
}

// slow is called before the log grows by so many bytes, with no lock held: it wakes the
// background, and delays the writer. A volume that holds more than its share is delayed
// twice as much.
func (d *Disk) slow(held *Replica, bytes int64) {
	used, size := d.wal.used(), d.wal.size()
	if used > size/2 {
		select {
		case d.kick <- struct{}{}:
		default: // it is awake already
		}
	}
	// Of what the last pass could make no room of, nothing is gained by waiting.
	if from := max(size/16*paceFrom, d.stuck.Load()); used > from {
		if d.overShare(held, used) {
			bytes *= 2
		}
		d.delay(paceCost(bytes, used-from, size/16*paceTo-used))
	}
}

// paceCost is how long no other write may follow one of so many bytes, in a log that is
// above the point where it begins by above, and below that where writers wait by below.
func paceCost(bytes, above, below int64) time.Duration {
	if below <= 0 {
		return paceMost
	}
	return min(paceMost, time.Duration(float64(bytes)/blockSize*float64(paceUnit)*float64(above)/float64(below)))
}

// delay keeps all writers of the disk together at a rate.
func (d *Disk) delay(cost time.Duration) {
	now := time.Since(d.begun)
	d.pacing.Lock()
	d.paced = min(max(d.paced, now)+cost, now+paceMost)
	wait := d.paced - now
	d.pacing.Unlock()
	if wait < paceLeast || d.opts.foreground {
		return
	}
	select {
	case <-time.After(wait):
	case <-d.stop:
	}
}

// makeRoom has the holder of a replica's order make room in a log that is almost full,
// while there still is some to move old entries to, unless that was in vain a moment ago.
func (d *Disk) makeRoom(held *Replica) error {
	used, size := d.wal.used(), d.wal.size()
	if used <= size/16*paceTo || used < d.stuck.Load()+size/16 {
		return nil
	}
	_, err := d.reclaim(held)
	return err
}

// overShare says whether a replica's volume holds more than a quarter of the log,
// and others hold enough of it to be disturbed.
func (d *Disk) overShare(r *Replica, used int64) bool {
	held := int64(0)
	for _, o := range d.Replicas() {
		if o.desc.Segment.Volume == r.desc.Segment.Volume {
			o.mu.RLock()
			held += o.index.held()
			o.mu.RUnlock()
		}
	}
	return held > d.wal.size()/4 && used-held > d.wal.size()/16
}
