package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"runtime"
	"time"
)

// A job is one fio run; fio's own names.
type job struct {
	Name string
	Args []string
}

// jobs are measured in this order, the reading ones last: what the writing ones
// leave to be done in the background is done by then.
func jobs() []job {
	return []job{
		{"random write 4K QD1", []string{"--rw=randwrite", "--bs=4k", "--iodepth=1"}},
		{"random write 4K QD32", []string{"--rw=randwrite", "--bs=4k", "--iodepth=32"}},
		{"write+flush 4K QD1", []string{"--rw=randwrite", "--bs=4k", "--iodepth=1", "--fsync=1"}},
		{"sequential write 1M QD8", []string{"--rw=write", "--bs=1m", "--iodepth=8"}},
		{"sequential read 1M QD8", []string{"--rw=read", "--bs=1m", "--iodepth=8"}},
		{"random read 4K QD1", []string{"--rw=randread", "--bs=4k", "--iodepth=1"}},
		{"random read 4K QD32", []string{"--rw=randread", "--bs=4k", "--iodepth=32"}},
	}
}

// sample is one job on one target in one round.
type sample struct {
	Job    string  `json:"job"`
	Target string  `json:"target"`
	Round  int     `json:"round"`
	IOPS   float64 `json:"iops"`
	// MBps is in 10^6 bytes per second.
	MBps float64 `json:"mbps"`
	// P50 and P99 are of the request, and for write+flush the sum of both
	// requests' percentiles.
	P50 float64 `json:"p50_us"`
	P99 float64 `json:"p99_us"`
	// CPU is what all processes of the target used, in ms per 1000 requests.
	CPU float64 `json:"server_cpu_ms_per_1000"`
	// Other is the work of everything but fio and the target, the kernel's own
	// threads included, in cores.
	Other float64 `json:"other_cores"`
}

// results are all samples and the circumstances.
type results struct {
	Begun   time.Time `json:"begun"`
	CPUs    int       `json:"cpus"`
	Kernel  string    `json:"kernel"`
	SizeMiB int       `json:"size_mib"`
	Seconds int       `json:"seconds"`
	Rounds  int       `json:"rounds"`
	Targets []string  `json:"targets"`
	Samples []sample  `json:"samples"`
	// RSS is the most memory that a target's processes held together after a
	// job, in MiB.
	RSS map[string]float64 `json:"rss_mib"`
}

// measure starts the targets, verifies each, and runs the rounds.
func measure(ctx context.Context, c config, progress io.Writer) (*results, error) {
	release, _ := os.ReadFile("/proc/sys/kernel/osrelease") //nolint:errcheck // only shown
	r := &results{
		Begun: time.Now().UTC(), CPUs: runtime.NumCPU(), Kernel: string(trimSpace(release)), SizeMiB: c.sizeMiB,
		Seconds: c.seconds, Rounds: c.rounds, Targets: c.targets, RSS: make(map[string]float64),
	}
	var targets []*target
	defer func() {
		for _, t := range targets {
			t.stop()
		}
	}()
	for _, name := range c.targets {
		fmt.Fprintf(progress, "start %s\n", name)
		t, err := starters[name](ctx, c, name)
		if t != nil {
			targets = append(targets, t)
		}
		if err != nil {
			return nil, fmt.Errorf("start %s: %w", name, err)
		}
	}
	for _, t := range targets {
		fmt.Fprintf(progress, "verify %s: %d MiB\n", t.name, c.verify)
		if err := verify(ctx, c, t); err != nil {
			return nil, fmt.Errorf("verify %s: %w", t.name, err)
		}
	}
	for round := 1; round <= c.rounds; round++ {
		for _, t := range targets {
			// The images' page cache as each round's first job finds it.
			if err := t.prepare(ctx); err != nil {
				return nil, fmt.Errorf("prepare %s: %w", t.name, err)
			}
		}
		for _, j := range jobs() {
			for _, t := range targets {
				settle(ctx, targets)
				s, err := runJob(ctx, c, t, j)
				if err != nil {
					return nil, fmt.Errorf("%s on %s: %w", j.Name, t.name, err)
				}
				s.Round = round
				r.Samples = append(r.Samples, s)
				r.RSS[t.name] = max(r.RSS[t.name], t.rss())
				fmt.Fprintf(progress, "round %d, %s, %s: %.0f/s, %.0f MB/s, p99 %.0f us, %.1f ms CPU per 1000, other work %.2f cores\n",
					round, j.Name, t.name, s.IOPS, s.MBps, s.P99, s.CPU, s.Other)
			}
		}
	}
	return r, nil
}

// runJob measures one job on one target.
func runJob(ctx context.Context, c config, t *target, j job) (sample, error) {
	busy, cpu, begun := systemCPU(), t.cpu(), time.Now()
	out, err := fio(ctx, c.dir, t.uri, append([]string{
		"--time_based", fmt.Sprintf("--runtime=%d", c.seconds), fmt.Sprintf("--size=%dm", c.sizeMiB), "--norandommap", "--randrepeat=0",
	}, j.Args...))
	if err != nil {
		return sample{}, err
	}
	took := time.Since(begun)
	cpu, busy = t.cpu()-cpu, systemCPU()-busy
	s := out.sample()
	s.Job, s.Target = j.Name, t.name
	s.Other = max(0, (busy-cpu-out.cpu).Seconds()/took.Seconds())
	if n := out.requests(); n > 0 {
		s.CPU = float64(cpu.Milliseconds()) / float64(n) * 1000
	}
	// What the job left in caches is written before the next target's turn.
	if _, err := fio(ctx, c.dir, t.uri, []string{"--rw=write", "--bs=4k", "--size=4k", "--fsync=1"}); err != nil {
		return s, fmt.Errorf("flush: %w", err)
	}
	return s, nil
}

// verify writes and reads back with checksums; any difference is an error.
func verify(ctx context.Context, c config, t *target) error {
	for _, rw := range []string{"randwrite", "write"} {
		if _, err := fio(ctx, c.dir, t.uri, []string{
			"--rw=" + rw, "--bs=4k", "--iodepth=32", fmt.Sprintf("--size=%dm", c.verify),
			"--verify=crc32c", "--verify_fatal=1", "--fsync=64",
		}); err != nil {
			return err
		}
	}
	return nil
}

const (
	// settledCores is the work of all targets together under which they are
	// idle: heartbeats and timers.
	settledCores = 0.1
	// settlePatience bounds the wait for it; a target that is never idle pays
	// for it in its own figures, and "other work" shows it in the others'.
	settlePatience = 15 * time.Second
	settleStep     = 250 * time.Millisecond
)

// settle waits until the targets have finished what they do in the background.
func settle(ctx context.Context, targets []*target) {
	sum := func() (d time.Duration) {
		for _, t := range targets {
			d += t.cpu()
		}
		return d
	}
	for end := time.Now().Add(settlePatience); time.Now().Before(end); {
		before, begun := sum(), time.Now()
		select {
		case <-time.After(settleStep):
		case <-ctx.Done():
			return
		}
		if (sum() - before).Seconds() < settledCores*time.Since(begun).Seconds() {
			return
		}
	}
}
