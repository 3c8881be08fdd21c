package peer

import (
	"context"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/raftstore"
	"github.com/holdfast-storage/holdfast/raftstore/peer/peerpb"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

// heartbeatTimeout bounds one heartbeat; a connection on which one got no
// answer for so long is dialed anew.
const heartbeatTimeout = 2 * time.Second

// beat sends the heartbeats.
func (p *Peer) beat() {
	defer p.wg.Done()
	ticker := time.NewTicker(HeartbeatEvery)
	defer ticker.Stop()
	for {
		if p.store.HasCluster() {
			self := p.Self()
			p.record.arrive(self.ID, self.Instance, p.View().Index())
			for _, address := range p.voters() {
				p.beatTo(address)
			}
		}
		select {
		case <-ticker.C:
		case <-p.ctx.Done():
			return
		}
	}
}

// voters are the addresses of the other voters.
func (p *Peer) voters() []string {
	v := p.View()
	var out []string
	members, err := p.store.Members()
	for n := range v.Nodes() {
		votes := n.Kind == state.MemberVoter
		for _, m := range members {
			votes = votes || err == nil && m.Voter && m.Node == n.ID
		}
		if votes && n.ID != p.store.Node() {
			out = append(out, n.Addresses.API)
		}
	}
	if v.Index() == 0 { // no tables yet: whoever is known passes for a voter
		p.mu.Lock()
		out = append(out, p.targets...)
		p.mu.Unlock()
	}
	return out
}

// beatTo sends one heartbeat, unless the last one is still on its way.
func (p *Peer) beatTo(address string) {
	p.mu.Lock()
	busy := p.beating[address]
	p.beating[address] = true
	self := p.self
	p.mu.Unlock()
	if busy {
		return
	}
	p.wg.Add(1)
	go func() {
		defer p.wg.Done()
		defer func() {
			p.mu.Lock()
			delete(p.beating, address)
			p.mu.Unlock()
		}()
		cluster := p.store.Cluster()
		conn, err := p.conns.to(address)
		if err != nil {
			return // closing
		}
		ctx, cancel := context.WithTimeout(p.ctx, heartbeatTimeout)
		defer cancel()
		r, err := peerpb.NewPeerClient(conn).Heartbeat(ctx, &peerpb.HeartbeatRequest{
			Cluster: cluster[:], From: self.ID[:], Instance: self.Instance[:], Applied: p.View().Index(),
			ApiAddress: self.Addresses.API, DataAddress: self.Addresses.Data, RaftAddress: self.Addresses.Raft,
		})
		switch {
		case status.Code(err) == codes.DeadlineExceeded:
			p.conns.drop(address)
		case err == nil && r.GetFailure() != nil:
			p.log.Warn("heartbeat refused", "address", address, "error", failureError(r.GetFailure()))
		case err == nil:
			gone := make([]holdfast.NodeID, 0, min(len(r.GetGone()), maxHeard))
			for _, id := range r.GetGone()[:min(len(r.GetGone()), maxHeard)] {
				gone = append(gone, nodeID(id))
			}
			if p.hearsay.tell(address, gone) {
				p.record.wake()
			}
		}
	}()
}

// look keeps the record's clock.
func (p *Peer) look() {
	defer p.wg.Done()
	ticker := time.NewTicker(lookEvery)
	defer ticker.Stop()
	hears := false
	for {
		v := p.View()
		self, ok := v.Node(p.store.Node())
		if votes := ok && self.Kind == state.MemberVoter; votes != hears {
			hears = votes
			p.record.listenAnew()
		}
		for n := range v.Nodes() {
			p.record.expect(n.ID)
		}
		p.record.look()
		select {
		case <-ticker.C:
		case <-p.ctx.Done():
			return
		}
	}
}

// reconcile makes the leader's membership steps.
func (p *Peer) reconcile() {
	defer p.wg.Done()
	ticker := time.NewTicker(reconcileEvery)
	defer ticker.Stop()
	for {
		for p.step() {
		}
		select {
		case <-ticker.C:
		case <-p.store.LeaderChanged():
		case <-p.ctx.Done():
			return
		}
	}
}

// step makes one membership step, and reports whether there was one to make.
func (p *Peer) step() bool {
	if p.ctx.Err() != nil || !p.store.IsLeader() {
		return false
	}
	ctx, cancel := context.WithTimeout(p.ctx, stepTimeout)
	defer cancel()
	moved, err := p.store.Reconcile(ctx, p.presence)
	if err != nil {
		p.log.Warn("membership step failed", "error", err)
	}
	return moved
}

func (p *Peer) presence(node holdfast.NodeID) raftstore.Presence {
	a := p.record.of(node)
	return raftstore.Presence{Alive: !a.Gone && !a.Instance.IsZero(), Applied: a.Applied}
}
