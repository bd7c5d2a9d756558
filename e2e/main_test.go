package e2e

import (
	"context"
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"

	"stoop/broker"
	"stoop/e2e/harness"
	"stoop/e2e/kube"
	"stoop/e2e/program"
	"stoop/responders"
)

// What all tests share: one API server, and the program built twice, as it is
// released and with its fail points. Each test has a node, namespaces and a
// service account of its own, so that none is in another's way.
var shared struct {
	cluster      *kube.Cluster
	bin, failing string
}

func TestMain(m *testing.M) {
	var code int
	err := harness.Outside(context.Background(), os.Stderr, func(t harness.T) {
		shared.bin = program.Build(t)
		shared.failing = program.Build(t, "failpoints")
		shared.cluster = kube.Start(t)
		code = m.Run()
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// world is a test's own part of the cluster.
type world struct {
	*kube.Cluster
	node, ns string
	account  *kube.Account
}

// soon bounds what takes milliseconds on a quiet machine.
const soon = 20 * time.Second

func newWorld(t *testing.T) *world {
	t.Helper()
	return worldIn(t, shared.cluster, allRBAC())
}

func worldIn(t *testing.T, c *kube.Cluster, rbac []rbacv1.PolicyRule) *world {
	t.Helper()
	return &world{
		Cluster: c, node: c.Node(t), ns: c.Namespace(t, kube.Name("ns")),
		account: c.Account(t, rbac),
	}
}

// allRBAC is exactly what stoop and its responders say they need.
func allRBAC() []rbacv1.PolicyRule {
	// Its stoops are on a host: what they share is in the namespace default.
	rules := slices.Concat(responders.BaseRBAC(), responders.PauseRBAC("default"), responders.OwnRBAC())
	for _, r := range responders.All() {
		rules = append(rules, r.RBAC...)
	}
	return rules
}

// options are what a test's stoop runs with unless the test says otherwise.
func (w *world) options(rules string) program.Options {
	return program.Options{
		Bin: shared.bin, Node: w.node, Kubeconfig: w.account.Kubeconfig,
		Mode: string(broker.Enforce), Rules: rules, Config: program.NoLimits,
	}
}

// stoop starts one that enforces the rules.
func (w *world) stoop(t *testing.T, rules string) *program.Stoop {
	t.Helper()
	return program.Start(t, w.options(rules))
}

func (w *world) pod(t *testing.T, name string) *corev1.Pod {
	t.Helper()
	return w.Pod(t, w.ns, name, w.node, nil)
}

// requests are those of the test's stoop.
func (w *world) requests(t *testing.T) []kube.Request {
	t.Helper()
	return w.Requests(t, w.account.User)
}

// wantNoRequests fails when stoop asked for any change at all.
func (w *world) wantNoRequests(t *testing.T) {
	t.Helper()
	if got := w.requests(t); len(got) > 0 {
		t.Errorf("stoop sent %d requests that change something, the first: %+v", len(got), got[0])
	}
}

func wantStatus(t *testing.T, o broker.Outcome, want broker.Status) {
	t.Helper()
	if o.Status != want {
		t.Fatalf("%s: the outcome is %s (%s), want %s", o.Responder, o.Status, o.Reason, want)
	}
}

func wantAlive(t *testing.T, c *kube.Cluster, pod *corev1.Pod) {
	t.Helper()
	if !c.Alive(t, pod) {
		t.Errorf("the pod %s/%s (UID %s) was deleted", pod.Namespace, pod.Name, pod.UID)
	}
}

// deleteRule is a rules file with one rule that deletes the pod of every
// Critical alert.
const deleteRule = `
mode: enforce
rules:
  - name: delete-on-critical
    match: {priority: critical}
    actions: [delete-pod: {force: true}]
`
