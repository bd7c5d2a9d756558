package responders_test

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"stoop/alert"
	"stoop/broker"
	"stoop/responders"
	"stoop/responders/conformance"
)

// fleet is a cluster of nodes, each with a stoop of its own.
type fleet struct {
	t     testing.TB
	s     *conformance.Server
	admin kubernetes.Interface
}

func newFleet(t testing.TB, nodes ...string) *fleet {
	t.Helper()
	s := conformance.NewServer(t)
	f := &fleet{t, s, s.Admin()}
	for _, name := range nodes {
		if _, err := f.admin.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

func numbered(n int) []string {
	names := make([]string, n)
	for i := range names {
		names[i] = fmt.Sprintf("node-%03d", i)
	}
	return names
}

// intercept is called before each request is sent.
type intercept struct {
	next http.RoundTripper
	do   func(*http.Request)
}

func (i intercept) RoundTrip(r *http.Request) (*http.Response, error) {
	i.do(r)
	return i.next.RoundTrip(r)
}

// stoop is that of a node; before may be nil.
func (f *fleet) stoop(node string, before func(*http.Request)) *nodeStoop {
	f.t.Helper()
	config := f.s.Config()
	if before != nil {
		config.Wrap(func(next http.RoundTripper) http.RoundTripper { return intercept{next, before} })
	}
	kube, err := responders.NewKube(config)
	if err != nil {
		f.t.Fatal(err)
	}
	guards := &responders.Guards{Namespaces: []string{"kube-system"}, PriorityClasses: []string{"system-*"}, Self: responders.Self{Namespace: "stoop", Pod: "stoop-x"}}
	return &nodeStoop{f, node, kube, responders.Env{Kube: kube, Node: node, ProtectedPod: guards.ProtectedPod}}
}

type nodeStoop struct {
	*fleet
	node string
	kube *responders.Kube
	env  responders.Env
}

func (s *nodeStoop) responder(name string) responders.Responder {
	return entryOf(s.t, name).New(s.env)
}

func (s *nodeStoop) request(name, step, params string) *responders.Request {
	return &responders.Request{
		Step:   &broker.Step{ID: step, Rule: "r", Action: broker.Action{Responder: name, Params: checked(s.t, entryOf(s.t, name), params)}},
		Alert:  &alert.Alert{Rule: "x"},
		Target: alert.Target{Namespace: "shop", Pod: "web-0", Node: s.node},
	}
}

// act does one try of a step.
func (s *nodeStoop) act(ctx context.Context, name, step, params string) (responders.Result, error) {
	return s.responder(name).Act(ctx, s.request(name, step, params))
}

// must does a step that has to work at the first try.
func (s *nodeStoop) must(name, step, params string) responders.Result {
	s.t.Helper()
	res, err := s.act(s.t.Context(), name, step, params)
	if err != nil {
		s.t.Fatalf("%s %s on %s: %v", name, step, s.node, err)
	}
	return res
}

func (s *nodeStoop) undo(name, step string, res responders.Result) responders.Result {
	s.t.Helper()
	u, err := s.responder(name).(responders.Undoer).Undo(s.t.Context(), &responders.UndoRequest{ID: step, Record: res.Undo})
	if err != nil {
		s.t.Fatalf("undo %s: %v", step, err)
	}
	return u
}

func (s *nodeStoop) now() *corev1.Node {
	s.t.Helper()
	n, err := s.admin.CoreV1().Nodes().Get(s.t.Context(), s.node, metav1.GetOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	return n
}

// edit changes the node as a person does.
func (s *nodeStoop) edit(change func(*corev1.Node)) {
	s.t.Helper()
	n := s.now()
	change(n)
	if _, err := s.admin.CoreV1().Nodes().Update(s.t.Context(), n, metav1.UpdateOptions{}); err != nil {
		s.t.Fatal(err)
	}
}

func (f *fleet) lease() *coordinationv1.Lease {
	f.t.Helper()
	l, err := f.admin.CoordinationV1().Leases("default").Get(f.t.Context(), "stoop-node-acts", metav1.GetOptions{})
	if err != nil {
		f.t.Fatal(err)
	}
	return l
}

// held has another node hold the Lease.
func (f *fleet) held(by string) {
	f.t.Helper()
	spec := coordinationv1.LeaseSpec{
		HolderIdentity: &by, LeaseDurationSeconds: new(int32(15)), LeaseTransitions: new(int32(7)),
		// By a clock that is an hour slow.
		RenewTime: new(metav1.NewMicroTime(time.Now().Add(-time.Hour))),
	}
	leases := f.admin.CoordinationV1().Leases("default")
	if l, err := leases.Get(f.t.Context(), "stoop-node-acts", metav1.GetOptions{}); err == nil {
		l.Spec = spec
		if _, err := leases.Update(f.t.Context(), l, metav1.UpdateOptions{}); err != nil {
			f.t.Fatal(err)
		}
	} else if _, err := leases.Create(f.t.Context(), &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: "stoop-node-acts"}, Spec: spec}, metav1.CreateOptions{}); err != nil {
		f.t.Fatal(err)
	}
}

func holder(l *coordinationv1.Lease) string {
	if l.Spec.HolderIdentity == nil {
		return ""
	}
	return *l.Spec.HolderIdentity
}

// All nodes want to go out of service at once; 2 % of them may.
func TestNodeActsOfAFleet(t *testing.T) {
	t.Parallel()
	const nodes = 110
	f := newFleet(t, numbered(nodes)...)
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	type end struct {
		node string
		err  error
	}
	ends := make(chan end, nodes)
	var all sync.WaitGroup
	for i, name := range numbered(nodes) {
		s := f.stoop(name, nil)
		what, params := "cordon-node", ""
		if i%2 == 1 {
			what, params = "taint-node", "effect: NoExecute"
		}
		r, req := s.responder(what), s.request(what, "s-"+name, params)
		all.Go(func() {
			for {
				_, err := r.Act(ctx, req)
				if _, retry, _, _ := responders.Classify(err); retry && ctx.Err() == nil {
					continue
				}
				ends <- end{name, err}
				return
			}
		})
	}
	all.Wait()
	close(ends)
	var done []string
	for e := range ends {
		if e.err == nil {
			done = append(done, e.node)
		} else if status, _, _, reason := responders.Classify(e.err); status != broker.Refused || !strings.Contains(reason, "at most 2 of the cluster's 110 nodes") {
			t.Errorf("%s: status %s (%s)", e.node, status, reason)
		}
	}
	if len(done) != 2 {
		t.Errorf("%d nodes were taken out of service: %v", len(done), done)
	}
	list, err := f.admin.CoreV1().Nodes().List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	out := 0
	for _, n := range list.Items {
		if n.Spec.Unschedulable || len(n.Spec.Taints) > 0 {
			out++
		}
	}
	if out != 2 || holder(f.lease()) != "" {
		t.Errorf("%d nodes are out of service, and %q holds the lease", out, holder(f.lease()))
	}
}

func TestNodeActsNameThoseThatAreOut(t *testing.T) {
	t.Parallel()
	f := newFleet(t, numbered(99)...)
	a, b := f.stoop("node-007", nil), f.stoop("node-008", nil)
	done := a.must("cordon-node", "s1", "")
	refused := func(what, params string) {
		t.Helper()
		_, err := b.act(t.Context(), what, "s2", params)
		if status, _, _, reason := responders.Classify(err); status != broker.Refused || !strings.Contains(reason, "these are already: node-007") {
			t.Errorf("%s: status %s (%s)", what, status, reason)
		}
		err = b.responder(what).(responders.Foreseer).Foresee(t.Context(), b.request(what, "s2", params))
		if status, _, _, reason := responders.Classify(err); status != broker.Refused || !strings.Contains(reason, "these are already: node-007") {
			t.Errorf("%s: foreseen is status %s (%s)", what, status, reason)
		}
		if now := b.now(); now.Spec.Unschedulable || len(now.Spec.Taints) > 0 || len(now.Annotations) > 0 {
			t.Errorf("%s: the node is %+v", what, now)
		}
		if h := holder(f.lease()); h != "" {
			t.Errorf("%s: %q holds the lease", what, h)
		}
	}
	refused("cordon-node", "")
	refused("drain-node", "")
	refused("taint-node", "effect: NoExecute")
	refused("taint-node", "effect: NoSchedule")
	// This one keeps no pod off.
	foreseen := func(s *nodeStoop, what, params string) {
		t.Helper()
		if err := s.responder(what).(responders.Foreseer).Foresee(t.Context(), s.request(what, "s3", params)); err != nil {
			t.Errorf("%s on %s: foreseen is %v", what, s.node, err)
		}
	}
	foreseen(b, "taint-node", "effect: PreferNoSchedule")
	foreseen(a, "taint-node", "effect: NoExecute")
	soft := b.must("taint-node", "s3", "effect: PreferNoSchedule")
	// The node's own steps don't count against it.
	if res := a.must("taint-node", "s4", "effect: NoExecute"); res.Nothing {
		t.Errorf("result %+v", res)
	}
	b.undo("taint-node", "s3", soft)
	refused("cordon-node", "")
	a.undo("cordon-node", "s1", done)
	refused("cordon-node", "") // the taint is still there
	// A person puts it back in service, and leaves what is noted.
	a.edit(func(n *corev1.Node) { n.Spec.Taints = nil })
	if b.must("cordon-node", "s5", ""); !b.now().Spec.Unschedulable {
		t.Error("the node is not cordoned")
	}
}

// The nodes are read page by page.
func TestNodeActsOfManyNodes(t *testing.T) {
	t.Parallel()
	f := newFleet(t, numbered(520)...)
	for i := range 10 {
		f.stoop(fmt.Sprintf("node-%03d", i*57), nil).must("cordon-node", fmt.Sprint("s", i), "")
	}
	_, err := f.stoop("node-100", nil).act(t.Context(), "cordon-node", "s", "")
	if _, _, _, reason := responders.Classify(err); !strings.Contains(reason, "at most 10 of the cluster's 520 nodes") || !strings.Contains(reason, "node-000, node-057") || !strings.Contains(reason, "node-513") {
		t.Errorf("error %v", err)
	}
}

func TestNodeLeaseOfAnother(t *testing.T) {
	t.Parallel()
	f := newFleet(t, "a", "b")
	f.held("b")
	s := f.stoop("a", nil)
	busy := func() {
		t.Helper()
		_, err := s.act(t.Context(), "cordon-node", "s1", "")
		if _, retry, after, reason := responders.Classify(err); !retry || after < time.Second || !strings.Contains(reason, `the stoop of node "b"`) || s.now().Spec.Unschedulable {
			t.Errorf("retry %t after %s (%s), node %+v", retry, after, reason, s.now().Spec)
		}
	}
	// What the holder's clock says counts for nothing.
	busy()
	s.kube.AgeNodeLease(14 * time.Second)
	busy()
	f.held("b") // it lives
	s.kube.AgeNodeLease(14 * time.Second)
	busy()
	s.kube.AgeNodeLease(16 * time.Second)
	s.must("cordon-node", "s1", "")
	if l := f.lease(); !s.now().Spec.Unschedulable || holder(l) != "" || *l.Spec.LeaseTransitions != 8 {
		t.Errorf("the lease is %+v", l.Spec)
	}
}

// A stoop that was killed in the middle takes up its own Lease at once.
func TestNodeLeaseOfItsOwn(t *testing.T) {
	t.Parallel()
	f := newFleet(t, "a", "b")
	f.held("a")
	s := f.stoop("a", nil)
	if s.must("cordon-node", "s1", ""); !s.now().Spec.Unschedulable || holder(f.lease()) != "" {
		t.Errorf("the node is %+v, the lease %q", s.now().Spec, holder(f.lease()))
	}
}

// While one node is drained, no other is, however long that takes; and who lost
// the Lease stops.
func TestNodeLeaseWhileItLasts(t *testing.T) {
	// Not beside others: who is kept waiting for a second loses the lease.
	f := newFleet(t, numbered(100)...)
	f.budget(0)
	f.pod("node-001", "web-1", nil)
	const beat = 250 * time.Millisecond
	s, other := f.stoop("node-001", nil), f.stoop("node-002", nil)
	drain := responders.NewDrain(s.env, beat, 20*beat)
	ended := make(chan error, 1)
	go func() {
		_, err := drain.Act(t.Context(), s.request("drain-node", "s1", "force: true"))
		ended <- err
	}()
	until(t, "the node is cordoned", func() bool { return s.now().Spec.Unschedulable })
	// It is renewed: for the other it never looks dead.
	late := responders.NewDrain(other.env, beat, 20*beat)
	for end := time.Now().Add(8 * beat); time.Now().Before(end); time.Sleep(beat / 2) {
		_, err := late.Act(t.Context(), other.request("drain-node", "s2", ""))
		if _, retry, _, reason := responders.Classify(err); !retry || !strings.Contains(reason, "node-001") {
			t.Fatalf("the other: retry %t (%s)", retry, reason)
		}
	}
	// A second step of the same node waits too.
	_, err := s.act(t.Context(), "taint-node", "s3", "effect: NoExecute")
	if _, retry, _, reason := responders.Classify(err); !retry || !strings.Contains(reason, "another step of this node") {
		t.Errorf("a step beside it: retry %t (%s)", retry, reason)
	}
	until(t, "somebody else has the lease", func() bool {
		l := f.lease()
		l.Spec.HolderIdentity = new("node-003")
		_, err := f.admin.CoordinationV1().Leases("default").Update(t.Context(), l, metav1.UpdateOptions{})
		return err == nil
	})
	select {
	case err := <-ended:
		if _, retry, _, reason := responders.Classify(err); !retry || !strings.Contains(reason, "the lease stoop-node-acts was lost") {
			t.Errorf("retry %t (%s)", retry, reason)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the drain goes on without the lease")
	}
	if h := holder(f.lease()); h != "node-003" {
		t.Errorf("%q holds the lease", h)
	}
}

func until(t testing.TB, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !is(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain until %s", what)
		}
	}
}
