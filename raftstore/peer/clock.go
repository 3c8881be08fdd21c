package peer

import (
	"time"

	"golang.org/x/sys/unix"
)

// Clock tells durations since some fixed moment.
type Clock func() time.Duration

// BootTime is CLOCK_BOOTTIME, which runs on while the machine is suspended. Go's
// own monotonic clock stops then.
func BootTime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		// The clock exists since Linux 2.6.39; without it no lease is right.
		panic("CLOCK_BOOTTIME: " + err.Error())
	}
	return time.Duration(ts.Nano())
}
