package keeper

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
)

const (
	// maxConnections bounds the conversations at a time; a daemon needs one.
	maxConnections = 8
	// maxSocketPath is what a socket's address takes (unix(7)), less its final zero.
	maxSocketPath = 107
)

// daemon is the process that serves devices, as it said hello.
type daemon struct {
	*peer
	instance holdfast.InstanceID
}

// listen opens the keeper's socket. The caller holds the lock of the data
// directory, so a socket that is there is a dead keeper's.
func listen(path string) (*net.UnixListener, error) {
	if len(path) > maxSocketPath {
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "the socket path %s has %d bytes; at most %d are possible", path, len(path), maxSocketPath).
			WithRemedy("choose a shorter data directory")
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, holdfast.Errorf(holdfast.ErrIO, "remove the old socket: %w", err)
	}
	// The socket gets its mode before it is reachable under its name.
	temporary := filepath.Join(filepath.Dir(path), ".k")
	_ = os.Remove(temporary)
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: temporary, Net: "unixpacket"})
	if err != nil {
		return nil, holdfast.Errorf(holdfast.ErrIO, "listen on %s: %w", path, err)
	}
	l.SetUnlinkOnClose(false)
	if err := errors.Join(os.Chmod(temporary, 0o600), os.Rename(temporary, path)); err != nil {
		_ = l.Close()
		return nil, holdfast.Errorf(holdfast.ErrIO, "listen on %s: %w", path, err)
	}
	return l, nil
}

// accept serves conversations until the listener is closed.
func (k *keeper) accept(l *net.UnixListener) {
	defer k.work.Done()
	slots := make(chan struct{}, maxConnections)
	for {
		conn, err := l.AcceptUnix()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			k.log.Error("keeper socket", slog.Any("error", err))
			time.Sleep(endPoll) // out of descriptors, most likely: do not spin
			continue
		}
		select {
		case slots <- struct{}{}:
		default:
			_ = conn.Close()
			continue
		}
		k.work.Add(1)
		go func() {
			defer k.work.Done()
			defer func() { <-slots }()
			k.converse(conn)
		}()
	}
}

// converse serves one connection until it ends.
func (k *keeper) converse(conn *net.UnixConn) {
	if !k.track(conn) {
		_ = conn.Close()
		return
	}
	defer k.untrack(conn)
	p := newPackets(conn)
	d, err := k.greet(conn, p)
	if err != nil {
		k.log.Warn("keeper refused a conversation", slog.Any("error", err))
		return
	}
	slots := make(chan struct{}, maxRequests)
	var calls sync.WaitGroup
	defer calls.Wait()
	for {
		var r request
		fd, err := p.receive(&r)
		if fd >= 0 {
			_ = unix.Close(fd) // nobody lends the keeper anything
		}
		if err != nil {
			if !errors.Is(err, io.EOF) {
				k.log.Warn("keeper conversation ended", slog.Any("error", err))
			}
			return
		}
		slots <- struct{}{}
		calls.Add(1)
		go func() {
			defer calls.Done()
			defer func() { <-slots }()
			k.serve(p, d, r)
		}()
	}
}

// greet takes the peer's hello, and the peer for the daemon if there is none
// that lives.
func (k *keeper) greet(conn *net.UnixConn, p *packets) (*daemon, error) {
	_ = conn.SetReadDeadline(time.Now().Add(dialWait))
	var h hello
	fd, err := p.receive(&h)
	if fd >= 0 {
		_ = unix.Close(fd)
	}
	if err != nil {
		return nil, err
	}
	_ = conn.SetReadDeadline(time.Time{})
	d, err := k.admit(conn, h)
	reply := hello{Version: version, Instance: k.instance, Namespace: k.namespace, Mounts: mountsDir(k.opts.DataDir), Lacks: k.lacks, Error: toWire(err)}
	return d, errors.Join(err, p.send(reply, -1))
}

func (k *keeper) admit(conn *net.UnixConn, h hello) (*daemon, error) {
	if h.Version != version {
		return nil, holdfast.Errorf(holdfast.ErrUnsupported, "the daemon speaks version %d, this keeper %d", h.Version, version)
	}
	peer, err := peerOf(conn)
	if err != nil {
		return nil, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if was := k.daemon; was != nil && !was.dead() {
		if was.pid == peer.pid {
			peer.close()
			return was, nil // the same process, once more
		}
		peer.close()
		return nil, holdfast.Errorf(holdfast.ErrRefused, "process %d is this keeper's daemon and lives", was.pid)
	}
	if k.daemon != nil {
		k.past = append(k.past, k.daemon)
	}
	// A dead daemon's pidfd stays open while a device names it as its last user.
	k.past = slices.DeleteFunc(k.past, func(old *daemon) bool {
		for _, d := range k.devices {
			if d.lender == old {
				return false
			}
		}
		old.close()
		return true
	})
	k.daemon = &daemon{peer: peer, instance: h.Instance}
	k.greeted = true
	k.log.Info("daemon arrived", slog.Int("pid", peer.pid), slog.String("instance", h.Instance.String()))
	return k.daemon, nil
}

// serve answers one request.
func (k *keeper) serve(p *packets, d *daemon, r request) {
	ctx, cancel := context.WithTimeout(k.ctx, r.timeout())
	defer cancel()
	answer := response{ID: r.ID}
	fd, err := k.handle(ctx, d, r, &answer)
	answer.Error = toWire(err)
	if err := p.send(answer, fd); err != nil {
		k.log.Debug("answer not sent", slog.String("verb", string(r.Verb)), slog.Any("error", err))
	}
	if fd >= 0 {
		_ = unix.Close(fd)
	}
}

// handle does what a request asks; the descriptor it returns is the caller's.
func (k *keeper) handle(ctx context.Context, from *daemon, r request, a *response) (fd int, err error) {
	switch r.Verb {
	case verbDevices:
		a.Devices, a.More, err = k.list(ctx, r.Page)
		return -1, err
	case verbOpen:
		if r.Spec == nil {
			return -1, malformed(r.Verb)
		}
		fd, a.Params, a.Resend, err = k.lend(ctx, *r.Spec, from)
		return fd, err
	case verbRemovePath:
		return -1, k.removePath(ctx, r.Name)
	case verbClose, verbAbort, verbUnmount:
		d := k.find(r.Volume)
		if d == nil {
			return -1, nil // already as wanted
		}
		switch r.Verb {
		case verbClose:
			err = k.close(ctx, d)
		case verbAbort:
			err = k.abort(ctx, d)
		default:
			err = k.unmount(ctx, d, r.Force)
		}
		if errors.Is(err, holdfast.ErrNotFound) {
			err = nil // another call was faster
		}
		return -1, err
	}
	d, err := k.mustFind(r.Volume)
	if err != nil {
		return -1, err
	}
	a.Text, err = k.handleDevice(ctx, d, r)
	return -1, err
}

// handleDevice does the requests that need a device that is there.
func (k *keeper) handleDevice(ctx context.Context, d *device, r request) (string, error) {
	switch r.Verb {
	case verbLoop:
		return k.configureLoop(ctx, d)
	case verbProbe, verbFormat, verbFsck:
		return k.forward(ctx, d, r)
	case verbMount:
		return k.mount(ctx, d, r)
	}
	return "", malformed(r.Verb)
}

func malformed(v verb) error {
	return holdfast.Errorf(holdfast.ErrInvalid, "malformed keeper request %q", v)
}

// list returns one page of devices, in the order of their names.
func (k *keeper) list(ctx context.Context, page int) (devices []Device, more bool, err error) {
	all := k.all()
	slices.SortFunc(all, func(a, b *device) int { return strings.Compare(a.spec.Name, b.spec.Name) })
	from := min(max(page, 0)*devicesPerPage, len(all))
	to := min(from+devicesPerPage, len(all))
	for _, d := range all[from:to] {
		v, err := k.describe(ctx, d)
		if err != nil {
			return nil, false, err
		}
		devices = append(devices, v)
	}
	return devices, to < len(all), nil
}

// removePath is the verb remove-path.
func (k *keeper) removePath(ctx context.Context, name string) error {
	_, err := k.mounter.call(ctx, request{Verb: verbRemovePath, Name: name}, -1)
	return err
}
