// Package e2e tests whole nodes as a user meets them: real processes of
// bin/holdfast, real NBD clients, kill -9. Its code is all in tests; a cluster's
// nodes stand on loopback, each with its own ports and data directory. Tests that mostly wait run side by
// side; those that measure how long a client waits, or look at the whole machine, do not.
package e2e
