package state

import (
	"bytes"
	"iter"
	"slices"
	"sort"
)

// table is a persistent map from a 16-byte key to a record: set and remove
// return a new table that shares all but one shard with the old one, which
// stays as it was. Iteration is in key order, so it is the same on every
// member. Keys are random, so shards by first byte are even: at 10,000 volumes a
// change copies 2 KiB of shard pointers and about 40 entries.
type table[V any] struct {
	shards *[256]*[]entry[V]
	n      int
}

type key = [16]byte

type entry[V any] struct {
	key key
	val *V
}

func (t table[V]) shard(k key) []entry[V] {
	if t.shards == nil || t.shards[k[0]] == nil {
		return nil
	}
	return *t.shards[k[0]]
}

func position[V any](s []entry[V], k key) (int, bool) {
	i := sort.Search(len(s), func(i int) bool { return bytes.Compare(s[i].key[:], k[:]) >= 0 })
	return i, i < len(s) && s[i].key == k
}

func (t table[V]) get(k key) (*V, bool) {
	s := t.shard(k)
	i, ok := position(s, k)
	if !ok {
		return nil, false
	}
	return s[i].val, true
}

// set puts v at k. v must not be changed afterwards.
func (t table[V]) set(k key, v *V) table[V] {
	old := t.shard(k)
	i, ok := position(old, k)
	s := make([]entry[V], 0, len(old)+1)
	s = append(s, old[:i]...)
	s = append(s, entry[V]{k, v})
	if ok {
		s = append(s, old[i+1:]...)
	} else {
		s = append(s, old[i:]...)
		t.n++
	}
	return t.with(k, s)
}

func (t table[V]) remove(k key) table[V] {
	old := t.shard(k)
	i, ok := position(old, k)
	if !ok {
		return t
	}
	t.n--
	return t.with(k, slices.Concat(old[:i], old[i+1:]))
}

func (t table[V]) with(k key, s []entry[V]) table[V] {
	shards := new([256]*[]entry[V])
	if t.shards != nil {
		*shards = *t.shards
	}
	shards[k[0]] = &s
	t.shards = shards
	return t
}

// all yields the records in key order.
func (t table[V]) all() iter.Seq[*V] {
	return func(yield func(*V) bool) {
		if t.shards == nil {
			return
		}
		for _, s := range t.shards {
			if s == nil {
				continue
			}
			for _, e := range *s {
				if !yield(e.val) {
					return
				}
			}
		}
	}
}
