package docker

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast/plugin"
)

// pluginDir is where dockerd looks for plugin sockets, dockerSocket its own.
const (
	pluginDir    = "/run/docker/plugins"
	dockerSocket = "/run/docker.sock"
)

// directories serves fakeVolumes whose mounts are real directories on this host.
type directories struct{ *fakeVolumes }

func (d directories) Mount(ctx context.Context, name, id string) (string, error) {
	path, err := d.fakeVolumes.Mount(ctx, name, id)
	if err != nil {
		return "", err
	}
	return path, os.MkdirAll(path, 0o755)
}

var _ plugin.Volumes = directories{}

// realDocker is this machine's engine with a driver of the test's own in it.
type realDocker struct {
	t      *testing.T
	driver string
	image  string
	fake   *fakeVolumes
	server *Server
}

// startReal serves a driver with a unique name to the real engine. It skips where
// there is none, or no busybox to run in a container.
func startReal(t *testing.T) *realDocker {
	t.Helper()
	lack := func(what string) {
		t.Helper()
		if os.Getenv("CI") == "true" && os.Getenv("HOLDFAST_UNIT") == "" {
			t.Fatalf("missing: %s", what)
		}
		t.Skipf("missing: %s", what)
	}
	busybox, noBusybox := exec.LookPath("busybox")
	switch {
	case os.Getenv("HOLDFAST_UNIT") != "" || os.Geteuid() != 0:
		lack("root, and tests that use it")
	case exec.Command("docker", "version").Run() != nil:
		lack("a running Docker engine")
	case noBusybox != nil:
		lack("busybox (Debian: busybox-static)")
	}
	d := &realDocker{t: t, driver: fmt.Sprintf("hftest-%d", os.Getpid()), fake: newFake(t.TempDir())}
	d.image = d.driver
	server, err := Serve(Options{
		Socket:       filepath.Join(pluginDir, d.driver+".sock"),
		Volumes:      directories{d.fake},
		DockerSocket: dockerSocket,
	})
	if err != nil {
		t.Fatalf("Serve: %v", err)
	}
	d.server = server
	t.Cleanup(func() { // last of all: the volumes of the engine go before
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if err := server.Close(ctx); err != nil {
			t.Errorf("Close: %v", err)
		}
		os.Remove(server.options.Socket + ".lock")
	})
	// An image of one static binary, made without any registry.
	root := t.TempDir()
	d.sh("mkdir -p %[1]s/bin %[1]s/data && cp %[2]s %[1]s/bin/busybox && tar -C %[1]s -c . | docker import -c 'ENTRYPOINT [\"/bin/busybox\"]' - %[3]s", root, busybox, d.image)
	t.Cleanup(func() { d.sh("docker rmi -f %s", d.image) })
	return d
}

// try runs a shell command and returns what it prints.
func (d *realDocker) try(format string, a ...any) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, "sh", "-c", fmt.Sprintf(format, a...)).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// sh runs a shell command that must end well.
func (d *realDocker) sh(format string, a ...any) string {
	d.t.Helper()
	out, err := d.try(format, a...)
	if err != nil {
		d.t.Fatalf("%s: %v\n%s", fmt.Sprintf(format, a...), err, out)
	}
	return out
}

func TestRootRealEngine(t *testing.T) {
	d := startReal(t)
	vol := d.driver + "-data"
	t.Cleanup(func() { d.try("docker volume rm -f %s", vol) })

	for range 2 { // a repeated create is success
		if got := d.sh("docker volume create -d %s -o size=1G -o replicas=3 %s", d.driver, vol); got != vol {
			t.Errorf("volume create: got %q, want %q", got, vol)
		}
	}
	var inspected []struct {
		Driver, Name, Mountpoint, Scope string
		Status                          map[string]any
		Options                         map[string]string
	}
	if err := json.Unmarshal([]byte(d.sh("docker volume inspect %s", vol)), &inspected); err != nil {
		t.Fatal(err)
	}
	got := inspected[0]
	if got.Driver != d.driver || got.Name != vol || got.Scope != "global" || got.Mountpoint != "" || got.Status["uses"] != 0.0 || got.Options["replicas"] != "3" {
		t.Errorf("volume inspect: got %+v", got)
	}
	if got := d.sh("docker volume ls -q -f driver=%s", d.driver); got != vol {
		t.Errorf("volume ls: got %q, want %q", got, vol)
	}

	// Two containers share one mount; it ends with the second.
	run := "docker run -d --name %[1]s-%[2]s -v %[1]s-data:/d --network none %[3]s sh -c 'echo %[2]s > /d/%[2]s; exec busybox sleep 60'"
	for _, name := range []string{"one", "two"} {
		t.Cleanup(func() { d.try("docker rm -f %s-%s", d.driver, name) })
		d.sh(run, d.driver, name, d.image)
	}
	if got := d.fake.uses(vol); got != 2 {
		t.Errorf("uses with two containers: got %d, want 2", got)
	}
	read := "docker exec %s-two /bin/busybox sh -c 'until [ -s /d/one -a -s /d/two ]; do busybox sleep 0.1; done; busybox cat /d/one /d/two'"
	if got := d.sh(read, d.driver); got != "one\ntwo" {
		t.Errorf("files of both, in the second: got %q, want one and two", got)
	}
	engine := NewEngine(dockerSocket)
	defer engine.Close()
	users, err := engine.UsedBy(t.Context(), d.driver, vol)
	names := []string{}
	for _, u := range users {
		names = append(names, u.Name+" "+u.State)
	}
	if want := []string{d.driver + "-one running", d.driver + "-two running"}; err != nil || !slices.Equal(names, want) {
		t.Errorf("UsedBy: got %q %v, want %q", names, err, want)
	}
	if out, err := d.try("docker volume rm %s", vol); err == nil {
		t.Errorf("volume rm in use: got success %q, want an error", out)
	}
	d.sh("docker rm -f %s-one", d.driver)
	if got := d.fake.uses(vol); got != 1 {
		t.Errorf("uses after one is removed: got %d, want 1", got)
	}
	d.sh("docker rm -f %s-two", d.driver)
	if got := d.fake.uses(vol); got != 0 {
		t.Errorf("uses after both are removed: got %d, want 0", got)
	}
	// A later container finds the data.
	if got := d.sh("docker run --rm --network none -v %s:/d %s cat /d/one", vol, d.image); got != "one" {
		t.Errorf("data in a later container: got %q, want one", got)
	}
	d.sh("docker volume rm %s", vol)
	if got := d.sh("docker volume ls -q -f driver=%s", d.driver); got != "" {
		t.Errorf("volume ls after rm: got %q, want nothing", got)
	}
}

// TestRootRealEngineInlineName: `-v size=1G,name=x:/d` works from creation to rm.
func TestRootRealEngineInlineName(t *testing.T) {
	d := startReal(t)
	base := d.driver + "-inline"
	typed := "size=1G,replicas=3,name=" + base
	t.Cleanup(func() { d.try("docker volume rm -f %s; docker volume rm -f %s", typed, base) })
	for range 2 { // the first makes the volume, the second finds it
		d.sh("docker run --rm --network none --volume-driver %s -v %s:/d %s sh -c 'echo x >> /d/lines'", d.driver, typed, d.image)
	}
	if got := d.sh("docker run --rm --network none --volume-driver %s -v %s:/d %s cat /d/lines", d.driver, base, d.image); got != "x\nx" {
		t.Errorf("lines by the plain name: got %q, want two", got)
	}
	creates := slices.DeleteFunc(d.fake.calls(), func(c string) bool { return !strings.HasPrefix(c, "create") })
	if want := "create " + base + " map[replicas:3 size:1G]"; len(creates) == 0 || creates[0] != want {
		t.Errorf("creates: got %q, want first %q", creates, want)
	}
	d.sh("docker volume rm %s", typed)
}

// TestRootRealEngineMountError: a refused mount fails the container with the words of
// the error, and nothing is left counted.
func TestRootRealEngineMountError(t *testing.T) {
	d := startReal(t)
	vol := d.driver + "-refused"
	t.Cleanup(func() { d.try("docker volume rm -f %s", vol) })
	d.sh("docker volume create -d %s %s", d.driver, vol)
	d.server.RefuseNew("it is being stopped")
	out, err := d.try("docker run --rm --network none -v %s:/d %s true", vol, d.image)
	if err == nil || !strings.Contains(out, "it is being stopped") {
		t.Errorf("docker run: got %v %q, want a failure that says why", err, out)
	}
	if got := d.fake.uses(vol); got != 0 {
		t.Errorf("uses after a refused mount: got %d, want 0", got)
	}
}

// TestRootRealEngineActivation: the engine lists the driver soon after it is served,
// without anybody having used it.
func TestRootRealEngineActivation(t *testing.T) {
	d := startReal(t)
	deadline := time.Now().Add(20 * time.Second)
	for {
		out := d.sh("docker info -f '{{json .Plugins.Volume}}'")
		if strings.Contains(out, `"`+d.driver+`"`) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("drivers of the engine: got %s, want %q among them", out, d.driver)
		}
		time.Sleep(50 * time.Millisecond)
	}
}
