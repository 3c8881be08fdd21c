package coordinator

import (
	"errors"
	"reflect"
	"testing"

	"github.com/holdfast-storage/holdfast"
)

var (
	dataA  = Piece{State: BlockData, Sum: 0xa}
	dataB  = Piece{State: BlockData, Sum: 0xb}
	badA   = Piece{State: BlockBad, Sum: 0xa}
	badB   = Piece{State: BlockBad, Sum: 0xb}
	poison = Piece{State: BlockPoison}
	zero   = Piece{}
)

func holder(i byte) Holder { return Holder{Replica: holdfast.ReplicaID{i}, Conn: Conn(i)} }

func from(p Piece, n int) Piece {
	p.From = n
	return p
}

// heard is what one question brought: a content as of an entry, or none.
type heard struct {
	last, asOf holdfast.Seq
	blocks     []Piece // nil: no answer
}

// TestMend: the chunk of holder 1, last changed by entry 9, read as of 20; 2 and 3 are
// in sync too and are asked in this order, for the chunk as of 20.
func TestMend(t *testing.T) {
	for what, x := range map[string]struct {
		own     []Piece
		extra   []Piece
		heard   []heard
		partial bool // not every in-sync member can be asked
		outside bool // holder 1 is not in sync
		want    []Piece
		asOf    holdfast.Seq // 0: 20
		known   bool         // nothing is news
		err     error
	}{
		"whole elsewhere":               {own: []Piece{badA, dataB}, heard: []heard{{9, 22, []Piece{dataA, dataB}}}, want: []Piece{from(dataA, 1), from(dataB, 1)}, asOf: 22},
		"whole elsewhere, newer":        {own: []Piece{poison, dataB}, heard: []heard{{21, 22, []Piece{dataB, zero}}}, want: []Piece{from(dataB, 1), from(zero, 1)}, asOf: 22},
		"whole elsewhere, and too old":  {own: []Piece{badA, zero}, heard: []heard{{9, 19, []Piece{dataA, zero}}, {9, 20, []Piece{badA, zero}}}, err: ErrNotNow},
		"pieced together":               {own: []Piece{badA, badB}, heard: []heard{{9, 20, []Piece{dataA, badB}}, {9, 20, []Piece{badA, dataB}}}, want: []Piece{from(dataA, 1), from(dataB, 2)}},
		"by the sum, of another entry":  {own: []Piece{badA, zero}, heard: []heard{{21, 21, []Piece{dataA, badB}}}, want: []Piece{from(dataA, 1), zero}},
		"not by another sum":            {own: []Piece{badA, zero}, heard: []heard{{21, 21, []Piece{dataB, badB}}, {9, 20, []Piece{badA, zero}}}, err: ErrNotNow},
		"a lost one of the same entry":  {own: []Piece{poison, badB}, heard: []heard{{9, 25, []Piece{dataA, badB}}, {9, 20, []Piece{zero, badB}}}, want: []Piece{from(dataA, 1), poison}},
		"zeroes of the same entry":      {own: []Piece{badA, badB}, heard: []heard{{9, 25, []Piece{zero, badB}}, {9, 20, []Piece{zero, badB}}}, want: []Piece{from(zero, 1), poison}},
		"a lost one, of another entry":  {own: []Piece{poison, zero}, heard: []heard{{21, 25, []Piece{dataA, badB}}, {9, 20, []Piece{poison, zero}}}, err: ErrNotNow},
		"nobody has it":                 {own: []Piece{badA, dataB}, heard: []heard{{9, 20, []Piece{badA, dataB}}, {9, 30, []Piece{poison, dataB}}}, want: []Piece{poison, dataB}},
		"nobody has it, as was known":   {own: []Piece{poison, dataB}, heard: []heard{{9, 20, []Piece{badA, dataB}}, {9, 30, []Piece{poison, dataB}}}, want: []Piece{poison, dataB}, known: true},
		"one does not answer":           {own: []Piece{badA}, heard: []heard{{}, {9, 20, []Piece{badA}}}, err: ErrNotNow},
		"one does not answer, one has":  {own: []Piece{badA}, heard: []heard{{}, {9, 20, []Piece{dataA}}}, want: []Piece{from(dataA, 1)}},
		"one cannot be asked":           {own: []Piece{badA}, partial: true, heard: []heard{{9, 20, []Piece{badA}}, {9, 20, []Piece{badA}}}, err: ErrNotNow},
		"not in sync itself":            {own: []Piece{badA}, outside: true, heard: []heard{{9, 20, []Piece{badA}}, {9, 20, []Piece{badA}}}, err: ErrNotNow},
		"the target of a copy has it":   {own: []Piece{badA, dataB}, extra: []Piece{dataA, badA}, want: []Piece{from(dataA, 1), dataB}},
		"the target has something else": {own: []Piece{badA, poison}, extra: []Piece{dataB, dataB}, heard: []heard{{9, 20, []Piece{dataA, dataB}}}, want: []Piece{from(dataA, 2), from(dataB, 2)}},
	} {
		t.Run(what, func(t *testing.T) {
			own := append([]Piece(nil), x.own...)
			m := NewMend(ChunkContent{LastSeq: 9, AsOf: 20, Blocks: own}, holder(1), 20)
			if x.extra != nil {
				m.Extra(ChunkContent{LastSeq: 9, AsOf: 1, Blocks: x.extra})
			}
			list := []Holder{holder(1), holder(2), holder(3)}
			if x.outside {
				list = list[1:]
			}
			m.Members(list, !x.partial)
			asked := 0
			for h, floor, ok := m.Next(); ok; h, floor, ok = m.Next() {
				if h != holder(byte(asked+2)) || floor != 20 || asked == len(x.heard) {
					t.Fatalf("asks %v as of %d after %d others", h, floor, asked)
				}
				if a := x.heard[asked]; a.blocks != nil {
					m.Answer(ChunkContent{LastSeq: a.last, AsOf: a.asOf, Blocks: a.blocks})
				} else {
					m.Silent()
				}
				asked++
			}
			if asked != len(x.heard) {
				t.Errorf("asked %d members, want %d", asked, len(x.heard))
			}
			c, news, err := m.Done()
			if !errors.Is(err, x.err) || err == nil && x.err != nil {
				t.Fatalf("error %v, want %v", err, x.err)
			}
			if asOf := max(x.asOf, 20); err == nil && (!reflect.DeepEqual(c.Blocks, x.want) || c.AsOf != asOf || news == x.known) {
				t.Errorf("%+v, news %v; want %+v as of %d, news %v", c, news, x.want, asOf, !x.known)
			}
			if !reflect.DeepEqual(own, x.own) {
				t.Errorf("the caller's content was changed to %+v", own)
			}
		})
	}
}

// TestHolders: who can be asked is in sync and streams; others make the list incomplete.
func TestHolders(t *testing.T) {
	with := func(i byte, inSync, joining bool, link linkState) *member {
		return &member{Replica: Replica{ID: holdfast.ReplicaID{i}}, conn: Conn(i), inISR: inSync, joining: joining, link: link}
	}
	c := &Core{}
	if list, all := c.Holders(); len(list) > 0 || all {
		t.Errorf("nobody is there: %v, all %v", list, all)
	}
	c.members = []*member{with(1, true, false, linkStreaming), with(2, false, false, linkStreaming), with(3, true, false, linkStreaming)}
	if list, all := c.Holders(); !reflect.DeepEqual(list, []Holder{holder(1), holder(3)}) || !all {
		t.Errorf("two in sync: %v, all %v", list, all)
	}
	for _, m := range []*member{with(4, true, false, linkDown), with(4, true, true, linkStreaming), with(4, true, false, linkCatchup)} {
		if list, all := (&Core{members: append(c.members[:3:3], m)}).Holders(); len(list) != 2 || all {
			t.Errorf("one that cannot be asked: %v, all %v", list, all)
		}
	}
}
