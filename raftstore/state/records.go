package state

import (
	"maps"
	"slices"

	"github.com/holdfast-storage/holdfast"
)

// Limits of the tables. A command that would pass one is refused.
const (
	// MaxNameLength bounds names of nodes, volumes and pools (cli.md: 1 + 127).
	MaxNameLength = 128
	// MaxLabels bounds the labels of one node or volume: they are copied into every View.
	MaxLabels = 64
	// MaxTextLength bounds label values, mkfs and mount options, addresses, reasons.
	MaxTextLength = 4096
	// MaxReplicas bounds the replicas a user may ask for. The in-sync set is
	// held in one raft command and every member acks every write.
	MaxReplicas = 7
	// maxReplicaRecords bounds the replica records of a segment, with those
	// stale, syncing or being deleted.
	maxReplicaRecords = 32
	// MaxSegments bounds the segments of a volume: at the default segment size, 1 PiB.
	MaxSegments = 16 << 10
	// MaxHistory bounds a segment's epoch history; beyond it the replicas that
	// confirmed no kept epoch count as empty.
	MaxHistory = 1000
	// MinSegmentSize keeps small test volumes possible and segments whole regions.
	MinSegmentSize = holdfast.RegionSize
)

// Label is one key and value that a user put on a node or a volume.
type Label struct{ Key, Value string }

// Labels are sorted by key; each key stands once.
type Labels []Label

// LabelsOf sorts a map into Labels.
func LabelsOf(m map[string]string) Labels {
	if len(m) == 0 {
		return nil
	}
	l := make(Labels, 0, len(m))
	for _, k := range slices.Sorted(maps.Keys(m)) {
		l = append(l, Label{k, m[k]})
	}
	return l
}

// Get returns the value of a key, "" if it is not set.
func (l Labels) Get(key string) string {
	for _, e := range l {
		if e.Key == key {
			return e.Value
		}
	}
	return ""
}

// Map returns a fresh map of the labels.
func (l Labels) Map() map[string]string {
	m := make(map[string]string, len(l))
	for _, e := range l {
		m[e.Key] = e.Value
	}
	return m
}

// Cluster is the cluster's own record.
type Cluster struct {
	ID    holdfast.ClusterID
	Level holdfast.ClusterLevel // the version at which everything shared is written
}

// MemberKind is the part a node has in raft.
type MemberKind string

// The member kinds.
const (
	MemberWatcher  MemberKind = "watcher"   // no raft member; follows a watch
	MemberNonVoter MemberKind = "non-voter" // receives the log, does not vote
	MemberVoter    MemberKind = "voter"
)

// NodeDuty says what the cluster may expect of a node, by its operator's word.
type NodeDuty string

// The duties.
const (
	DutyServing     NodeDuty = "serving"
	DutyMaintenance NodeDuty = "maintenance" // it will be back: nothing is moved away from it, nothing new placed on it
	DutyDraining    NodeDuty = "draining"    // its replicas are moved to other nodes
)

// Addresses are HOST:PORT strings that other nodes dial; names are resolved at
// every dial.
type Addresses struct {
	API  string // users and node-to-node gRPC (--address)
	Data string // replication (--data-address)
	Raft string // raft (--raft-address)
}

// Node is one node. Removed nodes stay in the table for ever, so that their ids
// are never taken again.
type Node struct {
	ID        holdfast.NodeID
	Name      string
	Addresses Addresses
	Instance  holdfast.InstanceID // nonce of the process that last announced itself
	Labels    Labels              // zone and rack are the failure domains of placement
	HasDisks  bool                // false: a witness or a client (--disk none)
	Version   string              // of the binary
	MaxLevel  holdfast.ClusterLevel
	Kind      MemberKind
	Duty      NodeDuty
	Revision  uint64 // counts changes; NodeUpdate compares it
	Removed   bool
}

// Disk is one pooled disk. Removed disks stay in the table for ever, so that their
// ids are never taken again.
type Disk struct {
	ID        holdfast.DiskID
	Node      holdfast.NodeID
	Instance  holdfast.InstanceID // the process that opened it last
	OpenCount holdfast.OpenCount
	State     holdfast.DiskState
	Reason    string // why it failed; "" when it did not
	Pool      string
	// Size and Free are bytes, as of the last DiskOpen or DiskUpdate. Of an image Free
	// is no more than its file system has left, and Size is what is used and Free.
	Size, Free int64
	Leaving    bool // its replicas are moved to other disks, and nothing is placed on it
	Removed    bool
}

// Usable says whether replicas may be placed on a disk, as far as the disk decides.
func (d *Disk) Usable() bool { return d.State == holdfast.DiskOK && !d.Leaving && !d.Removed }

// VolumeOptions are what the user asked for at creation. Zero values mean what
// the root option parser made of them; the tables only bound them.
type VolumeOptions struct {
	Replicas     int    // copies of each segment
	FS           string // file system to make, "" for none
	Mkfs         string // extra mkfs arguments
	MountOptions string
	SegmentSize  int64 // bytes, whole regions
	AckMode      holdfast.AckMode
	MinCopies    int // in-sync copies below which writes are held
	// FailHeldAfter is after how many seconds requests that are held fail; 0 never.
	FailHeldAfter int64
	PingsOnly     bool   // no read is answered by a promise (read_promises=off)
	Pool          string // "" for any
}

// Phase says whether a volume has a writer.
type Phase string

// The phases: detached -> attaching (AttachBegin) -> attached (every segment
// activated in the epoch) -> detached (Detach). AttachBegin by takeover leads
// from attaching and attached to attaching again, in a new epoch. A volume under
// repair stays detached.
const (
	PhaseDetached  Phase = "detached"
	PhaseAttaching Phase = "attaching"
	PhaseAttached  Phase = "attached"
)

// Holder is the process that has, or had, the right to write.
type Holder struct {
	Node     holdfast.NodeID
	Instance holdfast.InstanceID
}

// Volume is one volume. A deleted one stays for ever as a tombstone; its
// segments go when every replica is confirmed gone.
type Volume struct {
	ID             holdfast.VolumeID
	Name           string
	Size           int64 // bytes
	Options        VolumeOptions
	Labels         Labels
	LabelsRevision uint64 // counts SetLabels
	Created        int64  // Unix seconds, by the proposer's clock; for people only
	Epoch          holdfast.Epoch
	Phase          Phase
	Holder         Holder             // zero when detached
	Since          int64              // Unix seconds of the last AttachBegin or Detach; for people only
	Session        holdfast.SessionID // what clients may continue; zero when detached
	Offered        holdfast.SessionID // becomes Session if an activation of this epoch is lossy
	Lineage        holdfast.LineageID
	Format         holdfast.FormatState
	Deleted        bool
	Repair         Repair // only while detached
	Segments       []Segment
}

// Segment is one segment of a volume.
type Segment struct {
	Size          int64               // bytes; the last of a volume may be shorter than the others
	ISRVersion    holdfast.ISRVersion // counts changes of the in-sync set
	LayoutVersion uint64              // counts AddReplica and RemoveReplica
	Replicas      []Replica           // in the order they were added
	History       []EpochStart        // activated epochs, oldest first
	LastCommit    holdfast.Seq        // highest commit raft was told of
	End           holdfast.Seq        // S_end of the last clean detach
	Clean         bool                // nothing was written since End: tails >= End attach continuous
	// Salvaged: an operator chose the one in-sync replica; the next activation
	// starts wherever that ends, forced and lossy.
	Salvaged bool
}

// Replica is one copy of a segment.
type Replica struct {
	ID         holdfast.ReplicaID
	Disk       holdfast.DiskID
	Role       holdfast.ReplicaRole
	SinceEpoch holdfast.Epoch // epoch in which the role was given
	// Opened is the newest epoch whose OPEN this replica is known to have
	// confirmed, or in which it was added empty.
	Opened holdfast.Epoch
	// Lineage is the volume's as the replica was made: its disk answers to it.
	Lineage holdfast.LineageID
	// Leaving: it is to go. While it is in sync, its writer takes it out.
	Leaving bool
}

// EpochStart is one activated epoch of a segment.
type EpochStart struct {
	Epoch holdfast.Epoch
	Start holdfast.Seq // S: the epoch's first entry is Start+1
	Flags EpochFlags
}

// EpochFlags say how an epoch was activated.
type EpochFlags uint8

// The flags of an activation. An activation that is not continuous is lossy.
const (
	FlagContinuous EpochFlags = 1 << iota // no acknowledged write is missing
	FlagLossy                             // sessions before it are void
	FlagForced                            // the first of a salvaged segment: an operator accepted the loss

	allFlags = FlagContinuous | FlagLossy | FlagForced
)

// ISR returns the ids of the in-sync replicas, in the order they were added.
func (s *Segment) ISR() []holdfast.ReplicaID {
	var ids []holdfast.ReplicaID
	for _, r := range s.Replicas {
		if r.Role == holdfast.RoleInSync {
			ids = append(ids, r.ID)
		}
	}
	return ids
}

// Replica returns the record of a replica, nil if the segment has none of that id.
func (s *Segment) Replica(id holdfast.ReplicaID) *Replica {
	for i := range s.Replicas {
		if s.Replicas[i].ID == id {
			return &s.Replicas[i]
		}
	}
	return nil
}

// Last returns the last activated epoch, zero if there was none.
func (s *Segment) Last() EpochStart {
	if len(s.History) == 0 {
		return EpochStart{}
	}
	return s.History[len(s.History)-1]
}

// Floor is the seq below which no activation may start unless forced: the
// highest of the last S, the clean end and the last known commit. Nothing binds
// a segment that was salvaged.
func (s *Segment) Floor() holdfast.Seq {
	if s.Salvaged {
		return 0
	}
	return max(s.Last().Start, s.End, s.LastCommit)
}

// CountsAsEmpty reports whether the history no longer reaches back to the last
// epoch the replica opened: its tail can then not be cut, and it must be filled
// as if it held nothing.
func (s *Segment) CountsAsEmpty(r Replica) bool {
	return len(s.History) > 0 && r.Opened < s.History[0].Epoch
}

// EffectiveTail cuts a tail whose last entry is of epoch last at the lowest start
// of the activated epochs after it (A3): the first of them, but for a forced one.
func (s *Segment) EffectiveTail(tail holdfast.Seq, last holdfast.Epoch) holdfast.Seq {
	for _, h := range s.History {
		if h.Epoch > last {
			tail = min(tail, h.Start)
		}
	}
	return tail
}

// State is what a user is told of the volume as far as the tables know:
// whether the holder can serve it now is not among them.
func (v *Volume) State() holdfast.VolumeState {
	if len(v.Segments) == 0 {
		return holdfast.VolumePending
	}
	if v.Phase != PhaseAttached {
		return holdfast.VolumeDetached
	}
	for i := range v.Segments {
		if len(v.Segments[i].ISR()) < v.Options.Replicas {
			return holdfast.VolumeDegraded
		}
	}
	return holdfast.VolumeAttached
}

// Allocated is the sum of the volume's segment sizes, in bytes, once.
func (v *Volume) Allocated() int64 {
	var n int64
	for i := range v.Segments {
		n += v.Segments[i].Size
	}
	return n
}

// clone returns a copy whose segments, replicas and histories may be changed.
func (v *Volume) clone() *Volume {
	c := *v
	c.Segments = slices.Clone(v.Segments)
	for i := range c.Segments {
		c.Segments[i].Replicas = slices.Clone(c.Segments[i].Replicas)
		c.Segments[i].History = slices.Clone(c.Segments[i].History)
	}
	return &c
}
