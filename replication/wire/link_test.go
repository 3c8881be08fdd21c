package wire

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast"
)

// sink collects what a link hands on.
type sink struct {
	mu    sync.Mutex
	got   []Received
	ended chan error
	each  func(Received)
}

func newSink() *sink { return &sink{ended: make(chan error, 1)} }

func (s *sink) handle(batch []Received, err error) {
	s.mu.Lock()
	s.got = append(s.got, batch...)
	s.mu.Unlock()
	for _, r := range batch {
		if s.each != nil {
			s.each(r)
		}
	}
	if err != nil {
		s.ended <- err
	}
}

func (s *sink) seqs() (seqs []holdfast.Seq) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.got {
		seqs = append(seqs, r.Message.(*Ack).Tail)
	}
	return seqs
}

var testHello = &Hello{Level: 1, Cluster: id(1), From: id(2), To: id(3), Replica: id(7)}

// tcp returns both ends of a greeted connection over loopback.
func tcp(t *testing.T) (near, far *Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	accepted := make(chan *Conn, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			t.Error(err)
			return
		}
		link, epoch, hello, err := Accept(c)
		if err != nil || epoch != 7 || *hello != *testHello {
			t.Errorf("Accept: epoch %d, %+v, %v", epoch, hello, err)
		}
		if err := link.Welcome(epoch, &Welcome{Node: hello.To, Level: 1}); err != nil {
			t.Error(err)
		}
		accepted <- link
	}()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	near, welcome, err := Connect(t.Context(), c, 7, testHello)
	if err != nil {
		t.Fatal(err)
	}
	if welcome.Node != testHello.To {
		t.Errorf("welcome from %v", welcome.Node)
	}
	return near, <-accepted
}

// links runs a test over both kinds of links.
func links(t *testing.T, f func(t *testing.T, near, far Link)) {
	t.Run("tcp", func(t *testing.T) {
		near, far := tcp(t)
		f(t, near, far)
	})
	t.Run("pipe", func(t *testing.T) {
		near, far := Pipe("test")
		f(t, near, far)
	})
}

func TestLinkKeepsOrder(t *testing.T) {
	links(t, func(t *testing.T, near, far Link) {
		const n = 2000
		here, there := newSink(), newSink()
		there.each = func(r Received) { // everything comes back
			far.Send(r.Header.Epoch, r.Header.Request, r.Message)
			far.Flush()
		}
		near.Start(here.handle)
		far.Start(there.handle)
		for i := range holdfast.Seq(n) {
			near.Send(7, RequestID(i), &Ack{Tail: i})
			if i%3 == 0 {
				near.Flush()
			}
		}
		near.Flush()
		for len(here.seqs()) < n {
			time.Sleep(time.Millisecond)
		}
		near.Close()
		if err := <-there.ended; err != io.EOF {
			t.Errorf("the far end ended with %v, want io.EOF", err)
		}
		if err := <-here.ended; err != net.ErrClosed {
			t.Errorf("the near end ended with %v, want net.ErrClosed", err)
		}
		near.Wait()
		far.Wait()
		for i, r := range here.got {
			if r.Message.(*Ack).Tail != holdfast.Seq(i) || r.Header.Request != RequestID(i) || r.Header.Epoch != 7 {
				t.Fatalf("message %d came back as %v %+v", i, r.Header, r.Message)
			}
		}
	})
}

// What was sent before Close arrives; what is sent after it is released.
func TestLinkClose(t *testing.T) {
	links(t, func(t *testing.T, near, far Link) {
		here, there := newSink(), newSink()
		near.Start(here.handle)
		far.Start(there.handle)
		for i := range holdfast.Seq(100) {
			near.Send(7, 0, &Ack{Tail: i})
		}
		near.Flush()
		near.Close()
		<-there.ended
		<-here.ended
		near.Wait()
		far.Wait()
		if got := len(there.seqs()); got != 100 {
			t.Errorf("%d of 100 messages arrived", got)
		}
		b := NewBuffer(holdfast.BlockSize)
		b.Retain()
		m := &Data{Bytes: b.Bytes(), Sums: BlockSums(nil, b.Bytes())}
		m.Hold(b)
		near.Send(7, 1, m)
		near.Flush()
		if refs := b.refs.Load(); refs != 1 {
			t.Errorf("%d references to a payload that could not be sent, want the caller's one", refs)
		}
		near.Close() // twice is no harm
	})
}

// Payload arrives as it was sent, and every buffer goes back.
func TestLinkPayload(t *testing.T) {
	links(t, func(t *testing.T, near, far Link) {
		there := newSink()
		near.Start(newSink().handle)
		far.Start(there.handle)
		var sent []*Buffer
		for i := range 50 {
			b := NewBuffer((1 + i%5) * holdfast.BlockSize)
			for j := range b.Bytes() {
				b.Bytes()[j] = byte(i + j)
			}
			b.Retain() // one for the look below
			m := &Append{Entries: []Entry{{Epoch: 7, Seq: holdfast.Seq(i + 1), Kind: KindWrite, Length: int64(len(b.Bytes())), Sums: BlockSums(nil, b.Bytes()), Data: b.Bytes()}}}
			m.Hold(b)
			near.Send(7, 0, m)
			sent = append(sent, b)
		}
		near.Flush()
		var got []Received
		for len(got) < 50 {
			time.Sleep(time.Millisecond)
			there.mu.Lock()
			got = append(got[:0], there.got...)
			there.mu.Unlock()
		}
		for i, r := range got {
			e := r.Message.(*Append).Entries[0]
			if !bytes.Equal(e.Data, sent[i].Bytes()) || Verify(e.Data, e.Sums) != nil {
				t.Fatalf("entry %d arrived with other bytes", i)
			}
			r.Message.Release()
		}
		near.Close()
		near.Wait()
		far.Wait()
		for i, b := range sent {
			if refs := b.refs.Load(); refs != 1 {
				t.Errorf("buffer %d has %d references, want one", i, refs)
			}
		}
	})
}

// A flush from within a handler does not recurse without end.
func TestPipeHandlersMayAnswer(t *testing.T) {
	near, far := Pipe("test")
	const rounds = 10000
	done := make(chan struct{})
	near.Start(func(batch []Received, err error) {
		for _, r := range batch {
			if n := r.Message.(*Ack).Tail; n < rounds {
				near.Send(1, 0, &Ack{Tail: n + 1})
				near.Flush()
			} else {
				close(done)
			}
		}
	})
	far.Start(func(batch []Received, err error) {
		for _, r := range batch {
			far.Send(1, 0, r.Message)
			far.Flush()
		}
	})
	near.Send(1, 0, &Ack{Tail: 1})
	near.Flush()
	<-done
	near.Close()
	near.Wait()
	far.Wait()
}

func TestRefusedHello(t *testing.T) {
	near, far := net.Pipe()
	go func() {
		link, epoch, _, err := Accept(far)
		if err != nil {
			t.Error(err)
			return
		}
		link.Refuse(epoch, holdfast.Errorf(holdfast.ErrNotFound, "no such replica").WithRemedy("look elsewhere"))
	}()
	_, _, err := Connect(t.Context(), near, 7, testHello)
	if !errors.Is(err, holdfast.ErrNotFound) || holdfast.RemedyOf(err) != "look elsewhere" {
		t.Errorf("Connect: %v", err)
	}
}

// Whatever answers HELLO is not believed unless it is the node that was meant.
func TestBadWelcome(t *testing.T) {
	for name, answer := range map[string]func(h Header) []byte{
		"another node": func(h Header) []byte { return frameOf(t, h.Nonce, &Welcome{Node: id(99)}) },
		"another connection's nonce": func(h Header) []byte {
			return frameOf(t, h.Nonce+1, &Welcome{Node: testHello.To})
		},
		"another message": func(h Header) []byte { return frameOf(t, h.Nonce, &Pong{}) },
		"noise":           func(Header) []byte { return bytes.Repeat([]byte("HTTP/1.1 400 Bad Request\r\n"), 4) },
		"nothing":         func(Header) []byte { return nil },
	} {
		near, far := net.Pipe()
		go func() {
			h, _, err := NewReader(far).Next()
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			_, _ = far.Write(answer(h))
			_ = far.Close()
		}()
		if _, _, err := Connect(t.Context(), near, 7, testHello); err == nil {
			t.Errorf("%s was welcome", name)
		}
	}
}

func frameOf(t *testing.T, n Nonce, m Message) []byte {
	f, err := AppendFrame(nil, 7, n, 0, m)
	if err != nil {
		t.Error(err)
	}
	return f.Head
}

// A peer that says nothing does not hold Connect up longer than its context.
func TestConnectGivesUp(t *testing.T) {
	near, far := net.Pipe()
	defer far.Close()
	go func() { _, _ = io.Copy(io.Discard, far) }()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, _, err := Connect(ctx, near, 7, testHello); err == nil {
		t.Error("silence was welcome")
	}
}

func TestBadFirstFrame(t *testing.T) {
	for name, in := range map[string][]byte{
		"another message": frameOf(t, 1, &Ping{}),
		"noise":           bytes.Repeat([]byte{0xff}, 100),
		"nothing":         nil,
	} {
		near, far := net.Pipe()
		go func() {
			_, _ = near.Write(in)
			_ = near.Close()
		}()
		if _, _, _, err := Accept(far); err == nil {
			t.Errorf("%s was accepted as HELLO", name)
		}
	}
}

// An end that takes nothing is given up once MaxQueued bytes wait for it.
func TestQueueIsBounded(t *testing.T) {
	near, far := tcp(t)
	here := newSink()
	near.Start(here.handle) // far never reads
	b := NewBuffer(MaxPayload)
	sums := BlockSums(nil, b.Bytes())
	for range 2*MaxQueued/MaxPayload + 8 {
		b.Retain()
		m := &Data{Bytes: b.Bytes(), Sums: sums}
		m.Hold(b)
		near.Send(7, 1, m)
		near.Flush()
	}
	if err := <-here.ended; err == nil {
		t.Error("the link did not end")
	}
	near.Wait()
	if refs := b.refs.Load(); refs != 1 {
		t.Errorf("%d references, want one", refs)
	}
	far.Start(newSink().handle)
	far.Close()
	far.Wait()
}
