package lab

import (
	"context"

	"github.com/holdfast-storage/holdfast"
)

// Profile is the set of privileges with which hosts, and nodes inside them, run.
type Profile string

// The profiles. Probe says which one works on this machine.
const (
	// ProfileNormal is --privileged: what nearly every machine allows.
	ProfileNormal Profile = "normal"
	// ProfileRestricted is for machines whose engine itself lacks CAP_SYS_RESOURCE,
	// so that --privileged cannot be granted: everything but that.
	ProfileRestricted Profile = "restricted"
)

// restricted are the privileges of both levels under ProfileRestricted.
var restricted = []string{
	"--cap-add", "ALL", "--cap-drop", "SYS_RESOURCE",
	"--security-opt", "seccomp=unconfined",
	"--security-opt", "apparmor=unconfined",
	"--security-opt", "systempaths=unconfined",
	"--device-cgroup-rule", "a *:* rwm",
}

// hostFlags are docker run's flags for a host.
func (p Profile) hostFlags() []string {
	if p == ProfileNormal {
		return []string{"--privileged", "--cgroupns", "private", "-v", "/dev:/dev"}
	}
	return append([]string{"-v", "/dev:/dev", "-v", "/sys/fs/cgroup:/sys/fs/cgroup:rw", "--cgroupns", "host"}, restricted...)
}

// nodeFlags are docker run's flags for a node inside a host. /dev is the host's:
// loop devices made later would not show in a container's own.
func (p Profile) nodeFlags() []string {
	if p == ProfileNormal {
		return []string{"--privileged", "-v", "/dev:/dev"}
	}
	return append([]string{"-v", "/dev:/dev"}, restricted...)
}

// Probe runs a container with the privileges of a host, from an image that has a
// shell and mount, and returns the first profile that works. ErrUnavailable if none
// does.
func Probe(ctx context.Context, image string) (Profile, error) {
	var last error
	for _, p := range []Profile{ProfileNormal, ProfileRestricted} {
		args := append([]string{"run", "--rm", "--network", "none", "--entrypoint", "sh"}, p.hostFlags()...)
		args = append(args, image, "-c", "mount --make-rshared / && mount -t tmpfs none /mnt && test -c /dev/fuse && test -c /dev/loop-control")
		if _, last = docker(ctx, args...); last == nil {
			return p, nil
		}
	}
	return "", holdfast.Errorf(holdfast.ErrUnavailable, "no privileged container can be run here: %w", last).
		WithRemedy("the lab needs a Linux engine that is not rootless, with /dev/fuse and /dev/loop-control")
}
