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
	"syscall"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast/plugin"
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

// realDocker is a Docker engine of the test's own, with a driver of the test's own in
// it. The machine's engine is left alone: an engine never forgets a v1 driver that it
// has activated, and asks for 15 s at each `volume ls` once the driver is gone.
type realDocker struct {
	t      *testing.T
	socket string // of the engine's API
	driver string
	image  string
	fake   *fakeVolumes
	server *Server
}

// engineScript starts dockerd with its data in $1 and $1/run/plugins as its directory of
// plugin sockets, in mount and network namespaces of its own: with --bridge none,
// dockerd removes docker0.
const engineScript = `set -eu
mkdir -p /run/docker /run/containerd
mount --make-rprivate /
mount --bind "$1/run" /run/docker
mount -t tmpfs none /run/containerd # else it would use the containerd of another engine
echo '{}' >"$1/config.json" # not the machine's settings
exec dockerd --host "unix://$1/docker.sock" --data-root "$1/data" --exec-root "$1/exec" --pidfile "$1/pid" \
	--config-file "$1/config.json" --storage-driver vfs --bridge none --iptables=false --ip6tables=false --ip-forward=false`

// startReal starts an engine and serves a driver to it. It skips where that is not
// possible.
func startReal(t *testing.T) *realDocker {
	t.Helper()
	lack := func(what string) {
		t.Helper()
		if os.Getenv("CI") == "true" && os.Getenv("HOLDFAST_UNIT") == "" {
			t.Fatalf("missing: %s", what)
		}
		t.Skipf("missing: %s", what)
	}
	if os.Getenv("HOLDFAST_UNIT") != "" || os.Geteuid() != 0 {
		lack("root, and tests that use it")
	}
	for tool, of := range map[string]string{"dockerd": "docker.io", "docker": "docker.io", "busybox": "busybox-static", "unshare": "util-linux"} {
		if _, err := exec.LookPath(tool); err != nil {
			lack(tool + " (Debian: " + of + ")")
		}
	}
	// Not t.TempDir: the path of the plugin socket has to fit an address.
	dir, err := os.MkdirTemp("", "hfd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("remove the engine's data: %v", err)
		}
	})
	if err := os.MkdirAll(filepath.Join(dir, "run", "plugins"), 0o755); err != nil {
		t.Fatal(err)
	}
	d := &realDocker{t: t, socket: filepath.Join(dir, "docker.sock"), driver: "hftest", image: "hftest-busybox"}
	d.fake = newFake(filepath.Join(dir, "volumes"))
	d.startEngine(dir)
	d.server, err = Serve(Options{
		Socket:       filepath.Join(dir, "run", "plugins", d.driver+".sock"),
		Volumes:      directories{d.fake},
		DockerSocket: d.socket,
	})
	if err != nil {
		t.Fatalf("Serve: %v", err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if err := d.server.Close(ctx); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	// An image of one static binary, made without any registry.
	d.sh(`mkdir -p %[1]s/image/bin && cp "$(command -v busybox)" %[1]s/image/bin/busybox && tar -C %[1]s/image -c . | docker import -c 'ENTRYPOINT ["/bin/busybox"]' - %[2]s`, dir, d.image)
	return d
}

// startEngine runs dockerd until the test ends, and waits until it answers.
func (d *realDocker) startEngine(dir string) {
	log := filepath.Join(dir, "log")
	out, err := os.Create(log)
	if err != nil {
		d.t.Fatal(err)
	}
	defer out.Close()
	cmd := exec.Command("unshare", "--mount", "--net", "sh", "-c", engineScript, "sh", dir)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	d.t.Cleanup(func() {
		d.try("docker ps -aq | xargs -r docker rm -f")
		cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
		case <-time.After(30 * time.Second):
			d.t.Error("dockerd did not end within 30s of SIGTERM")
			cmd.Process.Kill()
			<-ended
		}
	})
	for deadline := time.Now().Add(60 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		select {
		case err := <-ended:
			ended <- err
			text, _ := os.ReadFile(log)
			d.t.Fatalf("dockerd ended: %v\n%s", err, text)
		default:
		}
		if _, err := d.try("docker version"); err == nil {
			return
		}
		if time.Now().After(deadline) {
			text, _ := os.ReadFile(log)
			d.t.Fatalf("dockerd does not answer after 60s\n%s", text)
		}
	}
}

// try runs a shell command and returns what it prints.
func (d *realDocker) try(format string, a ...any) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "-c", fmt.Sprintf(format, a...))
	cmd.Env = append(os.Environ(), "DOCKER_HOST=unix://"+d.socket)
	out, err := cmd.CombinedOutput()
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

// TestRootRealEngine drives a real engine with the real docker command.
func TestRootRealEngine(t *testing.T) {
	d := startReal(t)
	// First: nobody has used the driver yet.
	t.Run("activation", d.in(testActivation))
	t.Run("two containers", d.in(testTwoContainers))
	t.Run("inline name", d.in(testInlineName))
	t.Run("mount error", d.in(testMountError)) // last: the server refuses from then on
}

// in gives a subtest its own view of the engine, whose failures are the subtest's.
func (d *realDocker) in(test func(*realDocker)) func(*testing.T) {
	return func(t *testing.T) {
		sub := *d
		sub.t = t
		test(&sub)
	}
}

func testTwoContainers(d *realDocker) {
	t := d.t
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
	want := fmt.Sprintf("%[1]s-one running %[1]s-two running", d.driver)
	inStatus := `docker volume inspect -f '{{range .Status.containers}}{{.name}} {{.state}} {{end}}' ` + vol
	listed := ""
	for end := time.Now().Add(20 * time.Second); listed != want && time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		listed = strings.TrimSpace(d.sh("%s", inStatus))
	}
	if listed != want {
		t.Errorf("containers in docker volume inspect: got %q, want %q", listed, want)
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

// testInlineName: `-v size=1G,name=x:/d` works from creation to rm.
func testInlineName(d *realDocker) {
	t := d.t
	base := d.driver + "-inline"
	typed := "size=1G,replicas=3,name=" + base
	t.Cleanup(func() { d.try("docker volume rm -f %s; docker volume rm -f %s", typed, base) })
	for range 2 { // the first makes the volume, the second finds it
		d.sh("docker run --rm --network none --volume-driver %s -v %s:/d %s sh -c 'echo x >> /d/lines'", d.driver, typed, d.image)
	}
	if got := d.sh("docker run --rm --network none --volume-driver %s -v %s:/d %s cat /d/lines", d.driver, base, d.image); got != "x\nx" {
		t.Errorf("lines by the plain name: got %q, want two", got)
	}
	creates := slices.DeleteFunc(d.fake.calls(), func(c string) bool { return !strings.HasPrefix(c, "create "+base) })
	if want := "create " + base + " map[replicas:3 size:1G]"; len(creates) == 0 || creates[0] != want {
		t.Errorf("creates: got %q, want first %q", creates, want)
	}
	d.sh("docker volume rm %s", typed)
}

// testMountError: a refused mount fails the container with the words of
// the error, and nothing is left counted.
func testMountError(d *realDocker) {
	t := d.t
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

// testActivation: the engine lists the driver soon after it is served,
// without anybody having used it.
func testActivation(d *realDocker) {
	t := d.t
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
