package node

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/holdfast-storage/holdfast"
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
		}{"grow": {s.grow(image), c.grow}, "lead": {s.lead(), c.lead}, "a device grows": {s.grow("/dev/null"), true}} {
			if got.may != (got.err == nil) || got.err != nil && (!errors.Is(got.err, holdfast.ErrNoSpace) || holdfast.RemedyOf(got.err) == "") {
				t.Errorf("%s, %s: got %v", c.name, what, got.err)
			}
		}
	}
}
