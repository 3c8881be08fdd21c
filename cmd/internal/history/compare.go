package history

import (
	"fmt"
)

// Copy is what one replica holds.
type Copy struct {
	Node string
	Tail uint64     // its last entry
	Sums [][32]byte // of each block, from 0 on
}

// Compare says how copies differ, as violations; none if they are at one entry
// and every block is the same in all.
func Compare(copies []Copy) []Violation {
	if len(copies) == 0 {
		return nil
	}
	var found []Violation
	first := copies[0]
	for _, c := range copies[1:] {
		if c.Tail != first.Tail {
			found = append(found, Violation{Rule: "replicas", Block: -1, What: fmt.Sprintf("node %s ends at entry %d, node %s at %d", first.Node, first.Tail, c.Node, c.Tail)})
		}
		if len(c.Sums) != len(first.Sums) {
			found = append(found, Violation{Rule: "replicas", Block: -1, What: fmt.Sprintf("node %s has %d blocks, node %s %d", first.Node, len(first.Sums), c.Node, len(c.Sums))})
			continue
		}
		differ, at := 0, 0
		for i := range c.Sums {
			if c.Sums[i] != first.Sums[i] {
				if differ == 0 {
					at = i
				}
				differ++
			}
		}
		if differ > 0 {
			found = append(found, Violation{Rule: "replicas", Block: int64(at), What: fmt.Sprintf("nodes %s and %s differ in %d blocks, this the first", first.Node, c.Node, differ)})
		}
	}
	return found
}
