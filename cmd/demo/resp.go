package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"
)

// A client of Redis' protocol, RESP2 (https://redis.io/docs/latest/develop/reference/protocol-spec/):
// only what the demo sends, and only the replies to that.

const (
	dialDeadline = time.Second // the hosts are on this machine
	maxLine      = 64 << 10    // longest reply line that is accepted
	maxBulk      = 1 << 20     // longest value that is accepted
)

// errReply is an error that the server answered, as opposed to one of the connection:
// the command was not carried out.
var errReply = errors.New("redis refuses")

// errNil is the reply to a GET of a key that does not exist.
var errNil = errors.New("no such key")

// client is one connection. It is not for concurrent use.
type client struct {
	conn net.Conn
	in   *bufio.Reader
}

func dial(ctx context.Context, address string) (*client, error) {
	d := net.Dialer{Timeout: dialDeadline}
	conn, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	return &client{conn: conn, in: bufio.NewReaderSize(conn, maxLine)}, nil
}

func (c *client) close() { c.conn.Close() }

// do sends one command and returns its reply.
func (c *client) do(args ...string) (string, error) {
	if err := c.send(args...); err != nil {
		return "", err
	}
	return c.receive()
}

// send writes a command as an array of bulk strings.
func (c *client) send(args ...string) error {
	var b strings.Builder
	fmt.Fprintf(&b, "*%d\r\n", len(args))
	for _, a := range args {
		fmt.Fprintf(&b, "$%d\r\n%s\r\n", len(a), a)
	}
	_, err := io.WriteString(c.conn, b.String())
	return err
}

// receive reads the reply to the oldest command that has none yet: a simple string, an
// error, an integer or a bulk string.
func (c *client) receive() (string, error) {
	line, err := c.line()
	if err != nil {
		return "", err
	}
	kind, rest := line[0], line[1:]
	switch kind {
	case '+', ':':
		return rest, nil
	case '-':
		return "", fmt.Errorf("%w: %s", errReply, rest)
	case '$':
		n, err := strconv.Atoi(rest)
		switch {
		case err != nil || n < -1 || n > maxBulk:
			return "", fmt.Errorf("reply announces a value of %q bytes", rest)
		case n == -1:
			return "", errNil
		}
		value := make([]byte, n+2)
		if _, err := io.ReadFull(c.in, value); err != nil {
			return "", err
		}
		if string(value[n:]) != "\r\n" {
			return "", fmt.Errorf("a value of %d bytes does not end where it should", n)
		}
		return string(value[:n]), nil
	}
	return "", fmt.Errorf("reply %q is of no known kind", line)
}

// line reads a line that has at least one byte, without its end.
func (c *client) line() (string, error) {
	raw, err := c.in.ReadSlice('\n')
	if err != nil {
		return "", err
	}
	line, ok := strings.CutSuffix(string(raw), "\r\n")
	if !ok || line == "" {
		return "", fmt.Errorf("reply %q is no line of the protocol", raw)
	}
	return line, nil
}
