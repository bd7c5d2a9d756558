package responders_test

import (
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestAnnotatePod(t *testing.T) {
	a := newActor(t, "annotate-pod", func(p *corev1.Pod) { p.Annotations = map[string]string{"team": "red", "empty": ""} })
	annotations := func() map[string]string {
		now, err := a.admin.CoreV1().Pods("shop").Get(t.Context(), "web-0", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return now.Annotations
	}
	if res := a.act("s1", "annotations: {team: red, other: ''}"); !res.Nothing || res.Undo != nil {
		t.Errorf("annotations that are so already: %+v", res)
	}
	res := a.act("s2", `annotations: {team: "", empty: "", suspect: "since\n$(id) {{.}}"}`)
	if got := annotations(); len(got) != 1 || got["suspect"] != "since\n$(id) {{.}}" {
		t.Errorf("annotations %v", got)
	}
	if got := a.labels(); len(got) != 1 || got["app"] != "web" {
		t.Errorf("labels %v", got)
	}
	a.undo("s2", res)
	if got, ok := annotations()["empty"]; len(annotations()) != 2 || got != "" || !ok || annotations()["team"] != "red" {
		t.Errorf("after undo: annotations %v", annotations())
	}
}

func TestAnnotatePodParameters(t *testing.T) {
	for params, want := range map[string]string{
		`annotations: {}`:                                                    "may not be empty",
		`annotations: {"a b": c}`:                                            "no name for an annotation",
		`annotations: {stoop.dev/step: x}`:                                   "not for rules to set",
		`annotations: {kubernetes.io/config.mirror: x}`:                      "not for rules to set",
		`annotations: {cluster-autoscaler.kubernetes.io/safe-to-evict: "1"}`: "not for rules to set",
		`annotations: {app.kubernetes.io/x: "a b"}`:                          "",
		`annotations: {example.com/quarantine: "yes, \"really\"", b: ""}`:    "",
	} {
		if got := problems(t, entryOf(t, "annotate-pod"), params); want == "" && len(got) > 0 || want != "" && !slices.ContainsFunc(got, func(p string) bool { return strings.Contains(p, want) }) {
			t.Errorf("%s: problems %q, want %q", params, got, want)
		}
	}
}
