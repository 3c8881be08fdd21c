package main

import (
	"encoding/json"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/disk"
	"github.com/holdfast-storage/holdfast/replication/wire"
)

func (c *cli) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Say version, commit, cluster level and format versions", Example: "  holdfast version --json",
		Args: exactly(0, "no argument"),
		RunE: func(*cobra.Command, []string) error {
			facts := map[string]any{
				"version": version, "commit": commit, "cluster_level": holdfast.Level1,
				"disk_format": disk.FormatVersion, "wire_version": wire.Version1,
			}
			if c.json {
				return json.NewEncoder(c.out).Encode(facts)
			}
			fmt.Fprintf(c.out, "holdfast %s (commit %s)\ncluster level %d, disk format %d, wire version %d\n", version, commit, holdfast.Level1, disk.FormatVersion, wire.Version1)
			return nil
		},
	}
}
