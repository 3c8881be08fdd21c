package nbd

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast/blockdev/blockdevtest"
)

// Histories are conversations in bytes, one file each in testdata/histories.
// Lines:
//
//	# prose
//	> TOKENS    the client sends
//	< TOKENS    the server must send exactly this
//	<...        the server sends an error text of any length here: a length of
//	            the stated width, then that many bytes (see tokens "text4", "text2")
//	closed      the server must close the connection, sending nothing more
//	hangup      the client closes its sending side
//
// Tokens: "quoted text", 2:N 4:N 8:N (N in that many bytes, big-endian, decimal
// or 0x), N*HH (N bytes of hex HH), a name of the protocol from names.
//
// The server has exports "vol" (1 MiB; byte i of it is 1 + i/4096), "ro" (the
// same, read-only, with a description) and "odd" (1000 bytes).

// names are the protocol's numbers in their width.
var names = map[string]string{
	"NBDMAGIC": "8:0x4e42444d41474943", "IHAVEOPT": "8:0x49484156454f5054", "OPTREPLY": "8:0x0003e889045565a9",
	"REQUEST": "4:0x25609513", "SIMPLE": "4:0x67446698", "CHUNK": "4:0x668e33ef",
	"HELLO": "8:0x4e42444d41474943 8:0x49484156454f5054 2:3", "C_FIXED": "4:1", "C_FIXED_NOZEROES": "4:3",
	"EXPORT_NAME": "4:1", "ABORT": "4:2", "LIST": "4:3", "STARTTLS": "4:5", "INFO": "4:6", "GO": "4:7",
	"STRUCTURED_REPLY": "4:8", "LIST_META_CONTEXT": "4:10", "SET_META_CONTEXT": "4:11", "EXTENDED_HEADERS": "4:12",
	"ACK": "4:1", "SERVER": "4:2", "REP_INFO": "4:3",
	"ERR_UNSUP": "4:0x80000001", "ERR_POLICY": "4:0x80000002", "ERR_INVALID": "4:0x80000003",
	"ERR_UNKNOWN": "4:0x80000006", "ERR_SHUTDOWN": "4:0x80000007", "ERR_TOO_BIG": "4:0x80000009",
	"READ": "2:0", "WRITE": "2:1", "DISC": "2:2", "FLUSH": "2:3", "TRIM": "2:4", "CACHE": "2:5",
	"WRITE_ZEROES": "2:6", "BLOCK_STATUS": "2:7",
	"NONE": "2:0", "FUA": "2:1", "NO_HOLE": "2:2", "DF": "2:4", "REQ_ONE": "2:8",
	"DONE": "2:1", "OFFSET_DATA": "2:1", "ERROR": "2:0x8001",
	"OK": "4:0", "EPERM": "4:1", "EIO": "4:5", "EINVAL": "4:22", "ENOSPC": "4:28", "ESHUTDOWN": "4:108",
}

// tokens splits a line and encodes it. text4 and text2 end it: what follows is
// a text whose length has that many bytes.
func tokens(line string) (b []byte, text int, err error) {
	for line = strings.TrimSpace(line); line != ""; line = strings.TrimSpace(line) {
		var word string
		if line[0] == '"' {
			s, err := strconv.QuotedPrefix(line)
			if err != nil {
				return nil, 0, err
			}
			line = line[len(s):]
			s, err = strconv.Unquote(s)
			if err != nil {
				return nil, 0, err
			}
			b = append(b, s...)
			continue
		}
		word, line, _ = strings.Cut(line, " ")
		if word == "text4" || word == "text2" {
			return b, int(word[4] - '0'), nil
		}
		if name, ok := names[word]; ok {
			line = name + " " + line
			continue
		}
		if width, number, ok := strings.Cut(word, ":"); ok {
			n, err := strconv.ParseUint(number, 0, 64)
			if err != nil {
				return nil, 0, err
			}
			full := binary.BigEndian.AppendUint64(nil, n)
			w, err := strconv.Atoi(width)
			if err != nil || w < 1 || w > 8 {
				return nil, 0, fmt.Errorf("width in %q", word)
			}
			b = append(b, full[8-w:]...)
			continue
		}
		if count, digits, ok := strings.Cut(word, "*"); ok {
			n, err := strconv.Atoi(count)
			if err != nil {
				return nil, 0, err
			}
			one, err := hex.DecodeString(digits)
			if err != nil {
				return nil, 0, err
			}
			b = append(b, bytes.Repeat(one, n)...)
			continue
		}
		return nil, 0, fmt.Errorf("unknown token %q", word)
	}
	return b, 0, nil
}

// historyServer serves the exports of histories.
func historyServer(t testing.TB) *Server {
	t.Helper()
	s, err := NewServer(Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	for _, e := range []Export{
		{Name: "vol", Device: patterned(t, 1<<20)},
		{Name: "ro", Description: "read only", Device: patterned(t, 1<<20), ReadOnly: true},
		{Name: "odd", Device: patterned(t, 1000)},
	} {
		if err := s.AddExport(e); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func patterned(t testing.TB, size int64) *blockdevtest.Memory {
	t.Helper()
	m := blockdevtest.NewMemory(size)
	p := make([]byte, size)
	for i := range p {
		p[i] = byte(1 + i/4096)
	}
	if err := m.WriteAt(context.Background(), p, 0, false); err != nil {
		t.Fatal(err)
	}
	return m
}

// pair returns two ends of a connected unix socket.
func pair(t testing.TB) (client, server *net.UnixConn) {
	t.Helper()
	dir := t.TempDir()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err = net.DialUnix("unix", nil, l.Addr().(*net.UnixAddr))
	if err != nil {
		t.Fatal(err)
	}
	server, err = l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

// patience bounds a test that waits for what does not come; it is no part of
// what is tested.
const patience = 20 * time.Second

func TestHistories(t *testing.T) {
	files, err := filepath.Glob("testdata/histories/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("histories: %v, %d files", err, len(files))
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			client, server := pair(t)
			s := historyServer(t)
			s.ServeConn(context.Background(), server)
			if err := client.SetDeadline(time.Now().Add(patience)); err != nil {
				t.Fatal(err)
			}
			playHistory(t, file, client)
		})
	}
}

func playHistory(t *testing.T, file string, client *net.UnixConn) {
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for n := 1; lines.Scan(); n++ {
		line, _, _ := strings.Cut(lines.Text(), " # ")
		at := fmt.Sprintf("%s:%d: %s", file, n, line)
		switch {
		case line == "" || line[0] == '#':
		case line == "closed":
			rest, err := io.ReadAll(client)
			if len(rest) > 0 || err != nil && !strings.Contains(err.Error(), "reset") {
				t.Fatalf("%s\ngot % x and %v, want the connection closed", at, rest, err)
			}
		case line == "hangup":
			if err := client.CloseWrite(); err != nil {
				t.Fatalf("%s\n%v", at, err)
			}
		case line[0] == '>':
			b, _, err := tokens(line[1:])
			if err != nil {
				t.Fatalf("%s\n%v", at, err)
			}
			if _, err := client.Write(b); err != nil {
				t.Fatalf("%s\n%v", at, err)
			}
		case line[0] == '<':
			want, text, err := tokens(line[1:])
			if err != nil {
				t.Fatalf("%s\n%v", at, err)
			}
			got := make([]byte, len(want))
			if k, err := io.ReadFull(client, got); err != nil {
				t.Fatalf("%s\ngot  % x, then %v\nwant % x", at, got[:k], err, want)
			}
			if !bytes.Equal(got, want) {
				t.Fatalf("%s\ngot  % x\nwant % x", at, got, want)
			}
			if text > 0 {
				skipText(t, at, client, text)
			}
		default:
			t.Fatalf("%s\nunknown line", at)
		}
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
}

// skipText reads a text for people, which has to be there.
func skipText(t *testing.T, at string, r io.Reader, width int) {
	t.Helper()
	length := make([]byte, 8)
	if _, err := io.ReadFull(r, length[8-width:]); err != nil {
		t.Fatalf("%s\nlength of the text: %v", at, err)
	}
	text := make([]byte, binary.BigEndian.Uint64(length))
	if _, err := io.ReadFull(r, text); err != nil || len(text) == 0 {
		t.Fatalf("%s\ntext %q, %v", at, text, err)
	}
}
