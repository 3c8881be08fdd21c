package main

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev"
	"github.com/holdfast-storage/holdfast/blockdev/blockdevtest"
)

func TestCellIsADevice(t *testing.T) {
	blockdevtest.Run(t, func(*testing.T) blockdev.Device { return newCell(blockdevtest.MinSize) })
}

// put writes a page full of one letter.
func put(t *testing.T, c *cell, number int64, letter byte, fua bool) {
	t.Helper()
	if err := c.WriteAt(context.Background(), bytes.Repeat([]byte{letter}, pageSize), number*pageSize, fua); err != nil {
		t.Fatal(err)
	}
}

func get(t *testing.T, c *cell, number int64) []byte {
	t.Helper()
	p := make([]byte, pageSize)
	if err := c.ReadAt(context.Background(), p, number*pageSize); err != nil {
		t.Fatal(err)
	}
	return p
}

// powerCut cuts and restores.
func powerCut(c *cell, seed uint64) (unsynced, lost int) {
	c.hang()
	c.fail()
	return c.restore(rand.New(rand.NewPCG(seed, 0)))
}

func TestPowerCutKeepsWhatWasFlushed(t *testing.T) {
	for seed := range uint64(50) {
		c := newCell(blockdevtest.MinSize)
		put(t, c, 1, 'a', false)
		put(t, c, 1, 'b', false)
		if err := c.Flush(context.Background()); err != nil {
			t.Fatal(err)
		}
		put(t, c, 2, 'c', false)
		put(t, c, 3, 'd', true)
		unsynced, _ := powerCut(c, seed)
		if unsynced != 1 {
			t.Errorf("%d pages unsynced, want page 2 alone", unsynced)
		}
		if got := get(t, c, 1); got[0] != 'b' || got[pageSize-1] != 'b' {
			t.Fatalf("seed %d: page 1 begins with %q, ends with %q, was flushed as b", seed, got[0], got[pageSize-1])
		}
		if got := get(t, c, 3); got[0] != 'd' {
			t.Fatalf("seed %d: page 3 begins with %q, was written with FUA as d", seed, got[0])
		}
	}
}

// TestPowerCutLosesTheRest: over some seeds each thing that may happen to a page
// that was not flushed happens, nothing else, and the seed decides which.
func TestPowerCutLosesTheRest(t *testing.T) {
	seen := map[string]int{}
	for seed := range uint64(300) {
		var twice [2][]byte
		for i := range twice {
			c := newCell(blockdevtest.MinSize)
			put(t, c, 0, 'a', true)
			put(t, c, 0, 'b', false)
			put(t, c, 0, 'c', false)
			_, lost := powerCut(c, seed)
			twice[i] = get(t, c, 0)
			if newest := bytes.Count(twice[i], []byte{'c'}) == pageSize; (lost == 0) != newest {
				t.Fatalf("seed %d: %d lost, newest %v", seed, lost, newest)
			}
			if again, _ := powerCut(c, seed+1); again != 0 || !bytes.Equal(get(t, c, 0), twice[i]) {
				t.Fatalf("seed %d: what a power cut left changed with the next", seed)
			}
		}
		if !bytes.Equal(twice[0], twice[1]) {
			t.Fatalf("seed %d: not the same twice", seed)
		}
		letters := ""
		for at := 0; at < pageSize; at += sectorSize {
			if l := string(twice[0][at : at+1]); len(letters) == 0 || letters[len(letters)-1:] != l {
				letters += l
			}
			if bytes.Count(twice[0][at:at+sectorSize], twice[0][at:at+1]) != sectorSize {
				t.Fatalf("seed %d: sector at %d is torn", seed, at)
			}
		}
		seen[letters]++
	}
	for _, want := range []string{"a", "b", "c"} {
		if seen[want] < 30 {
			t.Errorf("version %s survived in %d of 300 seeds: %v", want, seen[want], seen)
		}
	}
	for kind := range seen {
		if len(kind) > 2 {
			t.Errorf("a page has sectors %q, of more than two versions", kind)
		}
	}
	if len(seen) < 6 {
		t.Errorf("few pages were torn: %v", seen)
	}
}

func TestCellWithoutPower(t *testing.T) {
	c := newCell(blockdevtest.MinSize)
	put(t, c, 0, 'a', true)
	c.hang()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := c.Flush(ctx); !errors.Is(err, holdfast.ErrTimeout) {
		t.Errorf("a cancelled flush without power: %v, want ErrTimeout", err)
	}
	answer := make(chan error)
	go func() { answer <- c.WriteAt(context.Background(), make([]byte, pageSize), 0, true) }()
	c.fail()
	if err := <-answer; !errors.Is(err, holdfast.ErrIO) {
		t.Errorf("a write without power: %v, want ErrIO", err)
	}
	c.restore(rand.New(rand.NewPCG(1, 0)))
	if got := get(t, c, 0); got[0] != 'a' {
		t.Errorf("the write without power had effect")
	}
}

func TestHungDiskGoesOn(t *testing.T) {
	c := newCell(blockdevtest.MinSize)
	put(t, c, 0, 'a', false)
	c.hang()
	answer := make(chan error)
	go func() {
		answer <- c.WriteAt(context.Background(), bytes.Repeat([]byte{'b'}, pageSize), pageSize, false)
	}()
	select {
	case err := <-answer:
		t.Fatalf("a hung disk answered: %v", err)
	default:
	}
	c.resume()
	if err := <-answer; err != nil {
		t.Errorf("the write of before: %v", err)
	}
	if a, b := get(t, c, 0), get(t, c, 1); a[0] != 'a' || b[0] != 'b' {
		t.Errorf("pages begin with %q and %q", a[0], b[0])
	}
	c.fail()
	if err := c.Flush(context.Background()); !errors.Is(err, holdfast.ErrIO) {
		t.Errorf("a failing disk: %v, want ErrIO", err)
	}
	c.fail()
	c.resume()
	if a := get(t, c, 0); a[0] != 'a' {
		t.Errorf("after the errors the page begins with %q", a[0])
	}
}

func TestVersionsOfAPageAreBounded(t *testing.T) {
	c := newCell(blockdevtest.MinSize)
	put(t, c, 0, 'a', true)
	for i := range 100 {
		put(t, c, 0, byte(i), false)
	}
	if n := len(c.pages[0].versions); n > maxVersions {
		t.Errorf("%d versions are kept", n)
	}
	if got := c.pages[0].versions[0][0]; got != 'a' {
		t.Errorf("the version on the medium is %q, want a", got)
	}
}
