package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/spf13/cobra"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/disk"
	"github.com/holdfast-storage/holdfast/blockdev/vfs"
)

func (c *cli) diskFsck() *cobra.Command {
	return &cobra.Command{
		Use:   "fsck PATH",
		Short: "Read a disk that nobody uses, whole, and compare it with its checksums",
		Long: `fsck reads the superblocks, the log, the map and every block of data of a disk or image
that no daemon has open, past the page cache, and compares all of it with the checksums
it was written with. It writes nothing and needs no daemon.

It exits 0 if all is well, and 7 if anything is not as it was written. What is bad is
repaired by the daemon from the other replicas; a replica without any is brought back by
removing it and letting it be made anew.`,
		Example: "  holdfast disk fsck /var/lib/holdfast/disks/a.img\n  holdfast disk fsck /dev/sdb --json",
		Args:    exactly(1, "the path of one disk or image"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := isDisk(args[0]); err != nil {
				return err
			}
			var progress func(done, total int64)
			if f, ok := c.err.(*os.File); ok && isTerminal(f) {
				progress = func(done, total int64) {
					fmt.Fprintf(c.err, "\r%s of %s compared", size(done), size(total))
				}
			}
			r, err := disk.Check(cmd.Context(), vfs.OS{}, args[0], progress)
			if progress != nil {
				fmt.Fprint(c.err, "\r\033[K")
			}
			if err != nil {
				return err
			}
			if c.json {
				enc := json.NewEncoder(c.out)
				enc.SetIndent("", "  ")
				if err := enc.Encode(fsckJSON(args[0], r)); err != nil {
					return err
				}
			} else {
				c.printFsck(args[0], r)
			}
			if r.Found > 0 {
				return holdfast.Errorf(holdfast.ErrIntegrity, "disk %s: %d findings", args[0], r.Found).
					WithRemedy("start its daemon, which repairs from other replicas; holdfast volume inspect says which are in sync")
			}
			return nil
		},
	}
}

// isDisk refuses what cannot be a disk, before its first byte is read.
func isDisk(path string) error {
	info, err := os.Stat(path)
	switch {
	case path == "":
		return holdfast.Errorf(holdfast.ErrInvalid, "the path is empty").WithRemedy("holdfast disk ls shows the paths of a node's disks")
	case errors.Is(err, fs.ErrNotExist):
		return holdfast.Errorf(holdfast.ErrNotFound, "%s is not there", path).WithRemedy("holdfast disk ls shows the paths of a node's disks")
	case err != nil:
		return holdfast.Errorf(holdfast.ErrInvalid, "disk %s: %w", path, err)
	case info.Mode().IsRegular(), info.Mode()&fs.ModeType == fs.ModeDevice:
	default:
		return holdfast.Errorf(holdfast.ErrInvalid, "%s is neither a file nor a block device", path).WithRemedy("holdfast disk ls shows the paths of a node's disks")
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrPermission) {
		return holdfast.Errorf(holdfast.ErrInvalid, "disk %s: %w", path, err).WithRemedy("run it as root")
	}
	if err != nil {
		return nil //nolint:nilerr // the check says it better
	}
	return f.Close()
}

func (c *cli) printFsck(path string, r *disk.CheckReport) {
	c.field("path", "%s", path)
	c.field("disk", "%s", r.Disk)
	c.field("cluster", "%s", r.Cluster)
	c.field("node", "%s", r.Node)
	c.field("format", "version %d, opened %d times", r.Version, r.OpenCount)
	c.field("size", "%s, %s in use", size(r.Size), size(r.Used))
	c.field("log", "%s, %d records", size(r.WALSize), r.Records)
	if len(r.Replicas) > 0 {
		fmt.Fprintln(c.out)
		t := c.newTable("REPLICA", "VOLUME", "SEGMENT", "MAPPED", "LAST ENTRY", "BLOCKS", "BAD", "LOST")
		for _, x := range r.Replicas {
			t.AppendRow([]any{x.Replica, x.Segment.Volume, x.Segment.Index, size(x.Mapped), x.Tail, x.Blocks, x.Bad, x.Poisoned})
		}
		t.Render()
	}
	if r.Found == 0 {
		fmt.Fprintln(c.out, "\nall as it was written")
		return
	}
	fmt.Fprintln(c.out)
	t := c.newTable("WHERE", "REPLICA", "OFFSET", "LENGTH", "WHAT")
	for _, f := range r.Findings {
		replica := ""
		if !f.Replica.IsZero() {
			replica = f.Replica.String()
		}
		t.AppendRow([]any{f.Where, replica, f.Offset, f.Length, f.What})
	}
	t.Render()
	if more := r.Found - len(r.Findings); more > 0 {
		fmt.Fprintf(c.out, "and %d more\n", more)
	}
}

// The JSON of fsck: sizes in bytes, offsets within the segment.
type (
	fsckReport struct {
		Path      string        `json:"path"`
		Disk      string        `json:"disk"`
		Cluster   string        `json:"cluster"`
		Node      string        `json:"node"`
		Version   uint32        `json:"version"`
		OpenCount uint64        `json:"open_count"`
		Size      int64         `json:"size"`
		Used      int64         `json:"used"`
		LogSize   int64         `json:"log_size"`
		Records   int           `json:"log_records"`
		BytesRead int64         `json:"bytes_read"`
		Replicas  []fsckReplica `json:"replicas"`
		Found     int           `json:"found"`
		Findings  []fsckFinding `json:"findings"`
	}
	fsckReplica struct {
		Replica    string `json:"replica"`
		Volume     string `json:"volume"`
		Segment    uint32 `json:"segment"`
		Size       int64  `json:"size"`
		Mapped     int64  `json:"mapped"`
		Tail       uint64 `json:"tail"`
		Checkpoint uint64 `json:"checkpoint"`
		Blocks     int64  `json:"blocks"`
		Bad        int64  `json:"bad_blocks"`
		Lost       int64  `json:"lost_blocks"`
		Damaged    string `json:"damaged"`
	}
	fsckFinding struct {
		Where   string `json:"where"`
		Replica string `json:"replica"`
		Offset  int64  `json:"offset"`
		Length  int64  `json:"length"`
		What    string `json:"what"`
	}
)

func fsckJSON(path string, r *disk.CheckReport) fsckReport {
	out := fsckReport{
		Path: path, Disk: r.Disk.String(), Cluster: r.Cluster.String(), Node: r.Node.String(), Version: r.Version, OpenCount: uint64(r.OpenCount),
		Size: r.Size, Used: r.Used, LogSize: r.WALSize, Records: r.Records, BytesRead: r.BytesRead, Found: r.Found,
		Replicas: []fsckReplica{}, Findings: []fsckFinding{},
	}
	for _, x := range r.Replicas {
		out.Replicas = append(out.Replicas, fsckReplica{
			Replica: x.Replica.String(), Volume: x.Segment.Volume.String(), Segment: x.Segment.Index, Size: x.Size, Mapped: x.Mapped,
			Tail: uint64(x.Tail), Checkpoint: uint64(x.Checkpoint), Blocks: x.Blocks, Bad: x.Bad, Lost: x.Poisoned, Damaged: x.Damaged,
		})
	}
	for _, f := range r.Findings {
		replica := ""
		if !f.Replica.IsZero() {
			replica = f.Replica.String()
		}
		out.Findings = append(out.Findings, fsckFinding{Where: f.Where, Replica: replica, Offset: f.Offset, Length: f.Length, What: f.What})
	}
	return out
}
