package hostdev

import (
	"encoding/hex"
	"testing"

	"github.com/holdfast-storage/holdfast"
)

// initMessage is the argument of INIT as Linux 6.18 sends it, shortened to what is read.
func initMessage(major, minor uint32, flags uint64) []byte {
	b := make([]byte, 64)
	order.PutUint32(b[0:], major)
	order.PutUint32(b[4:], minor)
	order.PutUint32(b[8:], 128<<10)
	order.PutUint32(b[12:], uint32(flags))
	order.PutUint32(b[16:], uint32(flags>>32))
	return b
}

func TestSettle(t *testing.T) {
	const all = ^uint64(0)
	for name, c := range map[string]struct {
		major, minor uint32
		flags        uint64
		resend, ok   bool
		wantMinor    uint32
	}{
		"a new kernel":                {7, 45, all, true, true, 45},
		"a kernel newer than we are":  {7, 99, all, true, true, 45},
		"before resend (6.9)":         {7, 39, all &^ initHasResend, false, true, 39},
		"before the second word":      {7, 31, all & 0x3fffffff, false, true, 31},
		"before max_pages":            {7, 27, all, false, false, 0},
		"another protocol":            {8, 0, all, false, false, 0},
		"without max_pages":           {7, 45, all &^ initMaxPages, false, false, 0},
		"flags2 without INIT_EXT set": {7, 45, all &^ initExt, false, true, 45},
	} {
		in, err := parseInitIn(initMessage(c.major, c.minor, c.flags))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		p, out, err := settle(in)
		if ok := err == nil; ok != c.ok {
			t.Errorf("%s: got %v, want success %v", name, err, c.ok)
			continue
		}
		if !c.ok {
			if holdfast.KindOf(err) != holdfast.ErrUnsupported || holdfast.RemedyOf(err) == "" {
				t.Errorf("%s: got %v, want an unsupported with a remedy", name, err)
			}
			continue
		}
		if p.CanResend() != c.resend || p.Minor != c.wantMinor || p.MaxWrite != 1<<20 {
			t.Errorf("%s: got %+v, want minor %d, resend %v", name, p, c.wantMinor, c.resend)
		}
		if p.Flags&^wantedFlags != 0 {
			t.Errorf("%s: flags %#x were not asked for", name, p.Flags&^wantedFlags)
		}
		if len(out) != initOutSize {
			t.Errorf("%s: reply of %d bytes, want %d", name, len(out), initOutSize)
		}
	}
	if _, err := parseInitIn(make([]byte, 15)); err == nil {
		t.Error("an INIT of 15 bytes was taken")
	}
}

// TestInitReply fixes the bytes of the reply, as linux/fuse.h draws them.
func TestInitReply(t *testing.T) {
	in, err := parseInitIn(initMessage(7, 45, ^uint64(0)))
	if err != nil {
		t.Fatal(err)
	}
	_, out, err := settle(in)
	if err != nil {
		t.Fatal(err)
	}
	if order.Uint16([]byte{1, 0}) != 1 {
		t.Skip("the bytes below are little-endian")
	}
	const want = "07000000" + "2d000000" + "00000200" + "21804040" + // major, minor, readahead, flags
		"0001" + "c000" + "00001000" + "01000000" + "0001" + "0000" + "80000000" + // background, congestion, max_write, time_gran, max_pages, alignment, flags2
		"00000000" + "0000" + "0000000000000000000000000000000000000000000000"
	if got := hex.EncodeToString(out); got[:72] != want[:72] {
		t.Errorf("INIT reply:\n got %s\nwant %s", got[:72], want[:72])
	}
}

func TestSlabLayout(t *testing.T) {
	pool := newSlabs(smallPayload, 2)
	defer pool.close()
	a, err := pool.get(nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(a.request()) != requestHead+smallPayload || len(a.head()) != requestHead || len(a.reply(8)) != outHeaderSize+8 {
		t.Errorf("lengths: got %d, %d, %d", len(a.request()), len(a.head()), len(a.reply(8)))
	}
	a.request()[requestHead] = 1
	if a.payload(1)[0] != 1 || a.reply(1)[outHeaderSize] != 1 {
		t.Error("the payload of a request, of a reply and of the slab are not the same bytes")
	}
	if _, err := pool.get(nil); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	close(stop)
	if s, err := pool.get(stop); s != nil || err != nil {
		t.Errorf("a third slab of two: got %v, %v, want to be stopped", s, err)
	}
	a.free()
	if s, err := pool.get(stop); s != a || err != nil {
		t.Errorf("after free: got %v, %v, want the freed one", s, err)
	}
}
