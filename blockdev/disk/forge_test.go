package disk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"testing"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// A checksum tells of bytes that changed, not of a program that wrote nonsense, or
// of somebody who means ill. Here structures are changed and their checksums made
// to match again, up to the record and the superblock that vouch for them.

// forgery is a disk whose structures can be changed and sealed again.
type forgery struct {
	fs    *vfs.Memory
	super []byte
	pages []forgedPage // each before the one that refers to it
	recs  []found
	wal   []byte // the first WAL file's records
}

type forgedPage struct {
	off int64
	b   []byte
}

// forgeable takes a disk of one replica apart.
func forgeable(t testing.TB, fs *vfs.Memory) *forgery {
	t.Helper()
	x := &forgery{fs: fs}
	scratch := fs.Restart()
	d, err := Open(t.Context(), scratch, testPath, Options{foreground: true})
	if err != nil {
		t.Fatal(err)
	}
	add := func(n int64) {
		b, err := d.readPage(n, true)
		if err != nil {
			t.Fatal(err)
		}
		x.pages = append(x.pages, forgedPage{d.pageOffset(n), b})
	}
	r, _ := d.Replica(testDesc(1, 0).Replica)
	ref := r.tree.root // the way down to the first leaf
	var down []int64
	for level := len(r.tree.levels); ; level-- {
		down = append(down, ref.page)
		if level == 0 {
			break
		}
		b, err := d.readPage(ref.page, true)
		if err != nil {
			t.Fatal(err)
		}
		for _, child := range childrenOf(b) {
			if child.page >= 0 {
				ref = child
				break
			}
		}
	}
	for i := len(down) - 1; i >= 0; i-- {
		add(down[i])
	}
	add(d.space.refs[0].page)
	add(d.dirPages[len(d.dirPages)-1]) // the first one, and here the only one
	d.closeFiles()
	b := logOf(t, fs)
	x.recs = scanSlot(b, 0, seedOf(testDisk))
	x.wal = b[:pageUp(x.recs[len(x.recs)-1].end)]
	f, err := fs.OpenFile(testPath, 0)
	if err != nil {
		t.Fatal(err)
	}
	s, err := readSuperblock(f)
	if err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	x.super = s.encode()
	return x
}

// A forgery's script is a list of changes: one byte says what is changed (0 the
// superblock, then the pages, then the records' heads), two where, one how many
// bytes follow.
func (x *forgery) apply(t testing.TB, script []byte) *vfs.Memory {
	t.Helper()
	super := bytes.Clone(x.super)
	wal := bytes.Clone(x.wal)
	pages := make([][]byte, len(x.pages))
	for i := range pages {
		pages[i] = bytes.Clone(x.pages[i].b)
	}
	for len(script) >= 4 {
		what := int(script[0]) % (1 + len(pages) + len(x.recs))
		off, n := int(binary.LittleEndian.Uint16(script[1:])), int(script[3])
		script = script[4:]
		n = min(n, len(script))
		target := super
		switch {
		case what > len(pages):
			r := &x.recs[what-1-len(pages)]
			target = wal[r.pos-r.headLen : r.pos]
		case what > 0:
			target = pages[what-1]
		}
		copy(target[off%len(target):], script[:n])
		script = script[n:]
	}
	// Seal from the bottom up.
	seed := seedOf(testDisk)
	var ckpt []byte
	for i := range x.recs {
		if r := &x.recs[i]; r.typ == recCkpt {
			ckpt = wal[r.pos-r.headLen : r.pos]
		}
	}
	for i, b := range pages {
		was := binary.LittleEndian.Uint32(x.pages[i].b[4:])
		crc := crc32.Update(seed, castagnoli, b[8:])
		binary.LittleEndian.PutUint32(b[4:], crc)
		above := ckpt
		if i+1 < len(pages) {
			above = pages[i+1]
		}
		// A reference is a page's number and its crc.
		var ref [12]byte
		binary.LittleEndian.PutUint64(ref[:], uint64((x.pages[i].off-headerArea)/pageSize))
		binary.LittleEndian.PutUint32(ref[8:], was)
		if at := bytes.Index(above, ref[:]); at >= 0 {
			binary.LittleEndian.PutUint32(above[at+8:], crc)
		}
	}
	for i := range x.recs {
		r := &x.recs[i]
		h := wal[r.pos-r.headLen:]
		n := int64(binary.LittleEndian.Uint32(h[12:]))
		if n >= recordFixed && n <= int64(len(h)) {
			binary.LittleEndian.PutUint32(h[4:], crc32.Update(seed, castagnoli, h[8:n]))
		}
	}
	clear(super[8:12])
	binary.LittleEndian.PutUint32(super[8:], crc32.Checksum(super, castagnoli))

	fs := x.fs.Restart()
	write := func(path string, b []byte, off int64) {
		f, err := fs.OpenFile(path, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(b, off); err != nil {
			t.Fatal(err)
		}
		_ = f.Close()
	}
	write(testPath, super, superA)
	write(testPath, super, superB)
	for i, b := range pages {
		write(testPath, b, x.pages[i].off)
	}
	write(walName(testPath, 0), wal, 0)
	return fs
}

// use opens a forged disk and does with it whatever a node does. Errors are what
// is hoped for; a panic or an endless loop is what is looked for. It returns the
// error of Open.
func use(t testing.TB, fs *vfs.Memory) error {
	t.Helper()
	if _, err := Check(t.Context(), fs, testPath, nil); err != nil {
		wantForged(t, err)
	}
	d, err := Open(t.Context(), fs, testPath, Options{foreground: true})
	if err != nil {
		wantForged(t, err)
		return err
	}
	defer d.closeFiles()
	for _, r := range d.Replicas() {
		for range 2 {
			st := r.Status()
			for _, off := range []int64{0, 4096, 16384, 7 * chunkSize, 1 << 29, (st.Size - 1) / blockSize * blockSize} {
				_ = r.ReadAt(make([]byte, blockSize), off)
			}
			_, _ = r.Entries(st.First, 1<<20)
			_, _ = r.Chunks(0, -1, 100)
			_, _ = r.ReadChunk(0)
			r.SetCommit(st.Tail)
			if _, err := r.Apply(t.Context(), st.Tail); err != nil {
				wantForged(t, err)
			}
			_ = r.Append([]Entry{writeEntry(st.Fence, st.Tail+1, 0, blockSize)})
			_ = r.Fence(st.Fence + 1)
			_ = r.SetHint(1, 1)
		}
	}
	if err := d.Checkpoint(t.Context()); err != nil {
		wantForged(t, err)
	}
	return nil
}

func wantForged(t testing.TB, err error) {
	t.Helper()
	for _, kind := range []holdfast.Kind{holdfast.ErrIntegrity, holdfast.ErrUnsupported, holdfast.ErrNoSpace, holdfast.ErrIO} {
		if errors.Is(err, kind) {
			return
		}
	}
	t.Fatalf("a forged disk: %v", err)
}

// script makes one change.
func script(what int, off uint16, b ...byte) []byte {
	return append([]byte{byte(what), byte(off), byte(off >> 8), byte(len(b))}, b...)
}

func u64(v uint64) []byte { return binary.LittleEndian.AppendUint64(nil, v) }

// The forger can seal: without a change the disk opens, and a changed count in a
// sealed page is believed to be one of the page.
func TestForgery(t *testing.T) {
	x := forgeable(t, goldenDisk(t))
	if err := use(t, x.apply(t, nil)); err != nil {
		t.Fatalf("unchanged: %v", err)
	}
	fs := x.apply(t, script(len(x.pages), stateAt+68, 9)) // the replica's fence
	d := mustOpen(t, fs, testPath)
	if got := d.Replicas()[0].Status().Fence; got != 9 {
		t.Fatalf("fence %d, want the forged 9", got)
	}
	_ = d.Close()
	for name, c := range forgeries(x) {
		t.Run(name, func(t *testing.T) {
			if err := use(t, x.apply(t, c)); err == nil {
				t.Log("opened") // nonsense that does no harm but to itself
			}
		})
	}
}

// stateAt is where the first replica's state begins in the directory's first page,
// behind the place of the one page of used chunks.
const stateAt = pageHead + dirLink + 4 + 12

// forgeries are changes that a decoder may stumble over.
func forgeries(x *forgery) map[string][]byte {
	leafPage, dir, rec := 1, len(x.pages), 1+len(x.pages)
	all := map[string][]byte{
		"superblock: no log files":        script(0, 168, 0, 0, 0, 0),
		"superblock: many log files":      script(0, 168, 0xff, 0xff, 0, 0),
		"superblock: huge log files":      script(0, 160, u64(1<<62)...),
		"superblock: huge size":           script(0, 144, u64(1<<62)...),
		"superblock: negative size":       script(0, 144, u64(1<<63)...),
		"superblock: many chunks":         script(0, 184, u64(1<<40)...),
		"superblock: negative data":       script(0, 176, u64(1<<63)...),
		"superblock: log within the data": script(0, 152, u64(8<<20)...),
		"superblock: durable for ever":    script(0, 192, u64(1<<64-1)...),
		"superblock: durable far ahead":   script(0, 192, u64(1<<61)...),
		"superblock: never opened":        script(0, 96, u64(0)...),
		"directory: full page":            script(dir, 28, 0xff, 0xff, 0xff, 0xff),
		"directory: refers to itself":     script(dir, pageHead, u64(uint64((x.pages[dir-1].off-headerArea)/pageSize))...),
		"directory: refers far off":       script(dir, pageHead, u64(1<<62)...),
		"used: many pages":                script(dir, pageHead+dirLink, 0xff, 0xff, 0xff, 0x7f),
		"used: to be found out anew":      script(dir, pageHead+dirLink, 1, 0, 0, 0x80),
		"used: page far off":              script(dir, pageHead+dirLink+4, u64(1<<62)...),
		"used: page is a map's":           script(dir, pageHead+dirLink+4, u64(uint64((x.pages[0].off-headerArea)/pageSize))...),
		"used: all":                       script(dir-1, pageHead, bytes.Repeat([]byte{0xff}, 255)...),
		"used: none":                      script(dir-1, pageHead, make([]byte, 255)...),
		"inner: mapped beyond the leaf":   script(leafPage+1, pageHead+24, u64(1<<64-1)...),
		"inner: mapped and is not":        script(leafPage+1, pageHead+24, u64(1<<39-1)...),
		"inner: much poison":              script(leafPage+1, pageHead+12, 0xff, 0xff, 0xff, 0xff),
		"state: short":                    script(dir, stateAt, 1, 0, 0, 0),
		"state: long":                     script(dir, stateAt, 0xff, 0xff, 0xff, 0xff),
		"state: huge segment":             script(dir, stateAt+20+40, u64(1<<62)...),
		"state: small segment":            script(dir, stateAt+20+40, u64(4096)...),
		"state: checkpoint at the end":    script(dir, stateAt+84, u64(1<<64-1)...),
		"state: tail at the end":          script(dir, stateAt+92, u64(1<<64-1)...),
		"state: seen all":                 script(dir, stateAt+172, u64(1<<64-1)...),
		"state: root far off":             script(dir, stateAt+184, u64(1<<62)...),
		"state: root below none":          script(dir, stateAt+184, u64(1<<64-9)...),
		"state: many epochs":              script(dir, stateAt+204, 0xff, 0xff, 0xff, 0x7f),
		"leaf: chunk far off":             script(leafPage, pageHead, 0xff, 0xff, 0xff, 0xff),
		"leaf: lastSeq at the end":        script(leafPage, pageHead+8, u64(1<<64-1)...),
		"leaf: asOf at the end":           script(leafPage, pageHead+16, u64(1<<64-1)...),
		"leaf: unknown states":            script(leafPage, pageHead+88, u64(1<<64-1)...),
		"leaf: unknown type":              script(leafPage, pageHead+96, 9),
	}
	for i := range x.recs {
		what := string(rune('a'+i)) + " (type " + string(rune('0'+x.recs[i].typ/10)) + string(rune('0'+x.recs[i].typ%10)) + ")"
		for name, c := range map[string][]byte{
			"serial at the end":   script(rec+i, 16, u64(1<<64-1)...),
			"serial far off":      script(rec+i, 16, u64(1<<61)...),
			"open at the end":     script(rec+i, 24, u64(1<<64-1)...),
			"durable at the end":  script(rec+i, 32, u64(1<<64-1)...),
			"epoch at the end":    script(rec+i, 56, u64(1<<64-1)...),
			"seq at the end":      script(rec+i, 64, u64(1<<64-1)...),
			"seq far off":         script(rec+i, 64, u64(1<<62)...),
			"seq zero":            script(rec+i, 64, u64(0)...),
			"commit at the end":   script(rec+i, 72, u64(1<<64-1)...),
			"offset far off":      script(rec+i, 80, u64(1<<62)...),
			"offset negative":     script(rec+i, 80, u64(1<<63)...),
			"offset uneven":       script(rec+i, 80, u64(1)...),
			"length far off":      script(rec+i, 88, u64(1<<62)...),
			"length zero":         script(rec+i, 88, u64(0)...),
			"many crcs":           script(rec+i, 96, 0xff, 0xff, 0xff, 0xff),
			"no payload":          script(rec+i, 100, 0, 0, 0, 0),
			"long extra":          script(rec+i, 104, 0xff, 0xff, 0xff, 0xff),
			"unknown type":        script(rec+i, 10, 77),
			"type trunc":          script(rec+i, 10, byte(recTrunc)),
			"type install":        script(rec+i, 10, byte(recInstall)),
			"type rebase":         script(rec+i, 10, byte(recRebase)),
			"type delete":         script(rec+i, 10, byte(recDelete)),
			"type create":         script(rec+i, 10, byte(recCreate)),
			"type checkpoint":     script(rec+i, 10, byte(recCkpt)),
			"extra of ones":       script(rec+i, uint16(x.recs[i].headLen-16), bytes.Repeat([]byte{0xff}, 16)...),
			"body far off":        script(rec+i, recordFixed, u64(1<<62)...),
			"replay from the end": script(rec+i, recordFixed+16, u64(1<<64-1)...),
		} {
			all["record "+what+": "+name] = c
		}
	}
	return all
}

// FuzzOpen: a disk whose structures are nonsense under checksums that match.
func FuzzOpen(f *testing.F) {
	x := forgeable(f, goldenDisk(f))
	f.Add([]byte{})
	for _, c := range forgeries(x) {
		f.Add(c)
	}
	f.Fuzz(func(t *testing.T, script []byte) { _ = use(t, x.apply(t, script)) })
}
