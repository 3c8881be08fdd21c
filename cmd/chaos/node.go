package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/cmd/internal/api"
	"github.com/holdfast-storage/holdfast/cmd/internal/api/apipb"
)

// Sizes of a node's disk: small, so that logs turn over and copies are cheap.
const (
	diskSize = "512M"
	walSize  = "16M" // the least
)

// callLimit bounds one call of a node's API that does not wait by design: a
// node that is stopped does not answer at all.
const callLimit = 2 * time.Second

// node is one daemon of the real program, in its own network namespace. Its
// methods belong to the director, but for those that say otherwise.
type node struct {
	name    string
	number  int    // from 1
	dir     string // of its log and its sockets
	program string
	net     *network
	join    string // address of the first node, empty for the first
	log     *eventLog
	supply  *supply // nil: its files are on this machine's own disk

	mu     sync.Mutex
	cmd    *exec.Cmd // nil: it is down
	exited chan struct{}
	paused bool
}

// medium is where what must survive is.
func (n *node) medium() string  { return filepath.Join(n.dir, "m") }
func (n *node) dataDir() string { return filepath.Join(n.medium(), "d") }
func (n *node) image() string   { return filepath.Join(n.medium(), "disk.img") }
func (n *node) logPath() string { return filepath.Join(n.dir, "log") }
func (n *node) socket() string  { return filepath.Join(n.dataDir(), "control.sock") }

// start runs the daemon, with more flags than the usual if there are any.
func (n *node) start(more ...string) error {
	log, err := os.OpenFile(n.logPath(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	args := []string{"--net=" + n.net.path(n.net.host(n.number))}
	if n.supply != nil {
		// With a boot id of its own, seen by nobody else. What is unmounted
		// outside goes inside too: another node's disk must not live on there.
		args = append(args, "unshare", "--mount", "--propagation", "slave", "sh", "-c", `mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"`, n.supply.boot)
	}
	args = append(args, n.program, "serve",
		"--name", n.name, "--data-dir", n.dataDir(), "--run-dir", filepath.Join(n.dir, "r"),
		"--address", fmt.Sprintf("%s:%d", n.net.address(n.number), portAPI), "--insecure",
		"--plugin-socket", "", "--docker-socket", "", "--ballast", "16M",
		"--disk", n.image()+",size="+diskSize+",wal="+walSize)
	if n.join == "" {
		args = append(args, "--bootstrap")
	} else {
		args = append(args, "--join", n.join)
	}
	cmd := exec.Command("nsenter", append(args, more...)...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(os.Environ(), "HOLDFAST_LOG=info", "HOLDFAST_KEEPER=off")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", n.name, err)
	}
	exited := make(chan struct{})
	go func() {
		_ = cmd.Wait() // how it ended is in cmd.ProcessState
		close(exited)
	}()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cmd, n.exited, n.paused = cmd, exited, false
	return nil
}

// process returns the running daemon, nil if there is none.
func (n *node) process() (*exec.Cmd, chan struct{}) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.cmd, n.exited
}

// answers reports whether the daemon runs and is not stopped. May be called by anyone.
func (n *node) answers() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.cmd == nil || n.paused {
		return false
	}
	select {
	case <-n.exited:
		return false
	default:
		return true
	}
}

// kill is kill -9; it returns once the process is gone.
func (n *node) kill() {
	cmd, exited := n.process()
	if cmd == nil {
		return
	}
	_ = cmd.Process.Kill() // it may have ended by itself
	<-exited
	n.mu.Lock()
	n.cmd = nil
	n.mu.Unlock()
}

// condemn sends SIGKILL and does not wait: a process that waits for its disk dies
// when the disk answers, and does nothing more.
func (n *node) condemn() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.cmd == nil {
		return nil
	}
	if err := n.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill %s: %w", n.name, err)
	}
	return nil
}

// exit waits for a daemon that is to end by itself, and returns its exit code.
func (n *node) exit(ctx context.Context) (int, error) {
	cmd, exited := n.process()
	if cmd == nil {
		return 0, holdfast.Errorf(holdfast.ErrInternal, "%s does not run", n.name)
	}
	select {
	case <-exited:
	case <-ctx.Done():
		return 0, holdfast.Errorf(holdfast.ErrTimeout, "%s runs still", n.name)
	}
	n.mu.Lock()
	n.cmd = nil
	n.mu.Unlock()
	return cmd.ProcessState.ExitCode(), nil
}

// stopWithin is the contract: a daemon is gone within 8 s of SIGTERM. This
// machine may be busy.
const stopWithin = 20 * time.Second

// terminate is SIGTERM, and waits for the end.
func (n *node) terminate(ctx context.Context) error {
	cmd, _ := n.process()
	if cmd == nil {
		return nil
	}
	_ = cmd.Process.Signal(syscall.SIGTERM) // it may have ended by itself
	ctx, cancel := context.WithTimeout(ctx, stopWithin)
	defer cancel()
	_, err := n.exit(ctx)
	return err
}

// pause is SIGSTOP; resume is SIGCONT.
func (n *node) pause() error {
	return n.signal(syscall.SIGSTOP, true)
}

func (n *node) resume() error {
	return n.signal(syscall.SIGCONT, false)
}

func (n *node) signal(s syscall.Signal, paused bool) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.cmd == nil {
		return nil
	}
	n.paused = paused
	return n.cmd.Process.Signal(s)
}

// call calls the node's API. May be called by anyone.
func (n *node) call(ctx context.Context, limit time.Duration, f func(context.Context, *api.Client) error) error {
	if !n.answers() {
		return holdfast.Errorf(holdfast.ErrUnavailable, "%s does not run", n.name)
	}
	client, err := api.Dial("unix://" + n.socket())
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return f(ctx, client)
}

// inspect asks for the volume. May be called by anyone.
func (n *node) inspect(ctx context.Context) (v *apipb.Volume, err error) {
	err = n.call(ctx, callLimit, func(ctx context.Context, c *api.Client) error {
		v, err = c.InspectVolume(ctx, &apipb.VolumeRequest{Name: volumeName})
		return err
	})
	return v, err
}

// holds reports whether an answer says that the volume is exported here. A holder
// that has lost the volume to this node may be asked in its stead, and then still
// names its own socket.
func (n *node) holds(v *apipb.Volume) bool {
	u, err := url.Parse(v.Uri)
	return err == nil && v.Node == n.name && u.Query().Get("socket") == filepath.Join(n.dataDir(), "nbd.sock")
}

// status asks for the cluster. May be called by anyone.
func (n *node) status(ctx context.Context) (s *apipb.ClusterStatus, err error) {
	err = n.call(ctx, callLimit, func(ctx context.Context, c *api.Client) error {
		s, err = c.Status(ctx, &apipb.StatusRequest{})
		return err
	})
	return s, err
}

// attach makes the node the holder, and waits for that.
func (n *node) attach(ctx context.Context, wait time.Duration, force bool) error {
	return n.call(ctx, wait+callLimit, func(ctx context.Context, c *api.Client) error {
		stream, err := c.AttachVolume(ctx, &apipb.AttachVolumeRequest{Name: volumeName, Nbd: true, WaitMillis: wait.Milliseconds(), Force: force})
		if err != nil {
			return api.FromStatus(err)
		}
		for {
			p, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				return holdfast.Errorf(holdfast.ErrInternal, "attach on %s ended without an answer", n.name)
			}
			if err != nil {
				return api.FromStatus(err)
			}
			if p.Attachment != nil {
				return nil
			}
		}
	})
}

// detach ends the attachment, from this node.
func (n *node) detach(ctx context.Context, limit time.Duration) error {
	return n.call(ctx, limit, func(ctx context.Context, c *api.Client) error {
		_, err := c.DetachVolume(ctx, &apipb.DetachVolumeRequest{Name: volumeName})
		return err
	})
}

// event is one line of a daemon's log.
type event struct {
	Msg        string `json:"msg"`
	Level      string `json:"level"`
	Err        string `json:"err"`
	Epoch      uint64 `json:"epoch"`
	Continuous *bool  `json:"continuous"`
	raw        string
}

// eventLog reads a log file as it grows. It may be used by anyone.
type eventLog struct {
	path string

	mu     sync.Mutex
	offset int64
	events []event
}

// all reads what is new and returns everything; the caller does not change it.
func (l *eventLog) all() []event {
	l.mu.Lock()
	defer l.mu.Unlock()
	f, err := os.Open(l.path)
	if err != nil {
		return l.events // nothing was logged yet
	}
	defer f.Close()
	if _, err := f.Seek(l.offset, io.SeekStart); err != nil {
		return l.events
	}
	r := bufio.NewReader(f)
	for {
		line, err := r.ReadBytes('\n')
		if err != nil {
			return l.events // a line that is not whole is read the next time
		}
		l.offset += int64(len(line))
		e := event{raw: string(bytes.TrimSpace(line))}
		if json.Unmarshal(line, &e) != nil {
			e.Msg = e.raw // what the Go runtime or the command line says
		}
		l.events = append(l.events, e)
	}
}

// since returns the events after the first count.
func (l *eventLog) since(count int) []event { return l.all()[count:] }

func (l *eventLog) count() int { return len(l.all()) }
