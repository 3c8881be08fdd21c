package keeper

import (
	"bytes"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast/blockdev/mount"
)

// rounds is how often a test repeats its fault; HOLDFAST_SOAK_ROUNDS overrides it.
func rounds(t *testing.T, usual int) int {
	text := os.Getenv("HOLDFAST_SOAK_ROUNDS")
	if text == "" {
		return usual
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("HOLDFAST_SOAK_ROUNDS=%s is not a count", text)
	}
	return n
}

// fio writes with verification inside the keeper's namespace.
func (n *node) fio(dir string, seed uint64, loops int) (*exec.Cmd, *bytes.Buffer) {
	var out bytes.Buffer
	cmd := n.inside("fio", "--name=v", "--directory="+dir, "--size=48m", "--rw=randwrite", "--bsrange=4k-256k", "--ioengine=libaio", "--direct=1", "--iodepth=16",
		"--verify=crc32c", "--verify_fatal=1", "--fsync=64", "--randseed="+strconv.FormatUint(seed, 10), "--loops="+strconv.Itoa(loops))
	cmd.Stdout, cmd.Stderr = &out, &out
	return cmd, &out
}

// TestRootTakeover kills the daemon at random moments while fio writes and
// verifies: fio sees no error, and the file system is clean.
func TestRootTakeover(t *testing.T) {
	needRoot(t, "mkfs.ext4", "mkfs.xfs", "nsenter", "fio")
	for _, fs := range []mount.FileSystem{mount.Ext4, mount.XFS} {
		t.Run(string(fs), func(t *testing.T) {
			const seed = 1
			kills := rounds(t, 5)
			rng := rand.New(rand.NewPCG(seed, 0))
			n := startNode(t, "")
			a := volume("data", fs, 512<<20)
			path := n.up(a)
			cmd, out := n.fio(path, seed, 5*kills)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- cmd.Wait() }()
			killed := 0
			for ; killed < kills; killed++ {
				select {
				case err := <-ended:
					t.Fatalf("fio ended after %d kills: %v\n%s", killed, err, out)
				case <-time.After(time.Duration(rng.IntN(200)) * time.Millisecond):
				}
				n.killDaemon()
			}
			if err := <-ended; err != nil {
				t.Fatalf("fio after %d kills: %v\n%s", killed, err, out)
			}
			n.must("Unmount", a)
			device := n.onlyDevice()
			if out, err := exec.Command("sh", "-c", checkCommand(fs)+" "+device.Loop+" 2>&1").CombinedOutput(); err != nil {
				t.Errorf("the file system is not clean: %v\n%s", err, out)
			}
			if got := strings.Count(n.log(), "takeover=true"); got < kills {
				t.Errorf("takeovers: got %d, want %d", got, kills)
			}
			n.must("CloseDevice", a)
			gone(t, device)
		})
	}
}

func checkCommand(fs mount.FileSystem) string {
	if fs == mount.XFS {
		return "xfs_repair -n"
	}
	return "e2fsck -fn"
}

func (n *node) onlyDevice() Device {
	n.t.Helper()
	var devices []Device
	if err := n.call("Devices", Args{}, &devices); err != nil {
		n.t.Fatal(err)
	}
	if len(devices) != 1 {
		n.t.Fatalf("devices: got %+v, want one", devices)
	}
	return devices[0]
}
