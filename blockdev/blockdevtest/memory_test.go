package blockdevtest

import (
	"testing"

	"github.com/holdfast-storage/holdfast/blockdev"
)

func TestMemory(t *testing.T) {
	for _, size := range []int64{MinSize, MinSize + 512, 8 << 20, 1 << 33} {
		Run(t, func(*testing.T) blockdev.Device { return NewMemory(size) })
	}
}

func TestVolatileMemory(t *testing.T) {
	Run(t, func(*testing.T) blockdev.Device { return NewVolatile(4 << 20) })
}
