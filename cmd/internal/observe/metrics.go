package observe

import (
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/cmd/internal/reconcile"
	"github.com/holdfast-storage/holdfast/raftstore/state"
	"github.com/holdfast-storage/holdfast/replication/attachment"
	"github.com/holdfast-storage/holdfast/replication/coordinator"
	"github.com/holdfast-storage/holdfast/replication/serve"
)

// Raft is what is shown of this node's part in raft; *raftstore.Store has it.
type Raft interface {
	IsLeader() bool
	Leader() (holdfast.NodeID, bool)
	LastContact() time.Duration // zero on the leader
}

// Sources are where the metrics are read, at every scrape. All may be called
// concurrently and must not wait.
type Sources struct {
	Version, Commit string
	Node            holdfast.NodeID
	View            func() *state.View
	Gone            func(holdfast.NodeID) bool
	Raft            Raft
	Disks           func() []reconcile.OpenedDisk
	Replicas        func() []serve.ReplicaStatus
	Held            func() []reconcile.HeldVolume
	// Memory is the payload kept for replay by all attachments, and its bound.
	Memory func() (used, limit int64)
	// Throttle is what brings members back at this node, and its bounds.
	Throttle func() attachment.ThrottleStatus
}

// metric is one name: what it is for people, and the labels of its samples.
type metric struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
}

func gauge(name, help string, labels ...string) metric {
	return metric{prometheus.NewDesc("holdfast_"+name, help, labels, nil), prometheus.GaugeValue}
}

func counter(name, help string, labels ...string) metric {
	return metric{prometheus.NewDesc("holdfast_"+name, help, labels, nil), prometheus.CounterValue}
}

// The metrics. Sizes are in bytes, times in seconds; a yes is 1, a no 0.
type metrics struct {
	build, nodeGone, leader, leaderKnown, contact, appliedIndex metric

	diskCapacity, diskUsed, diskReserved, walSize, walUsed, diskFailed, blocksFound, blocksRepaired, blocksPoisoned metric

	diskReclaimable, diskAllocated, diskFull, scrubRunning, scrubRead, scrubBad, scrubEnded, scrubs metric

	replicaTail, replicaDurable, replicaCommit, replicaApplied, replicaFailed, replicaIntact, replicaBad, replicaPoison, pingsDropped metric

	memoryUsed, memoryLimit metric

	resyncs, resyncsWaiting, resyncRate, resyncLimit, requestP99, requestBaseline metric

	size, epoch, active, clients, inSync, wanted, window, requests, acked, committed, sequenced, ackDurable, resynced, refused, waiting metric

	lag, lagEntries, memberInSync metric
}

func newMetrics() *metrics {
	disk, replica, volume, member := []string{"disk", "path", "pool"}, []string{"replica", "volume", "segment", "disk"}, []string{"volume", "segment"}, []string{"volume", "segment", "node"}
	return &metrics{
		build:        gauge("build_info", "Always 1: the version that runs.", "version", "commit"),
		nodeGone:     gauge("node_gone", "Whether this node's own record calls another node gone.", "node"),
		leader:       gauge("raft_leader", "Whether this node leads raft."),
		leaderKnown:  gauge("raft_leader_known", "Whether this node knows a raft leader: without one nothing is attached and no in-sync set changes."),
		contact:      gauge("raft_last_contact_seconds", "How long ago this node heard of the raft leader; 0 on the leader."),
		appliedIndex: gauge("raft_applied_index", "The raft index of this node's view of the metadata."),

		diskCapacity:    gauge("disk_capacity_bytes", "What a disk's chunks can hold.", disk...),
		diskUsed:        gauge("disk_used_bytes", "What of it holds data or map, or waits to be freed.", disk...),
		diskReserved:    gauge("disk_reserved_bytes", "What of it logged entries will need.", disk...),
		walSize:         gauge("disk_wal_bytes", "The size of a disk's log.", disk...),
		walUsed:         gauge("disk_wal_used_bytes", "What of the log cannot be recycled yet; writers wait as it nears the size.", disk...),
		diskReclaimable: gauge("disk_reclaimable_bytes", "What of disk_used_bytes is free with the next checkpoint.", disk...),
		diskAllocated:   gauge("disk_allocated_bytes", "What a disk's chunks take of the file system below, also those that are set aside.", disk...),
		diskFull:        gauge("disk_full_ratio", "In use or promised, 0 to 1, of a disk or, if that is fuller, of the file system of its image; 0.85 warns, 0.97 refuses.", disk...),
		diskFailed:      gauge("disk_failed", "Whether a disk failed, in this process life or an earlier one.", disk...),

		scrubRunning: gauge("disk_scrub_running", "Whether a disk is being scrubbed.", disk...),
		scrubRead:    gauge("disk_scrub_read_bytes", "What the present or the last scrub has compared.", disk...),
		scrubBad:     gauge("disk_scrub_bad_blocks", "Blocks that it found bad or lost.", disk...),
		scrubEnded:   gauge("disk_scrub_ended_timestamp_seconds", "When the last scrub ended; 0: none did since the node started, or one runs.", disk...),
		scrubs:       counter("disk_scrubs_total", "Scrubs that read everything, since the disk was opened.", disk...),

		blocksFound:    counter("disk_bad_blocks_found_total", "Blocks of 4 KiB found to have changed, or lost, since the disk was opened.", disk...),
		blocksRepaired: counter("disk_bad_blocks_repaired_total", "Bad blocks that came back from another in-sync replica.", disk...),
		blocksPoisoned: counter("disk_bad_blocks_poisoned_total", "Bad blocks that no in-sync replica had: reads of them fail until they are written.", disk...),

		replicaTail:    gauge("replica_tail", "The last entry that a replica of this node received.", replica...),
		replicaDurable: gauge("replica_durable", "The last entry that is on its disk.", replica...),
		replicaCommit:  gauge("replica_commit", "The last entry it was told is durable on every in-sync replica.", replica...),
		replicaApplied: gauge("replica_applied", "The last entry that is in its chunks.", replica...),
		replicaFailed:  gauge("replica_failed", "Whether it cannot go on.", replica...),
		replicaIntact:  gauge("replica_intact", "Whether it lost nothing it ever acknowledged.", replica...),
		pingsDropped:   counter("replica_disk_pings_dropped_total", "Pings to all replicas of its disk that were not answered: too many waited for the disk.", replica...),
		replicaBad:     gauge("replica_bad_blocks", "Blocks known to be bad or lost there, and not yet repaired.", replica...),
		replicaPoison:  gauge("replica_poisoned_blocks", "Blocks in its chunks that are lost until they are written.", replica...),

		memoryUsed:  gauge("replay_memory_bytes", "Payload kept for replay by all attachments of this node."),
		memoryLimit: gauge("replay_memory_limit_bytes", "The bound of replay_memory_bytes; writers wait at it."),

		resyncs:         gauge("resyncs", "Copies of log or chunks to replicas that volumes of this node bring back now."),
		resyncsWaiting:  gauge("resyncs_waiting", "Copies that wait for another on the same disk to end."),
		resyncRate:      gauge("resync_bytes_per_second", "What all of them sent in the last second or less."),
		resyncLimit:     gauge("resync_limit_bytes_per_second", "What each may send, by what clients notice; 0: no limit."),
		requestP99:      gauge("request_p99_seconds", "What one in a hundred requests of this node's clients exceeded in the last second that had some.", "op"),
		requestBaseline: gauge("request_p99_baseline_seconds", "The same without copies; 0 if not known. The limit falls when request_p99_seconds is well above it.", "op"),

		size:       gauge("volume_size_bytes", "The size of a volume that this node holds.", "volume"),
		epoch:      gauge("volume_epoch", "The epoch in which this node holds a volume.", "volume"),
		active:     gauge("volume_active", "Whether it is served.", "volume"),
		clients:    gauge("volume_nbd_clients", "Its NBD connections.", "volume"),
		inSync:     gauge("volume_in_sync_replicas", "The replicas in raft's in-sync set.", volume...),
		wanted:     gauge("volume_replicas", "The replicas that the volume was made with.", volume...),
		window:     gauge("volume_window_bytes", "Payload kept for replay.", volume...),
		requests:   gauge("volume_requests", "Requests taken and not yet answered.", volume...),
		sequenced:  gauge("volume_sequenced", "The last entry that has its place in the log.", volume...),
		acked:      gauge("volume_acknowledged", "The last entry that every required replica received.", volume...),
		committed:  gauge("volume_committed", "The last entry that is durable on every required replica.", volume...),
		ackDurable: gauge("volume_ack_durable", "Whether writes are acknowledged only when durable: the volume is down to one node, or was made so.", volume...),
		resynced:   counter("volume_resynced_bytes_total", "Payload sent to bring replicas back, since the attachment began.", volume...),
		refused:    counter("volume_writes_refused_total", "Writes refused since a disk had no room for what they would take, since the attachment began.", volume...),
		waiting:    gauge("volume_longest_wait_seconds", "How long the oldest thing this volume waits for has been waited for; see holdfast volume explain.", volume...),

		lag:          gauge("member_lag_bytes", "What a replica lacks of what the replay window holds; -1: it needs a copy.", member...),
		lagEntries:   gauge("member_lag_entries", "The entries a replica lacks.", member...),
		memberInSync: gauge("member_in_sync", "Whether a replica is in raft's in-sync set.", member...),
	}
}

// all lists every metric, for Describe.
func (m *metrics) all() []metric {
	return []metric{m.build, m.nodeGone, m.leader, m.leaderKnown, m.contact, m.appliedIndex,
		m.diskCapacity, m.diskUsed, m.diskReserved, m.walSize, m.walUsed, m.diskReclaimable, m.diskAllocated, m.diskFull, m.diskFailed, m.scrubRunning, m.scrubRead, m.scrubBad, m.scrubEnded, m.scrubs, m.blocksFound, m.blocksRepaired, m.blocksPoisoned,
		m.replicaTail, m.replicaDurable, m.replicaCommit, m.replicaApplied, m.replicaFailed, m.replicaIntact, m.replicaBad, m.replicaPoison, m.pingsDropped,
		m.memoryUsed, m.memoryLimit,
		m.resyncs, m.resyncsWaiting, m.resyncRate, m.resyncLimit, m.requestP99, m.requestBaseline,
		m.size, m.epoch, m.active, m.clients, m.inSync, m.wanted, m.window, m.requests, m.sequenced, m.acked, m.committed, m.ackDurable, m.resynced, m.refused, m.waiting,
		m.lag, m.lagEntries, m.memberInSync}
}

// collector reads the sources at every scrape.
type collector struct {
	*metrics
	s Sources
}

func (c *collector) Describe(out chan<- *prometheus.Desc) {
	for _, m := range c.all() {
		out <- m.desc
	}
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(out chan<- prometheus.Metric) {
	put := func(m metric, v float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(m.desc, m.kind, v, labels...)
	}
	put(c.build, 1, c.s.Version, c.s.Commit)
	put(c.leader, truth(c.s.Raft.IsLeader()))
	_, known := c.s.Raft.Leader()
	put(c.leaderKnown, truth(known))
	put(c.contact, c.s.Raft.LastContact().Seconds())
	view := c.s.View()
	put(c.appliedIndex, float64(view.Index()))
	for n := range view.Nodes() {
		if n.ID != c.s.Node {
			put(c.nodeGone, truth(c.s.Gone(n.ID)), n.Name)
		}
	}
	used, limit := c.s.Memory()
	put(c.memoryUsed, float64(used))
	put(c.memoryLimit, float64(limit))
	c.throttle(put, c.s.Throttle())
	for _, d := range c.s.Disks() {
		labels := []string{d.Stat.Disk.String(), d.Path, d.Pool}
		put(c.diskCapacity, float64(d.Stat.Capacity), labels...)
		put(c.diskUsed, float64(d.Stat.Used), labels...)
		put(c.diskReserved, float64(d.Stat.Reserved), labels...)
		put(c.walSize, float64(d.Stat.WALSize), labels...)
		put(c.walUsed, float64(d.Stat.WALUsed), labels...)
		put(c.diskReclaimable, float64(d.Stat.Reclaimable), labels...)
		put(c.diskAllocated, float64(d.Stat.Allocated), labels...)
		put(c.diskFull, d.Fill.Ratio, labels...)
		put(c.scrubRunning, truth(d.Scrub.Running), labels...)
		put(c.scrubRead, float64(d.Scrub.Read), labels...)
		put(c.scrubBad, float64(d.Scrub.Bad+d.Scrub.Lost), labels...)
		ended := 0.0
		if !d.Scrub.Ended.IsZero() {
			ended = float64(d.Scrub.Ended.Unix())
		}
		put(c.scrubEnded, ended, labels...)
		put(c.scrubs, float64(d.Scrub.Scrubs), labels...)
		put(c.diskFailed, truth(d.Stat.Failed != nil || d.Stat.MarkedFailed), labels...)
		put(c.blocksFound, float64(d.Stat.Repair.Found), labels...)
		put(c.blocksRepaired, float64(d.Stat.Repair.Repaired), labels...)
		put(c.blocksPoisoned, float64(d.Stat.Repair.Poisoned), labels...)
	}
	for _, r := range c.s.Replicas() {
		labels := []string{r.Log.Replica.String(), volumeName(view, r.Log.Segment.Volume), segment(r.Log.Segment.Index), r.Disk.String()}
		put(c.replicaTail, float64(r.Log.Tail), labels...)
		put(c.replicaDurable, float64(r.Log.Dur), labels...)
		put(c.replicaCommit, float64(r.Log.Commit), labels...)
		put(c.replicaApplied, float64(r.Log.Applied), labels...)
		put(c.replicaFailed, truth(r.Failed != nil), labels...)
		put(c.replicaIntact, truth(r.Core.Intact), labels...)
		put(c.pingsDropped, float64(r.PingsDropped), labels...)
		put(c.replicaBad, float64(r.Log.Bad), labels...)
		put(c.replicaPoison, float64(r.Log.Poison), labels...)
	}
	for _, h := range c.s.Held() {
		c.held(put, view, h)
	}
}

func (c *collector) throttle(put func(metric, float64, ...string), t attachment.ThrottleStatus) {
	put(c.resyncs, float64(t.Resyncs))
	put(c.resyncsWaiting, float64(t.Waiting))
	put(c.resyncRate, float64(t.Rate))
	put(c.resyncLimit, float64(t.Limit))
	for _, r := range t.Requests {
		put(c.requestP99, r.P99.Seconds(), r.Op)
		put(c.requestBaseline, r.Baseline.Seconds(), r.Op)
	}
}

func (c *collector) held(put func(metric, float64, ...string), view *state.View, h reconcile.HeldVolume) {
	name := volumeName(view, h.Volume)
	v, ok := view.Volume(h.Volume)
	if ok {
		put(c.size, float64(v.Size), name)
	}
	put(c.epoch, float64(h.Epoch), name)
	put(c.active, truth(h.Active), name)
	put(c.clients, float64(h.Clients), name)
	for i := range h.Status.Segments {
		seg := &h.Status.Segments[i]
		labels := []string{name, segment(seg.Segment.Index)}
		if ok {
			put(c.wanted, float64(v.Options.Replicas), labels...)
		}
		c.segment(put, view, seg, labels)
	}
}

func (c *collector) segment(put func(metric, float64, ...string), view *state.View, seg *attachment.SegmentStatus, labels []string) {
	st := &seg.State
	put(c.window, float64(seg.Window), labels...)
	put(c.requests, float64(seg.Requests), labels...)
	put(c.sequenced, float64(st.Tail), labels...)
	put(c.acked, float64(st.Acked), labels...)
	put(c.committed, float64(st.Commit), labels...)
	put(c.ackDurable, truth(st.Ack == holdfast.AckDurable), labels...)
	put(c.resynced, float64(seg.BytesResynced), labels...)
	put(c.refused, float64(st.Refused), labels...)
	var longest time.Duration
	for _, w := range seg.Waits {
		longest = max(longest, w.Time)
	}
	put(c.waiting, longest.Seconds(), labels...)
	inSync := 0
	seen := map[holdfast.NodeID]bool{}
	for i, m := range st.Members {
		if m.InSync {
			inSync++
		}
		if seen[m.Node] || i >= len(seg.Members) {
			continue // a second copy on one node, on its way out: one sample per node
		}
		seen[m.Node] = true
		c.member(put, view, m, seg.Members[i], labels)
	}
	put(c.inSync, float64(inSync), labels...)
}

func (c *collector) member(put func(metric, float64, ...string), view *state.View, m coordinator.MemberState, more attachment.MemberStatus, labels []string) {
	node := m.Node.String()
	if n, ok := view.Node(m.Node); ok {
		node = n.Name
	}
	labels = append(append([]string(nil), labels...), node)
	put(c.lag, float64(more.LagBytes), labels...)
	put(c.lagEntries, float64(more.LagOps), labels...)
	put(c.memberInSync, truth(m.InSync), labels...)
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

func segment(i uint32) string { return strconv.FormatUint(uint64(i), 10) }

func volumeName(view *state.View, id holdfast.VolumeID) string {
	if v, ok := view.Volume(id); ok {
		return v.Name
	}
	return id.String()
}
