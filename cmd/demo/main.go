package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/holdfast-storage/holdfast/cmd/internal/lab"
)

// The exit codes.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
	exitLost   = 3
)

func main() {
	// The demo removes what it made also when it is interrupted; a second signal ends
	// it at once.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	os.Exit(command(ctx, os.Args[1:]))
}

func command(ctx context.Context, args []string) int {
	if len(args) > 0 && args[0] == "leftovers" {
		return leftovers(ctx)
	}
	var o options
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	flags.StringVar(&o.root, "root", ".", "the repository")
	flags.StringVar(&o.binary, "binary", "", "a static holdfast binary, instead of building one")
	flags.StringVar(&o.breakage, "break", os.Getenv("BREAK"), "build a defect in: lose-acked")
	flags.StringVar(&o.report, "report", "demo.json", "where the report is written")
	flags.StringVar(&o.name, "name", "hfdemo", "the name of what is made in Docker")
	flags.BoolVar(&o.keep, "keep", false, "leave the hosts running, to look at them; the next demo removes them")
	flags.IntVar(&o.rounds, "rounds", 1, "how many hosts die in the container form, one after the other")
	flags.BoolVar(&o.imagesOnly, "images-only", false, "build the images and end")
	flags.Usage = func() {
		fmt.Fprintln(flags.Output(), "Three Docker hosts, one volume, a host dies, the data is there.\n\n  go run ./cmd/demo [FLAGS]\n  go run ./cmd/demo leftovers")
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return exitOK
		}
		return exitUsage
	}
	if flags.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "unknown argument %q\n", flags.Arg(0))
		return exitUsage
	}
	if _, known := breakages[o.breakage]; !known {
		fmt.Fprintf(os.Stderr, "unknown defect %q: lose-acked is there\n", o.breakage)
		return exitUsage
	}
	if o.rounds < 1 {
		fmt.Fprintf(os.Stderr, "-rounds %d: at least one host has to die\n", o.rounds)
		return exitUsage
	}
	if lacks := preflight(ctx, o.binary == ""); len(lacks) > 0 {
		for _, l := range lacks {
			fmt.Fprintf(os.Stderr, "missing: %s: %s\n", l.what, l.remedy)
		}
		return exitUsage
	}
	return play(ctx, o)
}

// closeDeadline bounds the removal of all that the demo made.
const closeDeadline = 90 * time.Second

// play runs the demo, removes what it made, and reports.
func play(ctx context.Context, o options) int {
	d := &demo{
		options: o,
		story:   newStory(os.Stdout),
		report:  &report{Result: resultOK, Break: o.breakage, Started: time.Now().UTC().Truncate(time.Second)},
	}
	before, leftoversErr := lab.Leftovers(ctx) // without root nothing can be said
	d.before = before
	err := d.run(ctx)
	cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeDeadline)
	defer cancel()
	if closeErr := d.close(cleanup); closeErr != nil {
		err = errors.Join(err, closeErr)
	}
	if leftoversErr == nil && !o.keep {
		err = errors.Join(err, d.nothingLeft(cleanup, before))
	}
	if o.imagesOnly && err == nil {
		return exitOK
	}
	code := d.report.judge(err)
	d.report.Seconds = time.Since(d.story.start).Seconds()
	d.report.summary(os.Stdout)
	if err := d.report.write(o.report); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return max(code, exitFailed)
	}
	return code
}

func leftovers(ctx context.Context) int {
	found, err := lab.Leftovers(ctx)
	for _, what := range found {
		fmt.Println(what)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return exitFailed
	}
	if len(found) > 0 {
		return exitFailed
	}
	fmt.Println("nothing is left")
	return exitOK
}
