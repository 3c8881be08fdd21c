package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// removeDeadline bounds the removal of what is left once the containers are gone.
const removeDeadline = 30 * time.Second

// Remove removes every container, network, volume and cgroup of the lab called name,
// whoever made it; keepVolumes leaves the volumes. What is not there is no error.
func Remove(ctx context.Context, name string, keepVolumes bool) error {
	mark := "label=" + label + "=" + name
	ids, err := lines(docker(ctx, "ps", "-aq", "--no-trunc", "--filter", mark))
	if err != nil {
		return fmt.Errorf("find what is left of lab %s: %w", name, err)
	}
	var errs []error
	if len(ids) > 0 {
		// Asked of the containers: an engine takes long to list volumes if one of its
		// other drivers is dead.
		vols, err := lines(docker(ctx, append([]string{"inspect", "-f", `{{range .Mounts}}{{if eq .Type "volume"}}{{println .Name}}{{end}}{{end}}`}, ids...)...))
		if err == nil && !keepVolumes {
			err = releaseVolumes(ctx, ids, vols)
		}
		if err != nil {
			return fmt.Errorf("remove what is left of lab %s: %w", name, err)
		}
		_, err = docker(ctx, append([]string{"rm", "-f"}, ids...)...)
		errs = append(errs, err)
		for _, id := range ids {
			errs = append(errs, removeCgroups(ctx, id))
		}
		if len(vols) > 0 && !keepVolumes {
			_, err := docker(ctx, append([]string{"volume", "rm", "-f"}, vols...)...)
			errs = append(errs, err)
		}
	}
	networks, err := lines(docker(ctx, "network", "ls", "-q", "--filter", mark))
	errs = append(errs, err)
	if len(networks) > 0 {
		_, err := docker(ctx, append([]string{"network", "rm"}, networks...)...)
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove what is left of lab %s: %w", name, err)
	}
	return nil
}

// releaseVolumes kills the hosts and makes their volumes removable: a node's bare
// mountpoints are immutable. It comes before the containers are removed, so that after
// an error the volumes are still found through them.
func releaseVolumes(ctx context.Context, ids, vols []string) error {
	running, err := lines(docker(ctx, "ps", "-q", "--no-trunc", "--filter", "label="+label))
	if err != nil {
		return err
	}
	running = slices.DeleteFunc(running, func(id string) bool { return !slices.Contains(ids, id) })
	if len(running) > 0 {
		if _, err := docker(ctx, append([]string{"kill"}, running...)...); err != nil {
			return err
		}
		if _, err := docker(ctx, append([]string{"wait"}, running...)...); err != nil {
			return err
		}
	}
	image, err := docker(ctx, "inspect", "-f", "{{.Config.Image}}", ids[0])
	if err != nil {
		return err
	}
	args := []string{"run", "--rm", "--network", "none", "--cap-add", "LINUX_IMMUTABLE", "--entrypoint", "sh"}
	for _, v := range vols {
		if strings.HasSuffix(v, dataVolume) {
			args = append(args, "--mount", "type=volume,volume-driver=local,src="+v+",dst=/volumes/"+v)
		}
	}
	_, err = docker(ctx, append(args, image, "-c", "chattr -R -f -i /volumes/* || :")...)
	return err
}

// cgroupRoots are where the machine's engine keeps the cgroups of its containers, for
// cgroup v1 (one tree per controller) and v2.
var cgroupRoots = []string{"/sys/fs/cgroup/*/docker", "/sys/fs/cgroup/docker"}

// removeCgroups removes the cgroups that a killed host's engine had made below the
// host's own, and that one. The dead take a moment to leave their cgroups. Without
// root nothing is done: there is nothing to be done then.
func removeCgroups(ctx context.Context, container string) error {
	if os.Geteuid() != 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, removeDeadline)
	defer cancel()
	for _, root := range cgroupRoots {
		trees, err := filepath.Glob(filepath.Join(root, container))
		if err != nil {
			return err
		}
		for _, tree := range trees {
			if err := retry(ctx, "cgroup "+tree+" to be empty", func() error { return removeTree(tree) }); err != nil {
				return err
			}
		}
	}
	return nil
}

// removeTree removes a directory of directories, deepest first. The files in a cgroup
// are not removed but go with it.
func removeTree(root string) error {
	var dirs []string
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, dir := range slices.Backward(dirs) {
		if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// lines splits a command's output into its lines that are not empty.
func lines(out string, err error) ([]string, error) {
	return strings.Fields(out), err
}
