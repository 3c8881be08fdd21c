package keeper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/hostdev"
	"github.com/holdfast-storage/holdfast/blockdev/mount"
)

const (
	// inUsePoll and inUseWait bound the wait for other mount namespaces to drop
	// a file system that was just unmounted here: a container that is ending,
	// or one that is starting and has not yet left the host's mounts.
	inUsePoll = 50 * time.Millisecond
	inUseWait = 5 * time.Second
)

// mounter is the process in the container's mount namespace: it has the loop
// devices and does everything that a file system needs. It never has a
// /dev/fuse descriptor. That is what makes a kill safe: the last process of a
// mount namespace writes its file systems out as it dies, and waits for that in
// the kernel; were it the one whose descriptors keep the connection alive, it
// would wait for itself and never end. As it is, the keeper and the daemon die
// without waiting, the connection ends with them, and the mounter's wait with it.
type mounter struct {
	dataDir string
	log     *slog.Logger
	tools   mount.Tools

	mu    sync.Mutex
	loops map[holdfast.VolumeID]*hostdev.Loop
}

// runMounter serves the keeper at the other end of p until that is gone.
// Requests for one volume come one at a time, state and sync excepted.
func runMounter(ctx context.Context, p *packets, dataDir string, log *slog.Logger) error {
	m := &mounter{dataDir: dataDir, log: log, loops: make(map[holdfast.VolumeID]*hostdev.Loop)}
	ignored := make(chan os.Signal, 1) // it ends when the keeper does, not before
	signal.Notify(ignored, unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	defer signal.Stop(ignored)
	var calls sync.WaitGroup
	defer calls.Wait() // the keeper's end cuts every connection, and so every wait
	slots := make(chan struct{}, maxRequests)
	for {
		var r request
		fd, err := p.receive(&r)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		slots <- struct{}{}
		calls.Go(func() {
			defer func() { <-slots }()
			m.serve(ctx, p, r, fd)
		})
	}
}

func (m *mounter) serve(ctx context.Context, p *packets, r request, fd int) {
	ctx, cancel := context.WithTimeout(ctx, r.timeout())
	defer cancel()
	a := response{ID: r.ID}
	err := m.handle(ctx, r, fd, &a)
	if fd >= 0 {
		_ = unix.Close(fd)
	}
	a.Error = toWire(err)
	if err := p.send(a, -1); err != nil {
		m.log.Debug("answer not sent", slog.String("verb", string(r.Verb)), slog.Any("error", err))
	}
}

func (m *mounter) handle(ctx context.Context, r request, fd int, a *response) (err error) {
	if r.Verb == verbLook {
		if err := m.clearOldMounts(); err != nil {
			return err
		}
		a.Lacks = m.look(ctx, r.Container)
		a.Namespace, err = mountNamespace()
		return err
	}
	if err := validName(r.Name); err != nil {
		return err
	}
	target := filepath.Join(mountsDir(m.dataDir), r.Name)
	switch r.Verb {
	case verbRemovePath:
		return mount.RemoveTarget(target)
	case verbSync:
		return mount.SyncFS(target)
	case verbUnmount:
		return m.unmount(ctx, r, target)
	case verbLoop:
		a.Text, err = m.configureLoop(ctx, r, fd)
		return err
	case verbState:
		a.State, err = m.state(r, target)
		return err
	}
	loop := m.loop(r.Volume)
	if loop == nil {
		if r.Verb == verbClose {
			return nil
		}
		return holdfast.Errorf(holdfast.ErrInvalid, "volume %s has no loop device yet", r.Name)
	}
	switch {
	case r.Verb == verbClose:
		return m.close(ctx, r, loop, target)
	case r.Verb == verbProbe:
		a.Text, err = m.tools.Blank(ctx, loop.Path())
		return err
	case r.Verb == verbFormat && r.Format != nil:
		return m.format(ctx, r, loop, target)
	case r.Verb == verbFsck:
		if mounted, err := isMounted(target); mounted || err != nil {
			return err // it was checked before it was mounted
		}
		return m.tools.Fsck(ctx, loop.Path(), r.FS)
	case r.Verb == verbMount && r.Mount != nil:
		a.Text, err = mountVolume(loop, target, *r.Mount)
		return err
	}
	return malformed(r.Verb)
}

func (m *mounter) loop(volume holdfast.VolumeID) *hostdev.Loop {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.loops[volume]
}

// configureLoop puts a loop device on the one file of the FUSE file system
// whose detached mount is root.
func (m *mounter) configureLoop(ctx context.Context, r request, root int) (string, error) {
	if l := m.loop(r.Volume); l != nil {
		return l.Path(), nil
	}
	if root < 0 {
		return "", malformed(r.Verb)
	}
	f, err := hostdev.OpenRoot(root)
	if err != nil {
		return "", err
	}
	defer f.Close()
	l, err := hostdev.ConfigureLoop(ctx, f, "holdfast "+r.Name)
	if err != nil {
		return "", err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.loops[r.Volume] = l
	return l.Path(), nil
}

func (m *mounter) format(ctx context.Context, r request, loop *hostdev.Loop, target string) error {
	mounted, err := isMounted(target)
	if err != nil {
		return err
	}
	if mounted {
		return holdfast.Errorf(holdfast.ErrRefused, "volume %s is mounted", r.Name)
	}
	if err := m.tools.Format(ctx, loop.Path(), *r.Format); err != nil {
		return err
	}
	return loop.Sync()
}

func mountVolume(loop *hostdev.Loop, target string, opts MountOptions) (string, error) {
	options, err := mount.ParseOptions(opts.FS, opts.Options)
	if err != nil {
		return "", err
	}
	if err := mount.PrepareTarget(target); err != nil {
		return "", err
	}
	if err := mount.Mount(loop.Path(), target, opts.FS, options); err != nil {
		return "", err
	}
	e, mounted, err := mount.At(target)
	if err != nil {
		return "", err
	}
	if !mounted || e.ReadOnly() && !options.ReadOnly() {
		return "", holdfast.Errorf(holdfast.ErrIO, "the file system at %s went read-only after an error", target).
			WithRemedy("end its containers and mount it again")
	}
	return mount.DataPath(target), nil
}

// unmount unmounts a volume and, unless forced, makes sure that no other mount
// namespace has it.
func (m *mounter) unmount(ctx context.Context, r request, target string) error {
	mounted, err := isMounted(target)
	if err != nil {
		return err
	}
	if mounted {
		if err := mount.Unmount(ctx, target, r.Force); err != nil {
			return err
		}
	}
	if loop := m.loop(r.Volume); loop != nil && !r.Force {
		return waitUnused(ctx, loop, r.Name)
	}
	return nil
}

func waitUnused(ctx context.Context, loop *hostdev.Loop, name string) error {
	ctx, cancel := context.WithTimeout(ctx, inUseWait)
	defer cancel()
	for {
		inUse, err := loop.InUse()
		if err != nil || !inUse {
			return err
		}
		select {
		case <-time.After(inUsePoll):
		case <-ctx.Done():
			return holdfast.Errorf(holdfast.ErrRefused, "%s (volume %s) is still mounted in another mount namespace", loop.Path(), name).
				WithRemedy("end the containers that use the volume")
		}
	}
}

// close takes a loop device off its file: in good order, or with Force whatever
// still uses it.
func (m *mounter) close(ctx context.Context, r request, loop *hostdev.Loop, target string) error {
	mounted, err := isMounted(target)
	if err != nil {
		return err
	}
	if mounted {
		return holdfast.Errorf(holdfast.ErrRefused, "volume %s is mounted", r.Name).WithRemedy("unmount it first")
	}
	if !r.Force {
		if err := waitUnused(ctx, loop, r.Name); err != nil {
			return err
		}
		if err := loop.Sync(); err != nil {
			return err
		}
	}
	m.mu.Lock()
	delete(m.loops, r.Volume)
	m.mu.Unlock()
	loop.Clear()
	return nil
}

func (m *mounter) state(r request, target string) (*state, error) {
	s := &state{}
	loop := m.loop(r.Volume)
	if loop != nil {
		s.Loop = loop.Path()
	}
	e, mounted, err := mount.At(target)
	if err != nil {
		return nil, err
	}
	if mounted && e.Major == loopMajor {
		s.Mounted, s.FS, s.ReadOnly = true, mount.FileSystem(e.FS), e.ReadOnly()
	}
	return s, nil
}

// isMounted says whether a volume, not just a guard, is mounted at target.
func isMounted(target string) (bool, error) {
	e, mounted, err := mount.At(target)
	return mounted && e.Major == loopMajor, err
}

// clearOldMounts takes away what a keeper that was killed left in a host's
// namespace: mounts of loop devices below the directory of mounts, dead since
// its descriptors were closed. The keeper's lock says that it is dead.
func (m *mounter) clearOldMounts() error {
	entries, err := mount.Table()
	if err != nil {
		return err
	}
	var errs []error
	for i := len(entries) - 1; i >= 0; i-- {
		e := entries[i]
		if e.Major != loopMajor || filepath.Dir(e.Target) != mountsDir(m.dataDir) {
			continue
		}
		m.log.Warn("dead mount of an earlier run taken away", slog.String("path", e.Target), slog.String("device", e.Source))
		if err := unix.Unmount(e.Target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", e.Target, err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return holdfast.Errorf(holdfast.ErrInternal, "take away old mounts: %w", err)
	}
	return nil
}

// look is the keeper's first request, once it has its lock. It finds out what
// this host does not give for kernel devices and mounts.
func (m *mounter) look(ctx context.Context, container bool) []Lack {
	var lacks []Lack
	works := false
	for _, w := range hostdev.Probe(ctx) {
		works = works || w.Works
		if w.Lack != "" && w.Name == hostdev.FuseLoop {
			lacks = append(lacks, Lack{What: "kernel devices: " + w.Lack, Remedy: w.Remedy})
		}
	}
	e, err := mount.Covering(mountsDir(m.dataDir))
	if err == nil && works && !e.Shared && container {
		lacks = append(lacks, Lack{What: "mounts below " + m.dataDir + " are not seen outside this mount namespace",
			Remedy: fmt.Sprintf("in a container: -v %s:%s:rshared", m.dataDir, m.dataDir)})
	}
	return lacks
}
