package attachment

import "github.com/holdfast-storage/holdfast/replication/latency"

// opKind is what a request does; each kind has its own latencies, since a change
// of the mix must not look like a change of the disks.
type opKind uint8

const (
	opRead opKind = iota
	opWrite
	opFlush
	opKinds
)

var opKindNames = [opKinds]string{"read", "write", "flush"}

// foreground is what clients' requests took, by kind.
type foreground [opKinds]latency.Histogram

func (f *foreground) merge(o *foreground) {
	for k := range f {
		if o[k].N() > 0 {
			f[k].Merge(&o[k])
		}
	}
}

func (f *foreground) count() (n int) {
	for k := range f {
		n += f[k].N()
	}
	return n
}
