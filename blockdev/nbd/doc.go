// Package nbd serves block devices over the NBD protocol, as proto.md of the
// NetworkBlockDevice project describes it: fixed newstyle negotiation with
// EXPORT_NAME, GO, INFO, LIST, ABORT, STRUCTURED_REPLY and the meta context
// options (no context is offered), then READ, WRITE, FLUSH, TRIM, WRITE_ZEROES
// and DISC with many requests in flight and replies in any order.
//
// # Promises
//
// A reply without error is sent only after the Device method returned nil, so
// a client's flush covers every write that was answered before, on any
// connection (NBD_FLAG_CAN_MULTI_CONN). Requests in flight at the same time
// reach the Device concurrently and may take effect in any order. Requests of
// any alignment are served.
//
// No bytes from a client reach a panic: every length is bounded before use, a
// request that breaks the protocol is answered EINVAL (ENOSPC for a write past
// the end) where the stream can still be followed, and ends the connection
// where it cannot. Memory for payloads is bounded for the whole server and
// requests in flight for each connection.
//
// # A client that reconnects
//
// A client whose connection died sends its unanswered requests again on a new
// one. A request still on its way through the old connection must not take
// effect after that: it would undo a later write. So a connection enters
// transmission only when every byte that the server's host had received on the
// export's older connections is read, and every request among them has
// returned from the Device; requests of connections that have ended are
// cancelled to that end, and a connection that stays stuck in the middle of a
// request is closed, which discards that request.
//
// This asks of a Device that a request whose method has returned, with
// whatever error and also after its context ended, is either ordered before
// every request submitted later or never takes effect. It cannot cover bytes
// of the old connection that the network delivers later still: a client that
// reconnects must have shut its old socket, and over TCP what its kernel had
// not yet sent then is lost only if the shutdown discards it (Linux keeps
// sending it). On a unix socket nothing is ever on the way.
//
// # Where to start reading
//
// server.go for the API, handshake.go for the table of options, transmit.go
// for the life of a request, entry.go for the order between connections.
package nbd
