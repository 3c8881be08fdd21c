package observe

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/prometheus/common/expfmt"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/disk"
	"github.com/holdfast-storage/holdfast/cmd/internal/reconcile"
	"github.com/holdfast-storage/holdfast/raftstore/state"
	"github.com/holdfast-storage/holdfast/replication/attachment"
	"github.com/holdfast-storage/holdfast/replication/coordinator"
	"github.com/holdfast-storage/holdfast/replication/replica"
	"github.com/holdfast-storage/holdfast/replication/serve"
)

type fakeRaft struct {
	leader  bool
	known   bool
	contact time.Duration
}

func (r fakeRaft) IsLeader() bool                  { return r.leader }
func (r fakeRaft) Leader() (holdfast.NodeID, bool) { return holdfast.NodeID{1}, r.known }
func (r fakeRaft) LastContact() time.Duration      { return r.contact }

// sources of a node n1 that holds the volume data, with a second node n2 that lags
// and has two copies of it, one of them on its way out.
func sources(t *testing.T) Sources {
	t.Helper()
	view := &state.View{}
	index := uint64(0)
	apply := func(cmd state.Command) {
		t.Helper()
		index++
		next, _, err := view.Apply(index, cmd)
		if err != nil {
			t.Fatal(err)
		}
		view = next
	}
	apply(&state.InitCluster{ID: holdfast.ClusterID{9}, Level: holdfast.Level1})
	n1, n2 := holdfast.NodeID{1}, holdfast.NodeID{2}
	for id, name := range map[holdfast.NodeID]string{n1: "n1", n2: "n2"} {
		apply(&state.NodeJoin{Node: state.Node{ID: id, Name: name, Instance: holdfast.InstanceID{id[0]}, HasDisks: true, MaxLevel: holdfast.Level1,
			Addresses: state.Addresses{API: name + ":1", Data: name + ":2", Raft: name + ":3"}}})
		apply(&state.DiskOpen{Disk: holdfast.DiskID{id[0]}, Node: id, Instance: holdfast.InstanceID{id[0]}, OpenCount: 1, Size: 1 << 40, Free: 1 << 40})
	}
	volume := holdfast.VolumeID{7}
	apply(&state.CreateVolume{Volume: volume, Name: "data", Size: 1 << 30, Lineage: holdfast.LineageID{3},
		Options:   state.VolumeOptions{Replicas: 2, SegmentSize: holdfast.DefaultSegmentSize, AckMode: holdfast.AckReceived, MinCopies: 1},
		Placement: []state.SegmentPlacement{{{Replica: holdfast.ReplicaID{1}, Disk: holdfast.DiskID{1}}, {Replica: holdfast.ReplicaID{2}, Disk: holdfast.DiskID{2}}}}})
	segment := holdfast.SegmentID{Volume: volume}
	return Sources{
		Version: "v1", Commit: "c0ffee", Node: n1, View: func() *state.View { return view },
		Gone: func(id holdfast.NodeID) bool { return id == n2 },
		Raft: fakeRaft{known: true, contact: 1500 * time.Millisecond},
		Disks: func() []reconcile.OpenedDisk {
			return []reconcile.OpenedDisk{{Path: "/d", Pool: "ssd", Stat: disk.Stat{Disk: holdfast.DiskID{1}, Capacity: 1000, Used: 300, Reserved: 20, Reclaimable: 30, Allocated: 400, WALSize: 64, WALUsed: 60, Repair: disk.RepairStat{Found: 5, Repaired: 3, Poisoned: 1}, MarkedFailed: true},
				Fill:  reconcile.Fill{Ratio: 0.875, Host: true},
				Scrub: reconcile.Scrubbing{ScrubReport: disk.ScrubReport{Read: 200, Bad: 2, Lost: 1}, Running: true, Ended: time.Unix(7, 0), Scrubs: 4}}}
		},
		Replicas: func() []serve.ReplicaStatus {
			return []serve.ReplicaStatus{{Disk: holdfast.DiskID{1}, PingsDropped: 3, Core: replica.Status{Intact: true},
				Log: disk.Status{ReplicaDesc: disk.ReplicaDesc{Segment: segment, Replica: holdfast.ReplicaID{1}}, Tail: 12, Dur: 11, Commit: 10, Applied: 9, Bad: 2, Poison: 1}}}
		},
		Held: func() []reconcile.HeldVolume {
			return []reconcile.HeldVolume{{Volume: volume, Held: reconcile.Held{Epoch: 4, Active: true, Clients: 2, Status: attachment.Status{Segments: []attachment.SegmentStatus{{
				Segment: segment, Window: 4096, Requests: 3, BytesResynced: 77,
				Waits: []attachment.Wait{{For: "a", Time: time.Second}, {For: "b", Time: 3 * time.Second}},
				State: coordinator.State{Tail: 12, Acked: 11, Commit: 10, Ack: holdfast.AckDurable, Refused: 6, Members: []coordinator.MemberState{
					{Node: n1, InSync: true}, {Node: n2}, {Node: n2}}},
				Members: []attachment.MemberStatus{{}, {LagBytes: 8192, LagOps: 2}, {LagBytes: 1, LagOps: 1}},
			}}}}}}
		},
		Memory: func() (int64, int64) { return 4096, 128 << 20 },
		Throttle: func() attachment.ThrottleStatus {
			return attachment.ThrottleStatus{Resyncs: 2, Waiting: 1, Rate: 3 << 20, Limit: 10 << 20,
				Requests: []attachment.ForegroundStatus{{Op: "write", P99: 2 * time.Millisecond, Baseline: time.Millisecond}}}
		},
	}
}

func TestMetrics(t *testing.T) {
	c := &collector{metrics: newMetrics(), s: sources(t)}
	problems, err := testutil.CollectAndLint(c)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	const replica = `replica="01000000-0000-0000-0000-000000000000",segment="0",volume="data"`
	const diskID = `disk="01000000-0000-0000-0000-000000000000"`
	for name, want := range map[string]string{
		"build_info":                         `{commit="c0ffee",version="v1"} 1`,
		"node_gone":                          `{node="n2"} 1`,
		"raft_leader":                        ` 0`,
		"raft_leader_known":                  ` 1`,
		"raft_last_contact_seconds":          ` 1.5`,
		"raft_applied_index":                 ` 6`,
		"disk_capacity_bytes":                `{` + diskID + `,path="/d",pool="ssd"} 1000`,
		"disk_used_bytes":                    `{` + diskID + `,path="/d",pool="ssd"} 300`,
		"disk_reserved_bytes":                `{` + diskID + `,path="/d",pool="ssd"} 20`,
		"disk_reclaimable_bytes":             `{` + diskID + `,path="/d",pool="ssd"} 30`,
		"disk_allocated_bytes":               `{` + diskID + `,path="/d",pool="ssd"} 400`,
		"disk_full_ratio":                    `{` + diskID + `,path="/d",pool="ssd"} 0.875`,
		"disk_scrub_running":                 `{` + diskID + `,path="/d",pool="ssd"} 1`,
		"disk_scrub_read_bytes":              `{` + diskID + `,path="/d",pool="ssd"} 200`,
		"disk_scrub_bad_blocks":              `{` + diskID + `,path="/d",pool="ssd"} 3`,
		"disk_scrub_ended_timestamp_seconds": `{` + diskID + `,path="/d",pool="ssd"} 7`,
		"disk_scrubs_total":                  `{` + diskID + `,path="/d",pool="ssd"} 4`,
		"disk_wal_bytes":                     `{` + diskID + `,path="/d",pool="ssd"} 64`,
		"disk_wal_used_bytes":                `{` + diskID + `,path="/d",pool="ssd"} 60`,
		"disk_failed":                        `{` + diskID + `,path="/d",pool="ssd"} 1`,
		"replica_tail":                       `{` + diskID + `,` + replica + `} 12`,
		"replica_durable":                    `{` + diskID + `,` + replica + `} 11`,
		"replica_commit":                     `{` + diskID + `,` + replica + `} 10`,
		"replica_applied":                    `{` + diskID + `,` + replica + `} 9`,
		"replica_failed":                     `{` + diskID + `,` + replica + `} 0`,
		"replica_intact":                     `{` + diskID + `,` + replica + `} 1`,
		"replica_disk_pings_dropped_total":   `{` + diskID + `,` + replica + `} 3`,
		"replay_memory_bytes":                ` 4096`,
		"replay_memory_limit_bytes":          ` 1.34217728e+08`,
		"volume_size_bytes":                  `{volume="data"} 1.073741824e+09`,
		"volume_epoch":                       `{volume="data"} 4`,
		"volume_active":                      `{volume="data"} 1`,
		"volume_nbd_clients":                 `{volume="data"} 2`,
		"volume_in_sync_replicas":            `{segment="0",volume="data"} 1`,
		"volume_replicas":                    `{segment="0",volume="data"} 2`,
		"volume_window_bytes":                `{segment="0",volume="data"} 4096`,
		"volume_requests":                    `{segment="0",volume="data"} 3`,
		"volume_sequenced":                   `{segment="0",volume="data"} 12`,
		"volume_acknowledged":                `{segment="0",volume="data"} 11`,
		"volume_committed":                   `{segment="0",volume="data"} 10`,
		"volume_ack_durable":                 `{segment="0",volume="data"} 1`,
		"volume_resynced_bytes_total":        `{segment="0",volume="data"} 77`,
		"volume_writes_refused_total":        `{segment="0",volume="data"} 6`,
		"volume_longest_wait_seconds":        `{segment="0",volume="data"} 3`,
		"member_lag_bytes":                   `{node="n1",segment="0",volume="data"} 0` + "\nholdfast_member_lag_bytes" + `{node="n2",segment="0",volume="data"} 8192`,
		"member_lag_entries":                 `{node="n1",segment="0",volume="data"} 0` + "\nholdfast_member_lag_entries" + `{node="n2",segment="0",volume="data"} 2`,
		"member_in_sync":                     `{node="n1",segment="0",volume="data"} 1` + "\nholdfast_member_in_sync" + `{node="n2",segment="0",volume="data"} 0`,
		"resyncs":                            ` 2`,
		"resyncs_waiting":                    ` 1`,
		"resync_bytes_per_second":            ` 3.145728e+06`,
		"resync_limit_bytes_per_second":      ` 1.048576e+07`,
		"request_p99_seconds":                `{op="write"} 0.002`,
		"request_p99_baseline_seconds":       `{op="write"} 0.001`,
		"disk_bad_blocks_found_total":        `{` + diskID + `,path="/d",pool="ssd"} 5`,
		"disk_bad_blocks_repaired_total":     `{` + diskID + `,path="/d",pool="ssd"} 3`,
		"disk_bad_blocks_poisoned_total":     `{` + diskID + `,path="/d",pool="ssd"} 1`,
		"replica_bad_blocks":                 `{` + diskID + `,` + replica + `} 2`,
		"replica_poisoned_blocks":            `{` + diskID + `,` + replica + `} 1`,
	} {
		got, err := testutil.CollectAndFormat(c, expfmt.TypeTextPlain, "holdfast_"+name)
		if err != nil {
			t.Fatal(err)
		}
		var samples []string
		for line := range strings.Lines(string(got)) {
			if !strings.HasPrefix(line, "#") {
				samples = append(samples, strings.TrimSpace(line))
			}
		}
		if text := strings.Join(samples, "\n"); text != "holdfast_"+name+want {
			t.Errorf("got  %s\nwant holdfast_%s%s", text, name, want)
		}
	}
	if n := len(c.all()); n != 58 {
		t.Errorf("metrics: got %d, want the 58 that are checked here", n)
	}
}

// TestServer asks the HTTP server what a monitor asks.
func TestServer(t *testing.T) {
	var lack error
	web := httptest.NewServer(NewServer(Options{Sources: sources(t), Logger: slog.New(slog.DiscardHandler), Ready: func(context.Context) error { return lack }}).Handler)
	defer web.Close()
	get := func(path string) (int, string) {
		t.Helper()
		resp, err := http.Get(web.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(body)
	}
	if code, body := get("/metrics"); code != 200 || !strings.Contains(body, "holdfast_volume_active") || !strings.Contains(body, "go_goroutines") || !strings.Contains(body, "process_resident_memory_bytes") {
		t.Errorf("/metrics: got %d\n%s", code, body)
	}
	if code, _ := get("/healthz"); code != 200 {
		t.Errorf("/healthz: got %d, want 200", code)
	}
	if code, _ := get("/readyz"); code != 200 {
		t.Errorf("/readyz: got %d, want 200", code)
	}
	lack = errors.New("no quorum today")
	if code, body := get("/readyz"); code != 503 || body != "no quorum today\n" {
		t.Errorf("/readyz while not ready: got %d %q, want 503 and why", code, body)
	}
	if code, _ := get("/"); code != 404 {
		t.Errorf("/: got %d, want 404", code)
	}
}

// TestRegistersOnce shows that no two metrics share a name.
func TestRegistersOnce(t *testing.T) {
	if err := prometheus.NewPedanticRegistry().Register(&collector{metrics: newMetrics(), s: sources(t)}); err != nil {
		t.Error(err)
	}
}
