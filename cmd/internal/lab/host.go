package lab

import (
	"context"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/holdfast-storage/holdfast"
)

// engineDeadline bounds the start of a host's engine. One that was killed looks for
// the plugin of each volume it knows, 15 s each, before it answers.
const engineDeadline = 3 * time.Minute

// Host is one Docker host of a lab.
type Host struct {
	// Name is h1, h2, ...
	Name string
	// Address is the host's IP address on the lab's network; the machine reaches it.
	Address string

	lab       *Lab
	container string // of the machine's engine
}

// DataDir is where a node keeps its data, on the host and in its container. It is on
// the machine's own file system, not on a container's layer.
const DataDir = "/var/lib/holdfast"

// firstAddress is the last byte of h1's address, less one.
const firstAddress = 10

func newHost(l *Lab, number int, subnet netip.Prefix) *Host {
	base := subnet.Addr().As4()
	base[3] = byte(firstAddress + number)
	return &Host{
		Name:      "h" + strconv.Itoa(number),
		Address:   netip.AddrFrom4(base).String(),
		lab:       l,
		container: hostName(l.options.Name, number),
	}
}

func hostName(lab string, number int) string { return fmt.Sprintf("%s-h%d", lab, number) }

// dataVolume ends the name of the volume that holds a node's data.
const dataVolume = "-data"

// volumes are the names of a host's volumes and where they are mounted in it.
func volumes(container string) map[string]string {
	return map[string]string{container + "-docker": "/var/lib/docker", container + dataVolume: DataDir}
}

// create makes the host's volumes and container, starts it, and waits for its engine,
// which is then empty but for images.
func (h *Host) create(ctx context.Context) error {
	mark := label + "=" + h.lab.options.Name
	args := []string{"run", "-d", "--name", h.container, "--hostname", h.Name, "--label", mark,
		"--network", h.lab.network, "--ip", h.Address, "--tmpfs", "/run:exec,mode=755"}
	for volume, path := range volumes(h.container) {
		// With its driver named, the engine does not ask every other driver for it.
		if _, err := docker(ctx, "volume", "create", "-d", "local", "--label", mark, volume); err != nil {
			return err
		}
		args = append(args, "--mount", "type=volume,volume-driver=local,src="+volume+",dst="+path)
	}
	args = append(args, h.lab.options.Profile.hostFlags()...)
	wipe := "rm -rf /var/lib/docker/swarm /var/lib/docker/containers /var/lib/docker/volumes /var/lib/docker/network /var/lib/docker/plugins; chattr -R -f -i " +
		DataDir + "; find " + DataDir + " -mindepth 1 -delete; exec sh /usr/local/bin/host.sh"
	// The wipe is for volumes that an earlier lab kept; it must not run again when the
	// host is started after a kill, and so leaves a mark in the container's layer.
	script := "[ -e /started ] && exec sh /usr/local/bin/host.sh; touch /started; " + wipe
	args = append(args, "--entrypoint", "sh", h.lab.options.Images.Host, "-c", script)
	if _, err := docker(ctx, args...); err != nil {
		return err
	}
	return h.waitEngine(ctx)
}

// waitEngine waits until the host's engine answers, and gives up early if the host
// ended.
func (h *Host) waitEngine(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, engineDeadline)
	defer cancel()
	var ended error
	err := retry(ctx, "the engine of "+h.Name, func() error {
		_, err := h.Docker(ctx, "version", "-f", "{{.Server.Version}}")
		if err == nil {
			return nil
		}
		if running, inspectErr := docker(ctx, "inspect", "-f", "{{.State.Running}}", h.container); inspectErr == nil && running == "false" {
			log, _ := run(ctx, nil, "sh", "-c", `docker logs --tail 20 "$1" 2>&1`, "sh", h.container)
			ended = holdfast.Errorf(holdfast.ErrInternal, "the engine of %s ended: %s", h.Name, log)
			return nil
		}
		return err
	})
	if ended != nil {
		return ended
	}
	return err
}

// Docker runs the docker command against this host's engine and returns what it
// printed. It may be called concurrently.
func (h *Host) Docker(ctx context.Context, args ...string) (string, error) {
	return h.Exec(ctx, append([]string{"docker"}, args...)...)
}

// Exec runs a command on the host and returns what it printed. It may be called
// concurrently.
func (h *Host) Exec(ctx context.Context, args ...string) (string, error) {
	out, err := docker(ctx, append([]string{"exec", h.container}, args...)...)
	if err != nil {
		return out, fmt.Errorf("on %s: %w", h.Name, err)
	}
	return out, nil
}

func (h *Host) hasImage(ctx context.Context, tag string) bool {
	_, err := h.Docker(ctx, "image", "inspect", "-f", "{{.Id}}", tag)
	return err == nil
}

// Kill ends every process of the host at once, as a power cut does: the engine, its
// containers, the node. What the host's kernel had not written is not lost, since the
// kernel is the machine's. It returns once they are dead. It may be called while other
// methods of the host run; those fail.
func (h *Host) Kill(ctx context.Context) error {
	// The engine is PID 1 of the host's PID namespace, and every container of it lives
	// in a namespace below: the kernel kills them all with it.
	if _, err := docker(ctx, "kill", "-s", "KILL", h.container); err != nil {
		return fmt.Errorf("kill host %s: %w", h.Name, err)
	}
	if _, err := docker(ctx, "wait", h.container); err != nil {
		return fmt.Errorf("wait for the end of host %s: %w", h.Name, err)
	}
	return nil
}

// Start starts a host that was killed, with what its disks hold, and waits for its
// engine. Containers with a restart policy, the node's among them, start by
// themselves.
func (h *Host) Start(ctx context.Context) error {
	if _, err := docker(ctx, "start", h.container); err != nil {
		return fmt.Errorf("start host %s: %w", h.Name, err)
	}
	return h.waitEngine(ctx)
}

// isolation is the chain with which a host is cut off.
const isolation = "HFLAB"

// Isolate cuts the host off from the other hosts, in both directions; the machine
// still reaches it. Isolating again changes nothing.
func (h *Host) Isolate(ctx context.Context) error {
	if err := h.Heal(ctx); err != nil {
		return err
	}
	var script strings.Builder
	fmt.Fprintf(&script, "set -e; iptables -N %s;", isolation)
	for _, other := range h.lab.Hosts {
		if other != h {
			fmt.Fprintf(&script, "iptables -A %[1]s -s %[2]s -j DROP; iptables -A %[1]s -d %[2]s -j DROP;", isolation, other.Address)
		}
	}
	for _, hook := range []string{"INPUT", "OUTPUT", "FORWARD"} {
		fmt.Fprintf(&script, "iptables -I %s -j %s;", hook, isolation)
	}
	_, err := h.Exec(ctx, "sh", "-c", script.String())
	return err
}

// Heal ends what Isolate did. Healing a host that is not isolated changes nothing.
func (h *Host) Heal(ctx context.Context) error {
	script := "for hook in INPUT OUTPUT FORWARD; do while iptables -D $hook -j HFLAB 2>/dev/null; do :; done; done;" +
		"iptables -F HFLAB 2>/dev/null; iptables -X HFLAB 2>/dev/null; ! iptables -nL HFLAB >/dev/null 2>&1"
	_, err := h.Exec(ctx, "sh", "-c", script)
	return err
}
