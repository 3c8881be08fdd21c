package serve

import (
	"sync"
	"time"

	"github.com/holdfast-storage/holdfast/blockdev/disk"
)

// A ping is answered only once the replica's disk was seen to work after it came,
// or not long before: a member whose disk hangs must not look alive. One look
// serves all replicas of the disk, and a disk that nobody pings is not looked at.
const (
	// touchEvery is for how long a look counts: writers ping that often.
	touchEvery = 500 * time.Millisecond
	// maxTouchWaits bounds the pings of all replicas of a disk that wait for one
	// look. One that finds no room is not answered; the writer sends others.
	maxTouchWaits = 4096
)

// toucher looks whether a disk works.
type toucher struct {
	disk interface{ Touch() error }

	mu      sync.Mutex
	seen    bool
	good    time.Duration // begin of the last look that came back
	busy    bool
	waiting []func()
	dropped uint64 // pings that found no room
	running sync.WaitGroup
}

func newToucher(d *disk.Disk) *toucher { return &toucher{disk: d} }

// works says whether the disk was seen to work lately. If not it has a look, and
// runs then, on another goroutine, once that comes back: never, if it does not.
func (t *toucher) works(at time.Duration, then func()) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.seen && at-t.good < touchEvery {
		return true
	}
	if len(t.waiting) < maxTouchWaits {
		t.waiting = append(t.waiting, then)
	} else {
		t.dropped++
	}
	if !t.busy {
		t.busy = true
		t.running.Add(1)
		go t.look()
	}
	return false
}

func (t *toucher) look() {
	defer t.running.Done()
	began := now()
	_ = t.disk.Touch() // an error is an answer too; what it means for the disk, its own reads and writes find out
	t.mu.Lock()
	t.seen, t.good, t.busy = true, began, false
	waiting := t.waiting
	t.waiting = nil
	t.mu.Unlock()
	for _, then := range waiting {
		then()
	}
}

// wait returns when nothing looks at the disk any more. No works may follow.
func (t *toucher) wait() { t.running.Wait() }

// drops returns how many pings were never answered for want of room.
func (t *toucher) drops() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.dropped
}
