package replica

import (
	"bufio"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast"
)

var rewrite = flag.Bool("rewrite", false, "write what the core does into testdata instead of comparing")

// TestHistories runs the histories of testdata: lines of prose begin with #,
// commands are events, and lines that begin with > are the actions that the
// core must return, all of them and in that order.
func TestHistories(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no histories: %v", err)
	}
	for _, f := range files {
		t.Run(strings.TrimSuffix(filepath.Base(f), ".txt"), func(t *testing.T) { runHistory(t, f) })
	}
}

func runHistory(t *testing.T, path string) {
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	h := &history{t: t}
	var out strings.Builder
	var want, got []string
	at := "the start"
	check := func() {
		if !*rewrite && strings.Join(want, "\n") != strings.Join(got, "\n") {
			t.Fatalf("%s: after %s\ngot:\n%s\nwant:\n%s", path, at, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
		for _, g := range got {
			fmt.Fprintf(&out, "> %s\n", g)
		}
		want, got = nil, nil
	}
	lines := bufio.NewScanner(strings.NewReader(string(raw)))
	for n := 1; lines.Scan(); n++ {
		line := lines.Text()
		if strings.HasPrefix(line, ">") {
			want = append(want, strings.TrimSpace(line[1:]))
			continue
		}
		check()
		fmt.Fprintln(&out, line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		at = fmt.Sprintf("line %d: %s", n, line)
		h.line = at
		got = h.do(line)
	}
	check()
	if *rewrite {
		if err := os.WriteFile(path, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// history drives one core by words.
type history struct {
	t    *testing.T
	c    *Core
	now  time.Duration
	line string
}

func (h *history) num(s string) int64 {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		h.t.Fatalf("%s: %v", h.line, err)
	}
	return n
}

// do runs a command and returns the actions in words. Of two plain numbers the
// first is the connection, the second the epoch of the message.
func (h *history) do(line string) []string {
	words := strings.Fields(line)
	pos, kv := []string{}, map[string]string{}
	for _, w := range words[1:] {
		if k, v, ok := strings.Cut(w, "="); ok {
			kv[k] = v
		} else {
			pos = append(pos, w)
		}
	}
	key := func(k string) int64 {
		if kv[k] == "" {
			return 0
		}
		return h.num(kv[k])
	}
	n := func(i int) int64 {
		if i >= len(pos) {
			return 0
		}
		v, err := strconv.ParseInt(pos[i], 10, 64)
		if err != nil {
			return 0
		}
		return v
	}
	var err error
	switch {
	case strings.Contains(line, " io"):
		err = holdfast.Errorf(holdfast.ErrIO, "medium error")
	case strings.Contains(line, " integrity"):
		err = holdfast.Errorf(holdfast.ErrIntegrity, "checksum")
	case strings.Contains(line, " refused"):
		err = holdfast.Errorf(holdfast.ErrRefused, "below the checkpoint")
	}
	conn, epoch := Conn(n(0)), holdfast.Epoch(n(1))
	var ev Event
	switch words[0] {
	case "new":
		h.now = 0
		st := Status{
			Fence: holdfast.Epoch(key("fence")), Tail: holdfast.Seq(key("tail")), Dur: holdfast.Seq(key("tail")), Commit: holdfast.Seq(key("commit")),
			Applied: holdfast.Seq(key("applied")), Checkpoint: holdfast.Seq(key("checkpoint")), Held: holdfast.Seq(key("held")),
			Intact: strings.Contains(line, " intact"), Syncing: strings.Contains(line, " syncing"), Damaged: strings.Contains(line, " damaged"),
		}
		for _, x := range strings.Split(kv["epochs"], ",") {
			if e, s, ok := strings.Cut(x, ":"); ok {
				st.EpochStarts = append(st.EpochStarts, EpochStart{holdfast.Epoch(h.num(e)), holdfast.Seq(h.num(s))})
				st.TailEpoch = holdfast.Epoch(h.num(e))
			}
		}
		h.c = New(Options{Status: st})
		if !strings.Contains(line, " starting") {
			for range 2 { // no gap in which the clock would be doubted
				h.now += DefaultPromiseLength / 2
				h.c.Step(Tick{h.now})
			}
		}
		return nil
	case "explain":
		var out []string
		for _, w := range h.c.Explain() {
			out = append(out, fmt.Sprintf("since %v: %s", w.Since, w.For))
		}
		return out
	case "status":
		return []string{status(h.c.Status())}
	case "tick":
		h.now += time.Duration(n(0)) * time.Millisecond
		ev = Tick{h.now}
	case "fence":
		ev = Fence{conn, epoch}
	case "open":
		ev = Open{conn, epoch, holdfast.Seq(key("cut")), holdfast.ISRVersion(key("isr"))}
	case "join":
		ev = Join{conn, epoch, holdfast.Seq(key("at")), holdfast.ISRVersion(key("isr"))}
	case "append":
		first, last, _ := strings.Cut(pos[2], "..")
		e := epoch
		if kv["of"] != "" {
			e = holdfast.Epoch(key("of"))
		}
		ev = Append{conn, epoch, e, holdfast.Seq(h.num(first)), holdfast.Seq(h.num(last)), Batch(key("batch"))}
	case "flush":
		ev = Flush{conn, epoch, uint64(key("id"))}
	case "commit":
		ev = Commit{conn, epoch, holdfast.Seq(n(2))}
	case "ping":
		ev = Ping{Conn: conn, Epoch: epoch, Nonce: uint64(n(2))}
	case "promise":
		h.now += time.Duration(key("ms")) * time.Millisecond
		ev = Ping{conn, epoch, uint64(n(2)), true, h.now}
	case "read":
		ev = Read{conn, epoch, uint64(key("id"))}
	case "intact":
		ev = Intact{conn, epoch}
	case "install":
		ev = Install{conn, epoch, holdfast.Seq(key("as-of")), Batch(key("batch"))}
	case "whole":
		ev = Whole{conn, epoch}
	case "fetch":
		ev = Fetch{conn, epoch, uint64(key("id")), strings.Contains(line, " chunks"), holdfast.Seq(key("from")), holdfast.Seq(key("to"))}
	case "closed":
		ev = Closed{conn}
	case "left":
		ev = Left{conn}
	case "fenced":
		ev = Fenced{err}
	case "opened":
		ev = Opened{holdfast.Seq(key("held")), err}
	case "appended":
		ev = Appended{Batch(n(0)), err}
	case "synced":
		ev = Synced{uint64(n(0)), err}
	case "sampled":
		ev = Sampled{conn, uint64(key("id")), err}
	case "installed":
		ev = Installed{Batch(n(0)), err}
	case "wholedone":
		ev = WholeDone{err}
	case "applied":
		ev = AppliedTo{holdfast.Seq(n(0)), holdfast.Seq(key("checkpoint"))}
	case "failed":
		ev = Failed{err}
	case "damaged":
		ev = Damaged{}
	default:
		h.t.Fatalf("%s: unknown command", h.line)
	}
	var out []string
	for _, a := range h.c.Step(ev) {
		out = append(out, word(a))
	}
	return out
}

func status(s Status) string {
	out := fmt.Sprintf("fence %d tail %d of %d dur %d commit %d applied %d", s.Fence, s.Tail, s.TailEpoch, s.Dur, s.Commit, s.Applied)
	if s.Intact {
		out += " intact"
	}
	if s.Syncing {
		out += fmt.Sprintf(" syncing held %d", s.Held)
	}
	for _, e := range s.EpochStarts {
		out += fmt.Sprintf(" %d:%d", e.Epoch, e.First)
	}
	return out
}

func kindOf(err error) string {
	if err == nil {
		return "ok"
	}
	return string(holdfast.KindOf(err))
}

func word(a Action) string {
	switch a := a.(type) {
	case LogFence:
		return fmt.Sprintf("log: fence %d, seal", a.Epoch)
	case LogTruncate:
		return fmt.Sprintf("log: truncate to %d", a.To)
	case LogRebase:
		return fmt.Sprintf("log: rebase at %d of %d", a.To, a.Epoch)
	case LogAppend:
		return fmt.Sprintf("log: append %d..%d batch %d", a.First, a.Last, a.Batch)
	case LogSync:
		return fmt.Sprintf("log: sync %d", a.ID)
	case LogCommit:
		return fmt.Sprintf("log: commit %d", a.Seq)
	case LogRead:
		return fmt.Sprintf("log: read #%d id %d", a.Conn, a.ID)
	case LogIntact:
		return fmt.Sprintf("log: intact in %d", a.Epoch)
	case LogHint:
		return fmt.Sprintf("log: hint %d/%d", a.Epoch, a.ISR)
	case LogInstall:
		return fmt.Sprintf("log: install batch %d as of %d", a.Batch, a.AsOf)
	case LogWhole:
		return "log: whole"
	case LogFetch:
		return fmt.Sprintf("log: fetch #%d id %d", a.Conn, a.ID)
	case Drop:
		return fmt.Sprintf("drop batch %d", a.Batch)
	case DropRead:
		return fmt.Sprintf("drop read #%d id %d", a.Conn, a.ID)
	case SendFenceOK:
		return fmt.Sprintf("#%d FENCE_OK %d: %s", a.Conn, a.Epoch, status(a.Status))
	case SendRefused:
		return fmt.Sprintf("#%d REFUSED by %d", a.Conn, a.Fence)
	case SendOpened:
		out := fmt.Sprintf("#%d OPENED tail %d dur %d", a.Conn, a.Tail, a.Dur)
		if a.Held > 0 {
			out += fmt.Sprintf(" held %d", a.Held)
		}
		return out
	case SendAck:
		return fmt.Sprintf("#%d ACK %d", a.Conn, a.Tail)
	case SendFlushed:
		return fmt.Sprintf("#%d FLUSHED id %d dur %d", a.Conn, a.ID, a.Dur)
	case SendPong:
		if a.Promise > 0 {
			return fmt.Sprintf("#%d PROMISED %v %d", a.Conn, a.Promise, a.Nonce)
		}
		return fmt.Sprintf("#%d PONG %d", a.Conn, a.Nonce)
	case SendSample:
		return fmt.Sprintf("#%d SAMPLE id %d: %s", a.Conn, a.ID, kindOf(a.Err))
	case SendInstalled:
		return fmt.Sprintf("#%d INSTALLED batch %d as of %d retry %v", a.Conn, a.Batch, a.AsOf, a.Retry)
	case SendWhole:
		return fmt.Sprintf("#%d WHOLE dur %d", a.Conn, a.Dur)
	case SendFailed:
		return fmt.Sprintf("#%d FAILED at %d: %s", a.Conn, a.Seq, kindOf(a.Err))
	case CloseConn:
		return fmt.Sprintf("close #%d", a.Conn)
	}
	return fmt.Sprintf("?? %T", a)
}
