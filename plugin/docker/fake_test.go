package docker

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/plugin"
)

// fakeVolumes keeps the contract of plugin.Volumes in memory. With dir set, a
// mount is a directory below it, so that a real engine can use it.
type fakeVolumes struct {
	dir     string
	onMount func(ctx context.Context) error // called without the lock
	onGet   func() error

	mu   sync.Mutex
	vols map[string]*fakeVolume
	log  []string
}

type fakeVolume struct {
	opts map[string]string
	ids  map[string]bool
}

func newFake(dir string) *fakeVolumes {
	return &fakeVolumes{dir: dir, vols: make(map[string]*fakeVolume)}
}

func (f *fakeVolumes) note(format string, args ...any) {
	f.log = append(f.log, fmt.Sprintf(format, args...))
}

// calls returns what was called so far, in order.
func (f *fakeVolumes) calls() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.log)
}

func (f *fakeVolumes) uses(name string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	if v := f.vols[name]; v != nil {
		return len(v.ids)
	}
	return 0
}

func (f *fakeVolumes) Create(_ context.Context, name string, opts map[string]string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.note("create %s %v", name, opts)
	if v := f.vols[name]; v != nil {
		if maps.Equal(v.opts, opts) {
			return nil
		}
		return holdfast.Errorf(holdfast.ErrExists, "volume %q exists with other options", name)
	}
	f.vols[name] = &fakeVolume{opts: maps.Clone(opts), ids: make(map[string]bool)}
	return nil
}

func (f *fakeVolumes) Remove(_ context.Context, name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.note("remove %s", name)
	if v := f.vols[name]; v != nil && len(v.ids) > 0 {
		return holdfast.Errorf(holdfast.ErrRefused, "volume %q is mounted", name)
	}
	delete(f.vols, name)
	return nil
}

func (f *fakeVolumes) Get(name string) (plugin.Volume, error) {
	if f.onGet != nil {
		if err := f.onGet(); err != nil {
			return plugin.Volume{}, err
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.vols[name] == nil {
		return plugin.Volume{}, holdfast.Errorf(holdfast.ErrNotFound, "no volume %q", name)
	}
	return f.describe(name), nil
}

func (f *fakeVolumes) describe(name string) plugin.Volume {
	v := f.vols[name]
	d := plugin.Volume{
		Name:      name,
		CreatedAt: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
		Status:    map[string]any{"uses": len(v.ids)},
	}
	if len(v.ids) > 0 {
		d.Mountpoint = filepath.Join(f.dir, name)
	}
	return d
}

func (f *fakeVolumes) List() ([]plugin.Volume, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []plugin.Volume
	for _, name := range slices.Sorted(maps.Keys(f.vols)) {
		all = append(all, f.describe(name))
	}
	return all, nil
}

func (f *fakeVolumes) Path(name string) string {
	v, err := f.Get(name)
	if err != nil {
		return ""
	}
	return v.Mountpoint
}

func (f *fakeVolumes) Mount(ctx context.Context, name, id string) (string, error) {
	if f.onMount != nil {
		if err := f.onMount(ctx); err != nil {
			return "", err
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.note("mount %s", name)
	if f.vols[name] == nil {
		return "", holdfast.Errorf(holdfast.ErrNotFound, "no volume %q", name)
	}
	f.vols[name].ids[id] = true
	return filepath.Join(f.dir, name), nil
}

func (f *fakeVolumes) Unmount(_ context.Context, name, id string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.note("unmount %s", name)
	if v := f.vols[name]; v != nil {
		delete(v.ids, id)
	}
	return nil
}

// serve starts a server for a test, with the options' socket and volumes filled in
// where they are missing, and a client that posts calls to it.
func serve(t *testing.T, options Options) (*Server, *caller) {
	t.Helper()
	if options.Socket == "" {
		options.Socket = filepath.Join(t.TempDir(), "hf.sock")
	}
	if options.Volumes == nil {
		options.Volumes = newFake(t.TempDir())
	}
	s, err := Serve(options)
	if err != nil {
		t.Fatalf("Serve: %v", err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := s.Close(ctx); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return s, newCaller(options.Socket)
}

// caller is the engine's side of the protocol.
type caller struct{ client http.Client }

func newCaller(socket string) *caller {
	return &caller{http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}}}
}

// post sends body, as JSON unless it is a string, and returns the status and the
// answer. err is of the connection.
func (c *caller) post(call string, body any) (status int, text string, err error) {
	raw, isText := body.(string)
	if !isText {
		encoded, err := json.Marshal(body)
		if err != nil {
			return 0, "", err
		}
		raw = string(encoded)
	}
	resp, err := c.client.Post("http://plugin/"+call, "application/json", bytes.NewReader([]byte(raw)))
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	return resp.StatusCode, strings.TrimSpace(string(answer)), err
}

// want posts and checks status and answer.
func (c *caller) want(t *testing.T, call string, body any, status int, answer string) {
	t.Helper()
	gotStatus, got, err := c.post(call, body)
	if err != nil || gotStatus != status || got != answer {
		t.Errorf("%s %v:\n got %d %s (%v)\nwant %d %s", call, body, gotStatus, got, err, status, answer)
	}
}
