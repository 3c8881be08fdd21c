package docker

import (
	"context"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast"
)

type args map[string]any

func TestProtocol(t *testing.T) {
	fake := newFake("/mnt")
	_, c := serve(t, Options{Volumes: fake})

	c.want(t, "Plugin.Activate", "", 200, `{"Implements":["VolumeDriver"]}`)
	c.want(t, "VolumeDriver.Capabilities", "{}", 200, `{"Capabilities":{"Scope":"global"}}`)
	c.want(t, "VolumeDriver.Get", args{"Name": "data"}, 500, `{"Err":"no volume \"data\""}`)
	c.want(t, "VolumeDriver.List", "", 200, `{"Volumes":[]}`)
	for range 2 { // every call may be repeated
		c.want(t, "VolumeDriver.Create", args{"Name": "data", "Opts": args{"size": "1G"}}, 200, `{}`)
	}
	c.want(t, "VolumeDriver.Create", args{"Name": "data", "Opts": args{"size": "2G"}}, 500, `{"Err":"volume \"data\" exists with other options"}`)
	c.want(t, "VolumeDriver.Path", args{"Name": "data"}, 200, `{"Mountpoint":""}`)
	for range 2 {
		c.want(t, "VolumeDriver.Mount", args{"Name": "data", "ID": "one"}, 200, `{"Mountpoint":"/mnt/data"}`)
	}
	c.want(t, "VolumeDriver.Mount", args{"Name": "data", "ID": "two"}, 200, `{"Mountpoint":"/mnt/data"}`)
	c.want(t, "VolumeDriver.Get", args{"Name": "data"}, 200,
		`{"Volume":{"Name":"data","Mountpoint":"/mnt/data","CreatedAt":"2026-01-02T03:04:05Z","Status":{"uses":2}}}`)
	c.want(t, "VolumeDriver.Path", args{"Name": "data"}, 200, `{"Mountpoint":"/mnt/data"}`)
	c.want(t, "VolumeDriver.Remove", args{"Name": "data"}, 500, `{"Err":"volume \"data\" is mounted"}`)
	for range 2 {
		c.want(t, "VolumeDriver.Unmount", args{"Name": "data", "ID": "one"}, 200, `{}`)
	}
	c.want(t, "VolumeDriver.Unmount", args{"Name": "data", "ID": "two"}, 200, `{}`)
	c.want(t, "VolumeDriver.List", "{}", 200,
		`{"Volumes":[{"Name":"data","CreatedAt":"2026-01-02T03:04:05Z","Status":{"uses":0}}]}`)
	for range 2 {
		c.want(t, "VolumeDriver.Remove", args{"Name": "data"}, 200, `{}`)
	}
}

func TestInlineName(t *testing.T) {
	fake := newFake("/mnt")
	_, c := serve(t, Options{Volumes: fake})
	typed := "size=10G,replicas=3,name=data"

	c.want(t, "VolumeDriver.Create", args{"Name": typed, "Opts": args{"FS": "xfs"}}, 200, `{}`)
	c.want(t, "VolumeDriver.Mount", args{"Name": typed, "ID": "one"}, 200, `{"Mountpoint":"/mnt/data"}`)
	c.want(t, "VolumeDriver.Path", args{"Name": typed}, 200, `{"Mountpoint":"/mnt/data"}`)
	// The engine finds the volume again by the name that it asked for.
	c.want(t, "VolumeDriver.Get", args{"Name": typed}, 200,
		`{"Volume":{"Name":"size=10G,replicas=3,name=data","Mountpoint":"/mnt/data","CreatedAt":"2026-01-02T03:04:05Z","Status":{"uses":1}}}`)
	c.want(t, "VolumeDriver.Unmount", args{"Name": typed, "ID": "one"}, 200, `{}`)
	c.want(t, "VolumeDriver.Remove", args{"Name": typed}, 200, `{}`)
	want := []string{"create data map[fs:xfs replicas:3 size:10G]", "mount data", "unmount data", "remove data"}
	if got := fake.calls(); !slices.Equal(got, want) {
		t.Errorf("calls: got %q, want %q", got, want)
	}
}

// TestBadRequests: nothing reaches Volumes from a request that is not whole.
func TestBadRequests(t *testing.T) {
	fake := newFake("/mnt")
	_, c := serve(t, Options{Volumes: fake})
	for _, call := range []string{"Create", "Remove", "Path", "Mount", "Unmount"} {
		for _, body := range []string{"", "null", "{}", `{"Name":""}`, `{"Name":"","ID":"x"}`, `{"Name":7}`, "[]", "nonsense",
			`{"Name":"size=1G"}`, `{"Name":"` + strings.Repeat("x", maxRequest) + `"}`} {
			status, text, err := c.post("VolumeDriver."+call, body)
			if err != nil || status != http.StatusInternalServerError || !strings.HasPrefix(text, `{"Err":"`) {
				t.Errorf("%s with body %.40q: got %d %.80s (%v), want 500 with an Err", call, body, status, text, err)
			}
		}
	}
	for _, call := range []string{"Mount", "Unmount"} { // an id is needed to be counted
		status, text, err := c.post("VolumeDriver."+call, `{"Name":"data"}`)
		if err != nil || status != http.StatusInternalServerError || !strings.Contains(text, "no id") {
			t.Errorf("%s without an id: got %d %s (%v), want 500 that says so", call, status, text, err)
		}
	}
	if got := fake.calls(); len(got) != 0 {
		t.Errorf("Volumes was called: %q", got)
	}
}

// TestGetNeverAnswersWrong: an engine that is answered anything but the volume
// forgets the volume, so where there is no answer there must be no response.
func TestGetNeverAnswersWrong(t *testing.T) {
	fake := newFake("/mnt")
	fake.onGet = func() error { return holdfast.Errorf(holdfast.ErrUnavailable, "no quorum") }
	_, c := serve(t, Options{Volumes: fake})
	for _, body := range []string{`{"Name":"data"}`, "", "null", `{"Name":""}`, "nonsense"} {
		if status, text, err := c.post("VolumeDriver.Get", body); err == nil {
			t.Errorf("Get with body %q: got answer %d %s, want a broken connection", body, status, text)
		}
	}
}

func TestDeadlines(t *testing.T) {
	release := make(chan struct{})
	fake := newFake("/mnt")
	_, c := serve(t, Options{Volumes: fake, longDeadline: 20 * time.Millisecond, shortDeadline: 20 * time.Millisecond})
	// Cleanups run last first: the stuck calls end before the server waits for them.
	t.Cleanup(func() { close(release) })

	fake.onMount = func(ctx context.Context) error { // keeps to its context
		<-ctx.Done()
		return holdfast.Errorf(holdfast.ErrUnavailable, "node h1 is not gone yet")
	}
	c.want(t, "VolumeDriver.Mount", args{"Name": "data", "ID": "one"}, 500, `{"Err":"node h1 is not gone yet"}`)

	fake.onMount = func(context.Context) error { <-release; return nil } // does not
	c.want(t, "VolumeDriver.Mount", args{"Name": "data", "ID": "one"}, 500,
		"{\"Err\":\"no result within 20ms (see `holdfast volume explain`; the call can be repeated)\"}")

	fake.onGet = func() error { <-release; return nil }
	if status, text, err := c.post("VolumeDriver.Get", args{"Name": "data"}); err == nil {
		t.Errorf("a Get that hangs: got answer %d %s, want a broken connection", status, text)
	}
}

// TestEnginesAreNotKeptWaiting: the deadlines stay below the engine's own.
func TestEnginesAreNotKeptWaiting(t *testing.T) {
	if longDeadline+lateGrace >= 2*time.Minute || shortDeadline+lateGrace >= time.Minute {
		t.Errorf("deadlines %v and %v plus %v: want less than the engine's 2m and 1m", longDeadline, shortDeadline, lateGrace)
	}
}

// TestMountsDoNotBlockTheRest: more waiting mounts than may run leave room for
// every other call, and never more than the bound run at once.
func TestMountsDoNotBlockTheRest(t *testing.T) {
	release := make(chan struct{})
	var mu sync.Mutex
	var now, most int
	var once sync.Once
	full := make(chan struct{})
	fake := newFake("/mnt")
	fake.onMount = func(context.Context) error {
		mu.Lock()
		now++
		most = max(most, now)
		if now == maxCallsPerEndpoint {
			once.Do(func() { close(full) })
		}
		mu.Unlock()
		<-release
		mu.Lock()
		now--
		mu.Unlock()
		return nil
	}
	_, c := serve(t, Options{Volumes: fake})
	c.want(t, "VolumeDriver.Create", args{"Name": "data"}, 200, `{}`)

	const extra = 10
	var mounts sync.WaitGroup
	for range maxCallsPerEndpoint + extra {
		mounts.Go(func() {
			if status, text, err := c.post("VolumeDriver.Mount", args{"Name": "data", "ID": "x"}); err != nil || status != 200 {
				t.Errorf("Mount: got %d %s (%v), want 200", status, text, err)
			}
		})
	}
	<-full
	c.want(t, "VolumeDriver.Unmount", args{"Name": "data", "ID": "y"}, 200, `{}`)
	c.want(t, "VolumeDriver.Path", args{"Name": "data"}, 200, `{"Mountpoint":""}`)
	c.want(t, "Plugin.Activate", "", 200, `{"Implements":["VolumeDriver"]}`)
	close(release)
	mounts.Wait()
	if most != maxCallsPerEndpoint {
		t.Errorf("mounts at once: got %d, want %d", most, maxCallsPerEndpoint)
	}
}

func TestRefuseNewServesUnmount(t *testing.T) {
	fake := newFake("/mnt")
	s, c := serve(t, Options{Volumes: fake})
	c.want(t, "VolumeDriver.Create", args{"Name": "data"}, 200, `{}`)
	c.want(t, "VolumeDriver.Mount", args{"Name": "data", "ID": "one"}, 200, `{"Mountpoint":"/mnt/data"}`)
	s.RefuseNew("it is being stopped")
	refused := `{"Err":"this node takes no new use of volumes: it is being stopped"}`
	c.want(t, "VolumeDriver.Mount", args{"Name": "data", "ID": "two"}, 500, refused)
	c.want(t, "VolumeDriver.Create", args{"Name": "more"}, 500, refused)
	c.want(t, "VolumeDriver.Path", args{"Name": "data"}, 200, `{"Mountpoint":"/mnt/data"}`)
	c.want(t, "VolumeDriver.Unmount", args{"Name": "data", "ID": "one"}, 200, `{}`)
	if got := fake.uses("data"); got != 0 {
		t.Errorf("uses after Unmount: got %d, want 0", got)
	}
}

// TestCloseFinishesCalls: a call under way is answered, and no path is left that an
// engine could connect to meanwhile.
func TestCloseFinishesCalls(t *testing.T) {
	started, release := make(chan struct{}), make(chan struct{})
	fake := newFake("/mnt")
	s, c := serve(t, Options{Volumes: fake})
	c.want(t, "VolumeDriver.Create", args{"Name": "data"}, 200, `{}`)
	fake.onMount = func(context.Context) error { close(started); <-release; return nil }

	var calls sync.WaitGroup
	calls.Go(func() {
		c.want(t, "VolumeDriver.Mount", args{"Name": "data", "ID": "one"}, 200, `{"Mountpoint":"/mnt/data"}`)
	})
	<-started
	closed := make(chan error, 1)
	go func() { closed <- s.Close(context.Background()) }()
	for !gone(s.options.Socket) {
		time.Sleep(time.Millisecond)
	}
	select {
	case err := <-closed:
		t.Errorf("Close returned %v before the call was answered", err)
	default:
	}
	close(release)
	calls.Wait()
	if err := <-closed; err != nil {
		t.Errorf("Close: %v", err)
	}
}

// TestCloseCutsShort: a call that waits is told to end when Close's time is over,
// and is still answered.
func TestCloseCutsShort(t *testing.T) {
	started := make(chan struct{})
	fake := newFake("/mnt")
	s, c := serve(t, Options{Volumes: fake})
	fake.onMount = func(ctx context.Context) error {
		close(started)
		<-ctx.Done()
		return holdfast.Errorf(holdfast.ErrUnavailable, "stopped waiting")
	}
	var calls sync.WaitGroup
	calls.Go(func() {
		c.want(t, "VolumeDriver.Mount", args{"Name": "data", "ID": "one"}, 500, `{"Err":"stopped waiting"}`)
	})
	<-started
	over, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.Close(over); err != nil {
		t.Errorf("Close: %v", err)
	}
	calls.Wait()
	if err := s.Close(context.Background()); err != nil {
		t.Errorf("Close again: %v", err)
	}
}

func TestSocketIsLocked(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "hf.sock")
	first, c := serve(t, Options{Socket: socket})
	if s, err := Serve(Options{Socket: socket, Volumes: newFake("")}); !errors.Is(err, holdfast.ErrRefused) {
		t.Fatalf("a second server on one socket: got %v %v, want ErrRefused", s, err)
	}
	// The one that was refused left the socket of the other alone.
	c.want(t, "VolumeDriver.List", "", 200, `{"Volumes":[]}`)
	if err := first.Close(context.Background()); err != nil {
		t.Fatalf("Close: %v", err)
	}
	if !gone(socket) {
		t.Errorf("%s is there after Close", socket)
	}
	serve(t, Options{Socket: socket})
}

// TestCheckSocket: it says what Serve would, and changes nothing.
func TestCheckSocket(t *testing.T) {
	dir := t.TempDir()
	served, file, stale := filepath.Join(dir, "served.sock"), filepath.Join(dir, "file.sock"), filepath.Join(dir, "stale.sock")
	_, c := serve(t, Options{Socket: served})
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	dead, err := openSocket(stale)
	if err != nil {
		t.Fatal(err)
	}
	dead.Close()
	dead.release()
	for _, x := range []struct {
		path string
		want holdfast.Kind
		says string
	}{
		{"relative.sock", holdfast.ErrInvalid, "absolute"},
		{filepath.Join(dir, "hf"), holdfast.ErrInvalid, ".sock"},
		{filepath.Join(dir, strings.Repeat("x", 108)+".sock"), holdfast.ErrInvalid, "107"},
		{filepath.Join(file, "below", "hf.sock"), holdfast.ErrInvalid, "--plugin-socket= for none"},
		{"/proc/hf.sock", holdfast.ErrInvalid, "--plugin-socket= for none"},
		{file, holdfast.ErrRefused, "not a socket"},
		{served, holdfast.ErrRefused, "another process"},
	} {
		if err := CheckSocket(x.path); !errors.Is(err, x.want) || !strings.Contains(err.Error(), x.says) {
			t.Errorf("CheckSocket(%.60q): got %v, want %v that says %q", x.path, err, x.want, x.says)
		}
	}
	if err := CheckSocket(stale); err != nil || gone(stale) {
		t.Errorf("a stale socket: got %v, gone %v, want it left for Serve", err, gone(stale))
	}
	c.want(t, "VolumeDriver.List", "", 200, `{"Volumes":[]}`) // the other was left alone
	serve(t, Options{Socket: stale})
}

// TestStaleSocketIsReplaced: what a killed process left does not stand in the way.
func TestStaleSocketIsReplaced(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "new", "hf.sock") // its directory is made
	stale, err := openSocket(socket)
	if err != nil {
		t.Fatal(err)
	}
	stale.Close()
	stale.release()
	if gone(socket) {
		t.Fatal("the stale socket that the test needs is not there")
	}
	_, c := serve(t, Options{Socket: socket})
	c.want(t, "Plugin.Activate", "", 200, `{"Implements":["VolumeDriver"]}`)
	info, err := os.Stat(socket)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket: got %v %v, want mode 0600", info.Mode(), err)
	}
}

func TestBadOptions(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file.sock")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		options Options
		want    holdfast.Kind
	}{
		{Options{Socket: "relative.sock", Volumes: newFake("")}, holdfast.ErrInvalid},
		{Options{Socket: filepath.Join(dir, "hf"), Volumes: newFake("")}, holdfast.ErrInvalid},
		{Options{Socket: filepath.Join(dir, "hf.sock")}, holdfast.ErrInvalid},
		{Options{Socket: filepath.Join(dir, strings.Repeat("x", 108)+".sock"), Volumes: newFake("")}, holdfast.ErrInvalid},
		{Options{Socket: file, Volumes: newFake("")}, holdfast.ErrRefused},
	} {
		if s, err := Serve(c.options); !errors.Is(err, c.want) {
			t.Errorf("Serve(%.60q): got %v %v, want %v", c.options.Socket, s, err, c.want)
		}
	}
	if text, err := os.ReadFile(file); string(text) != "precious" {
		t.Errorf("the file at the socket's path: got %q %v, want it untouched", text, err)
	}
}

func gone(path string) bool {
	_, err := os.Lstat(path)
	return errors.Is(err, os.ErrNotExist)
}
