package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"sync"
	"syscall"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/cmd/internal/history"
)

// Exit codes.
const (
	exitFailed = 1 // the run could not be made
	exitUsage  = 2
	exitBroken = 3 // a promise was broken
)

// judgeLimit is for one block's history. A block is hot for seconds: what is not
// decided by then never is.
const judgeLimit = 2 * time.Minute

// options are the flags.
type options struct {
	program string
	nodes   int
	minutes float64
	seed    uint64
	keep    bool
	only    *regexp.Regexp
	power   bool
}

// kinds are the faults that may come.
func (o options) kinds() []fault {
	var list []fault
	for _, f := range faults {
		if (o.only == nil || o.only.MatchString(f.name)) && (o.power || !f.power) {
			list = append(list, f)
		}
	}
	return list
}

func main() {
	var o options
	flag.StringVar(&o.program, "holdfast", "bin/holdfast", "the program whose nodes are run")
	flag.IntVar(&o.nodes, "nodes", 3, "how many nodes, 3 to 5")
	flag.Float64Var(&o.minutes, "minutes", 2, "how long trouble is made")
	flag.Uint64Var(&o.seed, "seed", 1, "what the schedule is drawn from")
	flag.BoolVar(&o.keep, "keep", false, "keep logs and disks although all went well")
	flag.Func("only", "only the faults whose name matches this regular expression", func(s string) (err error) {
		o.only, err = regexp.Compile(s)
		return err
	})
	flag.BoolVar(&o.power, "power", true, "put the nodes on disks whose power can be cut (FUSE and loop devices)")
	flag.Parse()
	if o.nodes < 3 || o.nodes > 5 || o.minutes <= 0 || flag.NArg() > 0 {
		fmt.Fprintln(os.Stderr, "chaos: 3 to 5 nodes, more than no minutes, no arguments")
		os.Exit(exitUsage)
	}
	if len(o.kinds()) == 0 {
		fmt.Fprintf(os.Stderr, "chaos: no fault's name matches %q\n", o.only)
		os.Exit(exitUsage)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, o, os.Stdout)
	stop()
	os.Exit(code)
}

// run makes a whole run and returns the exit code.
func run(ctx context.Context, o options, out io.Writer) int {
	r, err := newRun(ctx, o, out)
	if err != nil {
		fmt.Fprintf(out, "chaos: %v\n", err)
		return exitFailed
	}
	err = r.all(ctx)
	r.close()
	broken := r.print(err)
	switch {
	case broken:
		return exitBroken
	case err != nil:
		return exitFailed
	}
	return 0
}

// chaos is one run.
type chaos struct {
	o       options
	out     io.Writer
	started time.Time
	dir     string
	*director

	outMu sync.Mutex // orders lines of out

	report   history.Report
	copies   int // that were read and compared
	compared int // checks of copies that passed
}

func newRun(ctx context.Context, o options, out io.Writer) (*chaos, error) {
	if os.Geteuid() != 0 {
		return nil, holdfast.Errorf(holdfast.ErrRefused, "network namespaces need root")
	}
	for _, p := range []string{"ip", "iptables-restore", "nsenter", "tc"} {
		if _, err := exec.LookPath(p); err != nil {
			return nil, err
		}
	}
	program, err := filepath.Abs(o.program)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(program); err != nil {
		return nil, fmt.Errorf("%w: run make build", err)
	}
	if err := removeStale(ctx); err != nil {
		return nil, fmt.Errorf("clean up after a run that was killed: %w", err)
	}
	dir, err := os.MkdirTemp("", ownName()) // short: paths of unix sockets are
	if err != nil {
		return nil, err
	}
	r := &chaos{o: o, out: out, started: time.Now(), dir: dir}
	net, err := newNetwork(ctx)
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	rec := &record{clock: newClock()}
	d := &director{seed: o.seed, kinds: o.kinds(), power: o.power, net: net, say: r.say}
	d.load = &load{rec: rec, seed: o.seed, found: d.found}
	for i := range o.nodes {
		name := fmt.Sprintf("n%d", i+1)
		n := &node{name: name, number: i + 1, dir: filepath.Join(dir, name), program: program, net: net}
		n.log = &eventLog{path: n.logPath()}
		if i > 0 {
			n.join = fmt.Sprintf("%s:%d", net.address(1), portAPI)
		}
		if err := os.Mkdir(n.dir, 0o700); err != nil {
			return nil, err
		}
		d.nodes = append(d.nodes, n)
	}
	d.watch = &watch{nodes: d.nodes, load: d.load, say: r.say}
	r.director = d
	return r, nil
}

// say prints a line with the time since the start.
func (r *chaos) say(format string, args ...any) {
	r.outMu.Lock()
	defer r.outMu.Unlock()
	fmt.Fprintf(r.out, "%6.1f %s\n", time.Since(r.started).Seconds(), fmt.Sprintf(format, args...))
}

// all forms the cluster, makes trouble, heals, and judges.
func (r *chaos) all(ctx context.Context) error {
	r.say("seed %d, %d nodes, %v minutes, in %s", r.o.seed, r.o.nodes, r.o.minutes, r.dir)
	watching, stop := context.WithCancel(ctx)
	var background sync.WaitGroup
	defer background.Wait()
	defer stop()
	if r.power {
		if err := shareMounts(r.dir); err != nil {
			return err
		}
	}
	if err := r.form(ctx); err != nil {
		return fmt.Errorf("form the cluster: %w", err)
	}
	background.Go(func() { r.watch.run(watching) })
	background.Go(func() { r.load.moves(watching) })
	background.Go(func() {
		for watching.Err() == nil {
			r.load.prune()
			r.wait(watching, time.Second)
		}
	})
	err := r.rounds(ctx, time.Now().Add(time.Duration(r.o.minutes*float64(time.Minute))))
	if err == nil {
		err = r.settle(ctx)
	} else {
		r.explain(ctx)
		err = errors.Join(err, r.load.finish(time.Second))
	}
	stop()
	background.Wait()
	r.judge()
	if err == nil {
		err = r.compare(ctx)
	}
	return err
}

// settle ends the load, reads all that was written, and detaches.
func (r *chaos) settle(ctx context.Context) error {
	if err := r.healthy(ctx); err != nil {
		return fmt.Errorf("at the end: %w", err)
	}
	if err := r.load.finish(answerLimit); err != nil {
		return err
	}
	n := r.holder()
	v, err := n.inspect(ctx)
	if err != nil {
		return err
	}
	conn, err := dialNBD(v.Uri)
	if err != nil {
		return fmt.Errorf("connect at the end: %w", err)
	}
	reader := worker{load: r.load, session: r.load.latest(), conn: conn, number: r.load.writer.Add(1)}
	for region := range r.load.region.Load() + 1 {
		if err := reader.read(region*regionBlocks, regionBlocks); err != nil {
			conn.close()
			return fmt.Errorf("read region %d at the end: %w", region, err)
		}
	}
	conn.close()
	return r.until(ctx, healLimit, "detached", func() bool {
		err := n.detach(ctx, takeoverLimit)
		if err != nil {
			r.step("detach: %v", err) // the server may not have seen yet that the client left
		}
		return err == nil
	})
}

// judge gives the record to the checker.
func (r *chaos) judge() {
	h := &r.load.rec.history // nobody writes it any more
	r.lossy(h)
	r.say("judging %d operations in %d sessions", len(h.Ops), len(h.Sessions))
	r.report = h.Check(judgeLimit)
}

// lossy marks the sessions that the nodes' logs call lossy. One that clients never
// connected to passes it on to the next.
func (r *chaos) lossy(h *history.History) {
	for _, n := range r.nodes {
		for _, e := range n.log.all() {
			if e.Msg != "volume attached" || e.Continuous == nil || *e.Continuous {
				continue
			}
			var first *history.Session
			for i := range h.Sessions {
				if s := &h.Sessions[i]; s.Epoch >= e.Epoch && (first == nil || s.Epoch < first.Epoch) {
					first = s
				}
			}
			if first != nil {
				first.Lossy = true
			}
		}
	}
}

// compare ends the nodes and reads their disks.
func (r *chaos) compare(ctx context.Context) error {
	var copies []history.Copy
	torn := 0
	for _, n := range r.nodes {
		if err := n.terminate(ctx); err != nil {
			return fmt.Errorf("end %s: %w", n.name, err)
		}
	}
	for _, n := range r.nodes {
		these, err := readCopies(ctx, n, func(block int64, p []byte) {
			if _, err := history.Parse(p, block); err != nil {
				torn++
				r.found(history.Violation{Rule: "C6", Block: block, What: fmt.Sprintf("on the disk of %s: %v", n.name, err)})
			}
		})
		if err != nil {
			return err
		}
		copies = append(copies, these...)
	}
	r.copies = len(copies)
	if len(copies) != volumeReplicas {
		return holdfast.Errorf(holdfast.ErrIntegrity, "%d replicas on all disks, want %d", len(copies), volumeReplicas)
	}
	differ := history.Compare(copies)
	for _, v := range differ {
		r.found(v)
	}
	if len(differ) == 0 && torn == 0 {
		r.compared = len(copies)
	}
	return nil
}

// explain says what the nodes think when the run is stuck.
func (r *chaos) explain(ctx context.Context) {
	for _, n := range r.nodes {
		if v, err := n.inspect(ctx); err != nil {
			r.say("  %s: %v", n.name, err)
		} else {
			r.say("  %s: volume %s, held by %q in epoch %d, uri %q", n.name, v.State, v.Node, v.Epoch, v.Uri)
			for _, c := range v.Replicas {
				r.say("    %s %s, tail %d, durable %d", c.Node, c.State, c.Tail, c.Durable)
			}
		}
		if s, err := n.status(ctx); err == nil {
			r.say("    leader %q, %d of %d nodes up, off: %v", s.Leader, s.NodesUp, s.Nodes, s.Off)
		}
	}
}

// close ends what still runs and removes the network.
func (r *chaos) close() {
	for _, n := range r.nodes {
		n.kill()
		if n.supply != nil {
			if err := n.supply.disconnect(); err != nil {
				r.say("%v", err)
			}
		}
	}
	if r.power {
		if err := unshareMounts(r.dir); err != nil {
			r.say("%v", err)
		}
	}
	r.net.close(context.Background()) // also after an interrupt
}
