package mount

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/holdfast-storage/holdfast"
)

func open(t *testing.T, path string) *Counts {
	t.Helper()
	c, err := OpenCounts(path)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestCounts: two containers share a mount, unmount unevenly, across restarts.
func TestCounts(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mounts.json")
	type step struct {
		add        bool
		volume, id string
		want       bool // first, or last
	}
	for i, s := range []step{
		{true, "a", "1", true}, {true, "a", "1", false}, {true, "a", "2", false}, {true, "b", "1", true},
		{false, "a", "1", false}, {false, "a", "1", false}, {false, "a", "9", false}, {false, "a", "2", true},
		{false, "a", "2", true}, // asked again: the unmount may not have been finished
		{true, "a", "3", true}, {false, "c", "1", true},
	} {
		c := open(t, path) // a restart before each step
		do := c.Remove
		if s.add {
			do = c.Add
		}
		if got, err := do(s.volume, s.id); got != s.want || err != nil {
			t.Errorf("step %d %+v: got %v, %v, want %v", i, s, got, err, s.want)
		}
	}
	c := open(t, path)
	if got := c.Volumes(); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("volumes: got %v, want a and b", got)
	}
	if got := c.Holders("a"); !slices.Equal(got, []string{"3"}) {
		t.Errorf("holders of a: got %v, want 3", got)
	}
	forgotten, err := c.Reconcile(func(v string) bool { return v == "b" })
	if err != nil || !slices.Equal(forgotten, []string{"a"}) {
		t.Errorf("reconcile: got %v, %v, want a forgotten", forgotten, err)
	}
	if got := open(t, path).Volumes(); !slices.Equal(got, []string{"b"}) {
		t.Errorf("volumes after reconcile and restart: got %v, want b", got)
	}
}

func TestCountsFile(t *testing.T) {
	for name, c := range map[string]struct {
		text string
		want holdfast.Kind
	}{
		"torn":           {`{"version":1,"vol`, holdfast.ErrIntegrity},
		"empty":          {``, holdfast.ErrIntegrity},
		"of the future":  {`{"version":2,"volumes":{}}`, holdfast.ErrUnsupported},
		"of no version":  {`{"volumes":{}}`, holdfast.ErrUnsupported},
		"with no volume": {`{"version":1}`, ""},
		"with a volume":  {`{"version":1,"volumes":{"a":["1"],"b":[]}}`, ""},
	} {
		path := filepath.Join(t.TempDir(), "mounts.json")
		if err := os.WriteFile(path, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := OpenCounts(path)
		if holdfast.KindOf(err) != c.want {
			t.Errorf("%s: got %v, want %q", name, err, c.want)
		}
		if err == nil && len(got.Holders("b")) != 0 {
			t.Errorf("%s: a volume without users is kept", name)
		}
	}
}

// TestCountsUnwritten: what could not be written did not happen.
func TestCountsUnwritten(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "gone")
	c := open(t, filepath.Join(dir, "mounts.json"))
	if first, err := c.Add("a", "1"); !errors.Is(err, holdfast.ErrIO) || !first {
		t.Errorf("add: got %v, %v, want an I/O error", first, err)
	}
	if got := c.Holders("a"); len(got) != 0 {
		t.Errorf("holders: got %v, want none", got)
	}
}

func TestCountsBounded(t *testing.T) {
	c := open(t, filepath.Join(t.TempDir(), "mounts.json"))
	c.volumes["a"] = slices.Repeat([]string{"x"}, maxHolders)
	if _, err := c.Add("a", "one more"); !errors.Is(err, holdfast.ErrRefused) {
		t.Errorf("got %v, want it refused", err)
	}
}

func TestCountsConcurrent(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mounts.json")
	c := open(t, path)
	var all sync.WaitGroup
	firsts := make(chan string, 100)
	for i := range 8 {
		all.Go(func() {
			id := strings.Repeat("x", i+1)
			if first, err := c.Add("a", id); err != nil {
				t.Error(err)
			} else if first {
				firsts <- id
			}
		})
	}
	all.Wait()
	if len(firsts) != 1 || len(open(t, path).Holders("a")) != 8 {
		t.Errorf("got %d first ones and %d users, want 1 and 8", len(firsts), len(c.Holders("a")))
	}
}
