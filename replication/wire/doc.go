// Package wire is the replication protocol in bytes: frames, and the messages
// in them, between the writer of a segment and one replica of it.
//
// One connection carries one session: one writer, one epoch's attempt, one
// replica. It starts with HELLO, which names the cluster, both nodes, the
// replica and the epoch, and which the other end answers with WELCOME; every
// later frame carries the epoch and the connection's nonce, so a frame of
// another session (a reused address and port, a delayed packet) never decodes.
//
// What holds:
//   - a frame whose header has a flipped bit is refused (crc32c over it), and so
//     is one whose body has (crc32c in the header);
//   - payload is covered per 4 KiB block by the crc32c that the writer computed
//     when the bytes came in; the frame carries these in its body, and whoever
//     stores or returns the bytes compares them (Verify). The wire itself adds
//     no sum over payload;
//   - every length is bounded before anything is allocated: MaxBody, MaxPayload;
//   - nothing that arrives can panic this package (fuzzed).
//
// FORMAT.md draws the bytes. Start reading at frame.go, then message.go.
package wire
