package observe

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
)

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// TestSplit serves gRPC and HTTP on one port, with the real clients of both.
func TestSplit(t *testing.T) {
	l := listen(t)
	h2, rest := Split(l)
	g := grpc.NewServer()
	grpc_health_v1.RegisterHealthServer(g, health.NewServer())
	web := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.Method+" "+r.URL.Path) })}
	ended := make(chan error, 2)
	go func() { ended <- g.Serve(h2) }()
	go func() { ended <- web.Serve(rest) }()

	conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for range 3 {
		answer, err := grpc_health_v1.NewHealthClient(conn).Check(t.Context(), &grpc_health_v1.HealthCheckRequest{})
		if err != nil || answer.Status != grpc_health_v1.HealthCheckResponse_SERVING {
			t.Fatalf("gRPC: got %v %v, want SERVING", answer, err)
		}
		for _, path := range []string{"/a", "/PRI"} {
			resp, err := http.Post("http://"+l.Addr().String()+path, "text/plain", strings.NewReader("x"))
			if err != nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			if string(body) != "POST "+path {
				t.Errorf("HTTP: got %q, want POST %s", body, path)
			}
		}
	}
	web.Close()
	g.Stop()
	for range 2 {
		if err := <-ended; err != nil && !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			t.Errorf("after the end: got %v", err)
		}
	}
}

// TestSplitSays sends beginnings byte by byte and looks where they go.
func TestSplitSays(t *testing.T) {
	for _, c := range []struct {
		say  string
		h2   bool
		none bool
	}{
		{say: "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", h2: true},
		{say: "PRI", h2: true},
		{say: "PRO"},
		{say: "G"},
		{say: "\x16\x03\x01"}, // a TLS hello
		{say: "PR", none: true},
		{say: "", none: true},
	} {
		l := listen(t)
		h2, rest := Split(l)
		type arrival struct {
			h2   bool
			said string
		}
		arrived := make(chan arrival, 2)
		for _, b := range []net.Listener{h2, rest} {
			go func() {
				conn, err := b.Accept()
				if err != nil {
					return
				}
				said, _ := io.ReadAll(conn)
				conn.Close()
				arrived <- arrival{b == h2, string(said)}
			}()
		}
		conn, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		for i := range c.say {
			if _, err := conn.Write([]byte{c.say[i]}); err != nil {
				t.Fatal(err)
			}
		}
		conn.(*net.TCPConn).CloseWrite()
		if c.none {
			// It ended without saying what it is: closed, and given to nobody.
			if n, err := io.Copy(io.Discard, conn); n != 0 || err != nil {
				t.Errorf("%q: got %d bytes, %v, want the end", c.say, n, err)
			}
			h2.Close()
			select {
			case got := <-arrived:
				t.Errorf("%q: arrived as %+v, want nowhere", c.say, got)
			default:
			}
		} else if got := <-arrived; got != (arrival{c.h2, c.say}) {
			t.Errorf("%q: got %+v, want h2 %v and every byte", c.say, got, c.h2)
		}
		conn.Close()
		rest.Close()
	}
}

// TestSplitClose closes one side while connections are silent, and while one
// waits to be accepted: nothing is left running, both sides end.
func TestSplitClose(t *testing.T) {
	l := listen(t)
	h2, rest := Split(l)
	silent, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	waiting, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer waiting.Close()
	if _, err := io.WriteString(waiting, "GET / HTTP/1.1\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	closed := make(chan error, 1)
	go func() { closed <- rest.Close() }()
	select {
	case err := <-closed:
		if err != nil {
			t.Errorf("Close: %v", err)
		}
	case <-ctx.Done():
		t.Fatal("Close waits for connections that say nothing")
	}
	if _, err := h2.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept after Close: got %v, want net.ErrClosed", err)
	}
	if n, _ := io.Copy(io.Discard, silent); n != 0 {
		t.Errorf("a connection that was never accepted got %d bytes", n)
	}
}
