//go:build !race

package disk

// raceEnabled: see race_on_test.go.
const raceEnabled = false

// crashPoints is what TestCrashes looks at unless it is told otherwise:
// about 90 s on two cores.
const crashPoints = 14_000
