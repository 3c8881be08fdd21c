package keeper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
)

// pair returns both ends of a conversation.
func pair(t *testing.T) (a, b *packets) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*packets
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "")
		conn, err := net.FileConn(f)
		_ = f.Close()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		ends[i] = newPackets(conn.(*net.UnixConn))
	}
	return ends[0], ends[1]
}

func TestPackets(t *testing.T) {
	a, b := pair(t)
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := errors.Join(a.send(request{ID: 1, Verb: verbOpen}, -1), a.send(request{ID: 2}, int(f.Fd()))); err != nil {
		t.Fatal(err)
	}
	var r request
	if fd, err := b.receive(&r); fd != -1 || err != nil || r.ID != 1 || r.Verb != verbOpen {
		t.Errorf("first: got %+v, descriptor %d, %v", r, fd, err)
	}
	fd, err := b.receive(&r)
	if err != nil || fd < 0 || r.ID != 2 {
		t.Fatalf("second: got %+v, descriptor %d, %v", r, fd, err)
	}
	defer unix.Close(fd)
	var x, y unix.Stat_t
	if err := errors.Join(unix.Fstat(fd, &x), unix.Fstat(int(f.Fd()), &y)); err != nil || x.Ino != y.Ino {
		t.Errorf("the descriptor is of another file: %v", err)
	}
	if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Error("the descriptor would be inherited by children")
	}
	_ = a.conn.Close()
	if _, err := b.receive(&r); !errors.Is(err, io.EOF) {
		t.Errorf("after the end: got %v, want EOF", err)
	}
}

// TestPacketsRefuse: what does not fit or is no message ends the conversation,
// and leaks no descriptor.
func TestPacketsRefuse(t *testing.T) {
	if err := func() error { a, _ := pair(t); return a.send(request{Name: strings.Repeat("x", maxMessage)}, -1) }(); !errors.Is(err, holdfast.ErrInvalid) {
		t.Errorf("send of too much: got %v, want it refused", err)
	}
	before := openFiles(t)
	for name, raw := range map[string][]byte{
		"too long":         []byte(`{"name":"` + strings.Repeat("x", maxMessage) + `"}`),
		"no JSON":          []byte("hello"),
		"of another shape": []byte(`{"id":"one"}`),
		"a bad id":         []byte(`{"volume":"1234"}`),
	} {
		a, b := pair(t)
		if _, _, err := a.conn.WriteMsgUnix(raw, unix.UnixRights(0, 1, 2), nil); err != nil {
			t.Fatal(err)
		}
		var r request
		if fd, err := b.receive(&r); fd != -1 || !errors.Is(err, holdfast.ErrInvalid) {
			t.Errorf("%s: got descriptor %d, %v, want it refused", name, fd, err)
		}
		_, _ = a.conn.Close(), b.conn.Close()
	}
	if after := openFiles(t); after > before {
		t.Errorf("descriptors: got %d, want %d", after, before)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

func TestErrorsTravel(t *testing.T) {
	for _, err := range []error{
		holdfast.Errorf(holdfast.ErrRefused, "volume %s is mounted", "x").WithRemedy("unmount it"),
		fmt.Errorf("mount x: %w", holdfast.Errorf(holdfast.ErrIO, "bad").WithRemedy("buy %s", "another")),
		holdfast.Errorf(holdfast.ErrNoSpace, "full"), io.EOF, holdfast.ErrTimeout,
	} {
		got := toWire(err).err()
		if holdfast.KindOf(got) != holdfast.KindOf(err) || holdfast.RemedyOf(got) != holdfast.RemedyOf(err) || got.Error() != err.Error() {
			t.Errorf("got %v (%s), want %v (%s)", got, holdfast.KindOf(got), err, holdfast.KindOf(err))
		}
	}
	if toWire(nil).err() != nil {
		t.Error("nil became an error")
	}
	if w := toWire(holdfast.Errorf(holdfast.ErrIO, "%s", strings.Repeat("x", 1<<20))); len(w.Message) > maxErrorText {
		t.Errorf("message of %d bytes", len(w.Message))
	}
}

func TestValidName(t *testing.T) {
	for name, ok := range map[string]bool{"data": true, "a": true, "A.b_c-9": true, strings.Repeat("x", 128): true,
		"": false, ".": false, "..": false, ".x": false, "-x": false, "a/b": false, "a b": false, "a\x00": false, "é": false, strings.Repeat("x", 129): false, "a\n": false} {
		if err := validName(name); (err == nil) != ok {
			t.Errorf("%q: got %v, want valid %v", name, err, ok)
		}
	}
}

func TestDeviceSpec(t *testing.T) {
	good := volume("data", "ext4", 1<<20).Spec
	if err := good.validate(); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*DeviceSpec){
		"no volume": func(s *DeviceSpec) { s.Volume = holdfast.VolumeID{} }, "no session": func(s *DeviceSpec) { s.Session = holdfast.SessionID{} },
		"no size": func(s *DeviceSpec) { s.Size = 0 }, "negative": func(s *DeviceSpec) { s.Size = -4096 }, "odd size": func(s *DeviceSpec) { s.Size = 4097 },
		"bad name": func(s *DeviceSpec) { s.Name = "../x" },
	} {
		s := good
		change(&s)
		if err := s.validate(); !errors.Is(err, holdfast.ErrInvalid) {
			t.Errorf("%s: got %v, want it refused", name, err)
		}
	}
}

// TestCaller: answers come in any order; late ones leak nothing; the end of the
// peer ends every call.
func TestCaller(t *testing.T) {
	a, b := pair(t)
	c := newCaller("keeper", a)
	go c.receive()
	results := make(chan string, 2)
	for _, v := range []verb{verbProbe, verbFsck} {
		go func() {
			got, err := c.call(t.Context(), request{Verb: v}, -1)
			results <- fmt.Sprintf("%s %s %v", v, got.Text, err)
		}()
	}
	var first, second request
	for _, r := range []*request{&first, &second} {
		if _, err := b.receive(r); err != nil {
			t.Fatal(err)
		}
		if r.timeout() <= 0 || r.timeout() > defaultTimeout {
			t.Errorf("timeout: got %v", r.timeout())
		}
	}
	for _, r := range []request{second, first} {
		if err := b.send(response{ID: r.ID, Text: "to " + string(r.Verb)}, -1); err != nil {
			t.Fatal(err)
		}
		if got, want := <-results, fmt.Sprintf("%s to %s <nil>", r.Verb, r.Verb); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
	before := openFiles(t)
	ctx, cancel := context.WithCancel(t.Context())
	gaveUp := make(chan error, 1)
	go func() { _, err := c.call(ctx, request{Verb: verbOpen}, -1); gaveUp <- err }()
	if _, err := b.receive(&first); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-gaveUp; !errors.Is(err, holdfast.ErrTimeout) {
		t.Errorf("cancelled: got %v, want a timeout", err)
	}
	for _, id := range []uint64{first.ID, 999} { // late, and never asked for
		if err := b.send(response{ID: id}, 0); err != nil {
			t.Fatal(err)
		}
	}
	last := make(chan error, 1)
	go func() { _, err := c.call(t.Context(), request{Verb: verbMount}, -1); last <- err }()
	if _, err := b.receive(&first); err != nil { // the answers before it were read
		t.Fatal(err)
	}
	_ = b.conn.Close()
	if err := <-last; !errors.Is(err, holdfast.ErrUnavailable) {
		t.Errorf("call when the keeper dies: got %v, want unavailable", err)
	}
	<-c.done
	if _, err := c.call(t.Context(), request{}, -1); !errors.Is(err, holdfast.ErrUnavailable) {
		t.Errorf("call after the keeper died: got %v, want unavailable", err)
	}
	if after := openFiles(t); after > before {
		t.Errorf("descriptors: got %d, want at most %d", after, before)
	}
}

func TestIsolateRefusesTheSameNamespace(t *testing.T) {
	own, err := mountNamespace()
	if err != nil {
		t.Fatal(err)
	}
	if err := isolate(own, "/nowhere", nil); !errors.Is(err, holdfast.ErrRefused) {
		t.Errorf("got %v, want it refused", err)
	}
}

func TestRunRefusesBadOptions(t *testing.T) {
	for name, o := range map[string]Options{"a relative directory": {DataDir: "data", Command: []string{"x"}}, "no command": {DataDir: "/tmp"}} {
		if code, err := Run(t.Context(), o); code != 2 || !errors.Is(err, holdfast.ErrInvalid) {
			t.Errorf("%s: got %d, %v, want 2 and a reason", name, code, err)
		}
	}
}

func TestSocketPathTooLong(t *testing.T) {
	_, err := listen("/" + strings.Repeat("x", 120) + "/keeper.sock")
	if !errors.Is(err, holdfast.ErrInvalid) || !strings.Contains(err.Error(), "107") {
		t.Errorf("got %v, want it refused with the limit", err)
	}
}

func TestDialWithoutKeeper(t *testing.T) {
	if _, err := Dial(t.Context(), t.TempDir(), DialOptions{}); !errors.Is(err, holdfast.ErrUnavailable) {
		t.Errorf("got %v, want unavailable", err)
	}
}

// TestPeerDies: a pidfd tells a dead process from a living one.
func TestPeerDies(t *testing.T) {
	l, err := listen(t.TempDir() + "/keeper.sock")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	st, err := os.Stat(l.Addr().String())
	if err == nil && st.Mode().Perm() != 0o600 {
		t.Errorf("socket mode: got %v, want 0600", st.Mode())
	}
	c, err := net.Dial("unixpacket", strings.TrimSuffix(l.Addr().String(), ".k")+"keeper.sock")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	p, err := peerOf(s)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	if p.pid != os.Getpid() || p.dead() {
		t.Errorf("peer: got pid %d, dead %v, want %d, alive", p.pid, p.dead(), os.Getpid())
	}
}

func FuzzRequestMessage(f *testing.F) {
	f.Add([]byte(`{"id":1,"verb":"open","timeout_ms":1,"spec":{"volume":"1b4e28ba-2fa1-41d2-883f-0016d3cca427","name":"x","size":4096}}`))
	f.Add([]byte(`{"version":1,"instance":"1b4e28ba-2fa1-41d2-883f-0016d3cca427"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var r request
		if decode(b, &r) == nil {
			if d := r.timeout(); d < 0 || d > maxTimeout {
				t.Errorf("timeout %v", d)
			}
			if r.Spec != nil {
				_ = r.Spec.validate()
			}
		}
		var h hello
		_ = decode(b, &h)
	})
}
