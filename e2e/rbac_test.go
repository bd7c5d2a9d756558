package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"stoop/alert"
	"stoop/broker"
	"stoop/e2e/harness"
	"stoop/e2e/kube"
	"stoop/responders"
)

// printed is what stoop rbac prints for rules and a service account.
func printed(t harness.T, rules, account string, flags ...string) []byte {
	t.Helper()
	file := filepath.Join(t.TempDir(), "rules.yaml")
	if err := os.WriteFile(file, []byte(rules), 0o600); err != nil {
		t.Fatalf("write the rules: %v", err)
	}
	cmd := exec.CommandContext(t.Context(), shared.bin, "rbac", "--rules", file, "--namespace", kube.AccountNamespace, "--service-account", account)
	cmd.Args = append(cmd.Args, flags...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("stoop rbac: %v\n%s\n%s", err, stderr.String(), rules)
	}
	return out
}

// A token that is stolen from one node can't delete or change what is on another.
func TestTokenOfOneNode(t *testing.T) {
	c := shared.cluster
	ns, account := c.Namespace(t, kube.Name("ns")), c.ServiceAccount(t)
	nodeA, nodeB := c.Node(t), c.Node(t)
	c.Apply(t, account, printed(t, `
rules:
  - name: all
    match: {priority: critical}
    actions:
      - delete-pod
      - evict-pod
      - label-pod: {labels: {a: b}}
      - debug-pod: {image: example.com/tools}
      - label-node: {labels: {example.com/a: b}}
`, account))
	ofA, ofB := kube.ClientOf(t, c.OnNode(t, account, nodeA)), kube.ClientOf(t, c.OnNode(t, account, nodeB))
	ofNone := kube.ClientOf(t, c.Anywhere(t, account))
	onA, onB := c.Pod(t, ns, "a", nodeA, nil), c.Pod(t, ns, "b", nodeB, nil)

	dry := []string{metav1.DryRunAll}
	remove := func(client *kubernetes.Clientset, pod *corev1.Pod, dry []string) error {
		return client.CoreV1().Pods(pod.Namespace).Delete(t.Context(), pod.Name, metav1.DeleteOptions{
			DryRun: dry, GracePeriodSeconds: new(int64(0)), Preconditions: metav1.NewUIDPreconditions(string(pod.UID)),
		})
	}
	patch := []byte(`{"metadata":{"labels":{"example.com/a":"b"}}}`)
	label := func(client *kubernetes.Clientset, pod *corev1.Pod) error {
		_, err := client.CoreV1().Pods(pod.Namespace).Patch(t.Context(), pod.Name, types.MergePatchType, patch, metav1.PatchOptions{})
		return err
	}
	labelNode := func(client *kubernetes.Clientset, node string) error {
		_, err := client.CoreV1().Nodes().Patch(t.Context(), node, types.MergePatchType, patch, metav1.PatchOptions{})
		return err
	}
	debug := func(client *kubernetes.Clientset, pod *corev1.Pod) error {
		_, err := client.CoreV1().Pods(pod.Namespace).Patch(t.Context(), pod.Name, types.StrategicMergePatchType,
			[]byte(`{"spec":{"ephemeralContainers":[{"name":"debug","image":"example.com/tools","terminationMessagePolicy":"File","imagePullPolicy":"Always"}]}}`),
			metav1.PatchOptions{}, "ephemeralcontainers")
		return err
	}
	evict := func(client *kubernetes.Clientset, pod *corev1.Pod) error {
		return client.PolicyV1().Evictions(pod.Namespace).Evict(t.Context(), &policyv1.Eviction{
			ObjectMeta: metav1.ObjectMeta{Name: pod.Name, Namespace: pod.Namespace}, DeleteOptions: &metav1.DeleteOptions{DryRun: dry},
		})
	}
	const says = "stoop's token is of"
	tied := func(err error) bool { return apierrors.IsForbidden(err) && strings.Contains(err.Error(), says) }

	// The API server learns of policies by a watch.
	harness.Eventually(t, soon, 20*time.Millisecond, func() (bool, string) {
		p, n := remove(ofA, onB, dry), labelNode(ofA, nodeB)
		return tied(p) && tied(n), fmt.Sprintf("the policies to hold: %v; %v", p, n)
	})
	for what, err := range map[string]error{
		"delete a pod of another node":             remove(ofA, onB, nil),
		"label a pod of another node":              label(ofA, onB),
		"add a container to a pod of another node": debug(ofA, onB),
		"label another node":                       labelNode(ofA, nodeB),
		"delete a pod with a token of no node":     remove(ofNone, onB, nil),
		"label a node with a token of no node":     labelNode(ofNone, nodeB),
	} {
		if !tied(err) {
			t.Errorf("%s: error %v, want forbidden by the policy", what, err)
		}
	}
	if now := c.Get(t, ns, "b"); now == nil || now.UID != onB.UID || now.ResourceVersion != onB.ResourceVersion {
		t.Errorf("the pod of the other node is %+v", now)
	}
	for what, err := range map[string]error{
		"label a pod of the node":              label(ofA, onA),
		"add a container to a pod of the node": debug(ofA, onA),
		"label the node":                       labelNode(ofA, nodeA),
		"label a pod of the other node by its": label(ofB, onB),
		"evict a pod of the node":              evict(ofA, onA),
		// What docs/rbac.md says can't be tied.
		"evict a pod of another node": evict(ofA, onB),
	} {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := remove(ofA, onA, nil); err != nil || c.Get(t, ns, "a") != nil {
		t.Errorf("delete a pod of the node: %v", err)
	}
	// And nobody else is tied.
	if err := remove(c.Client, onB, nil); err != nil {
		t.Errorf("the administrator deletes a pod: %v", err)
	}
}

// A rule that is limited to a namespace gives rights in that one only.
func TestRolesOfOneNamespace(t *testing.T) {
	c := shared.cluster
	shop, other, account := c.Namespace(t, kube.Name("shop")), c.Namespace(t, kube.Name("other")), c.ServiceAccount(t)
	node := c.Node(t)
	c.Apply(t, account, printed(t, fmt.Sprintf(`
rules:
  - name: limited
    match: {priority: critical, fields: {k8s.ns.name: %s}}
    actions: [delete-pod]
`, shop), account))
	client := kube.ClientOf(t, c.OnNode(t, account, node))
	for ns, want := range map[string]bool{shop: true, other: false} {
		pod := c.Pod(t, ns, "web-0", node, nil)
		err := client.CoreV1().Pods(ns).Delete(t.Context(), pod.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))})
		if want && err != nil || !want && !apierrors.IsForbidden(err) {
			t.Errorf("delete a pod in namespace %s: %v", ns, err)
		}
	}
}

// ruleOf is a rule with one step.
func ruleOf(t testing.TB, name, responder, params string) string {
	t.Helper()
	action := responder
	if params != "" {
		if !json.Valid([]byte(params)) {
			t.Fatalf("%s: the parameters are no JSON: %s", name, params)
		}
		action = fmt.Sprintf("%s: %s", responder, params)
	}
	return fmt.Sprintf("  - name: %q\n    match: {priority: critical}\n    actions:\n      - %s\n", strings.ReplaceAll(name, " ", "-"), action)
}

// printedAccount is a service account with exactly what stoop rbac prints for some
// rules.
type printedAccount struct {
	name    string
	granted []rbacv1.PolicyRule

	mu    sync.Mutex
	nodes map[string]*rest.Config
}

func accountFor(t harness.T, rules string, auditEvents bool) *printedAccount {
	t.Helper()
	name := shared.cluster.ServiceAccount(t)
	var flags []string
	if auditEvents {
		flags = append(flags, "--audit-events")
	}
	return &printedAccount{
		name: name, granted: shared.cluster.Apply(t, name, printed(t, rules, name, flags...)), nodes: map[string]*rest.Config{},
	}
}

// on is how the API server is reached from a node.
func (a *printedAccount) on(t harness.T, node string) *rest.Config {
	t.Helper()
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.nodes[node] == nil {
		a.nodes[node] = shared.cluster.OnNode(t, a.name, node)
	}
	return a.nodes[node]
}

// Without the verb bind nobody may take a subject out of a binding or give a right
// back, as the API server sees it; what bind lists is enough.
func TestRevokeAccessNeedsBind(t *testing.T) {
	c := shared.cluster
	for _, bind := range []bool{false, true} {
		t.Run(fmt.Sprintf("bind %t", bind), func(t *testing.T) {
			params := `{"from":"pod","namespaces":"own"}`
			if bind {
				params = `{"from":"pod","namespaces":"own","bind":["ClusterRole/cluster-admin"]}`
			}
			ns, node := c.Namespace(t, kube.Name("ns")), c.Node(t)
			account := accountFor(t, "rules:\n"+ruleOf(t, "revoke", "revoke-access", params), false)
			client, err := responders.NewKube(account.on(t, node))
			if err != nil {
				t.Fatal(err)
			}
			web := rbacv1.Subject{Kind: rbacv1.ServiceAccountKind, Namespace: ns, Name: "default"}
			mallory := rbacv1.Subject{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: "mallory"}
			bindings := c.Client.RbacV1().RoleBindings(ns)
			for name, subjects := range map[string][]rbacv1.Subject{"shared": {mallory, web}, "alone": {web}} {
				_, err := bindings.Create(t.Context(), &rbacv1.RoleBinding{
					ObjectMeta: metav1.ObjectMeta{Name: name},
					RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "cluster-admin"}, Subjects: subjects,
				}, metav1.CreateOptions{})
				if err != nil {
					t.Fatal(err)
				}
			}
			entries := responders.All()
			entry := entries[slices.IndexFunc(entries, func(e responders.Entry) bool { return e.Name == "revoke-access" })]
			r := entry.New(responders.Env{Kube: client})
			res, err := r.Act(t.Context(), &responders.Request{
				Step:  &broker.Step{ID: "s", Action: broker.Action{Responder: "revoke-access", Params: json.RawMessage(params)}},
				Alert: &alert.Alert{}, Pod: c.Pod(t, ns, "web-0", node, nil),
			})
			const says = "without the verb bind"
			if bind != (err == nil) || !bind && !strings.Contains(err.Error(), says) && !strings.Contains(err.Error(), `cannot patch`) {
				t.Errorf("revoke: %+v, error %v", res, err)
			}
			alone, err := bindings.Get(t.Context(), "alone", metav1.GetOptions{})
			if !apierrors.IsNotFound(err) {
				t.Errorf("the binding of the account alone is %+v, %v", alone, err)
			}
			shared, err := bindings.Get(t.Context(), "shared", metav1.GetOptions{})
			if err != nil || bind != (len(shared.Subjects) == 1) {
				t.Errorf("the shared binding is %+v, %v", shared, err)
			}
			_, err = r.(responders.Undoer).Undo(t.Context(), &responders.UndoRequest{ID: "s", Record: res.Undo})
			if bind != (err == nil) {
				t.Errorf("undo: %v", err)
			}
			if bind {
				return
			}
			// As if somebody had given it create and patch by hand, and forgotten bind.
			c.Allow(t, account.name, []rbacv1.PolicyRule{{APIGroups: []string{rbacv1.GroupName}, Resources: []string{"rolebindings"}, Verbs: []string{"create", "patch"}}})
			if _, err = r.(responders.Undoer).Undo(t.Context(), &responders.UndoRequest{ID: "s", Record: res.Undo}); err == nil || !strings.Contains(err.Error(), says) {
				t.Errorf("undo without bind: %v", err)
			}
		})
	}
}
