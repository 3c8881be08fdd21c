package coordinator

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

func rep(name string) holdfast.ReplicaID {
	var id holdfast.ReplicaID
	copy(id[:], name)
	return id
}

func nod(name string) holdfast.NodeID {
	var id holdfast.NodeID
	copy(id[:], "n"+name)
	return id
}

func name(id holdfast.ReplicaID) string { return strings.TrimRight(string(id[:]), "\x00") }

func (h *history) fail(format string, args ...any) {
	h.t.Fatalf("%s: %s", h.line, fmt.Sprintf(format, args...))
}

func (h *history) num(s string) int64 {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		h.fail("%v", err)
	}
	return n
}

// do runs a command and returns the actions in words.
func (h *history) do(line string) []string {
	words := strings.Fields(line)
	pos, kv := []string{}, map[string]string{}
	for _, w := range words[1:] {
		k, v, ok := strings.Cut(w, "=")
		if ok {
			kv[k] = v
		} else {
			pos = append(pos, w)
		}
	}
	arg := func(i int) string {
		if i >= len(pos) {
			return ""
		}
		return pos[i]
	}
	n := func(i int) int64 {
		if i >= len(pos) {
			return 0
		}
		return h.num(pos[i])
	}
	key := func(k string) int64 {
		if kv[k] == "" {
			return 0
		}
		return h.num(kv[k])
	}
	credit := func() int64 { // credit=, else no lack of it
		if kv["credit"] == "" {
			return Unlimited
		}
		return key("credit")
	}
	r, conn := rep(arg(0)), Conn(0)
	if len(pos) > 1 {
		if c, err := strconv.Atoi(pos[1]); err == nil {
			conn = Conn(c)
		}
	}
	var ev Event
	switch words[0] {
	case "new":
		return h.create(pos, kv)
	case "explain":
		var out []string
		for _, w := range h.c.Explain() {
			out = append(out, fmt.Sprintf("since %v: %s", w.Since, readable(w.For)))
		}
		return out
	case "state":
		s := h.c.State()
		out := []string{fmt.Sprintf("%s S=%d tail=%d acked=%d commit=%d %s isr-version=%d", s.Phase, s.S, s.Tail, s.Acked, s.Commit, s.Ack, s.ISRVersion)}
		for _, m := range s.Members {
			out = append(out, fmt.Sprintf("%s %s in-sync=%v ackset=%v tail=%d dur=%d", name(m.Replica), m.Link, m.InSync, m.InAckset, m.Tail, m.Dur))
		}
		return out
	case "wait":
		h.now += time.Duration(n(0)) * time.Millisecond
		return nil
	case "tick":
		// tick 1000: as the edge does, every 100 ms.
		var out []string
		for left := max(n(0), 1); left > 0; left -= 100 {
			h.now += time.Duration(min(left, 100)) * time.Millisecond
			out = append(out, h.step(Tick{})...)
		}
		return out
	case "stall":
		h.now += time.Duration(n(0)) * time.Millisecond
		ev = Tick{}
	case "up":
		ev = LinkUp{r, conn}
	case "down":
		ev = LinkDown{r, conn}
	case "fenceok":
		ev = FenceOK{r, conn, h.c.opt.Epoch, Status{
			Fence: h.c.opt.Epoch, Tail: holdfast.Seq(key("tail")), TailEpoch: holdfast.Epoch(key("of")), Dur: holdfast.Seq(key("tail")),
			Applied: holdfast.Seq(key("applied")), Held: holdfast.Seq(key("held")), HintEpoch: holdfast.Epoch(key("hint")), LogSize: key("log"),
			Intact: strings.Contains(line, " intact"), Syncing: strings.Contains(line, " syncing"), Damaged: strings.Contains(line, " damaged"), Lost: holdfast.Seq(key("lost")),
		}}
	case "refused":
		ev = Refused{r, conn, holdfast.Epoch(n(2))}
	case "opened":
		dur := n(2)
		if kv["dur"] != "" {
			dur = key("dur")
		}
		ev = Opened{r, conn, holdfast.Seq(n(2)), holdfast.Seq(dur), holdfast.Seq(key("held")), credit()}
	case "ack":
		ev = Acked{r, conn, holdfast.Seq(n(2)), credit()}
	case "afforded":
		ev = Afforded{r, conn, uint64(n(2)), key("need"), credit(), holdfast.Seq(key("tail"))}
	case "flushed":
		ev = Flushed{r, conn, uint64(n(2)), holdfast.Seq(n(3))}
	case "pong":
		ev = Pong{r, conn, uint64(n(2)), time.Duration(key("promise")) * time.Millisecond}
	case "wholeok":
		ev = WholeOK{r, conn, holdfast.Seq(n(2))}
	case "failed":
		kind := holdfast.ErrIO
		if arg(2) == "integrity" {
			kind = holdfast.ErrIntegrity
		}
		ev = ReplicaFailed{r, conn, holdfast.Seq(key("seq")), kind}
	case "copiedlog":
		e := CopiedLog{Copy: uint64(n(0)), Gap: arg(1) == "gap"}
		if arg(1) == "err" {
			e.Err = holdfast.ErrIO
		}
		ev = e
	case "copied":
		e := Copied{Copy: uint64(n(0)), MaxAsOf: holdfast.Seq(key("as-of"))}
		switch arg(1) {
		case "err":
			e.Err = holdfast.ErrIO
		case "integrity":
			e.Err = holdfast.ErrIntegrity
		}
		ev = e
	case "progress":
		ev = CopyProgress{uint64(n(0)), n(1), n(2)}
	case "write":
		kind := OpWrite
		if strings.Contains(line, " trim") {
			kind = OpTrim
		}
		if strings.Contains(line, " zero") {
			kind = OpZero
		}
		ev = Write{OpID(n(0)), kind, n(1) * 4096, n(2) * 4096, strings.Contains(line, " fua")}
	case "read":
		ev = Read{OpID(n(0)), n(1) * 4096, n(2) * 4096}
	case "flush":
		ev = Flush{OpID(n(0))}
	case "settle":
		ev = Settle{}
	case "sampled":
		e := Sampled{ID: OpID(n(0)), Sample: uint64(n(1)), Replica: rep(kv["from"])}
		switch arg(2) {
		case "integrity":
			e.Err = holdfast.ErrIntegrity
		case "lost":
			e.Err = holdfast.ErrUnavailable
		}
		ev = e
	case "raft":
		o := map[string]Outcome{"applied": OutcomeApplied, "unknown": OutcomeUnknown, "fenced": OutcomeFenced, "conflict": OutcomeConflict, "refused": OutcomeRefused}[arg(1)]
		ev = Proposed{uint64(n(0)), o, holdfast.ISRVersion(key("version"))}
	case "meta":
		e := Meta{ID: uint64(n(0)), Epoch: holdfast.Epoch(key("epoch")), ISRVersion: holdfast.ISRVersion(key("version")), Activated: strings.Contains(line, " activated")}
		if arg(1) == "err" {
			e.Err = holdfast.ErrUnavailable
		}
		for _, x := range strings.Split(kv["isr"], ",") {
			e.ISR = append(e.ISR, rep(x))
		}
		ev = e
	case "gone":
		ev = NodeGone{nod(arg(0)), true}
	case "back":
		ev = NodeGone{nod(arg(0)), false}
	case "replicas":
		ev = Replicas{h.replicas(pos)}
	case "policy":
		p := Policy{h.c.opt.Copies, int(key("min")), time.Duration(key("fail-after")) * time.Millisecond}
		if kv["copies"] != "" {
			p.Copies = int(key("copies"))
		}
		ev = p
	case "detach":
		ev = Detach{}
	case "stop":
		ev = Stop{}
	default:
		h.fail("unknown command")
	}
	return h.step(ev)
}

// replicas reads a@1:in-sync: replica a on node 1; leaving is in sync too.
func (h *history) replicas(words []string) []Replica {
	var out []Replica
	for _, w := range words {
		where, role, _ := strings.Cut(w, ":")
		id, node, _ := strings.Cut(where, "@")
		if role == "" {
			role = string(holdfast.RoleInSync)
		}
		r := Replica{ID: rep(id), Node: nod(node), Role: holdfast.ReplicaRole(role)}
		if role == "leaving" {
			r.Role, r.Leaving = holdfast.RoleInSync, true
		}
		out = append(out, r)
	}
	return out
}

// create reads: new epoch=3 node=1 a@1 b@2 c@3:stale history=1:0,2:7 ...
func (h *history) create(pos []string, kv map[string]string) []string {
	h.now = 0
	o := Options{Epoch: holdfast.Epoch(h.num(kv["epoch"])), Node: nod(kv["node"]), ISRVersion: 1, Replicas: h.replicas(pos)}
	o.Copies = len(o.Replicas)
	for _, x := range strings.Split(kv["history"], ",") {
		if e, s, ok := strings.Cut(x, ":"); ok {
			o.History = append(o.History, Start{holdfast.Epoch(h.num(e)), holdfast.Seq(h.num(s))})
		}
	}
	for k, v := range kv {
		switch k {
		case "floor":
			o.Floor = holdfast.Seq(h.num(v))
		case "end":
			o.Detached, o.End = true, holdfast.Seq(h.num(v))
		case "gone":
			o.Gone = append(o.Gone, nod(v))
		case "ack":
			o.Ack = holdfast.AckMode(v)
		case "slow-window":
			o.Limits.SlowWindow = time.Duration(h.num(v)) * time.Millisecond
			o.Limits.SlowSamples = 1
		case "min":
			o.MinCopies = int(h.num(v))
		case "fail-after":
			o.FailHeldAfter = time.Duration(h.num(v)) * time.Millisecond
		case "window":
			o.Limits.WindowOps = int(h.num(v))
		case "pings-only":
			o.PingsOnly = true
		case "salvaged":
			o.Salvaged = true
		case "accept-loss":
			o.AcceptLoss = true
		case "pruned":
			o.HistoryPruned = true
		}
	}
	h.c = New(o)
	return h.words(h.c.Start())
}

func (h *history) step(ev Event) []string { return h.words(h.c.Step(h.now, ev)) }

// readable puts names for ids.
func readable(s string) string {
	for _, n := range []string{"a", "b", "c", "d"} {
		s = strings.ReplaceAll(s, rep(n).String(), n)
	}
	for _, n := range []string{"1", "2", "3", "4"} {
		s = strings.ReplaceAll(s, nod(n).String(), n)
	}
	return s
}

func (h *history) words(actions []Action) []string {
	var out []string
	for _, a := range actions {
		out = append(out, word(a))
	}
	return out
}

func blocksOf(offset, length int64) string { return fmt.Sprintf("%d+%d", offset/4096, length/4096) }

func errText(err error) string {
	if err == nil {
		return "ok"
	}
	return string(holdfast.KindOf(err))
}

func word(a Action) string {
	to := func(id holdfast.ReplicaID, c Conn) string { return fmt.Sprintf("%s#%d", name(id), c) }
	switch a := a.(type) {
	case Connect:
		return fmt.Sprintf("connect %s", name(a.Replica))
	case Disconnect:
		return fmt.Sprintf("disconnect %s", name(a.Replica))
	case CloseConn:
		return "close " + to(a.Replica, a.Conn)
	case SendFence:
		return fmt.Sprintf("FENCE %s epoch %d", to(a.Replica, a.Conn), a.Epoch)
	case SendOpen:
		return fmt.Sprintf("OPEN %s cut to %d", to(a.Replica, a.Conn), a.CutTo)
	case SendJoin:
		return fmt.Sprintf("JOIN %s at %d", to(a.Replica, a.Conn), a.At)
	case SendAppend:
		return fmt.Sprintf("APPEND %s %d..%d", to(a.Replica, a.Conn), a.First, a.Last)
	case SendFlush:
		return fmt.Sprintf("FLUSH %s id %d", to(a.Replica, a.Conn), a.ID)
	case SendCommit:
		return fmt.Sprintf("COMMIT %s %d", to(a.Replica, a.Conn), a.Seq)
	case SendPing:
		if a.Promise {
			return fmt.Sprintf("PROMISE %s %d", to(a.Replica, a.Conn), a.Nonce)
		}
		return fmt.Sprintf("PING %s %d", to(a.Replica, a.Conn), a.Nonce)
	case SendIntact:
		return "INTACT " + to(a.Replica, a.Conn)
	case SendAfford:
		return fmt.Sprintf("AFFORD %s ask %d, %s behind %d chunks", to(a.Replica, a.Conn), a.Ask, blocksOf(a.Offset, a.Length), a.Pending)
	case SendWhole:
		return "WHOLE " + to(a.Replica, a.Conn)
	case CopyLog:
		return fmt.Sprintf("copy log %d: %s to %s, %d..%d", a.Copy, to(a.Source, a.SourceConn), to(a.Target, a.TargetConn), a.From, a.To)
	case StartCopy:
		return fmt.Sprintf("copy chunks %d: %s to %s, changed after %d, applied %d", a.Copy, to(a.Source, a.SourceConn), to(a.Target, a.TargetConn), a.After, a.At)
	case StopCopy:
		return fmt.Sprintf("stop copy %d", a.Copy)
	case Sequence:
		return fmt.Sprintf("op %d is seq %d", a.ID, a.Seq)
	case ReleaseWindow:
		return fmt.Sprintf("release window up to %d", a.UpTo)
	case SampleRead:
		return fmt.Sprintf("READ %s op %d sample %d of %s", to(a.Replica, a.Conn), a.ID, a.Sample, blocksOf(a.Offset, a.Length))
	case CompleteWrite:
		return fmt.Sprintf("write %d: %s", a.ID, errText(a.Err))
	case CompleteRead:
		return fmt.Sprintf("read %d: %s", a.ID, errText(a.Err))
	case CompleteFlush:
		return fmt.Sprintf("flush %d: %s", a.ID, errText(a.Err))
	case Propose:
		s := fmt.Sprintf("raft %d: %s epoch %d version %d", a.ID, a.Command, a.Epoch, a.ISRVersion)
		if a.Command != CommandActivate {
			return s + fmt.Sprintf(" %s commit %d", name(a.Replica), a.Commit)
		}
		var isr []string
		for _, id := range a.ISR {
			isr = append(isr, name(id))
		}
		return s + fmt.Sprintf(" S=%d isr=%s continuous=%v", a.S, strings.Join(isr, ","), a.Continuous)
	case ReadMeta:
		return fmt.Sprintf("read raft %d", a.ID)
	case Activated:
		return fmt.Sprintf("ACTIVE S=%d continuous=%v", a.S, a.Continuous)
	case Detached:
		return fmt.Sprintf("DETACHED end %d commit %d", a.End, a.Commit)
	case EndSession:
		return fmt.Sprintf("END %s: %s", a.Reason, errText(a.Err))
	case Notice:
		who := ""
		if !a.Replica.IsZero() {
			who = " " + name(a.Replica)
		}
		return fmt.Sprintf("note %s%s", a.Kind, who)
	}
	return fmt.Sprintf("?? %T", a)
}
