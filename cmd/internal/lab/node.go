package lab

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"
)

// The node's container on each host, and the port of its address.
const (
	nodeContainer = "holdfast"
	nodePort      = "9400"
)

// nodeDeadline bounds the wait until a started node could create a volume.
const nodeDeadline = 90 * time.Second

// NodeAddress is where the host's node is dialled by others.
func (h *Host) NodeAddress() string { return h.Address + ":" + nodePort }

// StartNode runs the node's container on the host, as on a real host, with flags added
// to those that every node here has, and waits until the node answers. The first node
// needs --bootstrap, the others --join and its address.
func (h *Host) StartNode(ctx context.Context, flags ...string) error {
	args := []string{"run", "-d", "--name", nodeContainer, "--restart", "unless-stopped", "--network", "host", "--stop-timeout", "30",
		"-v", "/run/docker:/run/docker", "-v", "/run/docker.sock:/run/docker.sock", "-v", "/run/holdfast:/run/holdfast",
		"-v", DataDir + ":" + DataDir + ":rshared"}
	args = append(args, h.lab.options.Profile.nodeFlags()...)
	args = append(args, h.lab.options.Images.Node,
		"--name", h.Name, "--data-dir", DataDir, "--address", h.NodeAddress(), "--listen", h.Address, "--insecure")
	if _, err := h.Docker(ctx, append(args, flags...)...); err != nil {
		return fmt.Errorf("start the node: %w", err)
	}
	if err := h.WaitNode(ctx); err != nil {
		return fmt.Errorf("%w\nthe node's log ends:\n%s", err, h.NodeLog(ctx, 20))
	}
	return nil
}

// StartCluster starts a node on every host: the first makes the cluster, the others
// join it.
func (l *Lab) StartCluster(ctx context.Context, flags ...string) error {
	for i, h := range l.Hosts {
		how := []string{"--bootstrap"}
		if i > 0 {
			how = []string{"--join", l.Hosts[0].NodeAddress()}
		}
		if err := h.StartNode(ctx, append(how, flags...)...); err != nil {
			return err
		}
	}
	return nil
}

// WaitNode waits until the host's node says that it could create a volume now.
func (h *Host) WaitNode(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, nodeDeadline)
	defer cancel()
	return retry(ctx, "the node of "+h.Name, func() error {
		_, err := h.Holdfast(ctx, "status", "--wait", "5s")
		return err
	})
}

// Holdfast runs a verb of the command line in the node's container. It may be called
// concurrently.
func (h *Host) Holdfast(ctx context.Context, args ...string) (string, error) {
	return h.Docker(ctx, append([]string{"exec", nodeContainer, "holdfast"}, args...)...)
}

// NodeLog returns the last lines of the node's log, for errors; it never fails.
func (h *Host) NodeLog(ctx context.Context, lines int) string {
	out, err := h.Exec(ctx, "sh", "-c", fmt.Sprintf("docker logs --tail %d %s 2>&1", lines, nodeContainer))
	if err != nil {
		return err.Error()
	}
	return out
}

// VolumeStatus is what the lab reads of `volume inspect --json`.
type VolumeStatus struct {
	State    string `json:"state"`
	Node     string `json:"node"`
	Replicas []struct {
		Node  string `json:"node"`
		State string `json:"state"`
	} `json:"replicas"`
}

// Whole reports whether the volume has count replicas that are all in-sync.
func (v VolumeStatus) Whole(count int) bool {
	for _, r := range v.Replicas {
		if r.State != "in-sync" {
			return false
		}
	}
	return len(v.Replicas) == count
}

// String is one line: state, holder, and each replica's node and state, by node.
func (v VolumeStatus) String() string {
	parts := []string{v.State}
	if v.Node != "" {
		parts = append(parts, "on "+v.Node)
	}
	var replicas []string
	for _, r := range v.Replicas {
		replicas = append(replicas, r.Node+"="+r.State)
	}
	slices.Sort(replicas)
	return strings.Join(append(parts, replicas...), " ")
}

// InspectVolume asks the host's node for a volume.
func (h *Host) InspectVolume(ctx context.Context, name string) (VolumeStatus, error) {
	var status VolumeStatus
	out, err := h.Holdfast(ctx, "volume", "inspect", name, "--json")
	if err != nil {
		return status, err
	}
	if err := json.Unmarshal([]byte(out), &status); err != nil {
		return status, fmt.Errorf("read volume inspect of %s: %w: %.200s", name, err, out)
	}
	return status, nil
}

// WaitWhole waits until the host's node says that the volume has count replicas, all
// in-sync, and returns what it said last.
func (h *Host) WaitWhole(ctx context.Context, name string, count int) (VolumeStatus, error) {
	var last VolumeStatus
	err := retry(ctx, "volume "+name+" to be whole", func() error {
		status, err := h.InspectVolume(ctx, name)
		if err != nil {
			return err
		}
		last = status
		if !status.Whole(count) {
			return fmt.Errorf("volume %s: %v", name, status)
		}
		return nil
	})
	return last, err
}

// KillDaemon kills the node's daemon process alone, as kill -9 does; the keeper, and
// with it the mounts, live on and start another. It returns without waiting for that.
func (h *Host) KillDaemon(ctx context.Context) error {
	// Asked of the engine: the node's image has no tools for it. The keeper's own
	// command line ends in "-- serve ...", the daemon's begins with "... serve".
	script := `set -e
pids=$(docker top ` + nodeContainer + ` -eo pid,args | awk '$3 == "serve" {print $1}')
test -n "$pids"
kill -9 $pids`
	if _, err := h.Exec(ctx, "sh", "-c", script); err != nil {
		return fmt.Errorf("kill the daemon: %w", err)
	}
	return nil
}
