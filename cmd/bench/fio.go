package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"time"
)

// fioOutput is what is used of fio's JSON.
type fioOutput struct {
	Jobs []fioJob `json:"jobs"`
	cpu  time.Duration
}

type fioJob struct {
	Error int     `json:"error"`
	Read  fioSide `json:"read"`
	Write fioSide `json:"write"`
	Sync  struct {
		Lat fioLatency `json:"lat_ns"`
	} `json:"sync"`
}

type fioSide struct {
	IOPS     float64    `json:"iops"`
	Bytes    float64    `json:"bw_bytes"`
	Requests int64      `json:"total_ios"`
	Lat      fioLatency `json:"clat_ns"`
}

type fioLatency struct {
	Percentile map[string]float64 `json:"percentile"`
}

// fioTimeout bounds a run beyond what its arguments say; fio itself has no
// limit when a server stops answering.
const fioTimeout = 10 * time.Minute

// fio runs one job against a URI.
func fio(ctx context.Context, dir, uri string, args []string) (*fioOutput, error) {
	return runFIO(ctx, dir, append([]string{"--ioengine=nbd", "--uri=" + uri}, args...))
}

// runFIO runs one job.
func runFIO(ctx context.Context, dir string, args []string) (*fioOutput, error) {
	ctx, cancel := context.WithTimeout(ctx, fioTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "fio", append([]string{"--name=bench", "--thread=1", "--output-format=json"}, args...)...) //nolint:gosec // the operator's own arguments, no shell
	cmd.Dir = dir                                                                                                              // fio leaves state files of verification
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	out, parseErr := parseFIO(stdout.Bytes())
	switch {
	case err != nil:
		return nil, fmt.Errorf("fio %v: %w: %s%s", args, err, tail(stderr.Bytes()), tail(stdout.Bytes()))
	case parseErr != nil:
		return nil, fmt.Errorf("fio %v: %w: %s", args, parseErr, tail(stderr.Bytes()))
	}
	out.cpu = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	return out, nil
}

// parseFIO reads fio's JSON, before which fio may print warnings.
func parseFIO(b []byte) (*fioOutput, error) {
	start := bytes.IndexByte(b, '{')
	if start < 0 {
		return nil, fmt.Errorf("no JSON in %q", tail(b))
	}
	var out fioOutput
	if err := json.NewDecoder(bytes.NewReader(b[start:])).Decode(&out); err != nil {
		return nil, err
	}
	if len(out.Jobs) != 1 {
		return nil, fmt.Errorf("%d jobs, want 1", len(out.Jobs))
	}
	if e := out.Jobs[0].Error; e != 0 {
		return nil, fmt.Errorf("the job ended with error %d", e)
	}
	return &out, nil
}

// requests counts reads and writes.
func (o *fioOutput) requests() int64 { return o.Jobs[0].Read.Requests + o.Jobs[0].Write.Requests }

// sample adds up reads and writes; of the latencies the worse side counts.
func (o *fioOutput) sample() sample {
	j := o.Jobs[0]
	us := func(p string) float64 {
		return (max(j.Read.Lat.Percentile[p], j.Write.Lat.Percentile[p]) + j.Sync.Lat.Percentile[p]) / 1000
	}
	return sample{
		IOPS: j.Read.IOPS + j.Write.IOPS,
		MBps: (j.Read.Bytes + j.Write.Bytes) / 1e6,
		P50:  us("50.000000"),
		P99:  us("99.000000"),
	}
}

// tail is the end of a program's output, enough to see what it was about.
func tail(b []byte) []byte {
	const most = 2000
	b = trimSpace(b)
	if len(b) > most {
		b = b[len(b)-most:]
	}
	return b
}

func trimSpace(b []byte) []byte { return bytes.TrimSpace(b) }
