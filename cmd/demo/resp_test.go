package main

import (
	"bufio"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
)

// answers returns a client whose server has sent text and nothing more.
func answers(text string) *client {
	return &client{in: bufio.NewReaderSize(strings.NewReader(text), maxLine)}
}

func TestReceive(t *testing.T) {
	for text, want := range map[string]string{
		"+OK\r\n":             "OK",
		":12\r\n":             "12",
		"$5\r\nhello\r\n":     "hello",
		"$0\r\n\r\n":          "",
		"$4\r\na\r\nb\r\n":    "a\r\nb",
		"+\r\n":               "",
		"$2\r\nab\r\n+OK\r\n": "ab",
	} {
		if got, err := answers(text).receive(); err != nil || got != want {
			t.Errorf("receive %q: got %q %v, want %q", text, got, err, want)
		}
	}
	for text, want := range map[string]error{
		"-ERR no\r\n": errReply,
		"$-1\r\n":     errNil,
		"":            io.EOF,
		"$5\r\nhel":   io.ErrUnexpectedEOF,
		"$5":          io.EOF,
	} {
		if got, err := answers(text).receive(); !errors.Is(err, want) {
			t.Errorf("receive %q: got %q %v, want %v", text, got, err, want)
		}
	}
	for _, text := range []string{"\r\n", "\n", "+OK\n", "?x\r\n", "$x\r\n", "$-2\r\n", "$99999999999\r\n", "$1\r\nabc", "*1\r\n",
		"+" + strings.Repeat("x", maxLine) + "\r\n"} {
		got, err := answers(text).receive()
		if err == nil || errors.Is(err, errReply) || errors.Is(err, errNil) {
			t.Errorf("receive %.20q: got %q %v, want an error of the connection", text, got, err)
		}
	}
}

func FuzzReceive(f *testing.F) {
	for _, seed := range []string{"+OK\r\n", "$3\r\nabc\r\n", "$-1\r\n", "-ERR\r\n", "$1048577\r\n", "*"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) { answers(text).receive() })
}

func TestSend(t *testing.T) {
	here, there := net.Pipe()
	defer here.Close()
	got := make(chan string, 1)
	go func() {
		all, _ := io.ReadAll(there)
		got <- string(all)
	}()
	c := &client{conn: here}
	if err := c.send("SET", "k", "two words\r\n", ""); err != nil {
		t.Fatal(err)
	}
	here.Close()
	if want, got := "*4\r\n$3\r\nSET\r\n$1\r\nk\r\n$11\r\ntwo words\r\n\r\n$0\r\n\r\n", <-got; got != want {
		t.Errorf("send: got %q, want %q", got, want)
	}
}
