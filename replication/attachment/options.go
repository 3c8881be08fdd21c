package attachment

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/replication/coordinator"
	"github.com/holdfast-storage/holdfast/replication/serve"
)

// ErrConflict is what Meta returns when the command was compared with another
// isr version than it named.
var ErrConflict = errors.New("the in-sync set has another version")

// Meta is raft as the writer sees it. Every command is compare-and-set on
// (epoch, isr version) and idempotent: one that was applied before with the
// same arguments answers as if applied now.
//
// Errors: ErrFenced when raft knows a higher epoch; ErrConflict for another isr
// version; ErrRefused for what the state machine refuses for good; anything
// else means that the outcome is not known, and the same command is asked
// again. All methods may be called concurrently.
type Meta interface {
	// Activate records the start of the epoch. It returns the new isr version.
	Activate(ctx context.Context, seg holdfast.SegmentID, epoch holdfast.Epoch, isr holdfast.ISRVersion,
		start holdfast.Seq, members []holdfast.ReplicaID, continuous bool) (holdfast.ISRVersion, error)
	// ShrinkISR removes a replica from the in-sync set.
	ShrinkISR(ctx context.Context, seg holdfast.SegmentID, epoch holdfast.Epoch, isr holdfast.ISRVersion,
		replica holdfast.ReplicaID, commit holdfast.Seq) (holdfast.ISRVersion, error)
	// GrowISR adds one.
	GrowISR(ctx context.Context, seg holdfast.SegmentID, epoch holdfast.Epoch, isr holdfast.ISRVersion,
		replica holdfast.ReplicaID, commit holdfast.Seq) (holdfast.ISRVersion, error)
	// StartSync records that chunks are about to be copied over what a replica holds:
	// from then on it holds no one state of the volume. Again is no harm.
	StartSync(ctx context.Context, seg holdfast.SegmentID, epoch holdfast.Epoch, replica holdfast.ReplicaID) error
	// Segment returns the segment's record by a linearizable read.
	Segment(ctx context.Context, seg holdfast.SegmentID) (Record, error)
	// Detach records the clean end of the epoch on all segments of a volume.
	Detach(ctx context.Context, volume holdfast.VolumeID, epoch holdfast.Epoch, ends []SegmentEnd) error
}

// Record is what raft holds of a segment.
type Record struct {
	Epoch      holdfast.Epoch
	Activated  bool // Activate of Epoch was applied
	ISRVersion holdfast.ISRVersion
	ISR        []holdfast.ReplicaID
}

// SegmentEnd says where a cleanly detached segment ends: every in-sync replica
// holds exactly this, durably.
type SegmentEnd struct {
	Segment    holdfast.SegmentID
	ISRVersion holdfast.ISRVersion
	End        holdfast.Seq
	Commit     holdfast.Seq
}

// Segment is one segment as the applied result of AttachBegin describes it.
type Segment struct {
	ISRVersion holdfast.ISRVersion
	Replicas   []coordinator.Replica // in raft's order; role in-sync makes the in-sync set
	History    []coordinator.Start   // activated epochs, ascending
	// HistoryPruned: entries older than the first were dropped.
	HistoryPruned bool
	// Floor is the highest of the last activated S, S_end and lastCommit.
	Floor holdfast.Seq
	// End is the seq of the clean detach; only with Options.Detached.
	End holdfast.Seq
	// Salvaged: see coordinator.Options.
	Salvaged bool
}

// Policy says what writes do when copies or raft are missing; see the fields of
// the same names of coordinator.Options.
type Policy struct {
	Copies        int // replicas the volume is to have
	MinCopies     int
	FailHeldAfter time.Duration
}

// Options are what an attachment starts from.
type Options struct {
	Cluster  holdfast.ClusterID
	Node     holdfast.NodeID     // this node
	Instance holdfast.InstanceID // this process
	Level    holdfast.ClusterLevel

	Volume      holdfast.VolumeID
	Size        int64 // bytes, a multiple of holdfast.BlockSize
	SegmentSize int64 // bytes; zero: holdfast.DefaultSegmentSize
	Ack         holdfast.AckMode
	Policy      Policy
	// PingsOnly (read_promises=off): see coordinator.Options.
	PingsOnly bool

	Epoch      holdfast.Epoch // the one AttachBegin issued
	Session    holdfast.SessionID
	Detached   bool // the volume was cleanly detached before
	AcceptLoss bool // the operator allows a lossy start at once
	Segments   []Segment

	Meta Meta
	// Dial connects to the data address of another node. The attachment says
	// HELLO and closes the connection. It should try once and return.
	Dial func(ctx context.Context, node holdfast.NodeID) (net.Conn, error)
	// Gone says whether a node is gone now. Nil: none is.
	Gone func(node holdfast.NodeID) bool
	// Local serves this node's own replicas in process. Nil: it has none.
	Local *serve.Server
	// Memory bounds the replay windows of all attachments of this node. Nil:
	// an own bound of DefaultMemory.
	Memory *Memory
	// Throttle bounds the resyncs of all attachments of this node. Nil: an own one.
	Throttle *Throttle
	// Disk says where a replica lies, zero if that is not known. It may be called
	// concurrently. Nil: none is known, and resyncs are not bounded per disk.
	Disk func(replica holdfast.ReplicaID) holdfast.DiskID
	// Limits are the coordinator's times and sizes; zero fields take the default.
	Limits coordinator.Limits
	Logger *slog.Logger // nil discards
}

func (o *Options) validate() error {
	segments := segmentCount(o.Size, o.SegmentSize)
	switch {
	case o.Size <= 0 || o.Size%holdfast.BlockSize != 0:
		return holdfast.Errorf(holdfast.ErrInvalid, "attach volume %v: size %d is not a number of blocks", o.Volume, o.Size)
	case o.SegmentSize%holdfast.ChunkSize != 0 || o.SegmentSize < 0:
		return holdfast.Errorf(holdfast.ErrInvalid, "attach volume %v: segment size %d is not a number of chunks", o.Volume, o.SegmentSize)
	case len(o.Segments) != segments:
		return holdfast.Errorf(holdfast.ErrInvalid, "attach volume %v: %d segments are described, its size makes %d", o.Volume, len(o.Segments), segments)
	case o.Epoch == 0:
		return holdfast.Errorf(holdfast.ErrInvalid, "attach volume %v: no epoch", o.Volume)
	case o.Meta == nil || o.Dial == nil:
		return holdfast.Errorf(holdfast.ErrInvalid, "attach volume %v: Meta and Dial are needed", o.Volume)
	}
	return nil
}

func segmentCount(size, segment int64) int {
	if segment <= 0 {
		segment = holdfast.DefaultSegmentSize
	}
	return int((size + segment - 1) / segment)
}
