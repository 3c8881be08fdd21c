package blockdevtest

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/holdfast-storage/holdfast/blockdev"
)

var errTest = errors.New("injected")

func TestWrappersConform(t *testing.T) {
	for name, wrap := range map[string]func(blockdev.Device) blockdev.Device{
		"Checked": blockdev.Checked,
		"Counted": func(d blockdev.Device) blockdev.Device { return NewCounted(d) },
		"FailNth": func(d blockdev.Device) blockdev.Device { return FailNth(d, Write, -1, errTest, true) },
		"Short":   func(d blockdev.Device) blockdev.Device { return Short(d, -1, 0, errTest) },
		"Gated": func(d blockdev.Device) blockdev.Device {
			d, _ = Gated(d, func(Call) bool { return false })
			return d
		},
	} {
		t.Run(name, func(t *testing.T) {
			Run(t, func(*testing.T) blockdev.Device { return wrap(NewMemory(4 << 20)) })
		})
	}
}

func TestFailNth(t *testing.T) {
	ctx, p := context.Background(), make([]byte, 512)
	for _, lasting := range []bool{false, true} {
		d := FailNth(NewMemory(MinSize), Write, 2, errTest, lasting)
		if err := d.WriteAt(ctx, p, 0, false); err != nil {
			t.Errorf("lasting=%v: first write: %v, want nil", lasting, err)
		}
		if err := d.ReadAt(ctx, p, 0); err != nil {
			t.Errorf("lasting=%v: read: %v, want nil", lasting, err)
		}
		if err := d.WriteAt(ctx, p, 0, false); !errors.Is(err, errTest) {
			t.Errorf("lasting=%v: second write: %v, want %v", lasting, err, errTest)
		}
		for method, err := range map[Method]error{
			Write: d.WriteAt(ctx, p, 0, false), Read: d.ReadAt(ctx, p, 0), Flush: d.Flush(ctx),
			Trim: d.Trim(ctx, 0, 512, false), Zeroes: d.WriteZeroes(ctx, 0, 512, false, false),
		} {
			if got := errors.Is(err, errTest); got != lasting {
				t.Errorf("lasting=%v: %s afterwards: %v, want it to fail: %v", lasting, method, err, lasting)
			}
		}
	}
}

func TestShort(t *testing.T) {
	ctx, d := context.Background(), Short(NewMemory(MinSize), 2, 700, errTest)
	p := bytes.Repeat([]byte{7}, 2048)
	if err := d.WriteAt(ctx, p, 4096, false); err != nil {
		t.Fatalf("first write: %v, want nil", err)
	}
	if err := d.WriteAt(ctx, p, 0, false); !errors.Is(err, errTest) {
		t.Fatalf("second write: %v, want %v", err, errTest)
	}
	got := make([]byte, 2048)
	if err := d.ReadAt(ctx, got, 0); err != nil {
		t.Fatal(err)
	}
	if want := append(bytes.Repeat([]byte{7}, 700), make([]byte, 1348)...); !bytes.Equal(got, want) {
		t.Errorf("a torn write left a difference at byte %d, want 700 bytes written", firstDifference(got, want))
	}
}

func TestGate(t *testing.T) {
	mem := NewMemory(MinSize)
	d, gate := Gated(mem, func(c Call) bool { return c.Method == Write })
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	results := make(chan error, 3)
	write := func(off int64) { results <- d.WriteAt(ctx, []byte{1}, off, true) }

	go write(10)
	held := gate.Next()
	if held.Method != Write || held.Off != 10 || held.Len != 1 || !held.FUA || held.Nth != 1 {
		t.Errorf("held call is %+v, want the first write of 1 byte at 10 with fua", held.Call)
	}
	got := []byte{9}
	if err := d.ReadAt(ctx, got, 10); err != nil || got[0] != 0 {
		t.Errorf("a read beside the gate: %v, byte %d, want nil and 0", err, got[0])
	}
	held.Let(nil)
	if err := <-results; err != nil {
		t.Errorf("write let through: %v, want nil", err)
	}

	go write(20)
	gate.Next().Let(errTest)
	if err := <-results; !errors.Is(err, errTest) {
		t.Errorf("write let fail: %v, want %v", err, errTest)
	}

	go write(30)
	gate.Next()
	cancel()
	if err := <-results; !errors.Is(err, context.Canceled) {
		t.Errorf("write cancelled at the gate: %v, want %v", err, context.Canceled)
	}
	all := make([]byte, 40)
	if err := mem.ReadAt(context.Background(), all, 0); err != nil {
		t.Fatal(err)
	}
	want := make([]byte, 40)
	want[10] = 1
	if !bytes.Equal(all, want) {
		t.Errorf("the device holds %v, want only byte 10 written", all)
	}
}

func TestCounted(t *testing.T) {
	ctx := context.Background()
	inner, gate := Gated(NewMemory(MinSize), func(c Call) bool { return c.Method == Flush })
	d := NewCounted(inner)
	done := make(chan error, 2)
	for range 2 {
		go func() { done <- d.Flush(ctx) }()
	}
	a, b := gate.Next(), gate.Next()
	if c := d.Counts(); c.InFlight != 2 || c.Most != 2 {
		t.Errorf("two flushes held: %d in flight, most %d, want 2 and 2", c.InFlight, c.Most)
	}
	a.Let(nil)
	b.Let(errTest)
	<-done
	<-done
	_ = d.WriteAt(ctx, make([]byte, 100), 0, true)
	_ = d.WriteAt(ctx, make([]byte, 50), 0, false)
	_ = d.ReadAt(ctx, make([]byte, 7), 0)
	_ = d.Trim(ctx, 0, 4096, true)
	_ = d.WriteZeroes(ctx, 0, 8192, true, false)
	c := d.Counts()
	if c.InFlight != 0 || c.Most != 2 || c.FUA != 2 {
		t.Errorf("counts are %+v, want none in flight, most 2, fua 2", c)
	}
	for m, want := range map[Method][2]int64{Write: {2, 150}, Read: {1, 7}, Flush: {2, 0}, Trim: {1, 4096}, Zeroes: {1, 8192}} {
		if got := [2]int64{int64(c.Calls[m]), c.Bytes[m]}; got != want {
			t.Errorf("%s: calls and bytes %v, want %v", m, got, want)
		}
	}
}
