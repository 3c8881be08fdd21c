package nbd

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/holdfast-storage/holdfast/blockdev"
)

// readAhead is how much is read from a socket at once: some sixty 4 KiB writes,
// and what a socket buffer of the usual size holds.
const readAhead = 256 << 10

// directRead is the part of a payload, not yet received, from which on it is
// read straight into its buffer instead of through the read-ahead.
const directRead = 32 << 10

// stream is the receiving side of a connection in transmission.
type stream struct {
	buf      []byte
	r, w     int   // buf[r:w] is received and not looked at
	received int64 // bytes received since transmission began
	start    int64 // where in these the present request starts
}

// errStopping ends a reader that was told to read no further request.
var errStopping = errors.New("connection is stopping")

// op is a request on its way through the server.
type op struct {
	request
	c       *conn
	batch   *batch
	payload *buffer // of a READ or WRITE
	cost    int64   // what payload counts for in the server's budget
	head    []byte  // the encoded reply, without a READ's data
	headMem [32]byte
}

// transmit reads requests and hands them to workers until the client
// disconnects (nil), breaks the protocol or is lost.
func (c *conn) transmit() error {
	if err := c.openEnded(); err != nil {
		return err
	}
	c.in.buf = make([]byte, readAhead)
	for {
		c.in.start = c.in.received - int64(c.in.w-c.in.r)
		if c.marked.Load() {
			c.settleMarks(c.in.start)
		}
		header, err := c.next(requestSize)
		if err != nil {
			return err
		}
		req, ok := decodeRequest(header)
		if !ok {
			return fmt.Errorf("request magic is %#x", header[:4])
		}
		if req.cmd == cmdDisc {
			return nil
		}
		if err := c.take(req); err != nil {
			return err
		}
	}
}

// take checks one request, receives its payload and hands it to a worker.
func (c *conn) take(req request) error {
	if err := c.slots.Acquire(c.ctx, 1); err != nil {
		return err
	}
	c.live.Add(1)
	o := c.s.ops.get()
	o.request, o.c = req, c
	if e, message := c.check(req); e != wireOK {
		if req.cmd == cmdWrite {
			if err := c.discard(int64(req.length)); err != nil {
				c.finish(o)
				return err
			}
		}
		c.answer(o, e, message)
		return nil
	}
	if req.cmd == cmdRead || req.cmd == cmdWrite {
		cost := c.s.buffers.cost(int(req.length))
		if err := c.s.acquirePayload(c.ctx, cost); err != nil {
			c.finish(o)
			return err
		}
		o.cost = cost
		o.payload = c.s.buffers.get(int(req.length))
	}
	if req.cmd == cmdWrite {
		if err := c.receive(o.payload.data); err != nil {
			c.finish(o)
			return err
		}
	}
	o.batch = c.batch
	o.batch.add()
	c.s.workers.run(o)
	return nil
}

// check says what is wrong with a request, before its payload is received.
func (c *conn) check(r request) (wireError, string) {
	allowed := cmdFlagFUA
	changes := true // the device
	switch r.cmd {
	case cmdRead:
		changes = false
		if c.structured {
			allowed |= cmdFlagDF
		}
	case cmdFlush:
		changes = false
	case cmdWriteZeroes:
		allowed |= cmdFlagNoHole
	case cmdWrite, cmdTrim:
	default:
		return wireInvalid, fmt.Sprintf("command %d is not supported", r.cmd)
	}
	if r.flags&^allowed != 0 {
		return wireInvalid, fmt.Sprintf("flags %#x do not go with command %d", r.flags, r.cmd)
	}
	if changes && c.export.ReadOnly {
		return wirePerm, "the export is read-only"
	}
	if r.cmd == cmdFlush {
		if r.offset != 0 || r.length != 0 {
			return wireInvalid, "a flush has no offset and no length"
		}
		return wireOK, ""
	}
	if r.length == 0 {
		return wireInvalid, "the length is 0"
	}
	if (r.cmd == cmdRead || r.cmd == cmdWrite) && r.length > maxPayload {
		return wireInvalid, fmt.Sprintf("%d bytes exceed the largest request, %d", r.length, maxPayload)
	}
	rng := blockdev.Range{Off: int64(r.offset), Len: int64(r.length)}
	if err := rng.Check(c.export.dev.Size()); err != nil {
		if r.cmd == cmdWrite || r.cmd == cmdWriteZeroes {
			return wireNoSpace, err.Error()
		}
		return wireInvalid, err.Error()
	}
	return wireOK, ""
}

// execute runs a request on the device and answers it. It is a worker's work.
func (o *op) execute() {
	c := o.c
	dev, off, n := c.export.dev, int64(o.offset), int64(o.length)
	fua := o.flags&cmdFlagFUA != 0
	var err error
	switch o.cmd {
	case cmdRead:
		err = dev.ReadAt(c.ctx, o.payload.data, off)
	case cmdWrite:
		err = dev.WriteAt(c.ctx, o.payload.data, off, fua)
	case cmdFlush:
		err = dev.Flush(c.ctx)
	case cmdTrim:
		err = dev.Trim(c.ctx, off, n, fua)
	case cmdWriteZeroes:
		err = dev.WriteZeroes(c.ctx, off, n, o.flags&cmdFlagNoHole != 0, fua)
	}
	o.batch.leave()
	if err == nil {
		c.answer(o, wireOK, "")
		return
	}
	c.logFailure(o, err)
	c.answer(o, toWire(err), err.Error())
}

// logFailure reports a request that the device failed: the wire carries only
// its number. One per connection is a warning, since a device that fails one
// request fails many.
func (c *conn) logFailure(o *op, err error) {
	log := c.s.opts.Logger.Debug
	if !c.complained.Swap(true) {
		log = c.s.opts.Logger.Warn
	}
	log("request failed", "export", c.export.Name, "client", c.client.Name,
		"command", o.cmd.String(), "offset", o.offset, "length", o.length, "error", err)
}

// next returns the next n bytes of the stream, n at most requestSize; they are
// valid until the next read.
func (c *conn) next(n int) ([]byte, error) {
	in := &c.in
	for in.w-in.r < n {
		if in.r == in.w {
			in.r, in.w = 0, 0
		} else if len(in.buf)-in.r < n {
			in.w = copy(in.buf, in.buf[in.r:in.w])
			in.r = 0
		}
		got, err := c.read(in.buf[in.w:])
		if err != nil {
			if err == io.EOF && in.r != in.w {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
		in.w += got
	}
	b := in.buf[in.r : in.r+n]
	in.r += n
	return b, nil
}

// receive fills p with the next bytes of the stream.
func (c *conn) receive(p []byte) error {
	in := &c.in
	for {
		n := copy(p, in.buf[in.r:in.w])
		in.r += n
		p = p[n:]
		if len(p) == 0 {
			return nil
		}
		in.r, in.w = 0, 0
		dst := in.buf
		if len(p) >= directRead {
			dst = p
		}
		got, err := c.read(dst)
		if err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		if len(p) >= directRead {
			p = p[got:]
		} else {
			in.w = got
		}
	}
}

// discard reads n bytes of the stream and drops them.
func (c *conn) discard(n int64) error {
	in := &c.in
	for {
		have := min(int64(in.w-in.r), n)
		in.r += int(have)
		n -= have
		if n == 0 {
			return nil
		}
		in.r, in.w = 0, 0
		got, err := c.read(in.buf)
		if err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		in.w = got
	}
}

// read reads from the socket. It is the one place where the reader waits for
// the client, and so where marks and the end of reading reach it.
func (c *conn) read(p []byte) (int, error) {
	for {
		c.resting.Store(c.in.start != c.in.received)
		n, err := c.nc.Read(p)
		c.resting.Store(false)
		c.in.received += int64(n)
		switch {
		case n > 0:
			c.progress.Add(1)
			return n, nil
		case err == nil:
			continue
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return 0, err
		case c.isStopping():
			return 0, errStopping
		}
		c.fixMarks(c.in.received)
		c.settleMarks(c.in.start)
	}
}
