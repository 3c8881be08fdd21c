package server

import (
	"context"
	"strings"
	"testing"

	"github.com/holdfast-storage/holdfast"
	"github.com/holdfast-storage/holdfast/cmd/internal/api/apipb"
	"github.com/holdfast-storage/holdfast/raftstore/state"
)

// TestToLeave: what ends an attachment depends on who uses it.
func TestToLeave(t *testing.T) {
	for _, c := range []struct {
		a    *apipb.NodeAttachment
		want string
	}{
		{&apipb.NodeAttachment{Volume: "v", Told: true}, "holdfast volume detach v"},
		{&apipb.NodeAttachment{Volume: "v", Told: true, Device: "/dev/loop1"}, "holdfast volume detach v"},
		{&apipb.NodeAttachment{Volume: "v", Told: true, Mounts: 2}, "docker stop the containers that docker ps --filter volume=v shows there"},
		{&apipb.NodeAttachment{Volume: "v", Told: true, Clients: 1}, "end the NBD clients, then holdfast volume detach v"},
		{&apipb.NodeAttachment{Volume: "v", Told: true, Mounts: 1, Clients: 1}, "docker stop the containers that docker ps --filter volume=v shows there, end the NBD clients, then holdfast volume detach v"},
		{&apipb.NodeAttachment{Volume: "v"}, "docker stop the containers that docker ps --filter volume=v shows there, if any, then holdfast volume detach v"},
	} {
		if got := toLeave(c.a); got != c.want {
			t.Errorf("%v:\ngot  %s\nwant %s", c.a, got, c.want)
		}
	}
}

// InspectNode tells who uses what the peer holds.
func (p *peer) InspectNode(context.Context, *apipb.NodeRequest) (*apipb.Node, error) {
	return &apipb.Node{Attached: []*apipb.NodeAttachment{{Volume: "b", Told: true, Mounts: 2}, {Volume: "elsewhere", Told: true, Clients: 9}}}, nil
}

// TestDrainNamesWhatIsAttached: a drain moves no attachment, and says which are left on
// the node and how they end; of a node that does not answer too.
func TestDrainNamesWhatIsAttached(t *testing.T) {
	w := newWorld(t)
	w.server.Start(w.o)
	hold := func(name string, node byte) {
		v := w.volume(t, name, int(node))
		w.must(t, &state.AttachBegin{Volume: v.ID, Node: holdfast.NodeID{node}, Instance: holdfast.InstanceID{node}, Session: holdfast.NewID[holdfast.SessionID](), Since: 1})
	}
	hold("b", 2)
	hold("a", 2)
	hold("c", 1)
	look := func(what, node, want string) {
		t.Helper()
		n, err := w.client.SetNodeDuty(t.Context(), &apipb.NodeDutyRequest{Name: node, Duty: "draining", Force: true})
		if err != nil {
			t.Fatal(err)
		}
		same, err := w.client.InspectNode(t.Context(), &apipb.NodeRequest{Name: node})
		if err != nil {
			t.Fatal(err)
		}
		for verb, n := range map[string]*apipb.Node{"drain": n, "inspect": same} {
			var lines []string
			for _, a := range n.Attached {
				line := a.Volume + ": "
				if !a.Told {
					line += "not told: "
				}
				lines = append(lines, line+a.Remedy)
			}
			if got := strings.Join(lines, "; "); got != want || len(n.Attached) != int(n.Attachments) {
				t.Errorf("%s, %s: %d attached:\ngot  %s\nwant %s", what, verb, n.Attachments, got, want)
			}
		}
	}
	look("n1 itself", "n1", "c: holdfast volume detach c")
	look("n2 is silent", "n2", "a: not told: "+toLeave(&apipb.NodeAttachment{Volume: "a"})+"; b: not told: "+toLeave(&apipb.NodeAttachment{Volume: "b"}))
	w.serveAs(t, holdfast.NodeID{2}, &peer{})
	look("n2 answers, and knows nothing of a yet", "n2", "a: not told: "+toLeave(&apipb.NodeAttachment{Volume: "a"})+"; b: "+toLeave(&apipb.NodeAttachment{Volume: "b", Told: true, Mounts: 2}))
	look("n3 holds nothing", "n3", "")
}
