package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/cmd/internal/api"
	"github.com/holdfast-storage/holdfast/cmd/internal/api/apipb"
)

func (c *cli) nodeCommand() *cobra.Command {
	return group("node", "List, inspect, drain and remove nodes", c.nodeList(), c.nodeInspect(), c.nodeWhatIfDown(), c.nodeMaintenance(), c.nodeDrain(), c.nodeRemove())
}

func (c *cli) nodeList() *cobra.Command {
	return &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List nodes", Example: "  holdfast node ls",
		Args: exactly(0, "no argument"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.call(cmd, callTimeout, func(ctx context.Context, client *api.Client) error {
				r, err := client.ListNodes(ctx, &apipb.ListNodesRequest{})
				if err != nil {
					return err
				}
				return c.show(r, func() {
					t := c.newTable("NAME", "STATE", "DUTY", "RAFT", "ADDRESS", "DISKS", "REPLICAS", "ATTACHED", "VERSION")
					for _, n := range r.Nodes {
						t.AppendRow([]any{n.Name, n.State, n.Duty, n.Raft, n.Address, len(n.Disks), n.Replicas, n.Attachments, n.Version})
					}
					t.Render()
				})
			})
		},
	}
}

func (c *cli) nodeInspect() *cobra.Command {
	return &cobra.Command{
		Use: "inspect NAME", Short: "Show one node and its disks", Example: "  holdfast node inspect h1 --json",
		Args: exactly(1, "one node name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.call(cmd, callTimeout, func(ctx context.Context, client *api.Client) error {
				n, err := client.InspectNode(ctx, &apipb.NodeRequest{Name: args[0]})
				if err != nil {
					return err
				}
				return c.show(n, func() {
					c.field("name", "%s", n.Name)
					c.field("id", "%s", n.Id)
					c.field("state", "%s", n.State)
					c.field("duty", "%s", n.Duty)
					if n.State == "gone" && n.GoneMillis > 0 {
						c.field("gone for", "%s", seconds(n.GoneMillis))
						if n.Duty != "maintenance" {
							c.field("replicas made anew in", "%s", seconds(n.RebuildInMillis))
						}
					}
					c.field("raft", "%s", n.Raft)
					c.field("address", "%s", n.Address)
					c.field("data address", "%s", n.DataAddress)
					c.field("raft address", "%s", n.RaftAddress)
					c.field("version", "%s", n.Version)
					c.field("labels", "%s", labels(n.Labels))
					c.field("attached", "%d", n.Attachments)
					c.field("replicas", "%d", n.Replicas)
					if len(n.Attached) > 0 {
						fmt.Fprintln(c.out)
						c.printAttached(n.Attached)
					}
					fmt.Fprintln(c.out)
					c.printDisks(n.Disks)
				})
			})
		},
	}
}

func (c *cli) nodeWhatIfDown() *cobra.Command {
	return &cobra.Command{
		Use: "what-if-down NAME", Short: "Say what would be lost if a node went down now", Example: "  holdfast node what-if-down h1",
		Long: "Lists the volumes that would lose redundancy (they go on with fewer copies), writes (fewer than\n" +
			"min_copies), availability (no in-sync copy that answers) or data (the only in-sync copy), as things\n" +
			"stand now. Nothing is changed. Exit 0 whatever the answer.",
		Args: exactly(1, "one node name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.call(cmd, callTimeout, func(ctx context.Context, client *api.Client) error {
				i, err := client.WhatIfDown(ctx, &apipb.NodeRequest{Name: args[0]})
				if err != nil {
					return err
				}
				return c.show(i, func() { c.printImpact(i) })
			})
		},
	}
}

func (c *cli) printImpact(i *apipb.Impact) {
	quorum := "kept"
	if i.QuorumLost {
		quorum = "LOST: nothing could be attached, no silent replica taken out"
	}
	c.field("node", "%s", i.Node)
	c.field("raft quorum", "%s (%d of %d voters left)", quorum, i.VotersLeft, i.Voters)
	if len(i.Volumes) == 0 {
		c.field("volumes", "none would lose anything")
		return
	}
	fmt.Fprintln(c.out)
	t := c.newTable("VOLUME", "LOSES", "IN-SYNC COPIES LEFT", "ATTACHED THERE")
	for _, v := range i.Volumes {
		attached := ""
		if v.Attached {
			attached = "yes: its clients there end"
		}
		t.AppendRow([]any{v.Volume, v.Loses, v.InSyncLeft, attached})
	}
	t.Render()
}

func (c *cli) statusCommand() *cobra.Command {
	var wait time.Duration
	cmd := &cobra.Command{
		Use: "status", Short: "Say how the cluster is; exit 0 only when a volume could be created now",
		Example: "  holdfast status --wait 60s",
		Args:    exactly(0, "no argument"),
	}
	cmd.Flags().DurationVar(&wait, "wait", 0, "wait as long for the cluster to be ready")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := checkWait(wait, "", false); err != nil {
			return err
		}
		s, err := c.readyStatus(cmd, wait)
		if err != nil {
			return err
		}
		if err := c.show(s, func() { c.printStatus(s) }); err != nil {
			return err
		}
		if !s.Ready {
			return holdfast.Errorf(holdfast.ErrUnavailable, "not ready: %s", s.Reason).WithRemedy("wait, or see holdfast node ls")
		}
		return nil
	}
	return cmd
}

// statusPoll is how often status --wait looks again.
const statusPoll = 200 * time.Millisecond

// readyStatus asks for the status until it is ready or the wait is over; then
// the last answer, or the last error, is returned.
func (c *cli) readyStatus(cmd *cobra.Command, wait time.Duration) (*apipb.ClusterStatus, error) {
	deadline := time.Now().Add(wait)
	for {
		var s *apipb.ClusterStatus
		err := c.call(cmd, callTimeout, func(ctx context.Context, client *api.Client) (err error) {
			s, err = client.Status(ctx, &apipb.StatusRequest{})
			return err
		})
		if err == nil && s.Ready || time.Now().After(deadline) || cmd.Context().Err() != nil {
			return s, err
		}
		select {
		case <-time.After(statusPoll):
		case <-cmd.Context().Done():
		}
	}
}

func (c *cli) printStatus(s *apipb.ClusterStatus) {
	for _, w := range s.Warnings {
		fmt.Fprintf(c.out, "warning: %s\n", w)
	}
	ready := "ready"
	if !s.Ready {
		ready = "not ready: " + s.Reason
	}
	c.field("status", "%s", ready)
	c.field("cluster", "%s (level %d)", s.Cluster, s.Level)
	c.field("node", "%s", s.Node)
	c.field("leader", "%s", s.Leader)
	c.field("nodes", "%d, %d up, %d voters", s.Nodes, s.NodesUp, s.Voters)
	c.field("volumes", "%d, %d attached, %d degraded, %d unavailable", s.Volumes, s.VolumesAttached, s.VolumesDegraded, s.VolumesUnavailable)
	c.field("pool", "%s of %s used", size(s.Used), size(s.Size))
	c.field("off", "%s", strings.Join(s.Off, "; "))
	c.field("version", "%s", s.Version)
}
