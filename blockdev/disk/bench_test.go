package disk

import (
	"sync"
	"testing"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

func benchDisk(b *testing.B, replicas int) []*Replica {
	b.Helper()
	path := b.TempDir() + "/image"
	o := FormatOptions{Cluster: testCluster, Node: testNode, Size: 4 << 30, WALSize: 256 << 20}
	if err := Format(b.Context(), vfs.OS{}, path, o); err != nil {
		b.Fatal(err)
	}
	d, err := Open(b.Context(), vfs.OS{}, path, Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = d.Close() })
	var all []*Replica
	for i := range replicas {
		r, err := d.CreateReplica(testDesc(byte(i), 1<<30))
		if err != nil {
			b.Fatal(err)
		}
		all = append(all, r)
	}
	return all
}

// BenchmarkAppend4K is the ack path: 4 KiB at random places, committed as it goes.
func BenchmarkAppend4K(b *testing.B) {
	r := benchDisk(b, 1)[0]
	e := writeEntry(0, 1, 0, 4096)
	b.ReportAllocs()
	b.SetBytes(4096)
	b.ResetTimer()
	for i := range b.N {
		e.Seq, e.Commit = holdfast.Seq(i+1), holdfast.Seq(i)
		e.Offset = int64(uint32(i)*2654435761%(1<<18)) * 4096
		if err := r.Append([]Entry{e}); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkCommit is write and sync at depth 1, by several replicas at once.
func BenchmarkCommit(b *testing.B) {
	for _, n := range []int{1, 8} {
		b.Run(map[int]string{1: "1", 8: "8"}[n], func(b *testing.B) {
			all := benchDisk(b, n)
			b.ResetTimer()
			var wg sync.WaitGroup
			for _, r := range all {
				wg.Go(func() {
					e := writeEntry(0, 1, 0, 4096)
					for i := range b.N / n {
						e.Seq, e.Commit, e.Offset = holdfast.Seq(i+1), holdfast.Seq(i), int64(i%65536)*4096
						if err := r.Append([]Entry{e}); err != nil {
							b.Error(err)
							return
						}
						if _, err := r.Sync(b.Context()); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
		})
	}
}

// BenchmarkRead4K reads chunks at random places.
func BenchmarkRead4K(b *testing.B) {
	r := benchDisk(b, 1)[0]
	for i := range 256 {
		e := writeEntry(0, holdfast.Seq(i+1), int64(i)<<20, 1<<20)
		if err := r.Append([]Entry{e}); err != nil {
			b.Fatal(err)
		}
		if i%16 == 15 {
			if _, err := r.Sync(b.Context()); err != nil {
				b.Fatal(err)
			}
			r.SetCommit(e.Seq)
		}
	}
	if err := r.d.Checkpoint(b.Context()); err != nil {
		b.Fatal(err)
	}
	p := make([]byte, 4096)
	b.ReportAllocs()
	b.SetBytes(4096)
	b.ResetTimer()
	for i := range b.N {
		if err := r.ReadAt(p, int64(uint32(i)*2654435761%(1<<16))*4096); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkSequential1M is a sequential write with a sync every 16 MiB, committed by
// it: of new chunks up to 1 GiB, then of mapped ones.
func BenchmarkSequential1M(b *testing.B) {
	r := benchDisk(b, 1)[0]
	e := writeEntry(0, 1, 0, 1<<20)
	b.SetBytes(1 << 20)
	b.ResetTimer()
	for i := range b.N {
		e.Seq, e.Offset = holdfast.Seq(i+1), int64(i%1024)<<20
		if err := r.Append([]Entry{e}); err != nil {
			b.Fatal(err)
		}
		if i%16 == 15 {
			dur, err := r.Sync(b.Context())
			if err != nil {
				b.Fatal(err)
			}
			r.SetCommit(dur)
			e.Commit = dur
		}
	}
}

// BenchmarkInstall copies a replica in: chunks one after the other, a sync after each 64.
// Those that are data all over go to their place, others through the log.
func BenchmarkInstall(b *testing.B) {
	for _, zeroes := range []int{0, 1} {
		b.Run(map[int]string{0: "whole", 1: "through the log"}[zeroes], func(b *testing.B) {
			r := benchDisk(b, 1)[0]
			c := wholeChunk(0, 0, 1)
			for i := range zeroes {
				c.State[i], c.CRC[i] = BlockZero, 0
			}
			b.SetBytes(chunkSize)
			b.ResetTimer()
			for i := range b.N {
				c.Index = int64(i % (1 << 14))
				if err := r.InstallChunk(c); err != nil {
					b.Fatal(err)
				}
				if i%64 == 63 {
					if _, err := r.Sync(b.Context()); err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}
