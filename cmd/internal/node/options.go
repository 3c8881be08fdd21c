package node

import (
	"cmp"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/cmd/internal/api"
	"github.com/holdfast-storage/holdfast/cmd/internal/controller"
	"github.com/holdfast-storage/holdfast/cmd/internal/reconcile"
)

// Defaults of the daemon's flags.
const (
	DefaultDataDir = "/var/lib/holdfast"
	DefaultBallast = 1 << 30
	// minBallast keeps test nodes small and still leaves room for what it is for.
	minBallast = 16 << 20
	// minRebuildAfter: a node is not even called gone before.
	minRebuildAfter = 5 * time.Second
	// minDefaultDisk is the least that a disk image made without --disk may
	// hold; less is refused, since a volume would not fit.
	minDefaultDisk = 1 << 30
)

// Options are the daemon's flags. Zero values mean the defaults; Validate
// fills them in.
type Options struct {
	Name         string   // node name; the host's name by default
	DataDir      string   // metadata, sockets, default disk; the same path in the container and on the host
	Address      string   // HOST:PORT that others dial for the API and node to node calls
	DataAddress  string   // HOST:PORT for replication; Address with port+1
	RaftAddress  string   // HOST:PORT for raft; Address with port+2
	Listen       string   // bind host, when it is not the host of Address
	Disks        []string // PATH[,size=10G][,pool=ssd][,wal=256M], or "none"
	Bootstrap    bool     // start a new cluster
	Join         []string // HOST:PORT of members
	RunDir       string   // where else control.sock stands; /run/holdfast as root
	PluginSocket *string  // nil: default where possible; "" is off
	DockerSocket string
	NBDAddress   string // HOST:PORT of the NBD server; off when empty
	// RebuildAfter is how long a node may be gone before its replicas are made anew
	// elsewhere; 10 minutes by default.
	RebuildAfter time.Duration
	Ballast      string // size of the file that keeps room for the metadata
	Labels       map[string]string
	Insecure     bool // listeners in clear beyond loopback
	Version      string
	Commit       string

	disks   []reconcile.DiskSpec
	noDisks bool
	ballast int64
}

// Validate checks what can be checked without touching anything and fills in
// the defaults. Errors are ErrInvalid and name the flag.
func (o *Options) Validate() error {
	host, port, err := splitAddress("--address", cmp.Or(o.Address, api.DefaultAddress))
	if err != nil {
		return err
	}
	o.Address = net.JoinHostPort(host, strconv.Itoa(port))
	if o.DataAddress, err = derived("--data-address", o.DataAddress, host, port+1); err != nil {
		return err
	}
	if o.RaftAddress, err = derived("--raft-address", o.RaftAddress, host, port+2); err != nil {
		return err
	}
	if o.Name == "" {
		if o.Name, err = os.Hostname(); err != nil {
			return holdfast.Errorf(holdfast.ErrInvalid, "this host has no name: %w", err).WithRemedy("give --name")
		}
	}
	if err := holdfast.CheckVolumeName(o.Name); err != nil {
		return holdfast.Errorf(holdfast.ErrInvalid, "--name: %q is not a node name", o.Name).WithRemedy("use letters, digits, _ . and -")
	}
	if o.DataDir, err = filepath.Abs(cmp.Or(o.DataDir, DefaultDataDir)); err != nil {
		return holdfast.Errorf(holdfast.ErrInvalid, "--data-dir: %w", err)
	}
	if o.RunDir == "" && os.Geteuid() == 0 {
		o.RunDir = filepath.Dir(api.DefaultSocket)
	}
	for _, socket := range []string{filepath.Join(o.DataDir, "control.sock"), filepath.Join(o.RunDir, "control.sock")} {
		if err := api.CheckSocketPath(socket); err != nil {
			return err
		}
	}
	if o.Bootstrap && len(o.Join) > 0 {
		return holdfast.Errorf(holdfast.ErrInvalid, "--bootstrap and --join are both given").WithRemedy("bootstrap one node and join it with the others")
	}
	for _, target := range o.Join {
		if _, _, err := splitAddress("--join", target); err != nil {
			return err
		}
	}
	if o.NBDAddress != "" {
		if _, _, err := splitAddress("--nbd-address", o.NBDAddress); err != nil {
			return err
		}
	}
	if err := o.checkInsecure(host); err != nil {
		return err
	}
	o.ballast = DefaultBallast
	if o.Ballast != "" {
		if o.ballast, err = holdfast.ParseSize(o.Ballast); err != nil || o.ballast < minBallast {
			return holdfast.Errorf(holdfast.ErrInvalid, "--ballast %q is not a size of at least 16M", o.Ballast)
		}
	}
	if o.RebuildAfter == 0 {
		o.RebuildAfter = controller.DefaultGrace
	}
	if o.RebuildAfter < minRebuildAfter {
		return holdfast.Errorf(holdfast.ErrInvalid, "--rebuild-after %v is less than %v", o.RebuildAfter, minRebuildAfter).WithRemedy("a host that only restarts should be back before")
	}
	return o.parseDisks()
}

func (o *Options) parseDisks() error {
	for _, s := range o.Disks {
		if s == "none" {
			o.noDisks = true
			continue
		}
		d, err := reconcile.ParseDisk("--disk", s)
		if err != nil {
			return err
		}
		o.disks = append(o.disks, d)
	}
	if o.noDisks && len(o.disks) > 0 {
		return holdfast.Errorf(holdfast.ErrInvalid, "--disk none and --disk %s are both given", o.disks[0].Path)
	}
	return nil
}

// checkInsecure refuses listeners in clear beyond loopback unless the user
// said so.
func (o *Options) checkInsecure(host string) error {
	bind := cmp.Or(o.Listen, host)
	if !o.Insecure && !isLoopback(bind) {
		return holdfast.Errorf(holdfast.ErrInvalid, "--address %s listens in clear on %s, beyond this host", o.Address, bind).WithRemedy("give --insecure where the network is trusted")
	}
	if nbdHost, _, err := net.SplitHostPort(o.NBDAddress); err == nil && !o.Insecure && !isLoopback(nbdHost) {
		return holdfast.Errorf(holdfast.ErrInvalid, "--nbd-address %s serves volumes in clear beyond this host", o.NBDAddress).WithRemedy("give --insecure where the network is trusted")
	}
	for _, target := range o.Join {
		if h, _, err := net.SplitHostPort(target); err == nil && !o.Insecure && !isLoopback(h) {
			return holdfast.Errorf(holdfast.ErrInvalid, "--join %s is in clear, beyond this host", target).WithRemedy("give --insecure where the network is trusted")
		}
	}
	return nil
}

func isLoopback(host string) bool {
	if host == "localhost" {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}

func derived(flag, given, host string, port int) (string, error) {
	h, p, err := splitAddress(flag, cmp.Or(given, net.JoinHostPort(host, strconv.Itoa(port))))
	return net.JoinHostPort(h, strconv.Itoa(p)), err
}

// splitAddress checks HOST:PORT as others dial it.
func splitAddress(flag, s string) (string, int, error) {
	host, port, err := net.SplitHostPort(s)
	n, portErr := strconv.Atoi(port)
	switch {
	case err != nil || portErr != nil || n < 1 || n > 65535 || host == "":
		return "", 0, holdfast.Errorf(holdfast.ErrInvalid, "%s %q is not HOST:PORT", flag, s).WithRemedy("write for example 10.0.0.1:9400")
	case net.ParseIP(host) != nil && net.ParseIP(host).IsUnspecified():
		return "", 0, holdfast.Errorf(holdfast.ErrInvalid, "%s %q: others cannot dial %s", flag, s, host).WithRemedy("give the address that others reach, and --listen %s to bind all", host)
	}
	return host, n, nil
}
