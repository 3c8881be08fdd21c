//go:build race

package disk

// raceEnabled: this program was built with the race detector.
const raceEnabled = true

// crashPoints is what TestCrashes looks at unless it is told otherwise: under
// the race detector a crash takes ten times as long, and finds nothing more.
const crashPoints = 1500
