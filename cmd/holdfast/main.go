// Command holdfast is the daemon (`holdfast serve`), its keeper and the client
// of both: every other verb talks to a daemon and exits.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/cmd/internal/api"
)

// version and commit are set by the linker.
var (
	version = "dev"
	commit  = "unknown"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// cli is what the verbs share.
type cli struct {
	out, err io.Writer
	json     bool
	address  string
	labels   []string // serve's
	// entered is set once a verb's own code runs: an error before it is the
	// command line's.
	entered bool
	exit    int // what a verb that has no error ends with
}

// run executes one command line and returns its exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	c := &cli{out: stdout, err: stderr}
	root := c.rootCommand()
	refuseUnknownTopics(root)
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return c.exit
	}
	if !c.entered && holdfast.KindOf(err) == holdfast.ErrInternal {
		err = holdfast.Errorf(holdfast.ErrInvalid, "%w", err).WithRemedy("see holdfast --help")
	}
	if c.json || !c.entered && asksJSON(args) {
		_ = api.WriteErrorJSON(stderr, err) // nothing is left to tell it to
	} else {
		fmt.Fprintf(stderr, "holdfast: %v\n", err)
	}
	return api.ExitCode(err)
}

func (c *cli) rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "holdfast",
		Args:          cobra.ArbitraryArgs,
		RunE:          helpOrUnknown,
		Short:         "Replicated block volumes for plain Docker hosts",
		Long:          "holdfast turns the local disks of Docker hosts into replicated block volumes:\na container's data outlives its host.",
		SilenceUsage:  true,
		SilenceErrors: true,
		PersistentPreRun: func(*cobra.Command, []string) {
			c.entered = true
		},
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		if args := cmd.Flags().Args(); cmd.HasSubCommands() && len(args) > 0 {
			return unknownVerb(cmd, args[0]) // its flags cannot be known either
		}
		return holdfast.Errorf(holdfast.ErrInvalid, "%w", err).WithRemedy("see %s --help", cmd.CommandPath())
	})
	root.PersistentFlags().BoolVar(&c.json, "json", false, "write results as JSON on stdout and errors as JSON on stderr")
	root.PersistentFlags().StringVar(&c.address, "api", os.Getenv("HOLDFAST_ADDRESS"), "daemon to talk to: unix:///PATH or HOST:PORT (HOLDFAST_ADDRESS)")
	root.AddCommand(c.volumeCommand(), c.nodeCommand(), c.diskCommand(), c.statusCommand(), c.versionCommand(), c.serveCommand(), c.keeperCommand())
	return root
}

// dial prepares the client of the daemon that the flags or the environment name.
func (c *cli) dial() (*api.Client, error) { return api.Dial(c.address) }

// exactly is cobra.ExactArgs with an error that names what is missing.
func exactly(n int, what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != n {
			return holdfast.Errorf(holdfast.ErrInvalid, "%s takes %s, got %d arguments", cmd.CommandPath(), what, len(args)).WithRemedy("see %s --help", cmd.CommandPath())
		}
		return nil
	}
}

// group makes a command that only holds others: alone it prints its help, and
// an unknown verb is an error.
func group(use, short string, sub ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, RunE: helpOrUnknown}
	cmd.AddCommand(sub...)
	return cmd
}

func helpOrUnknown(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return unknownVerb(cmd, args[0])
	}
	return cmd.Help()
}

func unknownVerb(cmd *cobra.Command, verb string) error {
	err := holdfast.Errorf(holdfast.ErrInvalid, "unknown verb %q", verb)
	cmd.SuggestionsMinimumDistance = 2 // what cobra takes where it suggests by itself
	if near := cmd.SuggestionsFor(verb); len(near) > 0 {
		return err.WithRemedy("did you mean %s? See %s --help", strings.Join(near, " or "), cmd.CommandPath())
	}
	return err.WithRemedy("see %s --help", cmd.CommandPath())
}

// refuseUnknownTopics makes an error of what cobra's own commands, help and
// completion, answer with a help text and exit code 0.
func refuseUnknownTopics(root *cobra.Command) {
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	if completion, _, err := root.Find([]string{"completion"}); err == nil {
		completion.Args, completion.RunE = cobra.ArbitraryArgs, helpOrUnknown
	}
	help, _, err := root.Find([]string{"help"})
	if err != nil {
		return
	}
	help.Run, help.RunE = nil, func(_ *cobra.Command, args []string) error {
		cmd, rest, err := root.Find(args)
		if err != nil || len(rest) > 0 {
			return unknownVerb(cmd, rest[0])
		}
		cmd.InitDefaultHelpFlag()
		return cmd.Help()
	}
}

// asksJSON says whether a command line that could not be read asks for JSON.
func asksJSON(args []string) bool {
	if end := slices.Index(args, "--"); end >= 0 {
		args = args[:end]
	}
	return slices.Contains(args, "--json") || slices.Contains(args, "--json=true")
}

// checkWait refuses a wait that is negative, or given beside a flag with which
// there is nothing to wait for.
func checkWait(wait time.Duration, other string, given bool) error {
	switch {
	case wait < 0:
		return holdfast.Errorf(holdfast.ErrInvalid, "--wait %v is negative", wait).WithRemedy("give a time, as in --wait 10m")
	case given && wait > 0:
		return holdfast.Errorf(holdfast.ErrInvalid, "--wait %v and %s are both given", wait, other).WithRemedy("give one of them")
	}
	return nil
}
