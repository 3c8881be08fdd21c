package attachment

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast-storage/holdfast"
)

// simulated is a pace and its clock, with a foreground that takes what the
// resyncs leave it.
type simulated struct {
	pace
	now time.Duration
}

// second lets a second pass in windows of 200 ms: writes of which all took d, and
// resyncs that send what they may, but at most most bytes a second each.
func (s *simulated) second(writes int, d time.Duration, resyncs int, most float64) {
	for range 5 {
		for range writes / 5 {
			s.window[opWrite].Add(d)
		}
		rate := s.rate
		if rate == 0 || rate > most {
			rate = most
		}
		s.sent += int64(rate / 5 * float64(resyncs))
		s.now += 200 * time.Millisecond
		s.look(s.now, resyncs)
	}
}

func newSimulated() *simulated {
	s := &simulated{now: time.Hour}
	s.next(s.now, 0)
	return s
}

const (
	disk500 = 500 * mib
	disk200 = 200 * mib
)

// Without anybody at work a resync runs as fast as it can.
func TestPaceIdle(t *testing.T) {
	s := newSimulated()
	s.second(0, 0, 0, 0)
	s.begin()
	if s.rate != 0 {
		t.Fatalf("limit %v at the start of a resync beside nobody, want none", s.rate)
	}
	s.second(0, 0, 1, disk500)
	if s.rate != 0 || s.lastRate != disk500 {
		t.Errorf("limit %v, sent %v a second, want no limit and %v", s.rate, s.lastRate, float64(disk500))
	}
	// Somebody comes: nothing is known of what his requests take without resync,
	// so that is learned at the floor first.
	s.second(5000, time.Millisecond, 1, disk500)
	if s.rate > 10*resyncFloor {
		t.Errorf("limit %.0f a second after the first requests", s.rate)
	}
	// He does not suffer: it grows. He leaves: no limit.
	for range 10 {
		s.second(5000, time.Millisecond, 1, disk500)
	}
	if s.rate < disk200 {
		t.Errorf("limit %.0f, want it to grow beside requests that do not suffer", s.rate)
	}
	s.second(0, 0, 1, disk500)
	s.second(0, 0, 1, disk500)
	if s.rate != 0 {
		t.Errorf("limit %.0f with nobody at work, want none", s.rate)
	}
}

// A foreground that is slowed by what is above a rate has the resync near that
// rate, and never below the floor.
func TestPaceSpares(t *testing.T) {
	for _, room := range []float64{0, 100 * mib, 300 * mib} {
		s := newSimulated()
		for range 5 {
			s.second(5000, time.Millisecond, 0, 0)
		}
		s.begin()
		var sum float64
		suffered := 0
		for i := range 60 {
			d := time.Millisecond
			if s.rate > room {
				d = 4 * time.Millisecond
				suffered++
			}
			s.second(5000, d, 1, disk500)
			if s.rate < resyncFloor {
				t.Fatalf("room %.0f: limit %.0f in second %d, want %d at least", room, s.rate, i, resyncFloor)
			}
			if i >= 30 {
				sum += s.rate / 30
			}
		}
		switch {
		case room > 0 && (sum < room/2 || sum > room*3/2):
			t.Errorf("room %.0f: limit %.0f on average, suffered %d s of 60", room, sum, suffered)
		case room == 0 && s.verdict == paceNone:
			t.Errorf("no limit for a foreground that suffers")
		}
	}
}

// The load becomes another one while a resync runs: what it takes at the floor is
// the new measure, and the resync does not stay there for ever.
func TestPaceLoadChanges(t *testing.T) {
	s := newSimulated()
	for range 5 {
		s.second(5000, time.Millisecond, 0, 0)
	}
	s.begin()
	lowest := float64(resyncMost)
	for range 60 {
		s.second(20000, 10*time.Millisecond, 1, disk500)
		lowest = min(lowest, s.rate)
	}
	if lowest != resyncFloor {
		t.Errorf("limit %.0f at the lowest, want the floor: the p99 was ten times the baseline", lowest)
	}
	if s.rate < disk200 {
		t.Errorf("limit %.0f after a minute of a load that is slow by itself", s.rate)
	}
}

// A request that waited for an eviction is no measure of what disks take.
func TestPaceHeldRequests(t *testing.T) {
	s := newSimulated()
	for range 5 {
		s.second(100, time.Millisecond, 0, 0)
	}
	for range 16 {
		s.window[opWrite].Add(5 * time.Second)
	}
	s.second(0, 0, 0, 0)
	s.second(100, time.Millisecond, 0, 0)
	if base, ok := s.baseline(opWrite); !ok || base > 2*time.Millisecond {
		t.Errorf("baseline %v %v after held requests, want that of the others", base, ok)
	}
}

// Two resyncs per disk, source or target; who has room goes ahead of who has not.
func TestThrottlePlaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		th := NewThrottle()
		a, b, c, d := holdfast.DiskID{1}, holdfast.DiskID{2}, holdfast.DiskID{3}, holdfast.DiskID{4}
		begin := func(disks ...holdfast.DiskID) (**resync, *bool) {
			got := new(bool)
			r := new(*resync)
			go func() {
				x, err := th.begin(t.Context(), nil, disks...)
				if err == nil {
					*r, *got = x, true
				}
			}()
			synctest.Wait()
			return r, got
		}
		first, err := th.begin(t.Context(), nil, a, b)
		if err != nil {
			t.Fatal(err)
		}
		second, two := begin(a, c)
		third, three := begin(d, a) // a is full
		_, four := begin(c, d)      // but these are not
		if !*two || *three || !*four {
			t.Errorf("runs: %v %v %v, want true false true", *two, *three, *four)
		}
		if st := th.Status(); st.Resyncs != 3 || st.Waiting != 1 {
			t.Errorf("status %+v, want 3 that run and 1 that waits", st)
		}
		_, same := begin(b, b) // one disk counts once
		if !*same {
			t.Error("a copy within one disk takes two places")
		}
		ctx, cancel := context.WithCancel(t.Context())
		given := make(chan error)
		go func() {
			_, err := th.begin(ctx, nil, a)
			given <- err
		}()
		synctest.Wait()
		cancel()
		if err := <-given; err == nil {
			t.Error("a stopped wait got a place")
		}
		hurry := false
		hurried := make(chan struct{})
		go func() {
			if _, err := th.begin(t.Context(), func() bool { th.mu.Lock(); defer th.mu.Unlock(); return hurry }, a); err != nil {
				t.Error(err)
			}
			close(hurried)
		}()
		synctest.Wait()
		th.mu.Lock()
		hurry = true
		th.mu.Unlock()
		<-hurried
		first.end()
		synctest.Wait()
		if *three {
			t.Error("three on one disk: the hurried one counts")
		}
		(*second).stall(true)
		(*second).stall(true)
		synctest.Wait()
		if !*three {
			t.Error("one that gets nowhere keeps its place")
		}
		(*second).stall(false)
		(*second).stall(true)
		(*second).end()
		(*third).end()
		th.mu.Lock()
		defer th.mu.Unlock()
		if th.disks[a] != 1 || th.disks[d] != 1 {
			t.Errorf("places taken: %v, want one on each disk in use", th.disks)
		}
	})
}

// What is sent keeps to the rate, and who must hurry does not wait.
func TestThrottleRate(t *testing.T) {
	th := NewThrottle()
	r, err := th.begin(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer r.end()
	th.mu.Lock()
	th.pace.rate = resyncFloor
	th.mu.Unlock()
	began := now()
	const amount = 3 * mib
	for sent := 0; sent < amount; sent += 64 << 10 {
		if err := r.wait(t.Context()); err != nil {
			t.Fatal(err)
		}
		r.spend(64 << 10)
	}
	// The last one is not paid for.
	if took, least := now()-began, time.Duration(float64(amount-64<<10)/resyncFloor*float64(time.Second)); took < least {
		t.Errorf("%d bytes took %v, want %v at least", amount, took, least)
	}
	r.spend(100 * mib)
	r.hurry = func() bool { return true }
	began = now()
	if err := r.wait(t.Context()); err != nil || now()-began > 5*time.Second {
		t.Errorf("who must hurry waited %v, %v", now()-began, err)
	}
	r.hurry = nil
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.wait(ctx); err == nil {
		t.Error("a stopped wait goes on")
	}
}
