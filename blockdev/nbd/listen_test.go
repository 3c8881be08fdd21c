package nbd

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-storage/holdfast"
)

func TestListenUnix(t *testing.T) {
	path := filepath.Join(t.TempDir(), "nbd.sock")
	l, err := ListenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := st.Mode(), os.ModeSocket|0o660; got != want {
		t.Errorf("the socket's mode is %v, want %v", got, want)
	}
	if _, err := ListenUnix(path); !errors.Is(err, holdfast.ErrExists) {
		t.Errorf("ListenUnix on a socket in use: %v, want kind %v", err, holdfast.ErrExists)
	}
	go func() {
		if nc, err := l.Accept(); err == nil { // the probe above
			nc.Close()
		}
		if nc, err := l.Accept(); err == nil {
			nc.Write([]byte("x"))
			nc.Close()
		}
	}()
	nc, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	if n, err := nc.Read(make([]byte, 1)); n != 1 {
		t.Errorf("read from the listener: %d bytes, %v", n, err)
	}
	l.Close()
	l.Close()
	if entries, _ := os.ReadDir(filepath.Dir(path)); len(entries) != 0 {
		t.Errorf("closing left %v", entries)
	}
}

func TestListenUnixReplacesStale(t *testing.T) {
	path := filepath.Join(t.TempDir(), "nbd.sock")
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	stale.Close()
	l, err := ListenUnix(path)
	if err != nil {
		t.Fatalf("ListenUnix over a stale socket: %v", err)
	}
	l.Close()
}

func TestListenUnixRefuses(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ListenUnix(file); !errors.Is(err, holdfast.ErrExists) {
		t.Errorf("ListenUnix over a file: %v, want kind %v", err, holdfast.ErrExists)
	}
	if b, err := os.ReadFile(file); string(b) != "precious" {
		t.Errorf("the file holds %q, %v afterwards", b, err)
	}
	long := "/" + strings.Repeat("x", 107)
	if _, err := ListenUnix(long); !errors.Is(err, holdfast.ErrInvalid) || !strings.Contains(err.Error(), "108") {
		t.Errorf("ListenUnix on a path of 108 bytes: %v, want kind %v and the number", err, holdfast.ErrInvalid)
	}
	if _, err := ListenUnix(filepath.Join(dir, "none", "nbd.sock")); !errors.Is(err, holdfast.ErrIO) {
		t.Errorf("ListenUnix in a directory that is not there: %v, want kind %v", err, holdfast.ErrIO)
	}
}
