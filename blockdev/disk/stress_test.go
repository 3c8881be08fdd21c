package disk

import (
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

// TestConcurrentReplicas: writers, readers, syncs, checkpoints, installs and
// births and deaths at once, on a log that goes round many times. Each replica
// has one writer, who alone knows what its blocks must hold.
func TestConcurrentReplicas(t *testing.T) {
	fs := vfs.NewMemory(1)
	mustFormat(t, fs, testPath, tinyFormat())
	d, err := Open(t.Context(), fs, testPath, Options{ApplyEvery: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	const replicas, rounds = 4, 80
	var wg sync.WaitGroup
	for n := range byte(replicas) {
		r := mustCreate(t, d, n, modelBlocks*blockSize)
		wg.Go(func() { writeAndCheck(t, r, uint64(n), rounds) })
	}
	stop := make(chan struct{})
	var others sync.WaitGroup
	others.Go(func() {
		for n := byte(100); n < 110; n++ {
			select {
			case <-stop:
				return
			default:
			}
			r, err := d.CreateReplica(testDesc(n, 1<<20))
			if err != nil {
				t.Errorf("create: %v", err)
				return
			}
			if err := r.Append([]Entry{writeEntry(0, 1, 0, 65536)}); err != nil {
				t.Errorf("append: %v", err)
			}
			if err := d.DeleteReplica(r.Desc().Replica); err != nil {
				t.Errorf("delete: %v", err)
			}
			wantErr := r.Append([]Entry{writeEntry(0, 2, 0, 4096)})
			if !errors.Is(wantErr, holdfast.ErrNotFound) {
				t.Errorf("append to a deleted replica: got %v", wantErr)
			}
		}
	})
	others.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if err := d.Checkpoint(context.Background()); err != nil {
				t.Errorf("checkpoint: %v", err)
				return
			}
			_ = d.Stat()
			for _, r := range d.Replicas() {
				_ = r.Status()
				if _, err := r.ReadChunk(0); err != nil && !errors.Is(err, holdfast.ErrNotFound) {
					t.Errorf("read chunk: %v", err)
				}
			}
		}
	})
	wg.Wait()
	close(stop)
	others.Wait()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = mustOpen(t, fs, testPath)
	if got := len(d.Replicas()); got != replicas {
		t.Fatalf("%d replicas, want %d", got, replicas)
	}
}

// writeAndCheck writes random blocks of one replica while others read them, and
// checks that a block never goes back.
func writeAndCheck(t *testing.T, r *Replica, seed uint64, rounds int) {
	var newest [modelBlocks]atomic.Uint64 // received
	stop := make(chan struct{})
	var readers sync.WaitGroup
	for k := range uint64(1) {
		readers.Go(func() {
			rng := rand.New(rand.NewPCG(seed, k+10))
			p := make([]byte, blockSize)
			for {
				select {
				case <-stop:
					return
				default:
					runtime.Gosched() // else it starves the writers on few cores
				}
				b := rng.IntN(modelBlocks)
				least := newest[b].Load()
				if err := r.ReadAt(p, int64(b)*blockSize); err != nil {
					t.Errorf("read: %v", err)
					return
				}
				if got := binary.LittleEndian.Uint64(p[512:]); got < least {
					t.Errorf("block %d went back to %d from %d", b, got, least)
					return
				}
			}
		})
	}
	readers.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				runtime.Gosched()
			}
			dur, err := r.Sync(context.Background())
			if err != nil {
				t.Errorf("sync: %v", err)
				return
			}
			r.SetCommit(dur)
		}
	})
	rng := rand.New(rand.NewPCG(seed, 1))
	seq := holdfast.Seq(0)
	for range rounds {
		var entries []Entry
		for range 1 + rng.IntN(4) {
			seq++
			b, n := rng.IntN(modelBlocks-8), 1+rng.IntN(8)
			if rng.IntN(4) == 0 { // two whole chunks, or three
				b, n = rng.IntN(blocksPerChunk+1), 36
			}
			e := Entry{Seq: seq, Type: OpWrite, Offset: int64(b) * blockSize, Length: int64(n) * blockSize}
			for range n {
				e.Payload = append(e.Payload, blockOf(uint64(seq))...)
			}
			e.CRC = crcsOf(e.Payload)
			entries = append(entries, e)
		}
		err := r.Append(entries)
		for errors.Is(err, holdfast.ErrNoSpace) { // the commit lags behind the log
			entries = entries[r.Status().Tail+1-entries[0].Seq:]
			err = r.Append(entries)
		}
		if err != nil {
			t.Errorf("append: %v", err)
			break
		}
		for _, e := range entries {
			for b := e.Offset / blockSize; b < (e.Offset+e.Length)/blockSize; b++ {
				newest[b].Store(uint64(e.Seq))
			}
		}
	}
	close(stop)
	readers.Wait()
	// A tail that nobody commits could be most of a log as small as this, and would be
	// in the others' way for ever.
	dur, err := r.Sync(context.Background())
	if err != nil {
		t.Errorf("sync: %v", err)
	}
	r.SetCommit(dur)
}
