//go:build race

package sim

// defaultSeeds is small under the race detector, which finds nothing in a
// simulator of one goroutine that the first seeds do not show.
const defaultSeeds = 200
