package peer

import (
	"sync"
	"time"

	"github.com/holdfast-storage/holdfast"
)

// maxVoices bounds the voters whose word is kept: more than a cluster has, and
// their old addresses.
const maxVoices = 16

// hearsay is what voters said, in their answers to this node's heartbeats, of who
// is gone. Heartbeats go to voters only, so it is all that another node knows. It
// serves what needs no certainty: placement, forwarding, what people are shown.
type hearsay struct {
	now Clock

	mu   sync.Mutex // of the field below
	said map[string]word
}

// word is what one voter said last.
type word struct {
	at   time.Duration
	gone map[holdfast.NodeID]bool
}

func newHearsay(now Clock) *hearsay { return &hearsay{now: now, said: map[string]word{}} }

// tell notes a voter's word and reports whether it is another than before.
func (h *hearsay) tell(voter string, gone []holdfast.NodeID) (news bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for who, w := range h.said {
		if h.now()-w.at >= GoneAfter {
			delete(h.said, who)
		}
	}
	old, known := h.said[voter]
	if !known && len(h.said) >= maxVoices {
		return false
	}
	w := word{at: h.now(), gone: make(map[holdfast.NodeID]bool, len(gone))}
	for _, n := range gone {
		w.gone[n] = true
		news = news || !old.gone[n]
	}
	news = news || len(w.gone) != len(old.gone)
	h.said[voter] = w
	return news
}

// gone reports whether every voter heard of lately calls a node gone, and one was.
func (h *hearsay) gone(node holdfast.NodeID) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	any := false
	for _, w := range h.said {
		if h.now()-w.at >= GoneAfter {
			continue
		}
		if !w.gone[node] {
			return false
		}
		any = true
	}
	return any
}
