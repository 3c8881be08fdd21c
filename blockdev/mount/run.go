package mount

import (
	"bytes"
	"context"
	"errors"
	"os/exec"
	"strings"

	"github.com/holdfast-storage/holdfast"
)

// maxOutput bounds what is kept of a program's output; mkfs and fsck say less
// unless a file system is in shreds.
const maxOutput = 64 << 10

// Result is how a program ended.
type Result struct {
	Code   int    // its exit code
	Stdout string // at most 64 KiB
	Stderr string // at most 64 KiB
}

// Run runs a program to its end. The error is nil however the program exited;
// it says that the program could not be run or was killed at ctx's end.
type Run func(ctx context.Context, name string, args ...string) (Result, error)

// Exec is the plain Run.
func Exec(ctx context.Context, name string, args ...string) (Result, error) {
	cmd, result := Command(ctx, name, args...)
	return result(cmd.Run())
}

// Command prepares a program for a caller that starts and waits for it itself;
// result turns what Wait returned into a Result.
func Command(ctx context.Context, name string, args ...string) (cmd *exec.Cmd, result func(error) (Result, error)) {
	var stdout, stderr limited
	cmd = exec.CommandContext(ctx, name, args...)
	cmd.Env = []string{"LC_ALL=C", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	if path, err := lookPath(name); err == nil {
		cmd.Path, cmd.Err = path, nil
	}
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	return cmd, func(err error) (Result, error) {
		r := Result{Stdout: stdout.String(), Stderr: stderr.String()}
		var exit *exec.ExitError
		switch {
		case err == nil:
			return r, nil
		case ctx.Err() != nil:
			return r, holdfast.Errorf(holdfast.ErrTimeout, "%s did not end in time: %w", name, ctx.Err())
		case errors.Is(err, exec.ErrNotFound):
			return r, holdfast.Errorf(holdfast.ErrUnsupported, "%s is not installed", name).
				WithRemedy("install e2fsprogs, xfsprogs and util-linux")
		case errors.As(err, &exit) && exit.Exited():
			r.Code = exit.ExitCode()
			return r, nil
		}
		return r, holdfast.Errorf(holdfast.ErrInternal, "run %s: %w", name, err)
	}
}

// lookPath finds a program of an administrator, whose directories a daemon's
// PATH may lack.
func lookPath(name string) (string, error) {
	for _, dir := range []string{"/usr/sbin/", "/sbin/", "/usr/bin/", "/bin/", "/usr/local/sbin/", "/usr/local/bin/"} {
		if path, err := exec.LookPath(dir + name); err == nil {
			return path, nil
		}
	}
	return exec.LookPath(name)
}

// said is what a program said last, for an error message.
func (r Result) said() string {
	text := strings.TrimSpace(r.Stderr)
	if text == "" {
		text = strings.TrimSpace(r.Stdout)
	}
	const most = 400 // a message for people
	if len(text) > most {
		text = "... " + text[len(text)-most:]
	}
	return strings.Join(strings.Fields(text), " ")
}

// limited keeps the first maxOutput bytes written to it and drops the rest.
type limited struct{ b bytes.Buffer }

func (l *limited) Write(p []byte) (int, error) {
	if room := maxOutput - l.b.Len(); room > 0 {
		_, _ = l.b.Write(p[:min(len(p), room)])
	}
	return len(p), nil
}

func (l *limited) String() string { return l.b.String() }
