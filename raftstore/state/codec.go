package state

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/holdfast-storage/holdfast"
)

// coder writes or reads the fields of a record in one order, so that encoder and
// decoder cannot differ. All numbers are little endian and of fixed width: every
// value has exactly one encoding (FORMAT.md).
type coder struct {
	buf      []byte // written so far, or still to be read
	decoding bool
	err      error // the first; later calls do nothing
}

var (
	errShort  = errors.New("it ends early")
	errExcess = errors.New("it has bytes left over")
)

// maxString bounds a string in an encoding; a list is bounded by the bytes left.
const maxString = 1 << 16

func (c *coder) fail(err error) {
	if c.err == nil {
		c.err = err
	}
}

// take returns the next n bytes to read, nil after an error.
func (c *coder) take(n int) []byte {
	if c.err == nil && n > len(c.buf) {
		c.err = errShort
	}
	if c.err != nil {
		return nil
	}
	b := c.buf[:n]
	c.buf = c.buf[n:]
	return b
}

func u64[T ~uint64 | ~int64](c *coder, p *T) {
	if !c.decoding {
		c.buf = binary.LittleEndian.AppendUint64(c.buf, uint64(*p))
		return
	}
	if b := c.take(8); b != nil {
		*p = T(binary.LittleEndian.Uint64(b))
	}
}

func u32[T ~uint32](c *coder, p *T) {
	if !c.decoding {
		c.buf = binary.LittleEndian.AppendUint32(c.buf, uint32(*p))
		return
	}
	if b := c.take(4); b != nil {
		*p = T(binary.LittleEndian.Uint32(b))
	}
}

func (c *coder) u8(p *uint8) {
	if !c.decoding {
		c.buf = append(c.buf, *p)
		return
	}
	if b := c.take(1); b != nil {
		*p = b[0]
	}
}

func (c *coder) bool(p *bool) {
	var b uint8
	if *p {
		b = 1
	}
	c.u8(&b)
	if b > 1 {
		c.fail(fmt.Errorf("%d is not a bool", b))
	}
	if c.decoding {
		*p = b == 1
	}
}

// small is an int that is small and not negative: u32.
func (c *coder) small(p *int) {
	n := uint32(*p)
	if !c.decoding && int(n) != *p {
		c.fail(fmt.Errorf("%d does not fit", *p))
	}
	u32(c, &n)
	if c.decoding {
		*p = int(n)
	}
}

func id[T ~[16]byte](c *coder, p *T) {
	if !c.decoding {
		b := [16]byte(*p)
		c.buf = append(c.buf, b[:]...)
		return
	}
	if b := c.take(16); b != nil {
		*p = T(b)
	}
}

func (c *coder) str(p *string) {
	n := uint32(len(*p))
	if !c.decoding && len(*p) > maxString {
		c.fail(fmt.Errorf("a string of %d bytes is longer than %d", len(*p), maxString))
		return
	}
	u32(c, &n)
	if !c.decoding {
		c.buf = append(c.buf, *p...)
		return
	}
	if c.err == nil && n > maxString {
		c.fail(fmt.Errorf("a string of %d bytes is longer than %d", n, maxString))
	}
	if c.err == nil {
		*p = string(c.take(int(n)))
	}
}

// enum is a word out of a fixed list, written as its place there, from 1.
func enum[T ~string](c *coder, p *T, words []T) {
	n := uint8(slices.Index(words, *p) + 1)
	if !c.decoding && n == 0 {
		c.fail(fmt.Errorf("%q is not one of %v", *p, words))
	}
	c.u8(&n)
	if !c.decoding || c.err != nil {
		return
	}
	if n == 0 || int(n) > len(words) {
		c.fail(fmt.Errorf("%d is not the place of a word in %v", n, words))
		return
	}
	*p = words[n-1]
}

// list is a count and the elements. Every element has at least one byte, so a
// count beyond the bytes left is refused before anything is allocated for it.
func list[T any](c *coder, p *[]T, one func(c *coder, e *T)) {
	n := uint32(len(*p))
	u32(c, &n)
	if !c.decoding {
		for i := range *p {
			one(c, &(*p)[i])
		}
		return
	}
	if c.err == nil && uint64(n) > uint64(len(c.buf)) {
		c.fail(errShort)
	}
	*p = nil
	for i := uint32(0); i < n && c.err == nil; i++ {
		var e T
		one(c, &e)
		if c.err == nil {
			*p = append(*p, e)
		}
	}
}

// The words of each enum, in the order of their numbers. Only ever appended to.
var (
	roles        = []holdfast.ReplicaRole{holdfast.RoleSyncing, holdfast.RoleInSync, holdfast.RoleStale, holdfast.RoleOrphan, holdfast.RoleDeleting}
	diskStates   = []holdfast.DiskState{holdfast.DiskOK, holdfast.DiskFailed}
	formatStates = []holdfast.FormatState{holdfast.FormatNone, holdfast.FormatDoing, holdfast.FormatDone}
	ackModes     = []holdfast.AckMode{holdfast.AckReceived, holdfast.AckDurable}
	phases       = []Phase{PhaseDetached, PhaseAttaching, PhaseAttached}
	duties       = []NodeDuty{DutyServing, DutyMaintenance, DutyDraining}
	memberKinds  = []MemberKind{MemberWatcher, MemberNonVoter, MemberVoter}
)

// EncodeCommand writes a command at a cluster level: level u32, kind u16 in a
// u32, fields.
func EncodeCommand(level holdfast.ClusterLevel, cmd Command) ([]byte, error) {
	if level != holdfast.Level1 {
		return nil, holdfast.Errorf(holdfast.ErrUnsupported, "this version writes cluster level %d, not %d", holdfast.Level1, level)
	}
	c := &coder{}
	kind := uint32(cmd.kind())
	u32(c, &level)
	u32(c, &kind)
	cmd.code(c)
	if c.err != nil {
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "encode %s: %w", Name(cmd), c.err)
	}
	return c.buf, nil
}

// DecodeCommand reads a command. An encoding that this version does not
// understand is ErrUnsupported, a broken one ErrIntegrity: a member that meets
// either in its log must stop.
func DecodeCommand(b []byte) (Command, error) {
	c := &coder{buf: b, decoding: true}
	var level holdfast.ClusterLevel
	var kind uint32
	u32(c, &level)
	u32(c, &kind)
	if c.err != nil {
		return nil, holdfast.Errorf(holdfast.ErrIntegrity, "decode command of %d bytes: %w", len(b), c.err)
	}
	if level != holdfast.Level1 {
		return nil, holdfast.Errorf(holdfast.ErrUnsupported, "a command of cluster level %d: this version reads level %d", level, holdfast.Level1)
	}
	var cmd Command
	if kind <= 0xffff {
		cmd = newCommand(commandKind(kind))
	}
	if cmd == nil {
		return nil, holdfast.Errorf(holdfast.ErrUnsupported, "a command of unknown kind %d", kind)
	}
	cmd.code(c)
	if err := c.done(); err != nil {
		return nil, holdfast.Errorf(holdfast.ErrIntegrity, "decode %s: %w", Name(cmd), err)
	}
	return cmd, nil
}

// done returns the first error, or one if bytes are left.
func (c *coder) done() error {
	if c.err == nil && len(c.buf) > 0 {
		c.err = errExcess
	}
	return c.err
}
