package e2e

import (
	"testing"

	corev1 "k8s.io/api/core/v1"

	"stoop/responders/conformance"
)

// workloadCases are those of the responders that act on a pod's place in its
// workload.
func workloadCases() []conformance.Case {
	return []conformance.Case{
		{
			Responder: "evict-pod",
			Done: func(t testing.TB, w conformance.World, pod *corev1.Pod) {
				if now := podNow(t, w, pod); now != nil && now.DeletionTimestamp == nil {
					t.Error("the pod is not being deleted")
				}
			},
		},
	}
}
