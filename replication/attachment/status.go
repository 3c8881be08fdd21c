package attachment

import (
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/replication/coordinator"
)

// Status is what an attachment says of itself, for `volume explain`.
type Status struct {
	Volume   holdfast.VolumeID
	Epoch    holdfast.Epoch
	Session  holdfast.SessionID
	Active   bool  // every segment serves
	Ended    error // why the session is over; nil while it is not
	Segments []SegmentStatus
}

// SegmentStatus is one segment of it.
type SegmentStatus struct {
	Segment holdfast.SegmentID
	State   coordinator.State
	Waits   []Wait // what it waits for now
	// Window is the replay window: bytes of payload kept for members that may
	// have to be sent them again.
	Window   int64
	Requests int // taken and not yet answered
	// BytesResynced is the payload sent to bring members back, since the
	// attachment began: entries sent again, or handed on from another member's
	// log, and chunks.
	BytesResynced int64
	Members       []MemberStatus
}

// Wait is one thing a segment waits for.
type Wait struct {
	For  string
	Time time.Duration // how long already
}

// MemberStatus adds to coordinator.MemberState what the edge knows; in the
// same order.
type MemberStatus struct {
	Replica   holdfast.ReplicaID
	Remote    string // who is connected; empty if nobody is
	LastError string // of the last try to connect
	LagOps    int64  // entries it lacks
	LagBytes  int64  // of them, as far as the window holds them; -1 if it needs a copy
	Resync    ResyncState
	// ResyncRate is what the resync sent in the last second or less, in bytes a
	// second.
	ResyncRate int64
}

// ResyncState is how a copy of log or chunks to a member stands.
type ResyncState string

const (
	ResyncNone    ResyncState = ""
	ResyncWaiting ResyncState = "waiting" // for two others on the disk to end
	ResyncRunning ResyncState = "running"
)
