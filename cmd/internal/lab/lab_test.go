package lab

import (
	"context"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// imagesDir is the repository's images directory, seen from this package.
const imagesDir = "../../../images"

// needRoot skips where labs cannot be made.
func needRoot(t *testing.T) {
	t.Helper()
	lack := ""
	if os.Getenv("HOLDFAST_UNIT") != "" {
		t.Skip("missing: root, and tests that use it")
	}
	if os.Geteuid() != 0 {
		lack = "root"
	} else if exec.Command("docker", "version").Run() != nil {
		lack = "a running Docker engine"
	}
	if lack == "" {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatalf("missing: %s", lack)
	}
	t.Skipf("missing: %s", lack)
}

// TestRootHosts makes two hosts, uses, isolates, kills and restarts them, and leaves
// nothing behind.
func TestRootHosts(t *testing.T) {
	needRoot(t)
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	images, err := BuildImages(ctx, imagesDir, "", func(what string) { t.Log(what) })
	if err != nil {
		t.Fatal(err)
	}
	profile, err := Probe(ctx, images.Host)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("profile: %s", profile)
	const name = "hflabtest"
	l, err := Open(ctx, Options{Name: name, Hosts: 2, Images: images, Profile: profile})
	if err != nil {
		t.Fatal(err)
	}
	closed := false
	t.Cleanup(func() {
		if !closed {
			l.Close(context.Background())
		}
	})
	h1, h2 := l.Hosts[0], l.Hosts[1]
	must := func(out string, err error) string {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return out
	}

	// A container of a host's engine is reached from this machine.
	must(h1.Docker(ctx, "run", "-d", "--name", "db", "-p", "6379:6379", "-v", "kept:/d", images.App,
		"redis-server", "--protected-mode", "no", "--dir", "/d", "--appendonly", "yes", "--appendfsync", "always"))
	talk := func(send, want string) {
		t.Helper()
		err := retry(ctx, "redis on "+h1.Address, func() error {
			got, err := ask(h1.Address+":6379", send)
			if err == nil && got != want {
				t.Fatalf("redis answers %q to %q, want %q", got, send, want)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	talk("PING\r\n", "+PONG\r\n")
	talk("SET k v\r\n", "+OK\r\n")

	// Isolated hosts do not reach each other; this machine reaches both.
	pings := func(want bool) {
		t.Helper()
		_, err := h2.Exec(ctx, "bash", "-c", "exec 3<>/dev/tcp/"+h1.Address+"/6379")
		if got := err == nil; got != want {
			t.Errorf("h2 reaches h1: got %v, want %v (%v)", got, want, err)
		}
	}
	pings(true)
	for range 2 {
		if err := h1.Isolate(ctx); err != nil {
			t.Fatal(err)
		}
	}
	_, err = h2.Exec(ctx, "timeout", "2", "bash", "-c", "exec 3<>/dev/tcp/"+h1.Address+"/6379")
	if err == nil {
		t.Error("h2 reaches h1 though it is isolated")
	}
	talk("PING\r\n", "+PONG\r\n")
	for range 2 {
		if err := h1.Heal(ctx); err != nil {
			t.Fatal(err)
		}
	}
	pings(true)

	// A node leaves immutable directories; Close removes them all the same.
	must(h1.Exec(ctx, "sh", "-c", "mkdir -p "+DataDir+"/mounts/bare && chattr +i "+DataDir+"/mounts/bare"))

	// A killed host is dead at once, all of it, and comes back with its disk.
	pids := must(h1.Docker(ctx, "top", "db", "-eo", "pid"))
	if err := h1.Kill(ctx); err != nil {
		t.Fatal(err)
	}
	if got, err := ask(h1.Address+":6379", "PING\r\n"); err == nil {
		t.Errorf("redis on a killed host answers %q (pids there: %s)", got, pids)
	}
	if err := h1.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if got := must(h1.Docker(ctx, "ps", "-a", "--format", "{{.Names}} {{.State}}")); got != "db exited" {
		t.Errorf("containers after the restart: got %q, want db exited", got)
	}
	must(h1.Docker(ctx, "start", "db"))
	talk("GET k\r\n", "$1\r\nv\r\n")

	closed = true
	if err := l.Close(ctx); err != nil {
		t.Fatal(err)
	}
	left, err := Leftovers(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, what := range left {
		if strings.Contains(what, name) || strings.Contains(what, "cgroup") {
			t.Errorf("left behind: %s", what)
		}
	}
}

// ask sends a line to a server and returns the first part of its answer.
func ask(address, send string) (string, error) {
	conn, err := net.DialTimeout("tcp", address, time.Second)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(2 * time.Second))
	if _, err := conn.Write([]byte(send)); err != nil {
		return "", err
	}
	buf := make([]byte, 256)
	n, err := conn.Read(buf)
	return string(buf[:n]), err
}
