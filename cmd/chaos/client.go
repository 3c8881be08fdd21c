package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/url"
	"strings"
	"time"
)

// Requests and flags of the NBD protocol (proto.md).
const (
	nbdRead  = 0
	nbdWrite = 1
	nbdFlush = 3

	nbdFUA = 1 << 0
)

// negotiateLimit bounds the start of a connection.
const negotiateLimit = 10 * time.Second

// nbdClient is one NBD connection with one request at a time: simple replies,
// the export chosen by NBD_OPT_EXPORT_NAME, which every server has.
type nbdClient struct {
	conn   net.Conn
	cookie uint64
}

// nbdError is an error that the server answered with.
type nbdError uint32

// Error says which.
func (e nbdError) Error() string { return fmt.Sprintf("NBD error %d", uint32(e)) }

// dialNBD connects to nbd+unix:///NAME?socket=PATH.
func dialNBD(uri string) (*nbdClient, error) {
	u, err := url.Parse(uri)
	if err != nil {
		return nil, fmt.Errorf("parse the URI: %w", err)
	}
	conn, err := net.DialTimeout("unix", u.Query().Get("socket"), negotiateLimit)
	if err != nil {
		return nil, err
	}
	c := &nbdClient{conn: conn}
	if err := c.negotiate(strings.TrimPrefix(u.Path, "/")); err != nil {
		conn.Close()
		return nil, fmt.Errorf("negotiate: %w", err)
	}
	return c, nil
}

func (c *nbdClient) negotiate(export string) error {
	if err := c.conn.SetDeadline(time.Now().Add(negotiateLimit)); err != nil {
		return err
	}
	var hello [18]byte // "NBDMAGIC" "IHAVEOPT" flags
	if _, err := io.ReadFull(c.conn, hello[:]); err != nil {
		return err
	}
	if string(hello[:16]) != "NBDMAGICIHAVEOPT" {
		return fmt.Errorf("not an NBD server: %q", hello)
	}
	out := binary.BigEndian.AppendUint32(nil, 3) // fixed newstyle, no zeroes
	out = append(out, "IHAVEOPT"...)
	out = binary.BigEndian.AppendUint32(out, 1) // NBD_OPT_EXPORT_NAME
	out = binary.BigEndian.AppendUint32(out, uint32(len(export)))
	out = append(out, export...)
	if _, err := c.conn.Write(out); err != nil {
		return err
	}
	var export64 [10]byte // size, transmission flags
	if _, err := io.ReadFull(c.conn, export64[:]); err != nil {
		return err
	}
	return c.conn.SetDeadline(time.Time{})
}

// close ends the connection, also under a request that waits.
func (c *nbdClient) close() { c.conn.Close() }

// read fills p from offset off.
func (c *nbdClient) read(p []byte, off int64) error {
	if err := c.do(nbdRead, 0, off, len(p), nil); err != nil {
		return err
	}
	_, err := io.ReadFull(c.conn, p)
	return err
}

// write writes p at offset off.
func (c *nbdClient) write(p []byte, off int64, fua bool) error {
	flags := uint16(0)
	if fua {
		flags = nbdFUA
	}
	return c.do(nbdWrite, flags, off, len(p), p)
}

// flush flushes the volume.
func (c *nbdClient) flush() error { return c.do(nbdFlush, 0, 0, 0, nil) }

// do sends a request and reads the head of its reply.
func (c *nbdClient) do(kind, flags uint16, off int64, length int, payload []byte) error {
	c.cookie++
	out := binary.BigEndian.AppendUint32(make([]byte, 0, 28+len(payload)), 0x25609513)
	out = binary.BigEndian.AppendUint16(out, flags)
	out = binary.BigEndian.AppendUint16(out, kind)
	out = binary.BigEndian.AppendUint64(out, c.cookie)
	out = binary.BigEndian.AppendUint64(out, uint64(off))
	out = binary.BigEndian.AppendUint32(out, uint32(length))
	if _, err := c.conn.Write(append(out, payload...)); err != nil {
		return err
	}
	var head [16]byte
	if _, err := io.ReadFull(c.conn, head[:]); err != nil {
		return err
	}
	if magic := binary.BigEndian.Uint32(head[:]); magic != 0x67446698 {
		return fmt.Errorf("not a simple reply: %#x", magic)
	}
	if cookie := binary.BigEndian.Uint64(head[8:]); cookie != c.cookie {
		return fmt.Errorf("a reply to request %d, want %d", cookie, c.cookie)
	}
	if errno := binary.BigEndian.Uint32(head[4:]); errno != 0 {
		return nbdError(errno)
	}
	return nil
}
