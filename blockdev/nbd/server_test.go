package nbd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev"
	"github.com/holdfast-storage/holdfast/blockdev/blockdevtest"
)

// TestConformance runs the suite of every Device through the protocol.
func TestConformance(t *testing.T) {
	for _, structured := range []bool{false, true} {
		t.Run(fmt.Sprintf("structured=%v", structured), func(t *testing.T) {
			blockdevtest.Run(t, func(t *testing.T) blockdev.Device {
				return connect(t, serving(t, Options{}, blockdevtest.NewMemory(2<<20)), structured)
			})
		})
	}
}

// everything matches every call.
func everything(blockdevtest.Call) bool { return true }

func writes(c blockdevtest.Call) bool { return c.Method == blockdevtest.Write }

// TestRepliesInAnyOrder: a request that takes long holds up no other.
func TestRepliesInAnyOrder(t *testing.T) {
	dev, gate := blockdevtest.Gated(blockdevtest.NewMemory(1<<20), everything)
	c := connect(t, serving(t, Options{}, dev), true)
	const n = 20
	var results [n]chan error
	for i := range results {
		results[i] = c.start(cmdWrite, 0, int64(i)*512, 512, make([]byte, 512))
	}
	held := make(map[int64]*blockdevtest.Held)
	for range results {
		h := gate.Next()
		held[h.Off/512] = h
	}
	for i := n - 1; i >= 0; i-- {
		held[int64(i)].Let(nil)
		if err := <-results[i]; err != nil {
			t.Errorf("write %d: %v, want nil", i, err)
		}
		for j := range i {
			select {
			case err := <-results[j]:
				t.Errorf("write %d was answered (%v) while the device held it", j, err)
			default:
			}
		}
	}
}

// TestInFlightIsBounded: no more than the bound reach the device, and all do
// in the end.
func TestInFlightIsBounded(t *testing.T) {
	const bound, total = 3, 10
	inner, gate := blockdevtest.Gated(blockdevtest.NewMemory(1<<20), everything)
	counted := blockdevtest.NewCounted(inner)
	c := connect(t, serving(t, Options{InFlight: bound}, counted), false)
	var results []chan error
	for i := range total {
		results = append(results, c.start(cmdRead, 0, int64(i)*4096, 4096, make([]byte, 4096)))
	}
	for range total {
		gate.Next().Let(nil)
	}
	for i, r := range results {
		if err := <-r; err != nil {
			t.Errorf("read %d: %v, want nil", i, err)
		}
	}
	if n := counted.Counts(); n.Most > bound || n.Calls[blockdevtest.Read] != total {
		t.Errorf("the device saw %d reads, at most %d at once, want %d and %d", n.Calls[blockdevtest.Read], n.Most, total, bound)
	}
}

// TestPayloadMemoryIsBounded: two connections share the budget, and the one
// that finds it used up waits.
func TestPayloadMemoryIsBounded(t *testing.T) {
	inner, gate := blockdevtest.Gated(blockdevtest.NewMemory(maxPayload), everything)
	counted := blockdevtest.NewCounted(inner)
	s := serving(t, Options{PayloadBytes: maxPayload}, counted)
	a, b := connect(t, s, true), connect(t, s, false)
	ra := a.start(cmdRead, 0, 0, maxPayload, make([]byte, maxPayload))
	first := gate.Next()
	rb := b.start(cmdRead, 0, 0, maxPayload, make([]byte, maxPayload))
	// A flush needs no memory; once it is through a, only memory holds b up.
	rf := a.start(cmdFlush, 0, 0, 0, nil)
	gate.Next().Let(nil)
	if err := <-rf; err != nil {
		t.Fatalf("flush beside a large read: %v", err)
	}
	if n := counted.Counts(); n.Calls[blockdevtest.Read] != 1 {
		t.Errorf("%d reads reached the device, want 1 while memory is used up", n.Calls[blockdevtest.Read])
	}
	first.Let(nil)
	gate.Next().Let(nil)
	for i, r := range []chan error{ra, rb} {
		if err := <-r; err != nil {
			t.Errorf("read %d: %v, want nil", i, err)
		}
	}
	if n := counted.Counts(); n.Most > 2 {
		t.Errorf("%d requests were at the device at once, want at most a read and a flush", n.Most)
	}
}

// TestErrorsOnTheWire: the kind of a device's error becomes the protocol's
// number, in both forms of replies, and the connection lives on.
func TestErrorsOnTheWire(t *testing.T) {
	for _, structured := range []bool{false, true} {
		for _, e := range []struct {
			err  error
			want syscall.Errno
		}{
			{holdfast.ErrInvalid, syscall.EINVAL}, {holdfast.ErrNoSpace, syscall.ENOSPC}, {holdfast.ErrFenced, syscall.ESHUTDOWN},
			{holdfast.ErrIO, syscall.EIO}, {holdfast.ErrIntegrity, syscall.EIO}, {holdfast.ErrTimeout, syscall.EIO},
			{holdfast.ErrUnavailable, syscall.EIO}, {holdfast.ErrRefused, syscall.EPERM}, {holdfast.ErrUnsupported, syscall.ENOTSUP},
			{syscall.ENOMEM, syscall.ENOMEM}, {syscall.EOVERFLOW, syscall.EOVERFLOW}, {syscall.EDQUOT, syscall.ENOSPC},
			{syscall.ENOENT, syscall.EIO}, {errors.New("odd"), syscall.EIO},
			{holdfast.Errorf(holdfast.ErrIO, "%s", bytes.Repeat([]byte("ä"), 5000)), syscall.EIO},
		} {
			dev := blockdevtest.Hooked(blockdevtest.NewMemory(1<<20), func(_ context.Context, c blockdevtest.Call) error {
				if c.Nth == 1 {
					return e.err
				}
				return nil
			})
			c := connect(t, serving(t, Options{}, dev), structured)
			for _, r := range []struct {
				cmd  command
				n    int64
				data []byte
			}{{cmdRead, 512, make([]byte, 512)}, {cmdWrite, 512, make([]byte, 512)}, {cmdFlush, 0, nil}, {cmdTrim, 4096, nil}, {cmdWriteZeroes, 4096, nil}} {
				if err := <-c.start(r.cmd, 0, 0, r.n, r.data); err != e.want {
					t.Errorf("structured=%v: %v that the device fails with %.40v is answered %v, want %v", structured, r.cmd, e.err, err, e.want)
				}
				if err := <-c.start(r.cmd, 0, 0, r.n, r.data); err != nil {
					t.Errorf("structured=%v: %v after the one that failed: %v, want nil", structured, r.cmd, err)
				}
			}
		}
	}
}

// TestShortWriteIsNotAcknowledged: a device that wrote a part and failed has
// failed.
func TestShortWriteIsNotAcknowledged(t *testing.T) {
	dev := blockdevtest.Short(blockdevtest.NewMemory(1<<20), 1, 1024, holdfast.ErrIO)
	c := connect(t, serving(t, Options{}, dev), true)
	if err := <-c.start(cmdWrite, 0, 0, 4096, make([]byte, 4096)); err != syscall.EIO {
		t.Errorf("torn write: %v, want %v", err, syscall.EIO)
	}
}

// TestFlagsReachTheDevice: fua and no-hole arrive, and only where they were set.
func TestFlagsReachTheDevice(t *testing.T) {
	calls := make(chan blockdevtest.Call, 1)
	dev := blockdevtest.Hooked(blockdevtest.NewMemory(1<<20), func(_ context.Context, c blockdevtest.Call) error {
		calls <- c
		return nil
	})
	c := connect(t, serving(t, Options{}, dev), true)
	for _, r := range []struct {
		cmd   command
		flags uint16
		want  blockdevtest.Call
	}{
		{cmdWrite, 0, blockdevtest.Call{Method: blockdevtest.Write}},
		{cmdWrite, cmdFlagFUA, blockdevtest.Call{Method: blockdevtest.Write, FUA: true}},
		{cmdTrim, 0, blockdevtest.Call{Method: blockdevtest.Trim}},
		{cmdTrim, cmdFlagFUA, blockdevtest.Call{Method: blockdevtest.Trim, FUA: true}},
		{cmdWriteZeroes, 0, blockdevtest.Call{Method: blockdevtest.Zeroes}},
		{cmdWriteZeroes, cmdFlagFUA, blockdevtest.Call{Method: blockdevtest.Zeroes, FUA: true}},
		{cmdWriteZeroes, cmdFlagNoHole, blockdevtest.Call{Method: blockdevtest.Zeroes, NoHole: true}},
		{cmdWriteZeroes, cmdFlagNoHole | cmdFlagFUA, blockdevtest.Call{Method: blockdevtest.Zeroes, NoHole: true, FUA: true}},
	} {
		if err := <-c.start(r.cmd, r.flags, 8192, 4096, make([]byte, 4096)); err != nil {
			t.Fatal(err)
		}
		got := <-calls
		r.want.Off, r.want.Len, r.want.Nth = 8192, 4096, got.Nth
		if got != r.want {
			t.Errorf("%v with flags %#x: the device got %+v, want %+v", r.cmd, r.flags, got, r.want)
		}
	}
}

func TestExports(t *testing.T) {
	ctx := context.Background()
	mem := blockdevtest.NewMemory(1 << 20)
	s := serving(t, Options{}, mem)
	for _, e := range []struct {
		export Export
		want   error
	}{
		{Export{Name: "vol", Device: mem}, holdfast.ErrExists},
		{Export{Name: "none"}, holdfast.ErrInvalid},
		{Export{Name: string(make([]byte, 4097)), Device: mem}, holdfast.ErrInvalid},
		{Export{Name: string(make([]byte, 4096)), Device: mem}, nil},
		{Export{Name: "", Device: mem}, nil},
	} {
		if err := s.AddExport(e.export); !errors.Is(err, e.want) {
			t.Errorf("AddExport(name of %d bytes): %v, want %v", len(e.export.Name), err, e.want)
		}
	}
	if got, want := fmt.Sprintf("%d", len(s.Exports())), "3"; got != want {
		t.Errorf("Exports() has %s names, want %s", got, want)
	}
	if err := s.RemoveExport(ctx, "none", false); !errors.Is(err, holdfast.ErrNotFound) {
		t.Errorf("RemoveExport of what is not there: %v, want kind %v", err, holdfast.ErrNotFound)
	}
	if n := len(s.Clients("vol")); n != 0 {
		t.Errorf("%d clients before any connected", n)
	}
	c := connect(t, s, true)
	clients := s.Clients("vol")
	if want := fmt.Sprintf("pid %d uid %d", syscall.Getpid(), syscall.Getuid()); len(clients) != 1 || clients[0].Name != want {
		t.Errorf("Clients() = %v, want one, %s", clients, want)
	}
	if err := s.RemoveExport(ctx, "vol", false); !errors.Is(err, holdfast.ErrRefused) {
		t.Errorf("RemoveExport with a client: %v, want kind %v", err, holdfast.ErrRefused)
	}
	if err := <-c.start(cmdFlush, 0, 0, 0, nil); err != nil {
		t.Errorf("flush after a refused removal: %v, want nil", err)
	}
	if err := s.RemoveExport(ctx, "vol", true); err != nil {
		t.Errorf("RemoveExport with force: %v, want nil", err)
	}
	if err := <-c.start(cmdFlush, 0, 0, 0, nil); err == nil {
		t.Errorf("flush after the export was removed succeeded")
	}
	if n := len(s.Clients("vol")); n != 0 {
		t.Errorf("%d clients after the export was removed", n)
	}
	if err := s.AddExport(Export{Name: "vol", Device: mem}); err != nil {
		t.Errorf("AddExport under a name that is free again: %v", err)
	}
	s.Close()
	if err := s.AddExport(Export{Name: "late", Device: mem}); !errors.Is(err, holdfast.ErrUnavailable) {
		t.Errorf("AddExport to a closed server: %v, want kind %v", err, holdfast.ErrUnavailable)
	}
}

// TestRemoveExportWaits: with force it returns only when the device has
// returned every request, which are cancelled to that end.
func TestRemoveExportWaits(t *testing.T) {
	arrived, cancelled, release := make(chan struct{}), make(chan struct{}), make(chan struct{})
	dev := blockdevtest.Hooked(blockdevtest.NewMemory(1<<20), func(ctx context.Context, _ blockdevtest.Call) error {
		close(arrived)
		<-ctx.Done()
		close(cancelled)
		<-release
		return ctx.Err()
	})
	s := serving(t, Options{}, dev)
	c := connect(t, s, true)
	result := c.start(cmdWrite, 0, 0, 512, make([]byte, 512))
	<-arrived
	ctx, cancel := context.WithCancel(context.Background())
	first := make(chan error)
	go func() { first <- s.RemoveExport(ctx, "vol", true) }()
	<-cancelled
	select {
	case err := <-first:
		t.Fatalf("RemoveExport returned %v while a request was in the device", err)
	default:
	}
	cancel()
	if err := <-first; !errors.Is(err, holdfast.ErrTimeout) {
		t.Errorf("RemoveExport with its context ended: %v, want kind %v", err, holdfast.ErrTimeout)
	}
	close(release)
	if err := <-result; err == nil {
		t.Errorf("the write succeeded although its export was removed")
	}
}

// TestShutdown: requests in flight are finished and answered, later ones are
// not read.
func TestShutdown(t *testing.T) {
	dev, gate := blockdevtest.Gated(blockdevtest.NewMemory(1<<20), everything)
	s := serving(t, Options{}, dev)
	c := connect(t, s, true)
	idle := connect(t, s, true)
	result := c.start(cmdWrite, 0, 0, 512, make([]byte, 512))
	held := gate.Next()
	down := make(chan error)
	go func() { down <- s.Shutdown(context.Background()) }()
	<-idle.closed() // so the reader of c has been told, too, or will be before it reads
	select {
	case err := <-down:
		t.Fatalf("Shutdown returned %v with a request in the device", err)
	default:
	}
	held.Let(nil)
	if err := <-result; err != nil {
		t.Errorf("the write in flight: %v, want nil", err)
	}
	if err := <-down; err != nil {
		t.Errorf("Shutdown: %v, want nil", err)
	}
	if err := <-c.start(cmdFlush, 0, 0, 0, nil); err == nil {
		t.Errorf("a flush after Shutdown succeeded")
	}
}

// TestShutdownGivesUp: a device that hangs does not hold up a daemon for ever.
func TestShutdownGivesUp(t *testing.T) {
	dev, gate := blockdevtest.Gated(blockdevtest.NewMemory(1<<20), everything)
	s := serving(t, Options{}, dev)
	c := connect(t, s, true)
	result := c.start(cmdWrite, 0, 0, 512, make([]byte, 512))
	gate.Next() // never let through; only its context ends it
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.Shutdown(ctx); !errors.Is(err, holdfast.ErrTimeout) {
		t.Errorf("Shutdown with its context ended: %v, want kind %v", err, holdfast.ErrTimeout)
	}
	if err := <-result; err == nil {
		t.Errorf("the write succeeded although it was cancelled")
	}
}

// closed returns a channel that is closed when the server has closed the
// connection.
func (c *testClient) closed() <-chan struct{} {
	ch := make(chan struct{})
	p := &pendingRequest{done: make(chan error, 1)}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		close(ch)
		return ch
	}
	c.pending[0] = p // no request has handle 0
	go func() {
		<-p.done
		close(ch)
	}()
	return ch
}

// TestConnectionsAreBounded: one too many is closed at once, the others stay.
func TestConnectionsAreBounded(t *testing.T) {
	s := serving(t, Options{Connections: 2}, blockdevtest.NewMemory(1<<20))
	a, b := connect(t, s, true), connect(t, s, true)
	client, server := pair(t)
	s.ServeConn(context.Background(), server)
	if n, err := client.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the third connection read %d bytes, %v, want %v", n, err, io.EOF)
	}
	for i, c := range []*testClient{a, b} {
		if err := c.Flush(context.Background()); err != nil {
			t.Errorf("flush on connection %d: %v, want nil", i, err)
		}
	}
}

// TestHandshakeTimeout: a client that is silent, at whatever point of the
// handshake, or dribbles, is closed when the time is up and not before.
func TestHandshakeTimeout(t *testing.T) {
	for name, talk := range map[string]func(nc net.Conn){
		"silent":      func(net.Conn) {},
		"after flags": func(nc net.Conn) { nc.Write([]byte{0, 0, 0, 3}) },
		"in an option": func(nc net.Conn) {
			nc.Write([]byte{0, 0, 0, 3})
			nc.Write(appendString(nil, "IHAVEOPT"))
		},
		"dribbling": func(nc net.Conn) {
			nc.Write([]byte{0, 0, 0, 3})
			for range 100 {
				time.Sleep(time.Second)
				if sendOption(nc, optSetMetaContext, nil) != nil {
					return
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := serving(t, Options{HandshakeTimeout: 7 * time.Second}, blockdevtest.NewMemory(1<<20))
				client, server := net.Pipe()
				begun := time.Now()
				s.ServeConn(context.Background(), server)
				talked := make(chan struct{})
				go func() {
					defer close(talked)
					talk(client)
				}()
				if _, err := io.Copy(io.Discard, client); err != nil {
					t.Errorf("reading until the server closes: %v", err)
				}
				if took := time.Since(begun); took != 7*time.Second {
					t.Errorf("closed after %v, want 7s", took)
				}
				client.Close()
				<-talked
				s.Close()
			})
		})
	}
}

// TestTransmissionHasNoTimeout: a client may rest for a day.
func TestTransmissionHasNoTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := serving(t, Options{}, blockdevtest.NewMemory(1<<20))
		client, server := net.Pipe()
		s.ServeConn(context.Background(), server)
		c, err := dialExport(client, "vol", true)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(24 * time.Hour)
		if err := c.Flush(context.Background()); err != nil {
			t.Errorf("flush after a day: %v, want nil", err)
		}
		client.Close()
		s.Close()
	})
}

// TestTooManyOptions: haggling without end is ended.
func TestTooManyOptions(t *testing.T) {
	s := serving(t, Options{}, blockdevtest.NewMemory(1<<20))
	client, server := pair(t)
	s.ServeConn(context.Background(), server)
	if err := hello(client); err != nil {
		t.Fatal(err)
	}
	for i := range maxOptions {
		if err := sendOption(client, optStructuredReply, nil); err != nil {
			t.Fatalf("option %d: %v", i, err)
		}
		if rep, _, err := readOptionReply(client); rep != repAck || err != nil {
			t.Fatalf("option %d: %#x, %v", i, uint32(rep), err)
		}
	}
	if n, err := client.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("after %d options the server sent something, want it to close", maxOptions)
	}
}

func TestOptionsValidate(t *testing.T) {
	for _, o := range []Options{{InFlight: -1}, {PayloadBytes: 1}, {PayloadBytes: -1}, {PayloadBytes: maxPayload - 1}, {Connections: -1}, {HandshakeTimeout: -1}, {EntryTimeout: -1}} {
		if _, err := NewServer(o); !errors.Is(err, holdfast.ErrInvalid) {
			t.Errorf("NewServer(%+v): %v, want kind %v", o, err, holdfast.ErrInvalid)
		}
	}
}

// TestServe: several exports and clients on several listeners; Serve ends
// without error on Close and with one when its listener goes away.
func TestServe(t *testing.T) {
	s := serving(t, Options{}, blockdevtest.NewMemory(1<<20))
	results := make(chan error, 3)
	listen := func() net.Listener {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	a, b := listen(), listen()
	go func() { results <- s.Serve(context.Background(), a) }()
	nc, err := net.Dial("tcp", a.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	c, err := dialExport(nc, "vol", true)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := s.Clients("vol")[0].Name, nc.LocalAddr().String(); got != want {
		t.Errorf("the client is called %s, want %s", got, want)
	}
	go func() { results <- s.Serve(context.Background(), b) }()
	b.Close()
	if err := <-results; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Serve of a listener that was closed: %v, want %v", err, net.ErrClosed)
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() { results <- s.Serve(ctx, listen()) }()
	cancel()
	if err := <-results; err != nil {
		t.Errorf("Serve whose context ended: %v, want nil", err)
	}
	if err := c.Flush(context.Background()); err != nil {
		t.Errorf("flush on the first listener: %v, want nil", err)
	}
	s.Close()
	if err := <-results; err != nil {
		t.Errorf("Serve after Close: %v, want nil", err)
	}
	if err := s.Serve(context.Background(), listen()); !errors.Is(err, holdfast.ErrUnavailable) {
		t.Errorf("Serve on a closed server: %v, want kind %v", err, holdfast.ErrUnavailable)
	}
}

// stalledClient enters and asks for a lot, and never takes an answer.
func stalledClient(t *testing.T, s *Server, requests int, length uint32) net.Conn {
	t.Helper()
	nc := pipeTo(s)
	if err := hello(nc); err != nil {
		t.Fatal(err)
	}
	if err := sendOption(nc, optGo, append(appendString(nil, "vol"), 0, 0)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, _, err := readOptionReply(nc); err != nil {
			t.Fatal(err)
		}
	}
	for i := range requests {
		if _, err := nc.Write(appendRequest(nil, request{cmd: cmdRead, handle: uint64(i), length: length})); err != nil {
			t.Fatal(err)
		}
	}
	return nc
}

// TestClientThatTakesNoReplies keeps its connection for as long as it likes,
// unless another connection enters its export: then it is taken for dead.
func TestClientThatTakesNoReplies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := serving(t, Options{InFlight: 8}, blockdevtest.NewMemory(8<<20))
		defer s.Close()
		nc := stalledClient(t, s, 8, 4096)
		defer nc.Close()
		go nc.Write(appendRequest(nil, request{cmd: cmdFlush})) // has no place
		time.Sleep(time.Hour)
		if n := len(s.Clients("vol")); n != 1 {
			t.Fatalf("%d clients after an hour, want 1", n)
		}
		begun := time.Now()
		if c := <-dialing(t, pipeTo(s)); c == nil {
			t.Errorf("the second connection did not get in")
		}
		if took := time.Since(begun); took != stallGrace {
			t.Errorf("the second connection got in after %v, want %v", took, stallGrace)
		}
		synctest.Wait()
		if n := len(s.Clients("vol")); n != 1 {
			t.Errorf("%d clients, want 1: the stalled one closed", n)
		}
	})
}

// TestStalledClientGivesUpMemory: a stalled client may hold memory until others
// need it.
func TestStalledClientGivesUpMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := blockdevtest.NewMemory(maxPayload)
		s := serving(t, Options{PayloadBytes: maxPayload}, mem)
		defer s.Close()
		if err := s.AddExport(Export{Name: "other", Device: mem}); err != nil {
			t.Fatal(err)
		}
		nc := stalledClient(t, s, 1, maxPayload)
		defer nc.Close()
		other, err := dialExport(pipeTo(s), "other", true)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		if n := len(s.Clients("vol")); n != 1 {
			t.Fatalf("%d clients after an hour, want 1", n)
		}
		begun := time.Now()
		if err := other.ReadAt(context.Background(), make([]byte, 4096), 0); err != nil {
			t.Errorf("read beside a client that holds all memory: %v, want nil", err)
		}
		if took := time.Since(begun); took != stallGrace {
			t.Errorf("the read took %v, want %v", took, stallGrace)
		}
	})
}
