package blockdevtest

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/holdfast-storage/holdfast"
)

const (
	// writers and readers work at the same time; more would not meet more
	// often on the few blocks they share.
	writers, readers = 4, 4
	// rounds of each writer.
	rounds = 150
)

// A version fills a block: each of its 512-byte sectors carries the block, the
// writer and the writer's count, so a mixture of two versions shows.
type version struct {
	block  uint32
	writer uint32
	count  uint64
}

func (v version) fill(p []byte) {
	for s := 0; s < len(p); s += holdfast.LogicalBlockSize {
		sector := p[s : s+holdfast.LogicalBlockSize]
		binary.LittleEndian.PutUint32(sector, v.block)
		binary.LittleEndian.PutUint32(sector[4:], v.writer)
		for i := 8; i < len(sector); i += 8 {
			binary.LittleEndian.PutUint64(sector[i:], v.count)
		}
	}
}

// parse returns the version that a block holds, or an error if it is a mixture.
func parse(p []byte) (version, error) {
	v := version{
		block:  binary.LittleEndian.Uint32(p),
		writer: binary.LittleEndian.Uint32(p[4:]),
		count:  binary.LittleEndian.Uint64(p[8:]),
	}
	want := make([]byte, len(p))
	v.fill(want)
	if i := firstDifference(p, want); i >= 0 {
		return v, fmt.Errorf("torn block: it begins as block %d writer %d count %d, byte %d differs", v.block, v.writer, v.count, i)
	}
	return v, nil
}

// together runs n copies of fn and waits for them; the first error fails t.
func together(t *testing.T, n int, fn func(i int) error) {
	t.Helper()
	var wg sync.WaitGroup
	errs := make([]error, n)
	for i := range n {
		wg.Add(1)
		go func() {
			defer wg.Done()
			errs[i] = fn(i)
		}()
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// testConcurrentVersions: every block has one writer, which counts upwards. A
// read that begins after a write returned sees that version or a later one, and
// none that was not begun; blocks are never mixtures.
func testConcurrentVersions(t *testing.T, d *device) {
	const perWriter = 4
	const bs = holdfast.BlockSize
	var acked, begun [writers * perWriter]atomic.Uint64
	check := func(b int, low uint64) error {
		p := make([]byte, bs)
		if err := d.ReadAt(context.Background(), p, int64(b)*bs); err != nil {
			return fmt.Errorf("read block %d: %w", b, err)
		}
		high := begun[b].Load()
		v, err := parse(p)
		if err != nil {
			return err
		}
		if v.count < low || v.count > high || v.count > 0 && int(v.block) != b {
			return fmt.Errorf("block %d holds block %d count %d, want count %d to %d", b, v.block, v.count, low, high)
		}
		return nil
	}
	together(t, writers+readers, func(i int) error {
		rnd := rand.New(rand.NewPCG(1, uint64(i))) //nolint:gosec // repeatable on purpose
		if i >= writers {
			for range rounds {
				b := rnd.IntN(writers * perWriter)
				if err := check(b, acked[b].Load()); err != nil {
					return err
				}
			}
			return nil
		}
		p := make([]byte, perWriter*bs)
		for count := uint64(1); count <= rounds; count++ {
			// A run of this writer's blocks in one request.
			first := rnd.IntN(perWriter)
			n := 1 + rnd.IntN(perWriter-first)
			for j := range n {
				b := i*perWriter + first + j
				version{uint32(b), uint32(i), count}.fill(p[j*bs : (j+1)*bs])
				begun[b].Store(count)
			}
			at := i*perWriter + first
			if err := d.WriteAt(context.Background(), p[:n*bs], int64(at)*bs, rnd.IntN(8) == 0); err != nil {
				return fmt.Errorf("write block %d: %w", at, err)
			}
			for j := range n {
				acked[at+j].Store(count)
			}
			if rnd.IntN(16) == 0 {
				if err := d.Flush(context.Background()); err != nil {
					return fmt.Errorf("flush: %w", err)
				}
			}
		}
		return nil
	})
	for b := range begun {
		if err := check(b, acked[b].Load()); err != nil {
			t.Fatal(err)
		}
	}
}

// testConcurrentOverlap: writers meet on the same blocks. Whatever the order,
// a block holds one writer's version whole, and in the end that of a write
// which no other write to the block came wholly after.
func testConcurrentOverlap(t *testing.T, d *device) {
	const blocks = 4
	const bs = holdfast.BlockSize
	var clock atomic.Uint64
	type write struct {
		version
		first, n   int
		begun, end uint64
	}
	history := make([][]write, writers)
	together(t, writers, func(i int) error {
		rnd := rand.New(rand.NewPCG(2, uint64(i))) //nolint:gosec // repeatable on purpose
		p := make([]byte, blocks*bs)
		for count := uint64(1); count <= rounds; count++ {
			w := write{version: version{writer: uint32(i), count: count}, first: rnd.IntN(blocks)}
			w.n = 1 + rnd.IntN(blocks-w.first)
			for j := range w.n {
				version{uint32(w.first + j), uint32(i), count}.fill(p[j*bs : (j+1)*bs])
			}
			w.begun = clock.Add(1)
			if err := d.WriteAt(context.Background(), p[:w.n*bs], int64(w.first)*bs, false); err != nil {
				return fmt.Errorf("write block %d: %w", w.first, err)
			}
			w.end = clock.Add(1)
			history[i] = append(history[i], w)
			got := make([]byte, blocks*bs)
			if err := d.ReadAt(context.Background(), got, 0); err != nil {
				return fmt.Errorf("read: %w", err)
			}
			for b := range blocks {
				if _, err := parse(got[b*bs : (b+1)*bs]); err != nil {
					return fmt.Errorf("block %d: %w", b, err)
				}
			}
		}
		return nil
	})
	for b := range blocks {
		v, err := parse(d.read(t, int64(b)*bs, bs))
		if err != nil {
			t.Fatalf("block %d: %v", b, err)
		}
		var last uint64 // when the last write to the block began
		var mine *write
		for i := range history {
			for j, w := range history[i] {
				if b < w.first || b >= w.first+w.n {
					continue
				}
				last = max(last, w.begun)
				if w.writer == v.writer && w.count == v.count {
					mine = &history[i][j]
				}
			}
		}
		if last == 0 {
			continue // never written
		}
		if mine == nil || int(v.block) != b || mine.end < last {
			t.Fatalf("block %d holds block %d writer %d count %d (%+v), want a write that was not over when the last one began at %d",
				b, v.block, v.writer, v.count, mine, last)
		}
	}
}

// testConcurrentNeighbours: requests at the same time on different sectors of
// one block do not disturb each other, whatever read-modify-write is beneath.
func testConcurrentNeighbours(t *testing.T, d *device) {
	const sector = holdfast.LogicalBlockSize
	const sectors = 3 * holdfast.BlockSize / sector
	want := make([][]byte, sectors)
	together(t, sectors, func(i int) error {
		off := int64(i) * sector
		want[i] = make([]byte, sector)
		got := make([]byte, sector)
		// The last round is one that writes, so that what is lost shows.
		for round := range uint64(13) {
			p := random(round*100+uint64(i), sector)
			if err := d.WriteAt(context.Background(), p, off, false); err != nil {
				return fmt.Errorf("write sector %d: %w", i, err)
			}
			if round%4 == 3 {
				if err := d.WriteZeroes(context.Background(), off, sector, false, false); err != nil {
					return fmt.Errorf("zero sector %d: %w", i, err)
				}
				clear(p)
			}
			want[i] = p
			if err := d.ReadAt(context.Background(), got, off); err != nil {
				return fmt.Errorf("read sector %d: %w", i, err)
			}
			if !bytes.Equal(got, p) {
				return fmt.Errorf("sector %d, round %d: its only writer reads back something else", i, round)
			}
		}
		return nil
	})
	d.expect(t, bytes.Join(want, nil), 0, "after writers of single sectors")
}
