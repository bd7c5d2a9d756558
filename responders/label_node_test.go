package responders_test

import (
	"errors"
	"net/http"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/broker"
	"stoop/responders"
)

// withNode is an actor whose cluster has the node that it acts on.
func withNode(t testing.TB, responder string, edit func(*corev1.Node)) (*actor, func() *corev1.Node) {
	t.Helper()
	a := newActor(t, responder, nil)
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: testNode, Labels: map[string]string{"zone": "a"}}}
	if edit != nil {
		edit(node)
	}
	if _, err := a.admin.CoreV1().Nodes().Create(t.Context(), node, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	return a, func() *corev1.Node {
		t.Helper()
		now, err := a.admin.CoreV1().Nodes().Get(t.Context(), testNode, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return now
	}
}

func TestLabelNode(t *testing.T) {
	a, now := withNode(t, "label-node", nil)
	res := a.act("s1", `labels: {zone: "", suspect: "yes"}`)
	if got := now().Labels; len(got) != 1 || got["suspect"] != "yes" {
		t.Errorf("labels %v", got)
	}
	if got := a.labels(); len(got) != 1 || got["app"] != "web" {
		t.Errorf("the pod's labels %v", got)
	}
	a.undo("s1", res)
	if got := now().Labels; len(got) != 1 || got["zone"] != "a" {
		t.Errorf("after undo: labels %v", got)
	}
}

// What somebody else sets in the very moment is what undo puts back.
func TestLabelNodeThatOthersLabel(t *testing.T) {
	f := newFleet(t, "a")
	once := false
	var s *nodeStoop
	s = f.stoop("a", func(r *http.Request) {
		if r.Method == http.MethodPatch && !once {
			once = true
			s.edit(func(n *corev1.Node) { metav1.SetMetaDataLabel(&n.ObjectMeta, "suspect", "maybe") })
		}
	})
	_, err := s.act(t.Context(), "label-node", "s1", `labels: {suspect: "yes"}`)
	if _, retry, _, reason := responders.Classify(err); !retry || s.now().Labels["suspect"] != "maybe" {
		t.Errorf("retry %t (%s), labels %v", retry, reason, s.now().Labels)
	}
	res := s.must("label-node", "s1", `labels: {suspect: "yes"}`)
	if s.undo("label-node", "s1", res); s.now().Labels["suspect"] != "maybe" {
		t.Errorf("after undo: labels %v", s.now().Labels)
	}
}

func TestLabelNodeThatIsAnotherOne(t *testing.T) {
	a, now := withNode(t, "label-node", nil)
	res := a.act("s1", `labels: {suspect: "yes"}`)
	next := now().DeepCopy()
	if err := a.admin.CoreV1().Nodes().Delete(t.Context(), testNode, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	undo := func() error {
		_, err := a.Responder.(responders.Undoer).Undo(t.Context(), &responders.UndoRequest{ID: "s1", Record: res.Undo})
		return err
	}
	if err := undo(); !errors.Is(err, responders.ErrGone) {
		t.Errorf("undo on a node that went: error %v", err)
	}
	next.ResourceVersion, next.UID = "", ""
	if _, err := a.admin.CoreV1().Nodes().Create(t.Context(), next, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := undo(); !errors.Is(err, responders.ErrGone) || now().Labels["suspect"] != "yes" {
		t.Errorf("undo on the next node of the name: error %v, labels %v", err, now().Labels)
	}
}

// A stoop whose node has another name in the cluster says which setting is wrong.
func TestNodeThatTheClusterDoesNotKnow(t *testing.T) {
	for responder, params := range map[string]string{
		"label-node": `labels: {a: b}`, "cordon-node": "", "taint-node": "", "drain-node": "",
	} {
		_, err := newFleet(t, "another").stoop(testNode, nil).act(t.Context(), responder, "s1", params)
		if status, _, _, reason := responders.Classify(err); status != broker.Refused || !strings.Contains(reason, "NODE_NAME") || !strings.Contains(reason, "node: in stoop.yaml") || !strings.Contains(reason, testNode) {
			t.Errorf("%s: status %s (%s)", responder, status, reason)
		}
	}
}

func TestLabelNodeParameters(t *testing.T) {
	for params, want := range map[string]string{
		`labels: {}`:                                                                "may not be empty",
		`labels: {a: "b c"}`:                                                        "no value for the label",
		`labels: {stoop.dev/x: x}`:                                                  "not for rules to set",
		`labels: {kubernetes.io/hostname: x}`:                                       "not for rules to set",
		`labels: {node-role.kubernetes.io/x: x}`:                                    "not for rules to set",
		`labels: {node-restriction.kubernetes.io/tier: x}`:                          "not for rules to set",
		`labels: {x.node-restriction.kubernetes.io/tier: x}`:                        "not for rules to set",
		`labels: {topology.kubernetes.io/zone: x}`:                                  "not for rules to set",
		`labels: {node.kubernetes.io/instance-type: x}`:                             "not for rules to set",
		`labels: {x.k8s.io/x: x}`:                                                   "not for rules to set",
		`labels: {node.kubernetes.io/exclude-from-external-load-balancers: "true"}`: "",
		`labels: {example.com/quarantine: "yes", b: ""}`:                            "",
	} {
		if got := problems(t, entryOf(t, "label-node"), params); want == "" && len(got) > 0 || want != "" && !slices.ContainsFunc(got, func(p string) bool { return strings.Contains(p, want) }) {
			t.Errorf("%s: problems %q, want %q", params, got, want)
		}
	}
}
