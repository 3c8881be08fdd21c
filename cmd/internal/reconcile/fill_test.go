package reconcile

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/disk"
)

// TestFill: the fuller of the disk and its file system counts, and what is promised
// counts as used.
func TestFill(t *testing.T) {
	for _, c := range []struct {
		name           string
		used, reserved int64
		host           float64 // of its file system; below 0: a device
		percent, mark  int
		ofHost         bool
	}{
		{"empty", 0, 0, 0, 0, 0, false},
		{"below all", 800, 49, 0.5, 84, 0, false},
		{"a warning", 800, 50, 0.5, 85, 85, false},
		{"no credit", 910, 10, 0.5, 92, 92, false},
		{"refused", 970, 0, 0.5, 97, 97, false},
		{"full", 1000, 0, 0.5, 100, 97, false},
		{"the file system is fuller", 10, 0, 0.86, 86, 85, true},
		{"the file system is full", 900, 0, 1, 100, 97, true},
		{"a device", 900, 0, -1, 90, 85, false},
	} {
		d := NewDisks(DisksOptions{HostFill: func(string) (float64, bool) { return c.host, c.host >= 0 }})
		f := d.fill("/d", disk.Stat{Capacity: 1000, Used: c.used, Reserved: c.reserved})
		if f.Percent() != c.percent || f.Mark() != c.mark || f.Host != c.ofHost {
			t.Errorf("%s: got %d %%, mark %d, host %v; want %d, %d, %v", c.name, f.Percent(), f.Mark(), f.Host, c.percent, c.mark, c.ofHost)
		}
	}
}

// TestCrossingsAreToldOnce: the log has a line for each watermark that a disk crosses,
// none while it stays or lies on one, and one when it has room again.
func TestCrossingsAreToldOnce(t *testing.T) {
	var log bytes.Buffer
	d := NewDisks(DisksOptions{Logger: slog.New(slog.NewTextHandler(&log, nil))})
	marks := map[holdfast.DiskID]int{}
	for _, step := range []struct {
		ratio float64
		says  string // "" for nothing
	}{
		{0.10, ""},
		{0.86, "WARN msg=\"a disk fills up\" path=/d"},
		{0.86, ""}, {0.91, ""},
		{0.84, ""}, // on the mark: it has not left it
		{0.85, ""},
		{0.93, "watermark=92 means=\"nothing more is promised ahead of need\""},
		{0.99, "watermark=97 means=\"what needs new space is refused\""},
		{0.96, ""},
		{0.95, "INFO msg=\"a disk has room again\""},
		{0.82, "watermark=0"},
		{0.98, "watermark=97"}, // past all at once
	} {
		log.Reset()
		d.tellFill([]OpenedDisk{{Path: "/d", Fill: Fill{Ratio: step.ratio}}}, marks)
		got := log.String()
		if (step.says == "") != (got == "") || !strings.Contains(got, step.says) || strings.Count(got, "\n") > 1 {
			t.Errorf("at %v: got %q, want %q", step.ratio, got, step.says)
		}
	}
}
