package nbd

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast/blockdev"
	"github.com/holdfast-storage/holdfast/blockdev/blockdevtest"
)

// These tests run the clients that people use, as processes.

// need skips the test, or fails it in CI, unless the programs are there.
func need(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err == nil {
			continue
		}
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s is not installed", p)
		}
		t.Skipf("%s is not installed", p)
	}
}

// run runs a program, bounded, and returns all that it printed; it must
// succeed unless fails is set.
func run(t *testing.T, fails bool, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = t.TempDir()
	// The distribution's python has libnbd's module; another one need not.
	cmd.Env = append(os.Environ(), "PATH=/usr/bin:/bin:"+os.Getenv("PATH"))
	out, err := cmd.CombinedOutput()
	if (err != nil) != fails {
		t.Fatalf("%s %s: %v, want it to fail: %v\n%s", name, strings.Join(args, " "), err, fails, out)
	}
	return string(out)
}

// onSocket serves exports on a unix socket and returns their URI by name.
func onSocket(t *testing.T, exports ...Export) func(name string) string {
	t.Helper()
	s, err := NewServer(Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	for _, e := range exports {
		if err := s.AddExport(e); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(t.TempDir(), "nbd.sock")
	l, err := ListenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(context.Background(), l) }()
	t.Cleanup(func() {
		s.Close()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return func(name string) string {
		return "nbd+unix:///" + url.PathEscape(name) + "?socket=" + path
	}
}

func TestClientNBDInfo(t *testing.T) {
	need(t, "nbdinfo")
	uri := onSocket(t,
		Export{Name: "vol", Device: blockdevtest.NewMemory(3 << 30)},
		Export{Name: "read only/ä", Description: "with a description", Device: blockdevtest.NewMemory(1 << 20), ReadOnly: true})
	if got := strings.TrimSpace(run(t, false, "nbdinfo", "--size", uri("vol"))); got != "3221225472" {
		t.Errorf("nbdinfo --size: %s, want 3221225472", got)
	}
	wants := func(out string, lines ...string) {
		t.Helper()
		for _, line := range lines {
			if !strings.Contains(out, line) {
				t.Errorf("nbdinfo does not say %q:\n%s", line, out)
			}
		}
	}
	wants(run(t, false, "nbdinfo", uri("vol")), "newstyle-fixed without TLS, using structured packets", "export-size: 3221225472",
		"can_df: true", "can_flush: true", "can_fua: true", "can_multi_conn: true", "can_trim: true", "can_zero: true",
		"is_read_only: false", "block_size_minimum: 512", "block_size_preferred: 4096", "block_size_maximum: 33554432")
	wants(run(t, false, "nbdinfo", uri("read only/ä")), "is_read_only: true", "with a description", "can_trim: false")
	wants(run(t, false, "nbdinfo", "--list", uri("")), `export="read only/ä":`, `export="vol":`)
	run(t, true, "nbdinfo", uri("none"))
	run(t, true, "nbdinfo", strings.Replace(uri("vol"), "nbd+unix", "nbds+unix", 1)) // TLS
}

func TestClientNBDCopy(t *testing.T) {
	need(t, "nbdcopy", "cmp")
	const size = 48 << 20
	uri := onSocket(t, Export{Name: "a", Device: blockdevtest.NewMemory(size)}, Export{Name: "b", Device: blockdevtest.NewMemory(size)})
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	// Data, holes and zeroes in turn.
	data := make([]byte, size)
	for i := range data {
		if i>>20%3 != 0 {
			data[i] = byte(i>>12) ^ byte(i)
		}
	}
	if err := os.WriteFile(src, data, 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, false, "nbdcopy", "--flush", src, uri("a"))
	run(t, false, "nbdcopy", "--connections=4", "--requests=64", uri("a"), uri("b"))
	run(t, false, "nbdcopy", "--synchronous", uri("b"), dst)
	run(t, false, "cmp", src, dst)
}

func TestClientNBDSh(t *testing.T) {
	need(t, "nbdsh")
	uri := onSocket(t, Export{Name: "vol", Device: blockdevtest.NewMemory(1 << 20)})
	script := `
h.connect_uri("` + uri("vol") + `")
assert h.get_size() == 1 << 20
# libnbd sends also what the server did not offer.
h.set_strict_mode(0)
h.pwrite(b"x" * 5000, 100, nbd.CMD_FLAG_FUA)
assert h.pread(5002, 99) == b"\0" + b"x" * 5000 + b"\0"
h.zero(4096, 512, nbd.CMD_FLAG_NO_HOLE)
h.trim(4096, 0)
assert h.pread(4096, 0) == bytearray(4096)
assert h.pread(1004, 4096) == bytearray(512) + b"x" * 492
h.flush()
# Many at once, completed in any order.
bufs = [nbd.Buffer(4096) for i in range(64)]
cookies = [h.aio_pread(b, i * 4096) for i, b in enumerate(bufs)]
while cookies:
    h.poll(-1)
    cookies = [c for c in cookies if not h.aio_command_completed(c)]
assert bufs[1].to_bytearray() == bytearray(512) + b"x" * 492 + bytearray(3092)
# What is wrong is told.
def fails(errno, f, *args):
    try:
        f(*args)
    except nbd.Error as e:
        assert e.errno == errno, (e.errno, errno)
        return
    assert False, "no error"
fails("EINVAL", h.pread, 4096, (1 << 20) - 1)
fails("ENOSPC", h.pwrite, b"12", (1 << 20) - 1)
fails("EINVAL", h.cache, 512, 0)
fails("EINVAL", h.pread, 512, 0, 0x8000)
fails("EINVAL", h.pread, 0, 0)
assert h.pread(1, 0) == b"\0"
h.shutdown()
`
	run(t, false, "nbdsh", "-c", script)
}

func TestClientQEMU(t *testing.T) {
	need(t, "qemu-io", "qemu-img")
	const size = 16 << 20
	uri := onSocket(t, Export{Name: "vol", Device: blockdevtest.NewMemory(size)}, Export{Name: "copy", Device: blockdevtest.NewMemory(size)},
		Export{Name: "ro", Device: blockdevtest.NewMemory(size), ReadOnly: true})
	out := run(t, false, "qemu-io", "-f", "raw",
		"-c", "write -P 17 0 1M", "-c", "write -P 18 -f 4k 4k", "-c", "write -z 8k 8k", "-c", "write -z -u 64k 64k",
		"-c", "discard 256k 64k", "-c", "aio_write -P 19 2M 4M", "-c", "aio_write -P 20 8M 1M", "-c", "aio_flush", "-c", "flush",
		"-c", "read -P 17 0 4k", "-c", "read -P 18 4k 4k", "-c", "read -P 0 8k 8k", "-c", "read -P 17 16k 48k", "-c", "read -P 0 64k 64k",
		"-c", "read -P 0 256k 64k", "-c", "read -P 19 2M 4M", "-c", "read -P 20 8M 1M", "-c", "writev -P 21 512 512 1024", "-c", "read -P 21 512 1536",
		uri("vol"))
	if strings.Contains(out, "Pattern verification failed") || strings.Contains(out, "rror") {
		t.Errorf("qemu-io:\n%s", out)
	}
	run(t, false, "qemu-img", "convert", "-n", "-m", "8", "-W", "-f", "raw", "-O", "raw", uri("vol"), uri("copy"))
	run(t, false, "qemu-img", "compare", "-f", "raw", "-F", "raw", uri("vol"), uri("copy"))
	run(t, false, "qemu-io", "-f", "raw", "-c", "write -P 1 5M 512", uri("copy"))
	run(t, true, "qemu-img", "compare", "-f", "raw", "-F", "raw", uri("vol"), uri("copy"))
	run(t, true, "qemu-io", "-f", "raw", "-c", "write 0 4k", uri("ro"))
	run(t, false, "qemu-io", "-r", "-f", "raw", "-c", "read -P 0 0 4k", uri("ro"))
}

// TestClientFIO writes at random from several connections and verifies; blocks
// that are lost, torn or stale end it.
func TestClientFIO(t *testing.T) {
	need(t, "fio")
	for i, job := range []string{
		"--rw=randwrite --bs=4k --iodepth=32 --size=32m --verify=crc32c",
		"--rw=randrw --bsrange=512-64k --blockalign=512 --iodepth=16 --size=16m --verify=crc32c --verify_backlog=64",
		"--rw=write --bs=1m --iodepth=8 --size=64m --verify=crc32c --end_fsync=1",
		"--rw=randwrite --bs=4k --iodepth=1 --fsync=1 --size=4m --verify=crc32c",
		"--rw=randtrimwrite --bs=4k --iodepth=8 --size=8m",
		"--rw=randwrite --bs=4k --iodepth=16 --numjobs=4 --size=8m --offset_increment=8m --verify=crc32c",
	} {
		t.Run(strconv.Itoa(i), func(t *testing.T) {
			counted := blockdevtest.NewCounted(blockdevtest.NewMemory(64 << 20))
			uri := onSocket(t, Export{Name: "vol", Device: counted})
			args := append([]string{"--name=verify", "--ioengine=nbd", "--uri=" + uri("vol"), "--verify_fatal=1", "--thread=1"}, strings.Fields(job)...)
			out := run(t, false, "fio", args...)
			if !strings.Contains(out, "err= 0") {
				t.Errorf("fio %s:\n%s", job, out)
			}
			if n := counted.Counts(); n.Calls[blockdevtest.Write] == 0 {
				t.Errorf("no write reached the device: %+v", n)
			}
		})
	}
}

// TestClientFIOSeesCorruption: the verification above is worth something only
// if it fails on a device that loses a write.
func TestClientFIOSeesCorruption(t *testing.T) {
	need(t, "fio")
	uri := onSocket(t, Export{Name: "vol", Device: losesWrite{blockdevtest.NewMemory(8 << 20)}})
	out := run(t, true, "fio", "--name=verify", "--ioengine=nbd", "--uri="+uri("vol"), "--verify_fatal=1",
		"--rw=randwrite", "--bs=4k", "--iodepth=8", "--size=8m", "--verify=crc32c")
	if !strings.Contains(out, "verify") {
		t.Errorf("fio failed, but not in its verification:\n%s", out)
	}
}

// losesWrite acknowledges writes to one block and does not do them.
type losesWrite struct{ blockdev.Device }

func (d losesWrite) WriteAt(ctx context.Context, p []byte, off int64, fua bool) error {
	if off == 1<<20 {
		return nil
	}
	return d.Device.WriteAt(ctx, p, off, fua)
}

// TestClientsTogether: programs of several kinds on one export at once, each on
// a part of its own.
func TestClientsTogether(t *testing.T) {
	need(t, "fio", "qemu-io")
	uri := onSocket(t, Export{Name: "vol", Device: blockdevtest.NewMemory(64 << 20)})
	done := make(chan string, 4)
	for i := range 4 {
		go func() {
			var cmd *exec.Cmd
			if i%2 == 0 {
				cmd = exec.Command("fio", "--name=v", "--ioengine=nbd", "--uri="+uri("vol"), "--rw=randwrite", "--bs=4k", "--iodepth=8",
					"--size=8m", fmt.Sprintf("--offset=%dm", i*16), "--verify=crc32c", "--verify_fatal=1")
			} else {
				at := fmt.Sprintf("%dM", i*16)
				cmd = exec.Command("qemu-io", "-f", "raw", "-c", "write -P 9 "+at+" 8M", "-c", "read -P 9 "+at+" 8M", uri("vol"))
			}
			cmd.Dir = os.TempDir()
			out, err := cmd.CombinedOutput()
			if err != nil || strings.Contains(string(out), "failed") {
				done <- fmt.Sprintf("%v: %v\n%s", cmd.Args, err, out)
				return
			}
			done <- ""
		}()
	}
	for range 4 {
		if failure := <-done; failure != "" {
			t.Error(failure)
		}
	}
}
