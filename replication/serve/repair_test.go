package serve

import (
	"bytes"
	"testing"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
	"github.com/holdfast-storage/holdfast/replication/wire"
)

// rot flips a bit in every place of a file that begins with these bytes.
func rot(t testing.TB, fs *vfs.Memory, path string, where []byte) {
	t.Helper()
	f, err := fs.OpenFile(path, 0)
	if err != nil {
		t.Fatal(err)
	}
	size, err := f.Size()
	if err != nil {
		t.Fatal(err)
	}
	all := make([]byte, size)
	if _, err := f.ReadAt(all, 0); err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	found := false
	for off := int64(0); off < size; off += holdfast.BlockSize {
		if bytes.HasPrefix(all[off:], where) {
			found = true
			if err := fs.FlipBit(path, off+100, 5); err != nil {
				t.Fatal(err)
			}
		}
	}
	if !found {
		t.Fatalf("%s holds no block that begins with %x", path, where)
	}
}

// A block that changed on the disk is told to the writer, who can read what its
// checksum should be, and is good again after REPAIR.
func TestDamageIsToldAndRepaired(t *testing.T) {
	both(t, func(t *testing.T, n *node, local bool) {
		c := n.client(5, local)
		c.open()
		c.send(0, &wire.Append{Entries: []wire.Entry{entry(5, 1, 0x71), entry(5, 2, 0x72)}})
		next[*wire.Ack](c)
		c.send(1, &wire.Flush{})
		next[*wire.Flushed](c)
		c.send(0, &wire.Commit{Seq: 2})
		c.send(2, &wire.ReadChunk{Floor: 2})
		good := next[*wire.Chunk](c)
		content := good.ChunkContent
		content.Data = bytes.Clone(good.Data)
		rot(t, n.fs, diskPath, bytes.Repeat([]byte{0x72}, 64))
		c.send(3, &wire.Read{Offset: 2 * holdfast.BlockSize, Length: holdfast.BlockSize})
		if e := next[*wire.Error](c); e.Kind != holdfast.ErrIntegrity {
			t.Fatalf("read: %v", e.Err())
		}
		if d := next[*wire.Damaged](c); len(d.Chunks) != 1 || d.Chunks[0] != 0 {
			t.Fatalf("damaged %v", d.Chunks)
		}
		c.send(4, &wire.ReadChunk{Floor: 2})
		if bad := next[*wire.Chunk](c); bad.States[2] != wire.BlockBad || bad.Sums[2] != content.Sums[2] || bad.States[1] != wire.BlockData || bad.Missing() != 1<<2 {
			t.Fatalf("states %v", bad.States)
		}
		late := content
		late.AsOf = 3
		c.send(5, &wire.Repair{ChunkContent: late})
		if i := next[*wire.Installed](c); !i.Retry {
			t.Fatalf("repaired as of what is not there: %+v", i)
		}
		c.send(6, &wire.Repair{ChunkContent: content})
		if i := next[*wire.Installed](c); i.Retry || i.AsOf != 2 {
			t.Fatalf("repair: %+v", i)
		}
		c.send(7, &wire.Read{Offset: 2 * holdfast.BlockSize, Length: holdfast.BlockSize})
		if d := next[*wire.Data](c); d.Bytes[100] != 0x72 {
			t.Fatalf("read %x", d.Bytes[100])
		}
		if st, _ := n.s.Replica(testDesc.Replica); st.Log.Bad != 0 || n.disk.Stat().Repair.Repaired != 1 {
			t.Fatalf("status %+v, %+v", st.Log, n.disk.Stat().Repair)
		}
	})
}
