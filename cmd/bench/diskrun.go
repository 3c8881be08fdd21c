package main

import (
	"context"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"

	"github.com/holdfast-storage/holdfast/blockdev/disk"
)

// A diskJob is what fio does to a file, and the same done to a disk of holdfast whose
// image is beside it.
type diskJob struct {
	name  string
	goal  float64 // of the file's requests per second
	raw   []string
	ready []string                                     // fio's arguments of a run before, not counted; nil: none
	disk  func(*diskRun, context.Context) (did, error) // on d.s
}

// did is what a job did to a disk.
type did struct {
	written
	bytes int64 // of a request
}

// diskJobs go from an empty disk to one whose log has gone round many times.
func diskJobs() []diskJob {
	sequential := []string{"--rw=write", "--bs=1m", "--direct=1", "--ioengine=libaio", "--iodepth=8", "--end_fsync=1"}
	cached := []string{"--rw=randread", "--bs=4k", "--direct=0", "--invalidate=0", "--ioengine=psync", "--numjobs=32", "--group_reporting"}
	return []diskJob{
		{"sequential write 1M QD8, new", 0.8, sequential, nil, (*diskRun).sequential},
		{"sequential write 1M QD8, again", 0.8, sequential, nil, (*diskRun).sequential},
		{"write+flush 4K QD1", 0.6, []string{"--rw=randwrite", "--bs=4k", "--direct=1", "--ioengine=psync", "--fdatasync=1"}, nil, (*diskRun).commits},
		{"random read 4K QD32, cold", 0.5, []string{"--rw=randread", "--bs=4k", "--direct=1", "--ioengine=libaio", "--iodepth=32"}, nil, (*diskRun).coldReads},
		{
			"random read 4K QD32, cached, small folios", 0.7, cached,
			[]string{"--rw=read", "--bs=64k", "--direct=0", "--invalidate=1", "--fadvise_hint=random", "--ioengine=psync"}, (*diskRun).cachedReads,
		},
		{
			"random read 4K QD32, cached, large folios", 0.7, cached,
			[]string{"--rw=read", "--bs=1m", "--direct=0", "--invalidate=1", "--fadvise_hint=sequential", "--ioengine=psync"}, (*diskRun).cachedReads,
		},
		{"random write 4K QD32, log gone round", 0.3, []string{"--rw=randwrite", "--bs=4k", "--direct=1", "--ioengine=libaio", "--iodepth=32"}, nil, (*diskRun).steady},
	}
}

// diskSample is one job on one of both in one round. Latencies are in microseconds.
type diskSample struct {
	Job    string  `json:"job"`
	Target string  `json:"target"` // file or disk
	Round  int     `json:"round"`
	IOPS   float64 `json:"iops"`
	MBps   float64 `json:"mbps"` // 10^6 bytes per second
	P50    float64 `json:"p50_us"`
	P99    float64 `json:"p99_us"`
	Max    float64 `json:"max_us,omitempty"`
	// Least is the requests of the worst whole second, of the median second; 0 if the
	// job took less than three.
	Least float64 `json:"least_second,omitempty"`
}

// diskResults are all samples and the circumstances.
type diskResults struct {
	Begun   time.Time    `json:"begun"`
	CPUs    int          `json:"cpus"`
	Kernel  string       `json:"kernel"`
	SizeMiB int          `json:"size_mib"`
	LogMiB  int64        `json:"log_mib"`
	Seconds int          `json:"seconds"`
	Rounds  int          `json:"rounds"`
	Samples []diskSample `json:"samples"`
}

// diskRun is one round's disk.
type diskRun struct {
	c config
	s *subject
}

func (d *diskRun) time() time.Duration { return time.Duration(d.c.seconds) * time.Second }

func (d *diskRun) sequential(ctx context.Context) (did, error) {
	const bytes = 1 << 20
	at := int64(0)
	w, err := d.s.write(ctx, bytes, 8, forever, d.s.size/bytes, func() int64 { at += bytes; return at - bytes })
	return did{w, bytes}, err
}

func (d *diskRun) commits(ctx context.Context) (did, error) {
	w, err := d.s.commits(ctx, d.time())
	return did{w, 4096}, err
}

func (d *diskRun) coldReads(ctx context.Context) (did, error) {
	if err := d.s.d.Checkpoint(ctx); err != nil {
		return did{}, err
	}
	if err := dropFile(d.s.image); err != nil {
		return did{}, err
	}
	w, err := d.s.read(ctx, 32, d.time(), d.s.everyBlock()) // none of them cached by the read of it before
	return did{w, 4096}, err
}

func (d *diskRun) cachedReads(ctx context.Context) (did, error) {
	if err := d.s.warm(); err != nil {
		return did{}, err
	}
	w, err := d.s.read(ctx, 32, d.time(), func() (int64, bool) { return d.s.randomBlock(), true })
	return did{w, 4096}, err
}

// steady fills the log, then goes through it ten times more.
func (d *diskRun) steady(ctx context.Context) (did, error) {
	const bytes = 4096
	if _, err := d.s.write(ctx, bytes, 32, forever, d.s.wal/bytes, d.s.randomBlock); err != nil {
		return did{}, err
	}
	w, err := d.s.write(ctx, bytes, 32, forever, 10*d.s.wal/bytes, d.s.randomBlock)
	return did{w, bytes}, err
}

const forever = time.Duration(math.MaxInt64)

// measureDisk runs the rounds, of each job first the file's turn, then the disk's.
func measureDisk(ctx context.Context, c config, progress io.Writer) (*diskResults, error) {
	if os.Getenv("GOMAXPROCS") == "" { // as holdfast serve does
		runtime.GOMAXPROCS(disk.Processors(runtime.GOMAXPROCS(0)))
	}
	release, _ := os.ReadFile("/proc/sys/kernel/osrelease") //nolint:errcheck // only shown
	r := &diskResults{
		Begun: time.Now().UTC(), CPUs: runtime.NumCPU(), Kernel: string(trimSpace(release)),
		SizeMiB: c.sizeMiB, Seconds: c.seconds, Rounds: c.rounds,
	}
	for round := 1; round <= c.rounds; round++ {
		dir := filepath.Join(c.dir, fmt.Sprint(round))
		if err := os.Mkdir(dir, 0o700); err != nil {
			return nil, err
		}
		if err := r.round(ctx, c, round, dir, progress); err != nil {
			return nil, fmt.Errorf("round %d: %w", round, err)
		}
		if err := os.RemoveAll(dir); err != nil && !c.keep {
			return nil, err
		}
	}
	return r, nil
}

func (r *diskResults) round(ctx context.Context, c config, round int, dir string, progress io.Writer) (err error) {
	s, err := openSubject(ctx, dir, int64(c.sizeMiB)<<20)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := s.close(); err == nil {
			err = cerr
		}
	}()
	r.LogMiB = s.wal >> 20
	d := &diskRun{c: c, s: s}
	for _, j := range diskJobs() {
		file, err := rawJob(ctx, c, dir, j)
		if err != nil {
			return fmt.Errorf("%s: %w", j.name, err)
		}
		done, err := j.disk(d, ctx)
		if err != nil {
			return fmt.Errorf("%s: %w", j.name, err)
		}
		mine := done.sample()
		file.Job, file.Target, file.Round = j.name, "file", round
		mine.Job, mine.Target, mine.Round = j.name, "disk", round
		r.Samples = append(r.Samples, file, mine)
		fmt.Fprintf(progress, "round %d, %s: file %.0f/s, disk %.0f/s (%.2f), its p99 %.0f us, at most %.0f us\n",
			round, j.name, file.IOPS, mine.IOPS, mine.IOPS/file.IOPS, mine.P99, mine.Max)
		// What a job leaves to be done is not the next one's.
		if err := s.d.Checkpoint(ctx); err != nil {
			return err
		}
	}
	return nil
}

// rawJob is a job on a file beside the disk's image.
func rawJob(ctx context.Context, c config, dir string, j diskJob) (diskSample, error) {
	common := []string{"--filename=" + filepath.Join(dir, "file"), fmt.Sprintf("--size=%dm", c.sizeMiB), "--norandommap", "--randrepeat=0"}
	if j.ready != nil {
		if _, err := runFIO(ctx, dir, append(slices.Clone(common), j.ready...)); err != nil {
			return diskSample{}, err
		}
	}
	if !slices.Contains(j.raw, "--rw=write") {
		common = append(common, "--time_based", fmt.Sprintf("--runtime=%d", c.seconds))
	}
	out, err := runFIO(ctx, dir, append(common, j.raw...))
	if err != nil {
		return diskSample{}, err
	}
	s := out.sample()
	return diskSample{IOPS: s.IOPS, MBps: s.MBps, P50: s.P50, P99: s.P99}, nil
}

// sample is what was done as fio would tell it.
func (d *did) sample() diskSample {
	slices.Sort(d.latency)
	at := func(p float64) float64 {
		if len(d.latency) == 0 {
			return 0
		}
		return float64(d.latency[min(len(d.latency)-1, int(float64(len(d.latency))*p))].Nanoseconds()) / 1000
	}
	s := diskSample{P50: at(0.5), P99: at(0.99), Max: at(1)}
	s.IOPS = float64(d.requests) / d.took.Seconds()
	s.MBps = s.IOPS * float64(d.bytes) / 1e6
	if n := len(d.seconds) - 1; n >= 3 { // the last one is not whole
		whole := make([]float64, n)
		for i := range whole {
			whole[i] = float64(d.seconds[i])
		}
		least := slices.Min(whole)
		s.Least = least / medianOf(whole)
	}
	return s
}

// print writes the table: medians, and the ratio of a disk's to the file's.
func (r *diskResults) print(w io.Writer) error {
	t := table.NewWriter()
	t.AppendHeader(table.Row{"job", "file /s", "disk /s", "disk MB/s", "ratio", "goal", "p50 us", "p99 us", "most us", "worst second"})
	for _, j := range diskJobs() {
		of := func(target string, value func(diskSample) float64) []float64 {
			var v []float64
			for _, s := range r.Samples {
				if s.Job == j.name && s.Target == target {
					v = append(v, value(s))
				}
			}
			return v
		}
		iops := func(s diskSample) float64 { return s.IOPS }
		file, mine := medianOf(of("file", iops)), medianOf(of("disk", iops))
		// Of what must never be, the worst of all rounds.
		most := slices.Max(of("disk", func(s diskSample) float64 { return s.Max }))
		worst := "-"
		if least := slices.Min(of("disk", func(s diskSample) float64 { return s.Least })); least > 0 {
			worst = fmt.Sprintf("%.2f", least)
		}
		t.AppendRow(table.Row{
			j.name, fmt.Sprintf("%.0f", file), fmt.Sprintf("%.0f", mine),
			fmt.Sprintf("%.0f", medianOf(of("disk", func(s diskSample) float64 { return s.MBps }))), ratio(mine, file), fmt.Sprintf("%.1f", j.goal),
			fmt.Sprintf("%.0f", medianOf(of("disk", func(s diskSample) float64 { return s.P50 }))),
			fmt.Sprintf("%.0f", medianOf(of("disk", func(s diskSample) float64 { return s.P99 }))), fmt.Sprintf("%.0f", most), worst,
		})
	}
	_, err := fmt.Fprintf(w, "%d rounds of %d s on %d MiB, log of %d MiB, %d CPUs, Linux %s; medians, but the worst of all rounds in the last two columns\n%s\n%s\n",
		r.Rounds, r.Seconds, r.SizeMiB, r.LogMiB, r.CPUs, r.Kernel, t.Render(), strings.Join([]string{
			"file: fio on a file of the same file system, written and read past the page cache, cached reads apart.",
			"disk: one replica of a holdfast disk in this process, every block's checksum compared; worst second: of the median second's requests.",
		}, "\n"))
	return err
}
