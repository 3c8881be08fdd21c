package main

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
)

// story tells a person what happens, each line with the time since the start.
type story struct {
	out   io.Writer
	start time.Time
	mu    sync.Mutex
}

func newStory(out io.Writer) *story { return &story{out: out, start: time.Now()} }

func (s *story) line(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fmt.Fprintf(s.out, "%7.1fs  %s\n", time.Since(s.start).Seconds(), fmt.Sprintf(format, args...))
}

// chapter starts a part of the story.
func (s *story) chapter(title string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fmt.Fprintf(s.out, "\n          %s\n          %s\n", title, strings.Repeat("-", len([]rune(title))))
}

// command shows what is typed on a host.
func (s *story) command(host string, words ...string) {
	for i, w := range words {
		if w == "" || strings.ContainsAny(w, " \"'*") {
			words[i] = "'" + w + "'"
		}
	}
	s.line("%s$ %s", host, strings.Join(words, " "))
}
