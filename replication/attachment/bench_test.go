package attachment

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/holdfast-storage/holdfast"
)

// The data path over disks in memory: what the edges and cores cost.
func BenchmarkDevice(b *testing.B) {
	for _, hosts := range []int{1, 3} {
		c := newCluster(b, hosts, 64<<20, 64<<20)
		a := c.attach(c.hosts[0])
		run := func(name string, depth int, size int64, op func(p []byte, off int64) error) {
			b.Run(fmt.Sprintf("replicas=%d/%s", hosts, name), func(b *testing.B) {
				b.SetBytes(size)
				b.ReportAllocs()
				var left atomic.Int64
				left.Store(int64(b.N))
				var running sync.WaitGroup
				for w := range depth {
					running.Go(func() {
						rng := rand.New(rand.NewPCG(uint64(w), 1))
						p := make([]byte, size)
						for left.Add(-1) >= 0 {
							if err := op(p, rng.Int64N(c.size/size)*size); err != nil {
								b.Error(err)
								return
							}
						}
					})
				}
				running.Wait()
			})
		}
		write := func(p []byte, off int64) error { return a.WriteAt(context.Background(), p, off, false) }
		read := func(p []byte, off int64) error { return a.ReadAt(context.Background(), p, off) }
		commit := func(p []byte, off int64) error {
			if err := write(p, off); err != nil {
				return err
			}
			return a.Flush(context.Background())
		}
		run("write4k/depth=1", 1, holdfast.BlockSize, write)
		run("write4k/depth=32", 32, holdfast.BlockSize, write)
		run("write1m/depth=8", 8, 1<<20, write)
		run("commit4k/depth=1", 1, holdfast.BlockSize, commit)
		run("read4k/depth=1", 1, holdfast.BlockSize, read)
		run("read4k/depth=32", 32, holdfast.BlockSize, read)
		run("read1m/depth=8", 8, 1<<20, read)
		_ = a.Close()
	}
}
