package nbd

import "testing"

// TestBufferPool: every length fits, costs no less than it holds, and large
// ones are not kept.
func TestBufferPool(t *testing.T) {
	var p bufferPool
	for _, c := range []struct {
		n    int
		cost int64
	}{
		{1, 4096}, {512, 4096}, {4096, 4096}, {4097, 8192}, {128 << 10, 128 << 10}, {128<<10 + 1, 256 << 10},
		{4 << 20, 4 << 20}, {4<<20 + 1, 4<<20 + 1}, {maxPayload, maxPayload},
	} {
		if got := p.cost(c.n); got != c.cost {
			t.Errorf("cost(%d) = %d, want %d", c.n, got, c.cost)
		}
		b := p.get(c.n)
		if len(b.data) != c.n || int64(cap(b.data)) > c.cost {
			t.Errorf("get(%d) has length %d and capacity %d, want no more than %d", c.n, len(b.data), cap(b.data), c.cost)
		}
		if pooled := b.class >= 0; pooled != (c.n <= 4<<20) {
			t.Errorf("get(%d) comes from the pool: %v", c.n, pooled)
		}
		p.put(b)
	}
	if got := p.cost(0); got != 0 {
		t.Errorf("cost(0) = %d, want 0", got)
	}
	p.put(nil)
}

// TestBufferPoolReuses: what is put back is handed out again, if not always.
func TestBufferPoolReuses(t *testing.T) {
	var p bufferPool
	seen := map[*buffer]bool{}
	reused := false
	for range 100 { // under the race detector a pool forgets every fourth
		b := p.get(5000 + len(seen))
		reused = reused || seen[b]
		seen[b] = true
		p.put(b)
	}
	if !reused {
		t.Errorf("100 buffers of one class, all of them new")
	}
}
