package main

import (
	"fmt"
	"os"
)

// fullLogs is of how many violations the whole history is printed: one fault
// breaks many blocks at once.
const fullLogs = 2

// print writes what the run came to, and reports whether a promise was broken.
func (r *chaos) print(failure error) bool {
	h := &r.load.rec.history
	violations := append(r.violations, r.report.Violations...)
	for i, v := range violations {
		fmt.Fprintf(r.out, "VIOLATION %v\n", v)
		if i < fullLogs {
			fmt.Fprint(r.out, v.Log)
		}
	}
	for _, b := range r.report.Undecided {
		fmt.Fprintf(r.out, "undecided within %v: block %d\n", judgeLimit, b)
	}
	fmt.Fprintln(r.out, "faults (made, felt, longest time without any answer):")
	made, felt := 0, 0
	for _, t := range r.tally {
		fmt.Fprintf(r.out, "  %3d %3d %5.1f s  %s\n", t.made, t.felt, t.pause.Seconds(), t.name)
		made, felt = made+t.made, felt+t.felt
	}
	fmt.Fprintf(r.out, "  %3d %3d  in all\n", made, felt)
	c := r.load.rec.counts
	fmt.Fprintf(r.out, "requests: %d reads, %d writes, %d flushes answered; %d unanswered, %d answered with an error\n", c.Reads, c.Writes, c.Flushes, c.Unanswered, c.Errors)
	takeovers, lossy := 0, 0
	for i, s := range h.Sessions {
		if i > 0 && s.Node != h.Sessions[i-1].Node {
			takeovers++
		}
		if s.Lossy {
			lossy++
		}
	}
	_, evictions, rejoins := r.watch.view()
	fmt.Fprintf(r.out, "sessions: %d, %d of them on another node than the one before, %d lossy (they were seen to take %d acknowledged, unflushed writes); replicas evicted %d times, in sync again %d times\n", len(h.Sessions), takeovers, lossy, r.report.Reverted, evictions, rejoins)
	fmt.Fprintf(r.out, "judged: %d block histories, %d sound, %d undecided; %d replicas compared, %d the same\n", r.report.Blocks, r.report.Sound, len(r.report.Undecided), r.copies, r.compared)
	only := ""
	if r.o.only != nil {
		only = fmt.Sprintf(" -only '%v'", r.o.only)
	}
	if !r.o.power {
		only += " -power=false"
	}
	failed := len(violations) + len(r.report.Undecided)
	if failure != nil {
		failed++
		fmt.Fprintf(r.out, "chaos: the run failed: %v\n", failure)
	}
	if failed > 0 || r.o.keep {
		fmt.Fprintf(r.out, "logs and disks are in %s; the same schedule again: go run ./cmd/chaos -nodes %d -minutes %v -seed %d%s\n", r.dir, r.o.nodes, r.o.minutes, r.o.seed, only)
	} else if err := os.RemoveAll(r.dir); err != nil {
		fmt.Fprintf(r.out, "chaos: %v\n", err)
	}
	fmt.Fprintf(r.out, "chaos: %d passed, %d failed\n", r.report.Sound+r.compared, failed)
	return len(violations) > 0
}
