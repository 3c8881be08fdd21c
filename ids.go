package holdfast

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
)

// ID is a random UUID (RFC 9562, version 4). The kind parameter keeps ids of
// different things from being mixed up; it has no content at run time. IDs are
// comparable, are written in the 36-character text form, and are never reused.
type ID[kind any] [16]byte

type (
	clusterKind  struct{}
	nodeKind     struct{}
	diskKind     struct{}
	volumeKind   struct{}
	replicaKind  struct{}
	instanceKind struct{}
	sessionKind  struct{}
	lineageKind  struct{}
)

type (
	// ClusterID names one cluster for ever; it stands in every superblock.
	ClusterID = ID[clusterKind]
	// NodeID names one node's store. A node that lost its store joins as a new node.
	NodeID = ID[nodeKind]
	// DiskID names one pooled disk (a raw device or an image file).
	DiskID = ID[diskKind]
	// VolumeID names one volume; its name may change, this may not.
	VolumeID = ID[volumeKind]
	// ReplicaID names one copy of one segment on one disk.
	ReplicaID = ID[replicaKind]
	// InstanceID is the nonce of one run of the daemon process.
	InstanceID = ID[instanceKind]
	// SessionID is the nonce of one attachment session as its clients see it:
	// it survives continuous activations and ends with a lossy one.
	SessionID = ID[sessionKind]
	// LineageID names one unbroken history of a volume; salvage starts a new one.
	LineageID = ID[lineageKind]
)

// NewID returns a fresh random id of the wanted type: NewID[NodeID](). It never
// fails: crypto/rand ends the process when the system has no randomness.
func NewID[T ~[16]byte]() T {
	var id [16]byte
	rand.Read(id[:]) //nolint:errcheck // never returns an error (crypto/rand, since Go 1.24)
	id[6] = id[6]&0x0f | 0x40
	id[8] = id[8]&0x3f | 0x80
	return T(id)
}

// ParseID reads the 36-character text form: ParseID[NodeID](text).
func ParseID[T ~[16]byte](text string) (T, error) {
	var id ID[struct{}]
	err := id.UnmarshalText([]byte(text))
	return T(id), err
}

// IsZero reports whether the id was never set.
func (id ID[kind]) IsZero() bool { return id == ID[kind]{} }

// String returns the 36-character text form.
func (id ID[kind]) String() string {
	var b [36]byte
	hex.Encode(b[0:8], id[0:4])
	b[8] = '-'
	hex.Encode(b[9:13], id[4:6])
	b[13] = '-'
	hex.Encode(b[14:18], id[6:8])
	b[18] = '-'
	hex.Encode(b[19:23], id[8:10])
	b[23] = '-'
	hex.Encode(b[24:36], id[10:16])
	return string(b[:])
}

// MarshalText writes the 36-character text form.
func (id ID[kind]) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText reads the 36-character text form; anything else is an
// ErrInvalid that names the value, and leaves the id as it was.
func (id *ID[kind]) UnmarshalText(text []byte) error {
	bad := func() error {
		return Errorf(ErrInvalid, "%q is not an id", text).WithRemedy("ids look like 1b4e28ba-2fa1-41d2-883f-0016d3cca427")
	}
	if len(text) != 36 {
		return bad()
	}
	compact := make([]byte, 0, 32)
	for i, c := range text {
		switch i {
		case 8, 13, 18, 23:
			if c != '-' {
				return bad()
			}
		default:
			compact = append(compact, c)
		}
	}
	var v ID[kind]
	if _, err := hex.Decode(v[:], compact); err != nil {
		return bad()
	}
	*id = v
	return nil
}

// SegmentID names one segment of a volume: the unit of placement and
// replication. A volume has one segment up to its segment size, more above it.
type SegmentID struct {
	Volume VolumeID
	Index  uint32
}

// String returns VOLUME/INDEX.
func (s SegmentID) String() string { return fmt.Sprintf("%v/%d", s.Volume, s.Index) }
