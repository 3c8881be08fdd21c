package node

import (
	"context"
	"fmt"
	"strings"
	"time"
)

// step is one of a start.
type step struct {
	do    func(context.Context) error
	what  string // it does, for people; "": it does not take long
	asks  bool   // the cluster, so that the Peer may know what it waits for
	since time.Time
}

// starting says what a start that is not over waits for.
func (n *node) starting() string {
	s := n.start.Load()
	if s == nil || s.what == "" {
		return ""
	}
	text := fmt.Sprintf("for %v it has been trying to %s", time.Since(s.since).Round(time.Second), s.what)
	if err := n.peer.Trouble(); s.asks && err != nil {
		text += "; last error: " + err.Error()
	}
	return text
}

func (n *node) joining() string {
	if len(n.o.Join) == 0 {
		return "make a cluster"
	}
	return "join the cluster at " + strings.Join(n.o.Join, " or ")
}
