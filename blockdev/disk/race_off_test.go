//go:build !race

package disk

// raceEnabled: see race_on_test.go.
const raceEnabled = false

// crashPoints is what TestCrashes looks at unless it is told otherwise:
// about 90 s on two cores.
const crashPoints = 14_000

// TestInject: how many disks, and which share of their data blocks.
const (
	injectSeeds = 2
	injectEvery = 4
)

// hostSeeds is how many hosts TestHostFillsAndEmpties fills.
const hostSeeds = 40
