package hostdev

import (
	"errors"
	"log/slog"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-storage/holdfast"
)

// answer serves one request of n bytes, which lies in the slab, and writes the
// reply.
func (s *Server) answer(h inHeader, w *slab, n int) {
	size, err := s.serve(h, w, n)
	if err == nil {
		s.reply(h, w, size, 0)
		return
	}
	if s.ctx.Err() != nil {
		return // cancelled by Close: the next server redoes it
	}
	errno := errnoOf(h.Op, err)
	if errno != unix.ENOSYS {
		s.counts.errors.Add(1)
		s.logFailure(h, errno, err)
	}
	s.reply(h, w, 0, errno)
}

// serve does what the request asks and puts the reply's payload into the slab;
// it returns the payload's length.
func (s *Server) serve(h inHeader, w *slab, n int) (int, error) {
	args := w.head()[inHeaderSize:min(n, requestHead)]
	size := s.dev.Size()
	switch h.Op {
	case opRead:
		return s.serveRead(args, w, size)
	case opWrite:
		return s.serveWrite(args, w, n)
	case opFsync:
		s.counts.flushes.Add(1)
		return 0, s.dev.Flush(s.ctx)
	case opFallocate:
		return 0, s.serveFallocate(args, size)
	case opGetattr:
		putAttr(w.payload(attrOutSize), size)
		return attrOutSize, nil
	case opSetattr:
		valid, to, ok := parseSetattrIn(args)
		if !ok || valid&fattrSize != 0 && to != uint64(size) {
			return 0, holdfast.Errorf(holdfast.ErrInvalid, "the device's size is not set through its file")
		}
		putAttr(w.payload(attrOutSize), size)
		return attrOutSize, nil
	case opOpen:
		clear(w.payload(openOutSize)) // one handle, 0; nothing is kept per open
		return openOutSize, nil
	case opStatfs:
		putStatfs(w.payload(statfsSize), size)
		return statfsSize, nil
	case opRelease, opFlush: // FLUSH is close(2), not fsync(2)
		return 0, nil
	}
	return 0, errNoSuchRequest
}

// errNoSuchRequest is the answer to a request that this file does not have; the
// kernel then stops sending it. It must never be the answer to FSYNC.
var errNoSuchRequest = errors.New("no such request")

func (s *Server) serveRead(args []byte, w *slab, size int64) (int, error) {
	in, ok := parseIOIn(args)
	if !ok || in.Size > maxWrite || int(in.Size) > len(w.mem)-pageSize {
		return 0, holdfast.Errorf(holdfast.ErrInvalid, "malformed READ")
	}
	s.counts.reads.Add(1)
	if in.Offset >= uint64(size) {
		return 0, nil
	}
	n := int(min(int64(in.Size), size-int64(in.Offset)))
	return n, s.dev.ReadAt(s.ctx, w.payload(n), int64(in.Offset))
}

func (s *Server) serveWrite(args []byte, w *slab, n int) (int, error) {
	in, ok := parseIOIn(args)
	if !ok || int(in.Size) != n-requestHead || in.Offset > 1<<62 {
		return 0, holdfast.Errorf(holdfast.ErrInvalid, "malformed WRITE")
	}
	s.counts.writes.Add(1)
	if err := s.dev.WriteAt(s.ctx, w.payload(int(in.Size)), int64(in.Offset), false); err != nil {
		return 0, err
	}
	out := w.payload(8)
	clear(out)
	order.PutUint32(out, in.Size)
	return 8, nil
}

// serveFallocate punches or zeroes. The kernel sends PUNCH_HOLE for discards
// and for zeroing alike, so a punched range reads as zeroes to its last byte:
// whole blocks are trimmed, the edges are zeroed.
func (s *Server) serveFallocate(args []byte, size int64) error {
	in, ok := parseFallocateIn(args)
	if !ok || in.Offset > uint64(size) || in.Length > uint64(size)-in.Offset {
		return holdfast.Errorf(holdfast.ErrInvalid, "FALLOCATE of %d bytes at %d leaves the device of %d", in.Length, in.Offset, size)
	}
	off, end := int64(in.Offset), int64(in.Offset+in.Length)
	switch in.Mode {
	case fallocPunchHole | fallocKeepSize:
		s.counts.trims.Add(1)
		const block = holdfast.BlockSize
		first, last := (off+block-1)/block*block, end/block*block
		if first >= last {
			return s.dev.WriteZeroes(s.ctx, off, end-off, false, false)
		}
		if off < first {
			if err := s.dev.WriteZeroes(s.ctx, off, first-off, false, false); err != nil {
				return err
			}
		}
		if last < end {
			if err := s.dev.WriteZeroes(s.ctx, last, end-last, false, false); err != nil {
				return err
			}
		}
		return s.dev.Trim(s.ctx, first, last-first, false)
	case fallocZeroRange, fallocZeroRange | fallocKeepSize:
		s.counts.zeroes.Add(1)
		return s.dev.WriteZeroes(s.ctx, off, end-off, true, false)
	}
	return holdfast.Errorf(holdfast.ErrUnsupported, "FALLOCATE mode %#x", in.Mode)
}

// reply answers a request with size bytes of the slab's payload, or an errno.
func (s *Server) reply(h inHeader, w *slab, size int, errno unix.Errno) {
	b := w.reply(size)
	putOutHeader(b, len(b), -int32(errno), h.Unique)
	for {
		_, err := unix.Write(s.fd, b)
		switch {
		case err == nil:
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ENOENT): // the request was withdrawn
		case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ECONNABORTED): // the connection has ended
		default:
			s.log.Error("fuse reply refused", slog.String("request", h.Op.String()), slog.Any("error", err))
		}
		return
	}
}

// errnoOf is what the loop device gets for an error. It must not get EINVAL for
// FSYNC, which it takes for "needs no flush" and success, nor ENOSYS, after
// which the kernel never sends another FSYNC.
func errnoOf(op opcode, err error) unix.Errno {
	if op == opFsync {
		if holdfast.KindOf(err) == holdfast.ErrNoSpace {
			return unix.ENOSPC
		}
		return unix.EIO
	}
	if errors.Is(err, errNoSuchRequest) {
		return unix.ENOSYS
	}
	switch holdfast.KindOf(err) {
	case holdfast.ErrNoSpace:
		return unix.ENOSPC
	case holdfast.ErrInvalid:
		return unix.EINVAL
	case holdfast.ErrUnsupported:
		return unix.EOPNOTSUPP
	case holdfast.ErrTimeout:
		return unix.ETIMEDOUT
	case holdfast.ErrFenced:
		return unix.ESHUTDOWN
	}
	return unix.EIO
}

// logFailure logs the first failed request and then one every errorLogEvery.
func (s *Server) logFailure(h inHeader, errno unix.Errno, err error) {
	now := time.Now().UnixNano()
	last := s.lastLog.Load()
	if last != 0 && now-last < int64(errorLogEvery) || !s.lastLog.CompareAndSwap(last, now) {
		return
	}
	s.log.Error("block request failed", slog.String("request", h.Op.String()), slog.String("errno", unix.ErrnoName(errno)),
		slog.Uint64("errors", s.counts.errors.Load()), slog.Any("error", err))
}
