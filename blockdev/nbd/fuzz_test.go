package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast/blockdev/blockdevtest"
)

// scripted is a connection whose client sends fixed bytes and hangs up; what
// the server sends is kept.
type scripted struct {
	in io.Reader

	mu  sync.Mutex
	out bytes.Buffer
}

func (c *scripted) Read(p []byte) (int, error) { return c.in.Read(p) }

func (c *scripted) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.out.Write(p)
}

func (c *scripted) Close() error                     { return nil }
func (c *scripted) LocalAddr() net.Addr              { return &net.UnixAddr{} }
func (c *scripted) RemoteAddr() net.Addr             { return &net.UnixAddr{} }
func (c *scripted) SetDeadline(time.Time) error      { return nil }
func (c *scripted) SetReadDeadline(time.Time) error  { return nil }
func (c *scripted) SetWriteDeadline(time.Time) error { return nil }

// talk runs the bytes through a fresh server and returns all it sent. The
// server must not panic, must end, and must give everything back.
func talk(t *testing.T, in []byte) []byte {
	dev := blockdevtest.NewMemory(64 << 10)
	s := serving(t, Options{}, dev)
	if err := s.AddExport(Export{Name: "ro", Description: "d", Device: dev, ReadOnly: true}); err != nil {
		t.Fatal(err)
	}
	nc := &scripted{in: bytes.NewReader(in)}
	s.ServeConn(context.Background(), nc)
	s.mu.Lock()
	s.closed = true // wait as Close does, but let the connection run to its end
	s.mu.Unlock()
	s.running.Wait()
	if !s.payload.TryAcquire(s.opts.PayloadBytes) {
		t.Fatalf("payload memory was not given back")
	}
	s.payload.Release(s.opts.PayloadBytes)
	return nc.out.Bytes()
}

// seeds are the client's side of every history.
func seeds(f *testing.F) {
	files, err := filepath.Glob("testdata/histories/*.txt")
	if err != nil || len(files) == 0 {
		f.Fatalf("histories: %v, %d files", err, len(files))
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		var in []byte
		for line := range strings.Lines(string(text)) {
			if strings.HasPrefix(line, ">") {
				b, _, err := tokens(line[1:])
				if err != nil {
					f.Fatal(err)
				}
				in = append(in, b...)
			}
		}
		f.Add(in)
	}
}

// FuzzConnection: whatever a client sends from the start on, the server ends
// and has sent whole messages of the protocol.
func FuzzConnection(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, in []byte) {
		out := talk(t, in)
		if err := wholeMessages(in, out); err != nil {
			t.Fatalf("%v\nsent % x", err, in)
		}
	})
}

// FuzzTransmission: the same from the first request on, with every request that
// the server could follow answered once.
func FuzzTransmission(f *testing.F) {
	for _, r := range []request{
		{cmd: cmdRead, length: 512}, {cmd: cmdRead, offset: 64<<10 - 1, length: 2}, {cmd: cmdFlush}, {cmd: cmdDisc},
		{cmd: cmdTrim, length: 8192, flags: cmdFlagFUA}, {cmd: cmdWriteZeroes, length: 1, flags: cmdFlagNoHole}, {cmd: 5, length: 1},
	} {
		f.Add(true, appendRequest(nil, r))
		f.Add(false, appendRequest(appendRequest(nil, r), request{cmd: cmdRead, length: 7, handle: 1}))
	}
	f.Add(true, append(appendRequest(nil, request{cmd: cmdWrite, length: 5}), "hello"...))
	f.Fuzz(func(t *testing.T, structured bool, in []byte) {
		lengths := numberRequests(in)
		var opening []byte
		opening = append(opening, 0, 0, 0, 3)
		appendOption := func(opt option, data []byte) {
			opening = binary.BigEndian.AppendUint64(opening, magicOption)
			opening = binary.BigEndian.AppendUint32(opening, uint32(opt))
			opening = binary.BigEndian.AppendUint32(opening, uint32(len(data)))
			opening = append(opening, data...)
		}
		if structured {
			appendOption(optStructuredReply, nil)
		}
		appendOption(optExportName, []byte("vol"))
		out := talk(t, append(opening, in...))
		out = out[18:]
		if structured {
			out = out[20:]
		}
		if len(out) < 10 {
			t.Fatalf("not in transmission: % x", out)
		}
		answered := make([]int, len(lengths))
		if err := countReplies(out[10:], structured, lengths, answered); err != nil {
			t.Fatalf("%v\nrequests % x", err, in)
		}
		for i, n := range answered {
			if n != 1 {
				t.Fatalf("request %d was answered %d times, want 1\nrequests % x", i, n, in)
			}
		}
	})
}

// numberRequests gives the whole requests up to DISC, or to what cannot be
// followed, the handles 0, 1, 2... It returns how much data a simple reply to
// each carries.
func numberRequests(in []byte) (lengths []int) {
	for len(in) >= requestSize {
		r, ok := decodeRequest(in)
		if !ok || r.cmd == cmdDisc {
			break
		}
		header := in
		in = in[requestSize:]
		if r.cmd == cmdWrite {
			if uint64(r.length) > uint64(len(in)) {
				break
			}
			in = in[r.length:]
		}
		binary.BigEndian.PutUint64(header[8:], uint64(len(lengths)))
		n := 0
		if r.cmd == cmdRead {
			n = int(r.length)
		}
		lengths = append(lengths, n)
	}
	return lengths
}

// countReplies walks a stream of replies, which must be whole, and counts those
// to each request.
func countReplies(out []byte, structured bool, lengths, answered []int) error {
	be := binary.BigEndian
	for len(out) > 0 {
		if len(out) < 16 {
			return fmt.Errorf("a reply of %d bytes", len(out))
		}
		handle := be.Uint64(out[8:])
		if handle >= uint64(len(lengths)) {
			return fmt.Errorf("reply to %d, which was not asked", handle)
		}
		answered[handle]++
		switch be.Uint32(out) {
		case magicSimple:
			n := lengths[handle]
			if e := be.Uint32(out[4:]); e != 0 {
				n = 0
			} else if structured && n > 0 {
				return fmt.Errorf("simple reply to a READ with structured replies")
			}
			if n > len(out)-16 {
				return fmt.Errorf("%d bytes of data, want %d", len(out)-16, n)
			}
			out = out[16+n:]
		case magicStructured:
			if !structured || len(out) < 20 || uint64(be.Uint32(out[16:])) > uint64(len(out)-20) {
				return fmt.Errorf("structured reply % x", out[:16])
			}
			out = out[20+be.Uint32(out[16:]):]
		default:
			return fmt.Errorf("reply magic % x", out[:4])
		}
	}
	return nil
}

// wholeMessages checks the server's side of a negotiation up to where
// transmission begins.
func wholeMessages(in, out []byte) error {
	be := binary.BigEndian
	if len(out) < 18 || be.Uint64(out) != magicInit || be.Uint64(out[8:]) != magicOption {
		return fmt.Errorf("no greeting")
	}
	out = out[18:]
	for len(out) >= 20 && be.Uint64(out) == magicOptReply {
		n := uint64(be.Uint32(out[16:]))
		if n > uint64(len(out)-20) {
			return fmt.Errorf("option reply of %d bytes, %d are there", n, len(out)-20)
		}
		out = out[20+n:]
	}
	if len(out) > 0 && !bytes.Contains(in, []byte("vol")) && !bytes.Contains(in, []byte("ro")) {
		return fmt.Errorf("%d bytes after the last option reply, and no export was named", len(out))
	}
	return nil
}
