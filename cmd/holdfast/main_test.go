package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/cmd/internal/node"
)

// asProgram makes the test's own program holdfast.
const asProgram = "HOLDFAST_TEST_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
	}
	for _, v := range os.Environ() {
		if name, _, _ := strings.Cut(v, "="); strings.HasPrefix(name, "HOLDFAST_") && name != "HOLDFAST_UNIT" {
			os.Unsetenv(name)
		}
	}
	os.Exit(m.Run())
}

// cliCase is a command line that fails: how, and what it says; "!" before a text
// that it does not say.
type cliCase struct {
	line string
	code int
	says []string
}

func (c cliCase) check(t *testing.T, code int, stderr string) {
	t.Helper()
	if code != c.code {
		t.Errorf("%s: exit %d, want %d: %s", c.line, code, c.code, stderr)
	}
	for _, s := range c.says {
		text, not := strings.CutPrefix(s, "!")
		if strings.Contains(stderr, text) == not {
			t.Errorf("%s: got %q, want it to say %q", c.line, stderr, s)
		}
	}
}

// words splits a command line at spaces; ” is an empty word.
func words(line string) []string {
	w := strings.Fields(line)
	for i := range w {
		w[i] = strings.ReplaceAll(w[i], "''", "")
	}
	return w
}

// TestBadCommandLines: what is refused before a daemon is asked. --api names none.
func TestBadCommandLines(t *testing.T) {
	dir := t.TempDir()
	fifo, dangling := filepath.Join(dir, "fifo"), filepath.Join(dir, "dangling")
	if err := errors.Join(syscall.Mkfifo(fifo, 0o600), os.Symlink("nowhere", dangling)); err != nil {
		t.Fatal(err)
	}
	for _, c := range []cliCase{
		{"frob", 2, []string{`unknown verb "frob"`, "see holdfast --help"}},
		{"frob --size 1G", 2, []string{`unknown verb "frob"`}},
		{"stauts", 2, []string{"did you mean status?", "!\n\n"}},
		{"volume creat x --size 1G", 2, []string{`unknown verb "creat"`, "did you mean create?", "holdfast volume --help"}},
		{"completion frob", 2, []string{`unknown verb "frob"`, "see holdfast completion --help"}},
		{"help frob", 2, []string{`unknown verb "frob"`}},
		{"help volume frob", 2, []string{`unknown verb "frob"`, "see holdfast volume --help"}},
		{"volume create x --frob", 2, []string{"--frob", "see holdfast volume create --help"}},
		{"volume create x --size", 2, []string{"--size", "see holdfast volume create --help"}},
		{"volume rm", 2, []string{"one volume name or more"}},
		{"volume create x --opt size=1G --opt size=2G", 2, []string{"option size", `"1G"`, `"2G"`, "give it once"}},
		{"volume create x --opt size=1G --size 2G", 2, []string{"option size", `"1G"`, `"2G"`, "give it once"}},
		{"volume create size=1G,name=x --size 2G", 2, []string{"option size", "give it once"}},
		{"status --wait -1s", 2, []string{"--wait -1s is negative"}},
		{"volume attach x --wait -1s", 2, []string{"--wait -1s is negative"}},
		{"node drain x --wait -1s", 2, []string{"--wait -1s is negative", "!--undo"}},
		{"node drain x --wait 1s --undo", 2, []string{"--wait 1s and --undo are both given", "!negative"}},
		{"disk rm x --wait 1s --undo", 2, []string{"--wait 1s and --undo are both given"}},
		{"disk scrub x --wait 1s --stop", 2, []string{"--wait 1s and --stop are both given"}},
		{"disk scrub x --rate 1G --stop", 2, []string{"--rate 1G and --stop are both given"}},
		{"disk scrub x --rate ''", 2, []string{`--rate ""`}},
		{"disk scrub x --rate 1Q", 2, []string{`--rate "1Q"`, "256M"}},
		{"disk fsck ''", 2, []string{"the path is empty"}},
		{"disk fsck " + dir, 2, []string{dir, "neither a file nor a block device"}},
		{"disk fsck " + fifo, 2, []string{fifo, "neither a file nor a block device"}},
		{"disk fsck /dev/null", 2, []string{"/dev/null", "neither a file nor a block device"}},
		{"disk fsck " + dangling, 3, []string{dangling, "is not there"}},
		{"disk fsck " + filepath.Join(dir, "none"), 3, []string{"is not there"}},
	} {
		var out, errOut bytes.Buffer
		code := run(t.Context(), append([]string{"--api", "unix:///nonexistent/sock"}, words(c.line)...), &out, &errOut)
		c.check(t, code, errOut.String())
		if out.Len() > 0 {
			t.Errorf("%s: got %q on stdout, want nothing", c.line, &out)
		}

		errOut.Reset()
		asked := append(words(c.line), "--json", "--api", "unix:///nonexistent/sock")
		if strings.HasSuffix(c.line, "--size") { // which would take it for its value
			asked = append([]string{"--json"}, words(c.line)...)
		}
		if again := run(t.Context(), asked, &out, &errOut); again != code {
			t.Errorf("%s --json: exit %d, want %d", c.line, again, code)
		}
		var failure struct {
			Error struct{ Kind, Message string }
		}
		if err := json.Unmarshal(errOut.Bytes(), &failure); err != nil || failure.Error.Message == "" {
			t.Errorf("%s --json: got %q %v, want an error as JSON", c.line, &errOut, err)
		}
	}
}

// TestUnreachedDaemon: without gRPC's words, and with a remedy that fits.
func TestUnreachedDaemon(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() { // answers, and is no API
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			conn.Write([]byte("SSH-2.0-no\r\n\r\n\r\n\r\n"))
			io.Copy(io.Discard, conn) // until the client has read it and ends
			conn.Close()
		}
	}()
	for _, c := range []cliCase{
		{"unix:///nonexistent/sock", 6, []string{"daemon at unix:///nonexistent/sock: dial unix /nonexistent/sock: connect: no such file", "holdfast serve", "!desc =", "!transport"}},
		{"127.0.0.1:1", 6, []string{"connection refused (is", "!desc =", "!transport"}},
		{l.Addr().String(), 6, []string{"not the API of a node", "--address", "!desc ="}},
	} {
		var out, errOut bytes.Buffer
		code := run(t.Context(), []string{"--api", c.line, "volume", "ls"}, &out, &errOut)
		c.check(t, code, errOut.String())
	}
	got := unreached("unix:///x", errors.New(`connection error: desc = "transport: Error while dialing: dial unix /x: connect: permission denied"`)).Error()
	if want := "daemon at unix:///x: dial unix /x: connect: permission denied (run it as root, or as the user of `holdfast serve`)"; got != want {
		t.Errorf("a socket of somebody else: got %q, want %q", got, want)
	}
}

// TestEveryVerbHasAnExample: that --help shows, and that names its own verb.
func TestEveryVerbHasAnExample(t *testing.T) {
	var look func(*cobra.Command)
	look = func(cmd *cobra.Command) {
		if !cmd.HasSubCommands() && cmd.Short == "" || !cmd.HasSubCommands() && !strings.Contains(cmd.Example, cmd.CommandPath()+" ") && !strings.HasSuffix(cmd.Example, cmd.CommandPath()) {
			t.Errorf("%s: got the example %q, want one of it", cmd.CommandPath(), cmd.Example)
		}
		for _, sub := range cmd.Commands() {
			look(sub)
		}
	}
	look((&cli{}).rootCommand())
}

// serveOptions reads the flags of serve, as it does itself.
func serveOptions(args ...string) (node.Options, error) {
	c, o := &cli{}, node.Options{}
	cmd := c.serveFlags(&o)
	if err := cmd.ParseFlags(append([]string{"--run-dir", "/tmp/hf-test"}, args...)); err != nil {
		return o, err
	}
	return o, c.finishOptions(cmd, &o)
}

func TestServeFlags(t *testing.T) {
	for _, c := range []cliCase{
		{"--label ''", 2, []string{`--label ""`, "zone=a"}},
		{"--label a", 2, []string{`--label "a"`, "zone=a"}},
		{"--label a=1 --label a=2", 2, []string{"--label a", `"1"`, `"2"`}},
		{"--join ''", 2, []string{"--join is empty"}},
		{"--rebuild-after 0", 2, []string{"--rebuild-after 0", "5s"}},
	} {
		_, err := serveOptions(words(c.line)...)
		if !errors.Is(err, holdfast.ErrInvalid) {
			t.Errorf("%s: got %v, want ErrInvalid", c.line, err)
			continue
		}
		c.check(t, 2, err.Error())
	}
	o, err := serveOptions("--label", "a=[x]", "--label", `b=1,"2"`)
	if err != nil || o.Labels["a"] != "[x]" || o.Labels["b"] != `1,"2"` {
		t.Errorf("labels: got %q %v, want them as they were given", o.Labels, err)
	}
	if o, err = serveOptions("--plugin-socket", ""); err != nil || *o.PluginSocket != "" {
		t.Errorf("--plugin-socket '': got %q %v, want none", *o.PluginSocket, err)
	}
}

// TestServeBesideTheOtherVerbs: HOLDFAST_ADDRESS of the shell in which the README has
// it set names a socket; serve does not listen there.
func TestServeBesideTheOtherVerbs(t *testing.T) {
	t.Setenv("HOLDFAST_ADDRESS", "unix:///tmp/hf/control.sock")
	o, err := serveOptions()
	if err != nil || o.Address != "127.0.0.1:9400" {
		t.Errorf("address: got %q %v, want the default", o.Address, err)
	}
	t.Setenv("HOLDFAST_ADDRESS", "127.0.0.1:9500")
	if o, err = serveOptions(); err != nil || o.Address != "127.0.0.1:9500" {
		t.Errorf("address: got %q %v, want 127.0.0.1:9500", o.Address, err)
	}
	t.Setenv("HOLDFAST_JOIN", "") // as in an environment file: not given
	if o, err = serveOptions(); err != nil || len(o.Join) > 0 {
		t.Errorf("an empty HOLDFAST_JOIN: got %q %v, want none", o.Join, err)
	}
}

func TestLogLevel(t *testing.T) {
	t.Setenv("HOLDFAST_LOG", "loud")
	if _, err := newLogger(os.Stderr); !errors.Is(err, holdfast.ErrInvalid) || !strings.Contains(err.Error(), `"loud"`) {
		t.Errorf("HOLDFAST_LOG=loud: got %v, want ErrInvalid that names it", err)
	}
	t.Setenv("HOLDFAST_LOG", "")
	if _, err := newLogger(os.Stderr); err != nil {
		t.Errorf("HOLDFAST_LOG='': got %v, want none", err)
	}
}

func TestDurationsInTheLog(t *testing.T) {
	var out bytes.Buffer
	log, err := newLogger(&out)
	if err != nil {
		t.Fatal(err)
	}
	log.Info("x", "pause", 1500*time.Millisecond, slog.Group("g", slog.Duration("ran", time.Minute)))
	if got := out.String(); !strings.Contains(got, `"pause":"1.5s"`) || !strings.Contains(got, `"ran":"1m0s"`) {
		t.Errorf("got %s", got)
	}
}
