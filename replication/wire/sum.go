package wire

import (
	"hash/crc32"

	"github.com/holdfast-storage/holdfast"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Checksum is crc32c (Castagnoli) without a seed, the sum of blocks, bodies
// and headers.
func Checksum(p []byte) uint32 { return crc32.Checksum(p, castagnoli) }

// BlockSums appends the sum of each 4 KiB block of p to sums. The length of p
// is a multiple of holdfast.BlockSize.
func BlockSums(sums []uint32, p []byte) []uint32 {
	for ; len(p) >= holdfast.BlockSize; p = p[holdfast.BlockSize:] {
		sums = append(sums, Checksum(p[:holdfast.BlockSize]))
	}
	return sums
}

// Verify compares p block by block with sums. The error is ErrIntegrity and
// names the first block that differs, or the difference in length.
func Verify(p []byte, sums []uint32) error {
	if len(p) != len(sums)*holdfast.BlockSize {
		return holdfast.Errorf(holdfast.ErrIntegrity, "%d bytes do not fit %d block sums", len(p), len(sums))
	}
	for i, want := range sums {
		if got := Checksum(p[i*holdfast.BlockSize : (i+1)*holdfast.BlockSize]); got != want {
			return holdfast.Errorf(holdfast.ErrIntegrity, "block %d of %d: crc32c %08x, want %08x", i, len(sums), got, want)
		}
	}
	return nil
}
