package serve

import (
	"sync/atomic"
	"testing"
	"time"
)

// slowDisk comes back from a look when told to.
type slowDisk struct {
	looks atomic.Int32
	gate  chan struct{}
}

func (d *slowDisk) Touch() error {
	d.looks.Add(1)
	<-d.gate
	return nil
}

func TestOneLookServesAll(t *testing.T) {
	d := &slowDisk{gate: make(chan struct{})}
	touch := &toucher{disk: d}
	answered := make(chan int, 3)
	at := now()
	for i := range 3 {
		if touch.works(at, func() { answered <- i }) {
			t.Fatal("a disk that nobody looked at is said to work")
		}
	}
	select {
	case i := <-answered:
		t.Fatalf("ping %d was answered before the disk was", i)
	case <-time.After(20 * time.Millisecond): // time for a wrong answer to come
	}
	d.gate <- struct{}{}
	for i := range 3 {
		if got := <-answered; got != i {
			t.Errorf("answer %d is to ping %d", i, got)
		}
	}
	touch.wait()
	if got := d.looks.Load(); got != 1 {
		t.Errorf("%d looks for three pings, want 1", got)
	}
	// A look counts for a while, from when it began.
	if !touch.works(now(), func() { t.Error("answered twice") }) {
		t.Error("right after a look the disk is not said to work")
	}
	later := make(chan struct{})
	if touch.works(now()+touchEvery, func() { close(later) }) {
		t.Error("an old look still counts")
	}
	d.gate <- struct{}{}
	<-later
	touch.wait()
}

// TestAHungDiskAnswersNothing: what waits is bounded, and comes when the disk does.
func TestAHungDiskAnswersNothing(t *testing.T) {
	d := &slowDisk{gate: make(chan struct{})}
	touch := &toucher{disk: d}
	var answered atomic.Int32
	for range maxTouchWaits + 100 {
		if touch.works(now(), func() { answered.Add(1) }) {
			t.Fatal("a hung disk is said to work")
		}
	}
	if got := touch.drops(); got != 100 {
		t.Errorf("%d pings counted as dropped, want 100", got)
	}
	if got := answered.Load(); got != 0 {
		t.Fatalf("%d answers while the disk hangs", got)
	}
	close(d.gate)
	touch.wait()
	if got := answered.Load(); got != maxTouchWaits {
		t.Errorf("%d answers when it came back, want the %d that may wait", got, maxTouchWaits)
	}
}
