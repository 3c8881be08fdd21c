package main

import (
	"errors"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/cmd/internal/keeper"
	"github.com/holdfast-storage/holdfast/cmd/internal/node"
)

func (c *cli) keeperCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "keeper -- serve FLAGS",
		Short: "Run a daemon under its keeper, which mounts for it",
		Long: `Keeper is the first process of a node's container. It starts the daemon, starts it
again when it dies, keeps its kernel devices meanwhile, and does what the process
that answers block requests must never do: mount, unmount, mkfs and fsck.
holdfast serve as root starts one by itself.`,
		Example:            "  holdfast keeper -- serve --data-dir /var/lib/holdfast",
		Args:               cobra.ArbitraryArgs,
		DisableFlagParsing: true, DisableFlagsInUseLine: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 && (args[0] == "--help" || args[0] == "-h") {
				return cmd.Help()
			}
			if len(args) > 0 && args[0] == "--" {
				args = args[1:]
			}
			if len(args) == 0 || args[0] != "serve" {
				return holdfast.Errorf(holdfast.ErrInvalid, "keeper runs serve, not %q", args).WithRemedy("write: holdfast keeper -- serve FLAGS")
			}
			// The daemon checks its own flags; one that cannot start must not be
			// started again and again, so they are checked here first.
			var o node.Options
			sub := c.serveFlags(&o)
			if err := sub.ParseFlags(args[1:]); err != nil {
				return holdfast.Errorf(holdfast.ErrInvalid, "%w", err).WithRemedy("see holdfast serve --help")
			}
			if err := c.finishOptions(sub, &o); err != nil {
				return err
			}
			self, err := os.Executable()
			if err != nil {
				return holdfast.Errorf(holdfast.ErrInternal, "find this program: %w", err)
			}
			log, err := newLogger(c.err)
			if err != nil {
				return err
			}
			if err := makeDataDir(o.DataDir); err != nil {
				return err
			}
			signal.Reset(os.Interrupt, syscall.SIGTERM) // the keeper's own way to end
			code, err := keeper.Run(cmd.Context(), keeper.Options{DataDir: o.DataDir, Command: append([]string{self}, args...), Logger: log})
			if err != nil {
				return err
			}
			c.exit = code
			return nil
		},
	}
}

// makeDataDir makes the data directory, and refuses one that cannot be written.
func makeDataDir(dir string) error {
	err := os.MkdirAll(dir, 0o711)
	var f *os.File
	if err == nil {
		f, err = os.CreateTemp(dir, ".probe-")
	}
	if err == nil {
		err = errors.Join(f.Close(), os.Remove(f.Name()))
	}
	if err != nil {
		return holdfast.Errorf(holdfast.ErrInvalid, "--data-dir %s: %w", dir, err).WithRemedy("give a directory that can be written")
	}
	return nil
}
