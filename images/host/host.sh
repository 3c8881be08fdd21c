#!/bin/sh
# Makes this container a Docker host and becomes its engine. Arguments are added to
# dockerd's.
set -eu

# Volumes are mounted by one container and used by others: mounts must travel.
mount --make-rshared /

if [ -f /sys/fs/cgroup/cgroup.controllers ]; then
	# cgroup v2, as docker-in-docker does it: no process may stay in the root of a
	# tree whose controllers are handed on.
	mkdir -p /sys/fs/cgroup/init
	xargs -rn1 </sys/fs/cgroup/cgroup.procs >/sys/fs/cgroup/init/cgroup.procs || :
	sed -e 's/ / +/g' -e 's/^/+/' </sys/fs/cgroup/cgroup.controllers >/sys/fs/cgroup/cgroup.subtree_control
	parent=/docker
else
	# Inner containers go below this container's own cgroup, so that a pause or a
	# kill of the host reaches them.
	parent=$(grep freezer /proc/self/cgroup | cut -d: -f3)
	[ "$parent" != / ] || parent=/docker
fi

# A host that was killed starts again with what its disk holds, nothing else.
rm -f /var/run/docker.pid

# The MTU leaves room for Swarm's overlay headers.
exec dockerd --mtu 1400 --cgroup-parent "$parent" "$@"
