package serve

import (
	"errors"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/disk"
	"github.com/holdfast-storage/holdfast/replication/wire"
)

// chunkWrite is a write of one block to a chunk.
func chunkWrite(epoch holdfast.Epoch, seq holdfast.Seq, chunk int64) wire.Entry {
	e := entry(epoch, seq, byte(seq))
	e.Offset = chunk * holdfast.ChunkSize
	return e
}

// wait takes messages until the replica told of so much credit.
func (c *client) wait(credit uint32) {
	c.t.Helper()
	for c.credit < credit {
		r := <-c.in
		if !c.credited(r.Message) {
			c.t.Fatalf("got %v %+v while waiting for a credit of %d", r.Header, r.Message, credit)
		}
	}
}

// Credit is told unasked, is used up by new chunks alone, and is raised before it ends.
func TestCreditIsKeptUp(t *testing.T) {
	both(t, func(t *testing.T, n *node, local bool) {
		c := n.client(5, local)
		c.open()
		first := uint32(firstCredit / holdfast.ChunkSize)
		c.wait(first)
		c.send(0, &wire.Append{Entries: []wire.Entry{chunkWrite(5, 1, 0), chunkWrite(5, 2, 1), chunkWrite(5, 3, 1)}})
		if next[*wire.Ack](c); c.credit != first-2 {
			t.Fatalf("credit %d after two of %d chunks", c.credit, first)
		}
		for seq := holdfast.Seq(4); seq < 40; seq++ {
			c.send(0, &wire.Append{Entries: []wire.Entry{chunkWrite(5, seq, int64(seq))}})
			next[*wire.Ack](c)
		}
		c.wait(first)
		c.send(9, &wire.Afford{Offset: 0, Length: 2 * holdfast.ChunkSize, Pending: 3})
		if a := next[*wire.Afforded](c); a.Need != 0 || a.Tail != 39 || a.Credit < first {
			t.Fatalf("of an overwrite: %+v", a)
		}
		c.send(9, &wire.Afford{Offset: 39*holdfast.ChunkSize + 61440, Length: 8192, Pending: first})
		if a := next[*wire.Afforded](c); a.Need != 1 || a.Credit < first+1 {
			t.Fatalf("of a write to the last chunk and the next, behind %d more: %+v", first, a)
		}
		c.send(0, &wire.Close{})
		for range c.in {
		}
		for end := time.Now().Add(20 * time.Second); n.disk.Replicas()[0].Credit() != 0; {
			if time.Now().After(end) {
				t.Fatal("credit is kept for a writer that left")
			}
			time.Sleep(time.Millisecond)
		}
	})
}

// On a disk that is nearly full nothing is promised ahead; what a write takes is
// promised when asked, to the last chunk that is to be had, and no further.
func TestAffordAsks(t *testing.T) {
	n := newNode(t)
	other := disk.ReplicaDesc{Segment: testDesc.Segment, Replica: holdfast.ReplicaID{0xbb}, Lineage: testDesc.Lineage, Size: 1 << 30}
	if err := n.s.CreateReplica(n.disk.Stat().Disk, other); err != nil {
		t.Fatal(err)
	}
	big, _ := n.disk.Replica(other.Replica)
	for more := true; more; { // whatever there is
		before := big.Credit()
		if _, err := big.Reserve(1 << 30); !errors.Is(err, holdfast.ErrNoSpace) {
			t.Fatal(err)
		}
		more = big.Credit() > before
	}
	if _, err := big.Reserve(big.Credit()*holdfast.ChunkSize - 1<<20); err != nil {
		t.Fatal(err)
	}
	c := n.client(5, false)
	c.open()
	var seq holdfast.Seq
	for full := false; !full; {
		chunk := int64(seq)
		c.send(9, &wire.Afford{Offset: chunk * holdfast.ChunkSize, Length: holdfast.BlockSize})
		a := next[*wire.Afforded](c)
		if a.Need != 1 || a.Tail != seq {
			t.Fatalf("of chunk %d: %+v", chunk, a)
		}
		if full = a.Credit < a.Need; !full {
			seq++
			c.send(0, &wire.Append{Entries: []wire.Entry{chunkWrite(5, seq, chunk)}})
			next[*wire.Ack](c)
		}
	}
	if seq < 16 {
		t.Errorf("the disk was full after %d chunks, there was room for 16", seq)
	}
	c.send(9, &wire.Afford{Offset: 0, Length: holdfast.ChunkSize, Pending: 0})
	if a := next[*wire.Afforded](c); a.Need != 0 {
		t.Errorf("of an overwrite on a full disk: %+v", a)
	}
	// A write beyond the segment is a broken writer's.
	c.send(9, &wire.Afford{Offset: testDesc.Size, Length: holdfast.BlockSize})
	next[*wire.Error](c)
	if r, ok := <-c.in; ok {
		t.Errorf("the session went on with %v after a write beyond the end", r.Header)
	}
}
