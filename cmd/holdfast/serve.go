package main

import (
	"os"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/blockdev/disk"
	"github.com/holdfast-storage/holdfast/cmd/internal/controller"
	"github.com/holdfast-storage/holdfast/cmd/internal/keeper"
	"github.com/holdfast-storage/holdfast/cmd/internal/node"
	"github.com/holdfast-storage/holdfast/plugin/docker"
)

// pluginSocket is where the engine looks for the volume driver holdfast.
const pluginSocket = "/run/docker/plugins/holdfast.sock"

func (c *cli) serveCommand() *cobra.Command {
	var o node.Options
	cmd := c.serveFlags(&o)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := c.finishOptions(cmd, &o); err != nil {
			return err
		}
		if err := keeper.CheckUnder(); err != nil {
			return err
		}
		if os.Geteuid() == 0 && keeper.Under() == "" {
			return startKeeper()
		}
		underKeeper := keeper.Under() != "" && keeper.Under() != keeper.Off
		if os.Getenv("GOMAXPROCS") == "" {
			runtime.GOMAXPROCS(disk.Processors(runtime.GOMAXPROCS(0)))
		}
		log, err := newLogger(c.err)
		if err != nil {
			return err
		}
		// Before the keeper is told that a daemon is there: from then on it starts
		// one again that ends.
		if underKeeper && *o.PluginSocket != "" {
			if err := docker.CheckSocket(*o.PluginSocket); err != nil {
				return err
			}
		}
		return node.Run(cmd.Context(), o, log)
	}
	return cmd
}

// startKeeper replaces this process by a keeper that runs the same command.
func startKeeper() error {
	self, err := os.Executable()
	if err == nil {
		at := slices.Index(os.Args, "serve")
		err = syscall.Exec(self, append([]string{"holdfast", "keeper", "--"}, os.Args[at:]...), os.Environ())
	}
	return holdfast.Errorf(holdfast.ErrInternal, "start the keeper: %w", err)
}

// serveFlags makes the command with its flags bound to o.
func (c *cli) serveFlags(o *node.Options) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run a node: the daemon",
		Long: `Serve runs a node. Without flags beyond --data-dir it is a working one-node cluster
on an image file. Every flag has an environment variable, HOLDFAST_ and its name in
capitals with _ for -. As root it starts a keeper, for kernel devices and mounts;
HOLDFAST_KEEPER=off leaves it out.`,
		Example: "  holdfast serve --data-dir /var/lib/holdfast\n" +
			"  holdfast serve --name h1 --address 10.0.0.1:9400 --insecure --bootstrap --disk /dev/nvme1n1\n" +
			"  holdfast serve --name h2 --address 10.0.0.2:9400 --insecure --join 10.0.0.1:9400",
		Args: exactly(0, "no argument"),
	}
	f := cmd.Flags()
	f.StringVar(&o.Name, "name", "", "node name (default the host's name)")
	f.StringVar(&o.DataDir, "data-dir", node.DefaultDataDir, "metadata, sockets and the default disk")
	f.StringVar(&o.Address, "address", "127.0.0.1:9400", "HOST:PORT that others dial")
	f.StringVar(&o.DataAddress, "data-address", "", "HOST:PORT for replication (default --address, port+1)")
	f.StringVar(&o.RaftAddress, "raft-address", "", "HOST:PORT for raft (default --address, port+2)")
	f.StringVar(&o.Listen, "listen", "", "host to bind, when it is not the host of --address")
	f.StringArrayVar(&o.Disks, "disk", nil, "PATH[,size=10G][,pool=ssd][,wal=256M], repeatable; none for a node without storage")
	f.BoolVar(&o.Bootstrap, "bootstrap", false, "start a new cluster")
	f.StringSliceVar(&o.Join, "join", nil, "HOST:PORT of members of the cluster to join")
	f.StringVar(&o.RunDir, "run-dir", "", "directory of a second control.sock (default /run/holdfast as root)")
	f.String("plugin-socket", pluginSocket, "socket of the Docker volume plugin; empty for none, as where /run/docker is not writable")
	f.StringVar(&o.DockerSocket, "docker-socket", "/run/docker.sock", "socket of the Docker Engine")
	f.StringVar(&o.NBDAddress, "nbd-address", "", "HOST:PORT of the NBD server (default off; DATA_DIR/nbd.sock is always on)")
	f.DurationVar(&o.RebuildAfter, "rebuild-after", controller.DefaultGrace, "how long a node may be gone before its replicas are made anew elsewhere")
	f.StringVar(&o.Ballast, "ballast", "1G", "size of the file that keeps room for the metadata, at least 16M")
	f.StringArrayVar(&c.labels, "label", nil, "label of the node, NAME=VALUE, repeatable")
	f.BoolVar(&o.Insecure, "insecure", false, "allow listeners in clear beyond loopback")
	return cmd
}

// finishOptions reads the environment, and the flags that are not plain values.
func (c *cli) finishOptions(cmd *cobra.Command, o *node.Options) error {
	f := cmd.Flags()
	// An empty variable is like none; an empty flag is a mistake, and would start a
	// cluster of its own.
	if f.Changed("join") && len(o.Join) == 0 {
		return holdfast.Errorf(holdfast.ErrInvalid, "--join is empty").WithRemedy("give HOST:PORT of a member, or leave it out")
	}
	if err := flagsFromEnvironment(f); err != nil {
		return err
	}
	socket, err := f.GetString("plugin-socket")
	if err != nil {
		return err
	}
	if !f.Changed("plugin-socket") && unix.Access("/run/docker", unix.W_OK) != nil {
		socket = ""
	}
	o.PluginSocket = &socket
	o.Labels = map[string]string{}
	for _, l := range c.labels {
		k, v, ok := strings.Cut(l, "=")
		if !ok || k == "" {
			return holdfast.Errorf(holdfast.ErrInvalid, "--label %q is not NAME=VALUE", l).WithRemedy("write for example --label zone=a")
		}
		if other, twice := o.Labels[k]; twice {
			return holdfast.Errorf(holdfast.ErrInvalid, "--label %s is given as %q and as %q", k, other, v).WithRemedy("give it once")
		}
		o.Labels[k] = v
	}
	if f.Changed("rebuild-after") && o.RebuildAfter == 0 {
		return holdfast.Errorf(holdfast.ErrInvalid, "--rebuild-after 0 would make replicas anew at once").WithRemedy("leave it out for 10m, or give at least 5s")
	}
	o.Version, o.Commit = version, commit
	return o.Validate()
}

// flagsFromEnvironment sets every flag that was not given from HOLDFAST_<FLAG>.
// Repeatable flags take a value per line or, for --join, per comma.
func flagsFromEnvironment(f *pflag.FlagSet) error {
	var first error
	f.VisitAll(func(flag *pflag.Flag) {
		name := "HOLDFAST_" + strings.ToUpper(strings.ReplaceAll(flag.Name, "-", "_"))
		value, ok := os.LookupEnv(name)
		if flag.Changed || !ok || flag.Name == "help" || flag.Name == "json" || flag.Name == "api" || first != nil {
			return
		}
		if flag.Name == "address" && strings.HasPrefix(value, "unix://") {
			return // it tells the other verbs which daemon to ask
		}
		values := []string{value}
		if flag.Value.Type() == "stringArray" {
			values = strings.Fields(value)
		}
		for _, v := range values {
			if err := f.Set(flag.Name, v); err != nil {
				first = holdfast.Errorf(holdfast.ErrInvalid, "%s=%q: %w", name, value, err)
			}
		}
	})
	return first
}
