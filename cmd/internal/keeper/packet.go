package keeper

import (
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
)

// sendWait bounds the wait for a peer that does not read.
const sendWait = 10 * time.Second

// packets is one end of the conversation: whole messages, with at most one
// descriptor each. send may be called concurrently, receive not.
type packets struct {
	conn *net.UnixConn
	in   []byte
	oob  []byte

	mu sync.Mutex // one message at a time; the write has a deadline
}

func newPackets(conn *net.UnixConn) *packets {
	return &packets{conn: conn, in: make([]byte, maxMessage+1), oob: make([]byte, unix.CmsgSpace(4*4))}
}

// send sends v, with fd unless it is negative; fd stays the caller's.
func (p *packets) send(v any, fd int) error {
	b, err := encode(v)
	if err != nil {
		return err
	}
	var oob []byte
	if fd >= 0 {
		oob = unix.UnixRights(fd)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	_ = p.conn.SetWriteDeadline(time.Now().Add(sendWait))
	if _, _, err := p.conn.WriteMsgUnix(b, oob, nil); err != nil {
		return holdfast.Errorf(holdfast.ErrUnavailable, "send to the keeper's peer: %w", err)
	}
	return nil
}

// receive reads one message into v and returns its descriptor, -1 for none,
// which the caller owns. io.EOF is the end.
func (p *packets) receive(v any) (fd int, err error) {
	n, oobn, flags, _, err := p.conn.ReadMsgUnix(p.in, p.oob)
	fds := rights(p.oob[:oobn])
	defer func() {
		for i, f := range fds {
			if i > 0 || err != nil {
				_ = unix.Close(f)
			}
		}
	}()
	switch {
	case err == nil && n == 0, errors.Is(err, net.ErrClosed), errors.Is(err, unix.ECONNRESET):
		err = io.EOF
	case err == nil && (flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 || n > maxMessage):
		err = holdfast.Errorf(holdfast.ErrInvalid, "a keeper message is longer than %d bytes", maxMessage)
	case err == nil:
		err = decode(p.in[:n], v)
	}
	if err != nil {
		return -1, err
	}
	if len(fds) == 0 {
		return -1, nil
	}
	return fds[0], nil
}

// rights returns the descriptors in a control message.
func rights(oob []byte) []int {
	var fds []int
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	for i := range messages {
		if got, err := unix.ParseUnixRights(&messages[i]); err == nil {
			fds = append(fds, got...)
		}
	}
	return fds
}
