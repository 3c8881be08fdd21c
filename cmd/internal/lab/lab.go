package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/holdfast-storage/holdfast"
)

// label marks every container, network and volume of a lab; its value is the lab's
// name.
const label = "holdfast.lab"

// maxHosts bounds a lab; one machine does not carry more engines.
const maxHosts = 9

// subnets are tried in this order; a machine may use some of them itself.
var subnets = []string{"10.77.0.0/24", "10.78.0.0/24", "10.177.0.0/24", "192.168.177.0/24", "172.30.77.0/24"}

var goodName = regexp.MustCompile(`^[a-z][a-z0-9]{1,15}$`)

// Options configure a lab.
type Options struct {
	// Name is of the lab's own, so that several can be at once: two to 16 lower-case
	// letters and digits.
	Name string
	// Hosts is how many there are: h1, h2, ...; 1 to 9.
	Hosts int
	// Images is what BuildImages returned.
	Images Images
	// Profile is what Probe returned.
	Profile Profile
	// KeepVolumes makes Close keep each host's /var/lib/docker, so that a later lab of
	// the same name need not load images. Its containers, volumes and networks are
	// removed at the next Open.
	KeepVolumes bool
	// Say is told of steps that take long; nil means nobody.
	Say func(string)
}

// Validate says what is wrong with the options, as ErrInvalid, or nil.
func (o Options) Validate() error {
	switch {
	case !goodName.MatchString(o.Name):
		return holdfast.Errorf(holdfast.ErrInvalid, "lab name %q is not 2 to 16 lower-case letters and digits", o.Name)
	case o.Hosts < 1 || o.Hosts > maxHosts:
		return holdfast.Errorf(holdfast.ErrInvalid, "a lab of %d hosts: 1 to %d are possible", o.Hosts, maxHosts)
	case o.Profile != ProfileNormal && o.Profile != ProfileRestricted:
		return holdfast.Errorf(holdfast.ErrInvalid, "unknown profile %q", o.Profile)
	case o.Images.Host == "":
		return holdfast.Errorf(holdfast.ErrInvalid, "a lab needs an image for its hosts")
	}
	return nil
}

// Lab is a number of Docker hosts. Methods of different hosts may be called
// concurrently; those of one host may not, unless they say so.
type Lab struct {
	options Options
	network string
	Hosts   []*Host
}

// Open removes what a lab of that name left behind, makes the network and starts the
// hosts, each with the lab's images in its engine. On an error everything is removed.
func Open(ctx context.Context, options Options) (*Lab, error) {
	if err := options.Validate(); err != nil {
		return nil, err
	}
	if options.Say == nil {
		options.Say = func(string) {}
	}
	if err := Remove(ctx, options.Name, options.KeepVolumes); err != nil {
		return nil, err
	}
	l := &Lab{options: options, network: options.Name}
	subnet, err := l.makeNetwork(ctx)
	if err != nil {
		return nil, err
	}
	for i := range options.Hosts {
		l.Hosts = append(l.Hosts, newHost(l, i+1, subnet))
	}
	if err := each(l.Hosts, func(h *Host) error { return h.create(ctx) }); err != nil {
		return nil, errors.Join(err, l.Close(context.WithoutCancel(ctx)))
	}
	if err := l.loadImages(ctx); err != nil {
		return nil, errors.Join(err, l.Close(context.WithoutCancel(ctx)))
	}
	return l, nil
}

// Close kills the hosts and removes all that the lab made on the machine; images
// stay, and volumes with KeepVolumes.
func (l *Lab) Close(ctx context.Context) error {
	return Remove(ctx, l.options.Name, l.options.KeepVolumes)
}

// each runs do for all of the hosts at once and joins the errors.
func each(hosts []*Host, do func(*Host) error) error {
	errs := make([]error, len(hosts))
	var all sync.WaitGroup
	for i, h := range hosts {
		all.Go(func() { errs[i] = do(h) })
	}
	all.Wait()
	return errors.Join(errs...)
}

// makeNetwork makes the lab's network on the first subnet that is free here.
func (l *Lab) makeNetwork(ctx context.Context) (netip.Prefix, error) {
	var last error
	for _, s := range subnets {
		subnet := netip.MustParsePrefix(s)
		if used, err := subnetUsed(subnet); err != nil || used {
			last = errors.Join(err, fmt.Errorf("%s is in use on this machine", s))
			continue
		}
		_, last = docker(ctx, "network", "create", "--label", label+"="+l.options.Name, "--subnet", s, l.network)
		if last == nil {
			return subnet, nil
		}
	}
	return netip.Prefix{}, holdfast.Errorf(holdfast.ErrUnavailable, "make a network for the lab: %w", last).
		WithRemedy("one of these must be free: %s", strings.Join(subnets, " "))
}

// subnetUsed reports whether an address of this machine's interfaces lies in the
// subnet, or the subnet in one of their networks.
func subnetUsed(subnet netip.Prefix) (bool, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return false, fmt.Errorf("list this machine's addresses: %w", err)
	}
	for _, a := range addrs {
		if prefix, err := netip.ParsePrefix(a.String()); err == nil && prefix.Overlaps(subnet) {
			return true, nil
		}
	}
	return false, nil
}

// loadImages puts the app and node images into the hosts that do not have them.
func (l *Lab) loadImages(ctx context.Context) error {
	var want []string
	for _, tag := range []string{l.options.Images.App, l.options.Images.Node} {
		if tag != "" {
			want = append(want, tag)
		}
	}
	lacks := func(h *Host) bool {
		return slices.ContainsFunc(want, func(tag string) bool { return !h.hasImage(ctx, tag) })
	}
	var lacking []*Host
	for _, h := range l.Hosts {
		if lacks(h) {
			lacking = append(lacking, h)
		}
	}
	if len(lacking) == 0 {
		return nil
	}
	l.options.Say(fmt.Sprintf("loading images into %d hosts", len(lacking)))
	dir, err := os.MkdirTemp("", "hflab-images")
	if err != nil {
		return fmt.Errorf("make a directory for saved images: %w", err)
	}
	defer os.RemoveAll(dir) //nolint:errcheck // below the system's temporary directory
	saved := filepath.Join(dir, "images.tar")
	if _, err := docker(ctx, append([]string{"save", "-o", saved}, want...)...); err != nil {
		return fmt.Errorf("save the lab's images: %w", err)
	}
	return each(lacking, func(h *Host) error {
		_, err := run(ctx, nil, "sh", "-c", `docker exec -i "$1" docker load -q <"$2"`, "sh", h.container, saved)
		return err
	})
}
