package lab

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast"
)

func TestOptionsValidate(t *testing.T) {
	good := Options{Name: "lab1", Hosts: 3, Images: Images{Host: "hflab-host:x"}, Profile: ProfileNormal}
	if err := good.Validate(); err != nil {
		t.Errorf("good options: got %v", err)
	}
	for what, change := range map[string]func(*Options){
		"no name":         func(o *Options) { o.Name = "" },
		"a bad name":      func(o *Options) { o.Name = "a;rm" },
		"a long name":     func(o *Options) { o.Name = strings.Repeat("a", 17) },
		"no hosts":        func(o *Options) { o.Hosts = 0 },
		"too many hosts":  func(o *Options) { o.Hosts = maxHosts + 1 },
		"no profile":      func(o *Options) { o.Profile = "" },
		"no image":        func(o *Options) { o.Images.Host = "" },
		"another profile": func(o *Options) { o.Profile = "root" },
	} {
		bad := good
		change(&bad)
		if err := bad.Validate(); !errors.Is(err, holdfast.ErrInvalid) {
			t.Errorf("%s: got %v, want ErrInvalid", what, err)
		}
	}
}

func TestHostNames(t *testing.T) {
	l := &Lab{options: Options{Name: "lab1"}}
	h := newHost(l, 2, netip.MustParsePrefix("10.77.0.0/24"))
	if h.Name != "h2" || h.Address != "10.77.0.12" || h.container != "lab1-h2" || h.NodeAddress() != "10.77.0.12:9400" {
		t.Errorf("second host: got %+v %s", h, h.NodeAddress())
	}
}

// TestContentHash: the hash changes with any content, name or mode, and with the
// binary, and with nothing else.
func TestContentHash(t *testing.T) {
	dir, binary := t.TempDir(), filepath.Join(t.TempDir(), "holdfast")
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write(filepath.Join(dir, "Dockerfile"), "FROM x")
	write(binary, "one")
	hash := func(binary string) string {
		t.Helper()
		h, err := contentHash(dir, binary)
		if err != nil || len(h) != 12 {
			t.Fatalf("contentHash: got %q %v", h, err)
		}
		return h
	}
	seen := map[string]string{}
	differs := func(what, h string) {
		t.Helper()
		if before, again := seen[h]; again {
			t.Errorf("%s: the hash is the same as of %s", what, before)
		}
		seen[h] = what
	}
	differs("no binary", hash(""))
	differs("a binary", hash(binary))
	if again := hash(binary); seen[again] != "a binary" {
		t.Errorf("the same again: got another hash %s", again)
	}
	write(binary, "two")
	differs("another binary", hash(binary))
	write(filepath.Join(dir, "Dockerfile"), "FROM y")
	differs("another Dockerfile", hash(binary))
	write(filepath.Join(dir, "more.sh"), "")
	differs("one more file", hash(binary))
	if err := os.Chmod(filepath.Join(dir, "more.sh"), 0o755); err != nil {
		t.Fatal(err)
	}
	differs("another mode", hash(binary))
	if _, err := contentHash(dir, filepath.Join(dir, "absent")); err == nil {
		t.Error("an absent binary: got no error")
	}
}

func TestVolumeStatus(t *testing.T) {
	for _, c := range []struct {
		json  string
		whole bool
		text  string
	}{
		{`{"state":"attached","node":"h2","replicas":[{"node":"h1","state":"in-sync"},{"node":"h2","state":"in-sync"},{"node":"h3","state":"in-sync"}]}`,
			true, "attached on h2 h1=in-sync h2=in-sync h3=in-sync"},
		{`{"state":"degraded","node":"h2","replicas":[{"node":"h1","state":"stale"},{"node":"h2","state":"in-sync"},{"node":"h3","state":"in-sync"}]}`,
			false, "degraded on h2 h1=stale h2=in-sync h3=in-sync"},
		{`{"state":"detached","replicas":[{"node":"h2","state":"in-sync"},{"node":"h3","state":"in-sync"}]}`, false, "detached h2=in-sync h3=in-sync"},
		{`{"state":"pending"}`, false, "pending"},
	} {
		var v VolumeStatus
		if err := json.Unmarshal([]byte(c.json), &v); err != nil {
			t.Fatal(err)
		}
		if v.Whole(3) != c.whole || v.String() != c.text {
			t.Errorf("%s: got %v %q, want %v %q", c.json, v.Whole(3), v, c.whole, c.text)
		}
	}
}

func TestRun(t *testing.T) {
	ctx := t.Context()
	if out, err := run(ctx, []byte("in"), "sh", "-c", "cat; echo; echo noise >&2"); err != nil || out != "in" {
		t.Errorf("run: got %q %v, want in", out, err)
	}
	_, err := run(ctx, nil, "sh", "-c", "echo 'no such thing' >&2; exit 3")
	if err == nil || !strings.Contains(err.Error(), "exit status 3: no such thing") || !strings.Contains(err.Error(), "sh -c 'echo") {
		t.Errorf("a failing command: got %v, want its line, status and stderr", err)
	}
	short, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancel()
	if _, err := run(short, nil, "sleep", "60"); !errors.Is(err, holdfast.ErrTimeout) {
		t.Errorf("a command that takes too long: got %v, want ErrTimeout", err)
	}
}

func TestRetry(t *testing.T) {
	tries := 0
	err := retry(t.Context(), "luck", func() error {
		tries++
		if tries < 3 {
			return errors.New("not yet")
		}
		return nil
	})
	if err != nil || tries != 3 {
		t.Errorf("retry: got %v after %d, want success after 3", err, tries)
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	err = retry(over, "luck", func() error { return errors.New("not yet") })
	if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "not yet") || !strings.Contains(err.Error(), "luck") {
		t.Errorf("retry without time: got %v, want what was waited for, why it ended and the last error", err)
	}
}

func TestRemoveTree(t *testing.T) {
	root := filepath.Join(t.TempDir(), "tree")
	if err := os.MkdirAll(filepath.Join(root, "a", "b", "c"), 0o755); err != nil {
		t.Fatal(err)
	}
	for range 2 { // what is not there is no error
		if err := removeTree(root); err != nil {
			t.Errorf("removeTree: %v", err)
		}
	}
	if _, err := os.Stat(root); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s: got %v, want it gone", root, err)
	}
}

func TestWhatIsOurs(t *testing.T) {
	for path, want := range map[string]bool{
		"/var/lib/holdfast/volumes/data/mnt": true,
		"/tmp/hftest-12/disk.img":            true,
		"/tmp/hfd123/data":                   true,
		"/var/lib/docker/overlay2/x/merged":  false,
		"/dev/shm":                           false,
		"/home/hf/file":                      false,
	} {
		if got := ours.MatchString(path); got != want {
			t.Errorf("%s is ours: got %v, want %v", path, got, want)
		}
	}
}
