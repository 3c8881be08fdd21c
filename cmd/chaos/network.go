package main

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/holdfast-storage/holdfast"
)

// Ports of a node: its address, and by default the two after it.
const (
	portAPI  = 9400 // users, heartbeats, forwarded calls
	portData = 9401 // replication
	portRaft = 9402
)

// network is a switch in a network namespace of its own, so that no rule of the
// machine's own firewall touches its traffic, and a namespace for each node.
type network struct {
	prefix string
}

// newNetwork makes the switch.
func newNetwork(ctx context.Context) (*network, error) {
	w := &network{prefix: ownName()}
	err := w.ip(ctx,
		"netns add "+w.hub(),
		"-n "+w.hub()+" link add br0 type bridge",
		"-n "+w.hub()+" link set br0 up")
	if err != nil {
		w.close(ctx)
		return nil, err
	}
	return w, nil
}

func (w *network) hub() string             { return w.prefix + "hub" }
func (w *network) host(number int) string  { return w.prefix + "n" + strconv.Itoa(number) }
func (w *network) address(n int) string    { return fmt.Sprintf("10.78.0.%d", n) }
func (w *network) path(host string) string { return "/run/netns/" + host }

// add makes the namespace of a node, numbered from 1.
func (w *network) add(ctx context.Context, number int) error {
	host, port := w.host(number), "p"+strconv.Itoa(number)
	err := w.ip(ctx,
		"netns add "+host,
		"-n "+host+" link set lo up",
		// Its hardware address stays when it is removed and added again: others remember it.
		fmt.Sprintf("-n %s link add %s type veth peer name eth0 address 02:00:00:00:78:%02x netns %s", w.hub(), port, number, host),
		fmt.Sprintf("-n %s link set %s master br0 up", w.hub(), port),
		fmt.Sprintf("-n %s addr add %s/24 dev eth0", host, w.address(number)),
		"-n "+host+" link set eth0 up")
	if err != nil {
		return err
	}
	// Faults are rules in chains of their own.
	return w.rules(ctx, number, ":FAULTIN - [0:0]", ":FAULTOUT - [0:0]",
		"-A INPUT -i eth0 -j FAULTIN", "-A OUTPUT -o eth0 -j FAULTOUT")
}

// remove takes a node's cable away, with all that its kernel had still to send,
// and its namespace; add makes them anew.
func (w *network) remove(ctx context.Context, number int) error {
	return w.ip(ctx, "-n "+w.hub()+" link del p"+strconv.Itoa(number), "netns del "+w.host(number))
}

// close removes everything; what is not there is no error.
func (w *network) close(ctx context.Context) {
	paths, _ := filepath.Glob("/run/netns/" + w.prefix + "*") // the pattern is sound
	for _, path := range paths {
		_, _ = command(ctx, nil, "ip", "netns", "del", filepath.Base(path)) // make leftovers tells what stayed
	}
}

func (w *network) ip(ctx context.Context, lines ...string) error {
	for _, line := range lines {
		if _, err := command(ctx, nil, "ip", strings.Fields(line)...); err != nil {
			return err
		}
	}
	return nil
}

// rules gives lines to iptables-restore in a node's namespace; what is there stays.
func (w *network) rules(ctx context.Context, number int, lines ...string) error {
	text := "*filter\n" + strings.Join(lines, "\n") + "\nCOMMIT\n"
	_, err := command(ctx, []byte(text), "nsenter", "--net="+w.path(w.host(number)), "iptables-restore", "--noflush", "--wait")
	return err
}

// cut is one rule: what of a node's traffic is lost.
type cut struct {
	in, out bool
	peer    int   // only from and to this node; 0: all
	ports   []int // only connections to these; none: all
}

// cut adds to what is lost of a node's traffic.
func (w *network) cut(ctx context.Context, number int, c cut) error {
	var lines []string
	add := func(chain, peer string) {
		if c.peer == 0 {
			peer = ""
		}
		if len(c.ports) == 0 {
			lines = append(lines, "-A "+chain+peer+" -j DROP")
		}
		for _, p := range c.ports {
			for _, side := range []string{"--dport", "--sport"} {
				lines = append(lines, fmt.Sprintf("-A %s%s -p tcp %s %d -j DROP", chain, peer, side, p))
			}
		}
	}
	if c.in {
		add("FAULTIN", " -s "+w.address(c.peer))
	}
	if c.out {
		add("FAULTOUT", " -d "+w.address(c.peer))
	}
	return w.rules(ctx, number, lines...)
}

// dropped counts the packets that the cuts of a node dropped since they were made.
func (w *network) dropped(ctx context.Context, number int) (int, error) {
	sum := 0
	for _, chain := range []string{"FAULTIN", "FAULTOUT"} {
		out, err := command(ctx, nil, "nsenter", "--net="+w.path(w.host(number)), "iptables", "--wait", "-nvxL", chain)
		if err != nil {
			return 0, err
		}
		for line := range strings.Lines(out) {
			if fields := strings.Fields(line); len(fields) > 3 && fields[2] == "DROP" {
				n, err := strconv.Atoi(fields[0])
				if err != nil {
					return 0, fmt.Errorf("read the counters of %s: %w", chain, err)
				}
				sum += n
			}
		}
	}
	return sum, nil
}

// slow lets a node send no more than rate (tc-tbf(8)); empty: as fast as it can.
func (w *network) slow(ctx context.Context, number int, rate string) error {
	words := "qdisc del dev eth0 root"
	if rate != "" {
		words = "qdisc add dev eth0 root tbf rate " + rate + " burst 16kb latency 300ms"
	}
	_, err := command(ctx, nil, "nsenter", append([]string{"--net=" + w.path(w.host(number)), "tc"}, strings.Fields(words)...)...)
	return err
}

// heal ends every cut of a node.
func (w *network) heal(ctx context.Context, number int) error {
	return w.rules(ctx, number, "-F FAULTIN", "-F FAULTOUT")
}

// command runs a program that ends soon and returns what it wrote.
func command(ctx context.Context, stdin []byte, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdin = bytes.NewReader(stdin)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return out.String(), holdfast.Errorf(holdfast.ErrInternal, "%s %s: %w: %s", name, strings.Join(args, " "), err, bytes.TrimSpace(errOut.Bytes()))
	}
	return out.String(), nil
}
