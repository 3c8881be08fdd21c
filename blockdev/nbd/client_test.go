package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"

	"github.com/holdfast-storage/holdfast/blockdev"
)

// testClient speaks NBD from the other side. It is a blockdev.Device, so the
// conformance suite can run through the protocol. It ignores contexts: a
// request that is sent is waited for.
type testClient struct {
	nc         net.Conn
	size       int64
	structured bool

	mu      sync.Mutex
	handle  uint64
	pending map[uint64]*pendingRequest
	err     error // why the connection is of no use any more
}

type pendingRequest struct {
	data []byte // where a READ's data goes
	done chan error
}

// option sends one option.
func sendOption(nc net.Conn, opt option, data []byte) error {
	b := binary.BigEndian.AppendUint64(nil, magicOption)
	b = binary.BigEndian.AppendUint32(b, uint32(opt))
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	_, err := nc.Write(append(b, data...))
	return err
}

// readOptionReply reads one reply to an option.
func readOptionReply(nc net.Conn) (optReply, []byte, error) {
	var header [20]byte
	if _, err := io.ReadFull(nc, header[:]); err != nil {
		return 0, nil, err
	}
	if binary.BigEndian.Uint64(header[:]) != magicOptReply {
		return 0, nil, fmt.Errorf("option reply magic % x", header[:8])
	}
	data := make([]byte, binary.BigEndian.Uint32(header[16:]))
	_, err := io.ReadFull(nc, data)
	return optReply(binary.BigEndian.Uint32(header[12:])), data, err
}

// hello does the handshake up to the options.
func hello(nc net.Conn) error {
	var b [18]byte
	if _, err := io.ReadFull(nc, b[:]); err != nil {
		return err
	}
	_, err := nc.Write([]byte{0, 0, 0, 3})
	return err
}

// dialExport enters transmission on an open connection.
func dialExport(nc net.Conn, name string, structured bool) (*testClient, error) {
	c := &testClient{nc: nc, structured: structured, pending: make(map[uint64]*pendingRequest)}
	if err := hello(nc); err != nil {
		return nil, err
	}
	if structured {
		if err := sendOption(nc, optStructuredReply, nil); err != nil {
			return nil, err
		}
		if rep, _, err := readOptionReply(nc); err != nil || rep != repAck {
			return nil, fmt.Errorf("STRUCTURED_REPLY: %#x, %v", uint32(rep), err)
		}
	}
	if err := sendOption(nc, optGo, append(appendString(nil, name), 0, 0)); err != nil {
		return nil, err
	}
	for {
		rep, data, err := readOptionReply(nc)
		switch {
		case err != nil:
			return nil, err
		case rep == repInfo:
			c.size = int64(binary.BigEndian.Uint64(data[2:]))
		case rep == repAck:
			go c.receive()
			return c, nil
		default:
			return nil, fmt.Errorf("GO: %#x %s", uint32(rep), data)
		}
	}
}

// start sends a request; the channel gets its result.
func (c *testClient) start(cmd command, flags uint16, off, n int64, data []byte) chan error {
	p := &pendingRequest{done: make(chan error, 1)}
	if cmd == cmdRead {
		p.data = data
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		p.done <- c.err
		return p.done
	}
	c.handle++
	c.pending[c.handle] = p
	b := appendRequest(nil, request{flags: flags, cmd: cmd, handle: c.handle, offset: uint64(off), length: uint32(n)})
	if cmd == cmdWrite {
		b = append(b, data...)
	}
	if _, err := c.nc.Write(b); err != nil {
		delete(c.pending, c.handle)
		p.done <- err
	}
	return p.done
}

// appendRequest is the opposite of decodeRequest.
func appendRequest(b []byte, r request) []byte {
	b = binary.BigEndian.AppendUint32(b, magicRequest)
	b = binary.BigEndian.AppendUint16(b, r.flags)
	b = binary.BigEndian.AppendUint16(b, uint16(r.cmd))
	b = binary.BigEndian.AppendUint64(b, r.handle)
	b = binary.BigEndian.AppendUint64(b, r.offset)
	return binary.BigEndian.AppendUint32(b, r.length)
}

// receive hands replies to those who wait for them.
func (c *testClient) receive() {
	for {
		err := c.receiveOne()
		if err == nil {
			continue
		}
		c.mu.Lock()
		c.err = err
		for h, p := range c.pending {
			delete(c.pending, h)
			p.done <- err
		}
		c.mu.Unlock()
		return
	}
}

// receiveOne reads one reply of either form.
func (c *testClient) receiveOne() error {
	be := binary.BigEndian
	var h [28]byte
	if _, err := io.ReadFull(c.nc, h[:16]); err != nil {
		return err
	}
	switch be.Uint32(h[:]) {
	case magicSimple:
		p, err := c.take(be.Uint64(h[8:]))
		if err != nil {
			return err
		}
		if e := be.Uint32(h[4:]); e != 0 {
			p.done <- syscall.Errno(e)
			return nil
		}
		if p.data != nil && c.structured {
			return errors.New("simple reply to a READ with structured replies")
		}
		_, err = io.ReadFull(c.nc, p.data)
		p.done <- err
		return err
	case magicStructured:
		if _, err := io.ReadFull(c.nc, h[16:20]); err != nil {
			return err
		}
		payload := make([]byte, be.Uint32(h[16:]))
		if _, err := io.ReadFull(c.nc, payload); err != nil {
			return err
		}
		p, err := c.take(be.Uint64(h[8:]))
		if err != nil {
			return err
		}
		switch flags, typ := be.Uint16(h[4:]), be.Uint16(h[6:]); {
		case flags != replyFlagDone:
			return fmt.Errorf("chunk flags %#x", flags)
		case typ == replyTypeError:
			if len(payload) < 6 || int(be.Uint16(payload[4:])) != len(payload)-6 {
				return fmt.Errorf("error chunk % x", payload)
			}
			p.done <- syscall.Errno(be.Uint32(payload))
		case typ == replyTypeOffsetData && p.data != nil && len(payload) == 8+len(p.data):
			copy(p.data, payload[8:])
			p.done <- nil
		default:
			return fmt.Errorf("chunk of type %#x with %d bytes", typ, len(payload))
		}
		return nil
	default:
		return fmt.Errorf("reply magic % x", h[:4])
	}
}

func (c *testClient) take(handle uint64) (*pendingRequest, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.pending[handle]
	if p == nil {
		return nil, fmt.Errorf("reply to %d, which is not pending", handle)
	}
	delete(c.pending, handle)
	return p, nil
}

// The Device. What the protocol has no words for is answered here.

func (c *testClient) Size() int64                     { return c.size }
func (c *testClient) Blocks() (logical, physical int) { return 512, 4096 }

// each sends what exceeds the largest request in pieces, one by one.
func (c *testClient) each(cmd command, flags uint16, off, n int64, data []byte) error {
	if err := (blockdev.Range{Off: off, Len: n}).Check(c.size); err != nil {
		return err
	}
	for n > 0 {
		part := min(n, maxPayload)
		var d []byte
		if data != nil {
			d, data = data[:part], data[part:]
		}
		if err := <-c.start(cmd, flags, off, part, d); err != nil {
			return err
		}
		off, n = off+part, n-part
	}
	return nil
}

func flagsOf(fua, noHole bool) (flags uint16) {
	if fua {
		flags |= cmdFlagFUA
	}
	if noHole {
		flags |= cmdFlagNoHole
	}
	return flags
}

func (c *testClient) ReadAt(_ context.Context, p []byte, off int64) error {
	return c.each(cmdRead, 0, off, int64(len(p)), p)
}

func (c *testClient) WriteAt(_ context.Context, p []byte, off int64, fua bool) error {
	return c.each(cmdWrite, flagsOf(fua, false), off, int64(len(p)), p)
}

func (c *testClient) Flush(context.Context) error {
	return <-c.start(cmdFlush, 0, 0, 0, nil)
}

func (c *testClient) Trim(_ context.Context, off, n int64, fua bool) error {
	return c.each(cmdTrim, flagsOf(fua, false), off, n, nil)
}

func (c *testClient) WriteZeroes(_ context.Context, off, n int64, noHole, fua bool) error {
	return c.each(cmdWriteZeroes, flagsOf(fua, noHole), off, n, nil)
}

// serving returns a server with dev as export "vol", checked at the end of the
// test for anything it did not give back.
func serving(t testing.TB, opts Options, dev blockdev.Device) *Server {
	t.Helper()
	s, err := NewServer(opts)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.AddExport(Export{Name: "vol", Device: dev}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.Close()
		if !s.payload.TryAcquire(s.opts.PayloadBytes) {
			t.Errorf("payload memory was not given back")
		}
		if len(s.conns) != 0 {
			t.Errorf("%d connections are left after Close", len(s.conns))
		}
	})
	return s
}

// connect opens a connection to "vol" over a unix socket.
func connect(t testing.TB, s *Server, structured bool) *testClient {
	t.Helper()
	client, server := pair(t)
	s.ServeConn(context.Background(), server)
	c, err := dialExport(client, "vol", structured)
	if err != nil {
		t.Fatal(err)
	}
	return c
}
