package wire

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/holdfast-storage/holdfast"
)

var update = flag.Bool("update", false, "write testdata/golden.txt anew")

// id returns an id whose bytes are all n.
func id(n byte) (id [16]byte) {
	for i := range id {
		id[i] = n
	}
	return id
}

// block returns a block filled with n.
func block(n byte) []byte { return bytes.Repeat([]byte{n}, holdfast.BlockSize) }

// samples is one message of each type, with every field set.
func samples() []Message {
	two := append(block(0xaa), block(0xbb)...)
	entries := []Entry{
		{Epoch: 7, Seq: 41, Kind: KindWrite, Offset: 8192, Length: 8192, Sums: BlockSums(nil, two), Data: two},
		{Epoch: 7, Seq: 42, Kind: KindTrim, Offset: 0, Length: 4 << 20},
		{Epoch: 7, Seq: 43, Kind: KindZero, Offset: 4096, Length: 4096},
		{Epoch: 7, Seq: 44, Kind: KindWrite, Offset: 0, Length: 4096, Sums: BlockSums(nil, block(1)), Data: block(1)},
	}
	older := append([]Entry(nil), entries...)
	older[0].Epoch = 6
	chunk := ChunkContent{Index: 9, LastSeq: 40, AsOf: 44, Data: append(block(3), block(4)...)}
	chunk.States[1], chunk.States[2], chunk.States[15] = BlockData, BlockPoison, BlockData
	chunk.Sums[1], chunk.Sums[15] = Checksum(block(3)), Checksum(block(4))
	source := chunk
	source.States[5], source.Sums[5] = BlockBad, 0x12345678
	return []Message{
		&Hello{Level: 1, Cluster: id(1), From: id(2), To: id(3), Instance: id(4), Segment: holdfast.SegmentID{Volume: id(5), Index: 6},
			Replica: id(7), Lineage: id(8), Session: id(9)},
		&Welcome{Level: 1, Node: id(3), Instance: id(10), Disk: id(11), OpenCount: 12},
		&Error{Kind: holdfast.ErrNoSpace, Message: "disk full", Remedy: "add a disk"},
		&Fence{},
		&Fenced{Tail: 44, TailEpoch: 6, Durable: 43, Commit: 42, Applied: 41, Checkpoint: 40, Held: 39, Lost: 44, Intact: true, Syncing: true,
			Damaged: true, OpenCount: 12, HintEpoch: 6, HintISR: 5, LogSize: 1 << 30, Epochs: []EpochStart{{Epoch: 1, First: 1}, {Epoch: 6, First: 30}}},
		&Refused{Accepted: 8},
		&Open{Start: 40, ISRVersion: 5},
		&Join{At: 44, ISRVersion: 5},
		&Opened{Tail: 40, Durable: 39, Credit: 1024, Held: 38},
		&Append{Commit: 38, Entries: entries},
		&Ack{Tail: 44, Credit: 1023},
		&Flush{},
		&Flushed{Durable: 44},
		&Commit{Seq: 44},
		&Ping{},
		&Pong{},
		&Read{Offset: 4096, Length: 8192},
		&Data{Sums: BlockSums(nil, two), Bytes: two},
		&Intact{},
		&Fetch{From: 3, To: 9},
		&Entries{Entries: older},
		&List{From: 8, Max: 2048, Above: 12, Applied: 44},
		&Chunks{More: true, Refs: []ChunkRef{{Index: 8, LastSeq: 13}, {Index: 10, LastSeq: 44}}},
		&ReadChunk{Index: 9, Floor: 44},
		&Chunk{ChunkContent: source},
		&Install{ChunkContent: chunk},
		&Installed{AsOf: 44, Retry: true},
		&Whole{},
		&WholeDone{Durable: 44},
		&Failed{Seq: 44, Cause: Error{Kind: holdfast.ErrIO, Message: "write failed", Remedy: "replace the disk"}},
		&Close{},
		&Promise{},
		&Promised{Length: 2 * time.Second},
		&Afford{Offset: 61440, Length: 8192, Pending: 17},
		&Afforded{Need: 2, Credit: 19, Tail: 44},
		&Damaged{Chunks: []int64{9, 3}},
		&Repair{ChunkContent: chunk},
	}
}

// encode returns the bytes of one frame.
func encode(t testing.TB, m Message) []byte {
	t.Helper()
	f, err := AppendFrame(nil, 7, 0x1122334455667788, 99, m)
	if err != nil {
		t.Fatalf("AppendFrame(%v): %v", m.Type(), err)
	}
	b := append([]byte(nil), f.Head...)
	for _, p := range f.Payload {
		b = append(b, p...)
	}
	return b
}

// plain returns m without the buffers that hold its payload, for comparison.
func plain(m Message) Message {
	v := reflect.ValueOf(m).Elem()
	c := reflect.New(v.Type())
	c.Elem().Set(v)
	switch m := c.Interface().(type) {
	case *Append:
		m.held = held{}
	case *Data:
		m.held = held{}
	case *Entries:
		m.held = held{}
	case *Chunk:
		m.held = held{}
	case *Install:
		m.held = held{}
	case *Repair:
		m.held = held{}
	}
	return c.Interface().(Message)
}

func TestEveryTypeHasASample(t *testing.T) {
	seen := map[Type]bool{}
	for _, m := range samples() {
		seen[m.Type()] = true
	}
	for typ := minType; typ < Type(typeEnd); typ++ {
		if !seen[typ] || newMessage(typ) == nil || newMessage(typ).Type() != typ || strings.HasPrefix(typ.String(), "type ") {
			t.Errorf("%v: sample %v, newMessage %v", typ, seen[typ], newMessage(typ))
		}
	}
	if got := Type(typeEnd).String(); got != "type 38" {
		t.Errorf("an unknown type reads %q", got)
	}
}

func TestRoundTrip(t *testing.T) {
	var stream bytes.Buffer
	for _, m := range samples() {
		stream.Write(encode(t, m))
	}
	for name, r := range map[string]io.Reader{
		"whole":       bytes.NewReader(stream.Bytes()),
		"single byte": iotest.OneByteReader(bytes.NewReader(stream.Bytes())),
		"halves":      iotest.HalfReader(bytes.NewReader(stream.Bytes())),
		"data+EOF":    iotest.DataErrReader(bytes.NewReader(stream.Bytes())),
	} {
		in := NewReader(r)
		in.Bind(0x1122334455667788)
		for _, want := range samples() {
			h, got, err := in.Next()
			if err != nil {
				t.Fatalf("%s: %v: %v", name, want.Type(), err)
			}
			if h.Epoch != 7 || h.Request != 99 || h.Type != want.Type() {
				t.Errorf("%s: header %v", name, h)
			}
			if !reflect.DeepEqual(plain(got), want) {
				t.Errorf("%s: %v\n got %+v\nwant %+v", name, want.Type(), plain(got), want)
			}
			got.Release()
		}
		if _, _, err := in.Next(); err != io.EOF {
			t.Errorf("%s: at the end: %v, want io.EOF", name, err)
		}
	}
}

// Golden bytes: version 1 never changes.
func TestGolden(t *testing.T) {
	const path = "testdata/golden.txt"
	var got strings.Builder
	got.WriteString("# One frame of each type, version 1; payload as length and crc32c.\n")
	for _, m := range samples() {
		f, err := AppendFrame(nil, 7, 0x1122334455667788, 99, m)
		if err != nil {
			t.Fatal(err)
		}
		payload := bytes.Join(f.Payload, nil)
		fmt.Fprintf(&got, "%s %d:%08x %s\n", m.Type(), len(payload), Checksum(payload), hex.EncodeToString(f.Head))
	}
	if *update {
		if err := os.MkdirAll("testdata", 0o777); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got.String()), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	g, w := strings.Split(got.String(), "\n"), strings.Split(string(want), "\n")
	for i := range max(len(g), len(w)) {
		if i >= len(g) || i >= len(w) || g[i] != w[i] {
			t.Fatalf("line %d of %s differs\n got %s\nwant %s", i+1, path, at(g, i), at(w, i))
		}
	}
}

func at(s []string, i int) string {
	if i < len(s) {
		return s[i]
	}
	return "nothing"
}

// The format document names every message with its number.
func TestFormatDocument(t *testing.T) {
	doc, err := os.ReadFile("FORMAT.md")
	if err != nil {
		t.Fatal(err)
	}
	for typ := minType; typ < Type(typeEnd); typ++ {
		if row := fmt.Sprintf("| %d | %v |", typ, typ); !bytes.Contains(doc, []byte(row)) {
			t.Errorf("FORMAT.md has no row %q", row)
		}
	}
	for code, kind := range kindCodes {
		if word := fmt.Sprintf("%d %s", code, kind); code > 0 && !bytes.Contains(doc, []byte(word)) {
			t.Errorf("FORMAT.md does not say %q", word)
		}
	}
}

// Every single flipped bit of a header or a body is refused, in every message.
func TestFlippedBit(t *testing.T) {
	for _, m := range samples() {
		f, err := AppendFrame(nil, 7, 5, 99, m)
		if err != nil {
			t.Fatal(err)
		}
		whole := append(append([]byte(nil), f.Head...), bytes.Join(f.Payload, nil)...)
		for bit := range len(f.Head) * 8 {
			b := append([]byte(nil), whole...)
			b[bit/8] ^= 1 << (bit % 8)
			_, got, err := NewReader(bytes.NewReader(b)).Next()
			if err == nil {
				t.Fatalf("%v with bit %d of byte %d flipped was accepted as %+v", m.Type(), bit%8, bit/8, got)
			}
			if !errors.Is(err, holdfast.ErrIntegrity) {
				t.Fatalf("%v with bit %d of byte %d flipped: %v, want ErrIntegrity", m.Type(), bit%8, bit/8, err)
			}
		}
	}
}

// A flipped payload bit is found by the sums that came with it.
func TestFlippedPayloadBit(t *testing.T) {
	b := encode(t, &Data{Sums: BlockSums(nil, block(1)), Bytes: block(1)})
	b[len(b)-17] ^= 4
	_, m, err := NewReader(bytes.NewReader(b)).Next()
	if err != nil {
		t.Fatal(err)
	}
	defer m.Release()
	d := m.(*Data)
	if err := Verify(d.Bytes, d.Sums); !errors.Is(err, holdfast.ErrIntegrity) {
		t.Errorf("Verify: %v, want ErrIntegrity", err)
	}
	if err := Verify(block(1), d.Sums); err != nil {
		t.Errorf("Verify of the right bytes: %v", err)
	}
	if err := Verify(block(1)[:100], d.Sums); !errors.Is(err, holdfast.ErrIntegrity) {
		t.Errorf("Verify of too few bytes: %v, want ErrIntegrity", err)
	}
}

// A truncated stream is an error at every length, and never io.EOF inside a frame.
func TestTruncated(t *testing.T) {
	for _, m := range samples() {
		b := encode(t, m)
		for n := 1; n < len(b); n += 1 + len(b)/200 {
			if _, _, err := NewReader(bytes.NewReader(b[:n])).Next(); !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Fatalf("%v cut to %d of %d bytes: %v, want unexpected EOF", m.Type(), n, len(b), err)
			}
		}
	}
}

// reframe returns a frame with right sums around any body and payload.
func reframe(h Header, body, payload []byte) []byte {
	b := make([]byte, HeaderSize, HeaderSize+len(body)+len(payload))
	h.Body, h.Payload, h.bodySum = len(body), len(payload), Checksum(body)
	h.put(b)
	return append(append(b, body...), payload...)
}

func TestRefusedFrames(t *testing.T) {
	resum := func(b []byte, change func(b []byte)) []byte {
		change(b)
		c := Checksum(b[:44])
		b[44], b[45], b[46], b[47] = byte(c>>24), byte(c>>16), byte(c>>8), byte(c)
		return b
	}
	ping := func() []byte { return reframe(Header{Type: TypePing, Nonce: 5}, nil, nil) }
	entry := func(es ...Entry) []byte { return putEntries(make([]byte, 8), es) }
	write := Entry{Seq: 1, Kind: KindWrite, Length: 4096, Sums: []uint32{0}}
	with := func(e Entry, change func(*Entry)) Entry { change(&e); return e }
	for _, c := range []struct {
		name string
		in   []byte
		want error
	}{
		{"magic", resum(ping(), func(b []byte) { b[0] = 'X' }), holdfast.ErrInvalid},
		{"version", resum(ping(), func(b []byte) { b[4] = 2 }), holdfast.ErrUnsupported},
		{"flags", resum(ping(), func(b []byte) { b[7] = 1 }), holdfast.ErrUnsupported},
		{"body length", resum(ping(), func(b []byte) { b[8] = 0xff }), holdfast.ErrInvalid},
		{"payload length", resum(ping(), func(b []byte) { b[12] = 0xff }), holdfast.ErrInvalid},
		{"type", reframe(Header{Type: typeEnd, Nonce: 5}, nil, nil), holdfast.ErrUnsupported},
		{"nonce", reframe(Header{Type: TypePing, Nonce: 6}, nil, nil), holdfast.ErrInvalid},
		{"body too long", reframe(Header{Type: TypePing, Nonce: 5}, []byte{1}, nil), holdfast.ErrInvalid},
		{"body too short", reframe(Header{Type: TypeAck, Nonce: 5}, make([]byte, 7), nil), holdfast.ErrInvalid},
		{"payload where none is", reframe(Header{Type: TypePing, Nonce: 5}, nil, block(0)), holdfast.ErrInvalid},
		{"a flag of 2", reframe(Header{Type: TypeFenced, Nonce: 5}, append(make([]byte, 64), 2, 0, 0), nil), holdfast.ErrInvalid},
		{"too many entries", reframe(Header{Type: TypeAppend, Nonce: 5}, putU32(make([]byte, 8), MaxEntries+1), nil), holdfast.ErrInvalid},
		{"entries without bytes", reframe(Header{Type: TypeAppend, Nonce: 5}, putU32(make([]byte, 8), 3), nil), holdfast.ErrInvalid},
		{"entry without payload", reframe(Header{Type: TypeAppend, Nonce: 5}, entry(write), nil), holdfast.ErrInvalid},
		{"payload without entry", reframe(Header{Type: TypeAppend, Nonce: 5}, entry(write), append(block(0), block(0)...)), holdfast.ErrInvalid},
		{"seq 0", reframe(Header{Type: TypeAppend, Nonce: 5}, entry(with(write, func(e *Entry) { e.Seq = 0 })), block(0)), holdfast.ErrInvalid},
		{"seq gap", reframe(Header{Type: TypeAppend, Nonce: 5}, entry(write, with(write, func(e *Entry) { e.Seq = 3 })), append(block(0), block(0)...)), holdfast.ErrInvalid},
		{"epoch falls", reframe(Header{Type: TypeAppend, Nonce: 5}, entry(with(write, func(e *Entry) { e.Epoch = 1 }), with(write, func(e *Entry) { e.Seq = 2 })), append(block(0), block(0)...)), holdfast.ErrInvalid},
		{"unaligned offset", reframe(Header{Type: TypeAppend, Nonce: 5}, entry(with(write, func(e *Entry) { e.Offset = 512 })), block(0)), holdfast.ErrInvalid},
		{"offset beyond 63 bits", reframe(Header{Type: TypeAppend, Nonce: 5}, entry(with(write, func(e *Entry) { e.Offset = -4096 })), block(0)), holdfast.ErrInvalid},
		{"end beyond 63 bits", reframe(Header{Type: TypeAppend, Nonce: 5}, entry(with(write, func(e *Entry) { e.Offset = 1<<63 - 4096; e.Kind = KindTrim; e.Length = 8192; e.Sums = nil })), nil), holdfast.ErrInvalid},
		{"length and blocks differ", reframe(Header{Type: TypeAppend, Nonce: 5}, entry(with(write, func(e *Entry) { e.Length = 8192 })), block(0)), holdfast.ErrInvalid},
		{"kind 9", reframe(Header{Type: TypeAppend, Nonce: 5}, entry(with(write, func(e *Entry) { e.Kind = 9; e.Sums = nil })), nil), holdfast.ErrInvalid},
		{"trim with sums", reframe(Header{Type: TypeAppend, Nonce: 5}, entry(with(write, func(e *Entry) { e.Kind = KindTrim })), nil), holdfast.ErrInvalid},
		{"length 0", reframe(Header{Type: TypeAppend, Nonce: 5}, entry(Entry{Seq: 1, Kind: KindTrim}), nil), holdfast.ErrInvalid},
		{"reserved bytes", reframe(Header{Type: TypeAppend, Nonce: 5}, func() []byte { b := entry(write); b[8+4+33] = 1; return b }(), block(0)), holdfast.ErrInvalid},
		{"read of 2 MiB", reframe(Header{Type: TypeRead, Nonce: 5}, (&Read{Length: 2 << 20}).appendBody(nil), nil), holdfast.ErrInvalid},
		{"read of nothing", reframe(Header{Type: TypeRead, Nonce: 5}, (&Read{}).appendBody(nil), nil), holdfast.ErrInvalid},
		{"data without bytes", reframe(Header{Type: TypeData, Nonce: 5}, (&Data{}).appendBody(nil), nil), holdfast.ErrInvalid},
		{"a promise of no length", reframe(Header{Type: TypePromised, Nonce: 5}, putU32(nil, 0), nil), holdfast.ErrInvalid},
		{"a promise without end", reframe(Header{Type: TypePromised, Nonce: 5}, putU32(nil, 60001), nil), holdfast.ErrInvalid},
		{"data and sums differ", reframe(Header{Type: TypeData, Nonce: 5}, (&Data{Sums: make([]uint32, 2)}).appendBody(nil), block(0)), holdfast.ErrInvalid},
		{"chunks out of order", reframe(Header{Type: TypeChunks, Nonce: 5}, (&Chunks{Refs: []ChunkRef{{Index: 2}, {Index: 2}}}).appendBody(nil), nil), holdfast.ErrInvalid},
		{"more behind nothing", reframe(Header{Type: TypeChunks, Nonce: 5}, (&Chunks{More: true}).appendBody(nil), nil), holdfast.ErrInvalid},
		{"chunk state 4", reframe(Header{Type: TypeChunk, Nonce: 5}, (&Chunk{ChunkContent: ChunkContent{States: [16]BlockState{4}}}).appendBody(nil), nil), holdfast.ErrInvalid},
		{"a bad block to install", reframe(Header{Type: TypeInstall, Nonce: 5}, (&Install{ChunkContent: ChunkContent{States: [16]BlockState{3}}}).appendBody(nil), nil), holdfast.ErrInvalid},
		{"a bad block to repair with", reframe(Header{Type: TypeRepair, Nonce: 5}, (&Repair{ChunkContent: ChunkContent{States: [16]BlockState{3}}}).appendBody(nil), nil), holdfast.ErrInvalid},
		{"too many damaged chunks", reframe(Header{Type: TypeDamaged, Nonce: 5}, (&Damaged{Chunks: make([]int64, MaxDamaged+1)}).appendBody(nil), nil), holdfast.ErrInvalid},
		{"damage at a negative chunk", reframe(Header{Type: TypeDamaged, Nonce: 5}, (&Damaged{Chunks: []int64{-1}}).appendBody(nil), nil), holdfast.ErrInvalid},
		{"chunk without its block", reframe(Header{Type: TypeInstall, Nonce: 5}, (&Install{ChunkContent: ChunkContent{States: [16]BlockState{1}}}).appendBody(nil), nil), holdfast.ErrInvalid},
		{"chunk sum without data", reframe(Header{Type: TypeInstall, Nonce: 5}, (&Install{ChunkContent: ChunkContent{Sums: [16]uint32{1}}}).appendBody(nil), nil), holdfast.ErrInvalid},
		{"append of nothing", reframe(Header{Type: TypeAppend, Nonce: 5}, make([]byte, 12), nil), holdfast.ErrInvalid},
		{"append of two epochs", reframe(Header{Type: TypeAppend, Nonce: 5}, entry(write, with(write, func(e *Entry) { e.Seq, e.Epoch = 2, 1 })), append(block(0), block(0)...)), holdfast.ErrInvalid},
		{"error text too long", reframe(Header{Type: TypeError, Nonce: 5}, append(append([]byte{1, 4, 1}, make([]byte, 1025)...), 0, 0), nil), holdfast.ErrInvalid},
	} {
		r := NewReader(bytes.NewReader(c.in))
		r.Bind(5)
		if _, m, err := r.Next(); !errors.Is(err, c.want) {
			t.Errorf("%s: got message %+v, error %v, want %v", c.name, m, err, c.want)
		}
	}
}

func TestFrameBounds(t *testing.T) {
	big := &Append{Entries: []Entry{{Seq: 1, Kind: KindWrite, Length: 2 << 20, Data: make([]byte, 2<<20)}}}
	if _, err := AppendFrame(nil, 1, 1, 0, big); !errors.Is(err, holdfast.ErrInternal) {
		t.Errorf("a payload of 2 MiB: %v, want ErrInternal", err)
	}
	long := &Chunks{Refs: make([]ChunkRef, 5000)}
	if _, err := AppendFrame(nil, 1, 1, 0, long); !errors.Is(err, holdfast.ErrInternal) {
		t.Errorf("a body of 80 KB: %v, want ErrInternal", err)
	}
	// The largest of everything fits.
	full := &Append{}
	data := make([]byte, MaxPayload)
	for i := range MaxEntries {
		p := data[i*holdfast.BlockSize : (i+1)*holdfast.BlockSize]
		full.Entries = append(full.Entries, Entry{Epoch: 7, Seq: holdfast.Seq(i + 1), Kind: KindWrite, Length: holdfast.BlockSize, Sums: BlockSums(nil, p), Data: p})
	}
	fenced := &Fenced{Epochs: make([]EpochStart, MaxEpochTails)}
	chunks := &Chunks{}
	for i := range MaxChunkRefs {
		chunks.Refs = append(chunks.Refs, ChunkRef{Index: int64(i)})
	}
	text := strings.Repeat("x", MaxText+50)
	for _, m := range []Message{full, fenced, chunks, &Error{Kind: "no such kind", Message: text, Remedy: text}} {
		_, got, err := NewReader(bytes.NewReader(encode(t, m))).Next()
		if err != nil {
			t.Errorf("largest %v: %v", m.Type(), err)
			continue
		}
		if e, ok := got.(*Error); ok && (len(e.Message) != MaxText || e.Kind != holdfast.ErrInternal) {
			t.Errorf("long error arrived as kind %q with %d bytes", e.Kind, len(e.Message))
		}
		got.Release()
	}
}

func TestErrorKinds(t *testing.T) {
	for _, kind := range kindCodes[1:] {
		in := holdfast.Errorf(kind, "what %s", "was").WithRemedy("do this")
		_, m, err := NewReader(bytes.NewReader(encode(t, ErrorOf(in)))).Next()
		if err != nil {
			t.Fatal(err)
		}
		out := m.(*Error).Err()
		if !errors.Is(out, kind) || out.Error() != in.Error() || holdfast.RemedyOf(out) != "do this" {
			t.Errorf("%v arrived as %v (%v)", in, out, holdfast.KindOf(out))
		}
	}
}

func TestBlocksOfAChunk(t *testing.T) {
	for _, m := range samples() {
		c, ok := m.(*Chunk)
		if !ok {
			continue
		}
		if got := c.Missing(); got != 1<<2|1<<5 {
			t.Errorf("missing %016b", got)
		}
		if !bytes.Equal(c.Block(1), block(3)) || !bytes.Equal(c.Block(15), block(4)) {
			t.Error("the blocks are not where they were put")
		}
	}
}

func TestBuffers(t *testing.T) {
	for _, n := range []int{0, 1, 4096, 4097, 8192, 1 << 20, 1<<20 + 1} {
		b := NewBuffer(n)
		if len(b.Bytes()) != n {
			t.Errorf("NewBuffer(%d) holds %d bytes", n, len(b.Bytes()))
		}
		b.Retain()
		b.Release()
		b.Release()
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("a third release of a buffer of %d bytes with two references did not panic", n)
				}
			}()
			b.Release()
		}()
	}
	var none *Buffer
	none.Retain()
	none.Release()
}

// Frames from random bodies: decoding never panics, and what decodes encodes
// to the same bytes again.
func FuzzDecode(f *testing.F) {
	for _, m := range samples() {
		frame, _ := AppendFrame(nil, 7, 1, 99, m)
		f.Add(byte(m.Type()), frame.Head[HeaderSize:], bytes.Join(frame.Payload, nil))
	}
	f.Fuzz(func(t *testing.T, typ byte, body, payload []byte) {
		if len(body) > MaxBody || len(payload) > MaxPayload {
			return
		}
		in := reframe(Header{Type: Type(typ), Epoch: 7, Nonce: 0x1122334455667788, Request: 99}, body, payload)
		_, m, err := NewReader(bytes.NewReader(in)).Next()
		if err != nil {
			return
		}
		defer m.Release()
		switch m.(type) {
		case *Error, *Failed:
			return // unknown kinds are read as internal
		}
		if out := encode(t, m); !bytes.Equal(out, in) {
			t.Errorf("%v\n in %x\nout %x", m.Type(), in[:min(len(in), 300)], out[:min(len(out), 300)])
		}
	})
}

// A stream of anything: never a panic, never an endless loop.
func FuzzStream(f *testing.F) {
	var stream []byte
	for _, m := range samples() {
		stream = append(stream, encode(f, m)...)
	}
	f.Add(stream)
	f.Fuzz(func(t *testing.T, in []byte) {
		r := NewReader(bytes.NewReader(in))
		for {
			_, m, err := r.Next()
			if err != nil {
				return
			}
			m.Release()
		}
	})
}

// Random damage to a good stream: whatever is accepted was sent.
func TestDamagedStream(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	all := samples()
	for range 2000 {
		m := all[rng.IntN(len(all))]
		head, err := AppendFrame(nil, 7, 1, 99, m)
		if err != nil {
			t.Fatal(err)
		}
		b := append(append([]byte(nil), head.Head...), bytes.Join(head.Payload, nil)...)
		for range 1 + rng.IntN(8) {
			b[rng.IntN(len(head.Head))] = byte(rng.Uint32())
		}
		_, got, err := NewReader(bytes.NewReader(b)).Next()
		if err == nil && !reflect.DeepEqual(plain(got), m) {
			t.Fatalf("damaged %v was accepted as %+v", m.Type(), plain(got))
		}
	}
}
