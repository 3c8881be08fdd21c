package lab

import (
	"context"
	"fmt"
	"strings"
	"time"
)

// swarmDeadline bounds the wait until Swarm knows of a driver: each engine reports its
// plugins some 11 s after it activated them.
const swarmDeadline = 60 * time.Second

// StartSwarm joins the hosts into one Swarm, all of them managers, with a dispatcher
// heartbeat of one second: with the default of five, it takes Swarm up to a minute to
// notice that a node is dead. The last host is the leader.
func (l *Lab) StartSwarm(ctx context.Context) error {
	first, others := l.Hosts[len(l.Hosts)-1], l.Hosts[:len(l.Hosts)-1]
	if _, err := first.Docker(ctx, "swarm", "init", "--advertise-addr", first.Address); err != nil {
		return fmt.Errorf("make a swarm: %w", err)
	}
	if _, err := first.Docker(ctx, "swarm", "update", "--dispatcher-heartbeat", "1s"); err != nil {
		return fmt.Errorf("set the swarm's heartbeat: %w", err)
	}
	token, err := first.Docker(ctx, "swarm", "join-token", "-q", "manager")
	if err != nil {
		return fmt.Errorf("ask for the swarm's token: %w", err)
	}
	for _, h := range others { // one at a time: each changes the managers' quorum
		if _, err := h.Docker(ctx, "swarm", "join", "--advertise-addr", h.Address, "--token", token, first.Address+":2377"); err != nil {
			return fmt.Errorf("join the swarm: %w", err)
		}
	}
	return nil
}

// WaitDriver waits until Swarm knows that every host has the volume driver: it places
// tasks with such a volume nowhere else.
func (l *Lab) WaitDriver(ctx context.Context, driver string) error {
	ctx, cancel := context.WithTimeout(ctx, swarmDeadline)
	defer cancel()
	return retry(ctx, "swarm to know the driver "+driver, func() error {
		for _, h := range l.Hosts {
			out, err := l.Hosts[0].Docker(ctx, "node", "inspect", "-f", "{{range .Description.Engine.Plugins}}{{.Type}}/{{.Name}} {{end}}", h.Name)
			if err != nil {
				return err
			}
			if !strings.Contains(out+" ", "Volume/"+driver+" ") && !strings.Contains(out+" ", "Volume/"+driver+":latest ") {
				return fmt.Errorf("node %s has %s", h.Name, out)
			}
		}
		return nil
	})
}

// TaskHost returns the host that runs a service's task now, as asked of via; nil while
// there is none.
func (l *Lab) TaskHost(ctx context.Context, via *Host, service string) (*Host, error) {
	out, err := via.Docker(ctx, "service", "ps", "--filter", "desired-state=running", "--format", "{{.Node}} {{.CurrentState}}", service)
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(out) {
		node, state, _ := strings.Cut(strings.TrimSpace(line), " ")
		if !strings.HasPrefix(state, "Running") {
			continue
		}
		for _, h := range l.Hosts {
			if h.Name == node {
				return h, nil
			}
		}
	}
	return nil, nil
}
