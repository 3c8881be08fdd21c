package main

import (
	"fmt"
	"io"
	"sort"

	"github.com/jedib0t/go-pretty/v6/table"
)

// quietCores is how much other work a round may have seen to count; above it
// the figures say more of the machine than of the target.
const quietCores = 0.2

// figure is the median of a job on a target.
type figure struct {
	IOPS, MBps, P50, P99, CPU float64
	Rounds                    int  // that counted
	Noisy                     bool // none was quiet, so all count
}

// median takes quiet rounds only, if there are any.
func (r *results) median(job, target string) figure {
	var quiet, all []sample
	for _, s := range r.Samples {
		if s.Job != job || s.Target != target {
			continue
		}
		all = append(all, s)
		if s.Other <= quietCores {
			quiet = append(quiet, s)
		}
	}
	f := figure{Noisy: len(quiet) == 0}
	if f.Noisy {
		quiet = all
	}
	f.Rounds = len(quiet)
	of := func(value func(sample) float64) float64 {
		values := make([]float64, len(quiet))
		for i, s := range quiet {
			values[i] = value(s)
		}
		return medianOf(values)
	}
	f.IOPS = of(func(s sample) float64 { return s.IOPS })
	f.MBps = of(func(s sample) float64 { return s.MBps })
	f.P50 = of(func(s sample) float64 { return s.P50 })
	f.P99 = of(func(s sample) float64 { return s.P99 })
	f.CPU = of(func(s sample) float64 { return s.CPU })
	return f
}

func medianOf(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	sort.Float64s(v)
	if n := len(v); n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[len(v)/2]
}

// ratio is a figure beside a baseline's, or "-" where there is none.
func ratio(a, b float64) string {
	if a == 0 || b == 0 {
		return "-"
	}
	return fmt.Sprintf("%.2f", a/b)
}

// print writes the table: for each job and target the median, and its ratio to
// each of nbdkit's.
func (r *results) print(w io.Writer) error {
	t := table.NewWriter()
	t.AppendHeader(table.Row{"job", "target", "requests/s", "MB/s", "p50 us", "p99 us", "CPU ms/1000", "of nbdkit S", "of nbdkit L", "p99 of S"})
	noisy := false
	for _, j := range jobs() {
		s, l := r.median(j.Name, "nbdkit-S"), r.median(j.Name, "nbdkit-L")
		for _, target := range r.Targets {
			f := r.median(j.Name, target)
			mark := ""
			if f.Noisy {
				noisy, mark = true, " *"
			}
			t.AppendRow(table.Row{j.Name, target + mark, fmt.Sprintf("%.0f", f.IOPS), fmt.Sprintf("%.0f", f.MBps), fmt.Sprintf("%.0f", f.P50),
				fmt.Sprintf("%.0f", f.P99), fmt.Sprintf("%.1f", f.CPU), ratio(f.IOPS, s.IOPS), ratio(f.IOPS, l.IOPS), ratio(f.P99, s.P99)})
		}
		t.AppendSeparator()
	}
	if _, err := fmt.Fprintf(w, "%d rounds of %d s on %d MiB, %d CPUs, Linux %s; medians\n%s\n", r.Rounds, r.Seconds, r.SizeMiB, r.CPUs, r.Kernel, t.Render()); err != nil {
		return err
	}
	for _, target := range r.Targets {
		if _, err := fmt.Fprintf(w, "%s: at most %.0f MiB resident\n", target, r.RSS[target]); err != nil {
			return err
		}
	}
	if noisy {
		if _, err := fmt.Fprintf(w, "* no quiet round: in each, other work took more than %.1f cores (the kernel's writing counts)\n", quietCores); err != nil {
			return err
		}
	}
	_, err := fmt.Fprintln(w, "An answered write: nbdkit in one host's page cache; holdfast in the memory of every in-sync node. A flush: both durable.")
	return err
}
