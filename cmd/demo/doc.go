// Command demo shows, on one machine, what holdfast is for: three Docker hosts, a
// database on a volume, the host dies, and every acknowledged commit is there on
// another host. Then the same with Docker Swarm moving the database.
//
// `make demo` runs it; `make demo BREAK=lose-acked` runs it with a holdfast that
// acknowledges what it then loses, and must end with exit code 3. Exit codes: 0 nothing
// lost, 1 the demo could not be carried out, or did not notice the loss of a build
// that loses rows, 2 usage or a machine that lacks something, 3 acknowledged rows were
// lost.
//
// `go run ./cmd/demo leftovers` lists what demos and tests have left on this machine,
// and exits 1 if there is anything.
//
// Start reading at demo.run. The client, and with it the ledger of acknowledged
// commits, is this process, outside of the three hosts: ledger.go.
package main
