package attachment

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/replication/replica"
)

// While a volume is read, its members hold back a new writer for as long as
// they promised; a writer that leaves in order gives the promises back.
func TestReadPromises(t *testing.T) {
	c := newCluster(t, 3, 4<<20, 4<<20)
	for _, h := range c.hosts {
		h.promise = replica.DefaultPromiseLength
		h.kill()
		h.start()
	}
	a := c.attach(c.hosts[0])
	m := newModel(31, c.size)
	m.mutate(t, a, 20)
	covered := func(a *Attachment) func() bool {
		return func() bool {
			m.verify(t, a)
			for _, x := range a.Status().Segments[0].State.Members {
				if x.Promised == 0 {
					return false
				}
			}
			return true
		}
	}
	c.eventually("every member promised", a, covered(a))

	b, err := New(c.options(c.hosts[1]))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	waits := func() bool {
		for _, h := range c.hosts {
			for _, r := range h.server.Replicas() {
				for _, w := range r.Waits {
					if strings.Contains(w.For, "promise to an older writer") {
						return true
					}
				}
			}
		}
		return false
	}
	c.eventually("a member waits for its promise to run out", b, waits)
	c.waitAttached(b)
	if err := a.ReadAt(t.Context(), make([]byte, 4096), 0); !errors.Is(err, holdfast.ErrFenced) {
		t.Errorf("read of the fenced writer: %v, want ErrFenced", err)
	}
	m.verify(t, b)
	m.mutate(t, b, 20)

	// Detached in order: nobody waits for a promise.
	c.eventually("every member promised", b, covered(b))
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := b.Detach(ctx); err != nil {
		t.Fatal(err)
	}
	d, err := New(c.options(c.hosts[2]))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	if waits() {
		t.Error("a member waits for a promise that was given back")
	}
	c.waitAttached(d)
	m.verify(t, d)
	if err := d.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.compare(m.data, c.hosts...)
}
