package hostdev

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
)

// kernel stands in for the kernel's end of /dev/fuse: a packet socket keeps
// requests and replies whole, as the device does.
type kernel struct {
	t      *testing.T
	fd     int
	server *Server

	roomFor int // the payload that fits the socket
}

func startServer(t *testing.T, dev *memory, opts Options) *kernel {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range pair { // only root may have more than the default
		for _, size := range []int{unix.SO_SNDBUFFORCE, unix.SO_RCVBUFFORCE} {
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, size, 4<<20)
		}
	}
	s, err := Serve(dev, pair[1], Params{Minor: protocolMinor, Flags: wantedFlags, MaxWrite: maxWrite}, opts)
	if err != nil {
		t.Fatal(err)
	}
	k := &kernel{t: t, fd: pair[0], server: s}
	if k.roomFor, err = unix.GetsockoptInt(k.fd, unix.SOL_SOCKET, unix.SO_SNDBUF); err != nil {
		t.Fatal(err)
	}
	k.roomFor = k.roomFor/2 - pageSize
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		s.Close(ctx)
		_ = unix.Close(k.fd)
	})
	return k
}

// request puts a request together: header, then arguments and payload.
func message(op opcode, unique uint64, args ...any) []byte {
	var b bytes.Buffer
	b.Write(make([]byte, inHeaderSize))
	for _, a := range args {
		if err := binary.Write(&b, binary.NativeEndian, a); err != nil {
			panic(err)
		}
	}
	m := b.Bytes()
	order.PutUint32(m[0:], uint32(len(m)))
	order.PutUint32(m[4:], uint32(op))
	order.PutUint64(m[8:], unique)
	order.PutUint64(m[16:], rootNode)
	return m
}

type ioArgs struct {
	FH, Offset    uint64
	Size, Flags   uint32
	Owner         uint64
	OFlags, Extra uint32
}

type fallocateArgs struct {
	FH, Offset, Length uint64
	Mode, Extra        uint32
}

func (k *kernel) send(m []byte) {
	k.t.Helper()
	if _, err := unix.Write(k.fd, m); err != nil {
		k.t.Fatalf("send: %v", err)
	}
}

// receive returns one reply: its unique, errno and payload.
func (k *kernel) receive() (unique uint64, errno unix.Errno, payload []byte) {
	k.t.Helper()
	b := make([]byte, 2<<20)
	fds := []unix.PollFd{{Fd: int32(k.fd), Events: unix.POLLIN}}
	for { // the scheduler's own signals end a poll
		n, err := unix.Poll(fds, 10000)
		if n == 1 {
			break
		}
		if !errors.Is(err, unix.EINTR) {
			k.t.Fatalf("no reply: %v", err)
		}
	}
	n, err := unix.Read(k.fd, b)
	if err != nil {
		k.t.Fatalf("receive: %v", err)
	}
	if n < outHeaderSize || int(order.Uint32(b)) != n {
		k.t.Fatalf("reply of %d bytes says %d", n, order.Uint32(b))
	}
	return order.Uint64(b[8:]), unix.Errno(-int32(order.Uint32(b[4:]))), b[outHeaderSize:n]
}

func (k *kernel) ask(m []byte) (unix.Errno, []byte) {
	k.t.Helper()
	k.send(m)
	unique, errno, payload := k.receive()
	if want := order.Uint64(m[8:]); unique != want {
		k.t.Fatalf("reply to %#x, want %#x", unique, want)
	}
	return errno, payload
}

func (k *kernel) want(m []byte, errno unix.Errno) []byte {
	k.t.Helper()
	got, payload := k.ask(m)
	if got != errno {
		k.t.Errorf("%v: got errno %d, want %d", opcode(order.Uint32(m[4:])), got, errno)
	}
	return payload
}

func pattern(n int, from byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = from + byte(i*7)
	}
	return b
}

func TestReadAndWrite(t *testing.T) {
	dev := newMemory(4 << 20)
	k := startServer(t, dev, Options{})
	writes, reads := uint64(0), uint64(0)
	// Both sides of the limit between small and large requests, odd sizes, the
	// last bytes, and the largest that there is.
	for i, c := range []struct{ off, n int }{{0, 4096}, {512, 512}, {1, 3}, {1 << 20, smallPayload}, {1 << 20, smallPayload + 1}, {1 << 20, 128 << 10}, {3 << 20, 1 << 20}} {
		if k.roomFor < c.n {
			t.Logf("%d bytes do not fit this user's socket buffers", c.n)
			continue
		}
		writes, reads = writes+1, reads+1
		data := pattern(c.n, byte(i))
		out := k.want(message(opWrite, uint64(i+1), ioArgs{Offset: uint64(c.off), Size: uint32(c.n)}, data), 0)
		if len(out) != 8 || order.Uint32(out) != uint32(c.n) {
			t.Errorf("write of %d at %d: got reply %x, want its size", c.n, c.off, out)
		}
		if !bytes.Equal(dev.content(c.off, c.off+c.n), data) {
			t.Errorf("write of %d at %d: the device has other bytes", c.n, c.off)
		}
		if got := k.want(message(opRead, uint64(i+1), ioArgs{Offset: uint64(c.off), Size: uint32(c.n)}), 0); !bytes.Equal(got, data) {
			t.Errorf("read of %d at %d: got %d other bytes", c.n, c.off, len(got))
		}
	}
	if got := k.want(message(opRead, 90, ioArgs{Offset: 4<<20 - 10, Size: 4096}), 0); len(got) != 10 {
		t.Errorf("read across the end: got %d bytes, want 10", len(got))
	}
	if got := k.want(message(opRead, 91, ioArgs{Offset: 4 << 20, Size: 4096}), 0); len(got) != 0 {
		t.Errorf("read behind the end: got %d bytes, want none", len(got))
	}
	if got := k.want(message(opRead, 92, ioArgs{Offset: 1<<64 - 1, Size: 4096}), 0); len(got) != 0 {
		t.Errorf("read at the last offset there is: got %d bytes, want none", len(got))
	}
	k.want(message(opWrite, 93, ioArgs{Offset: 4<<20 - 10, Size: 20}, pattern(20, 0)), unix.EINVAL)
	if got := k.server.Stats(); got.Writes != writes+1 || got.Reads != reads+3 || got.Errors != 1 {
		t.Errorf("stats: got %+v, want %d writes, %d reads, 1 error", got, writes+1, reads+3)
	}
}

func TestMalformedRequests(t *testing.T) {
	k := startServer(t, newMemory(1<<20), Options{})
	for name, m := range map[string][]byte{
		"write without arguments":      message(opWrite, 1),
		"write of more than it brings": message(opWrite, 1, ioArgs{Size: 4096}, pattern(512, 0)),
		"write of less than it brings": message(opWrite, 1, ioArgs{Size: 12}, pattern(512, 0)),
		"write at an absurd offset":    message(opWrite, 1, ioArgs{Offset: 1<<64 - 1, Size: 1}, pattern(1, 0)),
		"read without arguments":       message(opRead, 1),
		"read of too much":             message(opRead, 1, ioArgs{Size: maxWrite + 1}),
		"read of 4 GiB":                message(opRead, 1, ioArgs{Size: 1<<32 - 1}),
		"fallocate without arguments":  message(opFallocate, 1),
		"fallocate behind the end":     message(opFallocate, 1, fallocateArgs{Offset: 1 << 20, Length: 1, Mode: fallocPunchHole | fallocKeepSize}),
		"fallocate that overflows":     message(opFallocate, 1, fallocateArgs{Offset: 4096, Length: 1<<64 - 1, Mode: fallocPunchHole | fallocKeepSize}),
		"setattr without arguments":    message(opSetattr, 1),
		"setattr of another size":      message(opSetattr, 1, uint32(fattrSize), uint32(0), uint64(0), uint64(5)),
	} {
		if got, _ := k.ask(m); got != unix.EINVAL {
			t.Errorf("%s: got errno %d, want EINVAL", name, got)
		}
	}
	k.want(message(opFallocate, 1, fallocateArgs{Length: 4096}), unix.EOPNOTSUPP)
	k.want(message(opcode(22), 1), unix.ENOSYS) // GETXATTR: the kernel then stops asking
	k.want(message(opGetattr, 1), 0)            // it still serves
}

// TestShortRequestEndsTheServer: what is no request at all cannot be answered.
func TestShortRequestEndsTheServer(t *testing.T) {
	for name, m := range map[string][]byte{
		"shorter than a header": make([]byte, 39),
		"with a false length":   append(message(opGetattr, 1), 0),
	} {
		k := startServer(t, newMemory(1<<20), Options{})
		k.send(m)
		select {
		case <-k.server.Done():
		case <-time.After(10 * time.Second):
			t.Fatalf("%s: the server goes on", name)
		}
		if k.server.Err() == nil {
			t.Errorf("%s: got no error", name)
		}
	}
}

// TestFlushNeverLies: whatever a flush's error, the loop device must see one
// that it takes for an error: it takes EINVAL for success, and after ENOSYS the
// kernel never flushes again.
func TestFlushNeverLies(t *testing.T) {
	dev := newMemory(1 << 20)
	k := startServer(t, dev, Options{})
	k.want(message(opFsync, 1, uint64(0), uint32(0), uint32(0)), 0)
	k.want(message(opFsync, 2, uint64(0), uint32(1), uint32(0)), 0)
	if got := dev.flushes.Load(); got != 2 {
		t.Errorf("flushes: got %d, want 2", got)
	}
	for _, kind := range []holdfast.Kind{holdfast.ErrInternal, holdfast.ErrInvalid, holdfast.ErrUnsupported, holdfast.ErrNotFound, holdfast.ErrRefused,
		holdfast.ErrUnavailable, holdfast.ErrTimeout, holdfast.ErrFenced, holdfast.ErrIO, holdfast.ErrIntegrity} {
		dev.fail.Store(holdfast.Errorf(kind, "told to"))
		if got, _ := k.ask(message(opFsync, 3, uint64(0), uint32(0), uint32(0))); got != unix.EIO {
			t.Errorf("flush that fails with %s: got errno %d, want EIO", kind, got)
		}
	}
	dev.fail.Store(holdfast.Errorf(holdfast.ErrNoSpace, "told to"))
	k.want(message(opFsync, 4, uint64(0), uint32(0), uint32(0)), unix.ENOSPC)
}

func TestErrnoOfKinds(t *testing.T) {
	dev := newMemory(1 << 20)
	k := startServer(t, dev, Options{})
	for kind, want := range map[holdfast.Kind]unix.Errno{
		holdfast.ErrNoSpace: unix.ENOSPC, holdfast.ErrIO: unix.EIO, holdfast.ErrIntegrity: unix.EIO, holdfast.ErrFenced: unix.ESHUTDOWN,
		holdfast.ErrTimeout: unix.ETIMEDOUT, holdfast.ErrInvalid: unix.EINVAL, holdfast.ErrUnsupported: unix.EOPNOTSUPP, holdfast.ErrUnavailable: unix.EIO,
	} {
		dev.fail.Store(holdfast.Errorf(kind, "told to"))
		for _, m := range [][]byte{
			message(opRead, 1, ioArgs{Size: 4096}), message(opRead, 1, ioArgs{Size: 256 << 10}),
			message(opWrite, 1, ioArgs{Size: 4096}, pattern(4096, 0)),
			message(opFallocate, 1, fallocateArgs{Length: 4096, Mode: fallocPunchHole | fallocKeepSize}),
		} {
			if got, _ := k.ask(m); got != want {
				t.Errorf("%v that fails with %s: got errno %d, want %d", opcode(order.Uint32(m[4:])), kind, got, want)
			}
		}
	}
}

// TestPunchedRangeReadsZero: the kernel zeroes through PUNCH_HOLE as well, so
// the parts of blocks at its edges must become zero, and nothing beside them.
func TestPunchedRangeReadsZero(t *testing.T) {
	for _, c := range []struct {
		off, n        int
		trims, zeroes int64
	}{
		{0, 1 << 20, 1, 0}, {4096, 8192, 1, 0}, {512, 1024, 0, 1}, {512, 4096, 0, 1}, {512, 8192, 1, 2}, {4096, 4608, 1, 1}, {3584, 4608, 1, 1}, {8192, 0, 0, 1},
	} {
		for _, mode := range []uint32{fallocPunchHole | fallocKeepSize, fallocZeroRange, fallocZeroRange | fallocKeepSize} {
			dev := newMemory(1 << 20)
			want := pattern(1<<20, 1)
			copy(dev.bytes, want)
			k := startServer(t, dev, Options{})
			k.want(message(opFallocate, 1, fallocateArgs{Offset: uint64(c.off), Length: uint64(c.n), Mode: mode}), 0)
			clear(want[c.off : c.off+c.n])
			if !bytes.Equal(dev.content(0, len(want)), want) {
				t.Errorf("mode %#x, %d bytes at %d: other bytes than these became zero", mode, c.n, c.off)
			}
			trims, zeroes := c.trims, c.zeroes
			if mode&fallocZeroRange != 0 {
				trims, zeroes = 0, 1
			}
			if dev.trims.Load() != trims || dev.zeroes.Load() != zeroes {
				t.Errorf("mode %#x, %d bytes at %d: got %d trims and %d zeroings, want %d and %d", mode, c.n, c.off, dev.trims.Load(), dev.zeroes.Load(), trims, zeroes)
			}
		}
	}
}

func TestAttributes(t *testing.T) {
	k := startServer(t, newMemory(3<<20), Options{})
	for _, m := range [][]byte{message(opGetattr, 1, uint64(0), uint64(0)), message(opSetattr, 1, uint32(fattrSize), uint32(0), uint64(0), uint64(3<<20)),
		message(opSetattr, 1, uint32(0), uint32(0), uint64(0), uint64(0), make([]byte, 64))} {
		a := k.want(m, 0)
		if len(a) != attrOutSize {
			t.Fatalf("attributes: got %d bytes, want %d", len(a), attrOutSize)
		}
		if ino, size, mode := order.Uint64(a[16:]), order.Uint64(a[24:]), order.Uint32(a[76:]); ino != rootNode || size != 3<<20 || mode != fileMode {
			t.Errorf("attributes: got inode %d, size %d, mode %o, want 1, %d, %o", ino, size, mode, 3<<20, fileMode)
		}
	}
	if s := k.want(message(opStatfs, 1), 0); len(s) != statfsSize || order.Uint32(s[40:]) != holdfast.BlockSize {
		t.Errorf("statfs: got %x, want a block size of 4096", s)
	}
	if o := k.want(message(opOpen, 1, uint64(0)), 0); !bytes.Equal(o, make([]byte, openOutSize)) {
		t.Errorf("open: got %x, want handle 0 without flags", o)
	}
	for _, op := range []opcode{opRelease, opFlush} {
		if out := k.want(message(op, 1, uint64(0)), 0); len(out) != 0 {
			t.Errorf("%v: got %d bytes, want none", op, len(out))
		}
	}
}

// TestNoReply: these have none; a reply would be taken for another request's.
func TestNoReply(t *testing.T) {
	k := startServer(t, newMemory(1<<20), Options{})
	for _, op := range []opcode{opForget, opBatchForget, opInterrupt, opDestroy} {
		k.send(message(op, 7, uint64(1)))
	}
	k.want(message(opGetattr, 8), 0) // checks that its reply is the first
}

// TestResentUnique: bit 63 marks a resent request; the kernel finds it by all
// 64 bits.
func TestResentUnique(t *testing.T) {
	k := startServer(t, newMemory(1<<20), Options{})
	k.want(message(opWrite, 1<<63|42, ioArgs{Size: 512}, pattern(512, 0)), 0)
}

func TestResendIsTheFirstMessage(t *testing.T) {
	k := startServer(t, newMemory(1<<20), Options{Resend: true})
	unique, errno, payload := k.receive()
	if unique != 0 || -int32(errno) != notifyResend || len(payload) != 0 {
		t.Errorf("first message: got unique %d, error %d, %d bytes, want 0, %d, none", unique, -int32(errno), len(payload), notifyResend)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	if _, err := Serve(newMemory(1<<20), pair[1], Params{MaxWrite: maxWrite}, Options{Resend: true}); holdfast.KindOf(err) != holdfast.ErrUnsupported {
		t.Errorf("resend on a kernel without it: got %v, want it refused", err)
	}
}

// TestManyInFlight holds more requests than there are slabs: the server stops
// reading, and goes on when they are answered.
func TestManyInFlight(t *testing.T) {
	dev := newMemory(1 << 20)
	hold := make(chan struct{})
	dev.hold.Store(&hold)
	k := startServer(t, dev, Options{})
	const n = maxSmallSlabs + 50
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		for i := range n {
			_, _ = unix.Write(k.fd, message(opWrite, uint64(i+1), ioArgs{Offset: uint64(i) * 4096 % (1 << 20), Size: 4096}, pattern(4096, byte(i))))
		}
	}()
	for dev.held.Load() < maxSmallSlabs {
		time.Sleep(time.Millisecond)
	}
	if got := dev.writes.Load(); got != maxSmallSlabs {
		t.Errorf("requests at the device: got %d, want %d", got, maxSmallSlabs)
	}
	close(hold)
	seen := make(map[uint64]bool)
	for range n {
		unique, errno, _ := k.receive()
		if errno != 0 || seen[unique] {
			t.Fatalf("reply %d: errno %d, seen before: %v", unique, errno, seen[unique])
		}
		seen[unique] = true
	}
	<-sent
}

// TestCloseLeavesRequestsUnanswered: what Close cancels must stay with the
// kernel, for the next server, and not become an application's error.
func TestCloseLeavesRequestsUnanswered(t *testing.T) {
	dev := newMemory(1 << 20)
	hold := make(chan struct{})
	dev.hold.Store(&hold)
	k := startServer(t, dev, Options{})
	k.send(message(opWrite, 1, ioArgs{Size: 4096}, pattern(4096, 0)))
	k.send(message(opFsync, 2, uint64(0), uint32(0), uint32(0)))
	for dev.held.Load() < 2 {
		time.Sleep(time.Millisecond)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	k.server.Close(ctx)
	k.server.Close(ctx) // once more is harmless
	b := make([]byte, 64)
	if n, err := unix.Read(k.fd, b); n != 0 || err != nil {
		t.Errorf("after Close: got %d bytes (%x), %v, want the end without a reply", n, b[:max(n, 0)], err)
	}
}

// TestCloseWaits: a request in flight is answered when it ends in time.
func TestCloseWaits(t *testing.T) {
	dev := newMemory(1 << 20)
	hold := make(chan struct{})
	dev.hold.Store(&hold)
	k := startServer(t, dev, Options{})
	k.send(message(opWrite, 1, ioArgs{Size: 4096}, pattern(4096, 0)))
	for dev.held.Load() < 1 {
		time.Sleep(time.Millisecond)
	}
	closed := make(chan struct{})
	go func() { k.server.Close(context.Background()); close(closed) }()
	<-k.server.Done()
	close(hold)
	<-closed
	if _, errno, _ := k.receive(); errno != 0 {
		t.Errorf("errno %d, want the write answered", errno)
	}
}

func FuzzRequest(f *testing.F) {
	f.Add(message(opRead, 1, ioArgs{Size: 4096}))
	f.Add(message(opWrite, 1, ioArgs{Size: 16}, pattern(16, 0)))
	f.Add(message(opFallocate, 1, fallocateArgs{Length: 4096, Mode: 3}))
	f.Add(message(opSetattr, 1, uint32(8), uint32(0), uint64(0), uint64(1)))
	f.Add(message(opGetattr, 1<<63))
	dev := newMemory(1 << 20)
	f.Fuzz(func(t *testing.T, m []byte) {
		if len(m) > requestHead+smallPayload {
			return
		}
		h, err := parseInHeader(m)
		if err != nil {
			return
		}
		s := &Server{dev: dev, ctx: context.Background()}
		w := &slab{mem: make([]byte, pageSize+smallPayload)}
		copy(w.request(), m)
		if n, err := s.serve(h, w, len(m)); err == nil && (n < 0 || n > smallPayload) {
			t.Errorf("reply of %d bytes", n)
		}
	})
}
