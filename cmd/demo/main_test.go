package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestJudgeEngine(t *testing.T) {
	good := engineInfo{OSType: "linux", KernelVersion: "6.1", SecurityOptions: []string{"name=seccomp,profile=default"}}
	if got := judgeEngine(good, "6.1"); len(got) != 0 {
		t.Errorf("a good engine: got %v", got)
	}
	for what, change := range map[string]func(*engineInfo){
		"windows":         func(i *engineInfo) { i.OSType = "windows" },
		"another machine": func(i *engineInfo) { i.KernelVersion = "5.15-linuxkit" },
		"rootless":        func(i *engineInfo) { i.SecurityOptions = append(i.SecurityOptions, "name=rootless") },
	} {
		bad := good
		change(&bad)
		got := judgeEngine(bad, "6.1")
		if len(got) != 1 || got[0].remedy == "" || !strings.Contains(got[0].what, what) {
			t.Errorf("%s: got %+v, want one lack that says so, with a remedy", what, got)
		}
	}
}

func TestGoIsNew(t *testing.T) {
	for version, want := range map[string]bool{
		"go1.26.0": true, "go1.26": true, "go1.27rc1": true, "go1.100.2": true, "devel go1.27-0123abc": true,
		"go1.25.9": false, "go1.3": false, "": false, "go2": false, "go1.": false, "go1.x": false,
	} {
		if got := goIsNew(version); got != want {
			t.Errorf("goIsNew(%q): got %v, want %v", version, got, want)
		}
	}
}

func TestAvailableMemory(t *testing.T) {
	got, err := availableMemory("MemTotal:  100 kB\nMemAvailable:   2048 kB\nBuffers: 1 kB\n")
	if err != nil || got != 2<<20 {
		t.Errorf("availableMemory: got %d %v, want %d", got, err, 2<<20)
	}
	for _, text := range []string{"", "MemTotal: 1 kB\n", "MemAvailable: many kB\n"} {
		if got, err := availableMemory(text); err == nil {
			t.Errorf("availableMemory(%q): got %d, want an error", text, got)
		}
	}
}

func TestUsage(t *testing.T) {
	t.Setenv("BREAK", "")
	for _, args := range [][]string{{"-nonsense"}, {"more"}, {"-break", "everything"}} {
		if got := command(t.Context(), args); got != exitUsage {
			t.Errorf("demo %q: got exit code %d, want %d", args, got, exitUsage)
		}
	}
}

func TestReport(t *testing.T) {
	whole := &form{Form: "container", HostKilled: "h1", HostAfter: "h2", RowsAcked: 1200, RowsFound: 1200, RowsLost: []int{}, SecondsToFirstWrite: 3.5, complete: true}
	short := &form{Form: "swarm", HostKilled: "h2", HostAfter: "h3", RowsAcked: 1100, RowsFound: 1098, RowsLost: []int{7, 9}, complete: true}
	for _, c := range []struct {
		report report
		says   []string
	}{
		{report{Result: resultOK, Forms: []*form{whole}}, []string{"1200", "3.5 s", "h1 died, h2 went on", "Every acknowledged row was there"}},
		{report{Result: resultLost, Forms: []*form{whole, short}}, []string{"1098", "ACKNOWLEDGED ROWS WERE LOST"}},
		{report{Result: resultLost, Break: "lose-acked", Forms: []*form{short}}, []string{"LOST", "As it should be"}},
		{report{Result: resultMissed, Error: "the demo did not notice", Break: "lose-acked", Forms: []*form{whole}}, []string{"FAILED", "did not notice"}},
		{report{Result: resultFailed, Error: "no engine", Forms: []*form{{Form: "swarm"}}}, []string{"swarm", "did not end", "no engine"}},
	} {
		var out bytes.Buffer
		c.report.summary(&out)
		for _, want := range c.says {
			if !strings.Contains(out.String(), want) {
				t.Errorf("summary of %+v: got\n%s\nwant %q in it", c.report, out.String(), want)
			}
		}
	}

	path := filepath.Join(t.TempDir(), "demo.json")
	r := report{Result: resultLost, Started: time.Unix(0, 0).UTC(), Forms: []*form{short}}
	if err := r.write(path); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var back map[string]any
	if err := json.Unmarshal(text, &back); err != nil {
		t.Fatal(err)
	}
	f := back["forms"].([]any)[0].(map[string]any)
	if back["result"] != "lost" || f["rows_acked"] != 1100.0 || f["rows_found"] != 1098.0 || len(f["rows_lost"].([]any)) != 2 || f["form"] != "swarm" {
		t.Errorf("demo.json: got %s", text)
	}
}

// A build that loses rows must be found out: anything else is a failure of the demo.
func TestJudge(t *testing.T) {
	for _, c := range []struct {
		breakage string
		err      error
		result   string
		code     int
	}{
		{"", nil, resultOK, exitOK},
		{"", fmt.Errorf("%w: 3 of 5", errLost), resultLost, exitLost},
		{"", errors.New("no engine"), resultFailed, exitFailed},
		{"lose-acked", nil, resultMissed, exitFailed},
		{"lose-acked", errors.Join(errLost, errors.New("left behind")), resultLost, exitLost},
		{"lose-acked", errors.New("no engine"), resultFailed, exitFailed},
	} {
		r := report{Break: c.breakage}
		if code := r.judge(c.err); code != c.code || r.Result != c.result || (c.code == exitOK) != (r.Error == "") {
			t.Errorf("break %q, error %v: exit %d, %q, error %q; want %d, %q", c.breakage, c.err, code, r.Result, r.Error, c.code, c.result)
		}
	}
}

func TestStory(t *testing.T) {
	var out bytes.Buffer
	s := newStory(&out)
	s.chapter("Title")
	s.command("h1", "docker", "run", "--save", "")
	s.line("%d rows", 3)
	for _, want := range []string{"Title\n          -----\n", "h1$ docker run --save ''\n", "s  3 rows\n"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("story: got %q, want %q in it", out.String(), want)
		}
	}
}
