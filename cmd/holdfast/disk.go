package main

import (
	"cmp"
	"context"
	"fmt"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/cmd/internal/api"
	"github.com/holdfast-storage/holdfast/cmd/internal/api/apipb"
	"github.com/holdfast-storage/holdfast/cmd/internal/reconcile"
)

func (c *cli) diskCommand() *cobra.Command {
	return group("disk", "Add, list, inspect, scrub, check and remove disks", c.diskList(), c.diskInspect(), c.diskAdd(), c.diskRemove(), c.diskScrub(), c.diskFsck())
}

func (c *cli) diskList() *cobra.Command {
	var node string
	cmd := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List the disks of the cluster", Example: "  holdfast disk ls --node h1",
		Long: "USED is what data and map take, ALLOCATED what the image takes of its file system, besides its log,\n" +
			"RECLAIMABLE what of USED is free with the next checkpoint. FREE is of the disk or, of an image, what its\n" +
			"file system has left for it, if that is less: up to where new space is refused, and shared by the images\n" +
			"of its node on it. By that volumes are placed. FULL is of the disk or, if that is fuller, of\n" +
			"the file system that its image is on: from 85 % the node warns, from 92 % nothing is promised to\n" +
			"writers ahead of need, from 97 % what needs new space is refused. Of a node that does not answer only\n" +
			"what raft knows is shown, and SIZE is what the disk can have: USED and FREE.",
		Args: exactly(0, "no argument"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.call(cmd, callTimeout, func(ctx context.Context, client *api.Client) error {
				r, err := client.ListDisks(ctx, &apipb.ListDisksRequest{Node: node})
				if err != nil {
					return err
				}
				return c.show(r, func() { c.printDisks(r.Disks) })
			})
		},
	}
	cmd.Flags().StringVar(&node, "node", "", "only this node's")
	return cmd
}

func (c *cli) printDisks(disks []*apipb.Disk) {
	t := c.newTable("NODE", "PATH", "STATE", "POOL", "SIZE", "USED", "ALLOCATED", "RECLAIMABLE", "FREE", "FULL", "REPLICAS", "ID")
	for _, d := range disks {
		t.AppendRow([]any{d.Node, d.Path, diskState(d), d.Pool, size(d.Size), size(d.Used), known(d.Allocated, d.Open), known(d.Reclaimable, d.Open), size(d.Free), full(d), d.Replicas, d.Id})
	}
	t.Render()
}

// full is how full a disk is, and which watermark that has reached.
func full(d *apipb.Disk) string {
	if d.Watermark == 0 {
		return fmt.Sprintf("%d %%", d.FullPercent)
	}
	return fmt.Sprintf("%d %% (above %d)", d.FullPercent, d.Watermark)
}

// known is a size, or nothing where nobody told it.
func known(n int64, is bool) string {
	if !is {
		return ""
	}
	return size(n)
}

// diskState is a disk's state in one word or two.
func diskState(d *apipb.Disk) string {
	switch {
	case d.Removed:
		return "removed"
	case d.Leaving && d.State == string(holdfast.DiskOK):
		return "leaving"
	case d.Leaving:
		return d.State + ", leaving"
	}
	return d.State
}

func (c *cli) diskInspect() *cobra.Command {
	return &cobra.Command{
		Use: "inspect ID", Short: "Show one disk, what is on it, and its last scrub", Example: "  holdfast disk inspect 3f2a --json",
		Args: exactly(1, "one disk id, or the beginning of one"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.call(cmd, callTimeout, func(ctx context.Context, client *api.Client) error {
				d, err := client.InspectDisk(ctx, &apipb.DiskRequest{Id: args[0]})
				if err != nil {
					return err
				}
				return c.show(d, func() { c.printDisk(d) })
			})
		},
	}
}

func (c *cli) printDisk(d *apipb.Disk) {
	c.field("id", "%s", d.Id)
	c.field("node", "%s", d.Node)
	c.field("path", "%s", d.Path)
	c.field("state", "%s", diskState(d))
	c.field("reason", "%s", d.Reason)
	c.field("pool", "%s", d.Pool)
	c.field("opened", "%d times", d.OpenCount)
	c.field("size", "%s", size(d.Size))
	c.field("used", "%s (%d bytes)", size(d.Used), d.Used)
	if d.FreeHost {
		c.field("free", "%s, what the file system of its image has left", size(d.Free))
	} else {
		c.field("free", "%s", size(d.Free))
	}
	if d.FullHost {
		c.field("full", "%s, the file system of its image", full(d))
	} else {
		c.field("full", "%s", full(d))
	}
	if !d.Open {
		c.field("open", "no: its node does not answer, or could not open it")
	} else {
		c.field("of that, map", "%s", size(d.MapSize))
		c.field("reclaimable", "%s (%d bytes), with the next checkpoint", size(d.Reclaimable), d.Reclaimable)
		c.field("allocated", "%s (%d bytes), besides the log", size(d.Allocated), d.Allocated)
		c.field("reserved", "%s, for what is logged", size(d.Reserved))
		c.field("log", "%s, %s in use", size(d.WalSize), size(d.WalUsed))
		c.field("bad blocks", "%d, and %d that are lost; found %d and repaired %d since it was opened", d.BadBlocks, d.LostBlocks, d.BlocksFound, d.BlocksRepaired)
		c.printScrub(d.Scrub)
	}
	if d.Leaving && !d.Removed {
		c.field("to be moved", "%d replicas, %s", d.Replicas, size(d.Left))
	}
	if len(d.OnIt) == 0 {
		return
	}
	fmt.Fprintln(c.out)
	t := c.newTable("VOLUME", "SEGMENT", "STATE", "SIZE", "USED", "BAD BLOCKS", "REPLICA")
	for _, r := range d.OnIt {
		t.AppendRow([]any{r.Volume, r.Segment, r.State, size(r.Size), known(r.Used, d.Open), r.BadBlocks, r.Id})
	}
	t.Render()
}

func (c *cli) printScrub(s *apipb.Scrub) {
	if s == nil {
		return
	}
	at := func(unix int64) string { return time.Unix(unix, 0).UTC().Format(time.RFC3339) }
	found := fmt.Sprintf("%d bad blocks, %d lost", s.BadBlocks, s.LostBlocks)
	switch {
	case s.Running:
		c.field("scrub", "runs since %s, %s of %s, %s", at(s.Began), size(s.Done), size(s.Total), found)
	case s.Began == 0:
		c.field("scrub", "none since the node started")
	case s.Error != "":
		c.field("scrub", "ended at %s after %s of %s: %s", at(s.Ended), size(s.Done), size(s.Total), s.Error)
	default:
		c.field("scrub", "%s, %s read, %s", at(s.Ended), size(s.Done), found)
	}
	if s.Next != 0 && !s.Running {
		c.field("next scrub", "%s", at(s.Next))
	}
}

func (c *cli) diskAdd() *cobra.Command {
	var node string
	var force bool
	cmd := &cobra.Command{
		Use:   "add PATH[,size=10G][,pool=ssd][,wal=256M]",
		Short: "Claim a device or an image file on a running node",
		Long: `Add makes a disk of a block device, or of an image file, and opens it, now and after every
restart of its node. An image that is not there is made with size= bytes, sparse, with its log
beside it in PATH.wal; the directory must exist. pool= names the pool that volumes are placed on
by --pool; without it that is ssd or hdd, as the kernel calls the device.

It refuses what carries a file system, a partition table, swap, LUKS, LVM, RAID or another
cluster's disk, and says which; --force overwrites it. What is mounted or in use is refused
always, and an image larger than its file system can hold. This node's own disk is opened as it
is, also with --force.`,
		Example: "  holdfast disk add /dev/nvme1n1\n  holdfast disk add /srv/holdfast/b.img,size=500G,pool=archive --node h2",
		Args:    exactly(1, "one disk: PATH[,size=10G][,pool=ssd][,wal=256M]"),
	}
	cmd.Flags().StringVar(&node, "node", "", "on this node (default the one that is asked)")
	cmd.Flags().BoolVar(&force, "force", false, "although the target holds something; it is lost")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		spec := args[0]
		if _, err := reconcile.ParseDisk("disk", spec); err != nil {
			return err
		}
		if !filepath.IsAbs(spec) {
			if node != "" {
				return holdfast.Errorf(holdfast.ErrInvalid, "%q is not an absolute path, and lies on another node", spec).WithRemedy("begin it with /")
			}
			abs, err := filepath.Abs(spec) // only the path is before the first comma, and Abs changes nothing else
			if err != nil {
				return holdfast.Errorf(holdfast.ErrInvalid, "%q: %w", spec, err)
			}
			spec = abs
		}
		return c.call(cmd, addTimeout, func(ctx context.Context, client *api.Client) error {
			d, err := client.AddDisk(ctx, &apipb.AddDiskRequest{Node: node, Spec: spec, Force: force})
			if err != nil {
				return err
			}
			return c.show(d, func() {
				fmt.Fprintf(c.out, "%s: %s on %s, pool %s, %s\n", d.Id, d.Path, d.Node, cmp.Or(d.Pool, "none"), size(d.Size))
			})
		})
	}
	return cmd
}

// addTimeout is for the log of a new disk, up to 2 GiB, to be written by a slow one.
const addTimeout = 5 * time.Minute

func (c *cli) diskRemove() *cobra.Command {
	var wait time.Duration
	var undo, force bool
	cmd := &cobra.Command{
		Use:   "rm ID",
		Short: "Move what is on a disk to other disks, and let it go",
		Long: `Rm has every replica of the disk made anew on other disks, of other nodes or of its own, and
removes its own once the new ones are in sync: no volume has fewer in-sync copies meanwhile. Then
the disk is erased, closed and forgotten: its device, or its image and PATH.wal, can be used for
something else or deleted, and --disk of its node does not open it again. Its id is never taken
again.

It is refused if a replica has nowhere to go. The disk of a node that is gone for ever is removed
in the same way, once its replicas were made anew.

Without --wait it returns at once and the work goes on; asked again, or with disk inspect, it says
how far it is.`,
		Example: "  holdfast disk rm 3f2a --wait 1h\n  holdfast disk rm 3f2a --undo",
		Args:    exactly(1, "one disk id, or the beginning of one"),
	}
	f := cmd.Flags()
	f.DurationVar(&wait, "wait", 0, "wait until it is removed, with progress; exit 6 after that time")
	f.BoolVar(&undo, "undo", false, "let it stay")
	f.BoolVar(&force, "force", false, "although some replica has no other place: move what can be moved")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkWait(wait, "--undo", undo); err != nil {
			return err
		}
		return c.call(cmd, wait+callTimeout, func(ctx context.Context, client *api.Client) error {
			d, err := client.RemoveDisk(ctx, &apipb.RemoveDiskRequest{Id: args[0], Undo: undo, Force: force})
			if err != nil {
				return err
			}
			if wait > 0 {
				if d, err = c.followDisk(ctx, client, d, wait, "it is removed", func(d *apipb.Disk) (string, bool) {
					return fmt.Sprintf("%d replicas left, %s", d.Replicas, size(d.Left)), d.Removed
				}); err != nil {
					return err
				}
			}
			return c.show(d, func() { fmt.Fprintf(c.out, "%s: %s, %d replicas\n", d.Id, diskState(d), d.Replicas) })
		})
	}
	return cmd
}

// followDisk asks how a disk is until it is done, and says so on stderr when it
// changes.
func (c *cli) followDisk(ctx context.Context, client *api.Client, d *apipb.Disk, wait time.Duration, what string, look func(*apipb.Disk) (string, bool)) (*apipb.Disk, error) {
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	for last := ""; ; {
		text, done := look(d)
		if done {
			return d, nil
		}
		if text != last {
			fmt.Fprintf(c.err, "%s: %s\n", d.Id, text)
			last = text
		}
		select {
		case <-time.After(500 * time.Millisecond):
		case <-ctx.Done():
			return nil, holdfast.Errorf(holdfast.ErrTimeout, "disk %s: %s, and after %v not yet: %s", d.Id, text, wait, what).
				WithRemedy("the work goes on; see holdfast disk inspect, and holdfast volume explain for what a volume waits for")
		}
		next, err := client.InspectDisk(ctx, &apipb.DiskRequest{Id: d.Id})
		if err == nil {
			d = next
		} else if ctx.Err() == nil {
			return nil, err
		}
	}
}

func (c *cli) diskScrub() *cobra.Command {
	var rate string
	var wait time.Duration
	var stop bool
	cmd := &cobra.Command{
		Use:   "scrub ID",
		Short: "Read a disk in use, whole, and compare it with its checksums",
		Long: `Scrub reads every block of data of a disk past the page cache, at a bounded rate and behind the
work of its users, and compares it with its checksum. What does not match is mended from another
in-sync replica while its volume is attached. Every disk is scrubbed once a week by itself.

Without --wait it returns at once, and disk inspect says how far it is; with it, exit 7 says that
blocks were found bad or lost. One that runs already goes on as it is.`,
		Example: "  holdfast disk scrub 3f2a --rate 256M --wait 1h\n  holdfast disk scrub 3f2a --stop",
		Args:    exactly(1, "one disk id, or the beginning of one"),
	}
	f := cmd.Flags()
	f.StringVar(&rate, "rate", "", "read at most so much a second, as in 256M (default 64M)")
	f.DurationVar(&wait, "wait", 0, "wait until all is read, with progress; exit 6 after that time")
	f.BoolVar(&stop, "stop", false, "end the one that runs")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkWait(wait, "--stop", stop); err != nil {
			return err
		}
		req := &apipb.ScrubDiskRequest{Id: args[0], Stop: stop}
		if f.Changed("rate") {
			if stop {
				return holdfast.Errorf(holdfast.ErrInvalid, "--rate %s and --stop are both given", rate).WithRemedy("give one of them")
			}
			var err error
			if req.Rate, err = holdfast.ParseSize(rate); err != nil {
				return holdfast.Errorf(holdfast.ErrInvalid, "--rate %q is not a number of bytes a second", rate).WithRemedy("write for example --rate 256M")
			}
			if req.Rate == 0 {
				return holdfast.Errorf(holdfast.ErrInvalid, "--rate %s is nothing", rate).WithRemedy("give at least 1M")
			}
		}
		return c.call(cmd, wait+callTimeout, func(ctx context.Context, client *api.Client) error {
			d, err := client.ScrubDisk(ctx, req)
			if err != nil {
				return err
			}
			if wait > 0 {
				if d, err = c.followDisk(ctx, client, d, wait, "it is scrubbed", func(d *apipb.Disk) (string, bool) {
					return fmt.Sprintf("%s of %s", size(d.Scrub.GetDone()), size(d.Scrub.GetTotal())), !d.Scrub.GetRunning()
				}); err != nil {
					return err
				}
			}
			if err := c.show(d, func() { c.printScrub(d.Scrub) }); err != nil || wait == 0 {
				return err
			}
			return scrubbed(d)
		})
	}
	return cmd
}

// scrubbed says how a scrub ended.
func scrubbed(d *apipb.Disk) error {
	s := d.Scrub
	switch {
	case s == nil: // its node stopped answering
		return holdfast.Errorf(holdfast.ErrUnavailable, "node %s does not answer", d.Node)
	case s.Error != "":
		return holdfast.Errorf(holdfast.ErrIO, "disk %s: %s", d.Id, s.Error)
	case s.BadBlocks+s.LostBlocks > 0:
		return holdfast.Errorf(holdfast.ErrIntegrity, "disk %s: %d blocks do not match their checksums, %d are lost", d.Id, s.BadBlocks, s.LostBlocks).
			WithRemedy("they are mended from in-sync replicas while their volumes are attached; see holdfast disk inspect %s", d.Id)
	}
	return nil
}
