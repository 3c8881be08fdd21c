package node

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/cmd/internal/reconcile"
)

// TestHostFill: the file system of an image counts, of what is none nothing does.
func TestHostFill(t *testing.T) {
	image := filepath.Join(t.TempDir(), "a.img")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if f, ok := hostFill(image); !ok || f <= 0 || f > 1 {
		t.Errorf("an image: got %v, %v", f, ok)
	}
	for _, path := range []string{"/dev/null", filepath.Dir(image), image + "-none"} {
		if f, ok := hostFill(path); ok || f != 0 {
			t.Errorf("%s: got %v, %v, want nothing", path, f, ok)
		}
	}
}

// TestSpace: what is free is compared with the ballast, for images on that file system
// and for leading.
func TestSpace(t *testing.T) {
	dir := t.TempDir()
	image := filepath.Join(dir, "a.img")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	free, err := freeBytes(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name       string
		ballast    int64
		grow, lead bool
	}{
		{"plenty", free / 100, true, true},
		{"less than twice", free/2 + free/4, false, true},
		{"less than half", 4 * free, false, false},
	} {
		s, err := newSpace(dir, c.ballast)
		if err != nil {
			t.Fatal(err)
		}
		for what, got := range map[string]struct {
			err error
			may bool
		}{"grow": {s.grow(image, false), c.grow}, "lead": {s.lead(), c.lead}, "a device grows": {s.grow("/dev/null", true), true}} {
			if got.may != (got.err == nil) || got.err != nil && (!errors.Is(got.err, holdfast.ErrNoSpace) || holdfast.RemedyOf(got.err) == "") {
				t.Errorf("%s, %s: got %v", c.name, what, got.err)
			}
		}
	}
}

// TestRoom: what is left of a file system for images ends where grow refuses them more.
func TestRoom(t *testing.T) {
	dir := t.TempDir()
	image := filepath.Join(dir, "a.img")
	if err := os.WriteFile(image, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	free, err := freeBytes(dir)
	if err != nil {
		t.Fatal(err)
	}
	const slack = 1 << 30 // others use the file system, too
	for _, c := range []struct {
		name        string
		ballast     int64
		least, most int64
	}{
		{"plenty", 0, free/100 - slack, free - free/100*(100-reconcile.MarkRefuse)},
		{"three quarters are twice the ballast", free / 8 * 3, free/4 - free/8, free/4 + slack},
		{"less than twice the ballast", free/2 + free/4, 0, 0},
	} {
		s, err := newSpace(dir, c.ballast)
		if err != nil {
			t.Fatal(err)
		}
		room, ok := s.room(image)
		if !ok || room.FS != s.device || room.Has < 1<<20 || room.Left < c.least || room.Left > c.most || (room.Left > 0) != (s.grow(image, false) == nil) {
			t.Errorf("%s: got %+v, %v of %d free, want %d to %d; to grow: %v", c.name, room, ok, free, c.least, c.most, s.grow(image, false))
		}
		s.device++ // the data directory lies elsewhere
		if elsewhere, _ := s.room(image); elsewhere.Left < room.Left-slack || elsewhere.Left == 0 {
			t.Errorf("%s: got %+v, which the ballast has nothing to do with", c.name, elsewhere)
		}
	}
	s, err := newSpace(dir, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"/dev/null", dir, image + "-none"} {
		if room, ok := s.room(path); ok {
			t.Errorf("%s: got %+v, want nothing", path, room)
		}
	}
}

// TestGrowAhead: space is not taken ahead of need from 92 % of the file system on, and
// not at all from 97 %.
func TestGrowAhead(t *testing.T) {
	if os.Geteuid() != 0 || os.Getenv("HOLDFAST_UNIT") == "1" {
		t.Skip("mounting needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=16m"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, 0) //nolint:errcheck // the directory's removal tells
	image := filepath.Join(dir, "a.img")
	s, err := newSpace(t.TempDir(), 1)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		percent    int
		ahead, may bool
	}{{90, true, true}, {94, false, true}, {98, false, false}} {
		if err := os.WriteFile(image, make([]byte, 16<<20*c.percent/100), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := s.grow(image, true); (err == nil) != c.ahead {
			t.Errorf("%d %%, ahead of need: %v", c.percent, err)
		}
		if err := s.grow(image, false); (err == nil) != c.may {
			t.Errorf("%d %%, needed: %v", c.percent, err)
		}
	}
}
