package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/metadata"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/cmd/internal/api"
	"github.com/holdfast-storage/holdfast/cmd/internal/api/apipb"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

// askTime bounds what a salvage waits for a node to tell of its replicas.
const askTime = 3 * time.Second

// SalvageVolume implements apipb.HoldfastServer. Without a choice it says what
// there is to choose from and changes nothing.
func (s *Server) SalvageVolume(ctx context.Context, req *apipb.SalvageRequest) (*apipb.Salvage, error) {
	for {
		out, err := s.salvage(ctx, req)
		if !errors.Is(err, state.ReasonStaleRevision) || ctx.Err() != nil {
			return out, err
		}
		// A repair began, or somebody else attached: look at all of it again.
	}
}

func (s *Server) salvage(ctx context.Context, req *apipb.SalvageRequest) (*apipb.Salvage, error) {
	if req.DropOrphans && len(req.Replicas) > 0 {
		return nil, holdfast.Errorf(holdfast.ErrInvalid, "a salvage either goes on from %q or drops the orphans", req.Replicas).WithRemedy("ask for one after the other")
	}
	view, v, err := s.volumeNow(ctx, req.Name)
	if err != nil {
		return nil, err
	}
	p := &salvage{s: s, view: view, vol: v, req: req}
	p.look(ctx)
	switch {
	case req.DropOrphans:
		return p.dropOrphans(ctx)
	case len(req.Replicas) == 0:
		return p.answer(), nil
	}
	return p.run(ctx)
}

// salvage is one request at work.
type salvage struct {
	s    *Server
	view *state.View
	vol  *state.Volume
	req  *apipb.SalvageRequest

	candidates []*candidate
	missing    []uint32 // segments without an in-sync replica that can be had
}

// candidate is a replica and what its node says of it.
type candidate struct {
	segment uint32
	record  state.Replica
	node    holdfast.NodeID
	told    *apipb.Replica // by its node if that answers
	why     string         // it does not
	chosen  bool
}

// usable says whether a segment can go on from it.
func (c *candidate) usable() bool {
	return c.why == "" && c.record.Salvageable() && !c.told.Damaged && !c.told.Partial
}

// serving says whether the segment needs no salvage because of it.
func (c *candidate) serving() bool { return c.record.Role == holdfast.RoleInSync && c.usable() }

// look asks every node that has a replica what it holds.
func (p *salvage) look(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	nodes := map[holdfast.NodeID]*state.Node{}
	for i := range p.vol.Segments {
		for _, r := range p.vol.Segments[i].Replicas {
			if r.Role == holdfast.RoleDeleting {
				continue
			}
			c := &candidate{segment: uint32(i), record: r, why: "its disk is not known",
				told: &apipb.Replica{Id: r.ID.String(), Segment: uint32(i), State: string(r.Role), SinceEpoch: uint64(r.SinceEpoch), Disk: r.Disk.String(), Node: p.s.diskNode(p.view, r.Disk)}}
			if d, ok := p.view.Disk(r.Disk); ok {
				c.node, c.why = d.Node, ""
				if n, ok := p.view.Node(d.Node); ok && !n.Removed {
					nodes[d.Node] = n
				} else {
					c.why = "its node was removed"
				}
				if d.State != holdfast.DiskOK {
					c.why = "its disk failed: " + d.Reason
				}
			}
			p.candidates = append(p.candidates, c)
		}
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	told, silent := map[string]*apipb.Replica{}, map[holdfast.NodeID]string{}
	for id, n := range nodes {
		wg.Go(func() {
			answer, err := p.ask(ctx, n)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				silent[id] = err.Error()
				return
			}
			for _, r := range answer.Replicas {
				if r.Node == n.Name {
					told[r.Id] = r
				}
			}
		})
	}
	wg.Wait()
	for _, c := range p.candidates {
		switch r := told[c.record.ID.String()]; {
		case c.why != "":
		case silent[c.node] != "":
			c.why = "its node does not answer: " + silent[c.node]
		case r == nil || !r.Served:
			c.why = "its node does not serve it"
		default:
			c.told = r
		}
	}
	for i := range p.vol.Segments {
		if !slices.ContainsFunc(p.candidates, func(c *candidate) bool { return int(c.segment) == i && c.serving() }) {
			p.missing = append(p.missing, uint32(i))
		}
	}
}

// ask has a node say what it holds of the volume, from its own state.
func (p *salvage) ask(ctx context.Context, n *state.Node) (*apipb.Volume, error) {
	if n.ID == p.s.o.Node {
		return p.s.volume(p.view, p.vol), nil
	}
	client, err := api.Dial(n.Addresses.API)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	return client.InspectVolume(metadata.AppendToOutgoingContext(ctx, forwardedKey, "1"), &apipb.VolumeRequest{Name: p.vol.ID.String()})
}

func (p *salvage) answer() *apipb.Salvage {
	out := &apipb.Salvage{Epoch: uint64(p.vol.Epoch), Missing: p.missing}
	for _, c := range p.candidates {
		a := &apipb.SalvageCandidate{Replica: c.told, Answers: "yes", Usable: c.usable(), Chosen: c.chosen,
			Committed: uint64(p.vol.Segments[c.segment].LastCommit)}
		if c.why != "" {
			a.Answers = c.why
		}
		out.Candidates = append(out.Candidates, a)
	}
	return out
}

// run checks the choice and carries it out.
func (p *salvage) run(ctx context.Context) (*apipb.Salvage, error) {
	choices, err := p.choose()
	if err != nil {
		return nil, err
	}
	v := p.vol
	if !p.req.AcceptLoss {
		return nil, holdfast.Errorf(holdfast.ErrRefused, "salvage of volume %s: what was written after the chosen replica fell behind will be lost", v.Name).
			WithRemedy("look at holdfast volume salvage %s, then add --accept-loss", v.Name)
	}
	if v.Phase == state.PhaseAttached && !p.req.Force { // one that only tries to attach serves nobody
		if l, err := p.s.o.Cluster.Liveness(ctx, v.Holder); err != nil {
			return nil, err
		} else if !l.Gone {
			return nil, holdfast.Errorf(holdfast.ErrRefused, "volume %s is attached at node %s, which is not gone", v.Name, p.s.nodeName(v.Holder.Node)).
				WithRemedy("detach it there, or use --force: its clients see I/O errors, and what they write until then is lost")
		}
	}
	res, err := p.s.o.Cluster.Propose(ctx, &state.ForceRecover{Volume: v.ID, Expect: v.Epoch, Choices: choices,
		Lineage: holdfast.NewID[holdfast.LineageID](), Since: time.Now().Unix()})
	if err != nil {
		return nil, fmt.Errorf("salvage of volume %s: %w", v.Name, err)
	}
	for _, c := range choices {
		p.missing = slices.DeleteFunc(p.missing, func(i uint32) bool { return i == c.Index })
		p.s.o.Logger.Warn("volume salvaged", "volume", v.Name, "segment", c.Index, "replica", c.Replica, "epoch", uint64(res.Epoch))
	}
	out := p.answer()
	out.Done, out.Epoch = true, uint64(res.Epoch)
	return out, nil
}

// choose finds the replicas that the request names: a node's for each segment
// that needs one, or, forced, for each that it has one of.
func (p *salvage) choose() ([]state.SalvageChoice, error) {
	var choices []state.SalvageChoice
	for _, name := range p.req.Replicas {
		known := false
		for _, c := range p.candidates {
			byID := c.record.ID.String() == name
			if !byID && c.node.String() != name && c.told.Node != name {
				continue
			}
			known = true
			if !byID && !p.req.Force && !slices.Contains(p.missing, c.segment) {
				continue // a segment that needs no salvage
			}
			if slices.ContainsFunc(choices, func(o state.SalvageChoice) bool { return o.Index == c.segment }) {
				return nil, holdfast.Errorf(holdfast.ErrInvalid, "two replicas are chosen for segment %d", c.segment).WithRemedy("name one --replica for each segment")
			}
			if err := p.mayChoose(c); err != nil {
				return nil, err
			}
			c.chosen = true
			choices = append(choices, state.SalvageChoice{Index: c.segment, Replica: c.record.ID})
		}
		if !known {
			return nil, holdfast.Errorf(holdfast.ErrNotFound, "no replica of volume %s is, or stands on, %q", p.vol.Name, name).
				WithRemedy("holdfast volume salvage %s lists them", p.vol.Name)
		}
	}
	if len(choices) == 0 {
		return nil, holdfast.Errorf(holdfast.ErrRefused, "volume %s needs no salvage: every segment has an in-sync replica that answers", p.vol.Name).
			WithRemedy("attach it; if that ends with REPLICA_REGRESSION, salvage with --force")
	}
	slices.SortFunc(choices, func(a, b state.SalvageChoice) int { return int(a.Index) - int(b.Index) })
	return choices, nil
}

func (p *salvage) mayChoose(c *candidate) error {
	what := fmt.Sprintf("replica %v (%s, node %s)", c.record.ID, c.record.Role, c.told.Node)
	switch {
	case !c.record.Salvageable() || c.told.Partial:
		return holdfast.Errorf(holdfast.ErrRefused, "%s was being filled and holds no one state of segment %d", what, c.segment).WithRemedy("choose another one")
	case c.why != "":
		return holdfast.Errorf(holdfast.ErrRefused, "%s cannot be chosen: %s", what, c.why).WithRemedy("start its node, or choose another one")
	case c.told.Damaged:
		return holdfast.Errorf(holdfast.ErrRefused, "%s cannot be chosen: its log is damaged, or its disk failed", what).WithRemedy("choose another one")
	case p.req.Force:
		return nil
	}
	for _, o := range p.candidates {
		if o.segment == c.segment && o.serving() {
			return holdfast.Errorf(holdfast.ErrRefused, "segment %d needs no salvage: replica %v on node %s is in sync and answers", c.segment, o.record.ID, o.told.Node).
				WithRemedy("attach volume %s; if that ends with REPLICA_REGRESSION, salvage with --force", p.vol.Name)
		}
	}
	return nil
}

// dropOrphans gives up what earlier salvages abandoned.
func (p *salvage) dropOrphans(ctx context.Context) (*apipb.Salvage, error) {
	if len(p.missing) > 0 && !p.req.Force {
		return nil, holdfast.Errorf(holdfast.ErrRefused, "volume %s has no in-sync replica that answers for %d of its segments: its orphans may be wanted", p.vol.Name, len(p.missing)).
			WithRemedy("start the nodes with its in-sync replicas, or use --force")
	}
	out := p.answer()
	for _, c := range p.candidates {
		if c.record.Role != holdfast.RoleOrphan {
			continue
		}
		if err := p.drop(ctx, c); err != nil {
			return nil, fmt.Errorf("drop orphan %v on node %s: %w", c.record.ID, c.told.Node, err)
		}
		p.s.o.Logger.Warn("orphan dropped", "volume", p.vol.Name, "segment", c.segment, "replica", c.record.ID)
		out.Dropped++
	}
	out.Done = true
	return out, nil
}

// drop gives one orphan up; the segment's other replicas may change meanwhile, as
// those that a salvage left missing are placed anew.
func (p *salvage) drop(ctx context.Context, c *candidate) error {
	id := holdfast.SegmentID{Volume: p.vol.ID, Index: c.segment}
	for view := p.view; ; {
		_, seg, ok := view.Segment(id)
		if !ok {
			return holdfast.Errorf(holdfast.ErrNotFound, "volume %s was removed", p.vol.Name)
		}
		if r := seg.Replica(c.record.ID); r == nil || r.Role != holdfast.RoleOrphan {
			return nil // somebody else dropped it, or a salvage went back to it
		}
		_, err := p.s.o.Cluster.Propose(ctx, &state.RemoveReplica{Segment: id, LayoutVersion: seg.LayoutVersion, Replica: c.record.ID})
		if !errors.Is(err, state.ReasonStaleRevision) {
			return err
		}
		if view, err = p.s.o.Cluster.Read(ctx); err != nil {
			return err
		}
	}
}
