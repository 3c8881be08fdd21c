package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		stop()
		os.Exit(1)
	}
}

// config is what the flags say.
type config struct {
	holdfast string   // the binary
	extra    []string // further flags for holdfast serve
	dir      string   // where images and data directories are made, and removed
	targets  []string
	sizeMiB  int
	verify   int // MiB written and verified on each target
	seconds  int // of each job
	rounds   int
	json     string
	keep     bool
	disk     bool // a disk beside a file, instead of the targets
}

func parseFlags(args []string, stderr io.Writer) (config, error) {
	var c config
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&c.holdfast, "holdfast", "bin/holdfast", "the holdfast binary")
	serve := fs.String("serve-flags", "", "further flags for every `holdfast serve`, separated by spaces")
	fs.StringVar(&c.dir, "dir", "", "directory for images and data, on the file system to measure (default: a temporary one)")
	targets := fs.String("targets", strings.Join(allTargets, ","), "what to measure, in this order")
	fs.IntVar(&c.sizeMiB, "size", 1024, "size of the images and volumes in MiB")
	fs.IntVar(&c.verify, "verify", 64, "MiB to write and verify on each target first")
	fs.IntVar(&c.seconds, "seconds", 5, "seconds of each job")
	fs.IntVar(&c.rounds, "rounds", 3, "rounds; the targets take turns in each")
	fs.StringVar(&c.json, "json", "", "write the results as JSON to this file, - for standard output in place of the table")
	fs.BoolVar(&c.keep, "keep", false, "keep what was made in -dir")
	fs.BoolVar(&c.disk, "disk", false, "measure one disk of holdfast beside a file of the same file system, without network and NBD")
	quick := fs.Bool("quick", false, "one round of one second on 256 MiB: shows that it runs, not how fast")
	if err := fs.Parse(args); err != nil {
		return c, err
	}
	if *quick {
		c.sizeMiB, c.verify, c.seconds, c.rounds = 256, 16, 1, 1
	}
	c.extra, c.targets = strings.Fields(*serve), strings.Split(*targets, ",")
	if fs.NArg() > 0 || c.sizeMiB < 64 || c.verify < 1 || c.verify > c.sizeMiB || c.seconds < 1 || c.rounds < 1 {
		return c, fmt.Errorf("want -size of 64 or more, -verify from 1 to -size, -seconds and -rounds of 1 or more, and no arguments")
	}
	for _, t := range c.targets {
		if starters[t] == nil {
			return c, fmt.Errorf("target %q is none of %s", t, strings.Join(allTargets, ", "))
		}
	}
	return c, nil
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	c, err := parseFlags(args, stderr)
	if err != nil {
		return err
	}
	programs := []string{"fio", "nbdkit"}
	if c.disk {
		programs = programs[:1]
	}
	for _, program := range programs {
		if _, err := exec.LookPath(program); err != nil {
			return fmt.Errorf("%s is not installed: apt-get install %s", program, program)
		}
	}
	if c.dir == "" {
		if c.dir, err = os.MkdirTemp("", "hfbench"); err != nil {
			return err
		}
	} else if c.dir, err = os.MkdirTemp(c.dir, "hfbench"); err != nil {
		return err
	}
	if !c.keep {
		defer func() { _ = os.RemoveAll(c.dir) }() //nolint:gosec // made above
	}
	var result interface{ print(io.Writer) error }
	if c.disk {
		result, err = measureDisk(ctx, c, stderr)
	} else {
		result, err = measure(ctx, c, stderr)
	}
	if err != nil {
		return err
	}
	if c.json != "" {
		out, err := json.MarshalIndent(result, "", "  ")
		if err != nil {
			return err
		}
		out = append(out, '\n')
		if c.json == "-" {
			_, err = stdout.Write(out)
			return err
		}
		if err := os.WriteFile(c.json, out, 0o644); err != nil { //nolint:gosec // where the operator wants it
			return err
		}
	}
	return result.print(stdout)
}
