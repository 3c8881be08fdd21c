package main

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/cmd/internal/api"
	"github.com/holdfast-storage/holdfast/cmd/internal/api/apipb"
)

// setDuty changes what is expected of a node.
func setDuty(ctx context.Context, client *api.Client, name, duty string, force bool) (*apipb.Node, error) {
	return client.SetNodeDuty(ctx, &apipb.NodeDutyRequest{Name: name, Duty: duty, Force: force})
}

func (c *cli) nodeMaintenance() *cobra.Command {
	return &cobra.Command{
		Use: "maintenance NAME on|off", Short: "Say that a node will be back: nothing is moved away from it", Example: "  holdfast node maintenance h1 on",
		Long: "A node in maintenance may be gone for as long as it takes: its replicas are not made anew elsewhere.\n" +
			"No new replica is placed on it. Volumes attached there stay until they are detached.",
		Args: exactly(2, "a node name, and on or off"),
		RunE: func(cmd *cobra.Command, args []string) error {
			duty, ok := map[string]string{"on": "maintenance", "off": "serving"}[args[1]]
			if !ok {
				return holdfast.Errorf(holdfast.ErrInvalid, "%q is neither on nor off", args[1]).WithRemedy("write holdfast node maintenance %s on", args[0])
			}
			return c.call(cmd, callTimeout, func(ctx context.Context, client *api.Client) error {
				n, err := setDuty(ctx, client, args[0], duty, false)
				if err != nil {
					return err
				}
				return c.show(n, func() { fmt.Fprintf(c.out, "%s: %s\n", n.Name, n.Duty) })
			})
		},
	}
}

func (c *cli) nodeDrain() *cobra.Command {
	var wait time.Duration
	var undo, force bool
	cmd := &cobra.Command{
		Use:   "drain NAME",
		Short: "Move a node's replicas to other nodes",
		Long: `Drain has every replica of the node made anew elsewhere, and removes the node's own once the
new ones are in sync: no volume has fewer in-sync copies meanwhile. Nothing new is placed on
the node until --undo. Replicas of a volume that is not attached are moved when it is.

Volumes attached at the node stay attached, and are not waited for: it lists them, with who uses
each, and how it leaves. Stop or move their containers (docker stop, or in a swarm docker node
update --availability drain NAME): the last one that unmounts a volume detaches it. Others leave
by holdfast volume detach. With --json they are in "attached".

Without --wait it returns at once and the work goes on; asked again it says how far it is.`,
		Example: "  holdfast node drain h1 --wait 1h\n  holdfast node drain h1 --undo",
		Args:    exactly(1, "one node name"),
	}
	f := cmd.Flags()
	f.DurationVar(&wait, "wait", 0, "wait until no replica is left there, with progress; exit 6 after that time")
	f.BoolVar(&undo, "undo", false, "stop, and let the node have replicas again")
	f.BoolVar(&force, "force", false, "although some replica has no other place")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkWait(wait, "--undo", undo); err != nil {
			return err
		}
		return c.call(cmd, wait+callTimeout, func(ctx context.Context, client *api.Client) error {
			duty := "draining"
			if undo {
				duty = "serving"
			}
			n, err := setDuty(ctx, client, args[0], duty, force)
			if err != nil {
				return err
			}
			if n, err = c.drained(ctx, client, n, wait); err != nil {
				return err
			}
			return c.show(n, func() {
				fmt.Fprintf(c.out, "%s: %s, %d replicas, %d volumes attached\n", n.Name, n.Duty, n.Replicas, n.Attachments)
				if len(n.Attached) > 0 && !undo {
					fmt.Fprintf(c.out, "\nA drain does not move what is attached there:\n")
					c.printAttached(n.Attached)
				}
			})
		})
	}
	return cmd
}

// printAttached lists the volumes that a node holds.
func (c *cli) printAttached(list []*apipb.NodeAttachment) {
	t := c.newTable("VOLUME", "USED BY", "TO END IT")
	for _, a := range list {
		t.AppendRow([]any{a.Volume, usedBy(a), a.Remedy})
	}
	t.Render()
}

// usedBy says who uses an attached volume, "-" if its node did not tell.
func usedBy(a *apipb.NodeAttachment) string {
	if !a.Told {
		return "-"
	}
	var users []string
	if a.Mounts > 0 {
		users = append(users, fmt.Sprintf("%d container(s)", a.Mounts))
	}
	if a.Clients > 0 {
		users = append(users, fmt.Sprintf("%d NBD client(s)", a.Clients))
	}
	return cmp.Or(strings.Join(users, ", "), "nobody")
}

// drained waits until a node has no replica, and says how far it is meanwhile.
func (c *cli) drained(ctx context.Context, client *api.Client, n *apipb.Node, wait time.Duration) (*apipb.Node, error) {
	if wait == 0 {
		return n, nil
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	for last := int32(-1); n.Replicas > 0; {
		if n.Replicas != last {
			fmt.Fprintf(c.err, "%s: %d replicas left\n", n.Name, n.Replicas)
			last = n.Replicas
		}
		select {
		case <-time.After(500 * time.Millisecond):
		case <-ctx.Done():
			return nil, holdfast.Errorf(holdfast.ErrTimeout, "node %s still has %d replicas after %v", n.Name, n.Replicas, wait).
				WithRemedy("the work goes on; holdfast volume explain says what a volume waits for")
		}
		next, err := client.InspectNode(ctx, &apipb.NodeRequest{Name: n.Name})
		if err == nil {
			n = next
		} else if ctx.Err() == nil {
			return nil, err
		}
	}
	return n, nil
}

func (c *cli) nodeRemove() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "rm NAME", Short: "Take a node out of the cluster for ever", Example: "  holdfast node rm h1",
		Long: "The node must be down, hold no volume and have no replica: drain it first, or, if it is dead, wait until\n" +
			"its replicas were made anew elsewhere. A replica that a salvage abandoned is made anew nowhere: it keeps\n" +
			"the node until volume salvage goes back to it or drops it. Its id is never taken again: to come back it needs an empty data\n" +
			"directory.",
		Args: exactly(1, "one node name"),
	}
	cmd.Flags().BoolVar(&force, "force", false, "although the node is up")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return c.call(cmd, callTimeout, func(ctx context.Context, client *api.Client) error {
			r, err := client.RemoveNode(ctx, &apipb.NodeRequest{Name: args[0], Force: force})
			if err != nil {
				return err
			}
			return c.show(r, func() { fmt.Fprintln(c.out, args[0]) })
		})
	}
	return cmd
}
