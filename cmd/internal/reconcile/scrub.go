package reconcile

import (
	"cmp"
	"context"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/disk"
)

// DefaultScrubEvery is how often each disk is scrubbed: often enough that a second
// copy seldom rots before the first is found, seldom enough to cost nothing.
const DefaultScrubEvery = 7 * 24 * time.Hour

// Scrubbing is how the last or the present scrub of a disk went.
type Scrubbing struct {
	disk.ScrubReport
	Running      bool
	Rate         int64     // bytes a second
	Began, Ended time.Time // zero: none began, or it runs
	Err          error     // why it did not read everything
	Next         time.Time // when the next begins by itself; zero: none does
	Scrubs       uint64    // that read everything
}

// scrubber scrubs one disk, when it is due and when it is asked to.
type scrubber struct {
	d     *disk.Disk
	every time.Duration
	log   *slog.Logger
	ask   chan int64
	stop  context.CancelFunc
	wg    sync.WaitGroup

	mu   sync.Mutex
	s    Scrubbing
	done context.CancelFunc // of the one that runs
}

// startScrubber returns a scrubber at work. The first scrub comes within a seventh
// of every, so that a node that is restarted often scrubs too, and not all of its
// disks at once.
func startScrubber(d *disk.Disk, every time.Duration, log *slog.Logger) *scrubber {
	every = cmp.Or(every, DefaultScrubEvery)
	ctx, stop := context.WithCancel(context.Background())
	s := &scrubber{d: d, every: every, log: log, ask: make(chan int64, 1), stop: stop}
	if every > 0 {
		s.s.Next = time.Now().Add(rand.N(every/7 + 1)) //nolint:gosec // no secret
	}
	s.wg.Go(func() { s.run(ctx) })
	return s
}

func (s *scrubber) run(ctx context.Context) {
	for ctx.Err() == nil {
		next := s.state().Next
		timer := time.NewTimer(time.Until(next))
		if next.IsZero() {
			timer.Stop()
		}
		rate := int64(disk.DefaultScrubRate)
		select {
		case <-ctx.Done():
		case rate = <-s.ask:
		case <-timer.C:
		}
		timer.Stop()
		if ctx.Err() == nil {
			s.scrub(ctx, rate)
		}
	}
}

// scrub scrubs once.
func (s *scrubber) scrub(ctx context.Context, rate int64) {
	ctx, done := context.WithCancel(ctx)
	defer done()
	s.mu.Lock()
	s.s = Scrubbing{Running: true, Rate: rate, Began: time.Now(), Scrubs: s.s.Scrubs}
	s.done = done
	s.mu.Unlock()
	report, err := s.d.Scrub(ctx, disk.ScrubOptions{Rate: rate, Progress: func(r disk.ScrubReport) {
		s.mu.Lock()
		s.s.ScrubReport = r
		s.mu.Unlock()
	}})
	s.mu.Lock()
	s.s.ScrubReport, s.s.Err, s.s.Running, s.s.Ended, s.done = report, err, false, time.Now(), nil
	if s.every > 0 {
		s.s.Next = time.Now().Add(s.every)
	}
	if err == nil {
		s.s.Scrubs++
	}
	took := s.s.Ended.Sub(s.s.Began)
	s.mu.Unlock()
	log := s.log.Info
	if report.Bad+report.Lost > 0 || err != nil && ctx.Err() == nil {
		log = s.log.Warn
	}
	log("disk scrubbed", "disk", s.d.Stat().Disk, "bytes", report.Read, "bad_blocks", report.Bad, "lost_blocks", report.Lost, "took", took, "err", err)
}

// start asks for a scrub; one that runs goes on as it is.
func (s *scrubber) start(rate int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.s.Running {
		return
	}
	select {
	case s.ask <- rate:
		s.s = Scrubbing{Running: true, Rate: rate, Began: time.Now(), Scrubs: s.s.Scrubs} // seen at once by who asked
	default: // asked already
	}
}

// end ends the scrub that runs, if one does.
func (s *scrubber) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.done != nil {
		s.done()
		return
	}
	select {
	case <-s.ask:
		s.s.Running, s.s.Ended = false, time.Now()
	default:
	}
}

func (s *scrubber) state() Scrubbing {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.s
}

// close ends all and waits for it.
func (s *scrubber) close() {
	s.stop()
	s.wg.Wait()
}

// Scrub begins a scrub of an open disk at a rate in bytes a second, 0 for the
// default, or ends the one that runs. A scrub that runs already goes on as it is.
func (d *Disks) Scrub(id holdfast.DiskID, rate int64, stop bool) error {
	if rate = cmp.Or(rate, disk.DefaultScrubRate); rate < disk.MinScrubRate {
		return holdfast.Errorf(holdfast.ErrInvalid, "a rate of %d bytes a second is less than %s", rate, holdfast.FormatSize(disk.MinScrubRate)).WithRemedy("give at least 1M")
	}
	d.mu.Lock()
	od := d.open[id]
	d.mu.Unlock()
	if od == nil {
		return holdfast.Errorf(holdfast.ErrUnavailable, "disk %v is not open", id)
	}
	if failed := od.Stat().Failed; failed != nil {
		return holdfast.Errorf(holdfast.ErrRefused, "disk %v cannot be scrubbed: %w", id, failed)
	}
	if stop {
		od.scrub.end()
		return nil
	}
	od.scrub.start(rate)
	return nil
}
