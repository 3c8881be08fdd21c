package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
)

// The results of a demo.
const (
	resultOK     = "ok"     // every acknowledged row was there
	resultLost   = "lost"   // acknowledged rows were lost
	resultMissed = "missed" // every row was there, of a build that loses some
	resultFailed = "failed" // the demo could not be carried out
)

// report is demo.json.
type report struct {
	Result  string    `json:"result"`
	Error   string    `json:"error,omitempty"`
	Break   string    `json:"break,omitempty"` // the defect that was built in on purpose
	Profile string    `json:"profile,omitempty"`
	Version string    `json:"version,omitempty"` // of holdfast
	Started time.Time `json:"started"`
	Seconds float64   `json:"seconds"`
	Forms   []*form   `json:"forms"`
}

// form is one way of bringing the database back: "container" by hand, "swarm" by Swarm.
type form struct {
	Form                 string  `json:"form"`
	HostKilled           string  `json:"host_killed"`
	HostAfter            string  `json:"host_after"`
	RowsAcked            int     `json:"rows_acked"`
	RowsFound            int     `json:"rows_found"`
	RowsUnanswered       int     `json:"rows_unanswered"`
	RowsLost             []int   `json:"rows_lost"` // the first of them
	SecondsLastAckToKill float64 `json:"seconds_last_ack_to_kill"`
	SecondsToFirstWrite  float64 `json:"seconds_to_first_write"`
	SecondsToInSync      float64 `json:"seconds_to_in_sync,omitempty"` // from the host's return
	RowsWhileHostWasAway int     `json:"rows_while_host_was_away,omitempty"`
	// KernelDevices is how many loop devices and FUSE connections the killed host
	// had; each was gone, and no process stuck, SecondsToRelease after its death.
	KernelDevices    int     `json:"kernel_devices"`
	SecondsToRelease float64 `json:"seconds_to_release"`
	complete         bool
}

// judge takes how the demo ended into the report, and returns the exit code.
func (r *report) judge(err error) int {
	switch {
	case errors.Is(err, errLost):
		r.Result, r.Error = resultLost, err.Error()
		return exitLost
	case err != nil:
		r.Result, r.Error = resultFailed, err.Error()
		return exitFailed
	case r.Break != "":
		r.Result = resultMissed
		r.Error = fmt.Sprintf("this holdfast was built to lose rows (%s), and the demo did not notice", r.Break)
		return exitFailed
	}
	r.Result = resultOK
	return exitOK
}

// maxLostListed bounds how many lost rows are listed.
const maxLostListed = 20

func (r *report) write(path string) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("encode the report: %w", err)
	}
	if err := os.WriteFile(path, append(text, '\n'), 0o644); err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	return nil
}

// summary prints the report for people.
func (r *report) summary(out io.Writer) {
	fmt.Fprintf(out, "\n%-12s %8s %8s %6s %12s   %s\n", "", "acked", "found", "lost", "first write", "")
	for _, f := range r.Forms {
		if !f.complete {
			fmt.Fprintf(out, "%-12s did not end\n", f.Form)
			continue
		}
		fmt.Fprintf(out, "%-12s %8d %8d %6d %10.1f s   %s died, %s went on; the kernel let go of its %d devices after %.1f s\n",
			f.Form, f.RowsAcked, f.RowsFound, f.RowsAcked-f.RowsFound, f.SecondsToFirstWrite, f.HostKilled, f.HostAfter, f.KernelDevices, f.SecondsToRelease)
	}
	fmt.Fprintln(out)
	switch r.Result {
	case resultOK:
		fmt.Fprintf(out, "Every acknowledged row was there. (%.0f s)\n", r.Seconds)
	case resultMissed:
		fmt.Fprintf(out, "THE DEMO FAILED: every acknowledged row was there, but %s. (%.0f s)\n", r.Error, r.Seconds)
	case resultLost:
		fmt.Fprintf(out, "ACKNOWLEDGED ROWS WERE LOST. (%.0f s)\n", r.Seconds)
		if r.Break != "" {
			fmt.Fprintf(out, "As it should be: this holdfast was built to lose them (%s).\n", r.Break)
		}
	default:
		fmt.Fprintf(out, "The demo could not be carried out: %s\n", r.Error)
	}
}
