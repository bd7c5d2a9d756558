package responders_test

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"stoop/responders"
	"stoop/responders/conformance"
)

// nodeCases are those of what acts in the pod, or through its kubelet.
func nodeCases() []conformance.Case {
	return []conformance.Case{
		{
			Responder: "exec-in-pod",
			// What the server was asked to execute counts as written.
			Params: func(testing.TB) (string, func() int) {
				return `{"command":["ps","aux"],"environment":{"RULE_OUTPUT":"k8s.pod.name"}}`, nil
			},
		},
		{
			Responder: "debug-pod",
			Params: func(testing.TB) (string, func() int) {
				return `{"image":"example.com/tools:1","command":["sleep","3600"]}`, nil
			},
			Done: func(t testing.TB, w conformance.World, pod *corev1.Pod) {
				now := conformance.PodNow(t, w, pod)
				if len(now.Spec.EphemeralContainers) != 1 {
					t.Fatalf("the pod's ephemeral containers are %+v", now.Spec.EphemeralContainers)
				}
				c := now.Spec.EphemeralContainers[0]
				if !strings.HasPrefix(c.Name, "stoop-debug-") || c.Image != "example.com/tools:1" || len(c.Command) != 2 || c.TargetContainerName != "main" {
					t.Errorf("the container is %+v", c)
				}
			},
		},
		{
			Responder: "capture-files", Suspect: as(responders.WithFiles),
			Params: func(testing.TB) (string, func() int) {
				return `{"paths":["/etc/*"],"fields":["fd.name"]}`, nil
			},
		},
		{
			Responder: "capture-packets", Suspect: as(responders.Networked),
			Params: func(testing.TB) (string, func() int) { return `{"duration":"100ms"}`, nil },
		},
		{
			// How the kubelet itself is asked has a test of its own: here the server
			// stands for the way through the API server.
			Responder: "checkpoint-container",
			Params:    func(testing.TB) (string, func() int) { return `{"via":"apiserver"}`, nil },
		},
	}
}
