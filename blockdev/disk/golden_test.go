package disk

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"encoding/hex"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// HOLDFAST_GOLDEN=write makes the files of testdata anew. Files of a version
// that was released are never written again.
func golden(t testing.TB, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if os.Getenv("HOLDFAST_GOLDEN") == "write" {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(hex.Dump(got)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if hex.Dump(got) != string(want) {
		t.Errorf("%s: got\n%s\nwant\n%s", name, hex.Dump(got), want)
	}
}

func goldenSuper() *superblock {
	return &superblock{
		version: 1, generation: 7, cluster: testCluster, disk: testDisk, node: testNode, openCount: 3,
		bootID: bootText, size: 40 << 20, slotSize: 4 << 20, slots: 4, flags: superFailed,
		dataOffset: headerArea, chunks: 600, walDurable: 99,
	}
}

const bootText = "1b4e28ba-2fa1-41d2-883f-0016d3cca427"

func TestGoldenBytes(t *testing.T) {
	golden(t, "v1-superblock.txt", goldenSuper().encode()[:256])

	rec := record{
		typ: recWrite, flags: flagBatchEnd, serial: 0x0102030405060708, open: 3, durable: 0x1112131415161718,
		replica: testDesc(1, 0).Replica, epoch: 5, seq: 6, commit: 4, off: 8192, length: 8192,
		crc: crcsOf(pattern(6, 8192)), payload: pattern(6, 8192),
	}
	b := make([]byte, rec.headSize())
	rec.encodeHead(b, seedOf(testDisk))
	golden(t, "v1-write.txt", b)

	c := Chunk{Index: 2, LastSeq: 8, AsOf: 9}
	c.State[1], c.State[15] = BlockData, BlockPoison
	golden(t, "v1-install.txt", encodeInstall(&c))
	whole := wholeChunk(2, 9, 1)
	rec = record{
		typ: recInstall, serial: 4, open: 3, durable: 2, replica: testDesc(1, 0).Replica, seq: 9,
		off: 2 * chunk, length: chunk, crc: whole.CRC[:], extra: encodeInstall(&whole),
	}
	rec.list([]uint32{0x33})
	b = make([]byte, rec.headSize())
	rec.encodeHead(b, seedOf(testDisk))
	golden(t, "v1-install-fresh.txt", b)
	golden(t, "v1-desc.txt", encodeDesc(testDesc(3, 1<<30)))
	body := ckptBody{page: 77, crc: 0xcafe, replayFrom: 1000, upTo: 1010, replicas: 2}
	golden(t, "v1-ckpt.txt", body.encode())

	page := make([]byte, pageSize)
	l := &leaf{}
	l.entries[0] = chunkEntry{typ: chunkMapped, phys: 0x21, born: 1, lastSeq: 0x31, asOf: 0x41, states: 0x21}
	l.entries[0].crc[0], l.entries[0].crc[15] = 0x51, 0x61
	l.entries[38].typ = chunkZero
	l.encode(page)
	encodePageHead(page, testDesc(1, 0).Replica, 0, 12, 0, seedOf(testDisk))
	golden(t, "v1-leaf.txt", page)

	page = make([]byte, pageSize)
	n := newNode()
	n.refs[0] = childRef{pageRef: pageRef{page: 5, crc: 6}, poison: 3, lastSeq: 9, mapped: 1<<38 | 1}
	n.refs[125].pageRef = pageRef{page: 7, crc: 8}
	n.encode(page)
	encodePageHead(page, testDesc(1, 0).Replica, 1, 0, 0, seedOf(testDisk))
	golden(t, "v1-node.txt", page)

	d := &Disk{}
	r := newReplica(d, testDesc(1, 1<<30))
	r.fence, r.commit, r.applied, r.tail, r.hintEpoch, r.hintISR = 1, 2, 3, 4, 5, 6
	r.intact, r.intactEpoch, r.intactFiles, r.intactBoot, r.lastSerial = true, 7, 8, bootText, 9
	r.asOf = 12
	r.tails = []EpochStart{{1, 1}, {2, 3}, {3, 4}}
	golden(t, "v1-state.txt", r.encodeState(pageRef{page: 10, crc: 11}, 9))

	d.super, d.seed = goldenSuper(), seedOf(testDisk)
	s := newSpace(spaceEntries + 70)
	s.refs[0], s.refs[1] = pageRef{page: 12, crc: 13}, pageRef{page: 14, crc: 15}
	golden(t, "v1-space.txt", s.encode())
	s.move(&chunkEntry{}, &chunkEntry{typ: chunkMapped, phys: 9})
	s.move(&chunkEntry{}, &chunkEntry{typ: chunkMapped, phys: spaceEntries + 69})
	page = make([]byte, pageSize)
	s.bytesOf(1, page[pageHead:], false)
	encodePageHead(page, holdfast.ReplicaID{}, levelSpace, 1, 0, d.seed)
	golden(t, "v1-space-page.txt", page)
}

// goldenDisk is the disk of testdata/v1.disk.gz: one replica with a checkpoint
// and a log beyond it, after a death without Close.
func goldenDisk(t testing.TB) *vfs.Memory {
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, tinyFormat())
	d, err := Open(t.Context(), fs, testPath, Options{foreground: true})
	if err != nil {
		t.Fatal(err)
	}
	r := mustCreate(t, d, 1, 1<<30)
	if err := r.Fence(2); err != nil {
		t.Fatal(err)
	}
	mustAppend(t, r, writeEntry(2, 1, 0, 65536), writeEntry(2, 2, 1<<29, 8192), Entry{Epoch: 2, Seq: 3, Type: OpZero, Offset: 4096, Length: 8192})
	mustSync(t, r)
	r.SetCommit(3)
	if err := d.Checkpoint(t.Context()); err != nil {
		t.Fatal(err)
	}
	c, err := r.ReadChunk(0)
	if err != nil {
		t.Fatal(err)
	}
	c.Index = 7
	if err := r.InstallChunk(c); err != nil {
		t.Fatal(err)
	}
	mustInstall(t, r, wholeChunk(8, c.AsOf, 8))
	mustAppend(t, r, writeEntry(2, 4, 16384, 4096), Entry{Epoch: 2, Seq: 5, Type: OpTrim, Offset: 1 << 29, Length: 1 << 28}, writeEntry(2, 6, 0, 4096))
	if err := r.Truncate(5); err != nil {
		t.Fatal(err)
	}
	if err := r.SetHint(2, 9); err != nil {
		t.Fatal(err)
	}
	return fs.Restart() // no lock is held
}

func goldenFiles() []string {
	files := []string{testPath}
	for i := range 4 {
		files = append(files, walName(testPath, i))
	}
	return files
}

// pack writes the pages that are not zero: file, page number, bytes.
func pack(t testing.TB, fs vfs.FS) []byte {
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	page := make([]byte, vfs.PageSize)
	for i, name := range goldenFiles() {
		f, err := fs.OpenFile(name, 0)
		if err != nil {
			t.Fatal(err)
		}
		size, _ := f.Size()
		for off := int64(0); off < size; off += vfs.PageSize {
			if _, err := f.ReadAt(page, off); err != nil {
				t.Fatal(err)
			}
			if bytes.Equal(page, zeroPage[:]) && off+vfs.PageSize < size {
				continue
			}
			var head [9]byte
			head[0] = byte(i)
			binary.LittleEndian.PutUint64(head[1:], uint64(off/vfs.PageSize))
			_, _ = z.Write(head[:])
			_, _ = z.Write(page)
		}
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func unpack(t testing.TB, packed []byte) *vfs.Memory {
	z, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		t.Fatal(err)
	}
	fs := vfs.NewMemory(2)
	var head [9]byte
	page := make([]byte, vfs.PageSize)
	for {
		if _, err := io.ReadFull(z, head[:]); err == io.EOF {
			return fs
		} else if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(z, page); err != nil {
			t.Fatal(err)
		}
		f, err := fs.OpenFile(goldenFiles()[head[0]], vfs.Create)
		if err != nil {
			t.Fatal(err)
		}
		off := int64(binary.LittleEndian.Uint64(head[1:])) * vfs.PageSize
		if _, err := f.WriteAt(page, off); err != nil {
			t.Fatal(err)
		}
		if size, _ := f.Size(); size < off+vfs.PageSize {
			if err := f.Truncate(off + vfs.PageSize); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// A disk of every released version opens.
func TestGoldenDisk(t *testing.T) {
	path := "testdata/v1.disk.gz"
	if os.Getenv("HOLDFAST_GOLDEN") == "write" {
		if err := os.WriteFile(path, pack(t, goldenDisk(t)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	packed, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for what, fs := range map[string]*vfs.Memory{"today's": goldenDisk(t), "version 1's": unpack(t, packed)} {
		d := mustOpen(t, fs, testPath)
		r, ok := d.Replica(testDesc(1, 0).Replica)
		if !ok {
			t.Fatalf("%s: the replica is gone", what)
		}
		st := r.Status()
		if st.Fence != 2 || st.Tail != 5 || st.Checkpoint != 3 || st.HintISR != 9 || st.Damaged != nil || st.First != 1 {
			t.Fatalf("%s: %+v", what, st)
		}
		want := pattern(1, 65536)
		clear(want[4096:12288])
		wantRead(t, r, 7*65536, want)
		wantRead(t, r, 8*65536, pattern(8, 65536))
		copy(want[16384:], pattern(4, 4096))
		wantRead(t, r, 0, want)
		wantRead(t, r, 1<<29, make([]byte, 8192))
	}
}

// FORMAT.md ends with the drawings that stand above the encoders.
func TestDocDrawsTheBytes(t *testing.T) {
	const last = "-run TestDocDrawsTheBytes -->\n"
	b, err := os.ReadFile("FORMAT.md")
	if err != nil {
		t.Fatal(err)
	}
	head, drawn, ok := strings.Cut(string(b), last)
	if !ok {
		t.Fatalf("FORMAT.md has no line that ends in %q", last)
	}
	want := ""
	for _, d := range []struct{ title, file, comment string }{
		{"Superblock", "superblock.go", "superblock is the disk's identity"},
		{"WAL record", "record.go", "record is one WAL record"},
		{"Body of CREATE: a descriptor", "record.go", "The extra of CREATE"},
		{"Body of CHUNK_INSTALL", "record.go", "The extra of CHUNK_INSTALL"},
		{"Body of CKPT", "record.go", "The extra of CKPT"},
		{"Map pages: leaf and inner", "tree.go", "The map of one replica"},
		{"Used chunks", "space.go", "space says which chunks"},
		{"Directory", "checkpoint.go", "The directory is the places"},
		{"Places of the pages of used chunks", "space.go", "encode writes where the pages are"},
		{"State of a replica in the directory", "checkpoint.go", "encodeState writes a replica's state"},
	} {
		want += "\n## " + d.title + "\n\n" + drawing(t, d.file, d.comment)
	}
	if drawn == want {
		return
	}
	if os.Getenv("HOLDFAST_GOLDEN") == "write" {
		if err := os.WriteFile("FORMAT.md", []byte(head+last+want), 0o644); err != nil { //nolint:gosec // a document
			t.Fatal(err)
		}
		return
	}
	t.Error("FORMAT.md does not end with what stands above the encoders: run HOLDFAST_GOLDEN=write go test ./blockdev/disk -run TestDocDrawsTheBytes")
}

// drawing returns the comment of a source file that begins so, as text.
func drawing(t *testing.T, file, begins string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(b), "\n// "+begins)
	if !ok {
		t.Fatalf("%s has no comment that begins with %q", file, begins)
	}
	out := begins
	for line := range strings.Lines(rest) {
		if out != begins {
			if !strings.HasPrefix(line, "//") {
				break
			}
			line = strings.TrimPrefix(strings.TrimPrefix(line, "//"), " ")
		}
		out += strings.ReplaceAll(line, "\t", "    ")
	}
	return out
}

func TestDocDrawsTheVersion(t *testing.T) {
	doc, err := os.ReadFile("FORMAT.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"version 1", superMagic, "HFW1", "HFMP", "CHUNK_INSTALL"} {
		if !strings.Contains(string(doc), want) {
			t.Errorf("FORMAT.md does not speak of %q", want)
		}
	}
}
