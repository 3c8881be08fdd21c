package e2e

import (
	"path/filepath"
	"strings"
	"testing"
)

// TestSegments writes across the borders of a volume's segments, with promises off,
// and reads it back after a restart.
func TestSegments(t *testing.T) {
	whole(t)
	t.Parallel()
	need(t, "fio", "qemu-io")
	n := newNode(t, "solo")
	n.flags = append(n.flags, "--disk", filepath.Join(n.dir, "disk.img")+",size=2G,wal=64M")
	n.start()
	n.ready()
	n.must("volume", "create", "v", "--size", "60M", "--replicas", "1", "--segment-size", "16M", "--read-promises", "off")
	var shown struct {
		SegmentSize  int64  `json:"segment_size"`
		ReadPromises string `json:"read_promises"`
		Replicas     []struct{ Segment int }
	}
	if n.decode(&shown, "volume", "inspect", "v"); shown.SegmentSize != 16<<20 || shown.ReadPromises != "off" || len(shown.Replicas) != 4 {
		t.Errorf("inspect: %+v, want four segments of up to 16 MiB and no promises", shown)
	}
	if r := n.cli("volume", "create", "v", "--segment-size", "32M"); r.code != 4 {
		t.Errorf("the same name with another segment size: exit %d, want 4\n%s", r.code, r.stderr)
	}
	uri := n.attach("v")
	shape := []string{"--rw=randwrite", "--bsrange=4k-1m", "--iodepth=8", "--size=60M", "--io_size=60M", "--verify=crc32c", "--verify_fatal=1", "--randseed=5"}
	fio(t, uri, append(shape, "--do_verify=1", "--fsync=16")...)
	// 1 MiB over each border, and the end of the last, shorter one.
	for _, command := range []string{"write -P 7 15872k 1M", "write -P 8 32256k 1M", "write -z 48640k 1M", "write -P 9 60928k 512k"} {
		if out, err := qemuIO(t, uri, command); err != nil {
			t.Errorf("%s: %v\n%s", command, err, out)
		}
	}
	if out, err := qemuIO(t, uri, "write -P 9 61M 1M"); err == nil || !strings.Contains(out, "fail") {
		t.Errorf("a write beyond the end: got success\n%s", out)
	}
	n.kill()
	n.start()
	n.ready()
	uri = n.attach("v")
	for _, command := range []string{"read -P 7 15872k 1M", "read -P 8 32256k 1M", "read -P 0 48640k 1M", "read -P 9 60928k 512k"} {
		if out, err := qemuIO(t, uri, command); err != nil || strings.Contains(out, "verification failed") {
			t.Errorf("%s: %v\n%s", command, err, out)
		}
	}
	n.must("volume", "detach", "v")
	n.must("volume", "rm", "v")
}
