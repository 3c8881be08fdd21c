package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev"
	"github.com/holdfast-storage/holdfast/blockdev/blockdevtest"
	"github.com/holdfast-storage/holdfast/blockdev/nbd"
	"github.com/holdfast-storage/holdfast/cmd/internal/history"
)

func TestScheduleIsDrawnFromTheSeed(t *testing.T) {
	draw := func(seed uint64) (names []string) {
		next := schedule(seed, faults)
		for range 2 * len(faults) {
			names = append(names, next().name)
		}
		return names
	}
	one := draw(1)
	if again := draw(1); strings.Join(one, "|") != strings.Join(again, "|") {
		t.Error("one seed, two schedules")
	}
	if other := draw(2); strings.Join(one, "|") == strings.Join(other, "|") {
		t.Error("two seeds, one schedule")
	}
	for _, deck := range [][]string{one[:len(faults)], one[len(faults):]} {
		seen := map[string]bool{}
		for _, name := range deck {
			seen[name] = true
		}
		if len(seen) != len(faults) {
			t.Errorf("a deck has %d of %d kinds", len(seen), len(faults))
		}
	}
}

func TestKindsOfFaults(t *testing.T) {
	all, dry, some, none := options{power: true}.kinds(), options{}.kinds(), options{only: regexp.MustCompile("rolled|no such")}.kinds(), options{only: regexp.MustCompile("no such")}.kinds()
	if len(all) != len(faults) || len(dry) >= len(all) || len(some) != 1 || len(none) != 0 {
		t.Errorf("%d, %d, %d and %d kinds of %d", len(all), len(dry), len(some), len(none), len(faults))
	}
	for _, f := range dry {
		if f.power {
			t.Errorf("%q needs disks whose power can be cut", f.name)
		}
	}
}

func TestDeadRunsAreKnown(t *testing.T) {
	gone := exec.Command("true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("%s%d-x", namePrefix, gone.Process.Pid)
	for path, want := range map[string]bool{name: true, "/tmp/" + name + "/n1/m": true, ownName() + "n1": false, "/tmp/other": false, namePrefix + "x-1": false} {
		if got := deadPath(path); got != want {
			t.Errorf("%s: dead %v, want %v", path, got, want)
		}
	}
}

func TestClockNeverRepeats(t *testing.T) {
	c := newClock()
	var all sync.WaitGroup
	times := make([][]history.Time, 4)
	for i := range times {
		all.Go(func() {
			for range 2000 {
				times[i] = append(times[i], c.now())
			}
		})
	}
	all.Wait()
	seen := map[history.Time]bool{}
	for _, list := range times {
		for i, at := range list {
			if seen[at] || i > 0 && at <= list[i-1] {
				t.Fatalf("time %d came again", at)
			}
			seen[at] = true
		}
	}
}

func TestEventLogReadsWholeLines(t *testing.T) {
	l := &eventLog{path: filepath.Join(t.TempDir(), "log")}
	if l.count() != 0 {
		t.Error("events before there is a file")
	}
	f, err := os.Create(l.path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fmt.Fprintf(f, "%s\n%s", `{"msg":"volume attached","epoch":7,"continuous":false}`, `{"msg":"node`)
	if got := l.all(); len(got) != 1 || got[0].Msg != "volume attached" || got[0].Epoch != 7 || got[0].Continuous == nil || *got[0].Continuous {
		t.Errorf("events %+v", got)
	}
	fmt.Fprintf(f, "%s\n%s\n", ` runs"}`, `panic: no JSON`)
	if got := l.since(1); len(got) != 2 || got[0].Msg != "node runs" || got[1].Msg != "panic: no JSON" {
		t.Errorf("events %+v", got)
	}
}

func TestLossyAttachmentsComeFromTheLogs(t *testing.T) {
	n := &node{name: "n1", log: &eventLog{path: filepath.Join(t.TempDir(), "log")}}
	lines := `{"msg":"volume attached","epoch":1,"continuous":true}
{"msg":"volume attached","epoch":3,"continuous":false}
{"msg":"volume attached","epoch":9,"continuous":false}
`
	if err := os.WriteFile(n.log.path, []byte(lines), 0o600); err != nil {
		t.Fatal(err)
	}
	r := &chaos{director: &director{nodes: []*node{n}}}
	h := history.History{Sessions: []history.Session{{Epoch: 1}, {Epoch: 4}, {Epoch: 5}}} // no client saw 3 and 9
	r.lossy(&h)
	if h.Sessions[0].Lossy || !h.Sessions[1].Lossy || h.Sessions[2].Lossy {
		t.Errorf("sessions %+v, want epoch 4 lossy, the first after 3", h.Sessions)
	}
}

// serveDevice exports a device over NBD and returns its URI.
func serveDevice(t *testing.T, dev blockdev.Device) string {
	t.Helper()
	srv, err := nbd.NewServer(nbd.Options{})
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "hfc") // short: socket paths are
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "s")
	l, err := nbd.ListenUnix(socket)
	if err != nil {
		t.Fatal(err)
	}
	if err := srv.AddExport(nbd.Export{Name: volumeName, Device: dev}); err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(context.Background(), l) }()
	t.Cleanup(func() {
		srv.Close()
		<-served
		os.RemoveAll(dir)
	})
	return "nbd+unix:///" + volumeName + "?socket=" + url.QueryEscape(socket)
}

func TestNBDClient(t *testing.T) {
	dev := blockdevtest.NewCounted(newCell(volumeSize))
	c, err := dialNBD(serveDevice(t, dev))
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	p, got := make([]byte, 2*holdfast.BlockSize), make([]byte, 2*holdfast.BlockSize)
	history.Fill(p, 3, history.NewValue(1, 1))
	history.Fill(p[holdfast.BlockSize:], 4, history.NewValue(1, 1))
	if err := errors.Join(c.write(p, 3*holdfast.BlockSize, false), c.write(p, 3*holdfast.BlockSize, true), c.flush(), c.read(got, 3*holdfast.BlockSize)); err != nil {
		t.Fatal(err)
	}
	if string(got) != string(p) {
		t.Error("read something else than what was written")
	}
	if counts := dev.Counts(); counts.FUA != 1 || counts.Calls[blockdevtest.Flush] != 1 {
		t.Errorf("the device saw %+v", counts)
	}
	var answer nbdError
	if err := c.read(got, volumeSize); !errors.As(err, &answer) {
		t.Errorf("a read beyond the end: %v, want an NBD error", err)
	}
	if err := c.read(got, 3*holdfast.BlockSize); err != nil {
		t.Errorf("a read after an error: %v", err)
	}
}

func TestNoSuchExport(t *testing.T) {
	uri := strings.Replace(serveDevice(t, newCell(volumeSize)), "///"+volumeName, "///other", 1)
	if c, err := dialNBD(uri); err == nil {
		c.close()
		t.Error("connected to an export that is not there")
	}
}

// stale is a device that answers some reads of a block with what it held before.
type stale struct {
	blockdev.Device
	mu    sync.Mutex
	old   map[int64][]byte
	reads int
}

func (s *stale) WriteAt(ctx context.Context, p []byte, off int64, fua bool) error {
	before := make([]byte, len(p))
	if err := s.Device.ReadAt(ctx, before, off); err != nil {
		return err
	}
	s.mu.Lock()
	s.old[off] = before
	s.mu.Unlock()
	return s.Device.WriteAt(ctx, p, off, fua)
}

func (s *stale) ReadAt(ctx context.Context, p []byte, off int64) error {
	s.mu.Lock()
	s.reads++
	old := s.old[off]
	every := s.reads%20 == 0
	s.mu.Unlock()
	if every && len(old) == len(p) {
		copy(p, old)
		return nil
	}
	return s.Device.ReadAt(ctx, p, off)
}

// torn is a device that changes a byte of every hundredth read.
type torn struct {
	blockdev.Device
	mu    sync.Mutex
	reads int
}

func (s *torn) ReadAt(ctx context.Context, p []byte, off int64) error {
	s.mu.Lock()
	s.reads++
	every := s.reads%100 == 0
	s.mu.Unlock()
	err := s.Device.ReadAt(ctx, p, off)
	if every {
		p[len(p)/2] ^= 0x40
	}
	return err
}

// TestLoad lets the real clients work on devices in this process, over NBD: a true
// one is sound, false ones are seen.
func TestLoad(t *testing.T) {
	for _, c := range []struct {
		name string
		dev  blockdev.Device
		rule string // of what is found; empty: nothing
	}{
		{"true", newCell(volumeSize), ""},
		{"stale", &stale{Device: newCell(volumeSize), old: map[int64][]byte{}}, "C1 to C4"},
		{"torn", &torn{Device: newCell(volumeSize)}, "C6"},
	} {
		t.Run(c.name, func(t *testing.T) {
			uri := serveDevice(t, c.dev)
			var mu sync.Mutex
			var found []history.Violation
			rec := &record{clock: newClock()}
			l := &load{rec: rec, seed: 7, found: func(v history.Violation) {
				mu.Lock()
				defer mu.Unlock()
				found = append(found, v)
			}}
			n := &node{name: "n1"}
			if err := l.begin(history.Session{Epoch: 1, Node: "n1"}, n, uri, func() bool { return true }); err != nil {
				t.Fatal(err)
			}
			if l.wants(1) || !l.wants(2) {
				t.Error("clients are wanted where they are, or not wanted where they are not")
			}
			deadline := time.Now().Add(60 * time.Second)
			for rec.answered() < 600 {
				if time.Now().After(deadline) {
					t.Fatalf("%d requests in a minute", rec.answered())
				}
				time.Sleep(10 * time.Millisecond) // between two looks
			}
			if err := l.begin(history.Session{Epoch: 2, Node: "n1"}, n, uri, func() bool { return false }); err == nil {
				t.Error("a session that was not confirmed began")
			}
			if err := l.finish(10 * time.Second); err != nil {
				t.Error(err)
			}
			rep := rec.history.Check(judgeLimit)
			found = append(found, rep.Violations...)
			switch {
			case c.rule == "" && len(found) > 0:
				t.Errorf("found %v", found)
			case c.rule != "" && (len(found) == 0 || found[0].Rule != c.rule):
				t.Errorf("found %v, want %s", found, c.rule)
			}
			if c.rule == "" && rep.Sound == 0 {
				t.Error("nothing was judged")
			}
		})
	}
}

// TestStopCutsClientsWithoutAnswer: a volume that holds a request must not hold
// the run.
func TestStopCutsClientsWithoutAnswer(t *testing.T) {
	dev := newCell(volumeSize)
	dev.hang()
	defer dev.fail()
	rec := &record{clock: newClock()}
	l := &load{rec: rec, seed: 7, found: func(history.Violation) {}}
	if err := l.begin(history.Session{Epoch: 1, Node: "n1"}, &node{name: "n1"}, serveDevice(t, dev), func() bool { return true }); err != nil {
		t.Fatal(err)
	}
	asked := func() bool {
		rec.mu.Lock()
		defer rec.mu.Unlock()
		return len(rec.history.Ops) > 0
	}
	for !asked() {
		time.Sleep(5 * time.Millisecond) // between two looks
	}
	if err := l.finish(200 * time.Millisecond); !errors.Is(err, holdfast.ErrTimeout) {
		t.Errorf("finish: %v, want ErrTimeout", err)
	}
	if rec.counts.Unanswered == 0 {
		t.Error("no request is unanswered")
	}
}

// asRoot skips what needs namespaces and devices of the kernel.
func asRoot(t *testing.T) {
	t.Helper()
	if os.Getenv("HOLDFAST_UNIT") != "" {
		t.Skip("needs root: part of make test")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
}

// inside runs f on a thread in a network namespace; what it opens stays there.
func inside(t *testing.T, path string, f func() error) error {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never back: the thread ends with the goroutine
		ns, err := os.Open(path)
		if err == nil {
			err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
			ns.Close()
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

func TestCuts(t *testing.T) {
	asRoot(t)
	ctx := context.Background()
	w, err := newNetwork(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer w.close(ctx)
	for n := 1; n <= 3; n++ {
		if err := w.add(ctx, n); err != nil {
			t.Fatal(err)
		}
	}
	for _, port := range []int{portData, portRaft} {
		var l net.Listener
		if err := inside(t, w.path(w.host(1)), func() (err error) {
			l, err = net.Listen("tcp4", fmt.Sprintf("%s:%d", w.address(1), port)) //nolint:noctx // ends with the test
			return err
		}); err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				c.Close()
			}
		}()
	}
	// A packet that is dropped is sent again after a second: so many lost ones.
	const patience = 500 * time.Millisecond
	reaches := func(from, port int) bool {
		return inside(t, w.path(w.host(from)), func() error {
			c, err := net.DialTimeout("tcp4", fmt.Sprintf("%s:%d", w.address(1), port), patience)
			if err == nil {
				c.Close()
			}
			return err
		}) == nil
	}
	for _, c := range []struct {
		name                       string
		cut                        cut
		data2, raft2, data3, raft3 bool
	}{
		{"nothing", cut{}, true, true, true, true},
		{"deaf", cut{in: true}, false, false, false, false},
		{"mute", cut{out: true}, false, false, false, false},
		{"data only", cut{in: true, out: true, ports: []int{portData}}, false, true, false, true},
		{"raft only", cut{in: true, out: true, ports: []int{portAPI, portRaft}}, true, false, true, false},
		{"one peer", cut{in: true, out: true, peer: 2}, false, false, true, true},
	} {
		if c.cut.in || c.cut.out {
			if err := w.cut(ctx, 1, c.cut); err != nil {
				t.Fatal(err)
			}
		}
		got := [4]bool{reaches(2, portData), reaches(2, portRaft), reaches(3, portData), reaches(3, portRaft)}
		if want := [4]bool{c.data2, c.raft2, c.data3, c.raft3}; got != want {
			t.Errorf("%s: node 1 is reached %v, want %v (from 2 at data, raft, from 3 at data, raft)", c.name, got, want)
		}
		dropped, err := w.dropped(ctx, 1)
		if err != nil || (dropped > 0) != (c.name != "nothing") {
			t.Errorf("%s: %d packets dropped, %v", c.name, dropped, err)
		}
		if err := w.heal(ctx, 1); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.remove(ctx, 2); err != nil {
		t.Fatal(err)
	}
	if err := w.add(ctx, 2); err != nil {
		t.Fatal(err)
	}
	if !reaches(2, portData) {
		t.Error("a node that was removed and added again does not reach node 1")
	}
	if err := errors.Join(w.slow(ctx, 1, "1mbit"), w.slow(ctx, 1, "")); err != nil {
		t.Errorf("slow, and not: %v", err)
	}
	w.close(ctx)
	if left, _ := filepath.Glob("/run/netns/" + w.prefix + "*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestPowerCutUnderAFileSystem: what was synced to a file is there after the cut,
// what was not is gone, and the boot id is another.
func TestPowerCutUnderAFileSystem(t *testing.T) {
	asRoot(t)
	ctx := context.Background()
	dir := t.TempDir()
	n := &node{name: "n1", dir: dir}
	s, err := newSupply(ctx, n.medium(), filepath.Join(dir, "boot_id"))
	if err != nil {
		t.Fatal(err)
	}
	n.supply = s
	defer func() {
		if err := s.disconnect(); err != nil {
			t.Error(err)
		}
	}()
	f, err := os.Create(filepath.Join(n.medium(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("synced"); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Sync(), n.syncMedium()); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(" and not"); err != nil {
		t.Fatal(err)
	}
	f.Close()
	before, err := os.ReadFile(s.boot)
	if err != nil {
		t.Fatal(err)
	}
	if err := powerOff(ctx, n); err != nil {
		t.Fatal(err)
	}
	if _, _, err := n.powerOn(ctx, rand.New(rand.NewPCG(1, 0))); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(n.medium(), "f")); err != nil || string(got) != "synced" {
		t.Errorf("the file holds %q, %v, want %q", got, err, "synced")
	}
	if after, err := os.ReadFile(s.boot); err != nil || string(after) == string(before) {
		t.Errorf("boot id %q, %v, as before", after, err)
	}
}
