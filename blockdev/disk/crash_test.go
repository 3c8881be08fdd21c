package disk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// The model: the disk's operations are one sequence, in the order of their
// records in the log. After a crash the disk must be, as a whole, in the state
// after some first part of that sequence, which holds at least everything that
// was durable; after the death of the process alone, everything received.

const (
	modelBlocks   = 48 + 5 // of each replica: three chunks and a bit
	modelReplicas = 3
	// modelFirst is the first of these chunks: two are in the last leaf below one
	// interior page, two in the first below the next.
	modelFirst = nodeEntries*leafEntries - 2
	modelBase  = modelFirst * chunkSize
	modelSize  = modelBase + modelBlocks*blockSize
)

// modelBlock is one block's content and the entry that put it there.
type modelBlock struct {
	id  uint64 // 0: zeroes
	seq holdfast.Seq
}

type modelContent [modelBlocks]modelBlock

// modelReplica is never changed once it is in a state.
type modelReplica struct {
	exists  bool
	fence   holdfast.Epoch
	base    holdfast.Seq // hist[0] is the content as of this entry
	hist    []*modelContent
	log     []modelEntry // log[i] is entry base+1+i
	hint    holdfast.ISRVersion
	intact  bool
	created byte // each life of a replica has another id
}

type modelEntry struct {
	epoch    holdfast.Epoch
	typ      OpType
	off, len int64
	id       uint64
}

func (m *modelReplica) tail() holdfast.Seq { return m.base + holdfast.Seq(len(m.log)) }

func (m modelReplica) with(change func(*modelReplica)) *modelReplica {
	m.hist, m.log = slices.Clone(m.hist), slices.Clone(m.log)
	change(&m)
	return &m
}

type modelState [modelReplicas]*modelReplica

// world is a disk, its model and the crashes to be looked at.
type world struct {
	t        *testing.T
	rng      *rand.Rand
	fs       *vfs.Memory
	opts     Options
	d        *Disk
	states   []modelState                // after each record
	durable  int                         // the state that cannot be lost any more
	done     int                         // the last state whose operation has returned
	commits  [modelReplicas]holdfast.Seq // told to the present replicas
	nextID   uint64
	life     byte
	looked   int      // crashes
	lossy    int      // of them, those that lost or tore a page
	nested   int      // of them, those of a recovery
	fresh    int      // entries whose chunks were written before their record
	placed   int      // installs of which the same holds
	released int      // maps that a crash left to be released
	trace    []string // the last operations
	device   bool
	beside   func()   // done once while fresh chunks are written
	besides  struct { // what the states say already of it, while it is still to come
		replica int
		hint    holdfast.ISRVersion
	}
}

func (w *world) now() modelState { return w.states[len(w.states)-1] }

// expect appends the state after one more record.
func (w *world) expect(i int, m *modelReplica) {
	s := w.now()
	s[i] = m
	w.states = append(w.states, s)
}

func (w *world) descOf(i int, m *modelReplica) ReplicaDesc {
	d := testDesc(byte(i), modelSize)
	d.Replica[2] = m.created
	return d
}

func (w *world) replica(i int) *Replica {
	r, ok := w.d.Replica(w.descOf(i, w.now()[i]).Replica)
	if !ok {
		w.fatalf("replica %d is gone", i)
	}
	return r
}

func blockOf(id uint64) []byte {
	p := make([]byte, blockSize)
	if id != 0 {
		for i := 0; i < blockSize; i += 512 {
			binary.LittleEndian.PutUint64(p[i:], id)
		}
	}
	return p
}

// look opens what a crash now would leave, in a copy, and compares. depth is how
// many crashes in a row led here: some of the recoveries are themselves crashed,
// at any of their writes and syncs.
func (w *world) look(fs *vfs.Memory, least int, kill bool, depth int) {
	w.t.Helper()
	w.looked++
	if fs.Lost() > 0 {
		w.lossy++
	}
	var again []*vfs.Memory
	if depth > 0 {
		w.nested++
	}
	if depth < 3 && w.rng.IntN(6) == 0 {
		fs.Before(func(vfs.Op, string) {
			if w.rng.IntN(4) == 0 && len(again) < 3 {
				again = append(again, fs.Crash(w.rng.Uint64()))
			}
		})
	}
	if w.looked%8 == 0 { // what a crash leaves is no damage
		before := fs.Lost()
		if c, err := Check(w.t.Context(), fs, testPath, nil); err != nil || c.Found > torn(c) || fs.Lost() != before {
			w.fatalf("check after crash %d: %v, %+v", w.looked, err, c)
		}
	}
	d, err := Open(w.t.Context(), fs, testPath, w.opts)
	fs.Before(nil)
	if err != nil {
		w.fatalf("open after crash %d: %v", w.looked, err)
	}
	w.match(d, least, kill)
	w.released += len(d.released)
	if w.looked%8 == 4 {
		w.settle(fs, d)
	} else {
		d.closeFiles()
	}
	for _, next := range again {
		w.look(next, w.durable, false, depth+1)
	}
}

// settle gives back all that was deleted: nothing is left of it, and nothing else is lost.
func (w *world) settle(fs *vfs.Memory, d *Disk) {
	for d.releaseMore() {
	}
	if err := d.Close(); err != nil && !errors.Is(err, holdfast.ErrNoSpace) {
		w.fatalf("close after crash %d: %v", w.looked, err)
	}
	if c, err := Check(w.t.Context(), fs, testPath, nil); err != nil || c.Found > torn(c) {
		w.fatalf("check after all was released, crash %d: %v, %+v", w.looked, err, c)
	}
}

// torn counts the copies of the superblock that do not match: at most one, whose
// write a crash may have torn.
func torn(c *CheckReport) int {
	for _, f := range c.Findings {
		if f.Where == "superblock" {
			return 1
		}
	}
	return 0
}

// fatalf ends the seed; crashSeed turns it into a result.
func (w *world) fatalf(format string, args ...any) {
	panic(crashFailure(fmt.Sprintf(format, args...)))
}

type crashFailure string

// match returns the state that the disk is in.
func (w *world) match(d *Disk, least int, kill bool) int {
	w.t.Helper()
	var why []string
	for k := len(w.states) - 1; k >= least; k-- {
		diff := w.differs(d, w.states[k], kill)
		if diff == "" {
			return k
		}
		why = append(why, fmt.Sprintf("state %d: %s", k, diff))
	}
	w.fatalf("the disk is in none of the states %d to %d (kill %v): %q; the last operations: %q",
		least, len(w.states)-1, kill, why[max(0, len(why)-12):], w.trace[max(0, len(w.trace)-12):])
	return 0
}

func (w *world) differs(d *Disk, s modelState, kill bool) string {
	n := 0
	for i, m := range s {
		if m == nil || !m.exists {
			continue
		}
		n++
		r, ok := d.Replica(w.descOf(i, m).Replica)
		if !ok {
			return fmt.Sprintf("replica %d is missing", i)
		}
		st := r.Status()
		switch {
		case st.Damaged != nil:
			return fmt.Sprintf("replica %d: %v", i, st.Damaged)
		case st.Fence != m.fence || st.Tail != m.tail() || st.Dur != m.tail():
			return fmt.Sprintf("replica %d: fence %d tail %d dur %d, want %d %d", i, st.Fence, st.Tail, st.Dur, m.fence, m.tail())
		case st.HintISR != w.hintOf(i, m):
			return fmt.Sprintf("replica %d: hint %d, want %d", i, st.HintISR, w.hintOf(i, m))
		case st.Intact != (m.intact && kill):
			return fmt.Sprintf("replica %d: intact %v, want %v", i, st.Intact, m.intact && kill)
		}
		if diff := w.readAll(r, m.hist[len(m.hist)-1]); diff != "" {
			return fmt.Sprintf("replica %d at %d: %s", i, st.Tail, diff)
		}
		if diff := checkChunks(r, m); diff != "" {
			return fmt.Sprintf("replica %d: %s", i, diff)
		}
		if diff := checkEntries(r, m, st); diff != "" {
			return fmt.Sprintf("replica %d: %s", i, diff)
		}
	}
	if got := len(d.Replicas()); got != n {
		return fmt.Sprintf("%d replicas, want %d", got, n)
	}
	return ""
}

// hintOf is what a replica of a state has been told.
func (w *world) hintOf(i int, m *modelReplica) holdfast.ISRVersion {
	if w.beside != nil && i == w.besides.replica && m.hint == w.besides.hint {
		return m.hint - 1
	}
	return m.hint
}

func (w *world) readAll(r *Replica, want *modelContent) string {
	p := make([]byte, modelBlocks*blockSize)
	if err := r.ReadAt(p, modelBase); err != nil {
		return err.Error()
	}
	for b := range want {
		if got := binary.LittleEndian.Uint64(p[b*blockSize+512:]); got != want[b].id {
			return fmt.Sprintf("block %d has %d, want %d", b, got, want[b].id)
		}
	}
	return ""
}

// checkChunks compares what a copy of the replica would be made of.
func checkChunks(r *Replica, m *modelReplica) string {
	for i := int64(0); i*blocksPerChunk < modelBlocks; i++ {
		c, err := r.ReadChunk(modelFirst + i)
		if err != nil {
			return err.Error()
		}
		if c.AsOf < m.base || c.AsOf > m.tail() {
			return fmt.Sprintf("chunk %d is as of %d, outside %d to %d", i, c.AsOf, m.base, m.tail())
		}
		for k, s := range c.State {
			got, b := uint64(0), i*blocksPerChunk+int64(k)
			if s == BlockData {
				got = binary.LittleEndian.Uint64(c.Data[k*blockSize:])
			}
			if b < modelBlocks && got != m.hist[c.AsOf-m.base][b].id {
				return fmt.Sprintf("block %d of chunk %d as of %d has %d, want %d", k, i, c.AsOf, got, m.hist[c.AsOf-m.base][b].id)
			}
		}
	}
	return ""
}

func checkEntries(r *Replica, m *modelReplica, st Status) string {
	for q := max(st.First, m.base+1); q <= st.Tail; {
		es, err := r.Entries(q, 256<<10)
		if err != nil {
			return fmt.Sprintf("entries from %d: %v", q, err)
		}
		for _, e := range es {
			want := m.log[e.Seq-m.base-1]
			if e.Seq != q || e.Epoch != want.epoch || e.Type != want.typ || e.Offset != want.off || e.Length != want.len ||
				e.Type == OpWrite && binary.LittleEndian.Uint64(e.Payload) != want.id {
				return fmt.Sprintf("entry %d is not what was logged as %d", e.Seq, q)
			}
			q++
		}
	}
	return ""
}

// step does one random operation.
func (w *world) step() {
	w.t.Helper()
	i := w.rng.IntN(modelReplicas)
	m := w.now()[i]
	if m == nil || !m.exists {
		w.create(i)
		return
	}
	if w.rng.IntN(4) == 0 { // a leaf of what was deleted, while the rest waits
		w.d.releaseSome(1)
	}
	n := w.rng.IntN(100)
	w.trace = append(w.trace, fmt.Sprintf("replica %d at %d: %d (state %d)", i, m.tail(), n, len(w.states)-1))
	switch {
	case n < 48:
		w.append(i)
	case n < 50:
		w.anew(i)
	case n < 60:
		w.sync(i)
	case n < 70:
		w.commit(i)
	case n < 74:
		w.fence(i)
	case n < 79:
		w.truncate(i)
	case n < 84:
		w.apply(i)
	case n < 88:
		w.checkpoint()
	case n < 93:
		for range 1 + w.rng.IntN(4) {
			w.install(i)
		}
	case n < 95:
		w.rebase(i)
	case n < 96:
		w.hint(i)
	case n < 98:
		w.intact(i)
	default:
		w.delete(i)
	}
	w.done = len(w.states) - 1
}

func (w *world) must(what string, err error) {
	w.t.Helper()
	if err != nil {
		w.fatalf("%s: %v", what, err)
	}
}

// settled notes that everything so far is durable.
func (w *world) settled() { w.durable = len(w.states) - 1 }

func (w *world) create(i int) {
	w.life++
	m := &modelReplica{exists: true, hist: []*modelContent{{}}, created: w.life}
	w.expect(i, m)
	w.commits[i] = 0
	_, err := w.d.CreateReplica(w.descOf(i, m))
	w.must("create", err)
	w.settled()
}

func (w *world) delete(i int) {
	m := w.now()[i]
	w.expect(i, &modelReplica{created: m.created})
	w.must("delete", w.d.DeleteReplica(w.descOf(i, m).Replica))
	w.settled()
}

func (w *world) append(i int) {
	r, m := w.replica(i), w.now()[i]
	var entries []Entry
	large := w.rng.IntN(3)
	if large == 0 && !w.device && w.rng.IntN(2) == 0 {
		w.hintBeside(i)
	}
	before := len(w.states)
	for range 1 + w.rng.IntN(5) {
		first := w.rng.IntN(modelBlocks)
		n := 1 + w.rng.IntN(min(modelBlocks-first, 20))
		kind := w.rng.IntN(10)
		if large == 0 && (len(entries) == 0 || w.rng.IntN(2) == 0) { // two whole chunks or more
			first, kind = w.rng.IntN(blocksPerChunk+1), 9
			least := (first+blocksPerChunk-1)/blocksPerChunk*blocksPerChunk + minFresh*blocksPerChunk - first
			n = least + w.rng.IntN(modelBlocks-first-least+1)
		}
		w.nextID++
		e := Entry{Epoch: m.fence, Seq: m.tail() + 1, Commit: w.commits[i], Type: OpWrite, Offset: modelBase + int64(first)*blockSize, Length: int64(n) * blockSize}
		id := w.nextID
		switch kind {
		case 0:
			e.Type, id = OpZero, 0
		case 1:
			e.Type, id = OpTrim, 0
		case 2: // a wide one
			e.Type, id, e.Offset, e.Length = OpTrim, 0, 0, modelSize
			first, n = 0, modelBlocks
		default:
			for range n {
				e.Payload = append(e.Payload, blockOf(id)...)
			}
			e.CRC = crcsOf(e.Payload)
		}
		m = m.with(func(m *modelReplica) {
			c := *m.hist[len(m.hist)-1]
			for b := first; b < first+n; b++ {
				c[b] = modelBlock{id, e.Seq}
			}
			m.hist = append(m.hist, &c)
			m.log = append(m.log, modelEntry{e.Epoch, e.Type, e.Offset, e.Length, id})
		})
		w.expect(i, m)
		entries = append(entries, e)
	}
	err := r.Append(entries)
	before -= w.noHintBeside(before - 1)
	for s := entries[0].Seq; s <= r.Status().Tail; s++ {
		if e := r.index.get(s); e != nil && e.fresh != nil {
			w.fresh++
		}
	}
	if errors.Is(err, holdfast.ErrNoSpace) { // what was not logged never was
		logged := int(r.Status().Tail - (entries[0].Seq - 1))
		w.states = w.states[:before+logged]
		for i := range w.now() {
			if m := w.now()[i]; m != nil && m.exists {
				w.commit(i)
			}
		}
		w.checkpoint()
		return
	}
	w.must("append", err)
}

// hintBeside has another replica log and sync a record while fresh chunks are being
// written: before the entries that refer to them, in the order of the log.
func (w *world) hintBeside(i int) {
	j := (i + 1) % modelReplicas
	m := w.now()[j]
	if m == nil || !m.exists {
		return
	}
	w.expect(j, m.with(func(m *modelReplica) { m.hint++ }))
	state := len(w.states) - 1
	w.besides.replica, w.besides.hint = j, m.hint+1
	w.beside = func() {
		r := w.replica(j)
		w.must("hint", r.SetHint(1, m.hint+1))
		_, err := r.Sync(w.t.Context())
		w.must("sync", err)
		w.durable = max(w.durable, state)
	}
}

// noHintBeside takes the record back if no fresh chunk was written, and returns how
// many states that are.
func (w *world) noHintBeside(state int) int {
	if w.beside == nil {
		return 0
	}
	w.beside = nil
	hinted, old := w.states[state], w.states[state-1]
	w.states = slices.Delete(w.states, state, state+1)
	for i := range hinted {
		for k := state; hinted[i] != old[i] && k < len(w.states); k++ {
			w.states[k][i] = old[i]
		}
	}
	return 1
}

func (w *world) sync(i int) {
	r, m := w.replica(i), w.now()[i]
	dur, err := r.Sync(w.t.Context())
	w.must("sync", err)
	if dur != m.tail() {
		w.fatalf("durable up to %d, want %d", dur, m.tail())
	}
	if w.now()[i] == m {
		// Records of other replicas behind this one's last may not be durable;
		// the state before them is the least.
		for k := len(w.states) - 1; k >= w.durable; k-- {
			if k == 0 || w.states[k-1][i] != m {
				w.durable = max(w.durable, k)
				break
			}
		}
	}
}

// commit is what the writer says once the copies that count are durable.
func (w *world) commit(i int) {
	if w.rng.IntN(3) > 0 { // a copy that is not yet counted may lag behind commit
		w.sync(i)
	}
	r, m := w.replica(i), w.now()[i]
	if w.commits[i] < m.tail() {
		w.commits[i] += holdfast.Seq(w.rng.IntN(int(m.tail()-w.commits[i]) + 1))
	}
	r.SetCommit(w.commits[i])
}

func (w *world) fence(i int) {
	r, m := w.replica(i), w.now()[i]
	epoch := m.fence + 1 + holdfast.Epoch(w.rng.IntN(3))
	w.expect(i, m.with(func(m *modelReplica) { m.fence = epoch }))
	w.must("fence", r.Fence(epoch))
	var refused *FenceError
	if err := r.Fence(epoch); !errors.As(err, &refused) || refused.Present != epoch {
		w.fatalf("the same fence again: got %v", err)
	}
	w.settled()
}

func (w *world) truncate(i int) {
	r, m := w.replica(i), w.now()[i]
	low := min(max(w.commits[i], m.base, r.Status().Floor), m.tail())
	to := low + holdfast.Seq(w.rng.IntN(int(m.tail()-low)+1))
	if to < m.tail() {
		w.expect(i, m.with(func(m *modelReplica) {
			m.hist, m.log = m.hist[:to-m.base+1], m.log[:to-m.base]
		}))
	}
	w.must("truncate", r.Truncate(to))
	if to < m.tail() {
		w.settled()
	}
}

func (w *world) apply(i int) {
	_, err := w.replica(i).Apply(w.t.Context(), w.now()[i].tail())
	w.must("apply", err)
}

func (w *world) checkpoint() {
	if w.rng.IntN(3) == 0 { // one that applies no more than makes room; what it does not reach stays as it is
		_, err := w.d.reclaim(nil)
		w.must("make room", err)
		return
	}
	w.must("checkpoint", w.d.Checkpoint(w.t.Context()))
	w.settled()
}

func (w *world) install(i int) {
	r, m := w.replica(i), w.now()[i]
	st := r.Status()
	low, high := max(st.Checkpoint, m.base), max(w.commits[i], m.base)
	if low > high {
		return
	}
	asOf := high // above which nothing is applied
	if w.rng.IntN(2) == 0 {
		asOf = low + holdfast.Seq(w.rng.IntN(int(high-low)+1))
	}
	c := Chunk{Index: modelFirst + int64(w.rng.IntN((modelBlocks+15)/16)), LastSeq: asOf, AsOf: asOf}
	if old := mapEntry(r, c.Index); old.asOf > asOf {
		return
	}
	ids := map[int64]uint64{}
	if w.rng.IntN(4) > 0 {
		c.Data = make([]byte, chunkSize)
		whole := w.rng.IntN(2) > 0
		for k := range c.State {
			b := (c.Index-modelFirst)*blocksPerChunk + int64(k)
			if (whole || w.rng.IntN(3) > 0) && b < modelBlocks {
				w.nextID++
				ids[b] = w.nextID
				c.State[k] = BlockData
				copy(c.Data[k*blockSize:], blockOf(w.nextID))
				c.CRC[k] = crcsOf(blockOf(w.nextID))[0]
			}
		}
	}
	w.expect(i, m.with(func(m *modelReplica) {
		for q := m.base; q <= m.tail(); q++ { // a rebase may make an earlier one the base
			h := *m.hist[q-m.base]
			for b := (c.Index - modelFirst) * blocksPerChunk; b < (c.Index-modelFirst+1)*blocksPerChunk && b < modelBlocks; b++ {
				if h[b].seq <= asOf {
					h[b] = modelBlock{ids[b], asOf}
				}
			}
			m.hist[q-m.base] = &h
		}
	}))
	err := r.InstallChunk(c)
	if errors.Is(err, holdfast.ErrRefused) || errors.Is(err, holdfast.ErrNoSpace) {
		w.states = w.states[:len(w.states)-1]
		return
	}
	w.must("install", err)
	if f, ok := r.flips[c.Index]; ok && f.phys == mapEntry(r, c.Index).phys && c.whole() {
		w.placed++
	}
}

func (w *world) rebase(i int) {
	r, m := w.replica(i), w.now()[i]
	w.must("catch up", r.catchUp())
	applied := r.Status().Applied
	seq := max(w.commits[i], m.base, r.Status().Floor) + holdfast.Seq(w.rng.IntN(20))
	w.expect(i, m.with(func(m *modelReplica) {
		h := *m.hist[applied-m.base]
		for b := range h {
			h[b].seq = 0
		}
		m.hist, m.log, m.base = []*modelContent{&h}, nil, seq
	}))
	w.must("rebase", r.Rebase(m.fence, seq))
	w.commits[i] = seq
	if diff := w.readAll(r, w.now()[i].hist[0]); diff != "" {
		w.fatalf("after a rebase: %s", diff)
	}
	w.settled()
}

// anew begins a replica anew that was found damaged.
func (w *world) anew(i int) {
	r, m := w.replica(i), w.now()[i]
	seq := m.tail() + holdfast.Seq(w.rng.IntN(20))
	w.expect(i, m.with(func(m *modelReplica) { m.hist, m.log, m.base, m.intact = []*modelContent{{}}, nil, seq, false }))
	r.mu.Lock()
	r.damage("a test says so")
	r.mu.Unlock()
	w.must("begin anew", r.Rebase(m.fence, seq))
	w.commits[i] = seq
	w.settled()
}

func (w *world) hint(i int) {
	r, m := w.replica(i), w.now()[i]
	w.expect(i, m.with(func(m *modelReplica) { m.hint++ }))
	w.must("hint", r.SetHint(1, m.hint+1))
}

func (w *world) intact(i int) {
	r, m := w.replica(i), w.now()[i]
	if st := r.Status(); !st.Intact || st.IntactEpoch != m.fence { // else there is no record
		w.expect(i, m.with(func(m *modelReplica) { m.intact = true }))
	}
	w.must("declare intact", r.DeclareIntact(m.fence))
}

// run lives through several crashes, looking at what many more would leave.
func (w *world) run(generations, steps int, between float64) {
	for g := range generations {
		w.fs.Before(func(op vfs.Op, path string) {
			if w.beside != nil && op == vfs.OpWrite && path == testPath && w.d.passes.TryLock() {
				w.d.passes.Unlock() // it is no checkpoint that writes
				f := w.beside
				w.beside = nil
				f()
			}
			if op == vfs.OpWrite && w.rng.Float64() >= between {
				return // between two syncs: one of several
			}
			if w.rng.IntN(16) == 0 {
				w.look(w.fs.Restart(), w.done, true, 0)
			} else {
				w.look(w.fs.Crash(w.rng.Uint64()), w.durable, false, 0)
			}
		})
		for range steps {
			w.step()
		}
		w.fs.Before(nil)
		kill := w.rng.IntN(3) == 0
		next, least := w.fs.Restart(), w.done
		if !kill {
			next, least = w.fs.Crash(w.rng.Uint64()), w.durable
		}
		d, err := Open(w.t.Context(), next, testPath, w.opts)
		if err != nil {
			w.fatalf("open after generation %d: %v", g, err)
		}
		s := w.states[w.match(d, least, kill)]
		w.d.closeFiles()
		w.fs, w.d = next, d
		next.Writeback(w.rng.Uint64())
		// After a crash commit is what the log said of it.
		for i, m := range s {
			if m != nil && m.exists {
				st := w.replica(i).Status()
				w.commits[i] = max(min(st.Commit, m.tail()), m.base)
				s[i] = m.with(func(m *modelReplica) { m.intact = st.Intact })
			}
		}
		w.states, w.durable, w.done = []modelState{s}, 0, 0
	}
	w.d.closeFiles()
}

func newWorld(t *testing.T, seed uint64, device bool) *world {
	w := &world{t: t, device: device, rng: rand.New(rand.NewPCG(seed, 0xd15c)), fs: vfs.NewMemory(seed), opts: Options{foreground: true, releaseLeaves: -1}}
	if seed%3 != 0 { // leaves are written between checkpoints, dropped and read again
		w.opts.cacheLeaves = 1
	}
	o := tinyFormat()
	if seed%2 == 1 { // so few chunks that freed ones are soon taken again
		o.Size = headerArea + 40*chunkSize
	}
	if device {
		w.fs.AddDevice(testPath, o.Size)
	}
	mustFormat(t, w.fs, testPath, o)
	w.fs.Writeback(seed)
	d, err := Open(t.Context(), w.fs, testPath, w.opts)
	if err != nil {
		t.Fatal(err)
	}
	w.d, w.states = d, []modelState{{}}
	return w
}

// crashSeed lives one seed and returns what went wrong, or "".
func crashSeed(t *testing.T, seed uint64) (why string, w *world) {
	w = newWorld(t, seed, seed%4 == 0)
	defer func() {
		switch e := recover().(type) {
		case nil:
		case crashFailure:
			why = string(e)
		default:
			panic(e)
		}
	}()
	if raceEnabled { // a world is much of what the race detector has time for
		w.run(2, 60, 0.1)
	} else {
		w.run(4, 120, 0.3)
	}
	return "", w
}

// TestCrashes looks at the disk after crashes at each sync, and at writes
// between, of random operations on several replicas: crashPoints of them, or
// HOLDFAST_CRASHES. HOLDFAST_SEEDS=FROM-TO runs other seeds,
// HOLDFAST_CRASH_MINUTES=N as many as fit from the first on.
func TestCrashes(t *testing.T) {
	from, to, points := uint64(1), uint64(1)<<62, crashPoints
	if s := os.Getenv("HOLDFAST_SEEDS"); s != "" {
		if _, err := fmt.Sscanf(s, "%d-%d", &from, &to); err != nil {
			t.Fatalf("HOLDFAST_SEEDS=%q: %v", s, err)
		}
		points = math.MaxInt
	}
	if s := os.Getenv("HOLDFAST_CRASHES"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatalf("HOLDFAST_CRASHES=%q: %v", s, err)
		}
		points = n
	}
	var until time.Time
	if s := os.Getenv("HOLDFAST_CRASH_MINUTES"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatalf("HOLDFAST_CRASH_MINUTES=%q: %v", s, err)
		}
		until, points = time.Now().Add(time.Duration(n)*time.Minute), math.MaxInt
	}
	var looked, lossy, nested, fresh, placed, released atomic.Int64
	var next atomic.Uint64
	next.Store(from)
	t.Run("seeds", func(t *testing.T) {
		for worker := range runtime.GOMAXPROCS(0) {
			t.Run(strconv.Itoa(worker), func(t *testing.T) {
				t.Parallel()
				for looked.Load() < int64(points) && (until.IsZero() || time.Now().Before(until)) {
					seed := next.Add(1) - 1
					if seed > to || t.Context().Err() != nil {
						return
					}
					why, w := crashSeed(t, seed)
					if why != "" {
						t.Fatalf("after %d crash points: seed %d: %s\nrepeat: HOLDFAST_SEEDS=%d-%d go test -run TestCrashes ./blockdev/disk", looked.Load(), seed, why, seed, seed)
					}
					looked.Add(int64(w.looked))
					lossy.Add(int64(w.lossy))
					nested.Add(int64(w.nested))
					fresh.Add(int64(w.fresh))
					placed.Add(int64(w.placed))
					released.Add(int64(w.released))
				}
			})
		}
	})
	t.Logf("%d crash points of seeds %d to %d: %d lost or tore a page that was not synced, %d were crashes of a recovery; %d entries and %d installs in fresh chunks; %d maps were left to be released", looked.Load(), from, min(to, next.Load()-1), lossy.Load(), nested.Load(), fresh.Load(), placed.Load(), released.Load())
	if !t.Failed() && looked.Load() > 1000 && fresh.Load() < looked.Load()/20 {
		t.Errorf("too few entries in fresh chunks")
	}
	if !t.Failed() && looked.Load() > 1000 && placed.Load() < looked.Load()/200 {
		t.Errorf("too few installs in fresh chunks")
	}
	if !t.Failed() && looked.Load() > 1000 && released.Load() < looked.Load()/20 {
		t.Errorf("too few maps that were being released")
	}
	if !t.Failed() && looked.Load() > 1000 && 2*lossy.Load() < looked.Load() {
		t.Errorf("fewer than half of the crash points lost a page")
	}
}
