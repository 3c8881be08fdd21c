package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/cmd/internal/api"
	"github.com/holdfast-storage/holdfast/cmd/internal/api/apipb"
)

func (c *cli) volumeSalvage() *cobra.Command {
	req := &apipb.SalvageRequest{}
	cmd := &cobra.Command{
		Use:   "salvage NAME",
		Short: "Go on from a replica that is not in sync, and accept the loss",
		Long: `When no in-sync replica of a volume can be had any more, salvage makes another one the
only one in sync: what was written after that fell behind is lost, and every client's
session is void. Without --replica it lists what there is to choose from, changes
nothing and exits 5.

The replicas that are not chosen become orphans. They are kept as they are, on their
disks, until they are dropped (--drop-orphans) or the volume is removed; while they are
kept, a later salvage can go back to one of them. They are never merged.

The nodes of the in-sync replicas must be dead, or at least not in use: a holder that
is alive and cut off goes on serving its clients until it hears of the salvage, and
what they write is lost.`,
		Example: "  holdfast volume salvage data\n" +
			"  holdfast volume salvage data --replica h2 --accept-loss\n" +
			"  holdfast volume salvage data --drop-orphans",
		Args: exactly(1, "one volume name"),
	}
	f := cmd.Flags()
	f.StringArrayVar(&req.Replicas, "replica", nil, "node or replica to go on from; for several segments, several")
	f.BoolVar(&req.AcceptLoss, "accept-loss", false, "I accept that what was written later is lost")
	f.BoolVar(&req.Force, "force", false, "although the holder is alive, or an in-sync replica answers")
	f.BoolVar(&req.DropOrphans, "drop-orphans", false, "delete what earlier salvages abandoned")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		req.Name = args[0]
		if req.DropOrphans && (len(req.Replicas) > 0 || req.AcceptLoss) {
			return holdfast.Errorf(holdfast.ErrInvalid, "--drop-orphans goes with neither --replica nor --accept-loss").WithRemedy("salvage first, and drop the orphans once the data is found good")
		}
		if req.AcceptLoss && len(req.Replicas) == 0 {
			return holdfast.Errorf(holdfast.ErrInvalid, "--accept-loss without --replica").WithRemedy("holdfast volume salvage %s lists the replicas to choose from", req.Name)
		}
		return c.call(cmd, callTimeout, func(ctx context.Context, client *api.Client) error {
			r, err := client.SalvageVolume(ctx, req)
			if err != nil {
				return err
			}
			if err := c.show(r, func() { c.printSalvage(req, r) }); err != nil || r.Done {
				return err
			}
			return holdfast.Errorf(holdfast.ErrRefused, "volume %s is as it was: no replica was chosen", req.Name).
				WithRemedy("add --replica NODE --accept-loss")
		})
	}
	return cmd
}

func (c *cli) printSalvage(req *apipb.SalvageRequest, r *apipb.Salvage) {
	switch {
	case req.DropOrphans:
		fmt.Fprintf(c.out, "%s: %d orphans are being deleted\n", req.Name, r.Dropped)
		return
	case r.Done:
		fmt.Fprintf(c.out, "%s: salvaged in epoch %d; attach it to go on\n", req.Name, r.Epoch)
	}
	t := c.newTable("SEGMENT", "NODE", "STATE", "SINCE EPOCH", "TAIL", "OF EPOCH", "COMMITTED", "ANSWERS", "USABLE", "REPLICA")
	for _, x := range r.Candidates {
		usable := "no"
		switch {
		case x.Chosen:
			usable = "chosen"
		case x.Usable:
			usable = "yes"
		}
		t.AppendRow([]any{x.Replica.Segment, x.Replica.Node, x.Replica.State, x.Replica.SinceEpoch, x.Replica.Tail, x.Replica.TailEpoch, x.Committed, x.Answers, usable, x.Replica.Id})
	}
	t.Render()
	for _, i := range r.Missing {
		fmt.Fprintf(c.out, "segment %d has no in-sync replica that can be had now\n", i)
	}
}
