package responders_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestLabelPod(t *testing.T) {
	a := newActor(t, "label-pod", nil)
	if res := a.act("s1", "labels: {app: web}"); !res.Nothing || res.Undo != nil {
		t.Errorf("labels that are so already: %+v", res)
	}
	res := a.act("s2", `{labels: {app: "", tier: bad, team: red}, ttl: 10m}`)
	if got := a.labels(); got["app"] != "" || got["tier"] != "bad" || got["team"] != "red" || len(got) != 2 || res.TTL != 10*time.Minute {
		t.Errorf("labels %v, result %+v", got, res)
	}
	// Somebody changes one of them meanwhile.
	now, err := a.admin.CoreV1().Pods("shop").Get(t.Context(), "web-0", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	now.Labels["tier"] = "good"
	if _, err := a.admin.CoreV1().Pods("shop").Update(t.Context(), now, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	u := a.undo("s2", res)
	if got := a.labels(); got["app"] != "web" || got["tier"] != "good" || len(got) != 2 || !strings.Contains(u.Reason, "left: tier") {
		t.Errorf("after undo: labels %v, result %+v", got, u)
	}
	if u := a.undo("s2", res); !u.Nothing {
		t.Errorf("undo once more: %+v", u)
	}
}

func TestLabelPodParameters(t *testing.T) {
	for params, want := range map[string]string{
		`labels: {}`:                                      "may not be empty",
		`labels: {"a b": c}`:                              "no name for a label",
		`labels: {a: "b c"}`:                              "no value for the label",
		`labels: {stoop.dev/isolated: x}`:                 "not for rules to set",
		`labels: {node-role.kubernetes.io/x: x}`:          "not for rules to set",
		`labels: {pod-security.kubernetes.io/enforce: x}`: "not for rules to set",
		`labels: {x.k8s.io/x: x}`:                         "not for rules to set",
		`labels: {app.kubernetes.io/name: x}`:             "",
		`labels: {example.com/quarantine: "yes", b: ""}`:  "",
		`labels: {notkubernetes.io/x: x}`:                 "",
	} {
		if got := problems(t, entryOf(t, "label-pod"), params); want == "" && len(got) > 0 || want != "" && !slices.ContainsFunc(got, func(p string) bool { return strings.Contains(p, want) }) {
			t.Errorf("%s: problems %q, want %q", params, got, want)
		}
	}
}
