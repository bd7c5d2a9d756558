package e2e

import (
	"testing"

	corev1 "k8s.io/api/core/v1"

	"stoop/responders/conformance"
)

// withKubelet reports whether a responder needs the kubelet of a real node: there is
// none here, and the command in ./node has it act.
func withKubelet(responder string) bool {
	return responder == "exec-in-pod" || responder == "checkpoint-container"
}

// nodeCases are those of the responders that act in the pod.
func nodeCases() []conformance.Case {
	return []conformance.Case{
		{
			Responder: "debug-pod",
			Params: func(testing.TB) (string, func() int) {
				return `{"image":"example.com/tools:1","command":["sleep","3600"]}`, nil
			},
			Done: func(t testing.TB, w conformance.World, pod *corev1.Pod) {
				now := conformance.PodNow(t, w, pod)
				if now == nil || len(now.Spec.EphemeralContainers) != 1 {
					t.Fatalf("the pod has no ephemeral container, or is gone: %+v", now)
				}
				if c := now.Spec.EphemeralContainers[0]; c.Image != "example.com/tools:1" || c.TargetContainerName != "main" {
					t.Errorf("the container is %+v", c)
				}
			},
		},
	}
}
