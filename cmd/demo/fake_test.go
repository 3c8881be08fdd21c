package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// fakeRedis keeps values in memory and speaks enough of the protocol for the demo.
type fakeRedis struct {
	address string

	mu     sync.Mutex
	values map[string]string
	refuse string            // answer to every SET, if not empty
	muted  int               // commands that were not answered
	mute   bool              // answers nothing any more, but keeps connections
	conns  map[net.Conn]bool // open ones
}

func startFake(t *testing.T) *fakeRedis {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &fakeRedis{address: listener.Addr().String(), values: make(map[string]string), conns: make(map[net.Conn]bool)}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			f.mu.Lock()
			f.conns[conn] = true
			f.mu.Unlock()
			serving.Go(func() { f.serve(conn) })
		}
	})
	t.Cleanup(func() {
		listener.Close()
		f.cut()
		serving.Wait()
	})
	return f
}

// cut breaks every connection.
func (f *fakeRedis) cut() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for conn := range f.conns {
		conn.Close()
	}
}

func (f *fakeRedis) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *fakeRedis) serve(conn net.Conn) {
	defer conn.Close()
	in := bufio.NewReader(conn)
	for {
		args, err := readCommand(in)
		if err != nil {
			return
		}
		f.mu.Lock()
		answer := "-ERR unknown command\r\n"
		switch value, there := f.values[args[1]]; {
		case f.mute:
			answer = ""
			f.muted++
		case args[0] == "SET" && f.refuse != "":
			answer = "-" + f.refuse + "\r\n"
		case args[0] == "SET":
			f.values[args[1]] = args[2]
			answer = "+OK\r\n"
		case args[0] == "GET" && there:
			answer = fmt.Sprintf("$%d\r\n%s\r\n", len(value), value)
		case args[0] == "GET":
			answer = "$-1\r\n"
		}
		f.mu.Unlock()
		if _, err := io.WriteString(conn, answer); err != nil {
			return
		}
	}
}

// readCommand reads an array of bulk strings, of at least two.
func readCommand(in *bufio.Reader) ([]string, error) {
	number := func(kind string) (int, error) {
		line, err := in.ReadString('\n')
		if err != nil {
			return 0, err
		}
		return strconv.Atoi(strings.TrimPrefix(strings.TrimRight(line, "\r\n"), kind))
	}
	n, err := number("*")
	if err != nil || n < 2 {
		return nil, fmt.Errorf("a command of %d words: %w", n, err)
	}
	var args []string
	for range n {
		size, err := number("$")
		if err != nil {
			return nil, err
		}
		word := make([]byte, size+2)
		if _, err := io.ReadFull(in, word); err != nil {
			return nil, err
		}
		args = append(args, string(word[:size]))
	}
	return args, nil
}
