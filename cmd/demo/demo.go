package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/holdfast-storage/holdfast/cmd/internal/lab"
)

// errLost marks the one failure that the demo exists to find.
var errLost = errors.New("acknowledged rows were lost")

// breakages are the defects that can be built in, with the build tag of each.
var breakages = map[string]string{
	"":           "",
	"lose-acked": "holdfast_mutant_lose_acked",
}

type options struct {
	root, binary, breakage, report, name string
	imagesOnly, keep                     bool
	rounds                               int // of the container form, each kills a host
}

// minRows is how many commits must be acknowledged before a host is killed.
const minRows = 1000

// The waits of the demo. Each is far beyond what it takes.
const (
	writeDeadline  = 90 * time.Second  // until minRows are acknowledged
	moveDeadline   = 150 * time.Second // from a host's death to a write elsewhere
	inSyncDeadline = 120 * time.Second // from a host's return to a whole volume
	leftDeadline   = 60 * time.Second  // for the kernel to let go of loop devices
	// releaseDeadline is how long a killed host may keep devices in the kernel. It is
	// less than the silence after which another host takes the volume over (5 s), so
	// that none of the new ones is taken for an old one.
	releaseDeadline = 4500 * time.Millisecond
)

// driver is the name of the volume driver.
const driver = "holdfast"

// diskFlags keep the nodes small: the demo's volumes have 1 GiB each.
var diskFlags = []string{"--disk", lab.DataDir + "/disks/0.img,size=4G,wal=64M", "--ballast", "16M"}

type demo struct {
	options options
	story   *story
	report  *report
	temp    string // holds a binary that was built
	lab     *lab.Lab
	images  lab.Images
	before  []string // what was left on this machine before
}

// run tells the whole story. It returns errLost if rows were lost.
func (d *demo) run(ctx context.Context) error {
	d.story.chapter("Three Docker hosts on this machine")
	binary, err := d.binary(ctx)
	if err != nil {
		return err
	}
	say := func(what string) { d.story.line("%s", what) }
	if d.images, err = lab.BuildImages(ctx, filepath.Join(d.options.root, "images"), binary, say); err != nil {
		return err
	}
	d.story.line("images are there: %s, %s, %s", d.images.Node, d.images.Host, d.images.App)
	if d.options.imagesOnly {
		return nil
	}
	if err := d.startHosts(ctx); err != nil {
		return err
	}
	if err := d.containerForm(ctx); err != nil {
		return err
	}
	if d.options.breakage != "" {
		return nil // one form is enough to show that the demo sees the loss, or not
	}
	return d.swarmForm(ctx)
}

// binary returns the path of a static holdfast binary.
func (d *demo) binary(ctx context.Context) (string, error) {
	if d.options.binary != "" {
		return d.options.binary, nil
	}
	var err error
	if d.temp, err = os.MkdirTemp("", "hfdemo"); err != nil {
		return "", fmt.Errorf("make a directory for the binary: %w", err)
	}
	binary := filepath.Join(d.temp, "holdfast")
	args := []string{"build", "-trimpath", "-ldflags", "-s -w", "-o", binary}
	what := "building holdfast"
	if tag := breakages[d.options.breakage]; tag != "" {
		args = append(args, "-tags", tag)
		what += " with a defect: " + d.options.breakage
	}
	d.story.line("%s", what)
	cmd := exec.CommandContext(ctx, "go", append(args, "./cmd/holdfast")...)
	cmd.Dir, cmd.Env = d.options.root, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build holdfast: %w\n%s", err, out)
	}
	return binary, nil
}

// startHosts makes the hosts and the cluster.
func (d *demo) startHosts(ctx context.Context) error {
	profile, err := lab.Probe(ctx, d.images.Host)
	if err != nil {
		return err
	}
	d.report.Profile = string(profile)
	d.lab, err = lab.Open(ctx, lab.Options{
		Name: d.options.name, Hosts: 3, Images: d.images, Profile: profile,
		Say: func(what string) { d.story.line("%s", what) },
	})
	if err != nil {
		return err
	}
	for _, h := range d.lab.Hosts {
		d.story.line("host %s is up at %s, with a Docker engine of its own", h.Name, h.Address)
	}
	if err := d.lab.StartCluster(ctx, diskFlags...); err != nil {
		return err
	}
	version, err := d.lab.Hosts[0].Holdfast(ctx, "version")
	if err != nil {
		return err
	}
	d.report.Version, _, _ = strings.Cut(version, "\n")
	d.story.line("a holdfast node runs on each: one cluster")
	return nil
}

// docker shows a command on a host and runs it there.
func (d *demo) docker(ctx context.Context, h *lab.Host, args ...string) (string, error) {
	d.story.command(h.Name, append([]string{"docker"}, args...)...)
	return h.Docker(ctx, args...)
}

// killWhileWriting kills a host while rows are being written to a database on it, and
// checks that it was a fair test: enough acknowledged, the last just before the end,
// and some without an answer. It returns when the kill was asked for.
func (d *demo) killWhileWriting(ctx context.Context, w *writing, h *lab.Host, f *form) (time.Time, error) {
	acked, _ := w.ledger.rows()
	d.story.line("%d rows are acknowledged. Killing host %s, all of it, while the client writes", acked, h.Name)
	devices, err := lab.KernelDevices(ctx)
	if err != nil {
		return time.Time{}, err
	}
	devices = slices.DeleteFunc(devices, func(what string) bool { return slices.Contains(d.before, what) })
	killed := time.Now()
	err = h.Kill(ctx)
	w.hostDied()
	if err != nil {
		return killed, err
	}
	if err := d.released(ctx, devices, killed, f); err != nil {
		return killed, fmt.Errorf("after the death of %s: %w", h.Name, err)
	}
	acked, last := w.ledger.rows()
	w.ledger.mu.Lock()
	unanswered, failed := len(w.ledger.unanswered), w.ledger.failed
	w.ledger.mu.Unlock()
	// A kill takes a moment, in which rows may still be acknowledged.
	f.SecondsLastAckToKill = max(0, killed.Sub(last).Seconds())
	f.HostKilled, f.RowsAcked, f.RowsUnanswered = h.Name, acked, unanswered
	switch {
	case failed != nil:
		return killed, fmt.Errorf("the database on %s: %w", h.Name, failed)
	case acked < minRows:
		return killed, fmt.Errorf("only %d rows were acknowledged before the kill, want %d", acked, minRows)
	case f.SecondsLastAckToKill >= 1:
		return killed, fmt.Errorf("the last row was acknowledged %.1f s before the kill, want less than 1", f.SecondsLastAckToKill)
	case unanswered == 0:
		return killed, errors.New("no row was unanswered at the kill")
	}
	d.story.line("host %s is dead: %d rows acknowledged, the last %.2f s before the kill; %d unanswered", h.Name, acked, f.SecondsLastAckToKill, unanswered)
	return killed, nil
}

// released waits until the kernel let go of everything that a killed host had, and
// makes sure that no process hangs.
func (d *demo) released(ctx context.Context, had []string, killed time.Time, f *form) error {
	if f.KernelDevices = len(had); len(had) == 0 {
		return errors.New("the host had no loop device and no FUSE connection before its death: nothing was tried")
	}
	for {
		now, err := lab.KernelDevices(ctx)
		if err != nil {
			return err
		}
		still := slices.DeleteFunc(slices.Clone(had), func(what string) bool { return !slices.Contains(now, what) })
		if len(still) == 0 {
			break
		}
		if time.Since(killed) > releaseDeadline {
			return fmt.Errorf("the kernel still holds %s", strings.Join(still, "; "))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
	f.SecondsToRelease = time.Since(killed).Seconds()
	stuck, err := lab.Stuck(ctx)
	if err == nil && len(stuck) > 0 {
		err = fmt.Errorf("%s", strings.Join(stuck, "; "))
	}
	return err
}

// verify reads the ledger back and compares.
func (d *demo) verify(ctx context.Context, l *ledger, address string, f *form) error {
	a, err := l.check(ctx, address)
	if err != nil {
		return err
	}
	f.RowsFound = a.found
	f.RowsLost = append(f.RowsLost, a.lost[:min(len(a.lost), maxLostListed)]...)
	f.complete = true
	if len(a.lost) > 0 {
		d.story.line("of %d acknowledged rows %d ARE LOST: %v ...", f.RowsAcked, len(a.lost), f.RowsLost)
		return fmt.Errorf("%w: %d of %d", errLost, len(a.lost), f.RowsAcked)
	}
	if len(a.wrong) > 0 {
		return fmt.Errorf("rows without an answer are there with another value: %v", a.wrong)
	}
	d.story.line("every one of %d acknowledged rows is there (and %d of %d unanswered ones)", a.found, a.extra, f.RowsUnanswered)
	return nil
}

// close removes all that the demo made.
func (d *demo) close(ctx context.Context) error {
	if d.temp != "" {
		defer os.RemoveAll(d.temp) //nolint:errcheck // below the system's temporary directory
	}
	if d.lab == nil || d.options.keep {
		return nil
	}
	d.story.chapter("The end")
	err := d.lab.Close(ctx)
	d.story.line("hosts, volumes and network are removed; images stay (docker rmi %s ...)", d.images.Node)
	return err
}

// nothingLeft waits until no more is left on the machine than there was before.
func (d *demo) nothingLeft(ctx context.Context, before []string) error {
	ctx, cancel := context.WithTimeout(ctx, leftDeadline)
	defer cancel()
	for {
		now, err := lab.Leftovers(ctx)
		if err != nil {
			return err
		}
		now = slices.DeleteFunc(now, func(what string) bool { return slices.Contains(before, what) })
		if len(now) == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("left on this machine: %s", strings.Join(now, "; "))
		case <-time.After(500 * time.Millisecond):
		}
	}
}
