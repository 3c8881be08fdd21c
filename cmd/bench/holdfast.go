package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// startHoldfast starts one node, or three that talk over TCP on loopback, and
// attaches a volume with as many replicas.
func startHoldfast(ctx context.Context, c config, name string) (*target, error) {
	binary, err := filepath.Abs(c.holdfast)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(binary); err != nil {
		return nil, fmt.Errorf("%w: make build first, or leave it out of -targets", err)
	}
	nodes := 1
	if strings.HasSuffix(name, "-3") {
		nodes = 3
	}
	t := &target{name: name}
	var first string
	for i := 1; i <= nodes; i++ {
		dir := filepath.Join(c.dir, fmt.Sprintf("%s%d", name[len("holdfast-"):], i)) // short: sockets stand in it
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return t, err
		}
		address, err := freeAddress()
		if err != nil {
			return t, err
		}
		args := []string{
			"serve", "--name", fmt.Sprintf("n%d", i), "--data-dir", dir, "--run-dir", dir, "--address", address, "--plugin-socket", "",
			"--disk", fmt.Sprintf("%s/disk.img,size=%dM,wal=1G", dir, 2*c.sizeMiB+1024),
		}
		if i == 1 {
			first = address
			args = append(args, "--bootstrap")
		} else {
			args = append(args, "--join", first)
		}
		log := filepath.Join(dir, "log")
		if err := t.start(log, binary, append(args, c.extra...)...); err != nil {
			return t, err
		}
		if err := t.await(ctx, func() error {
			_, err := verb(ctx, binary, address, "status")
			return err
		}, log); err != nil {
			return t, err
		}
	}
	// Every node's disk has to be known before replicas are placed on it.
	if err := t.await(ctx, func() error {
		_, err := verb(ctx, binary, first, "volume", "create", "bench", "--size", fmt.Sprintf("%dM", c.sizeMiB), "--replicas", fmt.Sprint(nodes))
		return err
	}, filepath.Join(c.dir, name[len("holdfast-"):]+"1", "log")); err != nil {
		return t, err
	}
	out, err := verb(ctx, binary, first, "volume", "attach", "bench", "--nbd", "--wait", "60s")
	if err != nil {
		return t, err
	}
	if t.uri = uriOf(out); t.uri == "" {
		return t, fmt.Errorf("volume attach printed no uri: %s", out)
	}
	filled := false
	t.prepare = func(ctx context.Context) error {
		if filled {
			return nil
		}
		filled = true
		_, err := fio(ctx, c.dir, t.uri, []string{"--rw=write", "--bs=1m", "--iodepth=8", fmt.Sprintf("--size=%dm", c.sizeMiB), "--end_fsync=1"})
		return err
	}
	return t, nil
}

// verb runs a verb of the CLI against the node at address.
func verb(ctx context.Context, binary, address string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, binary, args...) //nolint:gosec // the operator's own arguments, no shell
	cmd.Env = append(os.Environ(), "HOLDFAST_ADDRESS="+address)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("holdfast %s: %w: %s", strings.Join(args, " "), err, tail(out))
	}
	return string(out), nil
}

// uriOf returns the URI in what `volume attach` printed.
func uriOf(out string) string {
	for line := range strings.Lines(out) {
		if rest, ok := strings.CutPrefix(strings.TrimSpace(line), "uri:"); ok {
			return strings.TrimSpace(rest)
		}
	}
	return ""
}

// freeAddress finds a loopback port that is free with the two after it, which a
// node uses for data and raft. Somebody may take them meanwhile: then the node
// says so and ends.
func freeAddress() (string, error) {
	for range 100 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return "", err
		}
		port := l.Addr().(*net.TCPAddr).Port
		free := port+2 < 1<<16
		for next := port + 1; free && next <= port+2; next++ {
			n, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", next))
			if free = err == nil; free {
				n.Close()
			}
		}
		l.Close()
		if free {
			return fmt.Sprintf("127.0.0.1:%d", port), nil
		}
	}
	return "", fmt.Errorf("no three free ports in a row on 127.0.0.1")
}
