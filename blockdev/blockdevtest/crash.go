package blockdevtest

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev"
)

// Crash ends the device that it was opened with as a power loss would, by the
// seed, and returns what is found afterwards.
type Crash func(t *testing.T, seed uint64) blockdev.Device

// RunCrash checks what a device promises to keep: what a flush covers or fua
// wrote is there after a crash; of what was written later each block holds
// some version whole, never one older than what was durable.
func RunCrash(t *testing.T, seeds uint64, open func(t *testing.T) (blockdev.Device, Crash)) {
	for seed := range seeds {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			dev, crash := open(t)
			c := &crashTest{device: &device{dev}, rnd: rand.New(rand.NewPCG(seed, 3))}
			for range 3 {
				c.work(t)
				c.device = &device{crash(t, c.rnd.Uint64())}
				c.check(t)
			}
		})
	}
}

// crashBlocks is few enough for a seed to write each block several times.
const crashBlocks = 16

// crashTest knows for each block the least version that must survive and the
// last that was written. Version 0 is zeroes.
type crashTest struct {
	*device
	rnd           *rand.Rand
	count         uint64
	durable, last [crashBlocks]uint64
	// zeroed versions were made by trim or zeroing and read as zeroes.
	zeroed map[uint64]bool
}

func (c *crashTest) work(t *testing.T) {
	const bs = holdfast.BlockSize
	if c.zeroed == nil {
		c.zeroed = make(map[uint64]bool)
	}
	for range 5 + c.rnd.IntN(40) {
		c.count++
		first := c.rnd.IntN(crashBlocks)
		n := 1 + c.rnd.IntN(min(3, crashBlocks-first))
		off, length, fua := int64(first)*bs, int64(n)*bs, c.rnd.IntN(4) == 0
		switch c.rnd.IntN(8) {
		case 0:
			c.flush(t)
			c.durable = c.last
			continue
		case 1:
			c.trim(t, off, length, fua)
			c.zeroed[c.count] = true
		case 2:
			c.zeroes(t, off, length, c.rnd.IntN(2) == 0, fua)
			c.zeroed[c.count] = true
		default:
			p := make([]byte, length)
			for j := range n {
				version{uint32(first + j), 0, c.count}.fill(p[j*bs : (j+1)*bs])
			}
			c.write(t, p, off, fua)
		}
		for b := first; b < first+n; b++ {
			c.last[b] = c.count
			if fua {
				c.durable[b] = c.count
			}
		}
	}
}

// check reads every block twice: what a crash left may not change any more.
func (c *crashTest) check(t *testing.T) {
	const bs = holdfast.BlockSize
	for b := range crashBlocks {
		p := make([]byte, bs)
		if err := c.ReadAt(context.Background(), p, int64(b)*bs); err != nil {
			t.Fatalf("read block %d after the crash: %v", b, err)
		}
		c.expect(t, p, int64(b)*bs, "second read after the crash")
		v, err := parse(p)
		if err != nil {
			t.Fatalf("block %d after the crash: %v", b, err)
		}
		if v.count == 0 {
			zeroes, ok := c.zeroVersion(b)
			if !ok {
				t.Fatalf("block %d reads as zeroes after the crash, want version %d to %d", b, c.durable[b], c.last[b])
			}
			c.durable[b], c.last[b] = zeroes, zeroes
			continue
		}
		if int(v.block) != b || v.count < c.durable[b] || v.count > c.last[b] {
			t.Fatalf("block %d holds block %d version %d after the crash, want version %d to %d", b, v.block, v.count, c.durable[b], c.last[b])
		}
		c.durable[b], c.last[b] = v.count, v.count
	}
}

// zeroVersion returns a version that block b may hold and that reads as zeroes;
// which of several does not matter. A version of another block counts too,
// which errs on the mild side.
func (c *crashTest) zeroVersion(b int) (v uint64, ok bool) {
	for v := c.durable[b]; v <= c.last[b]; v++ {
		if v == 0 || c.zeroed[v] {
			return v, true
		}
	}
	return 0, false
}
