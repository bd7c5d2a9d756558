package conformance

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// NodeActs are the cases of the responders that act on the node as the cluster
// knows it, and of what they share with those that act on a pod. drainFor is how long
// a drain waits for its pods to end: only where something ends them is that longer.
func NodeActs(drainFor string) []Case {
	return []Case{
		{
			Responder: "annotate-pod",
			Params: func(testing.TB) (string, func() int) {
				return `{"annotations":{"example.com/suspect":"yes: \"it is\"\n"}}`, nil
			},
			Done: func(t testing.TB, w World, pod *corev1.Pod) {
				if now := PodNow(t, w, pod); now == nil || now.Annotations["example.com/suspect"] != "yes: \"it is\"\n" || len(now.Annotations) != 1 {
					t.Errorf("the pod is gone, or has other annotations: %+v", now)
				}
			},
			Undone: func(t testing.TB, w World, pod *corev1.Pod) {
				if now := PodNow(t, w, pod); now == nil || len(now.Annotations) != 0 {
					t.Errorf("the pod is gone, or has annotations: %+v", now)
				}
			},
		},
		{
			Responder: "label-node",
			Params: func(testing.TB) (string, func() int) {
				return `{"labels":{"example.com/suspect":"yes"}}`, nil
			},
			Done: func(t testing.TB, w World, pod *corev1.Pod) {
				if now := nodeNow(t, w, pod.Spec.NodeName); now.Labels["example.com/suspect"] != "yes" {
					t.Errorf("the node's labels are %v", now.Labels)
				}
			},
			Undone: func(t testing.TB, w World, pod *corev1.Pod) {
				if now := nodeNow(t, w, pod.Spec.NodeName); len(now.Labels) != 0 {
					t.Errorf("the node's labels are %v", now.Labels)
				}
			},
		},
		{
			Responder: "cordon-node",
			Done: func(t testing.TB, w World, pod *corev1.Pod) {
				if now := nodeNow(t, w, pod.Spec.NodeName); !now.Spec.Unschedulable || len(notes(now)) != 1 {
					t.Errorf("the node is %+v", now)
				}
			},
			Undone: inService,
		},
		{
			Responder: "taint-node",
			Params: func(testing.TB) (string, func() int) {
				return `{"value":"yes","effect":"NoExecute"}`, nil
			},
			Done: func(t testing.TB, w World, pod *corev1.Pod) {
				now := nodeNow(t, w, pod.Spec.NodeName)
				if !hasTaint(now, "stoop.dev/suspect=yes:NoExecute") || len(notes(now)) != 1 {
					t.Errorf("the node is %+v", now)
				}
			},
			Undone: inService,
		},
		{
			Responder: "drain-node",
			Params: func(testing.TB) (string, func() int) {
				return fmt.Sprintf(`{"force":true,"deadline":%q}`, drainFor), nil
			},
			Done: func(t testing.TB, w World, pod *corev1.Pod) {
				if now := nodeNow(t, w, pod.Spec.NodeName); !now.Spec.Unschedulable || len(notes(now)) != 1 {
					t.Errorf("the node is %+v", now)
				}
				if now := PodNow(t, w, pod); now != nil && now.DeletionTimestamp == nil {
					t.Error("the pod is not being deleted")
				}
			},
			Undone: inService,
		},
	}
}

func nodeNow(t testing.TB, w World, name string) *corev1.Node {
	t.Helper()
	now, err := w.Admin().CoreV1().Nodes().Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return now
}

// inService fails the test unless nothing of stoop's keeps pods off the node.
func inService(t testing.TB, w World, pod *corev1.Pod) {
	t.Helper()
	now := nodeNow(t, w, pod.Spec.NodeName)
	if now.Spec.Unschedulable || len(notes(now)) != 0 || slices.ContainsFunc(now.Spec.Taints, func(t corev1.Taint) bool { return strings.HasPrefix(t.Key, "stoop.dev/") }) {
		t.Errorf("the node is %+v", now)
	}
}

// notes are the annotations of stoop's on a node.
func notes(node *corev1.Node) []string {
	var out []string
	for name, value := range node.Annotations {
		if strings.HasPrefix(name, "stoop.dev/node-act.") {
			out = append(out, value)
		}
	}
	return out
}

func hasTaint(node *corev1.Node, taint string) bool {
	return slices.ContainsFunc(node.Spec.Taints, func(t corev1.Taint) bool { return t.ToString() == taint })
}
