package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/cmd/internal/api"
	"github.com/holdfast-storage/holdfast/cmd/internal/api/apipb"
)

// callTimeout bounds a call that does not wait by design.
const callTimeout = 30 * time.Second

func (c *cli) volumeCommand() *cobra.Command {
	return group("volume", "Create, list, attach and remove volumes",
		c.volumeCreate(), c.volumeList(), c.volumeInspect(), c.volumeRemove(),
		c.volumeAttach(), c.volumeDetach(), c.volumeUpdate(), c.volumeExplain(), c.volumeSalvage())
}

// call dials, runs f with the usual deadline and closes.
func (c *cli) call(cmd *cobra.Command, timeout time.Duration, f func(context.Context, *api.Client) error) error {
	client, err := c.dial()
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
	defer cancel()
	err = f(ctx, client)
	if errors.Is(err, holdfast.ErrUnavailable) && holdfast.RemedyOf(err) == "" {
		return unreached(client.Address, err)
	}
	return err
}

// unreached says why a daemon could not be asked, without gRPC's words around it.
func unreached(address string, err error) error {
	why := err.Error()
	remedy := "is `holdfast serve` running there? HOLDFAST_ADDRESS or --api names another"
	if _, cause, ok := strings.Cut(why, "Error while dialing: "); ok {
		why = strings.TrimSuffix(cause, `"`)
	} else if _, cause, ok := strings.Cut(why, "error reading server preface: "); ok {
		why = "what answers there is not the API of a node: " + strings.TrimSuffix(cause, `"`)
		remedy = "HOLDFAST_ADDRESS or --api names the node's --address, or unix:///DATA_DIR/control.sock"
	}
	if strings.HasSuffix(why, syscall.EACCES.Error()) {
		remedy = "run it as root, or as the user of `holdfast serve`"
	}
	return holdfast.Errorf(holdfast.ErrUnavailable, "daemon at %s: %s", address, why).WithRemedy("%s", remedy)
}

func (c *cli) volumeCreate() *cobra.Command {
	var raw []string
	cmd := &cobra.Command{
		Use:     "create NAME",
		Short:   "Create a volume",
		Example: "  holdfast volume create data --size 10G --replicas 3\n  holdfast volume create data --opt size=10G --opt label.team=db",
		Args:    exactly(1, "one volume name"),
	}
	f := cmd.Flags()
	own := map[string]*string{}
	for _, o := range [][2]string{
		{"size", "size; without a unit it is GiB (default 10G)"},
		{"replicas", "full copies, on as many nodes (default 3, or the nodes with disks if fewer)"},
		{"fs", "file system made at the first mount: ext4 or xfs (default ext4)"},
		{"mkfs", "extra words for mkfs"},
		{"mount-options", "options for mount -o; not ro, which is said where the volume is used: docker run -v NAME:/PATH:ro"},
		{"labels", "labels, as NAME=VALUE,NAME=VALUE"},
		{"min-copies", "in-sync copies below which writes are held; default 1"},
		{"on-quorum-loss", "what held requests do: freeze (default), or error:30s"},
		{"read-promises", "off: confirm every read by asking the other replicas (default on)"},
		{"pool", "only on disks of this pool, as holdfast disk ls shows them (default any)"},
		{"segment-size", "what is placed and replicated as one; a multiple of 1M (default 64G)"},
	} {
		own[o[0]] = f.String(o[0], "", o[1])
	}
	f.StringArrayVarP(&raw, "opt", "o", nil, "option as KEY=VALUE, as with docker volume create -o")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		name, inline, err := holdfast.ParseInlineName(args[0])
		if err != nil {
			return err
		}
		options := maps.Clone(inline)
		if options == nil {
			options = map[string]string{}
		}
		give := func(k, v string) error {
			if other, twice := options[k]; twice && other != v {
				return holdfast.Errorf(holdfast.ErrInvalid, "option %s is given as %q and as %q", k, other, v).WithRemedy("give it once")
			}
			options[k] = v
			return nil
		}
		for _, pair := range raw {
			k, v, _ := strings.Cut(pair, "=")
			if err := give(k, v); err != nil {
				return err
			}
		}
		for k, v := range own {
			if !f.Changed(k) {
				continue
			}
			if err := give(k, *v); err != nil {
				return err
			}
		}
		if _, err := holdfast.ParseOptions(options); err != nil {
			return err
		}
		return c.call(cmd, callTimeout, func(ctx context.Context, client *api.Client) error {
			v, err := client.CreateVolume(ctx, &apipb.CreateVolumeRequest{Name: name, Options: options})
			if err != nil {
				return err
			}
			return c.show(v, func() {
				fmt.Fprintf(c.out, "%s: %s (%d bytes), %d replica(s), %s\n", v.Name, size(v.Size), v.Size, v.ReplicaCount, v.Fs)
			})
		})
	}
	return cmd
}

func (c *cli) volumeUpdate() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "update NAME",
		Short: "Change a volume's replicas, min_copies and policies, also while it is attached",
		Long: `Changes what is not fixed when a volume is made. More replicas are placed and filled, fewer
are taken out, in the background: a volume is whole again when inspect shows as many
in-sync as asked for. read_promises takes effect at the next attach, the rest at once.`,
		Example: "  holdfast volume update data --replicas 3 --min-copies 2\n  holdfast volume update data --on-quorum-loss error:30s",
		Args:    exactly(1, "one volume name"),
	}
	f := cmd.Flags()
	own := map[string]*string{}
	for _, o := range [][2]string{
		{"replicas", "full copies, on as many nodes"},
		{"min-copies", "in-sync copies below which writes are held"},
		{"on-quorum-loss", "what held requests do: freeze, or error:30s"},
		{"read-promises", "on or off, from the next attach"},
	} {
		own[o[0]] = f.String(o[0], "", o[1])
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		options := map[string]string{}
		for k, v := range own {
			if f.Changed(k) {
				options[strings.ReplaceAll(k, "-", "_")] = *v
			}
		}
		if len(options) == 0 {
			return holdfast.Errorf(holdfast.ErrInvalid, "nothing to change").WithRemedy("give one of --replicas, --min-copies, --on-quorum-loss, --read-promises")
		}
		if _, err := holdfast.ParseOptions(options); err != nil {
			return err
		}
		return c.call(cmd, callTimeout, func(ctx context.Context, client *api.Client) error {
			v, err := client.UpdateVolume(ctx, &apipb.UpdateVolumeRequest{Name: args[0], Options: options})
			if err != nil {
				return err
			}
			return c.show(v, func() {
				fmt.Fprintf(c.out, "%s: %d replica(s) (%s in sync), min_copies %d, on_quorum_loss %s, read_promises %s\n", v.Name, v.ReplicaCount, inSync(v), v.MinCopies, v.OnQuorumLoss, v.ReadPromises)
			})
		})
	}
	return cmd
}

func (c *cli) volumeList() *cobra.Command {
	return &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List volumes", Example: "  holdfast volume ls --json",
		Long: "USED is what the data takes in one copy, not times the replicas, wherever they are: chunks of 64 KiB that\n" +
			"were written and not trimmed, of each segment in its fullest in-sync replica. The nodes are asked for it,\n" +
			"for two seconds at most. It is \"-\", null as JSON, while no node answers that has an in-sync replica.\n" +
			"What a replica takes of its own disk, volume inspect shows.",
		Args: exactly(0, "no argument"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.call(cmd, callTimeout, func(ctx context.Context, client *api.Client) error {
				r, err := client.ListVolumes(ctx, &apipb.ListVolumesRequest{})
				if err != nil {
					return err
				}
				return c.show(r, func() {
					t := c.newTable("NAME", "SIZE", "USED", "STATE", "NODE", "IN-SYNC")
					for _, v := range r.Volumes {
						t.AppendRow([]any{v.Name, size(v.Size), used(v), v.State, v.Node, inSync(v)})
					}
					t.Render()
				})
			})
		},
	}
}

// used is what a volume takes, "-" if nobody could tell.
func used(v *apipb.Volume) string {
	if v.Used == nil {
		return "-"
	}
	return size(*v.Used)
}

// inSync says how many replicas are in sync, over all segments, of how many
// there should be.
func inSync(v *apipb.Volume) string {
	segments, n := map[uint32]bool{}, 0
	for _, r := range v.Replicas {
		segments[r.Segment] = true
		if r.State == string(holdfast.RoleInSync) {
			n++
		}
	}
	return fmt.Sprintf("%d/%d", n, max(1, len(segments))*int(v.ReplicaCount))
}

func (c *cli) volumeInspect() *cobra.Command {
	return &cobra.Command{
		Use: "inspect NAME", Short: "Show one volume and its replicas", Example: "  holdfast volume inspect data --json",
		Long: "USED is what a replica's chunks take of its disk. DISK ALLOCATED and DISK RECLAIMABLE are of its whole\n" +
			"disk, with the replicas of other volumes on it: what its image takes of its file system, and what of that\n" +
			"is free with the next checkpoint, as what was trimmed or deleted. Of a replica whose node does not answer\n" +
			"they are not known.",
		Args: exactly(1, "one volume name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.call(cmd, callTimeout, func(ctx context.Context, client *api.Client) error {
				v, err := client.InspectVolume(ctx, &apipb.VolumeRequest{Name: args[0]})
				if err != nil {
					return err
				}
				return c.show(v, func() { c.printVolume(v) })
			})
		},
	}
}

func (c *cli) printVolume(v *apipb.Volume) {
	c.field("name", "%s", v.Name)
	c.field("id", "%s", v.Id)
	c.field("size", "%s (%d bytes)", size(v.Size), v.Size)
	if v.Used != nil {
		c.field("used", "%s (%d bytes)", size(*v.Used), *v.Used)
	} else {
		c.field("used", "-, no node answers that has an in-sync replica")
	}
	c.field("state", "%s", v.State)
	c.field("node", "%s", v.Node)
	c.field("epoch", "%d", v.Epoch)
	c.field("file system", "%s (%s)", v.Fs, v.FsState)
	c.field("mkfs", "%s", v.Mkfs)
	c.field("mount options", "%s", v.MountOptions)
	c.field("labels", "%s", labels(v.Labels))
	c.field("pool", "%s", v.Pool)
	c.field("device", "%s", v.Device)
	c.field("uri", "%s", v.Uri)
	if len(v.Mounts) > 0 {
		c.field("mountpoint", "%s (%d mounts)", v.Mountpoint, len(v.Mounts))
	}
	c.field("in sync", "%s", inSync(v))
	if r := v.Repair; r != nil && r.Node != "" {
		c.field("repair", "by %s for %s, %s", r.Node, seconds(r.SinceMillis), cmp.Or(r.WaitsFor, "see explain"))
	} else if r != nil {
		c.field("repair", "%d tries did not do everything, the last: %s", r.Tries, r.Why)
	}
	fmt.Fprintln(c.out)
	t := c.newTable("SEGMENT", "NODE", "STATE", "TAIL", "DURABLE", "USED", "TO SYNC", "DISK ALLOCATED", "DISK RECLAIMABLE", "DISK")
	for _, r := range v.Replicas {
		state := r.State
		if r.Leaving {
			state += ", leaving"
		}
		t.AppendRow([]any{r.Segment, r.Node, state, r.Tail, r.Durable, known(r.Used, r.Served), size(r.BytesToSync),
			known(r.DiskAllocated, r.Served), known(r.DiskReclaimable, r.Served), r.Disk})
	}
	t.Render()
}

func (c *cli) volumeRemove() *cobra.Command {
	return &cobra.Command{
		Use: "rm NAME [NAME...]", Short: "Remove volumes and their data", Example: "  holdfast volume rm data",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return exactly(1, "one volume name or more")(cmd, args)
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.call(cmd, callTimeout, func(ctx context.Context, client *api.Client) error {
				for _, name := range args {
					r, err := client.RemoveVolume(ctx, &apipb.VolumeRequest{Name: name})
					if err != nil {
						return err
					}
					if err := c.show(r, func() { fmt.Fprintln(c.out, name) }); err != nil {
						return err
					}
				}
				return nil
			})
		},
	}
}

func (c *cli) volumeAttach() *cobra.Command {
	var nbd, force bool
	var wait time.Duration
	cmd := &cobra.Command{
		Use:   "attach NAME",
		Short: "Make the addressed node the volume's holder",
		Long: `Attach makes the addressed node the volume's holder: the one node that may write.
The attachment belongs to the daemon; this command prints it and exits. It ends by
detach, or when another node takes it over after this one died.`,
		Example: "  holdfast volume attach data --nbd\n  fio --ioengine=nbd --uri=\"$(holdfast volume attach data --nbd --json | jq -r .uri)\" ...",
		Args:    exactly(1, "one volume name"),
	}
	cmd.Flags().BoolVar(&nbd, "nbd", false, "export over NBD only, no kernel device")
	cmd.Flags().DurationVar(&wait, "wait", 60*time.Second, "how long to wait while its holder may be gone")
	cmd.Flags().BoolVar(&force, "force", false, "fence a live holder: its clients see I/O errors")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkWait(wait, "", false); err != nil {
			return err
		}
		return c.call(cmd, wait+callTimeout, func(ctx context.Context, client *api.Client) error {
			stream, err := client.AttachVolume(ctx, &apipb.AttachVolumeRequest{Name: args[0], Nbd: nbd, WaitMillis: wait.Milliseconds(), Force: force})
			if err != nil {
				return api.FromStatus(err)
			}
			for {
				p, err := stream.Recv()
				if errors.Is(err, io.EOF) {
					return holdfast.Errorf(holdfast.ErrInternal, "attach %s: the daemon ended without an answer", args[0])
				}
				if err != nil {
					return api.FromStatus(err)
				}
				if a := p.Attachment; a != nil {
					return c.show(a, func() {
						c.attachField("volume", a.Volume)
						c.attachField("node", a.Node)
						c.attachField("epoch", fmt.Sprint(a.Epoch))
						c.attachField("device", a.Device)
						c.attachField("uri", a.Uri)
					})
				}
				fmt.Fprintf(c.err, "waiting: %s\n", p.Waiting)
			}
		})
	}
	return cmd
}

// attachField writes one line of attach's output; scripts read it as NAME: VALUE.
func (c *cli) attachField(name, value string) { fmt.Fprintf(c.out, "%s: %s\n", name, value) }

func (c *cli) volumeDetach() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "detach NAME", Short: "End a volume's attachment, from any node", Example: "  holdfast volume detach data",
		Args: exactly(1, "one volume name"),
	}
	cmd.Flags().BoolVar(&force, "force", false, "although a client or a mount is open: they see I/O errors")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return c.call(cmd, 2*callTimeout, func(ctx context.Context, client *api.Client) error {
			r, err := client.DetachVolume(ctx, &apipb.DetachVolumeRequest{Name: args[0], Force: force})
			if err != nil {
				return err
			}
			return c.show(r, func() {
				if r.Node == "" {
					fmt.Fprintf(c.out, "%s was not attached\n", args[0])
					return
				}
				fmt.Fprintf(c.out, "%s detached from %s\n", args[0], r.Node)
			})
		})
	}
	return cmd
}

func (c *cli) volumeExplain() *cobra.Command {
	return &cobra.Command{
		Use: "explain NAME", Short: "Say who holds a volume, and what it waits for and why", Example: "  holdfast volume explain data",
		Args: exactly(1, "one volume name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.call(cmd, callTimeout, func(ctx context.Context, client *api.Client) error {
				e, err := client.ExplainVolume(ctx, &apipb.VolumeRequest{Name: args[0]})
				if err != nil {
					return err
				}
				return c.show(e, func() {
					for _, line := range e.Lines {
						fmt.Fprintln(c.out, line)
					}
					for _, w := range e.Waits {
						limit := ""
						if w.LimitMillis > 0 {
							limit = ", gives up after " + seconds(w.LimitMillis)
						}
						fmt.Fprintf(c.out, "waiting (segment %d): %s, for %s%s\n", w.Segment, w.Reason, seconds(w.SinceMillis), limit)
					}
				})
			})
		},
	}
}
