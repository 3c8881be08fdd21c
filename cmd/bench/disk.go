package main

import (
	"context"
	"crypto/rand"
	"errors"
	"hash/crc32"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/disk"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// The writer's own flushes (protocol, section 5): what is acknowledged is durable, and
// may be applied, after so many bytes or so long.
const (
	flushBytes = 16 << 20
	flushEvery = 100 * time.Millisecond
)

// subject is one disk with one replica as large as the run's size, driven as the
// writer of a volume drives it, but in this process: no network, no NBD.
type subject struct {
	image string
	size  int64 // of the replica
	wal   int64 // of the log
	d     *disk.Disk
	r     *disk.Replica
	pool  [][]byte   // payloads of 1 MiB, page-aligned
	sums  [][]uint32 // crc32c of each of their blocks

	seq      holdfast.Seq
	appended atomic.Int64 // bytes
	durable  atomic.Int64 // how many of them were appended before the last flush
	commit   atomic.Uint64
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// openSubject formats and opens a disk with a log of a quarter of the size, which its
// steady state then goes through many times.
func openSubject(ctx context.Context, dir string, size int64) (*subject, error) {
	s := &subject{image: filepath.Join(dir, "disk"), size: size, wal: max(size/4, disk.MinWALSize)}
	o := disk.FormatOptions{
		Cluster: holdfast.ClusterID{1}, Node: holdfast.NodeID{1},
		// Large writes need room beside what is mapped.
		Size: size*2 + s.wal, WALSize: s.wal,
	}
	if err := disk.Format(ctx, vfs.OS{}, s.image, o); err != nil {
		return nil, err
	}
	d, err := disk.Open(ctx, vfs.OS{}, s.image, disk.Options{})
	if err != nil {
		return nil, err
	}
	s.d = d
	s.r, err = d.CreateReplica(disk.ReplicaDesc{Segment: holdfast.SegmentID{Volume: holdfast.VolumeID{1}}, Replica: holdfast.ReplicaID{1}, Lineage: holdfast.LineageID{1}, Size: size})
	if err == nil {
		err = s.r.Fence(1)
	}
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	for range 8 {
		p := vfs.AlignedBuffer(holdfast.MaxOpSize)
		_, _ = rand.Read(p) // it never fails
		var sums []uint32
		for b := range slices.Chunk(p, holdfast.BlockSize) {
			sums = append(sums, crc32.Checksum(b, castagnoli))
		}
		s.pool, s.sums = append(s.pool, p), append(s.sums, sums)
	}
	return s, nil
}

func (s *subject) close() error { return s.d.Close() }

// entry is the next entry: n bytes at off, of the pool.
func (s *subject) entry(off, n int64) disk.Entry {
	s.seq++
	i := int(s.seq) % len(s.pool)
	blocks := n / holdfast.BlockSize
	from := (int64(s.seq) * 7 % (holdfast.MaxOpSize/holdfast.BlockSize - blocks + 1))
	return disk.Entry{
		Epoch: 1, Seq: s.seq, Commit: holdfast.Seq(s.commit.Load()), Type: disk.OpWrite, Offset: off, Length: n,
		CRC: s.sums[i][from : from+blocks], Payload: s.pool[i][from*holdfast.BlockSize:][:n],
	}
}

// flush is what the writer does by itself: what was appended is durable, and committed.
func (s *subject) flush(ctx context.Context) error {
	appended := s.appended.Load()
	dur, err := s.r.Sync(ctx)
	if err == nil {
		s.durable.Store(appended)
		s.commit.Store(uint64(dur))
		s.r.SetCommit(dur)
	}
	return err
}

// written is what a job of writes did.
type written struct {
	requests int64
	took     time.Duration
	latency  []time.Duration // of each request
	seconds  []int64         // requests that ended in each whole second
}

// write appends requests of n bytes, depth at a time, until the time or the count is
// over; next says where. It flushes as a writer does, beside the appends; each is part
// of the job, and so is a last one.
func (s *subject) write(ctx context.Context, n int64, depth int, until time.Duration, count int64, next func() int64) (written, error) {
	var w written
	flushes, flushed := make(chan struct{}, 1), make(chan error, 1)
	go func() {
		for range flushes {
			if err := s.flush(ctx); err != nil {
				flushed <- err
				return
			}
		}
		flushed <- nil
	}()
	begun := time.Now()
	last, bytes := begun, int64(0)
	batch := make([]disk.Entry, 0, depth)
	for w.requests < count && time.Since(begun) < until && ctx.Err() == nil {
		batch = batch[:0]
		for range min(int64(depth), count-w.requests) {
			batch = append(batch, s.entry(next(), n))
		}
		start := time.Now()
		if err := s.r.Append(batch); err != nil {
			close(flushes)
			return w, errors.Join(err, <-flushed)
		}
		now := time.Now()
		for range batch {
			w.latency = append(w.latency, now.Sub(start))
		}
		w.requests += int64(len(batch))
		for second := int(now.Sub(begun) / time.Second); len(w.seconds) <= second; {
			w.seconds = append(w.seconds, 0)
		}
		w.seconds[len(w.seconds)-1] += int64(len(batch))
		// A writer's window is an eighth of the log: beyond it, it waits for a flush.
		if s.appended.Add(n*int64(len(batch)))-s.durable.Load() > s.wal/8 {
			if err := s.flush(ctx); err != nil {
				close(flushes)
				return w, errors.Join(err, <-flushed)
			}
			bytes, last = 0, now
			continue
		}
		if bytes += n * int64(len(batch)); bytes >= flushBytes || now.Sub(last) >= flushEvery {
			bytes, last = 0, now
			select {
			case flushes <- struct{}{}:
			default: // one is due already
			}
		}
	}
	close(flushes)
	err := <-flushed
	if err == nil {
		err = s.flush(ctx)
	}
	w.took = time.Since(begun)
	return w, errors.Join(err, ctx.Err())
}

// commits writes and syncs one 4 KiB block after the other.
func (s *subject) commits(ctx context.Context, until time.Duration) (written, error) {
	var w written
	begun := time.Now()
	for time.Since(begun) < until && ctx.Err() == nil {
		start := time.Now()
		if err := s.r.Append([]disk.Entry{s.entry(s.randomBlock(), holdfast.BlockSize)}); err != nil {
			return w, err
		}
		if err := s.flush(ctx); err != nil {
			return w, err
		}
		w.latency = append(w.latency, time.Since(start))
		w.requests++
	}
	w.took = time.Since(begun)
	return w, ctx.Err()
}

func (s *subject) randomBlock() int64 {
	return mathrand.Int64N(s.size/holdfast.BlockSize) * holdfast.BlockSize
}

// everyBlock visits each block once, in an order that no readahead guesses.
func (s *subject) everyBlock() func() (off int64, ok bool) {
	blocks := s.size / holdfast.BlockSize
	var next atomic.Int64
	return func() (int64, bool) {
		i := next.Add(1) - 1
		return i * 1_000_003 % blocks * holdfast.BlockSize, i < blocks // a prime, so all of them
	}
}

// read reads blocks, depth at a time, until the time is over or next has no more.
func (s *subject) read(ctx context.Context, depth int, until time.Duration, next func() (off int64, ok bool)) (written, error) {
	var (
		w      written
		mu     sync.Mutex
		failed error
		wg     sync.WaitGroup
	)
	begun := time.Now()
	for range depth {
		wg.Go(func() {
			p := vfs.AlignedBuffer(holdfast.BlockSize)
			var mine []time.Duration
			var err error
			for end := begun; err == nil && end.Sub(begun) < until; {
				off, ok := next()
				if !ok {
					break
				}
				start := end
				err = s.r.ReadAt(p, off)
				end = time.Now()
				mine = append(mine, end.Sub(start))
			}
			mu.Lock()
			defer mu.Unlock()
			failed = errors.Join(failed, err)
			w.latency = append(w.latency, mine...)
		})
	}
	wg.Wait()
	w.took, w.requests = time.Since(begun), int64(len(w.latency))
	return w, errors.Join(failed, ctx.Err())
}

// dropFile writes a file out and drops it from the page cache.
func dropFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // opened for reading
	return fadviseDontNeed(f)
}

// warm reads the whole replica once.
func (s *subject) warm() error {
	p := vfs.AlignedBuffer(holdfast.MaxOpSize)
	for off := int64(0); off < s.size; off += holdfast.MaxOpSize {
		if err := s.r.ReadAt(p, off); err != nil {
			return err
		}
	}
	return nil
}
