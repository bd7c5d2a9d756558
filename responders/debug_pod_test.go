package responders_test

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"stoop/broker"
	"stoop/responders"
)

func TestDebugPod(t *testing.T) {
	p := newInPod(t, nil)
	pod := p.pod.DeepCopy()
	pod.Spec.EphemeralContainers = []corev1.EphemeralContainer{{EphemeralContainerCommon: corev1.EphemeralContainerCommon{Name: "somebody-s", Image: "other"}}}
	pods := p.server.Admin().CoreV1().Pods("shop")
	var err error
	if p.pod, err = pods.UpdateEphemeralContainers(t.Context(), pod.Name, pod, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	act := func(id, params string) (responders.Result, error) {
		return p.responder("debug-pod").Act(t.Context(), p.request("debug-pod", id, params, nil))
	}
	res, err := act("s1", `{"image":"example.com/tools:1"}`)
	if err != nil || res.Nothing || !strings.Contains(res.Reason, "can't be removed") || res.Undo != nil {
		t.Fatalf("%+v, %v", res, err)
	}
	res2, err := act("s1", `{"image":"example.com/tools:1"}`)
	if err != nil || !res2.Nothing {
		t.Errorf("a second run: %+v, %v", res2, err)
	}
	if _, err := act("s2", `{"image":"example.com/tools:1","command":["sh","-c","true"]}`); err != nil {
		t.Errorf("another step: %v", err)
	}
	now, err := pods.Get(t.Context(), pod.Name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	e := now.Spec.EphemeralContainers
	if len(e) != 3 || e[0].Name != "somebody-s" || e[1].Name != res.Found["container"] || e[1].TargetContainerName != "main" || len(e[2].Command) != 3 || e[1].Name == e[2].Name {
		t.Errorf("the ephemeral containers are %+v", e)
	}

	ran := len(e)
	p.setContainer(strings.Repeat("f", 64))
	_, err = act("s3", `{"image":"example.com/tools:1"}`)
	if status, _, _, _ := responders.Classify(err); status != broker.Nothing {
		t.Errorf("beside the replacement of the suspect: %v", err)
	}
	if now, err = pods.Get(t.Context(), pod.Name, metav1.GetOptions{}); err != nil || len(now.Spec.EphemeralContainers) != ran {
		t.Errorf("the ephemeral containers are %+v, %v", now.Spec.EphemeralContainers, err)
	}
	for _, bad := range []string{`{}`, `{"image":""}`, `{"image":" x"}`, `{"image":"x","command":["\u0000"]}`} {
		if _, err := act("bad", bad); err == nil {
			t.Errorf("parameters %s are taken", bad)
		}
	}
}
