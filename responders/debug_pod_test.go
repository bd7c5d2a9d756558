package responders_test

import (
	"net/http"
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

// A pod that ends gets no container more, and one that changed since it was read is
// read again: the list that is written is the whole list.
func TestDebugPodMeanwhile(t *testing.T) {
	between := func() {}
	p := newInPod(t, func(next http.RoundTripper) http.RoundTripper {
		return tripperFunc(func(req *http.Request) (*http.Response, error) {
			if req.Method == http.MethodPatch {
				between()
			}
			return next.RoundTrip(req)
		})
	})
	pods := p.server.Admin().CoreV1().Pods("shop")
	r := p.responder("debug-pod")
	act := func(id string) error {
		_, err := r.Act(t.Context(), p.request("debug-pod", id, `{"image":"example.com/tools:1"}`, nil))
		return err
	}
	between = func() {
		now, err := pods.Get(t.Context(), "web-0", metav1.GetOptions{})
		if err != nil {
			t.Error(err)
			return
		}
		now.Spec.EphemeralContainers = []corev1.EphemeralContainer{{EphemeralContainerCommon: corev1.EphemeralContainerCommon{Name: "somebody-s"}}}
		if _, err := pods.UpdateEphemeralContainers(t.Context(), "web-0", now, metav1.UpdateOptions{}); err != nil {
			t.Error(err)
		}
	}
	if _, retry, _, reason := responders.Classify(act("s1")); !retry {
		t.Errorf("a container that somebody added meanwhile: %s, want another try", reason)
	}
	between = func() {}
	if err := act("s1"); err != nil {
		t.Error(err)
	}
	now, err := pods.Get(t.Context(), "web-0", metav1.GetOptions{})
	if err != nil || len(now.Spec.EphemeralContainers) != 2 {
		t.Errorf("the ephemeral containers are %+v, %v", now.Spec.EphemeralContainers, err)
	}
	if err := pods.Delete(t.Context(), "web-0", metav1.DeleteOptions{}); err != nil { // it ends, and is there
		t.Fatal(err)
	}
	if status, _, _, reason := responders.Classify(act("s2")); status != broker.Nothing {
		t.Errorf("a pod that ends: %s (%s)", status, reason)
	}
}

type tripperFunc func(*http.Request) (*http.Response, error)

func (f tripperFunc) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }
