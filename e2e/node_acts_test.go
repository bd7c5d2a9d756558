package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/alert"
	"stoop/broker"
	"stoop/e2e/kube"
	"stoop/e2e/program"
	"stoop/responders"
)

// None of these tests runs beside another: they count the nodes of the cluster that
// are out of service.

// nodeAct is a responder as the stoop of a node runs it, and a step for it.
type nodeAct struct {
	responders.Responder
	request *responders.Request
}

func newNodeAct(t *testing.T, a *kube.Account, node, lease, responder, step, params string) nodeAct {
	t.Helper()
	client, err := responders.NewKube(a.Config)
	if err != nil {
		t.Fatal(err)
	}
	guards := &responders.Guards{}
	env := responders.Env{Kube: client, Node: node, Self: responders.Self{Namespace: lease}, ProtectedPod: guards.ProtectedPod}
	all := responders.All()
	i := slices.IndexFunc(all, func(e responders.Entry) bool { return e.Name == responder })
	s := &broker.Step{ID: step, Action: broker.Action{Responder: responder}}
	if params != "" {
		s.Params = json.RawMessage(params)
	}
	return nodeAct{all[i].New(env), &responders.Request{Step: s, Alert: &alert.Alert{}, Target: alert.Target{Node: node}}}
}

func (a nodeAct) act(ctx context.Context) (responders.Result, error) {
	return a.Act(ctx, a.request)
}

func (a nodeAct) undo(t *testing.T, res responders.Result) responders.Result {
	t.Helper()
	u, err := a.Responder.(responders.Undoer).Undo(t.Context(), &responders.UndoRequest{ID: a.request.Step.ID, Record: res.Undo})
	if err != nil {
		t.Fatalf("undo: %v", err)
	}
	return u
}

func (w *world) nodeNow(t *testing.T, name string) *corev1.Node {
	t.Helper()
	now, err := w.Client.CoreV1().Nodes().Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return now
}

// ownNode is one that goes with the test, so that it is not counted by others.
func (w *world) ownNode(t *testing.T) string {
	t.Helper()
	name := w.Node(t)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), soon)
		defer cancel()
		if err := w.Client.CoreV1().Nodes().Delete(ctx, name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
			t.Error(err)
		}
	})
	return name
}

// Many nodes want to go out of service at once: 2 % of them may.
func TestNodeActsOfAFleet(t *testing.T) {
	w := newWorld(t)
	const n = 60
	before, err := w.Client.CoreV1().Nodes().List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var nodes []string
	for range n {
		nodes = append(nodes, w.ownNode(t))
	}
	most := max(1, (len(before.Items)+n)*2/100)
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	for round := range 2 {
		var (
			all  sync.WaitGroup
			mu   sync.Mutex
			done = map[int]responders.Result{}
			acts []nodeAct
		)
		for i, node := range nodes {
			responder, params := "cordon-node", ""
			if i%2 == 1 {
				responder, params = "taint-node", `{"effect":"NoExecute"}`
			}
			acts = append(acts, newNodeAct(t, w.account, node, w.ns, responder, fmt.Sprintf("s%d-%d", round, i), params))
		}
		began, tries := time.Now(), 0
		for i, a := range acts {
			all.Go(func() {
				for {
					res, err := a.act(ctx)
					status, retry, reason := ended(err)
					mu.Lock()
					tries++
					switch {
					case retry && ctx.Err() == nil:
						mu.Unlock()
						continue
					case err == nil:
						done[i] = res
					case status != broker.Refused || !strings.Contains(reason, "these are already: "):
						t.Errorf("%s: %s", nodes[i], reason)
					}
					mu.Unlock()
					return
				}
			})
		}
		all.Wait()
		t.Logf("%d nodes, %d tries, %s", n, tries, time.Since(began).Round(time.Millisecond))
		if len(done) != most {
			t.Errorf("%d nodes were taken out of service, want %d", len(done), most)
		}
		out := 0
		for _, name := range nodes {
			if now := w.nodeNow(t, name); now.Spec.Unschedulable || slices.ContainsFunc(now.Spec.Taints, func(t corev1.Taint) bool { return t.Key == "stoop.dev/suspect" }) {
				out++
			}
		}
		if out != most {
			t.Errorf("%d nodes are out of service, want %d", out, most)
		}
		for i, res := range done {
			acts[i].undo(t, res)
		}
	}
}

// ended is what the host makes of an error, as far as these tests look at it.
func ended(err error) (status broker.Status, retry bool, reason string) {
	if err == nil {
		return broker.Done, false, ""
	}
	reason = err.Error()
	if strings.Contains(reason, "takes at most") {
		return broker.Refused, false, reason
	}
	return broker.Failed, strings.Contains(reason, "only one node's turn") || apierrors.IsConflict(err), reason
}

// Somebody else changes the node's taints all the while.
func TestTaintsOfOthers(t *testing.T) {
	w := newWorld(t)
	node := w.ownNode(t)
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	stop, stopped := context.WithCancel(ctx)
	var others sync.WaitGroup
	defer others.Wait()
	defer stopped()
	set := 0 // of the other's taints, as it knows
	others.Go(func() {
		for stop.Err() == nil {
			now, err := w.Client.CoreV1().Nodes().Get(ctx, node, metav1.GetOptions{})
			if err != nil {
				t.Error(err)
				return
			}
			has := slices.IndexFunc(now.Spec.Taints, func(t corev1.Taint) bool { return t.Key == "other" })
			if has < 0 && set > 0 || has >= 0 && now.Spec.Taints[has].Value != fmt.Sprint("v", set) {
				t.Errorf("after %d changes somebody else's taint is gone or another: %+v", set, now.Spec.Taints)
				return
			}
			next := corev1.Taint{Key: "other", Value: fmt.Sprint("v", set+1), Effect: corev1.TaintEffectNoSchedule}
			if has < 0 {
				now.Spec.Taints = append(now.Spec.Taints, next)
			} else {
				now.Spec.Taints[has] = next
			}
			if _, err := w.Client.CoreV1().Nodes().Update(ctx, now, metav1.UpdateOptions{}); err == nil {
				set++
			} else if !apierrors.IsConflict(err) {
				t.Error(err)
				return
			}
		}
	})
	for n := range 20 {
		a := newNodeAct(t, w.account, node, w.ns, "taint-node", fmt.Sprint("s", n), `{"effect":"NoExecute"}`)
		var res responders.Result
		var err error
		for res, err = a.act(ctx); apierrors.IsConflict(err) && ctx.Err() == nil; res, err = a.act(ctx) {
		}
		if err != nil || res.Nothing {
			t.Fatalf("result %+v, error %v", res, err)
		}
		if now := w.nodeNow(t, node); !slices.ContainsFunc(now.Spec.Taints, func(t corev1.Taint) bool { return t.Key == "stoop.dev/suspect" }) {
			t.Fatalf("the taints are %+v", now.Spec.Taints)
		}
		for {
			_, err := a.Responder.(responders.Undoer).Undo(ctx, &responders.UndoRequest{ID: a.request.Step.ID, Record: res.Undo})
			if err == nil {
				break
			}
			if !apierrors.IsConflict(err) {
				t.Fatal(err)
			}
		}
	}
	stopped()
	others.Wait()
	if now := w.nodeNow(t, node); slices.ContainsFunc(now.Spec.Taints, func(t corev1.Taint) bool { return t.Key == "stoop.dev/suspect" }) || set == 0 {
		t.Errorf("after %d changes of somebody else's the taints are %+v", set, now.Spec.Taints)
	}
}

// The eviction API of the real thing, with a budget, DaemonSet pods and pods of
// other nodes.
func TestDrainNode(t *testing.T) {
	w := newWorld(t)
	node := w.ownNode(t)
	owner := func(kind string) func(*corev1.Pod) {
		return func(p *corev1.Pod) {
			p.Labels = map[string]string{"app": strings.ToLower(kind)}
			p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: kind, Name: "x", UID: "x", Controller: new(true)}}
		}
	}
	web := w.Pod(t, w.ns, "web", node, owner("ReplicaSet"))
	kept := w.Pod(t, w.ns, "kept", node, owner("StatefulSet"))
	agent := w.Pod(t, w.ns, "agent", node, owner("DaemonSet"))
	elsewhere := w.Pod(t, w.ns, "elsewhere", w.node, owner("ReplicaSet"))
	allow := func(n int32) {
		t.Helper()
		budgets := w.Client.PolicyV1().PodDisruptionBudgets(w.ns)
		b, err := budgets.Get(t.Context(), "tight", metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			b, err = budgets.Create(t.Context(), &policyv1.PodDisruptionBudget{
				ObjectMeta: metav1.ObjectMeta{Name: "tight"},
				Spec:       policyv1.PodDisruptionBudgetSpec{Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "statefulset"}}},
			}, metav1.CreateOptions{})
		}
		if err != nil {
			t.Fatal(err)
		}
		b.Status = policyv1.PodDisruptionBudgetStatus{ObservedGeneration: b.Generation, DisruptionsAllowed: n, DesiredHealthy: 1, CurrentHealthy: 1 + n, ExpectedPods: 1}
		if _, err := budgets.UpdateStatus(t.Context(), b, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	allow(0)
	a := newNodeAct(t, w.account, node, w.ns, "drain-node", "s1", `{"deadline":"2s"}`)
	res, err := a.act(t.Context())
	if err == nil || !strings.Contains(err.Error(), "pods evicted: 1; not evicted within 2s: 1") || !strings.Contains(err.Error(), w.ns+"/kept") || !strings.Contains(err.Error(), "tight") || res.Undo == nil {
		t.Fatalf("result %+v, error %v", res, err)
	}
	w.WaitGone(t, web, soon)
	wantAlive(t, w.Cluster, kept)
	if !w.nodeNow(t, node).Spec.Unschedulable {
		t.Error("the node is not cordoned")
	}
	allow(1)
	if res, err = a.act(t.Context()); err != nil || !strings.Contains(res.Reason, "pods evicted: 1; left alone: 1 of DaemonSets") {
		t.Errorf("result %+v, error %v", res, err)
	}
	w.WaitGone(t, kept, soon)
	wantAlive(t, w.Cluster, agent)
	wantAlive(t, w.Cluster, elsewhere)
	if a.undo(t, res); w.nodeNow(t, node).Spec.Unschedulable {
		t.Error("the node is cordoned")
	}
}

// Stoops of several nodes, as they run: each is told at once to take its own node out
// of service.
func TestCordonByTheProgram(t *testing.T) {
	const rules = `
mode: enforce
rules:
  - name: cordon
    match: {rule: Test cordon}
    actions: [cordon-node]
`
	w := newWorld(t)
	type one struct {
		node string
		s    *program.Stoop
		id   string
	}
	var all []one
	for range 4 {
		o := w.options(rules)
		o.Node = w.ownNode(t)
		all = append(all, one{node: o.Node, s: program.Start(t, o)})
	}
	for i := range all {
		pod := w.Pod(t, w.ns, fmt.Sprint("web-", i), all[i].node, nil)
		a := program.Critical("Test cordon", pod)
		all[i].id = all[i].s.Send(a)
	}
	var cordoned []one
	for _, o := range all {
		switch got := o.s.WaitOutcome(o.id, "cordon-node", soon); got.Status {
		case broker.Done:
			cordoned = append(cordoned, o)
			t.Logf("cordoned %d µs after the alert", got.Took.Done)
		case broker.Refused:
			if !strings.Contains(got.Reason, "these are already: ") {
				t.Errorf("%s: %s", o.node, got.Reason)
			}
		default:
			t.Errorf("%s: %s (%s)", o.node, got.Status, got.Reason)
		}
	}
	if len(cordoned) != 1 || !w.nodeNow(t, cordoned[0].node).Spec.Unschedulable {
		t.Fatalf("cordoned were %v", cordoned)
	}
	for _, o := range all {
		if o.node != cordoned[0].node && w.nodeNow(t, o.node).Spec.Unschedulable {
			t.Errorf("%s is cordoned", o.node)
		}
	}
	// What stoop asked for concerns nodes and the one Lease only.
	for _, r := range w.requests(t) {
		if r.Resource != "nodes" && (r.Resource != "leases" || r.Name != "" && r.Name != "stoop-node-acts") {
			t.Errorf("it asked for %s %s %s/%s", r.Verb, r.Resource, r.Namespace, r.Name)
		}
	}
}
