// Package lab makes several Docker hosts on one machine and breaks them: for the
// demo and for the end-to-end tests. A host is a container that runs its own Docker
// engine, on a Docker network of the lab's own; a node of holdfast runs as a
// container of that engine, as it would on a real host.
//
// The hosts share one kernel: loop devices, /dev, the boot id and
// /sys/fs/fuse/connections are common to them and to the machine, and so is the page
// cache: killing a host is a loss of all its processes, not of its unsynced data.
//
// Everything a lab makes carries its name and the label holdfast.lab. Close removes
// it; Remove removes what a lab that was killed left; Leftovers lists what is still
// there. Images stay, named by their content, so that the next lab starts in
// seconds.
//
// Tried: cgroup v1 with the restricted profile. The normal profile and cgroup v2 follow
// docker-in-docker's recipe and await such a machine.
//
// Start reading at Open, then Host.
package lab
