package main

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// tick is a jiffy of /proc; USER_HZ is 100 on every architecture Go runs on.
const tick = 10 * time.Millisecond

// procStat is what is used of /proc/PID/stat, proc(5).
type procStat struct {
	parent int
	cpu    time.Duration // user and system, of all threads
}

// parseStat reads a line of /proc/PID/stat. The command in it may contain
// spaces and parentheses; the fields start after the last one.
func parseStat(line []byte) (procStat, error) {
	i := bytes.LastIndexByte(line, ')')
	if i < 0 {
		return procStat{}, fmt.Errorf("stat line %q", line)
	}
	fields := strings.Fields(string(line[i+1:]))
	if len(fields) < 13 {
		return procStat{}, fmt.Errorf("stat line %q", line)
	}
	var n [3]int64
	for k, field := range []int{1, 11, 12} { // ppid, utime, stime
		v, err := strconv.ParseInt(fields[field], 10, 64)
		if err != nil {
			return procStat{}, fmt.Errorf("stat line %q: %w", line, err)
		}
		n[k] = v
	}
	return procStat{parent: int(n[0]), cpu: time.Duration(n[1]+n[2]) * tick}, nil
}

// tree returns the processes and all their descendants. A process that ended
// takes its time with it; servers do not end while they are measured.
func tree(roots []int) map[int]procStat {
	all := make(map[int]procStat)
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		line, err := os.ReadFile("/proc/" + e.Name() + "/stat")
		if err != nil {
			continue // gone meanwhile
		}
		if st, err := parseStat(line); err == nil {
			all[pid] = st
		}
	}
	found := make(map[int]procStat)
	for _, pid := range roots {
		if st, ok := all[pid]; ok {
			found[pid] = st
		}
	}
	for grown := true; grown; {
		grown = false
		for pid, st := range all {
			_, in := found[pid]
			_, parentIn := found[st.parent]
			if !in && parentIn {
				found[pid] = st
				grown = true
			}
		}
	}
	return found
}

// treeCPU is the time that the processes and their descendants have used.
func treeCPU(roots []int) (d time.Duration) {
	for _, st := range tree(roots) {
		d += st.cpu
	}
	return d
}

// treeRSS is the resident memory of the processes and their descendants in MiB.
func treeRSS(roots []int) (mib float64) {
	for pid := range tree(roots) {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(status)) {
			if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
				kib, err := strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 64)
				if err == nil {
					mib += kib / 1024
				}
			}
		}
	}
	return mib
}

// systemCPU is the time that all CPUs together have worked.
func systemCPU() time.Duration {
	stat, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	line, _, _ := bytes.Cut(stat, []byte("\n"))
	return parseSystemCPU(string(line))
}

// parseSystemCPU adds up the first line of /proc/stat but for idle, waiting for
// I/O, and what runs in guests, which is in user time already.
func parseSystemCPU(line string) time.Duration {
	var ticks int64
	for i, field := range strings.Fields(line) {
		switch i {
		case 1, 2, 3, 6, 7: // user, nice, system, irq, softirq
			n, err := strconv.ParseInt(field, 10, 64)
			if err != nil {
				return 0
			}
			ticks += n
		}
	}
	return time.Duration(ticks) * tick
}
