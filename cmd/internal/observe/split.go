package observe

import (
	"errors"
	"net"
	"sync"
	"time"
)

const (
	// preface is how every HTTP/2 connection without TLS begins (RFC 9113, 3.4);
	// gRPC clients send it at once. No HTTP/1 method begins with it.
	preface = "PRI"
	// sniffWait is how long a connection may take to say what it is, and how long
	// it then waits to be accepted: a node that is starting serves no HTTP yet.
	sniffWait = 5 * time.Second
	// maxSniffing bounds the connections that have not said it yet; further ones
	// are closed. A node has a connection or two per peer and per command.
	maxSniffing = 256
)

// Split accepts the connections of l and hands each to one of two listeners: those
// that speak HTTP/2 from the first byte, as gRPC does, and all others. Closing
// either listener closes l, ends the accepting, and waits for it. Both Accept
// methods return l's error, which is net.ErrClosed after a Close.
func Split(l net.Listener) (h2, rest net.Listener) {
	s := &split{l: l, done: make(chan struct{})}
	a, b := &branch{s, make(chan net.Conn)}, &branch{s, make(chan net.Conn)}
	s.work.Go(func() { s.accept(a.conns, b.conns) })
	return a, b
}

type split struct {
	l    net.Listener
	work sync.WaitGroup
	done chan struct{} // closed once l accepts no more; err is set before
	err  error
}

func (s *split) accept(h2, rest chan<- net.Conn) {
	slots := make(chan struct{}, maxSniffing)
	var delay time.Duration
	for {
		c, err := s.l.Accept()
		var timeout interface{ Temporary() bool }
		if err != nil && errors.As(err, &timeout) && timeout.Temporary() {
			// Out of descriptors, say: what is connected goes on meanwhile.
			delay = min(max(2*delay, 5*time.Millisecond), time.Second)
			time.Sleep(delay)
			continue
		}
		if err != nil {
			s.err = err
			close(s.done)
			return
		}
		delay = 0
		select {
		case slots <- struct{}{}:
		default:
			_ = c.Close()
			continue
		}
		s.work.Go(func() {
			defer func() { <-slots }()
			s.sniff(c, h2, rest)
		})
	}
}

func (s *split) sniff(c net.Conn, h2, rest chan<- net.Conn) {
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-s.done:
			_ = c.SetReadDeadline(time.Unix(1, 0)) // Close waits for this read
		case <-stop:
		}
	}()
	_ = c.SetReadDeadline(time.Now().Add(sniffWait))
	first := make([]byte, 0, len(preface))
	for len(first) < len(preface) {
		n, err := c.Read(first[len(first):cap(first)])
		first = first[:len(first)+n]
		if string(first) != preface[:len(first)] {
			break
		}
		if err != nil {
			_ = c.Close()
			return
		}
	}
	if c.SetReadDeadline(time.Time{}) != nil {
		_ = c.Close()
		return
	}
	to := rest
	if string(first) == preface {
		to = h2
	}
	select {
	case to <- &replayed{Conn: c, first: first}:
		return
	case <-s.done:
	case <-time.After(sniffWait):
	}
	_ = c.Close()
}

// branch is one of the two listeners.
type branch struct {
	*split
	conns chan net.Conn
}

func (b *branch) Accept() (net.Conn, error) {
	select {
	case c := <-b.conns:
		return c, nil
	case <-b.done:
		return nil, b.err
	}
}

func (b *branch) Close() error {
	err := b.l.Close()
	b.work.Wait()
	return err
}

func (b *branch) Addr() net.Addr { return b.l.Addr() }

// replayed is a connection whose first bytes were read already.
type replayed struct {
	net.Conn
	first []byte
}

func (c *replayed) Read(p []byte) (int, error) {
	if len(c.first) > 0 {
		n := copy(p, c.first)
		c.first = c.first[n:]
		return n, nil
	}
	return c.Conn.Read(p)
}
