package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// fioSample is what fio 3.33 prints, cut down, with the warning it may begin with.
const fioSample = `fio: a warning {
` + "\n" + `{"fio version": "fio-3.33", "jobs": [{"jobname": "bench", "error": 0,
 "read": {"iops": 0.0, "bw_bytes": 0, "total_ios": 0, "clat_ns": {"percentile": {}}},
 "write": {"iops": 1200.5, "bw_bytes": 4917248, "total_ios": 6003, "clat_ns": {"percentile": {"50.000000": 20000, "99.000000": 90000}}},
 "sync": {"total_ios": 6002, "lat_ns": {"percentile": {"50.000000": 700000, "99.000000": 1500000}}}}]}`

func TestParseFIO(t *testing.T) {
	clean := fioSample[strings.Index(fioSample, `{"fio`):]
	out, err := parseFIO([]byte("fio: warning\n" + clean))
	if err != nil {
		t.Fatal(err)
	}
	if got := out.requests(); got != 6003 {
		t.Errorf("requests() = %d, want 6003", got)
	}
	want := sample{IOPS: 1200.5, MBps: 4.917248, P50: 720, P99: 1590}
	if got := out.sample(); got != want {
		t.Errorf("sample() = %+v, want %+v", got, want)
	}
	for _, bad := range []string{"", "no json", "{", `{"jobs": []}`, strings.Replace(clean, `"error": 0`, `"error": 84`, 1)} {
		if out, err := parseFIO([]byte(bad)); err == nil {
			t.Errorf("parseFIO(%.40q) = %+v, want an error", bad, out)
		}
	}
}

func TestParseStat(t *testing.T) {
	line := "123 (a) b (c)) S 77 123 123 0 -1 4194560 1 2 3 4 150 50 9 9 20 0 1 0 100 0 0"
	got, err := parseStat([]byte(line))
	if want := (procStat{parent: 77, cpu: 2 * time.Second}); err != nil || got != want {
		t.Errorf("parseStat() = %+v, %v, want %+v", got, err, want)
	}
	for _, bad := range []string{"", "1 (x", "1 (x) S 2 3", "1 (x) S p 2 3 4 5 6 7 8 9 10 11 12 13"} {
		if st, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("parseStat(%q) = %+v, want an error", bad, st)
		}
	}
}

func TestParseSystemCPU(t *testing.T) {
	if got, want := parseSystemCPU("cpu  100 20 30 4000 500 6 7 8 9 10"), 1630*time.Millisecond; got != want {
		t.Errorf("parseSystemCPU() = %v, want %v", got, want)
	}
}

// TestTree: a child of a child counts for its grandparent.
func TestTree(t *testing.T) {
	cmd := exec.Command("sh", "-c", "sleep 100 & echo; wait")
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var children []int
	defer func() {
		for _, pid := range children {
			if p, err := os.FindProcess(pid); err == nil {
				_ = p.Kill()
			}
		}
		_ = cmd.Wait()
	}()
	if _, err := stdout.Read(make([]byte, 1)); err != nil { // the shell has started it
		t.Fatal(err)
	}
	for pid := range tree([]int{cmd.Process.Pid}) {
		children = append(children, pid)
	}
	if len(children) != 2 {
		t.Errorf("tree() of a shell with one child = %v, want 2 processes", children)
	}
	if got := tree([]int{math.MaxInt32}); len(got) != 0 {
		t.Errorf("tree() of a process that is not there = %v", got)
	}
	if treeRSS([]int{os.Getpid()}) <= 0 || systemCPU() <= 0 {
		t.Errorf("memory or CPU time is not positive")
	}
}

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		in   []float64
		want float64
	}{{nil, 0}, {[]float64{3}, 3}, {[]float64{9, 1}, 5}, {[]float64{9, 1, 2}, 2}} {
		if got := medianOf(c.in); got != c.want {
			t.Errorf("medianOf(%v) = %v, want %v", c.in, got, c.want)
		}
	}
	r := &results{}
	for i, other := range []float64{0, 0.1, 3, 0.2} {
		r.Samples = append(r.Samples, sample{Job: "j", Target: "t", IOPS: float64(i), Other: other}, sample{Job: "j", Target: "u", IOPS: 100, Other: 1})
	}
	if f := r.median("j", "t"); f.IOPS != 1 || f.Rounds != 3 || f.Noisy {
		t.Errorf("median with a noisy round = %+v, want the 3 quiet ones, 1", f)
	}
	if f := r.median("j", "u"); f.IOPS != 100 || f.Rounds != 4 || !f.Noisy {
		t.Errorf("median without a quiet round = %+v, want all 4, marked", f)
	}
}

func TestURIOf(t *testing.T) {
	out := "volume: bench\nnode:   n1\nepoch:  1\nuri:    nbd+unix:///bench?socket=/d/nbd.sock\n"
	if got, want := uriOf(out), "nbd+unix:///bench?socket=/d/nbd.sock"; got != want {
		t.Errorf("uriOf() = %q, want %q", got, want)
	}
	if got := uriOf("device: none\n"); got != "" {
		t.Errorf("uriOf() without one = %q", got)
	}
}

func TestFlags(t *testing.T) {
	c, err := parseFlags([]string{"-quick", "-targets", "nbdkit-S", "-serve-flags", "--ballast 16M"}, &bytes.Buffer{})
	if err != nil || c.rounds != 1 || len(c.targets) != 1 || fmt.Sprint(c.extra) != "[--ballast 16M]" {
		t.Errorf("parseFlags() = %+v, %v", c, err)
	}
	for _, bad := range [][]string{{"-targets", "ceph"}, {"-size", "1"}, {"-rounds", "0"}, {"-verify", "2000"}, {"more"}, {"-nonsense"}} {
		if c, err := parseFlags(bad, &bytes.Buffer{}); err == nil {
			t.Errorf("parseFlags(%v) = %+v, want an error", bad, c)
		}
	}
}

// standIn is a holdfast that does what cli.md says of the verbs used here, with
// nbdkit as its daemon. It notes how it was called.
const standIn = `#!/bin/sh
cd "$(dirname "$0")"
echo "$HOLDFAST_ADDRESS: $*" >> calls
case "$1 $2" in
"serve --name") [ "$3" = n1 ] && exec nbdkit -f -U "$PWD/s" memory 64M; exec sleep 1000;;
"status "*) [ "$HOLDFAST_ADDRESS" != "" ] && { [ -S s ] || sleep 0.1; [ -S s ]; };;
"volume create") exit 0;;
"volume attach") echo "volume: bench"; echo "uri: nbd+unix:///?socket=$PWD/s";;
*) exit 2;;
esac
`

// TestRun measures nbdkit through a stand-in for the binary, from start to
// table.
func TestRun(t *testing.T) {
	for _, p := range []string{"fio", "nbdkit"} {
		if _, err := exec.LookPath(p); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatalf("%s is not installed", p)
			}
			t.Skipf("%s is not installed", p)
		}
	}
	dir := t.TempDir()
	binary := filepath.Join(dir, "holdfast")
	if err := os.WriteFile(binary, []byte(standIn), 0o755); err != nil {
		t.Fatal(err)
	}
	var stdout, stderr bytes.Buffer
	err := run(context.Background(), []string{"-holdfast", binary, "-dir", dir, "-targets", "nbdkit-S,holdfast-3", "-size", "64", "-verify", "1",
		"-seconds", "1", "-rounds", "1", "-json", filepath.Join(dir, "out.json")}, &stdout, &stderr)
	if err != nil {
		t.Fatalf("%v\n%s", err, stderr.Bytes())
	}
	text, err := os.ReadFile(filepath.Join(dir, "out.json"))
	if err != nil {
		t.Fatal(err)
	}
	var r results
	if err := json.Unmarshal(text, &r); err != nil {
		t.Fatal(err)
	}
	if want := 2 * len(jobs()); len(r.Samples) != want {
		t.Errorf("%d samples, want %d", len(r.Samples), want)
	}
	for _, s := range r.Samples {
		if s.IOPS <= 0 || s.MBps <= 0 || s.P99 < s.P50 || s.P50 <= 0 {
			t.Errorf("sample %+v", s)
		}
	}
	for _, want := range []string{"holdfast-3", "nbdkit-S", "write+flush 4K QD1", "MiB resident"} {
		if !strings.Contains(stdout.String(), want) {
			t.Errorf("the table does not say %q:\n%s", want, stdout.String())
		}
	}
	calls, err := os.ReadFile(filepath.Join(dir, "calls"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"--bootstrap", "serve --name n3", "--join 127.0.0.1:", "volume create bench --size 64M --replicas 3", "volume attach bench --nbd"} {
		if !strings.Contains(string(calls), want) {
			t.Errorf("holdfast was not called with %q:\n%s", want, calls)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "hfbench*")); len(left) != 0 {
		t.Errorf("%v is left", left)
	}
}

// TestRunFails: what cannot be measured is an error, and leaves nothing.
func TestRunFails(t *testing.T) {
	dir := t.TempDir()
	var out bytes.Buffer
	err := run(context.Background(), []string{"-holdfast", filepath.Join(dir, "none"), "-dir", dir, "-targets", "holdfast-1"}, &out, &out)
	if err == nil {
		t.Errorf("measuring a binary that is not there succeeded")
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("%v is left", left)
	}
}
