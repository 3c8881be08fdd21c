package nbd

import (
	"bytes"
	"context"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast-storage/holdfast/blockdev/blockdevtest"
)

// These tests run in bubbles of virtual time over pipes, which hold no bytes:
// what a client wrote, the server has read. TestEntryCountsUnreadBytes uses a
// socket.

// pipeTo gives the server one end of a pipe.
func pipeTo(s *Server) net.Conn {
	client, server := net.Pipe()
	s.ServeConn(context.Background(), server)
	return client
}

// dialing enters "vol" in the background.
func dialing(t *testing.T, nc net.Conn) chan *testClient {
	entered := make(chan *testClient, 1)
	go func() {
		c, err := dialExport(nc, "vol", true)
		if err != nil {
			close(entered)
			return
		}
		entered <- c
	}()
	return entered
}

// isIn reports whether the connection has entered, once nothing else can happen
// at this time.
func isIn(entered chan *testClient) bool {
	synctest.Wait()
	return len(entered) == 1
}

// TestEntryWaitsForOlderRequests: a second connection gets in when the requests
// that the first had sent before have returned; later ones do not hold it up.
func TestEntryWaitsForOlderRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dev, gate := blockdevtest.Gated(blockdevtest.NewMemory(1<<20), everything)
		s := serving(t, Options{}, dev)
		defer s.Close()
		first := <-dialing(t, pipeTo(s))
		first.start(cmdWrite, 0, 0, 512, make([]byte, 512))
		first.start(cmdWrite, 0, 512, 512, make([]byte, 512))
		a, b := gate.Next(), gate.Next()
		entered := dialing(t, pipeTo(s))
		if isIn(entered) {
			t.Fatalf("entered while two older writes were in the device")
		}
		first.start(cmdWrite, 0, 1024, 512, make([]byte, 512))
		gate.Next() // stays
		b.Let(nil)
		if isIn(entered) {
			t.Fatalf("entered while an older write was in the device")
		}
		a.Let(nil)
		if !isIn(entered) {
			t.Fatalf("not entered although only a later write is in the device")
		}
	})
}

// TestEntryInTurn: three connections that come at once get in one after the
// other, each waiting for all before it.
func TestEntryInTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dev, gate := blockdevtest.Gated(blockdevtest.NewMemory(1<<20), everything)
		s := serving(t, Options{}, dev)
		defer s.Close()
		first := <-dialing(t, pipeTo(s))
		first.start(cmdFlush, 0, 0, 0, nil)
		held := gate.Next()
		second, third := dialing(t, pipeTo(s)), dialing(t, pipeTo(s))
		if isIn(second) || isIn(third) {
			t.Fatalf("entered while an older request was in the device")
		}
		held.Let(nil)
		if !isIn(second) || !isIn(third) {
			t.Fatalf("not entered although nothing is in the device")
		}
		if n := len(s.Clients("vol")); n != 3 {
			t.Errorf("%d clients, want 3", n)
		}
	})
}

// TestEntryCancelsTheDead: requests of a connection whose client hung up are
// cancelled, and waited for, when another enters.
func TestEntryCancelsTheDead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		arrived, cancelled := make(chan struct{}), make(chan struct{})
		dev := blockdevtest.Hooked(blockdevtest.NewMemory(1<<20), func(ctx context.Context, c blockdevtest.Call) error {
			if c.Method != blockdevtest.Write {
				return nil
			}
			close(arrived)
			<-ctx.Done()
			close(cancelled)
			<-release // a device that takes its time to forget
			return ctx.Err()
		})
		s := serving(t, Options{}, dev)
		defer s.Close()
		nc := pipeTo(s)
		first := <-dialing(t, nc)
		first.start(cmdWrite, 0, 0, 512, make([]byte, 512))
		<-arrived
		nc.Close()
		synctest.Wait()
		select {
		case <-cancelled:
			t.Fatalf("the write was cancelled although nobody needs that yet")
		default:
		}
		entered := dialing(t, pipeTo(s))
		<-cancelled
		if isIn(entered) {
			t.Fatalf("entered while a dead client's write was in the device")
		}
		close(release)
		if !isIn(entered) {
			t.Fatalf("not entered although the dead client's write has returned")
		}
	})
}

// TestEntryClosesTheStuck: a connection that rests in the middle of a request
// may be alive for stallGrace; then it is closed, its request discarded.
func TestEntryClosesTheStuck(t *testing.T) {
	for name, part := range map[string][]byte{
		"in a header":  appendRequest(nil, request{cmd: cmdFlush})[:10],
		"in a payload": append(appendRequest(nil, request{cmd: cmdWrite, length: 512}), make([]byte, 511)...),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				counted := blockdevtest.NewCounted(blockdevtest.NewMemory(1 << 20))
				s := serving(t, Options{}, counted)
				defer s.Close()
				nc := pipeTo(s)
				<-dialing(t, nc)
				if _, err := nc.Write(part); err != nil {
					t.Fatal(err)
				}
				begun := time.Now()
				entered := dialing(t, pipeTo(s))
				time.Sleep(stallGrace - time.Nanosecond)
				if isIn(entered) {
					t.Fatalf("entered after %v while a request was incomplete", time.Since(begun))
				}
				time.Sleep(time.Nanosecond)
				if !isIn(entered) {
					t.Fatalf("not entered after %v", time.Since(begun))
				}
				if _, err := nc.Write([]byte{1}); err == nil {
					t.Errorf("the stuck connection takes the rest of its request")
				}
				if n := counted.Counts(); n.Calls[blockdevtest.Write]+n.Calls[blockdevtest.Flush] != 0 {
					t.Errorf("the discarded request reached the device: %+v", n)
				}
			})
		})
	}
}

// TestEntryLetsASlowClientFinish: the rest of the request comes in time; it is
// done before the other enters, and both live.
func TestEntryLetsASlowClientFinish(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := blockdevtest.NewMemory(1 << 20)
		s := serving(t, Options{}, mem)
		defer s.Close()
		nc := pipeTo(s)
		first := <-dialing(t, nc)
		header := appendRequest(nil, request{cmd: cmdWrite, length: 4, handle: 1})
		first.pending[1] = &pendingRequest{done: make(chan error, 1)}
		first.handle = 1
		nc.Write(append(header, 1, 2))
		entered := dialing(t, pipeTo(s))
		if isIn(entered) {
			t.Fatalf("entered while a request was incomplete")
		}
		nc.Write([]byte{3, 4})
		if !isIn(entered) {
			t.Fatalf("not entered although the request was completed")
		}
		got := make([]byte, 4)
		if err := (<-entered).ReadAt(context.Background(), got, 0); err != nil || !bytes.Equal(got, []byte{1, 2, 3, 4}) {
			t.Errorf("the second connection reads %v, %v, want what the first wrote", got, err)
		}
		if err := first.Flush(context.Background()); err != nil {
			t.Errorf("flush on the first connection: %v, want nil", err)
		}
	})
}

// TestEntryTimeout: a device that hangs does not let a connection in, and the
// client is told.
func TestEntryTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dev, gate := blockdevtest.Gated(blockdevtest.NewMemory(1<<20), everything)
		s := serving(t, Options{EntryTimeout: 3 * time.Second}, dev)
		defer s.Close()
		first := <-dialing(t, pipeTo(s))
		first.start(cmdFlush, 0, 0, 0, nil)
		held := gate.Next()
		begun := time.Now()
		_, err := dialExport(pipeTo(s), "vol", true)
		if err == nil || !strings.Contains(err.Error(), "0x80000007") {
			t.Errorf("entering beside a request that hangs: %v, want NBD_REP_ERR_SHUTDOWN", err)
		}
		if took := time.Since(begun); took != 3*time.Second {
			t.Errorf("refused after %v, want 3s", took)
		}
		// What the refused one waited for holds up the next one as well.
		entered := dialing(t, pipeTo(s))
		if isIn(entered) {
			t.Fatalf("entered while an older request was in the device")
		}
		held.Let(nil)
		if !isIn(entered) {
			t.Fatalf("not entered although nothing is in the device")
		}
	})
}

// TestEntryOfRemovedExport: a connection that waits finds its export gone.
func TestEntryOfRemovedExport(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dev, gate := blockdevtest.Gated(blockdevtest.NewMemory(1<<20), everything)
		s := serving(t, Options{}, dev)
		defer s.Close()
		first := <-dialing(t, pipeTo(s))
		first.start(cmdFlush, 0, 0, 0, nil)
		gate.Next()
		entered := dialing(t, pipeTo(s))
		if isIn(entered) {
			t.Fatalf("entered while an older request was in the device")
		}
		if err := s.RemoveExport(context.Background(), "vol", true); err != nil {
			t.Fatal(err)
		}
		if _, in := <-entered; in {
			t.Errorf("entered an export that was removed")
		}
	})
}

// TestEntryCountsUnreadBytes: requests that lie in an old connection's socket,
// not read because the connection has all the requests in flight it may have,
// come before the new connection, although their client is gone.
func TestEntryCountsUnreadBytes(t *testing.T) {
	const n = 8
	dev, gate := blockdevtest.Gated(blockdevtest.NewMemory(1<<20), writes)
	s := serving(t, Options{InFlight: 1}, dev)
	old := connect(t, s, true)
	for i := range n {
		old.start(cmdWrite, 0, 0, 512, bytes.Repeat([]byte{byte(i + 1)}, 512))
	}
	held := gate.Next()
	client, server := pair(t)
	s.ServeConn(context.Background(), server)
	entered := make(chan *testClient)
	go func() {
		c, err := dialExport(client, "vol", true)
		if err != nil {
			t.Error(err)
		}
		entered <- c
	}()
	for i := range n {
		select {
		case <-entered:
			t.Fatalf("entered with %d of %d older writes not done", n-i, n)
		default:
		}
		held.Let(nil)
		if i < n-1 {
			held = gate.Next()
		}
	}
	c := <-entered
	got := make([]byte, 1)
	if err := c.ReadAt(context.Background(), got, 0); err != nil || got[0] != n {
		t.Errorf("the new connection reads %d, %v, want the last of the older writes, %d", got[0], err, n)
	}
}

// TestEntryUnderLoad: connections come and go while others keep the device
// busy; each gets in, and a write acknowledged on a new connection is never
// undone by an older one of the same client.
func TestEntryUnderLoad(t *testing.T) {
	s := serving(t, Options{}, blockdevtest.NewMemory(1<<20))
	stop := make(chan struct{})
	busy := connect(t, s, true)
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				busy.start(cmdWrite, 0, 8192, 4096, make([]byte, 4096))
				_ = busy.Flush(context.Background())
			}
		}
	}()
	ctx := context.Background()
	for i := range 100 {
		old := connect(t, s, i%2 == 0)
		for range 16 {
			old.start(cmdWrite, 0, 0, 4096, bytes.Repeat([]byte{1}, 4096))
		}
		old.nc.Close()
		fresh := connect(t, s, true)
		if err := fresh.WriteAt(ctx, bytes.Repeat([]byte{2}, 4096), 0, false); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 4096)
		if err := fresh.ReadAt(ctx, got, 0); err != nil || got[0] != 2 || got[4095] != 2 {
			t.Fatalf("round %d: a write on the new connection was undone by the old one (%d, %d, %v)", i, got[0], got[4095], err)
		}
		fresh.nc.Close()
	}
	close(stop)
	<-stopped
}
