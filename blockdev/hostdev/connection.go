package hostdev

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
)

// initWait bounds the wait for the kernel's INIT, which it sends by itself as
// soon as the file system exists.
const initWait = 10 * time.Second

// Connection is a FUSE file system of one regular file, held by the keeper. It
// stands in no mount namespace. It lives as long as somebody holds its file
// (the loop device, in the end) and dies at once when the last descriptor of
// its /dev/fuse is closed. Its methods are not for concurrent use, but for
// Abort, Ended and Dup.
type Connection struct {
	dev    int // /dev/fuse, non-blocking; a plain number, so that the Go poller is not one more waiter on it
	mount  int // the detached mount, an O_PATH descriptor; -1 once released
	params Params
	id     uint64
}

// Connect makes the file system and settles INIT. Only the kernel is asked:
// no server has to run yet. ErrUnsupported says what this host lacks.
func Connect(ctx context.Context) (*Connection, error) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, holdfast.Errorf(holdfast.ErrUnsupported, "open /dev/fuse: %w", err).
			WithRemedy("load the fuse module; in a container, run it --privileged or with --device /dev/fuse and --cap-add SYS_ADMIN")
	}
	c := &Connection{dev: fd, mount: -1}
	if err := c.open(ctx, fd); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func (c *Connection) open(ctx context.Context, fd int) error {
	var err error
	if c.mount, err = mountDetached(fd); err != nil {
		return err
	}
	var st unix.Statx_t
	// DONT_SYNC: the answer must not need a server.
	if err := unix.Statx(c.mount, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, unix.STATX_TYPE, &st); err != nil {
		return holdfast.Errorf(holdfast.ErrInternal, "stat the FUSE file system: %w", err)
	}
	c.id = unix.Mkdev(st.Dev_major, st.Dev_minor)
	return c.init(ctx, fd)
}

// mountDetached makes the file system with the mount API of Linux 5.2, which
// can leave it in no namespace.
func mountDetached(fd int) (int, error) {
	fail := func(step string, err error) error {
		return holdfast.Errorf(holdfast.ErrUnsupported, "make the FUSE file system: %s: %w", step, err).
			WithRemedy("holdfast needs CAP_SYS_ADMIN and Linux 5.8 for kernel devices; export the volume over NBD instead")
	}
	fs, err := unix.Fsopen("fuse", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fail("fsopen", err)
	}
	defer unix.Close(fs)
	for _, kv := range [][2]string{
		{"source", "holdfast"}, {"fd", strconv.Itoa(fd)}, {"rootmode", fmt.Sprintf("%o", fileMode)}, {"user_id", "0"}, {"group_id", "0"},
	} {
		if err := unix.FsconfigSetString(fs, kv[0], kv[1]); err != nil {
			return -1, fail("option "+kv[0], err)
		}
	}
	if err := unix.FsconfigSetFlag(fs, "allow_other"); err != nil {
		return -1, fail("option allow_other", err)
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, fail("create", err)
	}
	m, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return -1, fail("fsmount", err)
	}
	return m, nil
}

// init reads the kernel's INIT and answers it.
func (c *Connection) init(ctx context.Context, fd int) error {
	deadline := time.Now().Add(initWait)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	b := make([]byte, pageSize+maxWrite) // the kernel refuses a smaller buffer than a request may need
	var n int
	for {
		var err error
		if n, err = unix.Read(fd, b); err == nil {
			break
		}
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			return holdfast.Errorf(holdfast.ErrInternal, "read the FUSE INIT: %w", err)
		}
		left := time.Until(deadline)
		if left <= 0 {
			return holdfast.Errorf(holdfast.ErrTimeout, "the kernel sent no FUSE INIT")
		}
		if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1); err != nil && !errors.Is(err, unix.EINTR) {
			return holdfast.Errorf(holdfast.ErrInternal, "wait for the FUSE INIT: %w", err)
		}
	}
	h, err := parseInHeader(b[:n])
	if err != nil {
		return err
	}
	if h.Op != opInit {
		return holdfast.Errorf(holdfast.ErrInternal, "the first FUSE request is %v, not INIT", h.Op)
	}
	in, err := parseInitIn(b[inHeaderSize:n])
	if err != nil {
		return err
	}
	params, out, err := settle(in)
	if err != nil {
		return err
	}
	reply := make([]byte, outHeaderSize+len(out))
	putOutHeader(reply, len(reply), 0, h.Unique)
	copy(reply[outHeaderSize:], out)
	if _, err := unix.Write(fd, reply); err != nil {
		return holdfast.Errorf(holdfast.ErrInternal, "answer the FUSE INIT: %w", err)
	}
	c.params = params
	return nil
}

// Params returns what INIT settled.
func (c *Connection) Params() Params { return c.params }

// ID is the connection's number under /sys/fs/fuse/connections.
func (c *Connection) ID() uint64 { return c.id }

// Dup returns a duplicate of the /dev/fuse descriptor, for a server; the caller
// owns it.
func (c *Connection) Dup() (int, error) {
	fd, err := unix.FcntlInt(uintptr(c.dev), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return -1, holdfast.Errorf(holdfast.ErrInternal, "duplicate the FUSE descriptor: %w", err)
	}
	return fd, nil
}

// Root is the descriptor of the detached mount, for OpenRoot in whatever process
// it is sent to; it stays the Connection's. -1 once released.
func (c *Connection) Root() int { return c.mount }

// OpenRoot opens the one file of the FUSE file system whose detached mount is
// root, for reading and writing. It waits for a server's answer, so one must
// run; an abort ends the wait.
func OpenRoot(root int) (*os.File, error) {
	fd, err := unix.Open("/proc/self/fd/"+strconv.Itoa(root), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, holdfast.Errorf(holdfast.ErrIO, "open the FUSE file: %w", err)
	}
	return os.NewFile(uintptr(fd), "fuse file"), nil
}

// Release gives up the keeper's own reference to the file system; from then on
// it lives through the files that are open in it.
func (c *Connection) Release() {
	if c.mount >= 0 {
		_ = unix.Close(c.mount)
		c.mount = -1
	}
}

// Ended says whether the connection is over: unmounted or aborted.
func (c *Connection) Ended() bool {
	p := []unix.PollFd{{Fd: int32(c.dev), Events: unix.POLLIN}}
	_, err := unix.Poll(p, 0)
	return c.dev < 0 || err == nil && p[0].Revents&(unix.POLLERR|unix.POLLNVAL) != 0
}

// Abort ends the connection whoever still holds its descriptor: every request,
// waiting or to come, fails with an I/O error.
func (c *Connection) Abort() error {
	if c.Ended() {
		return nil
	}
	return abortByID(c.id)
}

// Close releases the file system and closes the keeper's descriptor.
func (c *Connection) Close() {
	c.Release()
	if c.dev >= 0 {
		_ = unix.Close(c.dev)
		c.dev = -1
	}
}

// abortByID writes to the connection's abort file. The fusectl file system is
// opened without being mounted anywhere.
func abortByID(id uint64) error {
	name := filepath.Join(strconv.FormatUint(id, 10), "abort")
	root, err := openDetached("fusectl")
	if err != nil {
		return err
	}
	defer unix.Close(root)
	fd, err := unix.Openat(root, name, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil // gone already
	}
	if err != nil {
		return holdfast.Errorf(holdfast.ErrInternal, "abort FUSE connection %d: %w", id, err)
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	if _, err := io.WriteString(f, "1"); err != nil {
		return holdfast.Errorf(holdfast.ErrInternal, "abort FUSE connection %d: %w", id, err)
	}
	return nil
}

// openDetached opens the root of a file system that takes no options.
func openDetached(kind string) (int, error) {
	fs, err := unix.Fsopen(kind, unix.FSOPEN_CLOEXEC)
	if err == nil {
		defer unix.Close(fs)
		if err = unix.FsconfigCreate(fs); err == nil {
			var m int
			if m, err = unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0); err == nil {
				return m, nil
			}
		}
	}
	return -1, holdfast.Errorf(holdfast.ErrInternal, "open the %s file system: %w", kind, err)
}

// Connections lists the numbers of all FUSE connections of this kernel.
func Connections() ([]uint64, error) {
	root, err := openDetached("fusectl")
	if err != nil {
		return nil, err
	}
	defer unix.Close(root)
	fd, err := unix.Openat(root, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, holdfast.Errorf(holdfast.ErrInternal, "list FUSE connections: %w", err)
	}
	dir := os.NewFile(uintptr(fd), "fusectl")
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, holdfast.Errorf(holdfast.ErrInternal, "list FUSE connections: %w", err)
	}
	var ids []uint64
	for _, name := range names {
		if id, err := strconv.ParseUint(name, 10, 64); err == nil {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// Resend asks the kernel to repeat on this connection what a dead server had
// read and not answered (FUSE_NOTIFY_RESEND: a notification is a reply whose
// unique is zero and whose error is its positive code).
func Resend(fd int, params Params) error {
	if !params.CanResend() {
		return holdfast.Errorf(holdfast.ErrUnsupported, "this kernel cannot repeat the requests of a dead server").
			WithRemedy("Linux 6.9 or later is needed for a device to outlive its daemon")
	}
	b := make([]byte, outHeaderSize)
	putOutHeader(b, len(b), notifyResend, 0)
	for {
		_, err := unix.Write(fd, b)
		switch {
		case err == nil, errors.Is(err, unix.ENODEV): // ended: the reader will see it
			return nil
		case errors.Is(err, unix.EINTR):
		default:
			return holdfast.Errorf(holdfast.ErrInternal, "ask the kernel to resend: %w", err)
		}
	}
}
