package e2e

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/responders/conformance"
)

// nodeActCases are those of the responders that act on the node as the cluster
// knows it, and of what they share with those that act on a pod.
func nodeActCases() []conformance.Case {
	return []conformance.Case{
		{
			Responder: "annotate-pod",
			Params: func(testing.TB) (string, func() int) {
				return `{"annotations":{"example.com/suspect":"yes: \"it is\"\n"}}`, nil
			},
			Done: func(t testing.TB, w conformance.World, pod *corev1.Pod) {
				if now := podNow(t, w, pod); now == nil || now.Annotations["example.com/suspect"] != "yes: \"it is\"\n" {
					t.Errorf("the pod is gone or has not the annotation: %+v", now)
				}
			},
			Undone: func(t testing.TB, w conformance.World, pod *corev1.Pod) {
				if now := podNow(t, w, pod); now == nil || len(now.Annotations) != 0 {
					t.Errorf("the pod is gone or has the annotation: %+v", now)
				}
			},
		},
		{
			Responder: "label-node",
			Params: func(testing.TB) (string, func() int) {
				return `{"labels":{"example.com/suspect":"yes"}}`, nil
			},
			Done: func(t testing.TB, w conformance.World, pod *corev1.Pod) {
				if now := nodeNow(t, w, pod.Spec.NodeName); now.Labels["example.com/suspect"] != "yes" {
					t.Errorf("the node's labels are %v", now.Labels)
				}
			},
			Undone: func(t testing.TB, w conformance.World, pod *corev1.Pod) {
				if now := nodeNow(t, w, pod.Spec.NodeName); now.Labels["example.com/suspect"] != "" {
					t.Errorf("the node's labels are %v", now.Labels)
				}
			},
		},
	}
}

func nodeNow(t testing.TB, w conformance.World, name string) *corev1.Node {
	t.Helper()
	now, err := w.Admin().CoreV1().Nodes().Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return now
}
