package raftstore

import (
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/holdfast-storage/holdfast"
)

// The first bytes of a raft connection, little endian:
//
//	magic "hfraft\r\n" | version u32 | cluster 16 | from node 16 | to node 16 | crc32c u32 of all before
//
// The acceptor answers with one byte: helloOK, or why it closes.
const (
	helloMagic   = "hfraft\r\n"
	helloVersion = 1
	helloSize    = len(helloMagic) + 4 + 3*16 + 4

	helloOK        = 0
	helloMalformed = 1
	helloForeign   = 2 // another cluster or another node
)

const (
	// helloTimeout bounds the hello of an accepted connection.
	helloTimeout = 5 * time.Second
	// maxHellos bounds connections that have not said hello yet: a cluster has
	// at most 7 raft members with a few connections each.
	maxHellos = 64
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// streamLayer opens and accepts raft connections and owns all of them: Close
// ends every one and waits for its goroutines.
type streamLayer struct {
	listener net.Listener
	address  string // that others dial
	node     holdfast.NodeID
	cluster  func() holdfast.ClusterID
	resolve  func(node holdfast.NodeID, recorded string) string // the newest known address
	dial     func(ctx context.Context, address string) (net.Conn, error)
	log      *slog.Logger

	ready  chan net.Conn // accepted and greeted
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	hellos chan struct{} // a token per connection without hello

	mu     sync.Mutex // of the fields below
	conns  map[*streamConn]struct{}
	closed bool
}

var _ raft.StreamLayer = (*streamLayer)(nil)

// start begins to accept.
func (s *streamLayer) start() {
	s.ready = make(chan net.Conn)
	s.hellos = make(chan struct{}, maxHellos)
	s.conns = map[*streamConn]struct{}{}
	s.wg.Add(1)
	go s.accept()
}

func (s *streamLayer) accept() {
	defer s.wg.Done()
	for {
		conn, err := s.listener.Accept()
		if err != nil {
			if s.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			s.log.Warn("raft listener does not accept", "error", err)
			select { // out of descriptors, say: no busy loop
			case <-s.ctx.Done():
				return
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		c := s.own(conn)
		if c == nil {
			return
		}
		select {
		case s.hellos <- struct{}{}:
		default:
			s.log.Warn("raft connection refused: too many without hello", "remote", conn.RemoteAddr().String())
			c.Close()
			continue
		}
		s.wg.Add(1)
		go s.greet(c)
	}
}

// greet checks an accepted connection's hello and hands it to raft.
func (s *streamLayer) greet(c *streamConn) {
	defer s.wg.Done()
	err := s.checkHello(c)
	<-s.hellos
	if err != nil {
		s.log.Debug("raft connection refused", "remote", c.RemoteAddr().String(), "error", err)
		c.Close()
		return
	}
	select {
	case s.ready <- c:
	case <-s.ctx.Done():
		c.Close()
	}
}

func (s *streamLayer) checkHello(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(helloTimeout)); err != nil {
		return err
	}
	b := make([]byte, helloSize)
	if _, err := io.ReadFull(c, b); err != nil {
		return err
	}
	h, err := decodeHello(b)
	answer := byte(helloOK)
	switch {
	case err != nil:
		answer = helloMalformed
	case h.cluster != s.cluster() || h.cluster.IsZero() || h.to != s.node:
		answer = helloForeign
		err = holdfast.Errorf(holdfast.ErrRefused, "a hello for node %v of cluster %v", h.to, h.cluster)
	}
	if _, werr := c.Write([]byte{answer}); err == nil {
		err = werr
	}
	if err == nil {
		err = c.SetDeadline(time.Time{})
	}
	return err
}

// memberAddress is how a member stands in raft's configuration: NODE@HOST:PORT.
// The address is what was known when the configuration was written; Dial prefers
// a newer one, and needs the recorded one when the whole cluster starts anew and
// no tables are there yet.
func memberAddress(node holdfast.NodeID, address string) raft.ServerAddress {
	return raft.ServerAddress(node.String() + "@" + address)
}

func parseMemberAddress(a raft.ServerAddress) (holdfast.NodeID, string, error) {
	text, address, ok := strings.Cut(string(a), "@")
	node, err := holdfast.ParseID[holdfast.NodeID](text)
	if !ok || err != nil {
		return node, "", holdfast.Errorf(holdfast.ErrIntegrity, "%q is not the address of a member", string(a))
	}
	return node, address, nil
}

// Dial connects to a member and greets it. Names are resolved here, at every dial.
func (s *streamLayer) Dial(member raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	node, recorded, err := parseMemberAddress(member)
	if err != nil {
		return nil, err
	}
	address := s.resolve(node, recorded)
	ctx, cancel := context.WithTimeout(s.ctx, timeout)
	defer cancel()
	conn, err := s.dial(ctx, address)
	if err != nil {
		return nil, holdfast.Errorf(holdfast.ErrUnavailable, "dial raft address %s: %w", address, err)
	}
	c := s.own(conn)
	if c == nil {
		return nil, raft.ErrTransportShutdown
	}
	if err := s.sayHello(c, node, timeout); err != nil {
		c.Close()
		return nil, holdfast.Errorf(holdfast.ErrUnavailable, "greet node %v at %s: %w", node, address, err)
	}
	return c, nil
}

func (s *streamLayer) sayHello(c net.Conn, to holdfast.NodeID, timeout time.Duration) error {
	if err := c.SetDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	if _, err := c.Write(encodeHello(hello{cluster: s.cluster(), from: s.node, to: to})); err != nil {
		return err
	}
	var answer [1]byte
	if _, err := io.ReadFull(c, answer[:]); err != nil {
		return err
	}
	if answer[0] != helloOK {
		return holdfast.Errorf(holdfast.ErrRefused, "the hello was refused with %d: another cluster or node listens there", answer[0])
	}
	return c.SetDeadline(time.Time{})
}

// Accept returns the next greeted connection.
func (s *streamLayer) Accept() (net.Conn, error) {
	select {
	case c := <-s.ready:
		return c, nil
	case <-s.ctx.Done():
		return nil, net.ErrClosed
	}
}

// Addr is this member's own address, as others record it.
func (s *streamLayer) Addr() net.Addr { return advertised(memberAddress(s.node, s.address)) }

type advertised string

func (advertised) Network() string  { return "tcp" }
func (a advertised) String() string { return string(a) }

// Close ends the listener and every connection, and waits for their goroutines.
func (s *streamLayer) Close() error {
	s.cancel()
	err := s.listener.Close()
	s.mu.Lock()
	s.closed = true
	var open []*streamConn
	for c := range s.conns {
		open = append(open, c)
	}
	s.mu.Unlock()
	for _, c := range open {
		c.Close()
	}
	s.wg.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// own takes a connection into the set that Close ends; nil if that has happened.
func (s *streamLayer) own(conn net.Conn) *streamConn {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		conn.Close()
		return nil
	}
	c := &streamConn{Conn: conn, layer: s}
	s.conns[c] = struct{}{}
	return c
}

type streamConn struct {
	net.Conn
	layer *streamLayer
}

func (c *streamConn) Close() error {
	c.layer.mu.Lock()
	delete(c.layer.conns, c)
	c.layer.mu.Unlock()
	return c.Conn.Close()
}

type hello struct {
	cluster  holdfast.ClusterID
	from, to holdfast.NodeID
}

func encodeHello(h hello) []byte {
	b := append(make([]byte, 0, helloSize), helloMagic...)
	b = binary.LittleEndian.AppendUint32(b, helloVersion)
	b = append(b, h.cluster[:]...)
	b = append(b, h.from[:]...)
	b = append(b, h.to[:]...)
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

func decodeHello(b []byte) (hello, error) {
	var h hello
	if len(b) != helloSize || string(b[:len(helloMagic)]) != helloMagic {
		return h, holdfast.Errorf(holdfast.ErrIntegrity, "not a raft hello")
	}
	body := b[:helloSize-4]
	if crc32.Checksum(body, castagnoli) != binary.LittleEndian.Uint32(b[helloSize-4:]) {
		return h, holdfast.Errorf(holdfast.ErrIntegrity, "a raft hello with a bad checksum")
	}
	body = body[len(helloMagic):]
	if v := binary.LittleEndian.Uint32(body); v != helloVersion {
		return h, holdfast.Errorf(holdfast.ErrUnsupported, "a raft hello of version %d, this is %d", v, helloVersion)
	}
	copy(h.cluster[:], body[4:])
	copy(h.from[:], body[20:])
	copy(h.to[:], body[36:])
	return h, nil
}
