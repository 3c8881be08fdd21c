package holdfast

// Epoch is the number raft issues at each attach; it names the one writer.
// Zero is before the first attach. Not to be confused with a raft term.
type Epoch uint64

// Seq numbers the mutations of one segment, from 1, without gaps. Zero is
// before the first.
type Seq uint64

// ISRVersion counts the changes of a segment's in-sync set within raft.
type ISRVersion uint64

// OpenCount counts how often a disk was opened; a disk that comes back with a
// count that raft has already seen was rolled back or cloned.
type OpenCount uint64

// ClusterLevel is the version at which commands, snapshots, wire messages and
// disk records are written; it rises once every member supports the next.
type ClusterLevel uint32

// Level1 is the first and, so far, only cluster level.
const Level1 ClusterLevel = 1

// Sizes of the data path, in bytes.
const (
	// BlockSize is the unit of checksums and of replication.
	BlockSize = 4 << 10
	// ChunkSize is the unit of allocation and resync.
	ChunkSize = 64 << 10
	// RegionSize is the unit in which a replica remembers what changed.
	RegionSize = 1 << 20
	// MaxOpSize bounds one operation; larger requests are split.
	MaxOpSize = 1 << 20
	// LogicalBlockSize is what a volume shows as its logical block.
	LogicalBlockSize = 512
	// DefaultSegmentSize is the size of a volume's segments; the last may be shorter.
	DefaultSegmentSize = 64 << 30
	// BlocksPerChunk is the number of blocks, and so of checksums, in a chunk.
	BlocksPerChunk = ChunkSize / BlockSize
)
