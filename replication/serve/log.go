package serve

import (
	"context"
	"sync"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/disk"
	"github.com/holdfast-storage/holdfast/replication/replica"
	"github.com/holdfast-storage/holdfast/replication/wire"
)

// replicaLog is what a served replica needs of its disk; diskLog is one.
type replicaLog interface {
	Append(entries []disk.Entry) error
	Sync(ctx context.Context) (holdfast.Seq, error)
	Fence(epoch holdfast.Epoch) error
	Truncate(to holdfast.Seq) error
	SetCommit(seq holdfast.Seq)
	Apply(ctx context.Context, to holdfast.Seq) (holdfast.Seq, error)
	ReadAt(p []byte, off int64) error
	Status() disk.Status
	DeclareIntact(epoch holdfast.Epoch) error
	SetHint(epoch holdfast.Epoch, v holdfast.ISRVersion) error
	Entries(from holdfast.Seq, maxBytes int) ([]disk.Entry, error)
	// Rebase drops the log, once the chunks hold what of it they may, up to held.
	Rebase(ctx context.Context, epoch holdfast.Epoch, seq holdfast.Seq) (held holdfast.Seq, err error)
	// Syncing: a Rebase dropped the log, and MarkWhole did not follow yet.
	Syncing() bool
	// MarkWhole durably ends what Rebase began, after everything installed and
	// appended before.
	MarkWhole() error
	Chunks(seq holdfast.Seq, after int64, max int) ([]disk.ChunkRef, error)
	ReadChunk(index int64) (disk.Chunk, error)
	InstallChunk(c disk.Chunk) error
	// Space promised to entries to come, in chunks.
	Credit() int64
	Ahead(want int64) error
	Afford(off, length, pending int64) (disk.Affordable, error)
	Reserve(want int64) (granted int64, err error)
	// Repair replaces what is bad of a chunk; Bad names chunks that have bad
	// blocks, each again after a while.
	Repair(c disk.Chunk) error
	Bad(max int, now, every time.Duration) []int64
}

// coreStatus is what the core is told of the log at its start.
func coreStatus(log replicaLog) replica.Status {
	st := log.Status()
	out := replica.Status{
		Fence: st.Fence, Tail: st.Tail, Dur: st.Dur, Commit: min(st.Commit, st.Tail),
		Applied: st.Applied, Checkpoint: st.Checkpoint, Intact: st.Intact, Syncing: log.Syncing(),
		Damaged: st.Damaged != nil, Lost: st.BadEntry, HintEpoch: st.HintEpoch, HintISR: st.HintISR,
	}
	for _, e := range st.EpochTails {
		out.EpochStarts = append(out.EpochStarts, replica.EpochStart{Epoch: e.Epoch, First: e.First})
		out.TailEpoch = e.Epoch
	}
	return out
}

// fencedMessage is what a writer is told.
func fencedMessage(st replica.Status, opens holdfast.OpenCount, logSize int64) *wire.Fenced {
	m := &wire.Fenced{
		Tail: st.Tail, TailEpoch: st.TailEpoch, Durable: st.Dur, Commit: st.Commit, Applied: st.Applied, Checkpoint: st.Checkpoint,
		Held: st.Held, Intact: st.Intact, Syncing: st.Syncing, Damaged: st.Damaged, Lost: st.Lost, OpenCount: opens,
		HintEpoch: st.HintEpoch, HintISR: st.HintISR, LogSize: logSize,
	}
	starts := st.EpochStarts
	starts = starts[max(0, len(starts)-wire.MaxEpochTails):]
	for _, e := range starts {
		m.Epochs = append(m.Epochs, wire.EpochStart{Epoch: e.Epoch, First: e.First})
	}
	return m
}

// toDisk turns wire entries into the disk's; the payload stays where it is.
func toDisk(es []wire.Entry, commit holdfast.Seq, size int64) ([]disk.Entry, error) {
	out := make([]disk.Entry, len(es))
	for i := range es {
		e := &es[i]
		if e.Offset+e.Length > size {
			return nil, holdfast.Errorf(holdfast.ErrInvalid, "entry %d reaches to %d of a segment of %d bytes", e.Seq, e.Offset+e.Length, size)
		}
		out[i] = disk.Entry{Epoch: e.Epoch, Seq: e.Seq, Commit: commit, Offset: e.Offset, Length: e.Length, CRC: e.Sums, Payload: e.Data}
		switch e.Kind {
		case wire.KindWrite:
			out[i].Type = disk.OpWrite
		case wire.KindZero:
			out[i].Type = disk.OpZero
		case wire.KindTrim:
			out[i].Type = disk.OpTrim
		default:
			return nil, holdfast.Errorf(holdfast.ErrInvalid, "entry %d is of kind %d", e.Seq, e.Kind)
		}
	}
	return out, nil
}

// toWire turns logged entries up to seq to into a message that fits a frame.
func toWire(es []disk.Entry, to holdfast.Seq) *wire.Entries {
	m := &wire.Entries{}
	bytes := 0
	for _, e := range es {
		if e.Seq > to || len(m.Entries) == wire.MaxEntries || bytes+len(e.Payload) > wire.MaxPayload {
			break
		}
		bytes += len(e.Payload)
		out := wire.Entry{Epoch: e.Epoch, Seq: e.Seq, Offset: e.Offset, Length: e.Length, Sums: e.CRC, Data: e.Payload}
		switch e.Type {
		case disk.OpWrite:
			out.Kind = wire.KindWrite
		case disk.OpZero:
			out.Kind = wire.KindZero
		case disk.OpTrim:
			out.Kind = wire.KindTrim
		}
		m.Entries = append(m.Entries, out)
	}
	return m
}

// chunkToWire copies the blocks that hold data.
func chunkToWire(c disk.Chunk) *wire.Chunk {
	m := &wire.Chunk{ChunkContent: wire.ChunkContent{Index: c.Index, LastSeq: c.LastSeq, AsOf: c.AsOf}}
	n := 0
	for _, s := range c.State {
		if s == disk.BlockData {
			n++
		}
	}
	var data []byte
	if n > 0 {
		b := wire.NewBuffer(n * holdfast.BlockSize)
		m.Hold(b)
		data = b.Bytes()
	}
	m.Data = data
	for i, s := range c.State {
		m.States[i] = wire.BlockState(s) // the same numbers
		if s == disk.BlockBad {
			m.Sums[i] = c.CRC[i]
		}
		if s == disk.BlockData {
			m.Sums[i] = c.CRC[i]
			copy(data, c.Data[i*holdfast.BlockSize:(i+1)*holdfast.BlockSize])
			data = data[holdfast.BlockSize:]
		}
	}
	return m
}

// chunkToDisk lays the blocks that hold data where they belong. It compares
// every block with its sum: what a copy installs was right when it arrived.
func chunkToDisk(m *wire.ChunkContent, size int64) (disk.Chunk, error) {
	c := disk.Chunk{Index: m.Index, LastSeq: m.LastSeq, AsOf: m.AsOf}
	if m.Index > (size-1)/holdfast.ChunkSize {
		return c, holdfast.Errorf(holdfast.ErrInvalid, "chunk %d of a segment of %d bytes", m.Index, size)
	}
	data := m.Data
	for i, s := range m.States {
		c.State[i] = disk.BlockState(s)
		if s != wire.BlockData {
			continue
		}
		if err := wire.Verify(data[:holdfast.BlockSize], m.Sums[i:i+1]); err != nil {
			return c, holdfast.Errorf(holdfast.ErrIntegrity, "chunk %d, block %d: %w", m.Index, i, err)
		}
		if c.Data == nil {
			c.Data = make([]byte, holdfast.ChunkSize)
		}
		c.CRC[i] = m.Sums[i]
		copy(c.Data[i*holdfast.BlockSize:], data[:holdfast.BlockSize])
		data = data[holdfast.BlockSize:]
	}
	return c, nil
}

// diskLog is a replica of a disk with a mark that it is being filled. The disk
// keeps one number for us that only rises, the role hint; the mark stands in
// its lower bits, so that it is as durable as the records around it:
//
//	63          16 15        1   0
//	+-------------+-----------+---+
//	| isr version |  changes  | s |   s: being filled
//	+-------------+-----------+---+
//
// changes counts how often s changed under one (epoch, isr version).
type diskLog struct {
	*disk.Replica

	mu    sync.Mutex // orders changes of the hint
	epoch holdfast.Epoch
	hint  uint64
}

const hintBits = 16

func newDiskLog(r *disk.Replica) *diskLog {
	st := r.Status()
	return &diskLog{Replica: r, epoch: st.HintEpoch, hint: uint64(st.HintISR)}
}

// Status is the disk's, with the hint as it was given.
func (l *diskLog) Status() disk.Status {
	st := l.Replica.Status()
	st.HintISR >>= hintBits
	return st
}

func (l *diskLog) Syncing() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.hint&1 != 0
}

// SetHint keeps the mark.
func (l *diskLog) SetHint(epoch holdfast.Epoch, v holdfast.ISRVersion) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if epoch < l.epoch || epoch == l.epoch && uint64(v) <= l.hint>>hintBits {
		return nil
	}
	return l.set(epoch, uint64(v)<<hintBits|l.hint&1)
}

// mark sets or clears the mark.
func (l *diskLog) mark(filling bool) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if filling == (l.hint&1 != 0) {
		return nil
	}
	if l.hint>>1&(1<<(hintBits-1)-1) == 1<<(hintBits-1)-1 {
		return holdfast.Errorf(holdfast.ErrUnavailable, "the copy was begun anew %d times without a change of the in-sync set", 1<<(hintBits-2))
	}
	return l.set(l.epoch, l.hint&^1+2|(l.hint&1^1))
}

func (l *diskLog) set(epoch holdfast.Epoch, hint uint64) error {
	if err := l.Replica.SetHint(epoch, holdfast.ISRVersion(hint)); err != nil {
		return err
	}
	l.epoch, l.hint = epoch, hint
	return nil
}

// Rebase applies first what it may of a log that the chunks follow without a gap:
// after a restart they are those of the last checkpoint, and what is dropped
// unapplied has to be copied. Then it marks: that record is durable before the log
// is gone.
func (l *diskLog) Rebase(ctx context.Context, epoch holdfast.Epoch, seq holdfast.Seq) (held holdfast.Seq, err error) {
	if !l.Syncing() {
		// An error costs no more than a larger copy; a disk that failed says so below.
		_, _ = l.Apply(ctx, ^holdfast.Seq(0))
	}
	held = l.Status().Applied
	if err := l.mark(true); err != nil {
		return 0, err
	}
	return held, l.Replica.Rebase(epoch, seq)
}

// MarkWhole clears the mark once everything before is durable.
func (l *diskLog) MarkWhole() error {
	if _, err := l.Sync(context.Background()); err != nil {
		return err
	}
	if err := l.mark(false); err != nil {
		return err
	}
	_, err := l.Sync(context.Background())
	return err
}
