package e2e

import (
	"io"
	"net"
	"strconv"
	"sync"
	"testing"
)

// proxyHost is where proxies listen: another address of loopback than the nodes'
// own, so that ports are the same.
const proxyHost = "127.0.0.2"

// proxy stands before one port of a node; whoever dials the node goes through it.
type proxy struct {
	address, to string
	listener    net.Listener
	running     sync.WaitGroup

	mu    sync.Mutex
	away  bool
	conns map[*net.TCPConn]bool
}

// newProxy stands before a port of 127.0.0.1, until the test ends.
func newProxy(t *testing.T, port int) *proxy {
	t.Helper()
	p := &proxy{address: net.JoinHostPort(proxyHost, strconv.Itoa(port)), to: net.JoinHostPort("127.0.0.1", strconv.Itoa(port)), conns: map[*net.TCPConn]bool{}}
	l, err := net.Listen("tcp", p.address)
	if err != nil {
		t.Fatal(err)
	}
	p.listener = l
	p.running.Go(p.accept)
	t.Cleanup(func() {
		l.Close()
		p.reach(false)
		p.running.Wait()
	})
	return p
}

func (p *proxy) accept() {
	for {
		in, err := p.listener.Accept()
		if err != nil {
			return
		}
		p.running.Go(func() { p.carry(in.(*net.TCPConn)) })
	}
}

// carry carries bytes both ways until one end closes or the connection is reset.
func (p *proxy) carry(in *net.TCPConn) {
	if !p.take(in) {
		return
	}
	defer p.drop(in)
	conn, err := net.Dial("tcp", p.to)
	if err != nil {
		return
	}
	out := conn.(*net.TCPConn)
	if !p.take(out) {
		return
	}
	defer p.drop(out)
	var both sync.WaitGroup
	for _, way := range [][2]*net.TCPConn{{in, out}, {out, in}} {
		both.Go(func() {
			_, _ = io.Copy(way[0], way[1])
			way[0].Close()
			way[1].Close()
		})
	}
	both.Wait()
}

// take notes a connection, or closes it while nobody is let through.
func (p *proxy) take(c *net.TCPConn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.away {
		c.Close()
		return false
	}
	p.conns[c] = true
	return true
}

func (p *proxy) drop(c *net.TCPConn) {
	c.Close()
	p.mu.Lock()
	delete(p.conns, c)
	p.mu.Unlock()
}

// reset ends every connection with RST, and returns how many there were.
func (p *proxy) reset() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		_ = c.SetLinger(0) // so that both ends learn of it as of a reset
		c.Close()
	}
	return len(p.conns)
}

// reach sets whether anybody is let through.
func (p *proxy) reach(ok bool) {
	p.mu.Lock()
	p.away = !ok
	p.mu.Unlock()
	if !ok {
		p.reset()
	}
}
