//go:build race

package disk

// raceEnabled: this program was built with the race detector.
const raceEnabled = true

// crashPoints is what TestCrashes looks at unless it is told otherwise: under
// the race detector a crash takes ten times as long, and finds nothing more.
const crashPoints = 300

// TestInject: how many disks, and which share of their data blocks.
const (
	injectSeeds = 1
	injectEvery = 4
)

// hostSeeds is how many hosts TestHostFillsAndEmpties fills.
const hostSeeds = 6
