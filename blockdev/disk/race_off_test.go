//go:build !race

package disk

// crashPoints is what TestCrashes looks at unless it is told otherwise:
// about 90 s on two cores.
const crashPoints = 14_000
