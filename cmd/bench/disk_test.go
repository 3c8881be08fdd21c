package main

import (
	"bytes"
	"context"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast"
)

// TestEveryBlock: each block once, then no more.
func TestEveryBlock(t *testing.T) {
	s := &subject{size: 1 << 20}
	next, seen := s.everyBlock(), map[int64]bool{}
	for {
		off, ok := next()
		if !ok {
			break
		}
		if off < 0 || off >= s.size || off%holdfast.BlockSize != 0 || seen[off] {
			t.Fatalf("offset %d, seen before: %v", off, seen[off])
		}
		seen[off] = true
	}
	if len(seen) != 256 {
		t.Errorf("%d blocks of 256", len(seen))
	}
}

// TestSubject: what the jobs write to a real disk reads back, through all of its jobs.
func TestSubject(t *testing.T) {
	s, err := openSubject(t.Context(), t.TempDir(), 256<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.close(); err != nil {
			t.Error(err)
		}
	}()
	d := &diskRun{c: config{seconds: 1}, s: s}
	for _, j := range diskJobs() {
		done, err := j.disk(d, t.Context())
		if err != nil {
			t.Fatalf("%s: %v", j.name, err)
		}
		if done.requests == 0 || int64(len(done.latency)) != done.requests || done.took <= 0 {
			t.Errorf("%s: %d requests, %d latencies, %v", j.name, done.requests, len(done.latency), done.took)
		}
		if len(done.seconds) > 0 {
			sum := int64(0)
			for _, n := range done.seconds {
				sum += n
			}
			if sum != done.requests {
				t.Errorf("%s: seconds sum up to %d of %d", j.name, sum, done.requests)
			}
		}
	}
	if tail := s.r.Status().Tail; tail != s.seq {
		t.Errorf("the disk has %d entries of %d", tail, s.seq)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.commits(ctx, time.Hour); err == nil {
		t.Error("a job goes on after it was cancelled")
	}
}

// TestDiskSample: percentiles, and the worst whole second beside the median one.
func TestDiskSample(t *testing.T) {
	d := did{written: written{requests: 100, took: 2 * time.Second, seconds: []int64{40, 20, 38, 2}}, bytes: 1000}
	for i := range 100 {
		d.latency = append(d.latency, time.Duration(100-i)*time.Microsecond)
	}
	got := d.sample()
	want := diskSample{IOPS: 50, MBps: 0.05, P50: 51, P99: 100, Max: 100, Least: 20.0 / 38}
	if got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	d.seconds = d.seconds[:3]
	if got := d.sample(); got.Least != 0 {
		t.Errorf("two whole seconds have a worst of %v", got.Least)
	}
	if got := (&did{written: written{took: time.Second}}).sample(); got != (diskSample{}) {
		t.Errorf("of no requests: %+v", got)
	}
}

// TestDiskPrint: ratios of medians, and the worst of what must never be.
func TestDiskPrint(t *testing.T) {
	r := &diskResults{Rounds: 3}
	for _, j := range diskJobs() {
		for i, iops := range []float64{300, 100, 200} {
			r.Samples = append(r.Samples,
				diskSample{Job: j.name, Target: "file", Round: i + 1, IOPS: 400},
				diskSample{Job: j.name, Target: "disk", Round: i + 1, IOPS: iops, Max: iops * 7, Least: 1 - iops/1000})
		}
	}
	var out bytes.Buffer
	if err := r.print(&out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{" 0.50 ", " 2100 ", " 0.70 ", "random write 4K QD32, log gone round"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is not in\n%s", want, out.String())
		}
	}
}
