// Package api is the user's side of a node: how errors travel, how a client
// finds a daemon, and how messages are written as JSON. The messages and the
// service itself are in apipb; the server is cmd/internal/node.
package api
