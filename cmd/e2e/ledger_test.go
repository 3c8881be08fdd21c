package e2e

import (
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"
)

// blockSize is what the ledger writes: one block, so that each has one value.
const blockSize = 4096

// ledger knows, for every block of a volume, the last value that was
// acknowledged and the values that were sent and never answered. A block must
// hold the former or one of the latter.
type ledger struct {
	mu      sync.Mutex
	blocks  int
	acked   map[int]uint64
	unknown map[int]map[uint64]bool // sent after the acked one, unanswered
}

func newLedger(size int64) *ledger {
	return &ledger{blocks: int(size / blockSize), acked: map[int]uint64{}, unknown: map[int]map[uint64]bool{}}
}

// load is one client that writes until it is stopped or its connection ends.
type load struct {
	t     *testing.T
	conn  *nbdConn
	acked int
	mu    sync.Mutex
	cond  *sync.Cond
	ended bool
	done  chan struct{}
}

// write starts a client with one connection and many requests in flight.
func (l *ledger) write(t *testing.T, uri string, stamp int64) *load {
	t.Helper()
	conn, err := dialNBD(uri)
	if err != nil {
		t.Fatalf("dial %s: %v", uri, err)
	}
	w := &load{t: t, conn: conn, done: make(chan struct{})}
	w.cond = sync.NewCond(&w.mu)
	go func() {
		defer close(w.done)
		l.run(w, stamp)
		w.mu.Lock()
		w.ended = true
		w.cond.Broadcast()
		w.mu.Unlock()
	}()
	return w
}

// inFlight is how many writes a load keeps on the way.
const inFlight = 16

func (l *ledger) run(w *load, stamp int64) {
	rng := rand.New(rand.NewPCG(uint64(stamp), 1))
	type sent struct {
		block int
		value uint64
	}
	flight := map[uint64]sent{}
	busy := map[int]bool{}
	value := uint64(stamp) << 20
	var cookie uint64
	for {
		for len(flight) < inFlight {
			block := rng.IntN(l.blocks)
			if busy[block] {
				continue
			}
			value++
			cookie++
			l.mu.Lock()
			if l.unknown[block] == nil {
				l.unknown[block] = map[uint64]bool{}
			}
			l.unknown[block][value] = true
			l.mu.Unlock()
			if w.conn.writeBlock(cookie, block, value) != nil {
				return
			}
			flight[cookie] = sent{block, value}
			busy[block] = true
		}
		got, errno, err := w.conn.reply()
		if err != nil || errno != 0 {
			return // unanswered or failed: what was in flight stays unknown
		}
		s := flight[got]
		delete(flight, got)
		delete(busy, s.block)
		l.mu.Lock()
		l.acked[s.block] = s.value
		delete(l.unknown, s.block)
		l.mu.Unlock()
		w.mu.Lock()
		w.acked++
		w.cond.Broadcast()
		w.mu.Unlock()
	}
}

// waitAcks waits until n writes were acknowledged.
func (w *load) waitAcks(n int) {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.acked < n && !w.ended {
		w.cond.Wait()
	}
	if w.acked < n {
		w.t.Fatalf("the client ended after %d acknowledged writes, want %d", w.acked, n)
	}
}

// now is how many writes were acknowledged so far.
func (w *load) now() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.acked
}

// stop ends the client and waits for it.
func (w *load) stop() {
	w.conn.Close()
	<-w.done
}

// check reads every block that was ever written.
func (l *ledger) check(t *testing.T, uri string) {
	t.Helper()
	conn, err := dialNBD(uri)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	l.mu.Lock()
	defer l.mu.Unlock()
	checked := 0
	for block := range l.blocks {
		acked, was := l.acked[block]
		unknown := l.unknown[block]
		if !was && unknown == nil {
			continue
		}
		got, err := conn.readBlock(block)
		if err != nil {
			t.Fatalf("read block %d: %v", block, err)
		}
		checked++
		switch {
		case got == acked:
		case unknown[got]:
			l.acked[block] = got // it took effect, and must stay
		default:
			t.Errorf("block %d holds %#x, want the acknowledged %#x or one of %d unanswered", block, got, acked, len(unknown))
		}
		delete(l.unknown, block)
	}
	t.Logf("%d blocks checked", checked)
}

// nbdConn is a minimal NBD client (proto.md): simple replies, one export.
type nbdConn struct {
	net.Conn
	buf [blockSize]byte
}

// dialNBD connects to nbd+unix:///NAME?socket=PATH and negotiates
// NBD_OPT_EXPORT_NAME, which every server has.
func dialNBD(uri string) (*nbdConn, error) {
	u, err := url.Parse(uri)
	if err != nil {
		return nil, err
	}
	conn, err := net.Dial("unix", u.Query().Get("socket"))
	if err != nil {
		return nil, err
	}
	c := &nbdConn{Conn: conn}
	if err := c.negotiate(strings.TrimPrefix(u.Path, "/")); err != nil {
		conn.Close()
		return nil, fmt.Errorf("negotiate: %w", err)
	}
	return c, nil
}

func (c *nbdConn) negotiate(name string) error {
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return err
	}
	hello := make([]byte, 18)
	if _, err := io.ReadFull(c, hello); err != nil {
		return err
	}
	if string(hello[:16]) != "NBDMAGICIHAVEOPT" {
		return fmt.Errorf("not an NBD server: %q", hello)
	}
	out := binary.BigEndian.AppendUint32(nil, 3) // fixed newstyle, no zeroes
	out = append(out, "IHAVEOPT"...)
	out = binary.BigEndian.AppendUint32(out, 1) // NBD_OPT_EXPORT_NAME
	out = binary.BigEndian.AppendUint32(out, uint32(len(name)))
	out = append(out, name...)
	if _, err := c.Write(out); err != nil {
		return err
	}
	if _, err := io.ReadFull(c, make([]byte, 10)); err != nil {
		return err
	}
	return c.SetDeadline(time.Time{})
}

func (c *nbdConn) request(kind uint16, cookie uint64, block int, payload []byte) error {
	out := binary.BigEndian.AppendUint32(make([]byte, 0, 28+len(payload)), 0x25609513)
	out = binary.BigEndian.AppendUint16(out, 0)
	out = binary.BigEndian.AppendUint16(out, kind)
	out = binary.BigEndian.AppendUint64(out, cookie)
	out = binary.BigEndian.AppendUint64(out, uint64(block)*blockSize)
	out = binary.BigEndian.AppendUint32(out, blockSize)
	_, err := c.Write(append(out, payload...))
	return err
}

func (c *nbdConn) writeBlock(cookie uint64, block int, value uint64) error {
	for i := 0; i < blockSize; i += 8 {
		binary.BigEndian.PutUint64(c.buf[i:], value)
	}
	return c.request(1, cookie, block, c.buf[:])
}

// reply reads one simple reply header.
func (c *nbdConn) reply() (cookie uint64, errno uint32, err error) {
	var head [16]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return 0, 0, err
	}
	if magic := binary.BigEndian.Uint32(head[:]); magic != 0x67446698 {
		return 0, 0, fmt.Errorf("not a simple reply: %#x", magic)
	}
	return binary.BigEndian.Uint64(head[8:]), binary.BigEndian.Uint32(head[4:]), nil
}

// readBlock reads one block, whose words must all be the same.
func (c *nbdConn) readBlock(block int) (uint64, error) {
	if err := c.request(0, 1, block, nil); err != nil {
		return 0, err
	}
	_, errno, err := c.reply()
	if err != nil || errno != 0 {
		return 0, fmt.Errorf("reply: errno %d, %w", errno, err)
	}
	if _, err := io.ReadFull(c, c.buf[:]); err != nil {
		return 0, err
	}
	first := binary.BigEndian.Uint64(c.buf[:])
	for i := 0; i < blockSize; i += 8 {
		if word := binary.BigEndian.Uint64(c.buf[i:]); word != first {
			return 0, fmt.Errorf("torn block: %#x and %#x", first, word)
		}
	}
	return first, nil
}
