package e2e

import (
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
)

// TestMonitoring asks a real node, on the port of its API, what a monitor asks.
func TestMonitoring(t *testing.T) {
	whole(t)
	t.Parallel()
	n := newNode(t, "solo")
	n.flags = append(n.flags, "--disk", filepath.Join(n.dir, "disk.img")+",size=1G,wal=16M")
	n.start()
	n.ready()
	n.must("volume", "create", "t", "--size", "64M", "--replicas", "1")
	n.attach("t")
	for path, says := range map[string][]string{
		"/healthz": {"ok\n"},
		"/readyz":  {"ok\n"},
		"/metrics": {`holdfast_volume_active{volume="t"} 1`, `holdfast_volume_in_sync_replicas{segment="0",volume="t"} 1`,
			"holdfast_raft_leader 1", "holdfast_disk_wal_bytes{", "holdfast_replica_tail{", "holdfast_build_info{"},
	} {
		resp, err := http.Get("http://" + n.address + path)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Errorf("GET %s: got %s %v", path, resp.Status, err)
		}
		for _, s := range says {
			if !strings.Contains(string(body), s) {
				t.Errorf("GET %s lacks %q:\n%s", path, s, body)
			}
		}
	}
}
