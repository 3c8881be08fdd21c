package keeper

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
)

const (
	// defaultMountGrace is how long Unmount is still served after SIGTERM, and
	// defaultDaemonGrace how long the daemon then has to end: together they fit
	// into a container's --stop-timeout of 30 seconds when no mount is left, and
	// into 35 when one is.
	defaultMountGrace  = 25 * time.Second
	defaultDaemonGrace = 8 * time.Second
	// lastWait bounds the unmounts of what is left then, and the end of devices.
	lastWait = 3 * time.Second
	// lockWait is how long a keeper waits for the lock: for the daemon of one
	// that was killed, which dies with it but may need a moment for its memory.
	lockWait  = 3 * time.Second
	lockRetry = 10 * time.Millisecond
)

// Options of Run.
type Options struct {
	// DataDir is the node's data directory, an absolute path, the same in the
	// container and on the host.
	DataDir string
	// Command is the daemon's program and arguments.
	Command []string
	// Logger gets state changes; nil discards them.
	Logger *slog.Logger
	// MountGrace is how long unmounts are waited for after SIGTERM; zero means 25 s.
	MountGrace time.Duration
	// DaemonGrace is how long the daemon then has to end; zero means 8 s.
	DaemonGrace time.Duration
}

func (o *Options) validate() error {
	if !filepath.IsAbs(o.DataDir) {
		return holdfast.Errorf(holdfast.ErrInvalid, "the data directory %q is not an absolute path", o.DataDir)
	}
	if len(o.Command) == 0 {
		return holdfast.Errorf(holdfast.ErrInvalid, "the keeper has no daemon to start").WithRemedy("holdfast keeper -- serve FLAGS")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.MountGrace == 0 {
		o.MountGrace = defaultMountGrace
	}
	if o.DaemonGrace == 0 {
		o.DaemonGrace = defaultDaemonGrace
	}
	return nil
}

// keeper is one run.
type keeper struct {
	opts      Options
	log       *slog.Logger
	instance  holdfast.InstanceID
	namespace uint64 // the mounter's; 0 where the privilege for kernel devices is missing
	lacks     []Lack
	lock      *os.File // also held by every daemon, so that it lasts as long as the last of them
	children  *children
	mounter   *caller
	opening   chan struct{} // one token: one new device at a time
	changed   chan struct{} // holds one: a device or a mount changed

	ctx  context.Context // of the requests; ends last
	work sync.WaitGroup

	mu       sync.Mutex
	devices  map[holdfast.VolumeID]*device
	daemon   *daemon   // who said hello last; nil before the first
	past     []*daemon // dead ones, which devices may still name
	greeted  bool
	draining bool
	conns    map[*net.UnixConn]struct{} // nil once closing
}

// Run is the keeper: it returns when the daemon has ended for good or after
// SIGTERM or SIGINT, with the exit code of the process. As PID 1 it reaps every
// orphan; else it becomes a subreaper, so that it inherits those of its daemon.
//
// Run executes the program anew, with the same arguments, and starts it a second
// time as the mounter (see stage.go): so it comes before the program has begun
// anything else, and nothing of what came before it lasts.
//
// After a signal it still serves Unmount until no mount is left, for MountGrace
// at most (a second signal ends the wait); unmounts what is left, lazily; ends
// the daemon; and returns. Devices end with the keeper: what still uses them
// gets I/O errors.
func Run(ctx context.Context, opts Options) (code int, err error) {
	if err := opts.validate(); err != nil {
		return 2, err
	}
	if opts.DataDir, err = prepareDataDir(opts.DataDir); err != nil {
		return 1, err
	}
	switch os.Getenv(stageVariable) {
	case stageMounter:
		return mounterStage(ctx, opts)
	case stageKeeper:
		return keeperStage(ctx, opts)
	}
	return 1, firstStage()
}

// keeperStage is the keeper's whole life.
func keeperStage(ctx context.Context, opts Options) (code int, err error) {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT)
	defer signal.Stop(signals)
	p, err := stageSocket()
	if err != nil {
		return 1, err
	}
	k := &keeper{
		opts: opts, log: opts.Logger, instance: holdfast.NewID[holdfast.InstanceID](),
		children: newChildren(opts.Logger), mounter: newCaller("mounter", p),
		opening: make(chan struct{}, 1), changed: make(chan struct{}, 1),
		devices: make(map[holdfast.VolumeID]*device), conns: make(map[*net.UnixConn]struct{}),
	}
	k.opening <- struct{}{}
	go k.mounter.receive()
	defer k.mounter.close() // the mounter ends with it
	if err := k.takeLock(); err != nil {
		return 1, err
	}
	defer k.lock.Close()
	if err := k.prepare(ctx); err != nil {
		return 1, err
	}
	l, err := listen(SocketPath(opts.DataDir))
	if err != nil {
		return 1, err
	}
	return k.run(ctx, l, signals), nil
}

// takeLock makes this the one keeper of the data directory. A keeper that was
// killed may have left a daemon that is still dying: it is waited for, since
// nothing of it may act any more when the next one begins.
func (k *keeper) takeLock() error {
	lock, err := os.OpenFile(filepath.Join(k.opts.DataDir, "keeper.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return holdfast.Errorf(holdfast.ErrIO, "open the keeper's lock: %w", err)
	}
	for end := time.Now().Add(lockWait); ; time.Sleep(lockRetry) {
		err = unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			k.lock = lock
			return nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			_ = lock.Close()
			return holdfast.Errorf(holdfast.ErrIO, "lock %s: %w", lock.Name(), err)
		}
		if time.Now().After(end) {
			_ = lock.Close()
			return holdfast.Errorf(holdfast.ErrRefused, "another keeper runs in %s", k.opts.DataDir).WithRemedy("stop it, or choose another --data-dir")
		}
	}
}

// prepare does what comes before the first request.
func (k *keeper) prepare(ctx context.Context) error {
	container := os.Getpid() == 1
	if !container {
		if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
			return holdfast.Errorf(holdfast.ErrInternal, "become a subreaper: %w", err)
		}
	}
	a, err := k.mounter.call(ctx, request{Verb: verbLook, Container: container}, -1)
	if err != nil {
		return err
	}
	own, err := mountNamespace()
	if err != nil {
		return err
	}
	k.lacks = append(takePrivileges(), a.Lacks...)
	if own == a.Namespace { // the first stage had not the privilege to leave it
		k.lacks = append(k.lacks, Lack{What: "kernel devices: no private mount namespace", Remedy: needsAdmin})
	} else {
		k.namespace = a.Namespace
		if err := isolate(k.namespace, mountsDir(k.opts.DataDir), k.log); err != nil {
			return err
		}
	}
	for _, l := range k.lacks {
		k.log.Warn("this host lacks something", slog.String("lack", l.What), slog.String("remedy", l.Remedy))
	}
	return nil
}

// run serves until a signal, ctx's end or the daemon's own end.
func (k *keeper) run(ctx context.Context, l *net.UnixListener, signals <-chan os.Signal) int {
	var cancelAll context.CancelFunc
	k.ctx, cancelAll = context.WithCancel(context.WithoutCancel(ctx))
	daemonCtx, stopDaemon := context.WithCancel(k.ctx)
	defer stopDaemon()
	k.work.Add(3)
	go func() { defer k.work.Done(); k.children.reap(k.ctx) }()
	go k.accept(l)
	ended := make(chan int, 1)
	go func() { defer k.work.Done(); ended <- k.supervise(daemonCtx) }()
	var code int
	select {
	case code = <-ended:
	case s := <-signals:
		k.log.Info("keeper stops", slog.String("signal", s.String()))
		code = k.drain(signals, ended, stopDaemon)
	case <-ctx.Done():
		code = k.drain(signals, ended, stopDaemon)
	case <-k.mounter.done:
		// Without it nothing can be mounted or unmounted, and a second one would
		// not be in the namespace that has the mounts.
		k.log.Error("the mounter has died; the keeper ends")
		stopDaemon()
		<-ended
		code = 1
	}
	k.endDevices()
	_ = l.Close()
	_ = os.Remove(SocketPath(k.opts.DataDir))
	k.closeConversations()
	cancelAll()
	k.work.Wait()
	k.log.Info("keeper ended", slog.Int("code", code))
	return code
}

// drain serves unmounts while it may, then ends the daemon.
func (k *keeper) drain(signals <-chan os.Signal, ended <-chan int, stopDaemon func()) (code int) {
	k.mu.Lock()
	k.draining = true
	k.mu.Unlock()
	synced := make(chan struct{})
	k.work.Add(1)
	go func() { defer k.work.Done(); defer close(synced); k.syncMounts() }() // in case not all are unmounted in time
	grace := time.NewTimer(k.opts.MountGrace)
	defer grace.Stop()
wait:
	for k.mountsLeft() > 0 {
		select {
		case <-k.changed:
		case <-grace.C:
			k.log.Warn("volumes are still mounted", slog.Int("mounts", k.mountsLeft()), slog.Duration("waited", k.opts.MountGrace))
			break wait
		case <-signals:
			break wait
		case code = <-ended:
			return code
		}
	}
	k.lastUnmounts(synced)
	stopDaemon()
	return <-ended
}

// noteChange wakes drain.
func (k *keeper) noteChange() {
	select {
	case k.changed <- struct{}{}:
	default:
	}
}

// all returns the devices.
func (k *keeper) all() []*device {
	k.mu.Lock()
	defer k.mu.Unlock()
	var all []*device
	for _, d := range k.devices {
		all = append(all, d)
	}
	return all
}

func (k *keeper) mountsLeft() (n int) {
	ctx, cancel := context.WithTimeout(k.ctx, lastWait)
	defer cancel()
	for _, d := range k.all() {
		if s, err := k.state(ctx, d); s.Mounted || err != nil {
			n++
		}
	}
	return n
}

// syncMounts writes out what is dirty in every mounted volume.
func (k *keeper) syncMounts() {
	ctx, cancel := context.WithTimeout(k.ctx, k.opts.MountGrace)
	defer cancel()
	var all sync.WaitGroup
	for _, d := range k.all() {
		if s, err := k.state(ctx, d); !s.Mounted || err != nil {
			continue
		}
		all.Go(func() {
			if _, err := k.askMounter(ctx, d, request{Verb: verbSync}); err != nil {
				k.log.Error("volume not synced", d.attrs(slog.Any("error", err))...)
			}
		})
	}
	all.Wait()
}

// lastUnmounts takes the mounts that are left away, while the daemon still
// serves them: in good order those that no process has open (a sync still going
// on counts as one), lazily the others.
func (k *keeper) lastUnmounts(synced <-chan struct{}) {
	ctx, cancel := context.WithTimeout(k.ctx, lastWait)
	defer cancel()
	select {
	case <-synced:
	case <-ctx.Done():
	}
	var all sync.WaitGroup
	for _, d := range k.all() {
		all.Go(func() {
			if err := k.unmount(ctx, d, false); err == nil {
				return
			}
			ctx, cancel := context.WithTimeout(k.ctx, time.Second)
			defer cancel()
			if err := k.unmount(ctx, d, true); err != nil {
				k.log.Error("volume not unmounted", d.attrs(slog.Any("error", err))...)
			}
		})
	}
	all.Wait()
}

// endDevices cuts every connection: with its daemon gone nobody will answer,
// and a process that waits for an answer could not end.
func (k *keeper) endDevices() {
	for _, d := range k.all() {
		k.mu.Lock()
		err := d.conn.Abort()
		k.mu.Unlock()
		if err != nil {
			k.log.Error("connection not aborted", d.attrs(slog.Any("error", err))...)
		}
	}
	ctx, cancel := context.WithTimeout(k.ctx, lastWait)
	defer cancel()
	for _, d := range k.all() {
		if err := k.abort(ctx, d); err != nil {
			k.log.Error("device not ended", d.attrs(slog.Any("error", err))...)
		}
	}
}

// track remembers a conversation for closeConversations; false once that has run.
func (k *keeper) track(conn *net.UnixConn) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.conns == nil {
		return false
	}
	k.conns[conn] = struct{}{}
	return true
}

func (k *keeper) untrack(conn *net.UnixConn) {
	_ = conn.Close()
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.conns, conn)
}

func (k *keeper) closeConversations() {
	k.mu.Lock()
	conns := k.conns
	k.conns = nil
	k.mu.Unlock()
	for c := range conns {
		_ = c.Close()
	}
}
