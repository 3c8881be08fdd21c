// Package docker is the volume driver that Docker Engine talks to: the v1 plugin
// protocol over a unix socket, in front of a plugin.Volumes.
// (https://docs.docker.com/engine/extend/plugins_volume/ and moby's
// volume/drivers, volume/service and pkg/plugins.)
//
// It promises:
//   - Activate is answered at once, and the socket exists only while it is
//     served. An engine waits without end on a socket that accepts and is silent,
//     and 15 s per volume on one that is stale. A lock on PATH.lock is held
//     before the path is touched.
//   - Every call is answered before the engine stops waiting for it.
//   - Get is never answered with an error unless the volume is known not to
//     exist: the engine takes any answer to Get as "no such volume" and forgets
//     the volume's options and labels. Where there is no answer, the connection
//     is broken, which the engine takes as "ask again".
//   - A call once begun runs to its end or its deadline, even if the engine hangs
//     up: a half-made mount helps nobody.
//   - A request without a body is refused. The engine sends one when it repeats a
//     call whose connection broke.
//
// Start reading at Server. Engine is a small client of Docker's own API: it makes
// the engine notice the driver (Swarm places tasks only on nodes whose engine
// has activated it) and says which containers use a volume. ParseName reads names
// that carry options, `size=10G,replicas=3,name=data`.
package docker
