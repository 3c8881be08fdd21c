// Package observe is what a node shows to machines that watch it: Prometheus
// metrics, and whether it lives and can work. It serves plain HTTP on the port of
// the API (Split tells the two apart by their first bytes), so that a node needs no
// further port:
//
//	GET /metrics   Prometheus text format; every name begins with holdfast_
//	GET /healthz   200 while the process answers
//	GET /readyz    200 while a volume could be created now, else 503 and why
//
// Everything is read when it is asked for, from the same states that `holdfast
// volume explain` and `disk ls` show; nothing here is on the path of a request. What
// has a limit shows both sides of it: used and limit, waits and their bound.
package observe
