package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"

	"github.com/holdfast-storage/holdfast"
)

// killGrace is how long a command may take to end after its context has: docker
// ends at once, its pipes a moment later.
const killGrace = 2 * time.Second

// maxErrorText bounds what of a command's output goes into an error.
const maxErrorText = 2000

// run executes a command and returns what it printed, without the last newline. An
// error holds what it printed on stderr.
func run(ctx context.Context, stdin []byte, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.WaitDelay = killGrace
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if stdin != nil {
		cmd.Stdin = bytes.NewReader(stdin)
	}
	err := cmd.Run()
	out := strings.TrimRight(stdout.String(), "\n")
	if err == nil {
		return out, nil
	}
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	text := strings.TrimSpace(stderr.String())
	if text == "" {
		text = out
	}
	if len(text) > maxErrorText {
		text = "... " + text[len(text)-maxErrorText:]
	}
	kind := holdfast.ErrInternal
	if errors.Is(err, context.DeadlineExceeded) {
		kind = holdfast.ErrTimeout
	}
	return out, holdfast.Errorf(kind, "%s: %w: %s", commandLine(name, args), err, text)
}

// commandLine is how a command is shown to people.
func commandLine(name string, args []string) string {
	words := []string{name}
	for _, a := range args {
		if a == "" || strings.ContainsAny(a, " \t\n'\"\\$&|;<>()*?") {
			a = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
		}
		words = append(words, a)
	}
	line := strings.Join(words, " ")
	if len(line) > 300 {
		line = line[:300] + " ..."
	}
	return line
}

// docker runs the docker command against the machine's engine.
func docker(ctx context.Context, args ...string) (string, error) {
	return run(ctx, nil, "docker", args...)
}

// retry calls do until it succeeds or ctx ends, and then returns its last error.
func retry(ctx context.Context, what string, do func() error) error {
	const pause = 100 * time.Millisecond
	for {
		err := do()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w (last: %w)", what, ctx.Err(), err)
		case <-time.After(pause):
		}
	}
}
